"""What pages see of all guests: the daemons are asked while somebody looks, changes are told."""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import select
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

import msgspec

from ... import monitor
from ...attachment import Hello
from ...errors import ConsoleError
from ..link import Link, LinkLostError

_log = logging.getLogger(__name__)

#: Seconds between two looks at the daemons, and for which a look waits for them.
POLL_S = 1.0

#: Seconds in which the daemon of a guest has to answer that somebody wants.
_LOCATE_S = 2.0

#: Bytes of history that a screen's thumbnail is drawn from, and thumbnails fetched at a look.
GLANCE_BYTES = 1 << 13
GLANCES = 24

#: Seconds that a glance may take.
_GLANCE_S = 2.0


def guest_id(guest: monitor.GuestStatus) -> str:
    """Return what names a guest over daemons' lives: two may have the same name."""
    return f"{guest.name}\n{guest.socket}"


def read_history(
    path: str, guest: str, port: str, count: int | None, within: float
) -> tuple[Hello, bytes]:
    """Return the last `count` bytes of a port's output, all without a count; blocks.

    Raises ConsoleError when it cannot be read, or not `within` so many seconds.
    """
    request = monitor.Attach(guest=guest, port=port, name="web, a look", write=False, replay=count)
    link = Link(request)
    link.connect(path)
    hello: Hello | None = None
    data = bytearray()
    deadline = time.monotonic() + within
    ready = select.poll()
    ready.register(link.fileno(), select.POLLIN)
    try:
        while hello is None or (link.at or 0) < hello.head:
            left = deadline - time.monotonic()
            if left <= 0 or not ready.poll(left * 1000):
                raise ConsoleError(f"{guest} does not answer")
            for event in link.receive():
                if isinstance(event, memoryview):
                    data += event
                elif isinstance(event, Hello):
                    hello = event
    except LinkLostError:
        raise ConsoleError(f"{guest} is gone") from None
    finally:
        link.close()
    return hello, bytes(data)


class Port:
    """A port's counters at the last look, of which rates are made."""

    def __init__(self) -> None:
        self.at = 0.0
        self.output = self.input = 0
        self.rates = (0, 0)

    def look(self, now: float, output: int, read: int) -> tuple[int, int]:
        """Return bytes per second, out of the guest and into it."""
        if self.at and now > self.at:
            passed = max(now - self.at, 0.001)
            self.rates = (
                max(0, round((output - self.output) / passed)),
                max(0, round((read - self.input) / passed)),
            )
        self.at, self.output, self.input = now, output, read
        return self.rates


class _Answer(NamedTuple):
    """What the daemon at `path` said about its guests at a time, or why it did not."""

    path: str
    at: float
    guests: list[monitor.GuestStatus]
    failure: str | None


def _answer(path: str) -> _Answer:
    """Ask a daemon; blocks."""
    try:
        guests = monitor.ask(path).guests
    except ConsoleError as error:
        return _Answer(path, time.monotonic(), [], str(error))
    return _Answer(path, time.monotonic(), guests, None)


