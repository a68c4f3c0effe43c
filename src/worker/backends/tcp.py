"""The network backend: TCP clients, for `nc`, `telnet`-like tools and programs."""

from __future__ import annotations

import errno
import select
import socket
import struct

from .stream import StreamClient, adopt

# A client that vanished without a word is noticed after about a minute and a half of silence. With
# output on its way it is the system's own patience (tcp_retries2, a quarter of an hour): a shorter
# TCP_USER_TIMEOUT would also cut off who is there and only does not read for a while.
_KEEPALIVE_IDLE_S = 60
_KEEPALIVE_INTERVAL_S = 10
_KEEPALIVE_PROBES = 3

# TCP_INFO (linux/tcp.h): the connection's state; the bytes acknowledged by the other side, and
# received from it. The end of its input counts as one more received.
_INFO_BYTES = 136
_STATE_AT = 0
_COUNTS = struct.Struct("=QQ")
_COUNTS_AT = 120
_CLOSED = 7
_ENDED = (6, 8, 9, 11)  # TIME_WAIT, CLOSE_WAIT, LAST_ACK, CLOSING


class TcpClient(StreamClient):
    """One TCP connection; `name` is for one that may be over by now."""

    def __init__(self, sock: socket.socket, name: str = "") -> None:
        if not name:
            host, port = sock.getpeername()[:2]
            name = f"{host}:{port}"
        super().__init__(sock, name)
        tcp = socket.IPPROTO_TCP
        # Urgent bytes are bytes: out of line they would be lost, and be counted as read.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
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

    # Both totals are asked for in two calls, between which more may be acknowledged or received.

    def total_written(self) -> int:
        """See `Client.total_written`: what was acknowledged, and what was not yet."""
        while True:
            _, acknowledged, _ = self._counts()
            total = acknowledged + self.on_its_way()
            if self._counts()[1] == acknowledged:
                return total

    def total_read(self) -> int:
        """See `Client.total_read`: what was received, and does not wait."""
        while True:
            before = state, _, received = self._counts()
            total = received - self.unread()
            if self._counts() == before:
                return total - self._ended(state)

    def _counts(self) -> tuple[int, int, int]:
        """Return the state, and how many bytes were acknowledged and received."""
        info = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
        return info[_STATE_AT], *_COUNTS.unpack_from(info, _COUNTS_AT)

    def _ended(self, state: int) -> bool:
        """Say whether the end of the input was received, before a reset or without one.

        Of a reset connection the system tells that once.
        """
        if state != _CLOSED:
            return state in _ENDED
        return self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.EPIPE


def client(fd: int, name: str = "") -> TcpClient:
    """Return the client of a connected TCP socket, and own it; see `stream.adopt`."""
    return adopt(fd, lambda sock: TcpClient(sock, name))
