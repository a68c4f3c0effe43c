"""Where people are: terminal, TCP, unix socket, pty."""
