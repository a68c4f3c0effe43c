"""The network backend: TCP clients, for `nc`, `telnet`-like tools and programs."""

from __future__ import annotations

import select
import socket

from .stream import StreamClient, StreamEndpoint

# A client that vanished without a word is noticed after about a minute and a half of silence. With
# output on its way it is the system's own patience (tcp_retries2, a quarter of an hour): a shorter
# TCP_USER_TIMEOUT would also cut off who is there and only does not read for a while.
_KEEPALIVE_IDLE_S = 60
_KEEPALIVE_INTERVAL_S = 10
_KEEPALIVE_PROBES = 3


class TcpClient(StreamClient):
    """One TCP connection."""

    def __init__(self, sock: socket.socket) -> None:
        host, port = sock.getpeername()[:2]
        super().__init__(sock, f"{host}:{port}")
        tcp = socket.IPPROTO_TCP
        sock.setsockopt(tcp, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(tcp, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE_S)
        sock.setsockopt(tcp, socket.TCP_KEEPINTVL, _KEEPALIVE_INTERVAL_S)
        sock.setsockopt(tcp, socket.TCP_KEEPCNT, _KEEPALIVE_PROBES)

    def end_output(self) -> int:
        """Return how many bytes were never acknowledged before the connection broke.

        While it is whole there are none: the system goes on delivering, closed or not.
        """
        look = select.poll()
        look.register(self._sock, 0)
        return self.on_its_way() if look.poll(0) else 0


def endpoint(fd: int) -> StreamEndpoint:
    """Return the endpoint of a listening TCP socket, and own it."""
    return StreamEndpoint(fd, TcpClient)
