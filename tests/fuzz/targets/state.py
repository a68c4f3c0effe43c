"""States of a console that moved here: any bytes, and any fields in the right form.

What is not refused is taken whole: the console goes on, and its own state is loaded elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from source import Source
from vhost_device_console.config import MOST_PORTS
from vhost_device_console.errors import RefusedError
from vhost_device_console.worker import state
from vhost_device_console.worker.console.control import Event, State
from vhost_device_console.worker.console.device import Console

from targets.console import MOST, make_port

_NUMBERS = [
    *(0, 1, 2, 3, 80, 100, 4096, 4097, 65535, 65536, 1 << 32, (1 << 63) - 1, 1 << 63),
    *((1 << 64) - 1, -1, -(1 << 63)),
]
_NAMES = ["port 0", "port 1", "port 2", "", "port 0\0", "\ud7ff", "x" * 300]
_SIZES = [0, 1, 7, 8, 100, 4096, 4097, 5000]


def _console(how: int) -> Console:
    """Return a console with two ports, one of which may have had traffic before."""
    console = Console([], MOST)
    console.add(make_port(0))
    console.add(make_port(1, how))
    console.negotiated(3)
    if how & 4:
        console.ports[1].output.append(b"from before")
        console.ports[1].output.commit()
        console.ports[1].input.feed(b"typed before")
    if how & 8:
        console.ports[1].attach()
    if how & 16:
        console.ports[0].size = (80, 24)
    return console


def _encoded(source: Source) -> bytes:
    """Return a state of the right form, with numbers that are often worth a try."""

    def number() -> int:
        return source.pick(_NUMBERS)

    def words(at: int) -> bytes:
        return bytes([at]) * source.pick(_SIZES)

    def state_of_port() -> list[object]:
        return [
            number(),
            source.pick(_NAMES),
            bool(source.byte() & 1),
            source.pick([*(each.value for each in State), "none"]),
            bool(source.byte() & 1),
            *(number(), number(), number(), number(), words(1), number(), words(2)),
        ]

    def message() -> list[object]:
        return [number(), source.byte() % 9, source.take(source.byte() % 24)]

    return msgspec.msgpack.encode(
        [
            source.pick(["vhost-device-console"] * 7 + ["other"]),
            source.pick([1, 1, 1, 2]),
            number(),
            [state_of_port() for _ in range(source.byte() % 4)],
            [message() for _ in range(source.byte() % 4)],
        ]
    )


def run(data: bytes) -> None:
    """The first byte says what the console is, and whether the others are the state itself."""
    source = Source(data)
    how = source.byte()
    encoded = _encoded(source) if how & 0x80 else source.rest()
    console = _console(how)
    before = state.save(console)
    try:
        loaded = state.load(console, encoded)
    except RefusedError:
        assert state.save(console) == before
        return
    loaded.apply()
    again = state.save(console)
    there = _console(how & 3)
    state.load(there, again).apply()
    assert 0 <= console.control.promised <= MOST_PORTS
    for number, port in console.ports.items():
        assert len(port.input) <= port.input.size
        assert port.output.tail <= port.output.head
        assert port.missed >= 0
        for watcher in port.watchers:
            watcher.skip_lost()
            watcher.span()
        assert there.ports[number].input.copy() == port.input.copy()
        while console.control:
            console.control.take()


def seeds() -> Iterable[bytes]:
    console = _console(0b10110)
    console.control.receive(b"\0\0\0\0\0\0\1\0")
    console.control.receive(b"\0\0\0\0\3\0\1\0")
    console.control.receive(b"\1\0\0\0\3\0\1\0")
    console.control.receive(b"\1\0\0\0\6\0\1\0")
    assert Event.PORT_NAME in [event for _, event, _ in console.control.waiting]
    for how in range(32):
        yield bytes([how]) + state.save(_console(how & 3))
        yield bytes([how]) + state.save(console)
    port = bytes([0, 0, 1, 2, 1, 4, 4, 0, 5, 4, 5, 4])
    other = bytes([1, 1, 0, 2, 1, 0, 0, 0, 4, 3, 0, 3])
    yield bytes([0x80, 0, 0, 2, 2]) + port + other + bytes([1, 1, 7, 9]) + b"12345678\0"
    yield bytes([0x84, 0, 0, 2, 2]) + port + other + bytes([0])
    yield bytes([0x80, 0, 0, 2, 1]) + other + bytes([1, 3, 2, 8]) + b"12345678"
