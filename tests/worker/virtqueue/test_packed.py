"""The packed ring's device side, against the driver side of the testing library."""

from __future__ import annotations

import random
import struct
from typing import Any, cast

import pytest
from rings import MakeSides, Sides, data_of
from vhost_device_console import core
from vhost_device_console.errors import GuestError, RefusedError
from vhost_device_console.testing import Buffer, GuestMemory, PackedDriver
from vhost_device_console.testing.packed import EVENT_DESC, EVENT_DISABLE, EVENT_ENABLE
from vhost_device_console.worker.vhost_user.message import Region
from vhost_device_console.worker.virtqueue import packed
from vhost_device_console.worker.virtqueue.features import EVENT_IDX, RING_PACKED

SIZE = 5
NEXT, WRITE, INDIRECT, AVAIL, USED = 1, 2, 4, 0x80, 0x8000
MODES = pytest.mark.parametrize("event_idx", [0, EVENT_IDX], ids=["flags", "event index"])
STARTS = pytest.mark.parametrize("start", [0x8000, 0x8003, 0x8004, 1, 4])


@pytest.fixture
def ring(sides: MakeSides) -> MakeSides:
    def make(features: int = 0, **options: Any) -> Sides:
        return sides(RING_PACKED | features, **{"size": SIZE, **options})

    make.memory = sides.memory  # type: ignore[attr-defined]
    return cast(MakeSides, make)


def driver(side: Sides) -> PackedDriver:
    assert isinstance(side.driver, PackedDriver)
    return side.driver


def by_hand(side: Sides, *descriptors: tuple[int, int, int]) -> None:
    driver(side).offer(descriptors)
    side.driver.publish()


def table(guest: GuestMemory, *entries: tuple[int, int, int]) -> tuple[int, int]:
    """Write an indirect table of address, size and flags; return its address and size."""
    data = b"".join(struct.pack("<QIHH", addr, size, 0, flags) for addr, size, flags in entries)
    addr = guest.alloc(len(data))
    guest.write(addr, data)
    return addr, len(data)


def place_after(start: int, count: int, size: int = SIZE) -> int:
    """Return the place `count` entries after `start`: an entry, and its wrap counter in bit 15."""
    at, wrap = start & 0x7FFF, start >> 15
    for _ in range(count):
        at += 1
        if at == size:
            at, wrap = 0, wrap ^ 1
    return at | wrap << 15


# Chains


def test_an_empty_ring_has_nothing(ring: MakeSides) -> None:
    queue = ring(0).queue
    assert not queue.ready()
    assert queue.pop() is None


def test_a_buffer_is_not_there_until_it_is_published(ring: MakeSides) -> None:
    r = ring(0)
    r.driver.add([b"early"])
    assert r.queue.pop() is None
    r.driver.publish()
    assert r.queue.ready()
    assert data_of(r.pop()) == b"early"


@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
@pytest.mark.parametrize("pieces", [1, 2, 3, SIZE])
@STARTS
def test_a_chain_is_its_pieces_in_order(
    ring: MakeSides, start: int, pieces: int, indirect: bool
) -> None:
    r = ring(0, start=start)
    data = [bytes([65 + at]) * (at + 1) for at in range(pieces)]
    r.driver.add(data, indirect=indirect)
    r.driver.publish()
    chain = r.pop()
    assert [bytes(span) for span in chain.spans] == data
    assert chain.size == sum(map(len, data))
    assert not r.queue.ready()


def test_an_indirect_table_may_be_longer_than_the_ring(ring: MakeSides) -> None:
    r = ring(0)
    r.driver.add([b"%4d" % at for at in range(1024)], indirect=True)
    r.driver.publish()
    assert data_of(r.pop()) == b"".join(b"%4d" % at for at in range(1024))


@pytest.mark.parametrize("flags", [INDIRECT, INDIRECT | WRITE])
def test_the_write_flag_of_an_indirect_descriptor_means_nothing(
    ring: MakeSides, flags: int
) -> None:
    r = ring(0)
    addr = r.guest.alloc(16)
    r.guest.write(addr, b"data")
    by_hand(r, (*table(r.guest, (addr, 4, 0)), flags))
    assert data_of(r.pop()) == b"data"


