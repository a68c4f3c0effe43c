"""`python -m vhost_device_console` is the command."""

from .cli import main

main()
