"""Chains in flight: what a region holds, and what a successor makes of it after any death."""

from __future__ import annotations

import os
import random
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from rings import MakeSides, Sides
from vhost_device_console.errors import GuestError, RefusedError
from vhost_device_console.testing import Buffer, Chain, PackedDriver, SplitDriver
from vhost_device_console.worker.virtqueue.features import EVENT_IDX, RING_PACKED
from vhost_device_console.worker.virtqueue.inflight import (
    Inflight,
    PackedState,
    SplitState,
    create,
)

FORMATS = pytest.mark.parametrize("format_", [0, RING_PACKED], ids=["split", "packed"])
SIZE = 8
MEMORY = 1 << 16


class Tracked:
    """A ring and its region in an area; `serve` is another backend that takes over."""

    def __init__(self, sides: MakeSides, fd: int, size: int, features: int, **options: Any) -> None:
        self.fd = fd
        self.area_size = size
        self.features = features
        self.side: Sides = sides(
            features, memory=sides.memory(MEMORY), size=SIZE, inflight=self.state(), **options
        )
        self.driver = self.side.driver
        ((_, self.guest_fd),) = self.side.guest.regions()
        self.addr = self.side.guest.alloc(1)

    def state(self) -> SplitState | PackedState:
        state = Inflight(self.fd, self.area_size, 0, 1, SIZE, self.features).queue(0)
        assert state is not None
        return state

    def serve(self, base: int | None = None) -> SplitState | PackedState:
        """Serve the ring with the state that the area has; return that state."""
        state = self.state()
        self.side.queue = self.side.serve(
            self.side.queue.index if base is None else base, inflight=state
        )
        return state

    def offer(self, *pieces: int) -> list[Chain]:
        """Offer a chain for each number, of that many descriptors; 0: of one that is indirect."""
        buffer = Buffer(self.addr, 1, self.side.writable)
        chains = [
            self.driver.add_buffers([buffer] * max(count, 1), indirect=not count)
            for count in pieces
        ]
        for chain in chains:
            chain.owned = ()  # a driver that is given back an earlier state would free it twice
        self.driver.publish()
        return chains

    def area(self) -> bytes:
        return os.pread(self.fd, self.area_size, 0)

    def copies(self) -> tuple[bytes, bytes]:
        return os.pread(self.guest_fd, MEMORY, 0), self.area()

    def restore(self, copies: tuple[bytes, bytes]) -> None:
        os.pwrite(self.guest_fd, copies[0], 0)
        os.pwrite(self.fd, copies[1], 0)

    def finish(self) -> int:
        """Complete all there is to pop; return how many that were."""
        count = 0
        while (chain := self.side.queue.pop()) is not None:
            self.side.queue.push(chain.head, 0)
            count += 1
        self.side.queue.publish()
        return count


@pytest.fixture
def tracked(sides: MakeSides) -> Iterator[Callable[..., Tracked]]:
    fds = []

    def make(features: int, **options: Any) -> Tracked:
        fd, size = create(1, SIZE, features)
        fds.append(fd)
        return Tracked(sides, fd, size, features, **options)

    yield make
    for fd in fds:
        os.close(fd)


MakeTracked = Callable[..., Tracked]


# The layout, literally


def test_the_region_of_a_split_ring_is_as_specified(tracked: MakeTracked) -> None:
    r = tracked(0, start=300)
    first, second, third = r.offer(1, 1, 1)
    for _ in range(3):
        r.side.pop()
    r.side.queue.push(first.head, 0)
    r.side.queue.push(second.head, 0)
    r.side.queue.publish()
    area = r.area()
    assert len(area) == 192  # 16 + 8 * 16, aligned to 64
    assert struct.unpack_from("<QHHHH", area) == (0, 1, SIZE, second.head, 302)
    entries = [struct.unpack_from("<B5xHQ", area, 16 + 16 * at) for at in range(SIZE)]
    assert [entries[chain.head] for chain in (first, second, third)] == [
        (0, 0, 0),
        (0, first.head, 1),
        (1, 0, 2),
    ]
    assert not any(map(any, entries[3:]))