def test_a_next_flag_in_an_indirect_table_means_nothing(ring: MakeSides) -> None:
    """Section 2.8.7: all but WRITE are ignored there, and some drivers do set NEXT."""
    r = ring(0)
    addr = r.guest.alloc(16)
    r.guest.write(addr, b"datamore")
    by_hand(r, (*table(r.guest, (addr, 4, NEXT), (addr + 4, 4, NEXT)), INDIRECT))
    assert data_of(r.pop()) == b"datamore"


@pytest.mark.parametrize("event_idx", [0, EVENT_IDX])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 100, 300])
def test_chains_of_any_layout_come_whole_and_in_order(
    ring: MakeSides, size: int, event_idx: int
) -> None:
    rng = random.Random(size)
    r = ring(event_idx, size=size)
    sent: list[bytes] = []
    got: list[bytes] = []
    kicks = calls = 0
    for turn in range(400):
        offered = 0
        while r.driver.free and rng.random() < 0.8:
            pieces = [rng.randbytes(rng.randrange(5)) for _ in range(rng.randrange(1, 6))]
            indirect = rng.random() < 0.5
            if not indirect and len(pieces) > r.driver.free:
                break
            sent.append(b"".join(pieces))
            r.driver.add(pieces, indirect=indirect)
            offered += 1
        armed = turn % 3 == 0
        if armed:
            assert not r.queue.want_kicks()
        r.driver.publish()
        if r.driver.kick_needed():
            kicks += 1
        else:
            assert not (armed and offered), turn
        for _ in range(offered):
            chain = r.pop()
            if rng.random() < 0.2:
                r.queue.unpop(chain.head)
                chain = r.pop()
            got.append(data_of(chain))
            r.queue.push(chain.head, 0)
            if rng.random() < 0.3:
                calls += r.queue.publish()
        assert r.queue.pop() is None
        calls += r.queue.publish()
        assert len(r.driver.reap()) == offered
        assert r.queue.index == r.driver.base
    assert got == sent
    assert kicks > 10
    assert calls > 10


def test_the_largest_ring_goes_round(sides: MakeSides) -> None:
    r = sides(RING_PACKED, size=1 << 15, memory=sides.memory(1 << 22))
    addr = r.guest.alloc(1)
    for _ in range(3):
        for _ in range(1 << 15):
            r.driver.add_buffers([Buffer(addr, 1, False)])
        r.driver.publish()
        r.done(1 << 15)
        assert r.queue.pop() is None
        assert len(r.driver.reap()) == 1 << 15
    assert r.queue.index == 0


def test_writable_chains_are_the_guests_memory(ring: MakeSides) -> None:
    r = ring(0, writable=True)
    r.driver.add(writable=[3, 5])
    r.driver.publish()
    chain = r.pop()
    for span, data in zip(chain.spans, [b"abc", b"defgh"], strict=True):
        span[:] = data
    r.queue.push(chain.head, 7)
    r.queue.publish()
    (used,) = r.driver.reap()
    assert (used.length, used.data) == (7, b"abcdefg")


TOUCHING = [Region(0x10000, 1 << 16, 0x7000_0000, 0), Region(0x20000, 1 << 16, 0x8000_0000, 0)]


def test_a_buffer_may_cross_adjacent_regions(ring: MakeSides) -> None:
    r = ring(0, memory=ring.memory(TOUCHING))
    r.guest.write(0x1FFFA, b"over the edge")
    by_hand(r, (0x1FFFA, 13, 0))
    chain = r.pop()
    assert [len(span) for span in chain.spans] == [6, 7]
    assert data_of(chain) == b"over the edge"


@pytest.mark.parametrize("cut", [1, 8, 16, 17, 32])
def test_an_indirect_table_may_cross_adjacent_regions(ring: MakeSides, cut: int) -> None:
    r = ring(0, memory=ring.memory(TOUCHING))
    addr = r.guest.alloc(16)
    r.guest.write(addr, b"0123456789ab")
    entries = b"".join(struct.pack("<QIHH", addr + at, 4, 0, 0) for at in (8, 4, 0))
    r.guest.write(0x20000 - cut, entries)
    by_hand(r, (0x20000 - cut, len(entries), INDIRECT))
    assert data_of(r.pop()) == b"89ab45670123"


# Completing


