"""A person at a console, without input or output: keys and events in, what to do about them out.

Whoever has a person's keys and a `Link` gives both to a `Desk`, and does what that returns: the
`attach` command in a terminal, the ssh server for each of its sessions.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from ..attachment import WINDOW, Ask, AskWho, Bye, Hello, Role, Size, Who
from ..words import clean
from .link import Dropped, Event, Gap

#: Exit statuses: left; what a pipe has cannot be typed.
DONE, NOT_WRITER = 0, 4

#: Bytes of a pipe that wait for room before no more are to be read.
_MOST_UNSENT = 1 << 16

#: Keys that wait for room before more are dropped: what somebody pastes goes in.
MOST_KEYS = 1 << 20

#: Seconds for what was typed before leaving to be taken.
_LAST_S = 1.0

#: The Linux hvc console's magic SysRq prefix (drivers/tty/hvc/hvc_console.c): Ctrl-O.
_SYSRQ = 0x0F

_HELP = (
    "?  this list",
    "q  leave; the guest goes on",
    "b  SysRq: the next key is the command (h lists them)",
    "f  become the writer, whoever is now",
    "r  only watch, or type again",
    "w  who is here",
    "t  a timestamp before each line, or none",
    "l  write a log of what comes, or no more",
)


class Show(msgspec.Struct):
    """Show these bytes; a memoryview is good until the next event."""

    data: memoryview | bytes


class Say(msgspec.Struct):
    """Say these lines about the console, beside its output; see `bracketed`."""

    text: str


class Leave(msgspec.Struct):
    """Hang up, with this exit status."""

    status: int = DONE


class ToggleLog(msgspec.Struct):
    """Begin a log of what comes, or end it."""


#: What a desk wants done; questions are for the link.
Effect = Show | Say | Leave | ToggleLog | Ask | AskWho


def key_name(key: int) -> str:
    """Return what people call a control character."""
    return f"Ctrl-{chr(key ^ 0x40)}" if key < 0x20 or key == 0x7F else chr(key)


def bracketed(text: str, *, raw: bool) -> bytes:
    """Return what is said as lines of their own, for a `raw` terminal or for a pipe."""
    end = "\r\n" if raw else "\n"
    lines = end.join(f"[{each}]" for each in text.splitlines())
    return f"{end if raw else ''}{lines}{end}".encode(errors="backslashreplace")


class Desk:
    """Someone with a `terminal`, or a pipe whose bytes are typed as they are.

    `escape` is the byte that begins a command in a terminal, None for none. Who `may_write` can
    become the writer, at once with `force`; `wants_to` if that is what was asked for when coming.
    `can_log` offers the log, `can_stamp` timestamps. A pipe at its end leaves once all is typed and
    the guest was quiet for `linger` seconds, one that was empty never; if it cannot be typed,
    `denied` says what to do about it. `clock` counts seconds, `wall` those since 1970.
    """

    def __init__(
        self,
        *,
        terminal: bool,
        escape: int | None = 0x1D,
        may_write: bool = True,
        wants_to: bool = True,
        force: bool = False,
        can_log: bool = False,
        can_stamp: bool = True,
        timestamps: bool = False,
        linger: float = 1.0,
        denied: str = "another is the writer",
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._terminal = terminal
        self._escape = escape if terminal else None
        self._may_write = may_write
        self._wants_to = wants_to
        self._force = force and may_write
        self._can_log = can_log
        self._can_stamp = can_stamp
        self._timestamps = timestamps
        self._linger = linger
        self._denied = denied
        self._clock = clock
        self._wall = wall
        self._menu: Callable[[int], list[Effect]] | None = None  # what the next key means
        self._unsent = bytearray()
        self._dropped = 0  # keys, since there was room the last time
        self._fed = False  # by a pipe
        self._ended = False  # the keys
        self._leaving: float | None = None  # at the latest then
        self._quiet_since = clock()
        self._line_begun = False
        self._role: Role | None = None
        self._greeted = False

    # The keys

    @property
    def full(self) -> bool:
        """Whether no more of a pipe should be read for now; keys always are, for the menu."""
        return not self._terminal and len(self._unsent) > _MOST_UNSENT

    def keys(self, data: bytes) -> list[Effect]:
        """Take what was typed."""
        if self._leaving is not None:
            return []
        if not self._terminal:
            self._fed = self._fed or bool(data)
            self._unsent += data
            self._quiet_since = self._clock()
            return []
        effects: list[Effect] = []
        for key in data:
            if self._menu is not None:
                menu, self._menu = self._menu, None
                effects += menu(key)
                if self._leaving is not None:
                    break
            elif key == self._escape:
                self._menu = self._choose
            else:
                effects += self._put(key)
        return effects

    def end(self) -> list[Effect]:
        """Take it that there are no more keys."""
        self._ended = True
        return [Leave()] if self._terminal else []

    def sysrq(self) -> list[Effect]:
        """Have the next key be a SysRq command."""
        self._menu = self._type_sysrq
        return [Say("SysRq: which key? h lists them")]

    def type(self, take: Callable[[bytes], int]) -> list[Effect]:
        """Give `take` what waits to be typed, if that may be; it returns how much it took."""
        if not self._unsent or self._role is None:
            return []
        if not self._role.writer and self._terminal:
            self._unsent.clear()  # a watcher's keys go nowhere
        elif not self._role.writer and not self._force:
            return [Say(f"what comes from the pipe cannot be typed: {self._denied}"), _REFUSED]
        else:
            del self._unsent[: take(bytes(self._unsent[:WINDOW]))]
        if self._unsent or not self._dropped:
            return []
        dropped, self._dropped = self._dropped, 0
        return [Say(f"there is room again: {dropped} bytes that were typed were dropped")]

    def leaves_at(self, unacknowledged: int) -> float | None:
        """Return when to leave, by `clock`, unless something happens before; None for never.

        So many bytes were taken and are not the guest's yet.
        """
        if self._leaving is not None:
            return self._leaving - (0 if self._unsent else _LAST_S)
        if self._unsent or unacknowledged:
            self._quiet_since = self._clock()
        elif self._ended and self._fed:
            return self._quiet_since + self._linger
        return None

    def leave(self) -> list[Effect]:
        """Return what to do when it is time to leave."""
        lost = len(self._unsent) + self._dropped
        if not lost:
            return [Leave()]
        return [Say(f"{lost} bytes that were typed did not reach the guest"), Leave()]

    def _put(self, *keys: int) -> list[Effect]:
        """Have these keys be typed, or none of them if there is no room or one is missing."""
        if not self._dropped and len(self._unsent) < MOST_KEYS:
            self._unsent += bytes(keys)
            return []
        first = not self._dropped
        self._dropped += len(keys)
        return [Say("there is no room for more keys: they are dropped")] if first else []

    def _type_sysrq(self, key: int) -> list[Effect]:
        return self._put(_SYSRQ, key)

    def _choose(self, key: int) -> list[Effect]:
        if key == self._escape:
            return self._put(key)
        match chr(key):
            case "q" | "Q":
                self._leaving = self._clock() + _LAST_S
                return [] if self._unsent else [Leave()]
            case "b":
                return self.sysrq()
            case "f" | "r" if not self._may_write:
                return [Say("you may only watch")]
            case "f":
                return [Ask(write=True, force=True)]
            case "r":
                return [Ask(write=self._role is not None and not self._role.writer)]
            case "w":
                return [AskWho()]
            case "t" if not self._can_stamp:
                return [Say("lines of JSON have no timestamps")]
            case "t":
                self._timestamps = not self._timestamps
                return [Say(f"timestamps {'on' if self._timestamps else 'off'}")]
            case "l" if self._can_log:
                return [ToggleLog()]
        lines = [line for line in _HELP if self._can_log or line[0] != "l"]
        escape = key_name(self._escape or 0)
        return [Say("\n".join([*lines, f"{escape}  type {escape} itself"]))]

    # The events

    def take(self, event: Event) -> list[Effect]:
        """Take what has come over the link."""
        match event:
            case memoryview():
                self._quiet_since = self._clock()
                return [Show(self._stamped(event) if self._timestamps else event)]
            case Gap(None):
                return [Say("another daemon: what came meanwhile is not known")]
            case Gap(missing):
                return [Say(f"{missing} bytes are missing here")]
            case Dropped(typed):
                return [Say(f"{typed} bytes that were typed may not have reached the guest")]
            case Hello():
                return self._greet(event)
            case Role():
                return self._take_role(event)
            case Who():
                return [Say("\n".join(_people(event)))]
            case Bye(why):
                return [Say(clean(why))]
            case Size():
                return []

    @staticmethod
    def lost() -> Say:
        """Return what to say when the link is lost and will be tried again."""
        return Say("the daemon is gone; waiting for it")

    def _greet(self, hello: Hello) -> list[Effect]:
        what = f"port {hello.port}, {hello.name}" if hello.name else f"port {hello.port}"
        again = "again " if self._greeted else ""
        help_ = "" if self._escape is None else f"; {key_name(self._escape)} then ? for help"
        self._greeted = True
        said = Say(f"attached {again}to {clean(hello.guest)}, {clean(what)}{help_}")
        return [said, Ask(write=True, force=True)] if self._force else [said]

    def _take_role(self, role: Role) -> list[Effect]:
        before, self._role = self._role, role
        if role.writer:
            return [] if before is None or before.writer else [Say("you type now")]
        news = self._wants_to if before is None else before.writer or before.by != role.by
        by = f": {clean(role.by)} types" if role.by else ""
        return [Say(f"you watch{by}")] if news else []

    def _stamped(self, data: memoryview) -> bytes:
        """Return `data` with the time of day before each line that begins in it and has text."""
        now = self._wall()
        stamp = time.strftime("[%H:%M:%S", time.localtime(now)).encode() + b".%03d] " % (
            now % 1 * 1000
        )
        out = bytearray()
        for line in bytes(data).splitlines(keepends=True):
            if not self._line_begun and line.strip(b"\r\n"):
                out += stamp
                self._line_begun = True
            out += line
            if line.endswith(b"\n"):
                self._line_begun = False
        return bytes(out)


_REFUSED = Leave(NOT_WRITER)


def _people(who: Who) -> list[str]:
    lines = []
    for person in who.people:
        notes = ["types" if person.writer else "watches"]
        if person.columns:
            notes.append(f"{person.columns}x{person.rows}")
        if person.lag:
            notes.append(f"{person.lag} bytes behind")
        you = " (you)" if person.you else ""
        lines.append(f"{clean(person.name)}{you}: {', '.join(notes)}")
    return lines
