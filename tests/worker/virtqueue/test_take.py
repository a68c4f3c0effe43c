"""Output straight out of a ring: what is taken, when the guest sees it, and when it is called.

Started as a program, this serves one ring by `take` and sleeps whenever it may.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import pytest
from rings import MakeSides, Sides, data_of
from vhost_device_console.errors import GuestError
from vhost_device_console.journal import Journal, Output, create
from vhost_device_console.testing import Buffer, PackedDriver, SplitDriver, Used, make_driver
from vhost_device_console.testing.split import DESC_F_INDIRECT, DESC_F_NEXT
from vhost_device_console.worker.vhost_user.message import Region
from vhost_device_console.worker.virtqueue import chain as module
from vhost_device_console.worker.virtqueue import inflight, packed, split
from vhost_device_console.worker.virtqueue.chain import Chain, look
from vhost_device_console.worker.virtqueue.features import EVENT_IDX, INDIRECT_DESC, RING_PACKED
from vhost_device_console.worker.virtqueue.inflight import Inflight, PackedState, SplitState
from vhost_device_console.worker.virtqueue.log import DirtyLog
from vhost_device_console.worker.virtqueue.memory import GuestMemory, map_region
from vhost_device_console.worker.virtqueue.ring import place

PAGE = 4096
JOURNAL = 4096  # bytes of the journal's ring
NO_LIMIT = 1 << 62
LONG_NS = 50_000  # much longer than any guest spins for its buffer


class Kind(NamedTuple):
    """A format, and whether what is popped is kept in an inflight area."""

    format: int
    tracked: bool = False


SPLIT, PACKED = Kind(0), Kind(RING_PACKED)
IDS = {
    SPLIT: "split",
    PACKED: "packed",
    Kind(0, True): "split in flight",
    Kind(RING_PACKED, True): "packed in flight",
}
KINDS = pytest.mark.parametrize("kind", IDS, ids=IDS.values())
FORMATS = pytest.mark.parametrize("format_", [0, RING_PACKED], ids=["split", "packed"])
MODES = pytest.mark.parametrize("event_idx", [0, EVENT_IDX], ids=["flags", "event index"])
WAYS = ["direct", "pieces", "table"]
EACH_WAY = pytest.mark.parametrize("way", WAYS)


class Watched(Output):
    """An output that lets the guest do something at each of its steps."""

    def __init__(self, *parts: memoryview) -> None:
        super().__init__(*parts)
        self.meanwhile: Callable[[], object] = lambda: None

    def append_from(self, source: memoryview, at: int, count: int) -> None:
        self.meanwhile()
        super().append_from(source, at, count)
        self.meanwhile()

    def commit(self) -> None:
        self.meanwhile()
        super().commit()
        self.meanwhile()


class Taker:
    """A ring and the journal that its buffers are taken into; `sent` is what the guest wrote."""

    def __init__(self, side: Sides, state: Callable[[], Any], output: type[Output]) -> None:
        self.side = side
        self.driver = side.driver
        self.state = state
        self.parts = memoryview(bytearray(JOURNAL)), memoryview(bytearray(64)).cast("Q")
        self.output = output(*self.parts)
        self.sent = b""
        self.got = b""

    def write(self, *data: bytes, way: str = "direct", publish: bool = True) -> None:
        """Offer one buffer for each `data`: direct, in two pieces, or in those of a table."""
        for each in data:
            middle = len(each) // 2
            pieces = [each] if way == "direct" else [each[:middle], each[middle:]]
            self.driver.add(pieces, indirect=way == "table")
            self.sent += each
        if publish:
            self.driver.publish()

    def take(self, most: int = 64, limit: int = NO_LIMIT, linger_ns: int = 0) -> int:
        """Take, and read what came; it must be less than the journal's ring."""
        before = self.output.head
        try:
            return self.side.queue.take(self.output, most, limit, linger_ns)
        finally:
            self.got += self.output.copy(before)

    @property
    def committed(self) -> int:
        """How many bytes count, should this process die now."""
        return Output(*self.parts).head

    def check(self) -> list[Used]:
        """Fail unless all that was written was taken and used; return what the guest gets back."""
        assert self.got == self.sent
        assert self.committed == self.output.head
        done = self.driver.reap()
        assert self.driver.in_flight == 0
        assert {used.length for used in done} <= {0}
        assert self.side.queue.index == self.driver.base
        assert not self.side.queue.ready()
        return done

    def check_used(self, count: int) -> None:
        """Fail unless the guest has so many buffers back, and their bytes count."""
        assert self.got == self.sent
        assert self.committed == len(self.sent)
        assert [used.length for used in self.driver.reap()] == [0] * count

    def close(self) -> None:
        """Let go of the memory, whatever still refers to this."""
        del self.side.queue, self.side.memory, self.output

    def serve_anew(self) -> None:
        """Let a successor serve the ring, with what the area has if there is one."""
        self.side.queue = self.side.serve(self.side.queue.index, inflight=self.state())


MakeTaker = Callable[..., Taker]