def test_a_used_descriptor_is_what_the_specification_says(ring: MakeSides) -> None:
    r = ring(0, writable=True)
    driver(r).offer([(r.guest.alloc(8), 8, WRITE)], buffer_id=0xABCD)
    driver(r).offer([(r.guest.alloc(8), 8, WRITE)], buffer_id=0x1234)
    r.driver.publish()
    r.queue.push(r.pop().head, 5)
    r.queue.push(r.pop().head, 0)
    r.queue.publish()
    assert driver(r).used_entry(0) == (0xABCD, 5, AVAIL | USED | WRITE)
    assert driver(r).used_entry(1) == (0x1234, 0, AVAIL | USED)


@pytest.mark.parametrize("pieces", [1, 3])
@STARTS
def test_what_is_pushed_leaves_no_trace_until_it_is_published(
    ring: MakeSides, start: int, pieces: int
) -> None:
    r = ring(0, start=start)
    for _ in range(SIZE // pieces):
        r.driver.add([b"x"] * pieces)
    r.driver.publish()
    before = r.guest.read(r.driver.desc_addr, 16 * SIZE)
    for _ in range(SIZE // pieces):
        r.queue.push(r.pop().head, 0)
    assert r.guest.read(r.driver.desc_addr, 16 * SIZE) == before
    assert r.queue.index == start | start << 16
    r.queue.publish()
    assert len(r.driver.reap()) == SIZE // pieces
    assert r.queue.index == r.driver.base


class _Stores:
    """A view that notes where it is stored to."""

    def __init__(self, view: memoryview) -> None:
        self.view = view
        self.at: list[int] = []

    def __getitem__(self, at: int) -> int:
        return int(self.view[at])

    def __setitem__(self, at: int, value: int) -> None:
        self.at.append(at)
        self.view[at] = value


@pytest.mark.skipif(core() != "plain Python", reason="no store of a compiled ring can be watched")
def test_the_first_used_descriptor_of_a_batch_is_stored_last(
    ring: MakeSides, monkeypatch: pytest.MonkeyPatch
) -> None:
    r = ring(0, start=0x8003)
    r.give(b"a", b"b", b"c", b"d")
    stores = _Stores(r.queue._desc)  # type: ignore[attr-defined]  # noqa: SLF001
    monkeypatch.setattr(r.queue, "_desc", stores)
    r.done(4)
    assert stores.at == [2 * at + 1 for at in (4, 0, 1, 3)]
    assert len(r.driver.reap()) == 4


@STARTS
def test_a_ring_goes_on_at_its_index(ring: MakeSides, start: int) -> None:
    r = ring(0, start=start)
    for turn in range(3 * SIZE):
        r.driver.add([b"%d" % turn] * (1 + turn % 3))
        r.driver.add([b"next"])
        r.driver.publish()
        r.done()
        r.pop()  # and never completed
        r.queue = r.serve(r.queue.index)
        chain = r.pop()
        assert data_of(chain) == b"next"
        r.queue.unpop(chain.head)
        r.done()
        assert len(r.driver.reap()) == 2
    assert r.queue.index == r.driver.base


@STARTS
def test_only_the_used_half_of_a_base_counts(ring: MakeSides, start: int) -> None:
    """What a predecessor had popped and not used was never overwritten: it is popped again."""
    r = ring(0, start=start)
    r.give(b"a", b"b", b"c")
    r.done()
    used = place_after(start, 1)
    r.queue = r.serve(used << 16 | place_after(start, 3))
    assert [data_of(r.pop()) for _ in range(2)] == [b"b", b"c"]


@pytest.mark.parametrize("base", [0, 0x8000, 0x8000_8000])
@pytest.mark.parametrize("early", [False, True], ids=["empty", "with buffers"])
def test_a_fresh_ring_is_known_without_wrap_counters(
    ring: MakeSides, base: int, early: bool
) -> None:
    """Linux says 0 of any fresh ring in User Mode Linux."""
    r = ring(0)
    if early:
        r.give(b"early")
    r.queue = r.serve(base)
    assert r.queue.fresh
    if not early:
        r.give(b"early")
    assert data_of(r.pop()) == b"early"


@pytest.mark.parametrize("early", [False, True], ids=["empty", "with buffers"])
def test_a_base_of_0_is_taken_at_its_word_after_one_lap(ring: MakeSides, early: bool) -> None:
    r = ring(0)
    for _ in range(SIZE):
        r.give(b"x")
        r.done()
        r.driver.reap()
    assert r.queue.index == r.driver.base == 0
    if early:
        r.give(b"again")
    r.queue = r.serve(0)
    assert not r.queue.fresh
    assert r.queue.ready() is early
    if not early:
        r.give(b"again")
    assert data_of(r.pop()) == b"again"


def test_a_base_of_0_is_taken_at_its_word_where_a_chain_went_around_the_end(
    ring: MakeSides,
) -> None:
    """Entry 0 was in the middle of that chain: it still says what the driver wrote there."""
    r = ring(0)
    for length in (SIZE, SIZE - 1, 3, SIZE - 2):
        r.driver.add([b"x"] * length)
        r.driver.publish()
        r.done()
        r.driver.reap()
    assert r.queue.index == r.driver.base == 0
    r.queue = r.serve(0)
    assert not r.queue.ready()


@pytest.mark.parametrize("base", [SIZE << 16, 0xFFFF_FFFF, (0x8000 | SIZE) << 16])
def test_a_base_past_the_ring_is_refused(ring: MakeSides, base: int) -> None:
    r = ring(0)
    with pytest.raises(RefusedError, match="cannot go on"):
        r.serve(base)


@pytest.mark.parametrize("full", [False, True])
def test_a_ring_is_fresh_until_something_was_used(ring: MakeSides, full: bool) -> None:
    r = ring(0)
    assert r.queue.fresh
    r.give(*[b"a"] * (SIZE if full else 1))
    assert r.queue.fresh
    for _ in range(4 * SIZE):
        r.done()
        assert not r.queue.fresh
        r.driver.reap()
        if r.driver.free == SIZE:
            r.queue = r.serve(r.queue.index)
            assert not r.queue.fresh
            r.give(b"a")


@pytest.mark.parametrize("pieces", [1, 3])
@STARTS
def test_a_chain_put_back_is_the_next_one_again(ring: MakeSides, start: int, pieces: int) -> None:
    r = ring(0, start=start)
    r.give(b"a")
    r.done()
    r.driver.reap()
    r.driver.add([b"b"] * pieces)
    r.driver.publish()
    first = r.pop()
    r.queue.unpop(first.head)
    assert r.queue.ready()
    again = r.pop()
    assert (again.head, data_of(again)) == (first.head, b"b" * pieces)
    r.queue.unpop(again.head)
    assert not r.queue.publish()
    assert r.queue.index == r.driver.base


# Notifications


@STARTS
@pytest.mark.parametrize("count", [1, 2, SIZE])
def test_a_call_is_wanted_exactly_when_the_event_is_used(
    ring: MakeSides, start: int, count: int
) -> None:
    for distance in range(2 * SIZE):
        r = ring(EVENT_IDX, start=start)
        r.give(*[b"x"] * count)
        driver(r).set_driver_event(EVENT_DESC, place_after(start, distance))
        assert r.done(count) is (distance < count), distance


def test_the_event_is_used_within_a_chain_too(ring: MakeSides) -> None:
    for distance in range(SIZE):
        r = ring(EVENT_IDX, start=0x8003)
        r.driver.add([b"x"] * 3)
        r.driver.publish()
        driver(r).set_driver_event(EVENT_DESC, place_after(0x8003, distance))
        assert r.done() is (distance < 3), distance


def test_the_event_is_looked_at_anew_each_time(ring: MakeSides) -> None:
    r = ring(EVENT_IDX)
    r.give(b"a", b"b", b"c", b"d")
    calls = []
    for event in (0x8000, 0x8000, 0x8002, 0x8002):
        driver(r).set_driver_event(EVENT_DESC, event)
        calls.append(r.done())
    assert calls == [True, False, True, False]


@MODES
@pytest.mark.parametrize(("mode", "called"), [(EVENT_ENABLE, True), (EVENT_DISABLE, False)])
def test_the_drivers_flags_enable_and_disable_calls(
    ring: MakeSides, mode: int, called: bool, event_idx: int
) -> None:
    r = ring(event_idx)
    r.give(b"a")
    driver(r).set_driver_event(mode, 0x1234)
    assert r.done() is called


@pytest.mark.parametrize(("mode", "features"), [(EVENT_DESC, 0), (3, 0), (3, EVENT_IDX)])
def test_flags_that_mean_nothing_lose_no_call(ring: MakeSides, mode: int, features: int) -> None:
    r = ring(features)
    r.give(b"a")
    driver(r).set_driver_event(mode, 0x8004)
    assert r.done()


@MODES
def test_publishing_nothing_calls_nobody(ring: MakeSides, event_idx: int) -> None:
    assert not ring(event_idx).queue.publish()


@MODES
@STARTS
def test_a_guest_kicks_when_kicks_are_wanted(ring: MakeSides, event_idx: int, start: int) -> None:
    r = ring(event_idx, start=start)
    for _ in range(2 * SIZE):
        r.queue.refuse_kicks()
        assert not r.queue.want_kicks()
        r.give(b"a")
        assert r.driver.kick_needed()
        r.done()
        r.driver.reap()


@MODES
def test_a_guest_does_not_kick_when_kicks_are_refused(ring: MakeSides, event_idx: int) -> None:
    r = ring(event_idx)
    r.queue.want_kicks()
    r.give(b"a")
    assert r.driver.kick_needed()
    r.queue.refuse_kicks()
    for _ in range(3 * SIZE):
        r.done()
        r.driver.reap()
        r.give(b"more")
        assert not r.driver.kick_needed()


@MODES
def test_wanting_kicks_tells_what_came_meanwhile(ring: MakeSides, event_idx: int) -> None:
    r = ring(event_idx)
    assert r.queue.pop() is None
    r.give(b"in between")
    assert r.queue.want_kicks()
    chain = r.pop()
    assert not r.queue.want_kicks()
    r.queue.unpop(chain.head)
    assert r.queue.want_kicks()


def test_a_kick_is_wanted_for_the_next_buffer_not_yet_popped(ring: MakeSides) -> None:
    r = ring(EVENT_IDX, start=0x8004)
    r.give(b"a", b"b", b"c")
    r.done(2)
    r.queue.want_kicks()
    assert driver(r).device_event == (EVENT_DESC, 1)


def test_flags_are_the_only_wish_without_event_idx(ring: MakeSides) -> None:
    r = ring(0)
    r.queue.refuse_kicks()
    assert driver(r).device_event == (EVENT_DISABLE, 0)
    r.queue.want_kicks()
    assert driver(r).device_event == (EVENT_ENABLE, 0)


@STARTS
def test_a_machine_that_reorders_has_the_same_ring(
    ring: MakeSides, start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "WEAKLY_ORDERED", True)
    r = ring(0, start=start)
    r.give(b"a", b"b")
    chain = r.pop()
    assert data_of(chain) == b"a"
    r.queue.unpop(chain.head)
    assert r.done(2)
    assert len(r.driver.reap()) == 2


# Where a ring can be


@pytest.mark.parametrize(("area", "off"), [("desc", 8), ("desc", 1), ("avail", 2), ("used", 2)])
def test_a_misaligned_area_is_refused(ring: MakeSides, area: str, off: int) -> None:
    r = ring(0)
    addr = {"desc": r.driver.desc_addr, "avail": r.driver.avail_addr, "used": r.driver.used_addr}
    with pytest.raises(RefusedError, match="misaligned"):
        r.serve(0, **{area: r.guest.user_addr(addr[area]) + off})


@pytest.mark.parametrize("area", ["desc", "avail", "used"])
@pytest.mark.parametrize("past", [0, 16, -(1 << 21)])
def test_an_area_outside_or_across_a_regions_end_is_refused(
    ring: MakeSides, area: str, past: int
) -> None:
    r = ring(0)
    ((region, _),) = r.guest.regions()
    end = region.user_addr + region.size + past
    with pytest.raises(RefusedError, match="no memory region"):
        r.serve(0, **{area: end})
    if area == "desc":
        with pytest.raises(RefusedError, match="no memory region"):
            r.serve(0, desc=region.user_addr + region.size - 16 * SIZE + 16)


# A guest that breaks the rules


@STARTS
def test_a_loop_breaks_the_queue_within_its_size(ring: MakeSides, start: int) -> None:
    r = ring(0, most=SIZE, start=start)
    by_hand(r, *[(r.guest.alloc(16), 1, NEXT)] * SIZE)
    with pytest.raises(GuestError, match="loop"):
        r.queue.pop()


@pytest.mark.parametrize("flags", [0, AVAIL | USED, USED])
def test_a_chain_into_a_descriptor_that_is_not_available_breaks_the_queue(
    ring: MakeSides, flags: int
) -> None:
    r = ring(0)
    driver(r).write_desc(1, r.guest.alloc(16), 1, 0, flags)
    by_hand(r, (r.guest.alloc(16), 1, NEXT))
    with pytest.raises(GuestError, match="nothing is available"):
        r.queue.pop()


def test_an_indirect_table_in_an_indirect_table_breaks_the_queue(ring: MakeSides) -> None:
    r = ring(0)
    inner = table(r.guest, (r.guest.alloc(16), 4, 0))
    by_hand(r, (*table(r.guest, (*inner, INDIRECT)), INDIRECT))
    with pytest.raises(GuestError, match="indirect"):
        r.queue.pop()


@pytest.mark.parametrize("first", [False, True])
def test_an_indirect_descriptor_in_a_list_breaks_the_queue(ring: MakeSides, first: bool) -> None:
    r = ring(0)
    addr = r.guest.alloc(16)
    entry = table(r.guest, (addr, 4, 0))
    if first:
        by_hand(r, (*entry, INDIRECT | NEXT), (addr, 4, 0))
    else:
        by_hand(r, (addr, 4, NEXT), (*entry, INDIRECT))
    with pytest.raises(GuestError, match="indirect"):
        r.queue.pop()


def test_an_indirect_descriptor_that_was_not_negotiated_breaks_the_queue(ring: MakeSides) -> None:
    r = ring(0, indirect=False)
    by_hand(r, (*table(r.guest, (r.guest.alloc(16), 4, 0)), INDIRECT))
    with pytest.raises(GuestError, match="indirect"):
        r.queue.pop()


@pytest.mark.parametrize("size", [0, 1, 15, 17, 16 * 1025, 0xFFFF_FFF0, 0xFFFF_FFFF])
def test_an_indirect_table_of_a_wrong_size_breaks_the_queue(ring: MakeSides, size: int) -> None:
    r = ring(0)
    by_hand(r, (r.guest.alloc(1 << 15), size, INDIRECT))
    with pytest.raises(GuestError, match=f"indirect table of {size} bytes"):
        r.queue.pop()


@pytest.mark.parametrize("addr", [0, 0xFFFF_FFFF_FFFF_FFF0])
def test_an_indirect_table_outside_memory_breaks_the_queue(ring: MakeSides, addr: int) -> None:
    r = ring(0)
    by_hand(r, (addr, 32, INDIRECT))
    with pytest.raises(GuestError, match="guest address"):
        r.queue.pop()


@pytest.mark.parametrize("flags", [0, INDIRECT])
@pytest.mark.parametrize(
    ("addr", "size"),
    [(0, 1), (-1, 1), (-8, 16), (0x4000_0000 - 1, 2), (0x4010_0000 - 1, 2), (0x4010_0000, 1)],
)
def test_a_buffer_outside_memory_breaks_the_queue(
    ring: MakeSides, addr: int, size: int, flags: int
) -> None:
    r = ring(0)
    addr &= (1 << 64) - 1
    by_hand(r, (*table(r.guest, (addr, size, 0)), INDIRECT) if flags else (addr, size, 0))
    with pytest.raises(GuestError, match="in no memory region"):
        r.queue.pop()


def test_a_buffer_across_a_hole_breaks_the_queue(ring: MakeSides) -> None:
    low = Region(0x10000, 1 << 16, 0x7000_0000, 0)
    r = ring(0, memory=ring.memory([low, Region(0x21000, 1 << 16, 0x8000_0000, 0)]))
    by_hand(r, (0x1FFFF, 0x1002, 0))
    with pytest.raises(GuestError, match="0x20000"):
        r.queue.pop()


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("sizes", [(101,), (0xFFFF_FFFF,), (50, 51), (100, 1), (34, 34, 34)])
def test_a_chain_of_more_bytes_than_the_cap_breaks_the_queue(
    ring: MakeSides, sizes: tuple[int, ...], indirect: bool
) -> None:
    r = ring(0, most=100)
    addr = r.guest.alloc(100)
    r.driver.add_buffers([Buffer(addr, size, False) for size in sizes], indirect=indirect)
    r.driver.publish()
    with pytest.raises(GuestError, match="more than 100 bytes"):
        r.queue.pop()


@pytest.mark.parametrize("sizes", [(100,), (50, 50), (99, 1, 0)])
def test_a_chain_of_just_the_cap_is_fine(ring: MakeSides, sizes: tuple[int, ...]) -> None:
    r = ring(0, most=100)
    addr = r.guest.alloc(100)
    r.driver.add_buffers([Buffer(addr, size, False) for size in sizes])
    r.driver.publish()
    assert r.pop().size == 100


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("ways", ["w", "r w", "w r", "r", "r r w", "w w r"])
@pytest.mark.parametrize("writable", [False, True])
def test_a_descriptor_of_the_wrong_direction_breaks_the_queue(
    ring: MakeSides, ways: str, writable: bool, indirect: bool
) -> None:
    r = ring(0, writable=writable)
    addr = r.guest.alloc(8)
    r.driver.add_buffers([Buffer(addr, 8, way == "w") for way in ways.split()], indirect=indirect)
    r.driver.publish()
    if set(ways.split()) == {"w" if writable else "r"}:
        assert r.pop().size == 8
        return
    with pytest.raises(GuestError, match="only the other kind"):
        r.queue.pop()


@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize("pieces", [1, 2])
def test_zero_length_buffers_are_completed(ring: MakeSides, writable: bool, pieces: int) -> None:
    r = ring(0, writable=writable)
    for _ in range(SIZE // pieces):
        r.driver.add_buffers([Buffer(0, 0, writable)] * pieces)
    r.driver.publish()
    r.done(SIZE // pieces)
    assert [used.length for used in r.driver.reap()] == [0] * (SIZE // pieces)
    assert r.queue.pop() is None


def test_an_error_is_found_each_time_it_is_looked_at(ring: MakeSides) -> None:
    r = ring(0)
    by_hand(r, (0, 1, 0))
    for _ in range(2):
        with pytest.raises(GuestError):
            r.queue.pop()


def test_what_was_completed_before_a_mistake_can_be_published(ring: MakeSides) -> None:
    r = ring(0)
    r.give(b"good")
    by_hand(r, (0, 1, 0))
    r.queue.push(r.pop().head, 0)
    with pytest.raises(GuestError):
        r.queue.pop()
    assert r.queue.publish()
    assert len(r.driver.reap()) == 1


def test_a_descriptor_changed_after_it_was_popped_means_nothing(ring: MakeSides) -> None:
    r = ring(0)
    r.give(b"first")
    chain = r.pop()
    driver(r).write_desc(0, 0, 0xFFFF_FFFF, 99, WRITE | NEXT)
    assert (data_of(chain), chain.size) == (b"first", 5)
    r.queue.push(chain.head, 0)
    r.queue.publish()
    assert len(r.driver.reap()) == 1


def test_used_descriptors_that_the_guest_rewrites_mean_nothing(ring: MakeSides) -> None:
    r = ring(0)
    r.give(b"a", b"b", b"c")
    r.done()
    driver(r).write_desc(0, 1, 2, 3, 0xFFFF)
    assert data_of(r.pop()) == b"b"
    assert r.queue.index == 0x8001_8001


def test_a_ring_of_random_descriptors_ends_in_an_error_or_nothing(ring: MakeSides) -> None:
    """Whatever the ring's memory holds, at most a ring's worth of chains is popped of one lap."""
    for seed in range(300):
        rng = random.Random(seed)
        r = ring(EVENT_IDX * (seed % 2))
        ((region, _),) = r.guest.regions()
        for at in range(SIZE):
            addr = region.guest_addr + rng.randrange(0, 1 << 19)
            flags = rng.choice([AVAIL, AVAIL, 0, 0xFFFF]) | rng.choice([0, NEXT, INDIRECT, WRITE])
            driver(r).write_desc(at, addr, rng.choice([0, 16, 64, (1 << 32) - 1]), at, flags)
        try:
            for _ in range(SIZE + 1):
                chain = r.queue.pop()
                if chain is None:
                    break
                r.queue.push(chain.head, 0)
            else:
                pytest.fail("more chains than descriptors")
        except GuestError:
            pass
        r.queue.publish()
