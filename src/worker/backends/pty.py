"""The pty backend: whoever opens the slave side, with `screen`, `minicom` or `cat`.

The master process made the pair and keeps it, raw, for good; here its controlling side is read and
written while a slave is open. That it was opened nobody is told by poll, so inotify watches it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import select
import struct

from .base import not_now

_IN_OPEN = 0x20
_NUMBER = struct.Struct("=I")

# ioctl_tty(2); the termios module knows the name from Python 3.13 on.
_TIOCGPTN = 0x80045430


def slave_name(fd: int) -> str:
    """Return the path of the slave whose controlling side is `fd`."""
    raw = fcntl.ioctl(fd, _TIOCGPTN, bytes(_NUMBER.size))
    return f"/dev/pts/{_NUMBER.unpack(raw)[0]}"


def _watch_opens(path: str) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    fd: int = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    if fd < 0 or libc.inotify_add_watch(fd, os.fsencode(path), _IN_OPEN) < 0:
        number = ctypes.get_errno()
        if fd >= 0:
            os.close(fd)
        raise OSError(number, os.strerror(number), path)
    return fd


class PtyClient:
    """Everybody who has the slave open, as one client until the last of them closes it.

    `over` says that its output has ended: what it typed may still be read, whoever has the slave
    open then is another client.
    """

    stays = False
    resizes = True
    framed = False
    due = False

    def __init__(self, fd: int, name: str, *, over: bool) -> None:
        self.name = name
        self.reads = os.dup(fd)
        try:
            self.writes = os.dup(fd)
        except OSError:
            os.close(self.reads)
            raise
        self.over = over

    def read(self, into: list[memoryview]) -> int | None:
        """See `Client.read`; a slave that nobody has open any more is a client that is gone."""
        try:
            return os.readv(self.reads, into)
        except OSError as error:
            if not not_now(error):
                raise _gone(error) from None
            if self.over:
                raise ConnectionResetError("nobody had the pty open any more") from None
            return None

    def write(self, data: memoryview | bytes) -> int:
        """See `Client.write`."""
        if self.over:
            raise ConnectionResetError("nobody had the pty open any more")
        try:
            return os.write(self.writes, data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise _gone(error) from None

    def on_its_way(self) -> int:
        """Return 0: a terminal does not tell."""
        return 0

    def end_output(self) -> int:
        """Return 0: what the terminal took stays in it for whoever opens it next."""
        self.over = True
        return 0

    def unread(self) -> int:
        """Return 0: what was typed stays in the pty."""
        return 0

    def total_written(self) -> None:
        """Return None: a terminal does not count."""
        return

    def total_read(self) -> None:
        """Return None, as for what was written."""
        return

    def size(self) -> tuple[int, int]:
        """See `Client.size`; it is what the users of the slave set it to."""
        columns, rows = os.get_terminal_size(self.reads)
        return columns, rows

    def close(self) -> None:
        """Let go; the pty itself stays. Idempotent."""
        self.over = True
        for fd in (self.reads, self.writes):
            if fd >= 0:
                os.close(fd)
        self.reads = self.writes = -1


def _gone(error: OSError) -> OSError:
    return ConnectionResetError("nobody has the pty open") if error.errno == errno.EIO else error


class PtyEndpoint:
    """The controlling side of a pty; one client at a time, present while a slave is open."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._name = slave_name(fd)
        self._opens = _watch_opens(self._name)
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self._client: PtyClient | None = None
        os.set_blocking(fd, False)

    def fileno(self) -> int:
        """Return the descriptor that is readable after somebody opened the slave."""
        return self._opens

    def accept(self) -> PtyClient | None:
        """Return a client if the slave is open and there is none yet.

        Whoever typed and closed it before anybody looked is one too.
        """
        with contextlib.suppress(BlockingIOError):
            os.read(self._opens, 4096)
        client = self._client
        if client is not None and not client.over:
            return None
        events = sum(events for _, events in self._poll.poll(0))
        closed = bool(events & select.POLLHUP)
        read_on = client is not None and client.reads >= 0
        if closed and (read_on or not events & select.POLLIN):
            return None
        self._client = PtyClient(self._fd, self._name, over=closed)
        return self._client

    def close(self) -> None:
        """Close this side; the pair lives on in the master process."""
        os.close(self._opens)
        os.close(self._fd)

    def abandon(self) -> None:
        """Do nothing: the master keeps the pair as it is."""


def endpoint(fd: int) -> PtyEndpoint:
    """Return the endpoint of a pty's controlling side, and own it."""
    return PtyEndpoint(fd)
