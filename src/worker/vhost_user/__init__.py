"""How the frontend talks to us: socket, wire and session of vhost-user."""
