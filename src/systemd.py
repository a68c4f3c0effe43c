"""What systemd wants to hear: sd_notify(3), and nothing when it does not listen."""

from __future__ import annotations

import os
import socket


def notify(message: str) -> None:
    """Send assignments such as "READY=1" to $NOTIFY_SOCKET; a deaf listener is not our fault."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
        try:
            sender.sendto(message.encode(), address)
        except OSError:
            return