@pytest.fixture
def taker(sides: MakeSides) -> Iterator[MakeTaker]:
    with ExitStack() as ends:

        def make(
            kind: Kind, features: int = 0, *, output: type[Output] = Output, **options: Any
        ) -> Taker:
            features |= kind.format | INDIRECT_DESC
            size = options.setdefault("size", 8)
            state: Callable[[], SplitState | PackedState | None] = lambda: None  # noqa: E731
            if kind.tracked:
                fd, total = inflight.create(1, size, features)
                ends.callback(os.close, fd)
                state = lambda: Inflight(fd, total, 0, 1, size, features).queue(0)  # noqa: E731
            made = Taker(sides(features, inflight=state(), **options), state, output)
            ends.callback(made.close)
            return made

        yield make


class Clock:
    """The device's clock: 100 ns go by with each look at it, and the guest does what is due."""

    def __init__(self) -> None:
        self.now = 0
        self.due: dict[int, Callable[[], object]] = {}

    def __call__(self) -> int:
        self.now += 100
        if action := self.due.pop(self.now, None):
            action()
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "monotonic_ns", clock)
    return clock


def stream(seed: int) -> Iterator[bytes]:
    """Give buffers of any size, small ones most of the time, whose bytes tell them apart."""
    rng = random.Random(seed)
    while True:
        yield rng.randbytes(rng.choice([0, 1, 2, 16, 16, 16, 200, 400]))


# Every byte once and in order


@KINDS
@MODES
@pytest.mark.parametrize("way", [*WAYS, "mixed"])
def test_every_byte_arrives_once_and_in_order(
    taker: MakeTaker, kind: Kind, event_idx: int, way: str
) -> None:
    """Many laps of the ring, the journal and the split ring's indices."""
    start = 0xFFA0 if kind.format == 0 else 5
    r = taker(kind, event_idx, start=start)
    rng, data = random.Random(1), stream(2)
    for _ in range(80):
        count = 0
        while r.driver.free >= 2 and rng.random() < 0.8:
            r.write(next(data), way=rng.choice(WAYS) if way == "mixed" else way, publish=False)
            count += 1
        r.driver.publish()
        assert r.take() == count
        assert len(r.check()) == count
    assert r.output.head > 2 * JOURNAL


@KINDS
@pytest.mark.parametrize("size", [1, 2, 4])
def test_small_rings_come_round(taker: MakeTaker, kind: Kind, size: int) -> None:
    if kind.format == RING_PACKED:
        size += size > 2  # it may have any size
    r = taker(kind, size=size)
    for data, _ in zip(stream(3), range(5 * size), strict=False):
        while r.driver.free:
            r.write(data)
        assert r.take() == size
        assert len(r.check()) == size


@KINDS
@EACH_WAY
def test_a_buffer_around_the_journals_end_is_whole(taker: MakeTaker, kind: Kind, way: str) -> None:
    r = taker(kind)
    for before in (0, 1, 7, 13, 14):
        r.output.begin_at(3 * JOURNAL - before)
        r.write(b"around the end", b"|", way=way)
        assert r.take() == 2
        r.check()
    assert bytes(r.parts[0][:1]) == b"|"


@KINDS
def test_a_buffer_as_large_as_the_journals_ring_fits(taker: MakeTaker, kind: Kind) -> None:
    r = taker(kind)
    r.write(b"x", b"y" * JOURNAL)
    assert r.take(limit=1 + JOURNAL) == 2
    assert r.output.copy(1) == b"y" * JOURNAL


#: The ring and its tables are in the first.
TOUCHING = [
    Region(0x90000, 1 << 16, 0x9000_0000, 0),
    Region(0x20000, 1 << 16, 0x7000_0000, 0),
    Region(0x10000, 1 << 16, 0x8000_0000, 0),
    Region(0x50000, 1 << 16, 0x6000_0000, 0),
]


#: Sixteen bytes each: within a region, up to its end, and across two that touch.
PLACES = [0x1FF00, 0x2FFF0, 0x50000, 0x5FFF0, 0x1FFF8, 0x2FF00, 0x5F000, 0x1FFE0]


@KINDS
@pytest.mark.parametrize("turn", range(6))
def test_buffers_may_lie_in_any_region_and_across_two(
    taker: MakeTaker, sides: MakeSides, kind: Kind, turn: int
) -> None:
    """All in one batch, in any order."""
    r = taker(kind, memory=sides.memory(TOUCHING))
    rng = random.Random(turn)
    for _ in range(8):
        for addr in rng.sample(PLACES, len(PLACES)):
            data = rng.randbytes(16)
            r.driver.memory.write(addr, data)
            r.driver.add_buffers([Buffer(addr, 16, False)], indirect=rng.random() < 0.2)
            r.sent += data
        r.driver.publish()
        assert r.take() == len(PLACES)
        r.check()


