"""`attach`: a console in this terminal, or between the pipes of a script.

The guest's bytes go to standard output and nothing else does; what is said about them goes to
standard error. It stays attached over the death of workers and daemons, and goes on where it was.
"""

from __future__ import annotations

import codecs
import os
import pwd
import re
import select
import selectors
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import IO

import msgspec

from .. import monitor
from ..attachment import Ask, AskWho, Bye, Size
from ..errors import ConsoleError
from ..words import clean
from .desk import DONE, Desk, Effect, Leave, Say, Show, ToggleLog, bracketed
from .link import Gap, Link, LinkLostError
from .terminal import kept

#: Exit statuses, besides those of `desk`.
GONE, NOT_EXPECTED = 1, 3

#: Seconds between two tries to find the guest again.
_AGAIN_S = 0.2

#: What is searched for an expectation: the last so many bytes.
_MOST_EXPECTED = 1 << 16


@dataclass
class Options:
    """How to attach. `escape` is a control character's byte, None for no menu.

    `expect` ends it with status 0 once the output matches, and `timeout`, in seconds, with 3.
    `linger` is how long the guest may be quiet after the end of input from a pipe. `as_json` has
    output and what is said be lines of JSON on standard output.
    """

    request: monitor.Attach
    escape: int | None = 0x1D
    force: bool = False
    expect: re.Pattern[bytes] | None = None
    timeout: float | None = None
    linger: float = 1.0
    timestamps: bool = False
    log: str | None = None
    quiet: bool = False
    stay: bool = True
    as_json: bool = False


def _line(**told: object) -> bytes:
    return msgspec.json.encode(told) + b"\n"