def test_the_region_of_a_packed_ring_is_as_specified(tracked: MakeTracked) -> None:
    r = tracked(RING_PACKED, start=0x8006)
    chains = r.offer(3, 1, 2)
    for _ in range(3):
        r.side.pop()
    r.side.queue.push(chains[0].head | 3 << 16, 0)
    r.side.queue.publish()
    area = r.area()
    assert len(area) == 320  # 32 + 8 * 32, aligned to 64
    # free and old free head, used and old used index, both wrap counters: 6 + 3 is 1, a lap later
    assert struct.unpack_from("<QHHHHHHBB", area) == (0, 1, SIZE, 0, 0, 1, 1, 0, 0)
    entries = [struct.unpack_from("<BxHHHQHHIQ", area, 32 + 32 * at) for at in range(SIZE)]
    assert entries[0][:5] == (0, 1, 2, 3, 0)
    assert entries[2][1] == 6  # the free list: 0, 1, 2, and what was never used
    assert entries[3] == (1, 4, 3, 1, 1, chains[1].head, 0x8000, 1, r.addr)
    assert entries[4][:5] == (1, 5, 5, 2, 2)
    assert entries[5][5:] == (chains[2].head, 0x8000, 1, r.addr)


@FORMATS
@pytest.mark.parametrize(("queues", "size"), [(1, 1), (4, 256), (256, 64)])
def test_an_area_is_new_sealed_and_as_large_as_said(format_: int, queues: int, size: int) -> None:
    fd, total = create(queues, size, format_)
    try:
        assert os.fstat(fd).st_size == total
        assert total >= queues * size * (32 if format_ else 16)
        assert not any(os.pread(fd, total, 0))
        for length in (0, total + 1):
            with pytest.raises(PermissionError):
                os.truncate(fd, length)
        area = Inflight(fd, total, 0, queues, size, format_)
        assert area.queue(queues - 1) is not None
        assert area.queue(queues) is None
    finally:
        os.close(fd)


@FORMATS
def test_only_queues_that_are_asked_for_cost_memory(format_: int) -> None:
    """An area may be for many more queues than are used."""
    queues, size = 256, 1 << 15
    fd, total = create(queues, size, format_)
    tracemalloc.start()
    try:
        area = Inflight(fd, total, 0, queues, size, format_)
        assert tracemalloc.get_traced_memory()[0] < 1 << 16
        assert area.queue(3) is area.queue(3)
    finally:
        tracemalloc.stop()
        os.close(fd)


@FORMATS
def test_queues_of_one_area_do_not_touch(sides: MakeSides, format_: int) -> None:
    fd, total = create(3, SIZE, format_)
    try:
        area = Inflight(fd, total, 0, 3, SIZE, format_)
        before = os.pread(fd, total, 0)
        r = sides(format_, inflight=area.queue(1))
        r.give(*[b"x"] * SIZE)
        r.done(SIZE)
        after = os.pread(fd, total, 0)
        third = total // 3
        assert after[third : 2 * third] != before[third : 2 * third]
        assert (after[:third], after[2 * third :]) == (before[:third], before[2 * third :])
    finally:
        os.close(fd)


# Deaths


class _Spy:
    """A view that calls before each of its stores."""

    def __init__(self, view: memoryview, before: Callable[[], None]) -> None:
        self._view = view
        self._before = before

    def __getitem__(self, at: Any) -> Any:
        return self._view[at]

    def __setitem__(self, at: Any, value: Any) -> None:
        self._before()
        self._view[at] = value

    def __len__(self) -> int:
        return len(self._view)


VIEWS = ("_desc", "_used", "_elements", "_device_event", "_bytes", "_u16", "_u32", "_u64")


def spy(subject: object, before: Callable[[], None]) -> None:
    for name in VIEWS:
        view = getattr(subject, name, None)
        if isinstance(view, memoryview):
            setattr(subject, name, _Spy(view, before))


def keep(driver: object) -> Callable[[], None]:
    """Return what gives a driver back the state that it has now; its memory is not part of that."""
    plain = (int, list, dict, bool, type(None), tuple)
    kept = {
        name: value.copy() if isinstance(value, list | dict) else value
        for name, value in vars(driver).items()
        if isinstance(value, plain)
    }

    def give_back() -> None:
        for name, value in kept.items():
            setattr(driver, name, value.copy() if isinstance(value, list | dict) else value)

    return give_back