@KINDS
def test_machines_that_reorder_loads_and_stores_get_the_same(
    taker: MakeTaker, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in (split, packed):
        monkeypatch.setattr(each, "WEAKLY_ORDERED", True)
    r = taker(kind)
    for data, _ in zip(stream(5), range(40), strict=False):
        r.write(data)
        r.write(data, way="pieces")
        assert r.take() == 2
        r.check()


# How much is taken


@KINDS
@pytest.mark.parametrize("way", [*WAYS, "mixed"])
@pytest.mark.parametrize("most", [1, 2, 3, 5])
def test_no_more_are_taken_than_asked_for(
    taker: MakeTaker, kind: Kind, way: str, most: int
) -> None:
    r = taker(kind, size=16)
    for at, data in enumerate([b"first", b"second", b"third", b"fourth", b"fifth", b"sixth"]):
        r.write(data, way=WAYS[at % 3] if way == "mixed" else way)
    seen = 0
    while (moved := r.take(most, linger_ns=LONG_NS)) == most:
        assert len(r.driver.reap()) == most
        seen += moved
        if seen == 6:
            break
    else:
        assert seen + moved == 6
    r.check()


@KINDS
def test_nothing_is_taken_where_there_is_nothing(taker: MakeTaker, kind: Kind) -> None:
    r = taker(kind)
    assert r.take() == r.take(linger_ns=LONG_NS) == 0
    assert not r.side.queue.publish()
    assert r.check() == []


@KINDS
def test_a_buffer_of_no_size_needs_no_room(taker: MakeTaker, kind: Kind) -> None:
    """Held, with a size of 0, it would look as if nothing were."""
    r = taker(kind)
    r.write(b"a" * 10, b"", b"b")
    assert r.take(limit=5) == 0
    assert r.take(limit=10) == 2
    assert r.take(limit=9) == 0
    assert r.side.queue.held == 1
    r.write(b"")
    assert r.take() == 2
    r.check()


@KINDS
@EACH_WAY
def test_a_buffer_past_the_limit_stays_the_guests(taker: MakeTaker, kind: Kind, way: str) -> None:
    """It is not used, its size is told, and it comes first when there is room."""
    r = taker(kind)
    queue = r.side.queue
    r.write(b"a" * 10, b"b" * 20, b"c" * 30, way=way)
    assert r.take(limit=29) == 1
    assert queue.held == 20
    assert queue.ready()
    assert queue.want_kicks()
    assert [used.chain.buffers[0].size for used in r.driver.reap()] == [
        10 if way == "direct" else 5
    ]
    assert queue.index == r.driver.base
    assert r.take(limit=29) == 0
    assert queue.held == 20
    assert not queue.publish() or r.driver.in_flight == 2
    assert r.take(limit=30) == 1
    assert queue.held == 30
    assert r.take() == 1
    assert queue.held == 0
    r.check()


@KINDS
@EACH_WAY
def test_a_held_buffer_is_forgotten_with_the_next_call(
    taker: MakeTaker, kind: Kind, way: str
) -> None:
    """With whatever that call finds, be it the most that it may take."""
    r = taker(kind)
    queue = r.side.queue
    r.write(b"a" * 10, b"b" * 10, way=way)
    assert r.take(limit=9) == 0
    assert queue.held == 10
    assert r.take(most=1) == 1
    assert queue.held == 0
    assert r.take(limit=19) == 0
    assert queue.held == 10
    assert r.take() == 1
    assert queue.held == 0
    assert r.take(limit=20) == 0
    assert queue.held == 0
    r.check()


@KINDS
@EACH_WAY
def test_nobody_lingers_for_more_while_one_is_held(
    taker: MakeTaker, clock: Clock, kind: Kind, way: str
) -> None:
    r = taker(kind)
    r.write(b"a", b"b" * 10, way=way)
    assert r.take(limit=5, linger_ns=LONG_NS) == 1
    assert clock.now == 0


@KINDS
@EACH_WAY
def test_a_successor_begins_with_the_held_buffer(taker: MakeTaker, kind: Kind, way: str) -> None:
    r = taker(kind)
    r.write(b"a" * 10, b"b" * 20, b"c" * 30, way=way)
    assert r.take(limit=20) == 1
    r.serve_anew()
    assert r.take() == 2
    r.check()


@FORMATS
def test_what_a_predecessor_had_in_flight_is_taken_first(taker: MakeTaker, format_: int) -> None:
    r = taker(Kind(format_, True))
    r.write(b"one", b"two", way="pieces")
    r.write(b"three", b"four")
    for _ in range(3):
        r.side.pop()
    r.serve_anew()
    assert r.take(limit=5) == 1
    assert r.side.queue.held == 3
    r.write(b"five", way="table")
    assert r.take() == 4
    r.check()


@KINDS
def test_what_was_pushed_before_is_seen_too(taker: MakeTaker, kind: Kind) -> None:
    r = taker(kind)
    r.write(b"popped", b"and pushed")
    for _ in range(2):
        chain = r.side.pop()
        r.output.append(data_of(chain))
        r.side.queue.push(chain.head, 0)
    r.got = r.output.copy(0)
    r.write(b"taken")
    assert r.take() == 1
    assert len(r.check()) == 3


# Mistakes of the guest


@KINDS
@EACH_WAY
def test_a_buffer_that_the_journal_cannot_hold_is_a_mistake(
    taker: MakeTaker, kind: Kind, way: str
) -> None:
    """The ring may have been made for another port, and the buffer would never fit."""
    r = taker(kind)
    r.write(b"good", b"x" * (JOURNAL + 1), way=way)
    with pytest.raises(GuestError, match=f"more than {JOURNAL} bytes"):
        r.take(limit=4)
    assert r.got == b"good"
    assert r.committed == 4


def _writable(driver: SplitDriver | PackedDriver) -> None:
    driver.add(writable=[10])


def _nowhere(driver: SplitDriver | PackedDriver) -> None:
    driver.add_buffers([Buffer(0x10, 10, False)])


def _far_off(driver: SplitDriver | PackedDriver) -> None:
    driver.add_buffers([Buffer((1 << 64) - 4, 4, False)])


def _past_the_end(driver: SplitDriver | PackedDriver) -> None:
    ((region, _),) = driver.memory.regions()
    driver.add_buffers([Buffer(region.guest_addr + region.size - 4, 8, False)])


def _half_nowhere(driver: SplitDriver | PackedDriver) -> None:
    buffer = Buffer(driver.memory.alloc(8), 8, False)
    driver.add_buffers([buffer, buffer._replace(addr=0x10)], indirect=True)


def _no_table(driver: SplitDriver | PackedDriver) -> None:
    if isinstance(driver, SplitDriver):
        driver.write_desc(7, 0x10, 15, DESC_F_INDIRECT)
        driver.offer(7)
    else:
        driver.offer([(0x10, 15, DESC_F_INDIRECT)])


def _endless(driver: SplitDriver | PackedDriver) -> None:
    addr = driver.memory.alloc(8)
    if isinstance(driver, SplitDriver):
        driver.write_desc(7, addr, 8, DESC_F_NEXT, 7)
        driver.offer(7)
    else:
        driver.offer([(addr, 8, DESC_F_NEXT)])


MISTAKES = [_writable, _nowhere, _far_off, _past_the_end, _half_nowhere, _no_table, _endless]


@KINDS
@EACH_WAY
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda each: each.__name__.strip("_"))
def test_those_before_a_mistake_count(
    taker: MakeTaker, kind: Kind, way: str, mistake: Callable[[Any], None]
) -> None:
    """They are in the journal for good, and the guest has them back and is called for them."""
    r = taker(kind)
    r.write(b"one", b"two", way=way)
    mistake(r.driver)
    r.driver.publish()
    with pytest.raises(GuestError):
        r.take(linger_ns=LONG_NS)
    assert r.got == b"onetwo"
    assert r.committed == 6
    assert [used.length for used in r.driver.reap()] == [0, 0]
    assert r.side.queue.publish()


