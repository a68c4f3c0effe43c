"""The network backend: TCP clients, for `nc`, `telnet`-like tools and programs."""

from __future__ import annotations

import fcntl
import socket
import struct
import termios

from .stream import StreamClient, StreamEndpoint

_COUNT = struct.Struct("=i")

# A client that vanished without a word is noticed after about a minute and a half of silence, or
# half a minute after output that it did not acknowledge.
_KEEPALIVE_IDLE_S = 60
_KEEPALIVE_INTERVAL_S = 10
_KEEPALIVE_PROBES = 3
_UNACKNOWLEDGED_MS = 30_000


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
        sock.setsockopt(tcp, socket.TCP_USER_TIMEOUT, _UNACKNOWLEDGED_MS)

    def undelivered(self) -> int:
        """Return how many bytes were sent but never acknowledged (tcp(7), SIOCOUTQ).

        The count stands after a reset too: nothing more is acknowledged then.
        """
        # SIOCOUTQ and TIOCOUTQ are one number on Linux.
        raw = fcntl.ioctl(self._sock, termios.TIOCOUTQ, bytes(_COUNT.size))
        count: int = _COUNT.unpack(raw)[0]
        return count


def endpoint(fd: int) -> StreamEndpoint:
    """Return the endpoint of a listening TCP socket, and own it."""
    return StreamEndpoint(fd, TcpClient)
