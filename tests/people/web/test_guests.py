"""The list of all guests: whom it asks, in what order, and whom it does not wait for."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from vhost_device_console import monitor
from vhost_device_console.people.web import guests
from vhost_device_console.people.web.guests import GLANCES, Guests, Watcher, guest_id

from launch import WITHIN


def guest(name: str, output: int = 0) -> monitor.GuestStatus:
    port = {
        **dict.fromkeys(("id", "readers", "input", "missed", "discarded", "stalls"), 0),
        **dict.fromkeys(("columns", "rows"), 0),
        **dict.fromkeys(("name", "endpoint", "overflow", "state", "size_by"), ""),
        **dict.fromkeys(("console", "open", "host_open"), True),
        "held": False,
        "output": output,
    }
    counters = ("sessions", "kicks", "calls", "chains", "refused", "broken", "ignored")
    unknown = ("worker", "frontend", "uptime", "rss", "cpu")
    fields = {
        **dict.fromkeys((*counters, "daemon", "restarts", "max_ports"), 0),
        **dict.fromkeys(unknown, None),
        "name": name,
        "socket": f"/{name}",
        "state": "running",
        "ports": [port],
    }
    return msgspec.convert(fields, monitor.GuestStatus)


def ids(*names: str) -> set[str]:
    return {guest_id(guest(name)) for name in names}


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guests, "POLL_S", 0.01)


def answering(
    monkeypatch: pytest.MonkeyPatch, ask: Callable[[str], list[monitor.GuestStatus]]
) -> None:
    monkeypatch.setattr(
        guests.monitor, "ask", lambda path: monitor.Status(version="", guests=ask(path))
    )


async def told(watcher: Watcher, condition: Callable[[dict[str, Any]], object]) -> None:
    """Wait for such a message."""

    async def wait() -> None:
        while not any(condition(json.loads(each)) for each in watcher.news()):
            await watcher.changed.wait()
            watcher.changed.clear()

    await asyncio.wait_for(wait(), WITHIN)


def test_a_daemon_that_does_not_answer_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    end = threading.Event()

    def ask(path: str) -> list[monitor.GuestStatus]:
        asked.append(path)
        if path == "hung":
            end.wait(WITHIN)
        return [guest(path)]

    answering(monkeypatch, ask)

    async def look() -> None:
        known = Guests(lambda: ["hung", "well"])
        try:
            async with known.watch() as watcher:
                await told(watcher, lambda each: each["order"] == [*ids("well")])
                for _ in range(3):
                    assert await known.locate(*ids("well")) == ("well", "well")
                assert asked.count("hung") == 1
                end.set()
                await told(watcher, lambda each: set(each["order"]) == ids("hung", "well"))
        finally:
            end.set()

    asyncio.run(look())


def test_a_look_that_failed_is_not_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, lambda path: [guest(path)])
    looks = itertools.count()

    def find() -> list[str]:
        if next(looks) < 2:
            raise OSError("no more files")
        return ["vm"]

    async def look() -> None:
        async with Guests(find).watch() as watcher:
            await told(watcher, lambda each: each["order"] == [*ids("vm")])

    asyncio.run(look())


def test_a_screen_that_is_slow_to_come_does_not_hold_the_list_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = itertools.count(1)
    answering(monkeypatch, lambda path: [guest(path, next(output))])
    begun, end = threading.Event(), threading.Event()

    def read(*_: object) -> tuple[None, bytes]:
        begun.set()
        end.wait(WITHIN)
        return None, b"screen"

    monkeypatch.setattr(guests, "read_history", read)

    async def look() -> None:
        try:
            async with Guests(lambda: ["vm"]).watch() as watcher:
                watcher.looks = ids("vm")
                assert await asyncio.to_thread(begun.wait, WITHIN)
                for _ in range(3):
                    await told(watcher, lambda each: each.get("changed"))
                end.set()
                await told(watcher, lambda each: each["type"] == "screen")
        finally:
            end.set()

    asyncio.run(look())


def test_every_busy_guest_s_screen_has_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"vm{number}" for number in range(2 * GLANCES)]
    output = itertools.count(1)
    answering(monkeypatch, lambda _: [guest(name, next(output)) for name in names])
    monkeypatch.setattr(guests, "read_history", lambda *_: (None, b""))

    async def look() -> None:
        known = Guests(lambda: ["daemon"])
        async with known.watch() as watcher:
            watcher.looks = ids(*names)
            seen: set[object] = set()

            def all_seen(message: dict[str, Any]) -> bool:
                seen.add(message.get("id"))
                return seen >= watcher.looks

            await told(watcher, all_seen)

    asyncio.run(look())
