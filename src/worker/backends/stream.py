"""Clients over stream sockets, as the tcp and unix backends have them.

The master accepts them, and keeps a copy of the descriptor as long as the client stays: whoever is
let go is told by a shutdown, not by the last descriptor's close.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import termios
from collections.abc import Callable
from typing import TypeVar

from .base import not_now

_COUNT = struct.Struct("=i")

#: Where bytes go that nobody wants any more.
_SCRAP = bytearray(1 << 16)


Made = TypeVar("Made", bound="StreamClient")


class StreamClient:
    """A connected stream socket."""

    stays = False
    resizes = False
    framed = False

    @property
    def due(self) -> bool:
        """Return False: bytes are all there is."""
        return False

    def __init__(self, sock: socket.socket, name: str) -> None:
        sock.setblocking(False)
        self._sock = sock
        self.name = name
        self.reads = sock.fileno()
        self.writes = os.dup(self.reads)

    def read(self, into: list[memoryview]) -> int | None:
        """See `Client.read`."""
        try:
            return os.readv(self.reads, into)
        except OSError as error:  # a timeout or no route any more are no ConnectionErrors
            if not_now(error):
                return None
            raise ConnectionResetError(f"the connection is gone: {error}") from None

    def write(self, data: memoryview | bytes) -> int:
        """See `Client.write`."""
        try:
            return self._sock.send(data, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0

    def _count(self, request: int) -> int:
        raw = fcntl.ioctl(self._sock, request, bytes(_COUNT.size))
        count: int = _COUNT.unpack(raw)[0]
        return count

    def on_its_way(self) -> int:
        """Return TCP's unacknowledged bytes (tcp(7), SIOCOUTQ), a unix socket's unread memory."""
        # SIOCOUTQ and TIOCOUTQ are one number on Linux, as SIOCINQ and FIONREAD are.
        return self._count(termios.TIOCOUTQ)

    def end_output(self) -> int:
        """See `Client.end_output`; a unix socket does not tell."""
        return 0

    def unread(self) -> int:
        """See `Client.unread`."""
        return self._count(termios.FIONREAD)

    def total_written(self) -> int | None:
        """Return None: a unix socket counts memory (SIOCOUTQ), and forgets what was taken."""
        return None

    def total_read(self) -> int | None:
        """Return None, as for what was written."""
        return None

    def size(self) -> tuple[int, int]:
        """Return (0, 0): bytes are all there is."""
        return 0, 0

    def close(self) -> None:
        """End the connection: what was written is still delivered. Idempotent.

        Input that nobody read would make the last close of a TCP socket a reset, which output on
        its way does not survive.
        """
        if self.writes < 0:
            return
        with contextlib.suppress(OSError):  # it is broken
            self._sock.shutdown(socket.SHUT_RDWR)
            while os.readv(self.reads, [_SCRAP]):
                pass
        os.close(self.writes)
        self.reads = self.writes = -1
        self._sock.close()


def adopt(fd: int, client: Callable[[socket.socket], Made]) -> Made:
    """Return the client of a connected socket, and own it.

    Raises OSError, with the connection ended, when it cannot be set up or is over already.
    """
    sock = socket.socket(fileno=fd)
    try:
        return client(sock)
    except OSError:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        sock.close()
        raise