class Guests:
    """All guests of all daemons; `find` returns the monitor sockets of those that run.

    They are asked while there is a `Watcher`, who is told what has changed: each in a thread of its
    own and once at a time, so that one that does not answer holds nobody up.
    """

    def __init__(self, find: Callable[[], list[str]]) -> None:
        self._find = find
        self._watchers: set[Watcher] = set()
        self._ports: dict[tuple[str, int], Port] = {}
        self._screens: dict[str, tuple[int, dict[str, Any]]] = {}
        self._glanced: dict[str, float] = {}
        self._asked: dict[str, asyncio.Task[_Answer]] = {}
        self._answers: dict[str, _Answer] = {}
        self._polling: asyncio.Task[None] | None = None
        self._glancing: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()
        self.known: dict[str, dict[str, Any]] = {}
        self.failures: list[str] = []

    async def _ask(self) -> dict[str, asyncio.Task[_Answer]]:
        """Have every daemon asked that is not being asked, and return all that are."""
        asked = {}
        for path in await asyncio.to_thread(self._find):
            if path not in self._asked:
                self._asked[path] = asyncio.create_task(asyncio.to_thread(_answer, path))
                self._asked[path].add_done_callback(partial(self._answered, path))
            asked[path] = self._asked[path]
        self._answers = {path: kept for path, kept in self._answers.items() if path in asked}
        return asked

    def _answered(self, path: str, asked: asyncio.Task[_Answer]) -> None:
        del self._asked[path]
        if not asked.cancelled():
            self._answers[path] = asked.result()

    async def locate(self, wanted: str) -> tuple[str, str]:
        """Return the monitor socket and the name of the guest with that id; raises ConsoleError."""
        asked = await self._ask()
        with suppress(TimeoutError):
            for answer in asyncio.as_completed(asked.values(), timeout=_LOCATE_S):
                path, _, guests, _ = await answer
                for guest in guests:
                    if guest_id(guest) == wanted:
                        return path, guest.name
        raise ConsoleError(f"there is no guest {wanted.split(chr(10))[0]} now")

    @asynccontextmanager
    async def watch(self) -> AsyncIterator[Watcher]:
        """Give a watcher; the daemons are asked until the last one has left."""
        watcher = Watcher(self)
        self._watchers.add(watcher)
        if self._polling is None or self._polling.done():
            self._polling = asyncio.create_task(self._poll())
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)
            if not self._watchers:
                for task in (self._polling, self._glancing):
                    if task is not None:
                        task.cancel()
                self._polling = self._glancing = None

    def look_now(self) -> None:
        """Have the daemons asked at once, not only when it is time."""
        self._hurry.set()

    async def _poll(self) -> None:
        while True:
            self._hurry.clear()
            again = time.monotonic() + POLL_S
            try:
                if asked := await self._ask():
                    await asyncio.wait(asked.values(), timeout=POLL_S)
            except (OSError, ValueError) as error:
                _log.warning("cannot look for daemons: %s", error)
            else:
                answers = [self._answers[path] for path in asked if path in self._answers]
                self.failures = [answer.failure for answer in answers if answer.failure]
                found = [(answer, guest) for answer in answers for guest in answer.guests]
                self._take(found)
                self._tell()
                if self._glancing is None or self._glancing.done():
                    guests = {guest_id(guest): (answer.path, guest) for answer, guest in found}
                    self._glancing = asyncio.create_task(self._glance(guests))
            with suppress(TimeoutError):
                await asyncio.wait_for(self._hurry.wait(), again - time.monotonic())

    def _tell(self) -> None:
        for watcher in self._watchers:
            watcher.changed.set()

    def _take(self, found: Iterable[tuple[_Answer, monitor.GuestStatus]]) -> None:
        before, self._ports = self._ports, {}
        self.known = {}
        for answer, guest in found:
            name = guest_id(guest)
            ports = []
            for port in guest.ports:
                seen = self._ports[name, port.id] = before.get((name, port.id)) or Port()
                out_rate, in_rate = seen.look(answer.at, port.output, port.input)
                ports.append(
                    {
                        **{key: getattr(port, key) for key in _SHOWN},
                        "out_rate": out_rate,
                        "in_rate": in_rate,
                    }
                )
            self.known[name] = {
                "id": name,
                "name": guest.name,
                "daemon": guest.daemon,
                "state": guest.state,
                "connected": guest.frontend is not None,
                "restarts": guest.restarts,
                "died": guest.died,
                "ports": ports,
            }

    async def _glance(self, guests: dict[str, tuple[str, monitor.GuestStatus]]) -> None:
        """Bring the screens up to date that somebody sees and that have changed."""
        wanted = {name for watcher in self._watchers for name in watcher.looks}
        self._screens = {name: kept for name, kept in self._screens.items() if name in guests}
        self._glanced = {name: when for name, when in self._glanced.items() if name in guests}
        due = []
        for name in wanted & guests.keys():
            path, guest = guests[name]
            console = next((port for port in guest.ports if port.console), None)
            if console is not None and guest.state == "running":
                output, _ = self._screens.get(name, (-1, None))
                if output != console.output:
                    due.append((name, path, guest.name, console))
        due.sort(key=lambda each: self._glanced.get(each[0], 0.0))  # all have their turn
        for name, path, guest_name, console in due[:GLANCES]:
            self._glanced[name] = time.monotonic()
            read = partial(read_history, path, guest_name, str(console.id), GLANCE_BYTES, _GLANCE_S)
            with suppress(ConsoleError, OSError):
                _, data = await asyncio.to_thread(read)
                self._screens[name] = (
                    console.output,
                    {
                        "type": "screen",
                        "id": name,
                        "data": base64.b64encode(data).decode(),
                        "columns": console.columns,
                        "rows": console.rows,
                    },
                )
                self._tell()

    def screen(self, name: str) -> tuple[int, dict[str, Any]] | None:
        """Return how far a guest's output was, and the message that shows its screen then."""
        return self._screens.get(name)


#: What a page is told of a port.
_SHOWN = (
    "id",
    "name",
    "endpoint",
    "console",
    "state",
    "open",
    "readers",
    "output",
    "input",
    "missed",
    "columns",
    "rows",
)

_encode = msgspec.json.Encoder().encode


class Watcher:
    """A page that looks at the list; `changed` is set when there may be news.

    `looks` are the ids of the guests whose screens it shows.
    """

    def __init__(self, guests: Guests) -> None:
        self._guests = guests
        self._sent: dict[str, bytes] | None = None
        self._failures: list[str] = []
        self._screens: dict[str, int] = {}
        self.changed = asyncio.Event()
        self.looks: set[str] = set()

    def news(self) -> list[bytes]:
        """Return the messages, JSON, that bring the page up to date."""
        now = {name: _encode(guest) for name, guest in self._guests.known.items()}
        messages = []
        before = self._sent
        if before is None or before != now or self._failures != self._guests.failures:
            changed = [
                guest
                for name, guest in self._guests.known.items()
                if before is None or before.get(name) != now[name]
            ]
            message = {
                "type": "guests",
                "order": list(now),
                "changed": changed,
                "failures": self._guests.failures,
            }
            messages.append(_encode(message))
            self._sent, self._failures = now, self._guests.failures
        self._screens = {n: at for n, at in self._screens.items() if n in self.looks}
        for name in self.looks:
            kept = self._guests.screen(name)
            if kept is not None and self._screens.get(name) != kept[0]:
                self._screens[name] = kept[0]
                messages.append(_encode(kept[1]))
        return messages


def daemons(path: str | None) -> Callable[[], list[str]]:
    """Return what finds monitor sockets: the one given, or those of all daemons that run."""
    return (lambda: [path]) if path is not None else (lambda: monitor.find(os.environ))