def in_batches(r: Tracked, rng: random.Random) -> None:
    """Complete what there is, a few at a time, and put some back on the way."""
    queue = r.side.queue
    waiting: list[int] = []
    while True:
        chain = queue.pop()
        if chain is None:
            break
        if not waiting and rng.random() < 0.3:
            queue.unpop(chain.head)
            chain = r.side.pop()
        waiting.append(chain.head)
        if rng.random() < 0.6:
            for head in waiting:
                queue.push(head, 0)
            waiting.clear()
        if not waiting and rng.random() < 0.5:
            queue.publish()
    for head in waiting:
        queue.push(head, 0)
    queue.publish()


STARTS = {0: [0, 5, 65533], RING_PACKED: [0x8000, 0x8005, 3]}


@FORMATS
@pytest.mark.parametrize("nth", range(3))
@pytest.mark.parametrize("seed", range(4))
def test_a_death_at_any_store_loses_and_doubles_nothing(
    tracked: MakeTracked, format_: int, nth: int, seed: int
) -> None:
    """A successor starts over a copy of the memory before each store, also that of a successor."""
    rng = random.Random(seed)
    r = tracked(format_, start=STARTS[format_][nth])
    for _ in range(rng.randrange(3)):  # the free list is not always in order
        r.offer(1, 2)
        r.finish()
        r.driver.reap()
    chains = r.offer(*[[1, 2, 1, 3], [3, 3, 0, 1], [2] * 4, [1] * 8][seed])
    as_offered = keep(r.driver)
    points: list[tuple[bytes, bytes]] = []
    state = r.serve()
    points.append(r.copies())
    spy(r.side.queue, lambda: points.append(r.copies()))
    spy(state, lambda: points.append(r.copies()))
    in_batches(r, rng)
    points.append(r.copies())
    assert len(r.driver.reap()) == len(chains)
    assert len(points) > 4 * len(chains)
    base = FRESH[format_]

    def succeed(point: tuple[bytes, bytes]) -> None:
        as_offered()
        r.restore(point)
        state = r.serve(base)
        assert state.discarded is None
        r.finish()
        assert [used.chain for used in r.driver.reap()] == chains
        more = r.offer(2, 1, 3, 0)
        assert r.finish() == 4
        assert [used.chain for used in r.driver.reap()] == more
        assert r.driver.free == SIZE

    for point in points:
        succeed(point)
    for point in rng.sample(points, 5):  # and if the successor dies in its first steps, too
        as_offered()
        r.restore(point)
        state = r.state()
        dead: list[tuple[bytes, bytes]] = []
        spy(state, lambda: dead.append(r.copies()))  # noqa: B023
        r.side.queue = r.side.serve(base, inflight=state)
        in_batches(r, rng)
        for again in dead:
            succeed(again)


#: What a frontend knows of a ring whose backend has died: where it began.
FRESH = {0: 0, RING_PACKED: 0x8000_8000}


def test_a_split_predecessor_may_complete_in_any_order(tracked: MakeTracked) -> None:
    r = tracked(0, start=65534)
    state = r.serve()
    chains = r.offer(2, 1, 1, 1)
    assert isinstance(state, SplitState)
    for _ in range(3):
        r.side.pop()
    used = r.side.guest.view(r.driver.used_addr + 4 + 8 * (65534 % SIZE), 8, "I")
    used[0], used[1] = chains[1].head, 0
    state.completing(chains[1].head)
    assert isinstance(r.driver, SplitDriver)
    r.driver.set_used_idx(65535)
    state.completed([chains[1].head], 65535)
    assert [used.chain for used in r.driver.reap()] == [chains[1]]
    r.serve()
    assert r.side.queue.index == 1  # what is in flight is not to be taken from the ring again
    assert r.finish() == 3
    assert [used.chain for used in r.driver.reap()] == [chains[0], chains[2], chains[3]]


