"""A console whose ports come and go, with readers, typing, and a guest that behaves like Linux.

Each port has a model: the whole stream the guest wrote, the whole stream that was typed, and where
every reader is in the first. The guest is one too: it believes what it is told, and at rest all of
that must be true. VDC_EXAMPLES=n tries more: see `budget`.
"""

from __future__ import annotations

import random
import struct
from collections import Counter, deque
from dataclasses import dataclass, field

import pytest
from budget import Machine, run
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule
from vhost_device_console.journal import Input, Output
from vhost_device_console.worker import state
from vhost_device_console.worker.console.control import Event
from vhost_device_console.worker.console.device import MULTIPORT, SIZE, Console
from vhost_device_console.worker.console.port import Port, Watcher

RING = 4096
IDS = range(5)
EVENTS_OF_A_PORT = len(Event) - 1  # all but DEVICE_READY
TURNS = st.integers(0, 30)
SEED = st.integers(0, 1 << 16)
PIECES = [1, 0, 2, 100, 1000, RING // 2, RING - 1, RING]


@dataclass
class Buffer:
    """A buffer of the guest's."""

    head: int
    size: int
    spans: list[memoryview]


class Queue:
    """A virtqueue; `done` has what was written of each buffer that was completed."""

    def __init__(self) -> None:
        self.given: deque[Buffer] = deque()
        self.done: deque[bytes] = deque()
        self.held = 0
        self._popped: Buffer | None = None
        self._heads = 0

    def give(self, *spans: memoryview) -> None:
        self.given.append(Buffer(self._heads, sum(map(len, spans)), [*spans]))
        self._heads += 1

    def room(self, *sizes: int) -> None:
        self.give(*(memoryview(bytearray(size)) for size in sizes))

    def pop(self) -> Buffer | None:
        self._popped = self.given.popleft() if self.given else None
        return self._popped

    def unpop(self, head: int) -> None:
        assert self._popped is not None
        assert head == self._popped.head
        self.given.appendleft(self._popped)
        self._popped = None

    def take(self, output: Output, most: int, limit: int, _linger_ns: int) -> int:
        self.held = taken = 0
        while taken < most and (buffer := self.pop()) is not None:
            if buffer.size and output.head + buffer.size > limit:
                self.unpop(buffer.head)
                self.held = buffer.size
                break
            for span in buffer.spans:
                output.append(span)
            self.push(buffer.head, 0)
            taken += 1
        output.commit()
        return taken

    def push(self, head: int, written: int) -> None:
        assert self._popped is not None
        assert head == self._popped.head
        self.done.append(b"".join(self._popped.spans)[:written])
        self._popped = None


@dataclass(eq=False)
class Read:
    """A reader: what it should know of itself, and how many bytes it `took` since it joined."""

    watcher: Watcher
    joined: int
    took: int = 0
    missed: int = 0
    stuck: bool = False

    @property
    def offset(self) -> int:
        return self.joined + self.took + self.missed


@dataclass(eq=False)
class Wire:
    """A port, its two queues, and all that ever went through it."""

    port: Port
    out: Queue = field(default_factory=Queue)
    rx: Queue = field(default_factory=Queue)
    written: bytearray = field(default_factory=bytearray)
    origin: int = 0  # how much of it this port's journal never had
    typed: bytearray = field(default_factory=bytearray)
    given: int = 0  # how much of `typed` the guest has
    before: int = 0  # how much more this port's journal counts
    seen: int = 0
    taken: int = 0  # the most that `seen` ever was
    readers: list[Read] = field(default_factory=list)
    missed: int = 0  # by readers that are gone
    discarded: int = 0
    ready: bool = False  # what the device heard of it
    opened: bool = False

    @property
    def holder(self) -> Read | None:
        return next((each for each in self.readers if self.port.blocking or not each.stuck), None)

    def ahead_of(self, offset: int) -> int:
        """How many bytes after `offset` the journal has no more."""
        return max(max(self.origin, len(self.written) - RING) - offset, 0)

    @property
    def limit(self) -> int | None:
        """Up to where the guest may write."""
        if self.holder:
            return self.holder.offset + RING
        return self.seen + RING if self.port.blocking and not self.port.console else None


@dataclass
class Known:
    """What the guest was told of a port that it has added, and whether it has it open."""

    console: bool = False
    name: bytes | None = None
    host_open: bool = False
    size: tuple[int, int] | None = None
    opened: bool = False


class Consoles(Machine):
    def __init__(self, resizes: bool) -> None:
        super().__init__()
        self.features = MULTIPORT | SIZE * resizes
        self.wires: dict[int, Wire] = {}
        self.known: dict[int, Known] = {}
        self.failed: set[int] = set()  # ports that the guest was told of and could not add
        self.slept: set[int] = set()  # those of them that the device has forgotten
        self.out, self.rx = Queue(), Queue()  # of control messages
        self.booted = False

    def make_port(self, number: int, console: bool, blocking: bool) -> Port:
        words = memoryview(bytearray(64)).cast("Q")
        output, input_ = (memoryview(bytearray(RING)) for _ in range(2))
        return Port(
            number,
            f"port {number}",
            Output(output, words),
            Input(input_, words),
            console=console,
            blocking=blocking,
        )

    @initialize(rows_first=st.booleans(), blocking=st.booleans(), turns=TURNS, seed=SEED)
    def begin(self, rows_first: bool, blocking: bool, turns: int, seed: int) -> None:
        self.rows_first = rows_first
        self.console = Console([], len(IDS), rows_first=rows_first)
        self.console.negotiated(self.features)
        self.add(0, True, blocking)
        self.reboot(turns, seed)

    # The guest writes and reads

    def wire(self, number: int) -> Wire:
        """Return the wire of a port there is."""
        return self.wires[sorted(self.wires)[number % len(self.wires)]]

    def write(self, wire: Wire, pieces: list[int], rng: random.Random) -> None:
        data = rng.randbytes(min(sum(pieces), RING))
        spans = []
        for size in pieces:
            spans.append(memoryview(data[:size]))
            data = data[size:]
        wire.out.give(*spans)

    def drain(self, wire: Wire, most: int) -> None:
        """Move output into the journal, as far as the model says."""
        limit, given = wire.limit, [b"".join(each.spans) for each in wire.out.given]
        fits = 0
        held = False
        head = len(wire.written)
        for data in given[:most]:
            if data and limit is not None and head + len(data) > limit:
                held = True
                break
            head += len(data)
            fits += 1
        assert wire.port.take_output(wire.out, most) == fits
        assert wire.port.holding == held
        wire.written += b"".join(given[:fits])
        assert [*wire.out.done] == [b""] * fits
        wire.out.done.clear()

    def give(self, wire: Wire, most: int) -> None:
        """Give input as the hall does: while there is some and the guest would keep it."""
        before = len(wire.rx.given)
        if wire.port.input and self.console.takes_input(wire.port):
            assert wire.opened
            given = wire.port.give_input(wire.rx, most)
            assert given == before - len(wire.rx.given) <= most
            self.console.control.host_changed(wire.port)
        while wire.rx.done:
            data = wire.rx.done.popleft()
            assert data == wire.typed[wire.given : wire.given + len(data)]
            wire.given += len(data)

    # People

    def attach(self, wire: Wire) -> None:
        start = wire.readers[0].offset if wire.port.blocking and wire.readers else None
        if start is None:
            start = len(wire.written) if wire.readers else wire.seen
        reader = Read(wire.port.attach(), start)
        assert reader.watcher.offset == reader.joined
        wire.readers.append(reader)
        self.attended(wire)

    def attended(self, wire: Wire) -> None:
        wire.port.attended = bool(wire.readers)
        self.console.control.host_changed(wire.port)

    def take(self, wire: Wire, reader: Read, most: int) -> None:
        """Let a reader take up to `most` bytes, and count what it finds gone."""
        lost = wire.ahead_of(reader.offset)
        assert reader.watcher.skip_lost() == lost
        reader.missed += lost
        while most and (span := bytes(reader.watcher.span()[:most])):
            assert span == wire.written[reader.offset : reader.offset + len(span)]
            wire.port.took(reader.watcher, len(span))
            reader.took += len(span)
            most -= len(span)
            wire.seen = max(wire.seen, reader.offset)
            wire.taken = max(wire.taken, wire.seen)
            if reader.offset == len(wire.written):
                reader.stuck = False
        assert not most or reader.offset == len(wire.written)

    def detach(self, wire: Wire, reader: Read, undelivered: int) -> None:
        wire.port.detach(reader.watcher, undelivered)
        wire.readers.remove(reader)
        wire.missed += reader.missed
        left = reader.offset - undelivered
        if wire.readers:  # the others know nothing of what was before them
            joined = min(each.joined for each in wire.readers)
            wire.missed += max(0, joined - left) + wire.ahead_of(max(reader.offset, joined))
        if reader.offset == wire.seen:
            wire.seen = max(left, *(e.offset for e in wire.readers), 0)
        self.attended(wire)

    def stall(self, wire: Wire) -> None:
        if wire.holder:
            wire.holder.stuck = True
        wire.port.stall()

    def type(self, wire: Wire, data: bytes) -> None:
        """Type as much of this as there is room for."""
        room = RING - (len(wire.typed) - wire.given)
        data = data[:room]
        wire.port.input.feed(data)
        wire.typed += data
        assert (len(wire.port.input.room()) == 0) == (room == len(data))

    # Control messages

    def say(self, port: int, event: Event, value: int) -> None:
        self.out.give(memoryview(struct.pack("<IHH", port, event, value)))

    def hear(self, most: int) -> None:
        """Let the device hear up to `most` messages, and the model with it."""
        messages = [struct.unpack("<IHH", b"".join(each.spans)) for each in self.out.given][:most]
        assert self.console.hear(self.out, most) == len(messages)
        self.out.done.clear()
        for number, event, value in messages:
            wire = self.wires.get(number)
            if event == Event.DEVICE_READY:
                self.forget()
            elif wire and event == Event.PORT_READY:
                wire.ready = bool(value)
                wire.opened = False
            elif wire and event == Event.PORT_OPEN and wire.ready:
                wire.opened = bool(value)

    def forget(self) -> None:
        for wire in self.wires.values():
            wire.ready = wire.opened = False

    def speak(self, most: int, rng: random.Random) -> None:
        """Let the guest take up to `most` messages, and do as they say."""
        for _ in range(most):
            self.rx.room(8, 100)
        spoken = self.console.speak(self.rx, most)
        assert len(self.rx.done) == spoken
        self.rx.given.clear()
        while self.rx.done:
            self.believe(self.rx.done.popleft(), rng)

    def believe(self, message: bytes, rng: random.Random) -> None:
        number, event, value = struct.unpack_from("<IHH", message)
        note(f"the guest is told {Event(event).name} {value} of port {number}")
        if event == Event.PORT_ADD:
            assert number not in self.known
            assert number not in self.failed
            self.slept.discard(number)
            if number and rng.random() < 0.1:
                self.failed.add(number)
            else:
                self.known[number] = Known()
            self.say(number, Event.PORT_READY, number in self.known)
            return
        if event == Event.PORT_REMOVE:
            assert number in self.known or number in self.failed
            self.known.pop(number, None)
            self.failed.discard(number)
            return
        if number in self.failed:  # said of the port that had this number before
            return
        known = self.known[number]
        match event:
            case Event.CONSOLE_PORT:
                known.console = True
            case Event.PORT_NAME:
                known.name = message[8:]
            case Event.PORT_OPEN:
                known.host_open = bool(value)
            case Event.RESIZE:
                assert known.console, "Linux takes a size only of a port it knows for a console"
                size = struct.unpack("<HH", message[8:])
                known.size = size[::-1] if self.rows_first else size
            case _:
                raise AssertionError(f"a device never says {event}")

    def open(self, number: int, value: bool) -> None:
        """Let a program open or close a port that the guest has."""
        if number in self.known and self.known[number].opened != value:
            self.known[number].opened = value
            self.say(number, Event.PORT_OPEN, value)

    # Rules

    @rule(turns=TURNS, seed=SEED)
    def traffic(self, turns: int, seed: int) -> None:
        """Let everyone do so many things in an order that `seed` says."""
        rng = random.Random(seed)
        for _ in range(turns):
            self.turn(rng)

    def turn(self, rng: random.Random) -> None:
        wire = self.wire(rng.randrange(8))
        reader = rng.choice(wire.readers) if wire.readers else None
        match rng.randrange(12):
            case 0 | 1:
                self.write(wire, [rng.choice(PIECES) for _ in range(rng.randint(0, 3))], rng)
            case 2 | 3:
                self.drain(wire, rng.choice([1, 2, 64]))
            case 4:
                wire.rx.room(*(rng.choice(PIECES) for _ in range(rng.randint(0, 3))))
                self.give(wire, rng.choice([1, 2, 64]))
            case 5 if reader:
                self.type(wire, rng.randbytes(rng.choice(PIECES)))
            case 6 if len(wire.readers) < 3:
                self.attach(wire)
            case 7 | 8 if reader:
                self.take(wire, reader, rng.choice([1, 100, RING, 9 * RING]))
            case 9 if reader:
                self.detach(wire, reader, min(rng.choice([0, 1, RING]), reader.took))
            case 10:
                self.open(rng.choice(IDS), rng.random() < 0.7)
                self.hear(rng.randrange(3))
            case 11:
                self.speak(rng.randrange(4), rng)

    @rule(turns=TURNS, seed=SEED)
    def talk(self, turns: int, seed: int) -> None:
        """Let ports come and go and open and close, in an order that `seed` says."""
        rng = random.Random(seed)
        for _ in range(turns):
            number = rng.choice([0, 1, 1, 2])
            match rng.randrange(6):
                case 0 if number in self.wires:
                    self.remove_port(number)
                case 0:
                    self.add_port(number, rng.random() < 0.5, rng.random() < 0.5)
                case 1:
                    self.open(number, rng.random() < 0.7)
                case 2 | 3:
                    self.hear(rng.randint(1, 3))
                case 4:
                    self.speak(rng.randint(1, 4), rng)
                case 5 if number in self.wires:
                    wire = self.wires[number]
                    if wire.readers:
                        self.detach(wire, wire.readers[0], 0)
                    else:
                        self.attach(wire)
        self.settle()

    @rule(number=st.integers(0, 7))
    def stuck(self, number: int) -> None:
        """Find that the holder of a port does not read."""
        self.stall(self.wire(number))

    @rule(byte=st.integers(0, 255))
    def emergency(self, byte: int) -> None:
        """Write the emergency register: that is output at once."""
        self.console.write_config(8, struct.pack("<I", byte))
        self.wires[0].written.append(byte)

    @rule(number=st.integers(1, 4), console=st.booleans(), blocking=st.booleans())
    def add_port(self, number: int, console: bool, blocking: bool) -> None:
        if number not in self.wires:
            self.add(number, console, blocking)

    def add(self, number: int, console: bool, blocking: bool) -> None:
        port = self.make_port(number, console, blocking)
        self.wires[number] = Wire(port)
        self.console.add(port)

    @rule(number=st.integers(1, 4))
    def remove_port(self, number: int) -> None:
        if number and number in self.wires:
            self.console.remove(self.wires.pop(number).port)
            self.slept.discard(number)

    @rule(number=st.integers(0, 7), columns=st.integers(1, 999), rows=st.integers(1, 999))
    def resize(self, number: int, columns: int, rows: int) -> None:
        port = self.wire(number).port
        port.size = columns, rows
        self.console.control.resized(port)

    @rule(number=st.sampled_from([*IDS, 7]), event=st.integers(0, 9), value=st.integers(0, 2))
    def nonsense(self, number: int, event: int, value: int) -> None:
        """Say what means nothing: it is ignored, and its buffer returned."""
        self.hear(64)
        ignored = self.console.control.ignored
        if event in (Event.DEVICE_READY, Event.PORT_READY, Event.PORT_OPEN):
            number = 7
        if event == Event.DEVICE_READY:
            self.out.give(memoryview(bytes(value)))
        else:
            self.out.give(memoryview(struct.pack("<IHH", number, event, value)))
        assert self.console.hear(self.out, 64) == 1
        assert self.console.control.ignored == ignored + 1
        self.out.done.clear()

    @rule(turns=TURNS, seed=SEED)
    def reboot(self, turns: int, seed: int) -> None:
        """Begin with new rings, and no memory of any port."""
        self.start_rings()
        for each in (self.known, self.failed, self.slept):
            each.clear()
        self.say(0, Event.DEVICE_READY, 1)
        self.hear(1)
        self.traffic(turns, seed)

    @rule(stopped=st.booleans(), back=st.booleans(), turns=TURNS, seed=SEED)
    def go_away(self, stopped: bool, back: bool, turns: int, seed: int) -> None:
        """Stop the rings, or vanish; what is held then counts unless the guest comes back."""
        for wire in self.wires.values():
            self.drain(wire, 64)
            held = [*wire.out.given] if wire.port.holding else []
            words = b"".join(span for each in held for span in each.spans)
            if stopped:
                wire.port.remember(wire.out)
                if back:
                    wire.port.come_back()
                    wire.out.given.extend(held)
                    continue
                wire.port.stay_away()
            else:
                wire.port.take_rest(wire.out)
            kept = 0 if wire.port.blocking else min(len(words), RING) if stopped else len(words)
            wire.written += words[len(words) - kept :]
            wire.discarded += len(words) - kept
            assert not wire.port.holding
        if stopped and back:
            self.traffic(turns, seed)
        else:
            self.reboot(turns, seed)

    def start_rings(self) -> None:
        self.out, self.rx = Queue(), Queue()
        for wire in self.wires.values():
            wire.out, wire.rx = Queue(), Queue()
        self.console.control.reset()
        self.forget()

    @rule(turns=TURNS, seed=SEED)
    def hibernate(self, turns: int, seed: int) -> None:
        """Come back with new rings, the same ports, and no DEVICE_READY, as Linux does."""
        self.settle()
        self.start_rings()
        self.slept |= self.failed
        self.failed.clear()
        for number, known in self.known.items():
            self.say(number, Event.PORT_READY, 1)
            if known.opened:
                self.say(number, Event.PORT_OPEN, 1)
        self.hear(64)
        self.traffic(turns, seed)

    @rule(early=st.integers(0, 100), turns=TURNS, seed=SEED)
    def move(self, early: int, turns: int, seed: int) -> None:
        """Go on in another console with the same ports, where some have typed already."""
        saved = state.save(self.console)
        moved = Console([], len(IDS), rows_first=self.rows_first)
        moved.negotiated(self.features)
        wires = {}
        for number, wire in self.wires.items():
            port = self.make_port(number, wire.port.console, wire.port.blocking)
            moved.add(port)
            typed = bytes([number] * min(early, RING - (len(wire.typed) - wire.given)))
            port.input.feed(typed)
            start = max(wire.seen, wire.origin, len(wire.written) - RING)
            wires[number] = Wire(
                port,
                wire.out,
                wire.rx,
                wire.written,
                start,
                wire.typed + typed,
                wire.given,
                len(typed) - wire.given if typed else wire.before,
                wire.seen,
                wire.taken,
                ready=wire.ready,
                opened=wire.opened,
            )
        state.load(moved, saved).apply()
        self.console, self.wires = moved, wires
        self.traffic(turns, seed)

    def finish(self) -> None:
        self.settle()

    @rule()
    def settle(self) -> None:
        """Let the guest and the device say all they have to say; then what was said is true."""
        rng = random.Random(0)
        while self.out.given or self.console.control:
            self.hear(64)
            self.speak(64, rng)
        assert set(self.known) | self.failed | self.slept == set(self.wires)
        for number, known in self.known.items():
            port = self.wires[number].port
            assert (known.console, known.name) == (port.console, port.name.encode())
            assert known.host_open == port.host_open
            assert known.opened == port.opened
            sized = self.features & SIZE and port.console and port.size != (0, 0)
            assert known.size == (port.size if sized else None)

    # What always holds

    @invariant()
    def everyone_got_what_came_since_they_joined_or_knows_what_not(self) -> None:
        for wire in self.wires.values():
            assert wire.port.output.head == len(wire.written)
            assert wire.port.output.seen == wire.seen
            assert wire.port.discarded == wire.discarded
            for reader in wire.readers:
                assert reader.watcher.offset == reader.offset
                assert reader.watcher.stuck == reader.stuck
            due = sum(each.missed + wire.ahead_of(each.offset) for each in wire.readers)
            assert wire.port.missed == wire.missed + due

    @invariant()
    def a_blocking_generic_port_loses_nothing_that_nobody_has_taken(self) -> None:
        for wire in self.wires.values():
            if wire.port.blocking and not wire.port.console:
                assert len(wire.written) - wire.taken <= RING

    @invariant()
    def input_waits_or_is_given(self) -> None:
        for wire in self.wires.values():
            assert wire.port.input.tail == wire.given + wire.before
            assert wire.port.input.copy() == wire.typed[wire.given :]
            assert wire.port.opened == wire.opened

    @invariant()
    def answers_are_bounded(self) -> None:
        waiting = Counter(number for number, _, _ in self.console.control.waiting)
        assert max(waiting.values(), default=0) <= EVENTS_OF_A_PORT
        assert waiting.keys() <= set(IDS)


@pytest.mark.parametrize("resizes", [False, True], ids=["without sizes", "with sizes"])
def test_every_byte_and_message_is_accounted_for(resizes: bool) -> None:
    run(Consoles, resizes, examples=80, steps=30)