@pytest.mark.parametrize("kind", [SPLIT, Kind(0, True)], ids=["split", "split in flight"])
@pytest.mark.parametrize("ahead", [9, 100, 0x8000, 0xFFFF])
@pytest.mark.parametrize("before", [0, 2])
def test_an_available_index_too_far_ahead_is_a_mistake(
    taker: MakeTaker, kind: Kind, ahead: int, before: int
) -> None:
    r = taker(kind)
    r.write(*[b"data"] * before)
    assert r.take() == before
    assert isinstance(r.driver, SplitDriver)
    r.driver.set_avail_idx(before + ahead)
    with pytest.raises(GuestError, match="available index"):
        r.take(linger_ns=LONG_NS)
    r.check_used(before)


@pytest.mark.parametrize("kind", [SPLIT, Kind(0, True)], ids=["split", "split in flight"])
def test_an_available_entry_of_no_descriptor_is_a_mistake(taker: MakeTaker, kind: Kind) -> None:
    r = taker(kind)
    r.write(b"good")
    assert isinstance(r.driver, SplitDriver)
    r.driver.offer(8)
    r.driver.publish()
    with pytest.raises(GuestError, match="names descriptor 8 of 8"):
        r.take()
    r.check_used(1)


@KINDS
def test_buffers_given_again_before_they_are_used_end_in_nothing_worse(
    taker: MakeTaker, kind: Kind
) -> None:
    """A hostile guest's entries are all available whenever they are looked at."""
    r = taker(kind, output=Watched, size=2)
    addr = r.driver.memory.alloc(1)
    turns = 0

    def again() -> None:
        """Make the next entry available, whatever was used."""
        nonlocal turns
        if isinstance(r.driver, SplitDriver):
            r.driver.set_avail_idx(turns + 1)
        elif isinstance(r.driver, PackedDriver):
            r.driver.write_desc(turns % 2, addr, 1, 0, 1 << 15 if turns // 2 % 2 else 1 << 7)
        turns += 1

    if isinstance(r.driver, SplitDriver):
        r.driver.write_desc(0, addr, 1)
    again()
    assert isinstance(r.output, Watched)
    r.output.meanwhile = lambda: again() if r.output.head == turns else None
    with contextlib.suppress(GuestError):
        assert r.take() > 0
    assert 2 <= r.output.head == r.committed <= 64
    assert turns >= 2


# What counts before the guest sees it, and what the guest sees at once


@KINDS
@pytest.mark.parametrize("way", [*WAYS, "mixed"])
def test_nothing_is_used_before_it_counts(taker: MakeTaker, kind: Kind, way: str) -> None:
    """A guest that looks all the time never has back a buffer that dying now would lose."""
    r = taker(kind, EVENT_IDX, output=Watched)
    rng, data = random.Random(8), stream(9)
    back = looks = 0

    def meanwhile() -> None:
        nonlocal back, looks
        back += sum(buffer.size for used in r.driver.reap() for buffer in used.chain.buffers)
        assert back <= r.committed
        looks += 1
        if r.driver.free >= 2:
            r.write(next(data), way=rng.choice(WAYS) if way == "mixed" else way)

    assert isinstance(r.output, Watched)
    r.output.meanwhile = meanwhile
    for _ in range(20):
        meanwhile()
        r.take(16)
        r.side.queue.publish()
    r.output.meanwhile = lambda: None
    while r.side.queue.ready():
        r.take()
    back += sum(buffer.size for used in r.driver.reap() for buffer in used.chain.buffers)
    assert back == r.committed == len(r.sent)
    assert looks > 100
    r.check()


@KINDS
def test_buffers_are_back_without_any_publish(taker: MakeTaker, kind: Kind) -> None:
    r = taker(kind)
    r.write(b"one", b"two")
    assert r.take() == 2
    assert len(r.check()) == 2


@KINDS
def test_a_guest_that_polls_has_early_ones_back_while_the_rest_is_taken(
    taker: MakeTaker, kind: Kind
) -> None:
    """A ring's worth is shown in portions, so that both sides work at the same time."""
    r = taker(kind, output=Watched, size=64)
    r.driver.disable_calls()
    r.write(*[b"x"] * 64)
    seen = []
    assert isinstance(r.output, Watched)
    r.output.meanwhile = lambda: seen.append(r.driver.has_used())
    assert r.take() == 64
    assert not seen[0]
    assert seen.index(True) < len(seen) // 2


@pytest.mark.parametrize(("size", "at_once"), [(16, 16), (2048, 1), (17000, 16)])
@KINDS
def test_large_buffers_are_shown_one_by_one_but_not_the_largest(
    taker: MakeTaker, kind: Kind, size: int, at_once: int
) -> None:
    r = taker(kind, size=32, most=1 << 20)
    r.driver.disable_calls()
    seen: list[int] = []
    output = Watched(memoryview(bytearray(1 << 20)), memoryview(bytearray(64)).cast("Q"))
    output.meanwhile = lambda: seen.append(len(r.driver.reap()))
    for _ in range(2):  # the first turn says what size they have
        r.driver.reap()
        seen.clear()
        r.write(*[bytes(size)] * 20)
        assert r.side.queue.take(output, 64, NO_LIMIT, 0) == 20
    assert max(seen) == at_once


# Lingering


@KINDS
@EACH_WAY
def test_a_buffer_that_comes_while_it_lingers_is_taken_too(
    taker: MakeTaker, clock: Clock, kind: Kind, way: str
) -> None:
    r = taker(kind, size=16)
    r.driver.disable_calls()
    clock.due = {
        500: lambda: r.write(b"soon", way=way),
        9_000: lambda: r.write(b"later", way=way),
        30_000: lambda: r.write(b"and", b"later still", way=way),
    }
    r.write(b"first", way=way)
    assert r.take(linger_ns=LONG_NS) == 5
    assert not clock.due
    assert not r.side.queue.publish()
    r.check()


@KINDS
def test_it_lingers_as_long_as_it_may_and_no_longer(
    taker: MakeTaker, clock: Clock, kind: Kind
) -> None:
    r = taker(kind)
    r.driver.disable_calls()
    r.write(b"first")
    assert r.take(linger_ns=LONG_NS) == 1
    assert LONG_NS <= clock.now <= LONG_NS + 1000


@KINDS
def test_it_does_not_linger_unless_told_to(taker: MakeTaker, clock: Clock, kind: Kind) -> None:
    r = taker(kind)
    r.driver.disable_calls()
    clock.due = {100: lambda: r.write(b"too late")}
    r.write(b"first")
    assert r.take() == 1
    assert clock.now == 0


@KINDS
def test_it_does_not_linger_where_there_was_nothing(
    taker: MakeTaker, clock: Clock, kind: Kind
) -> None:
    r = taker(kind)
    assert r.take(linger_ns=LONG_NS) == 0
    assert clock.now == 0


@KINDS
def test_it_does_not_linger_once_it_took_all_it_may(
    taker: MakeTaker, clock: Clock, kind: Kind
) -> None:
    r = taker(kind)
    r.driver.disable_calls()
    r.write(b"first", b"second")
    assert r.take(most=2, linger_ns=LONG_NS) == 2
    assert clock.now == 0


@KINDS
def test_much_output_is_not_kept_waiting_for_more(
    taker: MakeTaker, clock: Clock, kind: Kind
) -> None:
    r = taker(kind)
    r.driver.disable_calls()
    r.write(b"x" * 3000, b"y" * 3000)
    assert r.side.queue.take(r.output, 64, NO_LIMIT, LONG_NS) == 2
    assert 0 < clock.now < LONG_NS // 10


# Calls


@KINDS
@MODES
def test_a_guest_that_waits_is_called_instead_of_lingered_for(
    taker: MakeTaker, clock: Clock, kind: Kind, event_idx: int
) -> None:
    r = taker(kind, event_idx)
    assert not r.driver.enable_calls()
    r.write(b"one", b"two")
    assert r.take(linger_ns=LONG_NS) == 2
    assert clock.now < LONG_NS // 10
    assert r.side.queue.publish()
    assert not r.side.queue.publish()


@KINDS
@MODES
def test_a_guest_that_waits_is_called_before_all_is_taken(
    taker: MakeTaker, kind: Kind, event_idx: int
) -> None:
    """So that it wakes up while this side goes on."""
    r = taker(kind, event_idx, size=64)
    assert not r.driver.enable_calls()
    r.write(*[b"x"] * 64)
    assert 0 < r.take() < 64
    assert r.side.queue.publish()
    r.driver.reap()
    while r.side.queue.ready():
        r.take()
    r.check()


@KINDS
@MODES
def test_a_guest_that_waits_is_called_without_lingering_too(
    taker: MakeTaker, kind: Kind, event_idx: int
) -> None:
    r = taker(kind, event_idx)
    assert not r.driver.enable_calls()
    r.write(b"one")
    assert r.take() == 1
    assert r.side.queue.publish()
    assert not r.side.queue.publish()


@KINDS
@pytest.mark.parametrize("linger_ns", [0, 100, 1000, LONG_NS])
def test_a_guest_that_saw_them_meanwhile_is_not_called(
    taker: MakeTaker, clock: Clock, kind: Kind, linger_ns: int
) -> None:
    """Its event index is past what was taken by the time it would be called."""
    r = taker(kind, EVENT_IDX)
    assert not r.driver.enable_calls()
    clock.due = {200: r.driver.reap}
    r.write(b"one", b"two")
    assert r.take(linger_ns=linger_ns) == 2
    r.driver.reap()
    assert not r.side.queue.publish()
    assert clock.now >= linger_ns


@KINDS
@MODES
def test_a_guest_that_refuses_calls_is_not_called(
    taker: MakeTaker, clock: Clock, kind: Kind, event_idx: int
) -> None:
    r = taker(kind, event_idx)
    r.driver.disable_calls()
    r.write(b"one", b"two")
    assert r.take(linger_ns=LONG_NS) == 2
    assert not r.side.queue.publish()
    assert clock.now >= LONG_NS
    r.write(b"three")
    assert r.take() == 1
    assert not r.side.queue.publish()


@KINDS
@MODES
def test_a_guest_that_sleeps_while_it_is_lingered_for_is_called_for_the_next_one(
    taker: MakeTaker, clock: Clock, kind: Kind, event_idx: int
) -> None:
    r = taker(kind, event_idx)
    r.driver.disable_calls()

    def sleep() -> None:
        r.driver.reap()
        assert not r.driver.enable_calls()

    clock.due = {5_000: sleep, 6_000: lambda: r.write(b"two")}
    r.write(b"one")
    assert r.take(linger_ns=LONG_NS) == 2
    assert clock.now < LONG_NS // 2
    assert r.side.queue.publish()


@KINDS
@MODES
def test_a_guest_that_asks_while_it_is_lingered_for_sees_what_there_is(
    taker: MakeTaker, clock: Clock, kind: Kind, event_idx: int
) -> None:
    """Whether it is called or not: it has been told when it asked."""
    r = taker(kind, event_idx)
    r.driver.disable_calls()
    told = []
    clock.due = {5_000: lambda: told.append(r.driver.enable_calls())}
    r.write(b"one")
    assert r.take(linger_ns=LONG_NS) == 1
    assert told == [True]


@KINDS
@MODES
def test_one_call_is_asked_for_whatever_was_taken_since_the_last(
    taker: MakeTaker, kind: Kind, event_idx: int
) -> None:
    r = taker(kind, event_idx)
    assert not r.driver.enable_calls()
    for data in (b"one", b"two", b"three"):
        r.write(data)
        assert r.take() == 1
    assert r.side.queue.publish()
    assert not r.side.queue.publish()


@KINDS
def test_an_event_further_on_is_reached_by_the_buffer_it_names(
    taker: MakeTaker, kind: Kind
) -> None:
    """The guest may ask to be called for the third one only, around the ring's end too."""
    r = taker(kind, EVENT_IDX)
    for _ in range(11):
        if isinstance(r.driver, SplitDriver):
            r.driver.set_used_event(r.driver.used_idx + 2)
        elif isinstance(r.driver, PackedDriver):
            at, lap = (r.driver.next_used & 0x7FFF) + 2, r.driver.next_used & 0x8000
            place = at | lap if at < 8 else at - 8 | lap ^ 0x8000
            r.driver.set_driver_event(2, place)
        called = []
        for data in (b"one", b"two", b"three", b"four", b"five"):
            r.write(data)
            assert r.take() == 1
            called.append(r.side.queue.publish())
        assert called == [False, False, True, False, False]
        r.check()


@KINDS
@MODES
@pytest.mark.parametrize("seed", range(6))
def test_a_guest_that_sleeps_is_called_for_whatever_it_has_not_seen(
    taker: MakeTaker, clock: Clock, kind: Kind, event_idx: int, seed: int
) -> None:
    """Whatever it did before, during and after each `take`: nothing is asked and forgotten."""
    r = taker(kind, event_idx, output=Watched, start=None if kind.format else 0xFF00)
    rng, data = random.Random(seed), stream(seed)
    asleep = False
    slept = called = 0

    def meanwhile() -> None:
        nonlocal asleep, slept
        match rng.choice(["write"] * 6 + ["reap", "ask", "sleep", "refuse"]):
            case "write":  # by another CPU than the one that sleeps
                if r.driver.free >= 2:
                    r.write(next(data), way=rng.choice(WAYS))
            case "reap" if not asleep:
                r.driver.reap()
            case "ask" if not asleep:
                asleep = not r.driver.enable_calls()
            case "sleep" if not asleep:
                r.driver.reap()
                asleep = not r.driver.enable_calls()
                slept += asleep
            case "refuse" if not asleep:
                r.driver.disable_calls()

    def tick() -> int:
        if rng.random() < 0.05:
            meanwhile()
        return Clock.__call__(clock)

    assert isinstance(r.output, Watched)
    r.output.meanwhile = meanwhile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "monotonic_ns", tick)
        for _ in range(300):
            meanwhile()
            taken = r.take(rng.choice([1, 3, 16]), linger_ns=rng.choice([0, 500, 1000, 20_000]))
            if taken and r.side.queue.publish():
                called += asleep
                asleep = False
            assert not (asleep and r.driver.has_used()), "a lost call"
    assert slept > 20
    assert called > 20
    assert r.got == r.sent[: len(r.got)]


