"""The console under a guest that says anything, ports that come and go, and a frontend that asks.

The guest is told of no port twice and of none that it has no room for; what waits for it does not
grow; an access to the configuration space stays in it.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterable

import msgspec
from source import Source
from vhost_device_console.errors import RefusedError
from vhost_device_console.journal import Input, Output
from vhost_device_console.worker import state
from vhost_device_console.worker.console.control import Event, State
from vhost_device_console.worker.console.device import Console, Saved
from vhost_device_console.worker.console.port import Port

MOST = 4  # ports
_RING = 4096
_CONFIG = 12
_MESSAGE = struct.Struct("<IHH")
_PORTS = [*range(MOST), MOST, 126, 127, 0xFFFF_FFFF]


class Buffer:
    """A buffer of the guest's."""

    def __init__(self, spans: list[memoryview]) -> None:
        self.head = 0
        self.spans = spans
        self.size = sum(map(len, spans))


class Queue:
    """A virtqueue with these buffers; `written` has what came of each."""

    held = 0

    def __init__(self, buffers: list[Buffer]) -> None:
        self._given = deque(buffers)
        self._popped: deque[Buffer] = deque()
        self.written: list[bytes] = []

    def pop(self) -> Buffer | None:
        if not self._given:
            return None
        self._popped.append(self._given.popleft())
        return self._popped[-1]

    def unpop(self, _head: int) -> None:
        self._given.appendleft(self._popped.pop())

    def push(self, _head: int, written: int) -> None:
        buffer = self._popped.popleft()
        assert written <= buffer.size
        self.written.append(b"".join(buffer.spans)[:written])

    def take(self, *_: object) -> int:
        raise AssertionError("not of this queue")


def make_port(number: int, how: int = 0) -> Port:
    """Return port `number`, with a journal of its own in memory that is not shared."""
    words = memoryview(bytearray(4096)).cast("Q")
    output = Output(memoryview(bytearray(_RING)), words)
    return Port(
        number,
        f"port {number}",
        output,
        Input(memoryview(bytearray(_RING)), words),
        console=not number or bool(how & 1),
        blocking=bool(how & 2),
    )


class Guest:
    """What a guest knows that believes all it is told."""

    def __init__(self) -> None:
        self.ports: set[int] = set()

    def hear(self, message: bytes, promised: int) -> None:
        assert len(message) >= _MESSAGE.size
        number, event, value = _MESSAGE.unpack_from(message)
        rest = message[_MESSAGE.size :]
        match Event(event):
            case Event.PORT_ADD:
                assert number not in self.ports, "a port was added twice"
                assert number < promised, "a port that the guest has no room for"
                self.ports.add(number)
            case Event.PORT_REMOVE:
                assert number in self.ports, "a port was removed that never was"
                self.ports.remove(number)
            case Event.PORT_NAME:
                assert rest
                assert b"\0" not in rest
            case Event.RESIZE:
                assert len(rest) == 4
            case Event.CONSOLE_PORT:
                assert value == 1
                assert not rest
            case Event.PORT_OPEN:
                assert value in (0, 1)
                assert not rest
            case _:
                raise AssertionError(f"a device does not say {event}")


def run(data: bytes) -> None:
    """The first byte is about the console, then one step after another."""
    source = Source(data)
    how = source.byte()
    console = Console([make_port(0)], MOST, rows_first=bool(how & 1))
    console.negotiated(how >> 1 & 3)
    guest: Guest | None = Guest()
    while source:
        step = source.byte()
        number = step >> 4 & 3
        port = console.ports.get(number)
        match step & 15:
            case 0 | 1 | 2:
                message = _MESSAGE.pack(
                    source.pick(_PORTS), source.byte() % 9, source.byte() % 3
                ) + source.take(step >> 5)
                guest = _say(console, guest, message)
            case 3:
                guest = _say(console, guest, source.take(source.byte() % 24))
            case 4 | 5:
                _listen(console, guest, source)
            case 6 if port is None:
                console.add(make_port(number, source.byte()))
            case 7 if port is not None and number:
                console.remove(port)
            case 8:
                promised = console.control.promised
                _read(console, source.number(2), source.number(2), source.byte())
                if console.control.promised != promised:
                    guest = None  # a promise is made to a driver that begins
            case 9:
                _write(console, source.number(2), source.take(source.byte()))
            case 10 if port is not None:
                port.size = (source.number(2), source.number(2))
                console.control.resized(port)
            case 11 if port is not None:
                port.attended = bool(source.byte() & 1)
                console.control.host_changed(port)
            case 12:
                console.negotiated(source.number(8))
            case 13:
                # Typed on this side, and given to the guest.
                if port is not None:
                    typed = source.take(source.byte())[: port.input.size - len(port.input)]
                    port.input.feed(typed)
                    waiting = len(port.input)
                    queue = Queue([Buffer(_spans(source)) for _ in range(source.byte() % 4)])
                    port.give_input(queue, 1 + step % 3)
                    assert len(port.input) == waiting - len(b"".join(queue.written))
            case 14:
                console.control.presume(told=bool(source.byte() & 1))
                guest = None
            case 15:
                console = _moved(console)
        _check(console)
    _check_saved(console)