@pytest.mark.parametrize("seen", [False, True], ids=["before the guest saw it", "after"])
def test_a_packed_predecessor_may_complete_in_any_order(tracked: MakeTracked, seen: bool) -> None:
    r = tracked(RING_PACKED, start=0x8005)
    state = r.serve()
    assert isinstance(state, PackedState)
    assert isinstance(r.driver, PackedDriver)
    chains = r.offer(3, 2, 1, 1)
    for _ in range(3):
        r.side.pop()
    state.completing([3], 0x8007)  # the second chain's first entry is 3
    if seen:
        r.driver.write_desc(5, 0, 0, chains[1].head, 0x8080)
        assert [used.chain for used in r.driver.reap()] == [chains[1]]
    r.serve()
    left = [chains[0], chains[2], chains[3]] if seen else chains
    assert r.side.queue.index >> 16 == (0x8007 if seen else 0x8005)
    assert r.side.queue.index & 0xFFFF == 3
    assert r.finish() == len(left)
    assert [used.chain for used in r.driver.reap()] == left
    assert r.driver.free == SIZE


@FORMATS
def test_what_is_in_flight_comes_first_and_can_be_put_back(
    tracked: MakeTracked, format_: int
) -> None:
    r = tracked(format_)
    chains = r.offer(1, 2, 1)
    r.side.pop()
    r.side.pop()
    r.serve()
    queue = r.side.queue
    assert queue.ready()
    assert queue.want_kicks()
    chain = r.side.pop()
    for _ in range(2):
        queue.unpop(chain.head)
        assert r.side.pop().head == chain.head
    queue.unpop(chain.head)
    assert [r.side.pop().head & 0xFFFF for _ in range(3)] == [chain.head for chain in chains]
    assert queue.pop() is None
    assert not queue.want_kicks()


@FORMATS
@pytest.mark.parametrize("event_idx", [0, EVENT_IDX])
def test_a_tracked_ring_is_a_ring(tracked: MakeTracked, format_: int, event_idx: int) -> None:
    """Over many laps, with successors: everything in order, and calls and kicks as they should."""
    rng = random.Random(11)
    r = tracked(format_ | event_idx)
    for turn in range(300):
        if turn % 7 == 0:
            r.serve()
            if rng.random() < 0.5:  # and one that was only tried
                r.serve()
        chains = r.offer(*rng.choices([0, 1, 2], k=rng.randrange(1, 5)))
        assert r.side.queue.ready()
        assert r.finish() == len(chains)
        assert not r.side.queue.want_kicks()
        assert [used.chain for used in r.driver.reap()] == chains
        assert r.side.queue.index == r.driver.base


def test_a_packed_ring_that_we_stopped_may_start_elsewhere(tracked: MakeTracked) -> None:
    """A ring that was reset starts anew; what the area says is of the ring before."""
    r = tracked(RING_PACKED)
    state = r.serve()
    r.offer(1, 1, 1)
    r.side.queue.push(r.side.pop().head, 0)
    r.side.queue.publish()
    r.side.pop()
    r.driver.reset()
    for _ in range(2):  # tried, and started
        r.side.queue = r.side.serve(0x8000_8000, inflight=state)
    assert r.side.queue.pop() is None
    chains = r.offer(1, 2)
    assert r.finish() == 2
    assert [used.chain for used in r.driver.reap()] == chains
    assert state.discarded is None


def test_a_packed_ring_is_tried_before_its_base_is_known(tracked: MakeTracked) -> None:
    r = tracked(RING_PACKED, start=0x8003)
    os.pwrite(r.fd, bytes(r.area_size), 0)
    state = r.state()
    r.side.serve(0, inflight=state)
    r.side.queue = r.side.serve(0x8003_8003, inflight=state)
    chains = r.offer(1, 2)
    assert r.finish() == 2
    assert [used.chain for used in r.driver.reap()] == chains


