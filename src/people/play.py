"""`play`: a recording in this terminal, as fast as it was, or not."""

from __future__ import annotations

import json
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

import msgspec

from ..words import clean
from .cast import Event, Header
from .terminal import ending, kept

#: What gives a terminal back the modes that a recording may have left: a soft reset (DECSTR), and
#: no reports of the mouse or of what is pasted.
_RESET = b"\x1b[!p\x1b[?1000;1002;1003;1006;2004l"

_FASTER = 2.0
_SLOWEST, _FASTEST = 0.001, 1_000_000.0

#: Seconds that are waited at once: select knows no end of time.
_MOST_S = 3600.0

#: Reads keys for so many seconds (None: until there is one); b"" when there was none.
Keys = Callable[[float | None], bytes]


class Player:
    """Plays `events` to `put`; `keys` waits, and returns what was typed meanwhile.

    `speed` is a factor, `idle_limit` the longest wait in seconds of the recording, before `speed`.
    `paused` begins with a pause, in which `.` goes on by one event and `]` to the next marker.
    """

    def __init__(
        self,
        put: Callable[[bytes], None],
        say: Callable[[str], None],
        keys: Keys,
        clock: Callable[[], float] = time.monotonic,
        *,
        speed: float = 1.0,
        idle_limit: float | None = None,
        paused: bool = False,
    ) -> None:
        self._put = put
        self._say = say
        self._keys = keys
        self._clock = clock
        self._speed = speed
        self._idle_limit = idle_limit
        self._paused = paused
        self._to_marker = False
        self._step = False
        self._over = False

    def play(self, events: Iterable[Event]) -> bool:
        """Play to the end; return whether that was reached."""
        for event in events:
            self._wait(event.wait)
            if self._over:
                return False
            if event.code == "o":
                self._put(event.data.encode(errors="replace"))
            elif event.code == "m" and (self._paused or self._to_marker):
                self._say(event.data or "a marker")
                self._to_marker = False
                self._paused = True
            elif event.code == "x":
                break
            self._step = False
        return True

    def _wait(self, seconds: float) -> None:
        """Wait until the next event is due, in the recording's seconds, and heed keys meanwhile."""
        left = seconds if self._idle_limit is None else min(seconds, self._idle_limit)
        while not self._over and not self._step and not self._to_marker:
            if self._paused:
                self._heed(self._keys(None))
                continue
            if left <= 0:
                # However dense the events are, a key is heard.
                self._heed(self._keys(0))
                if not self._paused:
                    return
                continue
            begun, speed = self._clock(), self._speed
            typed = self._keys(min(left / speed, _MOST_S))
            left -= (self._clock() - begun) * speed
            self._heed(typed)

    def _heed(self, typed: bytes) -> None:
        if typed.startswith(b"\x1b"):  # a terminal's answer to what the recording asked
            return
        for key in typed.decode(errors="replace"):
            match key:
                case " ":
                    self._paused = not self._paused
                case "." if self._paused:
                    self._step = True
                case "]":
                    self._to_marker = True
                    self._paused = False
                case "+" | "=":
                    self._speed = min(self._speed * _FASTER, _FASTEST)
                case "-":
                    self._speed = max(self._speed / _FASTER, _SLOWEST)
                case "q" | "\x03" | "\x04":
                    self._over = True


def play(
    header: Header,
    events: Iterator[Event],
    *,
    speed: float,
    idle_limit: float | None,
    paused: bool,
    quiet: bool,
) -> int:
    """Play a recording to standard output; return the exit status, 130 when it was left."""
    with ending(), _terminal() as keys:
        screen = os.isatty(1)
        if screen and not quiet:
            _say_size(header)
        player = Player(
            _put_out,
            lambda text: None if quiet else _say(f"marker: {text}"),
            keys,
            speed=speed,
            idle_limit=header.idle_limit if idle_limit is None else idle_limit,
            paused=paused and keys is not _deaf,
        )
        try:
            done = player.play(events)
        except KeyboardInterrupt:
            done = False
        finally:
            if screen:
                with suppress(OSError):
                    _put_out(_RESET + b"\r\n")
    return 0 if done else 130


def print_all(events: Iterable[Event]) -> None:
    """Put out all that a recording has at once."""
    for event in events:
        if event.code == "o":
            _put_out(event.data.encode(errors="replace"))


def print_objects(header: Header, events: Iterable[Event]) -> None:
    """Print a recording as JSON lines: what is said of it, and events at seconds from the first."""
    print(json.dumps(msgspec.to_builtins(header)))
    now = 0.0
    for event in events:
        now += event.wait
        print(json.dumps({"at": round(now, 6), "code": event.code, "data": event.data}))


def _put_out(data: bytes) -> None:
    while data:
        data = data[os.write(1, data) :]


def _say(text: str) -> None:
    print(f"\r\n[{clean(text)}]\r", file=sys.stderr, flush=True)


def _say_size(header: Header) -> None:
    try:
        columns, rows = os.get_terminal_size(1)
    except OSError:
        return
    if 0 < columns < header.columns or 0 < rows < header.rows:
        _say(f"recorded at {header.columns}x{header.rows}, this terminal is {columns}x{rows}")


def _deaf(seconds: float | None) -> bytes:
    """Wait where nobody can type."""
    select.select([], [], [], seconds or 0)
    return b""


def _typed(seconds: float | None) -> bytes:
    if not select.select([0], [], [], seconds)[0]:
        return b""
    return os.read(0, 64) or b"q"


@contextmanager
def _terminal() -> Iterator[Keys]:
    """Have keys come one by one, unseen; without a terminal none come."""
    if not os.isatty(0):
        yield _deaf
        return
    # Answers to what the recording asked the terminal are no input of the shell's.
    with kept(termios.TCSAFLUSH):
        tty.setcbreak(0, termios.TCSANOW)
        yield _typed