def _check_saved(console: Console) -> None:
    """What a successor makes of the saved dialogue is the same dialogue."""
    data = msgspec.msgpack.encode(console.save())
    again = Console([], MOST, rows_first=console.control._rows_first)  # noqa: SLF001
    again.ports.update(console.ports)
    again.resume(msgspec.msgpack.decode(data, type=Saved))
    assert msgspec.msgpack.encode(again.save()) == data
    for number in console.ports:
        assert again.control.state(number) is console.control.state(number)
    for each in (console, again):
        each.control.receive(_MESSAGE.pack(0, Event.PORT_READY, 1))
    assert again.control.replies == console.control.replies


def _say(console: Console, guest: Guest | None, message: bytes) -> Guest | None:
    """Have the guest say this; a driver that begins knows no port any more."""
    cut = len(message) // 3
    pieces = [memoryview(message[:cut]), memoryview(message[cut:])]
    queue = Queue([Buffer(pieces)])
    assert console.hear(queue, 1) == 1
    assert queue.written == [b""]
    if len(message) >= _MESSAGE.size:
        port, event, _ = _MESSAGE.unpack_from(message)
        if event == Event.DEVICE_READY:
            return Guest()
        if event == Event.PORT_READY and guest is not None and port not in guest.ports:
            return None  # Linux after hibernation: it knows of ports that nobody told it
    return guest


def _spans(source: Source) -> list[memoryview]:
    return [memoryview(bytearray(source.byte())) for _ in range(source.byte() % 3)]


def _listen(console: Console, guest: Guest | None, source: Source) -> None:
    """Give the guest buffers for what waits, which may be too small."""
    waiting = console.control.replies
    queue = Queue([Buffer(_spans(source)) for _ in range(source.byte() % 8)])
    told = console.speak(queue, 1 + source.byte() % 8)
    assert told == len(queue.written) <= len(waiting)
    for message, written in zip(waiting, queue.written, strict=False):
        assert message.startswith(written)
        if guest is not None:
            guest.hear(message, console.control.promised)
    assert console.control.replies == waiting[told:]


def _read(console: Console, offset: int, size: int, queues: int) -> None:
    try:
        found = console.read_config(offset, size, queues or None)
    except RefusedError:
        assert offset + size > _CONFIG
    else:
        assert len(found) == size
        assert offset + size <= _CONFIG
        assert 1 <= console.control.promised <= MOST


def _write(console: Console, offset: int, data: bytes) -> None:
    before = console.ports[0].output.head
    try:
        console.write_config(offset, data)
    except RefusedError:
        assert offset + len(data) > _CONFIG
        assert console.ports[0].output.head == before
    else:
        assert offset + len(data) <= _CONFIG
        assert console.ports[0].output.head - before in (0, 1)


def _moved(console: Console) -> Console:
    """Return another console that the state was moved to."""
    there = Console([], MOST)
    for port in console.ports.values():
        there.add(make_port(port.id, port.console | port.blocking << 1))
    there.negotiated(3)
    data = state.save(console)
    state.load(there, data).apply()
    for number, port in console.ports.items():
        other = there.ports[number]
        assert other.input.copy() == port.input.copy()
        assert other.output.head == port.output.head
        assert there.control.state(number) in (console.control.state(number), State.ADDED)
    return there


def _check(console: Console) -> None:
    waiting = console.control.waiting
    # Of ports that are gone too the guest is told; their numbers are as many as there can be.
    assert len(waiting) <= len(Event) * MOST
    for number, event, message in waiting:
        assert _MESSAGE.unpack_from(message)[:2] == (number, event)


def seeds() -> Iterable[bytes]:
    def say(port: int, event: Event, value: int) -> bytes:
        return bytes([0, port, event, value])

    listen = bytes([4, 7, *[1, 255] * 7, 7])
    begin = bytes([6]) + say(0, Event.DEVICE_READY, 1)
    ready = begin + say(0, Event.PORT_READY, 1) + say(0, Event.PORT_OPEN, 1)
    yield begin
    yield ready
    yield ready + listen
    yield ready + listen + bytes([16 | 6, 1]) + listen + say(1, Event.PORT_READY, 1) + listen
    yield ready + bytes([16 | 6, 3]) + bytes([16 | 7]) + bytes([16 | 6, 0]) + listen
    yield ready + bytes([8, 0, 0, 12, 0, 4]) + bytes([9, 0, 0, 12]) + b"\0" * 8 + b"A\0\0\0"
    yield ready + bytes([10, 80, 0, 24, 0]) + bytes([16 | 11, 1]) + listen
    yield ready + bytes([13, 5]) + b"typed" + bytes([3, 1, 2, 2, 9, 9, 0])
    yield ready + bytes([15]) + listen + bytes([15])
    yield begin + bytes([12]) + bytes(8) + bytes([14, 1]) + bytes([14, 0]) + listen
    yield begin + bytes([3, 7]) + b"1234567" + bytes([3, 23]) + bytes(23)