@FORMATS
def test_marks_of_a_dirty_log_follow_what_is_popped_again(
    tracked: MakeTracked, format_: int
) -> None:
    class Log:
        """As DirtyLog, but it keeps a list."""

        def __init__(self) -> None:
            self.marks: list[tuple[int, int]] = []

        def covers(self, addr: int, size: int) -> bool:  # noqa: ARG002
            return True

        def mark(self, addr: int, size: int) -> None:
            self.marks.append((addr, size))

    r = tracked(format_, writable=True)
    r.offer(1, 1)
    r.side.pop()
    r.serve()
    log = Log()
    r.side.queue.log(log, None)  # type: ignore[arg-type]
    for _ in range(2):
        r.side.queue.push(r.side.pop().head, 1)
    assert log.marks == [(r.addr, 1)] * 2
    r.side.queue.log(None, None)
    r.side.queue.publish()
    r.driver.reap()
    r.offer(1)
    assert r.finish() == 1
    assert len(log.marks) == 2


# Areas that cannot be


@FORMATS
@pytest.mark.parametrize(
    ("less", "offset"), [(1, 0), (64, 0), (0, 4), (0, 4096), (0, 1 << 40), (-(1 << 40), 4096)]
)
def test_an_area_that_is_too_small_or_not_there_is_refused(
    format_: int, less: int, offset: int
) -> None:
    fd, total = create(2, 64, format_)
    try:
        with pytest.raises(RefusedError, match=r"inflight area|cannot keep"):
            Inflight(fd, total - less, offset, 2, 64, format_)
    finally:
        os.close(fd)


@pytest.mark.parametrize(("queues", "size"), [(0, 8), (1, 0), (1, 32769), (1, 65535)])
def test_an_area_for_no_ring_is_refused(queues: int, size: int) -> None:
    with pytest.raises(RefusedError, match="no area"):
        create(queues, size, 0)
    with pytest.raises(RefusedError, match="no area"):
        Inflight(0, 1 << 20, 0, queues, size, 0)


@FORMATS
def test_an_area_of_the_other_format_is_refused(sides: MakeSides, format_: int) -> None:
    fd, total = create(1, SIZE, RING_PACKED ^ format_)
    try:
        state = Inflight(fd, total, 0, 1, SIZE, RING_PACKED ^ format_).queue(0)
        with pytest.raises(RefusedError, match="other format"):
            sides(format_, inflight=state)
    finally:
        os.close(fd)


@FORMATS
def test_a_ring_larger_than_its_area_is_refused(sides: MakeSides, format_: int) -> None:
    fd, total = create(1, SIZE, format_)
    try:
        state = Inflight(fd, total, 0, 1, SIZE, format_).queue(0)
        with pytest.raises(RefusedError, match="rings of 8 entries cannot keep one of 16"):
            sides(format_, size=16, inflight=state)
        assert sides(format_, size=4, inflight=state).queue.pop() is None
    finally:
        os.close(fd)


# Hostile contents


def u16(at: int, value: int) -> Callable[[bytearray], None]:
    return lambda area: struct.pack_into("<H", area, at, value)


def u64(at: int, value: int) -> Callable[[bytearray], None]:
    return lambda area: struct.pack_into("<Q", area, at, value)


def byte(at: int, value: int) -> Callable[[bytearray], None]:
    return lambda area: area.__setitem__(at, value)


