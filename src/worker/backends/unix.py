"""The unix backend: clients of a unix stream socket, for `socat` and programs on this machine."""

from __future__ import annotations

import socket

from .stream import StreamClient, StreamEndpoint, adopt


def _client(sock: socket.socket) -> StreamClient:
    return StreamClient(sock, "unix client")


def client(fd: int, _name: str = "") -> StreamClient:
    """Return the client of a connected unix socket, and own it; see `stream.adopt`."""
    return adopt(fd, _client)


def endpoint(fd: int) -> StreamEndpoint:
    """Return the endpoint of a listening unix socket, and own it."""
    return StreamEndpoint(fd, _client)