# Looking


@KINDS
def test_a_look_finds_the_ring_that_becomes_ready(
    taker: MakeTaker, clock: Clock, kind: Kind
) -> None:
    others = [taker(each) for each in IDS]
    r = taker(kind)
    rings = [each.side.queue for each in [*others[:2], r, *others[2:]]]
    clock.due = {3_000: lambda: r.write(b"x")}
    assert look(rings, LONG_NS) == 2
    assert 3_000 <= clock.now < 4_000
    assert r.take() == 1


def test_a_look_ends_at_its_time(taker: MakeTaker, clock: Clock) -> None:
    assert look([taker(each).side.queue for each in IDS], LONG_NS) < 0
    assert clock.now == LONG_NS


@KINDS
def test_a_look_sees_what_there_is_though_its_time_is_over(
    taker: MakeTaker, clock: Clock, kind: Kind
) -> None:
    r = taker(kind)
    clock.now = LONG_NS
    assert look([r.side.queue], 0) < 0
    r.write(b"x")
    assert look([r.side.queue], 0) == 0


def test_a_look_at_no_rings_ends_at_once(clock: Clock) -> None:
    assert look([], NO_LIMIT) < 0
    assert clock.now <= 100


# Putting buffers back


def shape(chain: Chain) -> tuple[int, int, bytes, list[int]]:
    return chain.head, chain.size, data_of(chain), [len(span) for span in chain.spans]