HEADER = {
    "unknown features": u64(0, 1),
    "unknown version": u16(8, 2),
    "wrong count of entries": u16(10, SIZE + 1),
    "no entries": u16(10, 0),
}
SPLIT = HEADER | {
    "a mark of 2": byte(16, 2),
    "a used index far off": u16(14, 1000),
    "a batch that loops": lambda area: (u16(12, 5)(area), u16(14, 0xFFFE)(area), u16(102, 5)(area)),
    "a batch head past the end": lambda area: (u16(12, SIZE)(area), u16(14, 0xFFFF)(area)),
    "a batch into the wild": lambda area: (
        u16(12, 5)(area),
        u16(14, 0xFFFE)(area),
        u16(102, 0xFFFF)(area),
    ),
    "more in flight than offered": lambda area: [byte(16 + 16 * at, 1)(area) for at in range(4)],
    "one counter twice": lambda area: [u64(24 + 16 * at, 7)(area) for at in range(SIZE)],
    "a last counter": u64(24, (1 << 64) - 1),
    "a counter that would soon run out": u64(24, (1 << 64) - 2),
}
PACKED = HEADER | {
    "a mark of 2": byte(32 + 32 * 2, 2),
    "a used index past the end": u16(16, SIZE),
    "an old used index past the end": u16(18, 0xFFFF),
    "a wrap counter of 2": byte(20, 2),
    "an old wrap counter of 255": byte(21, 255),
    "a free list with a loop": u16(32 + 32 * 5 + 2, 4),
    "a free list that ends early": u16(32 + 32 * 5 + 2, SIZE),
    "no free list": u16(14, 0xFFFF),
    "a chain of none": u16(32 + 6, 0),
    "a chain too long": u16(32 + 6, SIZE + 1),
    "a chain of the whole ring": u16(32 + 6, 0xFFFF),
    "a chain through itself": lambda area: (u16(32 + 6, 2)(area), u16(32 + 2, 0)(area)),
    "a chain into the wild": lambda area: (u16(32 + 6, 2)(area), u16(32 + 2, 0xFFFF)(area)),
    "a chain that ends elsewhere": u16(32 + 4, 3),
    "one counter twice": lambda area: [u64(40 + 32 * at, 7)(area) for at in range(SIZE)],
    "a last counter": u64(40, (1 << 64) - 1),
    "a counter that would soon run out": u64(40, (1 << 64) - 2),
}


@pytest.mark.parametrize(
    ("format_", "what"),
    [(0, what) for what in SPLIT] + [(RING_PACKED, what) for what in PACKED],
)
def test_a_region_that_cannot_be_right_is_discarded(
    tracked: MakeTracked, format_: int, what: str
) -> None:
    """The ring then goes on at its used index, with everything that was not completed."""
    r = tracked(format_)
    chains = r.offer(1, 1, 1)
    r.side.pop()
    r.side.pop()
    area = bytearray(r.area())
    (PACKED if format_ else SPLIT)[what](area)
    os.pwrite(r.fd, area, 0)
    state = r.serve(FRESH[format_])
    assert state.discarded is not None
    assert r.finish() == 3
    assert [used.chain for used in r.driver.reap()] == chains
    assert r.serve().discarded is None


@FORMATS
def test_random_regions_never_break_more_than_the_queue(tracked: MakeTracked, format_: int) -> None:
    r = tracked(format_)
    r.offer(1, 2, 1, 0)
    r.side.pop()
    r.side.pop()
    whole = r.copies()
    used = 0
    for seed in range(400):
        rng = random.Random(seed)
        r.restore(whole)
        area = bytearray(whole[1])
        for _ in range(rng.randrange(1, 6)):
            at = rng.randrange(len(area))
            area[at] = rng.choice([0, 1, 2, 255, rng.randrange(256), area[at] ^ 1])
        os.pwrite(r.fd, area, 0)
        try:
            used += r.serve(FRESH[format_]).discarded is None
            for _ in range(SIZE + 1):
                chain = r.side.queue.pop()
                if chain is None:
                    break
                r.side.queue.push(chain.head, 0)
            else:
                pytest.fail("more chains than descriptors")
            r.side.queue.publish()
        except GuestError:
            pass
    assert 0 < used < 400


def test_nothing_is_read_back_from_a_region(tracked: MakeTracked) -> None:
    """A frontend that scribbles in it while the ring runs harms its successor alone."""
    rng = random.Random(1)
    for format_ in (0, RING_PACKED):
        r = tracked(format_)
        for _ in range(200):
            chains = r.offer(*rng.choices([0, 1, 2], k=3))
            os.pwrite(r.fd, rng.randbytes(r.area_size), 0)
            assert r.finish() == 3
            assert [used.chain for used in r.driver.reap()] == chains


def test_a_guest_cannot_have_more_in_flight_than_the_ring(tracked: MakeTracked) -> None:
    """Packed descriptors made available again while they are in flight break the queue."""
    r = tracked(RING_PACKED)
    assert isinstance(r.driver, PackedDriver)
    for lap in (0x80, 0x8000):
        for at in range(SIZE):
            r.driver.write_desc(at, r.addr, 1, at, lap)
        if lap == 0x80:
            for _ in range(SIZE):
                r.side.pop()
    with pytest.raises(GuestError, match="more descriptors are in flight"):
        r.side.queue.pop()
