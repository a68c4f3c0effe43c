"""The driver side, for tests: guest memory, rings, frontend, guest console, bad messages."""
