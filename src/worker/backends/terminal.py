"""The nested backend: the terminal (or pipes) that the daemon was started from.

A terminal is set raw, so every key but one goes to the guest: Ctrl-] begins an escape, of which
`?` lists the keys. Standard input and output are opened anew where that is possible, since
non-blocking mode would otherwise be switched on for whoever else has them.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
import termios
import tty
from collections.abc import Callable
from typing import Any

from .base import not_now

_ESCAPE = 0x1D  # Ctrl-]

# What is kept of the modes that the person had: a byte that says what is there, and of which
# descriptors the blocking mode was switched off; the flags, speeds and characters of termios.
_KEPT, _COOKED, _BLOCKING = 1, 2, 4
_MODES = struct.Struct("=6I32B")
_MODES_AT = 8

#: What a terminal gives in one read at most (Linux' n_tty).
_MOST_KEYS = 4096

_HELP = b"\r\n[Ctrl-] then q: leave, the daemon ends; ?: this list; Ctrl-]: send Ctrl-] itself]\r\n"


def _open_anew(fd: int, flags: int) -> tuple[int, bool]:
    """Return a non-blocking descriptor for `fd`'s file, and whether it shares `fd`'s modes."""
    kind = os.fstat(fd).st_mode
    flags |= os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    if stat.S_ISFIFO(kind) or os.isatty(fd):
        with contextlib.suppress(OSError):  # another user's terminal
            return os.open(f"/proc/self/fd/{fd}", flags), False
    return os.dup(fd), True


def _keep(kept: memoryview, stdin: int, fds: list[int]) -> None:
    """Keep the modes as they are now."""
    said = _KEPT
    for at, fd in enumerate(fds):
        said |= os.get_blocking(fd) * _BLOCKING << at
    if os.isatty(stdin):
        said |= _COOKED
        *modes, characters = termios.tcgetattr(stdin)
        numbers = [each if isinstance(each, int) else each[0] for each in characters]
        _MODES.pack_into(kept, _MODES_AT, *modes, *numbers)
    kept[0] = said  # only now: it says that the rest is there


class Terminal:
    """Standard input and output as a client that is there from the start; also its own endpoint.

    `leave` is called when the user asks to, or when nobody can read the output any more. `kept` is
    memory of a killed worker's successors and its own, zeros at first, of at least 128 bytes: the
    modes that were there before the first of them.
    """

    name = "terminal"
    stays = True
    resizes = False  # SIGWINCH tells
    framed = False
    due = False

    def __init__(
        self,
        leave: Callable[[], None],
        stdin: int = 0,
        stdout: int = 1,
        kept: memoryview | None = None,
    ) -> None:
        self._leave = leave
        self._stdin, self._stdout = stdin, stdout
        self.reads, shared_in = _open_anew(stdin, os.O_RDONLY)
        self.writes, shared_out = _open_anew(stdout, os.O_WRONLY)
        kept = memoryview(bytearray(128)) if kept is None else kept
        if not kept[0]:
            _keep(kept, stdin, [self.reads, self.writes])
        said = kept[0]
        self._blocking = [
            (fd, bool(said & _BLOCKING << at))
            for at, (fd, shared) in enumerate(((self.reads, shared_in), (self.writes, shared_out)))
            if shared
        ]
        for fd, _ in self._blocking:
            os.set_blocking(fd, False)
        self._arrived = False
        self._escaped = False
        self._cooked: list[Any] | None = None
        if said & _COOKED:
            modes = _MODES.unpack_from(kept, _MODES_AT)
            self._cooked = [*modes[:6], [*modes[6:]]]
            tty.setraw(stdin, termios.TCSANOW)  # what was typed ahead is kept

    def fileno(self) -> None:
        """Return None: nobody else ever arrives."""
        return

    def accept(self) -> Terminal | None:
        """Return this terminal, once."""
        if self._arrived:
            return None
        self._arrived = True
        return self

    def size(self) -> tuple[int, int]:
        """Return columns and rows, (0, 0) where neither side is a terminal."""
        for fd in (self._stdout, self._stdin):
            with contextlib.suppress(OSError):
                columns, rows = os.get_terminal_size(fd)
                return columns, rows
        return 0, 0

    def read(self, into: list[memoryview]) -> int | None:
        """See `Client.read`; escapes are taken out, which can leave nothing for now."""
        try:
            if self._cooked is None:
                return os.readv(self.reads, into)
            data = os.read(self.reads, min(len(into[0]), _MOST_KEYS))
        except OSError as error:
            if not_now(error):
                return None
            raise ConnectionResetError(f"the terminal is gone: {error}") from None
        if not data:
            return 0
        if self._escaped or _ESCAPE in data:
            data = self._unescape(data)
        into[0][: len(data)] = data
        return len(data) or None

    def _unescape(self, data: bytes) -> bytes:
        keys = bytearray()
        for key in data:
            if not self._escaped:
                if key == _ESCAPE:
                    self._escaped = True
                else:
                    keys.append(key)
                continue
            self._escaped = False
            match key:
                case 0x71:  # q
                    self._leave()
                    break
                case 0x3F:  # ?
                    with contextlib.suppress(OSError):
                        os.write(self.writes, _HELP)
                case 0x1D:
                    keys.append(_ESCAPE)
                case _:
                    pass  # no such key: neither it nor the escape is the guest's
        return bytes(keys)

    def write(self, data: memoryview | bytes) -> int:
        """See `Client.write`."""
        try:
            return os.write(self.writes, data)
        except BlockingIOError:
            return 0
        except OSError as error:
            self._leave()
            raise ConnectionResetError(f"nobody reads the output: {error}") from None

    def on_its_way(self) -> int:
        """Return 0: neither terminals nor pipes tell."""
        return 0

    def end_output(self) -> int:
        """See `Client.end_output`; neither terminals nor pipes tell."""
        return 0

    def unread(self) -> int:
        """Return 0: what was typed is for whoever reads the terminal next."""
        return 0

    def total_written(self) -> None:
        """Return None: neither terminals nor pipes count."""
        return

    def total_read(self) -> None:
        """Return None, as for what was written."""
        return

    def close(self) -> None:
        """Give the terminal back as it was, and leave: nobody else ever comes. Idempotent."""
        self._leave()
        self.abandon()
        for fd in (self.reads, self.writes):
            if fd >= 0:
                os.close(fd)
        self.reads = self.writes = -1

    def abandon(self) -> None:
        """See `Endpoint.abandon`: the modes are the person's again. Idempotent."""
        if self._cooked is not None:
            with contextlib.suppress(termios.error):  # the terminal itself is gone
                termios.tcsetattr(self._stdin, termios.TCSADRAIN, self._cooked)
            self._cooked = None
        for fd, blocking in self._blocking:
            with contextlib.suppress(OSError):
                os.set_blocking(fd, blocking)
        self._blocking = []