@KINDS
@MODES
@pytest.mark.parametrize("back", [1, 2, 4, 5])
def test_buffers_put_back_are_popped_again_the_same(
    taker: MakeTaker, kind: Kind, event_idx: int, back: int
) -> None:
    """The last ones first, around the ring's end, behind one that is pushed already."""
    r = taker(kind, event_idx, size=16)
    queue = r.side.queue
    data = stream(6)
    for turn in range(15):
        for at in range(6):
            r.write(next(data) + b"%d" % at, way=WAYS[(turn + at) % 3])
        queue.push(r.side.pop().head, 0)
        popped = [r.side.pop() for _ in range(5)]
        wanted = [shape(chain) for chain in popped]
        assert queue.pop() is None
        for chain in reversed(popped[5 - back :]):
            queue.unpop(chain.head)
        assert queue.ready()
        again = popped[: 5 - back] + [r.side.pop() for _ in range(back)]
        assert [shape(chain) for chain in again] == wanted
        assert queue.pop() is None
        for chain in again:
            queue.push(chain.head, 0)
        queue.publish()
        assert len(r.driver.reap()) == 6
        assert r.driver.in_flight == 0
        assert queue.index == r.driver.base


@FORMATS
@pytest.mark.parametrize("back", range(1, 7))
def test_a_predecessors_buffers_can_be_put_back_with_newer_ones(
    taker: MakeTaker, format_: int, back: int
) -> None:
    r = taker(Kind(format_, True), size=16)
    for at in range(6):
        r.write(b"buffer %d" % at, way=WAYS[at % 3])
    for _ in range(3):
        r.side.pop()
    r.serve_anew()
    popped = [r.side.pop() for _ in range(6)]
    for chain in reversed(popped[6 - back :]):
        r.side.queue.unpop(chain.head)
    r.serve_anew()
    again = [r.side.pop() for _ in range(6)]
    assert [shape(chain) for chain in again] == [shape(chain) for chain in popped]
    for chain in again:
        r.side.queue.push(chain.head, 0)
    r.side.queue.publish()
    assert len(r.driver.reap()) == 6
    assert r.side.queue.index == r.driver.base