class Attached:
    """A person at a console; `find` returns the guest's daemon's monitor socket.

    `find` raises ConsoleError while there is none.
    """

    def __init__(self, options: Options, find: Callable[[], str]) -> None:
        self._options = options
        self._find = find
        self._link = Link(options.request)
        self._selector = selectors.DefaultSelector()
        self._outlet = select.poll()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._status: int | None = None
        self._signalled = False
        self._terminal = os.isatty(0)
        self._interactive = self._terminal and os.isatty(2)
        self._ended = False  # of the input
        self._dismissed = False  # by the console, since it was last found
        self._again_at = 0.0
        self._seen = bytearray()
        self._log: IO[bytes] | None = None
        self._desk = Desk(
            terminal=self._terminal,
            escape=options.escape,
            wants_to=options.request.write,
            force=options.force,
            can_log=True,
            can_stamp=not options.as_json,
            timestamps=options.timestamps,
            linger=options.linger,
            denied="take the role with --force",
        )

    # The loop

    def run(self) -> int:
        """Stay until the person leaves, and return the exit status."""
        options = self._options
        deadline = None if options.timeout is None else time.monotonic() + options.timeout
        with ExitStack() as undo:
            undo.callback(self._link.close)
            undo.callback(self._end_log)
            self._connect()
            if options.log is not None:
                self._begin_log(options.log)
            undo.enter_context(self._signals())
            undo.enter_context(self._raw())
            self._read_keys(begin=True)
            while self._status is None:
                self._turn(deadline)
            self._end_text()
        return self._status

    def _turn(self, deadline: float | None) -> None:
        now = time.monotonic()
        if deadline is not None and now >= deadline:
            self._say(f"nothing like it came within {self._options.timeout:g} s")
            self._status = NOT_EXPECTED
            return
        if self._link.fileno() < 0 and now >= self._again_at:
            self._try_again()
        leaves_at = self._leaves_at()
        if leaves_at is not None and now >= leaves_at:
            self._do(self._desk.leave())
        for key, events in self._selector.select(self._patience(now, deadline, leaves_at)):
            if events & selectors.EVENT_WRITE:
                self._link.flush()
            if events & selectors.EVENT_READ:
                key.data()
        self._type()
        self._want()

    def _leaves_at(self) -> float | None:
        if self._options.expect is not None:
            return None
        return self._desk.leaves_at(self._link.unacknowledged)

    def _patience(self, now: float, *moments_or_never: float | None) -> float | None:
        moments = [moment for moment in moments_or_never if moment is not None]
        if self._link.fileno() < 0:
            moments.append(self._again_at)
        if self._status is not None:
            return 0.0
        return max(0.0, min(moments) - now) if moments else None

    def _do(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            match effect:
                case Show(data):
                    self._show(self._object(data) if self._options.as_json else data)
                case Say(text):
                    self._say(text)
                case Leave(status):
                    self._status = status
                case ToggleLog():
                    self._toggle_log()
                case Ask() | AskWho():
                    self._link.ask(effect)

    # The connection

    def _connect(self) -> None:
        self._path = self._find()
        self._link.connect(self._path)
        self._dismissed = False
        self._selector.register(self._link.fileno(), selectors.EVENT_READ, self._receive)

    def _lost(self, fd: int) -> None:
        self._selector.unregister(fd)
        if not self._options.stay:
            self._say("the console is gone")
            self._status = GONE
            return
        if self._dismissed:
            self._try_again()
        if self._status is None and self._link.fileno() < 0:
            self._do([self._desk.lost()])
            self._again_at = time.monotonic() + _AGAIN_S

    def _try_again(self) -> None:
        try:
            self._connect()
        except ConsoleError as error:
            self._again_at = time.monotonic() + _AGAIN_S
            if self._dismissed and self._is_removed():
                self._say(clean(str(error)))
                self._status = GONE

    def _is_removed(self) -> bool:
        """Tell whether the daemon answers, and has no such guest or port any more."""
        request = self._options.request
        try:
            guests = monitor.ask(self._path).guests
        except ConsoleError:
            return False
        return not any(
            guest.name == request.guest and request.port in (None, port.name, port.id, str(port.id))
            for guest in guests
            for port in guest.ports
        )

    def _want(self) -> None:
        fd = self._link.fileno()
        if fd < 0:
            return
        wanted = selectors.EVENT_READ
        if self._link.wants_room:
            wanted |= selectors.EVENT_WRITE
        self._selector.modify(fd, wanted, self._receive)

    def _receive(self) -> None:
        fd = self._link.fileno()
        try:
            for event in self._link.receive():
                if isinstance(event, memoryview):
                    self._record(event)
                elif isinstance(event, Gap):
                    self._end_text()
                elif isinstance(event, Bye):
                    self._dismissed = True
                self._do(self._desk.take(event))
        except LinkLostError:
            self._lost(fd)

    # The output

    def _record(self, data: memoryview) -> None:
        """Log what has come, and look for what is expected."""
        if self._log is not None:
            self._write_log(self._log, data)
        if self._options.expect is not None:
            self._seen += data
            if self._options.expect.search(self._seen):
                self._status = DONE
            del self._seen[:-_MOST_EXPECTED]

    def _show(self, data: memoryview | bytes) -> None:
        """Write it out; whoever does not read holds this up, but not for a signal."""
        view = memoryview(data)
        while view and not self._signalled:
            for fd, _ in self._outlet.poll():
                if fd == 1:
                    view = view[os.write(1, view[: select.PIPE_BUF]) :]
                else:
                    self._woken()

    def _say(self, text: str) -> None:
        """Say something about the console, beside its output."""
        if self._options.quiet:
            return
        with suppress(OSError):
            if self._options.as_json:
                os.write(1, _line(said=text))
            else:
                os.write(2, bracketed(text, raw=self._interactive))

    def _object(self, data: memoryview | bytes) -> bytes:
        """Return output, which ends where the link is now, as a line; whole characters of it."""
        pending = len(self._decoder.getstate()[0])
        at = (self._link.at or 0) - len(data) - pending
        text = self._decoder.decode(data)
        return _line(offset=at, text=text) if text else b""

    def _end_text(self) -> None:
        """Show what there is of a character that will never be whole."""
        pending = len(self._decoder.getstate()[0])
        if text := self._decoder.decode(b"", final=True):
            self._show(_line(offset=(self._link.at or 0) - pending, text=text))

    # The keys

    def _read_keys(self, *, begin: bool = False) -> None:
        if begin:
            with suppress(PermissionError):  # a file: it is always readable
                self._selector.register(0, selectors.EVENT_READ, self._read_keys)
                return
            self._do(self._desk.keys(sys.stdin.buffer.read()))
            self._end_keys()
            return
        try:
            data = os.read(0, 1 << 12)
        except OSError:  # the terminal is gone
            data = b""
        if data:
            self._do(self._desk.keys(data))
        else:
            self._selector.unregister(0)
            self._end_keys()

    def _end_keys(self) -> None:
        self._ended = True
        self._do(self._desk.end())

    def _type(self) -> None:
        self._do(self._desk.type(self._link.type))
        if not self._ended:
            watched = 0 in self._selector.get_map()
            if self._desk.full and watched:
                self._selector.unregister(0)
            elif not self._desk.full and not watched:
                self._selector.register(0, selectors.EVENT_READ, self._read_keys)

    # The log

    def _toggle_log(self) -> None:
        if self._log is not None:
            self._say(f"no log any more: {self._log.name}")
            self._end_log()
            return
        guest = re.sub(r"[^\w.-]", "_", self._options.request.guest)
        try:
            self._begin_log(f"{guest}-{time.strftime('%Y%m%d-%H%M%S')}.log")
        except ConsoleError as error:
            self._say(str(error))

    def _write_log(self, log: IO[bytes], data: memoryview) -> None:
        try:
            while data:
                data = data[log.write(data) :]
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            self._end_log()
            self._say(f"the log {clean(log.name)} ends here: {reason}")

    def _begin_log(self, path: str) -> None:
        try:
            # Nothing is held back, and nothing is left to be written when it is closed.
            self._log = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by _end_log
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise ConsoleError(f"cannot write the log {path}: {reason}") from error
        self._say(f"what comes is written to {clean(path)}")

    def _end_log(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None

    # The terminal

    @contextmanager
    def _raw(self) -> Iterator[None]:
        if not self._terminal:
            yield
            return
        try:
            with kept():
                tty.setraw(0, termios.TCSANOW)
                yield
        finally:
            if self._interactive:
                with suppress(OSError):
                    os.write(2, b"\r\n")

    @contextmanager
    def _signals(self) -> Iterator[None]:
        self._wakeup, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        handlers = {
            number: signal.signal(number, _ignore)
            for number in (signal.SIGWINCH, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
        }
        self._selector.register(self._wakeup, selectors.EVENT_READ, self._woken)
        self._outlet.register(1, select.POLLOUT)
        self._outlet.register(self._wakeup, select.POLLIN)
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            self._selector.close()
            os.close(self._wakeup)
            os.close(write)

    def _woken(self) -> None:
        numbers = b""
        with suppress(BlockingIOError):  # it was heard while something was shown
            numbers = os.read(self._wakeup, 64)
        for number in numbers:
            if number == signal.SIGWINCH:
                self._link.ask(Size(*terminal_size()))
            else:
                self._status = 128 + number
                self._signalled = True


def _ignore(_number: int, _frame: FrameType | None) -> None:
    """Stand in for a signal that the wakeup descriptor reports."""


def terminal_size() -> tuple[int, int]:
    """Return this terminal's columns and rows, (0, 0) where there is none."""
    for fd in (0, 1, 2):
        with suppress(OSError):
            columns, rows = os.get_terminal_size(fd)
            return columns, rows
    return 0, 0


def own_name() -> str:
    """Return as whom others see this person: user, terminal."""
    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        user = str(os.getuid())
    with suppress(OSError):
        return f"{user} on {os.ttyname(0).removeprefix('/dev/')}"[:64]
    return f"{user}, process {os.getpid()}"[:64]
