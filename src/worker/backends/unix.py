"""The unix backend: clients of a unix stream socket, for `socat` and programs on this machine."""

from __future__ import annotations

from .stream import StreamClient, adopt


def client(fd: int, _name: str = "") -> StreamClient:
    """Return the client of a connected unix socket, and own it; see `stream.adopt`."""
    return adopt(fd, lambda sock: StreamClient(sock, "unix client"))