@KINDS
def test_marks_are_right_after_buffers_were_put_back(
    taker: MakeTaker, sides: MakeSides, kind: Kind
) -> None:
    """Each page that was written, and no other of the buffers'."""
    memory = sides.memory([Region(0, 1 << 20, 0x7000_0000, 0)])
    r = taker(kind, memory=memory, size=16, writable=True)
    queue = r.side.queue
    fd = os.memfd_create("log")
    try:
        os.truncate(fd, PAGE)
        queue.log(DirtyLog(fd, PAGE, 0, 1 << 20), None)
        pages = [100, 103, 106, 109, 112]
        for at, page in enumerate(pages):
            pieces = [Buffer((page + more) * PAGE, PAGE, True) for more in range(2)]
            r.driver.add_buffers(pieces, indirect=at % 2 == 1)
        r.driver.publish()
        popped = [r.side.pop() for _ in pages]
        for chain in reversed(popped[1:]):
            queue.unpop(chain.head)
        popped[1:] = [r.side.pop() for _ in pages[1:3]]
        queue.unpop(popped.pop().head)
        popped += [r.side.pop() for _ in pages[2:]]
        for chain, written in zip(popped, [1, 0, PAGE, PAGE + 1, 2 * PAGE], strict=True):
            queue.push(chain.head, written)
        queue.publish()
        log = int.from_bytes(os.pread(fd, PAGE, 0), "little")
        marked = {page for page in range(100, 120) if log >> page & 1}
        assert marked == {100, 106, 109, 110, 112, 113}
        assert [used.length for used in r.driver.reap()] == [1, 0, PAGE, PAGE + 1, 2 * PAGE]
    finally:
        queue.log(None, None)
        os.close(fd)


