"""What is made for people: commands and gateways. Neither the daemon nor its workers import it."""
