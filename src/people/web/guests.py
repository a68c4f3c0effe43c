"""What pages see of all guests: the daemons are asked while somebody looks, changes are told."""

from __future__ import annotations

import asyncio
import base64
import os
import select
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import msgspec

from ... import monitor
from ...attachment import Hello
from ...errors import ConsoleError
from ..link import Link, LinkLostError

#: Seconds between two looks at the daemons.
POLL_S = 1.0

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
    try:
        while hello is None or (link.at or 0) < hello.head:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([link.fileno()], [], [], left)[0]:
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
        if self.at:
            passed = max(now - self.at, 0.001)
            self.rates = (
                max(0, round((output - self.output) / passed)),
                max(0, round((read - self.input) / passed)),
            )
        self.at, self.output, self.input = now, output, read
        return self.rates


class Guests:
    """All guests of all daemons; `find` returns the monitor sockets of those that run.

    They are asked while there is a `Watcher`, who is told what has changed.
    """

    def __init__(self, find: Callable[[], list[str]]) -> None:
        self._find = find
        self._watchers: set[Watcher] = set()
        self._ports: dict[tuple[str, int], Port] = {}
        self._screens: dict[str, tuple[int, dict[str, Any]]] = {}
        self._task: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()
        self.known: dict[str, dict[str, Any]] = {}
        self.failures: list[str] = []

    def ask(self) -> list[tuple[str, monitor.GuestStatus]]:
        """Return every guest with its daemon's monitor socket; blocks."""
        found = []
        failures = []
        for path in self._find():
            try:
                found += [(path, guest) for guest in monitor.ask(path).guests]
            except ConsoleError as error:
                failures.append(str(error))
        self.failures = failures
        return found

    async def locate(self, wanted: str) -> tuple[str, str]:
        """Return the monitor socket and the name of the guest with that id; raises ConsoleError."""
        for path, guest in await asyncio.to_thread(self.ask):
            if guest_id(guest) == wanted:
                return path, guest.name
        raise ConsoleError(f"there is no guest {wanted.split(chr(10))[0]} now")

    @asynccontextmanager
    async def watch(self) -> AsyncIterator[Watcher]:
        """Give a watcher; the daemons are asked until the last one has left."""
        watcher = Watcher(self)
        self._watchers.add(watcher)
        if self._task is None:
            self._task = asyncio.create_task(self._poll())
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)
            if not self._watchers and self._task is not None:
                self._task.cancel()
                self._task = None

    def look_now(self) -> None:
        """Have the daemons asked at once, not only when it is time."""
        self._hurry.set()

    async def _poll(self) -> None:
        while True:
            self._hurry.clear()
            found = await asyncio.to_thread(self.ask)
            self._take(found)
            await self._glance({guest_id(guest): (path, guest) for path, guest in found})
            for watcher in self._watchers:
                watcher.changed.set()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._hurry.wait(), POLL_S)

    def _take(self, found: Iterable[tuple[str, monitor.GuestStatus]]) -> None:
        now = time.monotonic()
        before, self._ports = self._ports, {}
        self.known = {}
        for _, guest in found:
            name = guest_id(guest)
            ports = []
            for port in guest.ports:
                seen = self._ports[name, port.id] = before.get((name, port.id)) or Port()
                out_rate, in_rate = seen.look(now, port.output, port.input)
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
        due = []
        for name in wanted & guests.keys():
            path, guest = guests[name]
            console = next((port for port in guest.ports if port.console), None)
            if console is not None and guest.state == "running":
                output, _ = self._screens.get(name, (-1, None))
                if output != console.output:
                    due.append((name, path, guest.name, console))
        for name, path, guest_name, console in due[:GLANCES]:
            read = partial(read_history, path, guest_name, str(console.id), GLANCE_BYTES, _GLANCE_S)
            with suppress(ConsoleError):
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