@KINDS
@pytest.mark.parametrize("own", [True, False], ids=["everything", "buffers"])
def test_taking_marks_the_rings_words_alone(
    taker: MakeTaker, sides: MakeSides, kind: Kind, own: bool
) -> None:
    """And all of them, in whatever portions they are shown; the buffers were only read."""
    memory = sides.memory([Region(0, 1 << 20, 0x7000_0000, 0)])
    r = taker(kind, memory=memory, size=1024)
    fd = os.memfd_create("log")
    try:
        os.truncate(fd, PAGE)
        r.side.queue.log(DirtyLog(fd, PAGE, 0, 1 << 20), r.driver.used_addr if own else None)
        r.driver.disable_calls()
        addr = memory.alloc(PAGE, PAGE)
        for _ in range(900):
            r.driver.add_buffers([Buffer(addr, 1, False)])
        r.driver.publish()
        before = [memory.read(page * PAGE, PAGE) for page in range(256)]
        while r.side.queue.ready():
            r.take()
            r.side.queue.publish()
        changed = {page for page in range(256) if memory.read(page * PAGE, PAGE) != before[page]}
        assert len(changed) >= 2
        log = int.from_bytes(os.pread(fd, PAGE, 0), "little")
        assert {page for page in range(256) if log >> page & 1} == (changed if own else set())
    finally:
        r.side.queue.log(None, None)
        os.close(fd)


# Two processes


def serve(kick: int, call: int, region: list[int], fd: int, journal: int, ring: Any) -> None:
    """Serve one ring until a buffer of one byte has come; see `test_no_wake_up_is_lost`."""
    memory = GuestMemory([map_region(fd, *region)])
    queue = place(memory, **ring, writable=False, most_bytes=1 << 16)
    output = Journal(journal).output
    rng = random.Random(1)
    while True:
        queue.refuse_kicks()
        while queue.take(output, 64, NO_LIMIT, rng.choice([0, 1_000, 20_000])):
            if queue.publish():
                os.write(call, (1).to_bytes(8, "little"))
            if output.copy(output.head - 1) == b".":
                return
        if not queue.want_kicks():
            select.select([kick], [], [])
            os.read(kick, 8)


@FORMATS
@MODES
def test_no_wake_up_is_lost(sides: MakeSides, format_: int, event_idx: int) -> None:
    """Both sides sleep whenever they may; a lost kick or call would stop them for good.

    What the guest has back is in the journal by then.
    """
    guest = sides.memory(1 << 20)
    features = format_ | event_idx
    driver = make_driver(guest, 32, features)
    ((region, fd),) = guest.regions()
    rng = random.Random(3)
    data = rng.randbytes(60_000).replace(b".", b"!")
    with ExitStack() as ends:
        kick, call = os.eventfd(0), os.eventfd(0)
        file = create("journal", 1 << 16, PAGE)
        for each in (kick, call, file):
            ends.callback(os.close, each)
        words = memoryview(os.pread(file, 64, 0)).cast("Q")
        assert words[1] == 1 << 16
        ring = {
            "size": 32,
            "desc": guest.user_addr(driver.desc_addr),
            "avail": guest.user_addr(driver.avail_addr),
            "used": guest.user_addr(driver.used_addr),
            "features": features,
            "base": driver.base,
        }
        what = {"kick": kick, "call": call, "region": region, "fd": fd, "journal": file}
        command = [sys.executable, __file__, json.dumps({**what, "ring": ring})]
        process = ends.enter_context(subprocess.Popen(command, pass_fds=(kick, call, fd, file)))
        ends.callback(process.kill)

        def notify() -> None:
            driver.publish()
            if driver.kick_needed():
                os.write(kick, (1).to_bytes(8, "little"))

        sent = back = 0
        while sent < len(data) or driver.in_flight:
            for _ in range(rng.randrange(1, 32)):
                piece = data[sent : sent + rng.randrange(2, 20)]
                if driver.free and piece:
                    driver.add([piece])
                    sent += len(piece)
            notify()
            done = driver.reap()
            back += sum(buffer.size for used in done for buffer in used.chain.buffers)
            assert back <= int.from_bytes(os.pread(file, 8, 16), sys.byteorder)
            if not done and not driver.enable_calls():
                ready, _, _ = select.select([call], [], [], 20)
                assert ready, f"no call came at {sent}, {driver.in_flight} in flight"
                os.read(call, 8)
        driver.add([b"."])
        notify()
        assert process.wait(10) == 0
        assert Journal(file).output.copy(0) == data + b"."


if __name__ == "__main__":
    serve(**json.loads(sys.argv[1]))
