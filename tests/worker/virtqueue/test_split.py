"""The split ring's device side, against the driver side of the testing library."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from vhost_device_console.errors import GuestError, RefusedError
from vhost_device_console.ledger import Page
from vhost_device_console.testing import Buffer, GuestMemory, SplitDriver
from vhost_device_console.worker.vhost_user.message import Region
from vhost_device_console.worker.virtqueue import memory as mapped
from vhost_device_console.worker.virtqueue import split
from vhost_device_console.worker.virtqueue.chain import Chain
from vhost_device_console.worker.virtqueue.features import EVENT_IDX, INDIRECT_DESC
from vhost_device_console.worker.virtqueue.split import SplitQueue

SIZE = 8
MOST = 1 << 16
NEXT, WRITE, INDIRECT = 1, 2, 4
NO_INTERRUPT = NO_NOTIFY = 1
MODES = pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event index"])


class Ring:
    """Both sides of one ring."""

    def __init__(
        self,
        guest: GuestMemory,
        *,
        size: int = SIZE,
        start: int = 0,
        event_idx: bool = False,
        indirect: bool = True,
        writable: bool = False,
        most: int = MOST,
    ) -> None:
        self.guest = guest
        self.features = (EVENT_IDX if event_idx else 0) | (INDIRECT_DESC if indirect else 0)
        self.writable = writable
        self.most = most
        self.memory = mapped.GuestMemory(
            [mapped.map_region(fd, *region) for region, fd in guest.regions()]
        )
        self.driver = SplitDriver(guest, size, start=start, event_idx=event_idx)
        self.queue = self.serve()

    def serve(self, **other: Any) -> SplitQueue:
        """Return the device's side, as another server of the same ring would make it."""
        user = self.guest.user_addr
        driver = self.driver
        place = {
            "size": driver.size,
            "desc": user(driver.desc_addr),
            "avail": user(driver.avail_addr),
            "used": user(driver.used_addr),
            **other,
        }
        return SplitQueue(
            self.memory,
            **place,
            features=self.features,
            writable=self.writable,
            most_bytes=self.most,
            page=Page(),
            stream=None,
            resume=None,
        )

    def give(self, *data: bytes, indirect: bool = False) -> None:
        """Offer one chain a piece of data."""
        for piece in data:
            self.driver.add([piece], indirect=indirect)
        self.driver.publish()

    def descriptor(self, addr: int, size: int, flags: int = 0, following: int = 0) -> None:
        """Offer descriptor 0, written by hand."""
        self.driver.write_desc(0, addr, size, flags, following)
        self.driver.offer(0)
        self.driver.publish()

    def table(self, *entries: tuple[int, int, int, int]) -> tuple[int, int]:
        """Write an indirect table; return its address and size."""
        data = b"".join(struct.pack("<QIHH", *entry) for entry in entries)
        addr = self.guest.alloc(len(data))
        self.guest.write(addr, data)
        return addr, len(data)

    def pop(self) -> Chain:
        chain = self.queue.pop()
        assert chain is not None
        return chain

    def done(self, count: int = 1, written: int = 0) -> bool:
        """Complete the next `count` buffers; return whether the guest wants a call."""
        for _ in range(count):
            self.queue.push(self.pop().head, written)
        return self.queue.publish()


class MakeRing:
    """The `ring` fixture: call it for a ring in memory of its own, or in `memory`."""

    def __init__(self, ends: ExitStack) -> None:
        self._ends = ends

    def memory(self, what: int | list[Region]) -> GuestMemory:
        return self._ends.enter_context(GuestMemory(what))

    def __call__(self, memory: GuestMemory | None = None, **options: Any) -> Ring:
        return Ring(memory or self.memory(1 << 20), **options)


@pytest.fixture
def ring() -> Iterator[MakeRing]:
    with ExitStack() as ends:
        yield MakeRing(ends)


def data_of(chain: Chain) -> bytes:
    return b"".join(chain.spans)


# Chains


def test_an_empty_ring_has_nothing(ring: MakeRing) -> None:
    queue = ring().queue
    assert not queue.ready()
    assert queue.pop() is None


def test_a_buffer_is_not_there_until_it_is_published(ring: MakeRing) -> None:
    r = ring()
    r.driver.add([b"early"])
    assert r.queue.pop() is None
    r.driver.publish()
    assert r.queue.ready()
    assert data_of(r.pop()) == b"early"


@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
@pytest.mark.parametrize("pieces", [1, 2, 3, SIZE])
def test_a_chain_is_its_pieces_in_order(ring: MakeRing, pieces: int, indirect: bool) -> None:
    r = ring()
    data = [bytes([65 + at]) * (at + 1) for at in range(pieces)]
    offered = r.driver.add(data, indirect=indirect)
    r.driver.publish()
    chain = r.pop()
    assert [bytes(span) for span in chain.spans] == data
    assert (chain.head, chain.size) == (offered.head, sum(map(len, data)))


def test_an_indirect_table_may_be_longer_than_the_ring(ring: MakeRing) -> None:
    r = ring()
    r.driver.add([b"%4d" % at for at in range(1024)], indirect=True)
    r.driver.publish()
    assert data_of(r.pop()) == b"".join(b"%4d" % at for at in range(1024))


def test_a_direct_chain_may_end_in_an_indirect_table(ring: MakeRing) -> None:
    r = ring()
    addr = r.guest.alloc(16)
    r.guest.write(addr, b"0123456789abcdef")
    table, size = r.table((addr + 4, 4, NEXT, 1), (addr + 8, 4, 0, 0))
    r.driver.write_desc(5, table, size, INDIRECT)
    r.descriptor(addr, 4, NEXT, 5)
    assert data_of(r.pop()) == b"0123456789ab"


@pytest.mark.parametrize("flags", [INDIRECT, INDIRECT | WRITE])
def test_the_write_flag_of_an_indirect_descriptor_means_nothing(ring: MakeRing, flags: int) -> None:
    r = ring()
    addr = r.guest.alloc(16)
    r.guest.write(addr, b"data")
    r.descriptor(*r.table((addr, 4, 0, 0)), flags)
    assert data_of(r.pop()) == b"data"


@pytest.mark.parametrize("seed", range(12))
def test_chains_of_any_layout_come_whole_and_in_order(ring: MakeRing, seed: int) -> None:
    rng = random.Random(seed)
    r = ring(size=16, start=65500, event_idx=bool(seed % 2))
    sent, got = [], []
    for _ in range(40):
        while r.driver.free and rng.random() < 0.8:
            pieces = [rng.randbytes(rng.randrange(5)) for _ in range(rng.randrange(1, 6))]
            indirect = rng.random() < 0.5
            if not indirect and len(pieces) > r.driver.free:
                break
            sent.append(b"".join(pieces))
            r.driver.add(pieces, indirect=indirect)
        r.driver.publish()
        while (chain := r.queue.pop()) is not None:
            got.append(data_of(chain))
            r.queue.push(chain.head, 0)
        r.queue.publish()
        r.driver.reap()
    assert got == sent
    assert r.queue.index == (65500 + len(sent)) & 0xFFFF


def test_writable_chains_are_the_guests_memory(ring: MakeRing) -> None:
    r = ring(writable=True)
    r.driver.add(writable=[3, 5])
    r.driver.publish()
    chain = r.pop()
    for span, data in zip(chain.spans, [b"abc", b"defgh"], strict=True):
        span[:] = data
    r.queue.push(chain.head, 7)
    r.queue.publish()
    (used,) = r.driver.reap()
    assert (used.length, used.data) == (7, b"abcdefg")


def test_a_buffer_may_cross_adjacent_regions(ring: MakeRing) -> None:
    page = 4096
    low = Region(0x1000_0000, 16 * page, 0x7000_0000, 0)
    high = Region(0x1000_0000 + 16 * page, 16 * page, 0x6000_0000, page)
    r = ring(ring.memory([low, high]))
    r.guest.write(high.guest_addr - 3, b"across")
    r.descriptor(high.guest_addr - 3, 6)
    assert [bytes(span) for span in r.pop().spans] == [b"acr", b"oss"]


def test_areas_may_lie_in_different_regions(ring: MakeRing) -> None:
    regions = [Region(0x100_0000 * at, 1 << 16, 0x700_0000 * at, 0) for at in (1, 2, 3)]
    memory = ring.memory(regions)
    r = ring(memory)
    driver = SplitDriver(
        memory,
        SIZE,
        desc=memory.alloc(16 * SIZE, region=2),
        avail=memory.alloc(6 + 2 * SIZE, 2, region=0),
        used=memory.alloc(6 + 8 * SIZE, 4, region=1),
    )
    r.driver = driver
    r.queue = r.serve()
    r.give(b"far")
    assert data_of(r.pop()) == b"far"


# Used buffers and indices


def test_used_buffers_are_not_there_until_they_are_published(ring: MakeRing) -> None:
    r = ring()
    r.give(b"one", b"two")
    r.queue.push(r.pop().head, 0)
    assert not r.driver.has_used()
    r.queue.publish()
    assert len(r.driver.reap()) == 1


def test_used_buffers_are_named_with_their_lengths(ring: MakeRing) -> None:
    r = ring(writable=True)
    heads = [r.driver.add(writable=[100]).head for _ in range(3)]
    r.driver.publish()
    for length in (1, 0, 100):
        r.queue.push(r.pop().head, length)
    r.queue.publish()
    used = r.driver.reap()
    assert [each.chain.head for each in used] == heads
    assert [each.length for each in used] == [1, 0, 100]


@pytest.mark.parametrize("size", [1, 2, 256, 32768])
def test_rings_of_any_size_go_round(ring: MakeRing, size: int) -> None:
    r = ring(ring.memory(4 << 20), size=size, start=65534)
    for at in range(5):
        r.give(b"%d" % at)
        chain = r.pop()
        assert data_of(chain) == b"%d" % at
        r.queue.push(chain.head, 0)
        r.queue.publish()
        assert len(r.driver.reap()) == 1
    assert r.queue.index == 3


def test_the_largest_ring_can_be_full(ring: MakeRing) -> None:
    r = ring(ring.memory(4 << 20), size=32768, start=40000)
    addr = r.guest.alloc(16)
    for _ in range(32768):
        r.driver.add_buffers([Buffer(addr, 1, False)])
    r.driver.publish()
    r.done(32768)
    assert r.queue.pop() is None
    assert len(r.driver.reap()) == 32768


def test_a_ring_resumes_at_its_used_index(ring: MakeRing) -> None:
    r = ring(start=65533)
    r.give(b"a", b"b", b"c", b"d", b"e")
    r.done(2)
    r.pop()  # popped by a server that never completed it
    r.queue = r.serve()
    assert r.queue.index == 65535
    assert [data_of(r.pop()) for _ in range(3)] == [b"c", b"d", b"e"]
    assert r.queue.pop() is None


def test_the_index_counts_what_was_published(ring: MakeRing) -> None:
    r = ring()
    r.give(b"a", b"b")
    r.queue.push(r.pop().head, 0)
    assert r.queue.index == 0
    r.queue.publish()
    assert r.queue.index == 1


def test_a_chain_put_back_is_the_next_one_again(ring: MakeRing) -> None:
    r = ring(start=65535)
    r.give(b"a", b"b")
    r.done()
    first = r.pop()
    r.queue.unpop(first.head)
    assert r.queue.ready()
    again = r.pop()
    assert (again.head, data_of(again)) == (first.head, b"b")


def test_a_chain_put_back_is_not_done(ring: MakeRing) -> None:
    r = ring()
    r.give(b"a")
    chain = r.pop()
    r.queue.unpop(chain.head)
    assert not r.queue.publish()
    assert r.queue.index == 0


@pytest.mark.parametrize("event_idx", [False, True])
def test_a_chain_put_back_is_no_reason_to_sleep(ring: MakeRing, event_idx: bool) -> None:
    r = ring(event_idx=event_idx)
    r.give(b"a")
    chain = r.pop()
    r.queue.unpop(chain.head)
    assert r.queue.want_kicks()


# Notifications


def passes(event: int, old: int, count: int) -> bool:
    """Tell whether an index that makes `count` steps from `old` leaves `event` behind."""
    return event & 0xFFFF in [(old + step) & 0xFFFF for step in range(count)]


@pytest.mark.parametrize("start", [0, 65533, 65535, 32767])
@pytest.mark.parametrize("count", [1, 2, SIZE])
def test_a_call_is_wanted_exactly_when_used_event_is_passed(
    ring: MakeRing, start: int, count: int
) -> None:
    for distance in range(-3, SIZE + 3):
        r = ring(start=start, event_idx=True)
        r.give(*[b"x"] * count)
        r.driver.set_used_event(start + distance)
        assert r.done(count) is passes(start + distance, start, count), distance


def test_used_event_is_looked_at_anew_each_time(ring: MakeRing) -> None:
    r = ring(event_idx=True)
    r.give(b"a", b"b", b"c", b"d")
    calls = []
    for event in (0, 0, 2, 2):
        r.driver.set_used_event(event)
        calls.append(r.done())
    assert calls == [True, False, True, False]


def test_the_no_interrupt_flag_means_nothing_with_event_idx(ring: MakeRing) -> None:
    r = ring(event_idx=True)
    r.give(b"a")
    r.driver.set_avail_flags(NO_INTERRUPT)
    assert r.done()


@pytest.mark.parametrize("flag", [0, NO_INTERRUPT])
def test_without_event_idx_the_flag_decides(ring: MakeRing, flag: int) -> None:
    r = ring()
    r.give(b"a")
    r.driver.set_avail_flags(flag)
    r.driver.set_used_event(1000)
    assert r.done() is (flag == 0)


@MODES
def test_publishing_nothing_calls_nobody(ring: MakeRing, event_idx: bool) -> None:
    assert not ring(event_idx=event_idx).queue.publish()


@MODES
def test_a_guest_kicks_when_kicks_are_wanted(ring: MakeRing, event_idx: bool) -> None:
    r = ring(event_idx=event_idx, start=65535)
    r.queue.refuse_kicks()
    assert not r.queue.want_kicks()
    r.give(b"a")
    assert r.driver.kick_needed()


@MODES
def test_a_guest_does_not_kick_when_kicks_are_refused(ring: MakeRing, event_idx: bool) -> None:
    r = ring(event_idx=event_idx)
    r.queue.want_kicks()
    r.give(b"a")
    assert r.driver.kick_needed()
    r.queue.refuse_kicks()
    for _ in range(3):
        r.done()
        r.driver.reap()
        r.give(b"more")
        assert not r.driver.kick_needed()


@MODES
def test_wanting_kicks_tells_what_came_meanwhile(ring: MakeRing, event_idx: bool) -> None:
    r = ring(event_idx=event_idx)
    assert r.queue.pop() is None
    r.give(b"in between")
    assert r.queue.want_kicks()
    r.pop()
    assert not r.queue.want_kicks()


def test_a_kick_is_wanted_for_the_next_buffer_not_yet_popped(ring: MakeRing) -> None:
    r = ring(event_idx=True, start=65534)
    r.give(b"a", b"b", b"c")
    r.done(3)
    r.queue.want_kicks()
    assert (r.driver.avail_event, r.driver.used_flags) == (1, 0)


def test_flags_are_the_only_wish_without_event_idx(ring: MakeRing) -> None:
    r = ring()
    r.queue.refuse_kicks()
    assert r.driver.used_flags == NO_NOTIFY
    r.queue.want_kicks()
    assert (r.driver.used_flags, r.driver.avail_event) == (0, 0)


def test_flags_stay_clear_with_event_idx(ring: MakeRing) -> None:
    r = ring(event_idx=True)
    r.queue.refuse_kicks()
    assert r.driver.used_flags == 0


def test_a_machine_that_reorders_has_the_same_ring(
    ring: MakeRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(split, "WEAKLY_ORDERED", True)
    r = ring()
    r.give(b"a", b"b")
    assert data_of(r.pop()) == b"a"
    r.queue.push(0, 0)
    assert r.queue.publish()


# Where a ring can be


@pytest.mark.parametrize(("area", "off"), [("desc", 8), ("desc", 1), ("avail", 1), ("used", 2)])
def test_a_misaligned_area_is_refused(ring: MakeRing, area: str, off: int) -> None:
    r = ring()
    driver = r.driver
    addr = {"desc": driver.desc_addr, "avail": driver.avail_addr, "used": driver.used_addr}[area]
    with pytest.raises(RefusedError, match="misaligned"):
        r.serve(**{area: r.guest.user_addr(addr) + off})


AREAS = {"desc": 16 * SIZE, "avail": 4 + 2 * SIZE, "used": 4 + 8 * SIZE}


@pytest.mark.parametrize("area", AREAS)
@pytest.mark.parametrize("past", [16, AREAS["desc"] + 16, -(1 << 21)])
def test_an_area_outside_or_across_a_regions_end_is_refused(
    ring: MakeRing, area: str, past: int
) -> None:
    r = ring()
    ((region, _),) = r.guest.regions()
    end = region.user_addr + region.size
    with pytest.raises(RefusedError, match="no memory region"):
        r.serve(**{area: end - (AREAS[area] // 16 * 16) + past})


def test_an_area_across_two_regions_is_refused(ring: MakeRing) -> None:
    low = Region(0x10000, 1 << 16, 0x7000_0000, 0)
    r = ring(ring.memory([low, Region(0x20000, 1 << 16, 0x7001_0000, 0)]))
    with pytest.raises(RefusedError, match="no memory region"):
        r.serve(desc=0x7001_0000 - 16)


@MODES
@pytest.mark.parametrize("area", ["avail", "used"])
def test_the_event_word_counts_only_when_there_is_one(
    ring: MakeRing, area: str, event_idx: bool
) -> None:
    r = ring(event_idx=event_idx)
    ((region, _),) = r.guest.regions()
    place = {area: region.user_addr + region.size - AREAS[area]}
    if event_idx:
        with pytest.raises(RefusedError):
            r.serve(**place)
    else:
        r.serve(**place)


# A guest that breaks the rules


@pytest.mark.parametrize("start", [0, 100, 65530])
@pytest.mark.parametrize("jump", [SIZE + 1, -1, 1000, 0x7FFF, 0x8000, -SIZE])
def test_an_available_index_that_jumps_breaks_the_queue(
    ring: MakeRing, start: int, jump: int
) -> None:
    r = ring(start=start)
    r.driver.set_avail_idx(start + jump)
    with pytest.raises(GuestError, match="available index"):
        r.queue.pop()


def test_an_available_index_that_goes_back_breaks_the_queue(ring: MakeRing) -> None:
    r = ring()
    r.give(b"a", b"b", b"c")
    r.done(2)
    r.driver.set_avail_idx(1)
    r.pop()  # was published, and that cannot be taken back
    with pytest.raises(GuestError, match="available index"):
        r.queue.pop()


@pytest.mark.parametrize("head", [SIZE, SIZE + 1, 0xFFFF])
def test_a_head_past_the_table_breaks_the_queue(ring: MakeRing, head: int) -> None:
    r = ring()
    r.driver.offer(head)
    r.driver.publish()
    with pytest.raises(GuestError, match=f"names descriptor {head} of {SIZE}"):
        r.queue.pop()


@pytest.mark.parametrize("following", [SIZE, 0xFFFF])
def test_a_next_past_the_table_breaks_the_queue(ring: MakeRing, following: int) -> None:
    r = ring()
    r.descriptor(r.guest.alloc(16), 16, NEXT, following)
    with pytest.raises(GuestError, match=f"names {following}"):
        r.queue.pop()


def test_a_next_past_an_indirect_table_breaks_the_queue(ring: MakeRing) -> None:
    r = ring()
    addr = r.guest.alloc(16)
    r.descriptor(*r.table((addr, 4, NEXT, 2), (addr, 4, 0, 0)), INDIRECT)
    with pytest.raises(GuestError, match="names 2"):
        r.queue.pop()


@pytest.mark.parametrize("length", [1, 2, SIZE])
@pytest.mark.parametrize("size", [0, 1])
def test_a_loop_breaks_the_queue_within_its_size(ring: MakeRing, length: int, size: int) -> None:
    r = ring(most=SIZE)  # one byte a descriptor: what is refused is the loop, not the bytes
    addr = r.guest.alloc(16)
    for at in range(length):
        r.driver.write_desc(at, addr, size, NEXT, (at + 1) % length)
    r.driver.offer(0)
    r.driver.publish()
    with pytest.raises(GuestError, match="loop"):
        r.queue.pop()


def test_a_loop_in_an_indirect_table_breaks_the_queue(ring: MakeRing) -> None:
    r = ring()
    addr = r.guest.alloc(16)
    r.descriptor(*r.table((addr, 0, NEXT, 1), (addr, 0, NEXT, 0)), INDIRECT)
    with pytest.raises(GuestError, match="loop"):
        r.queue.pop()


def test_an_indirect_table_in_an_indirect_table_breaks_the_queue(ring: MakeRing) -> None:
    r = ring()
    inner = r.table((r.guest.alloc(16), 4, 0, 0))
    r.descriptor(*r.table((*inner, INDIRECT, 0)), INDIRECT)
    with pytest.raises(GuestError, match="indirect"):
        r.queue.pop()


def test_an_indirect_descriptor_with_a_next_breaks_the_queue(ring: MakeRing) -> None:
    r = ring()
    r.descriptor(*r.table((r.guest.alloc(16), 4, 0, 0)), INDIRECT | NEXT, 1)
    with pytest.raises(GuestError, match="indirect"):
        r.queue.pop()


def test_an_indirect_descriptor_that_was_not_negotiated_breaks_the_queue(ring: MakeRing) -> None:
    r = ring(indirect=False)
    r.descriptor(*r.table((r.guest.alloc(16), 4, 0, 0)), INDIRECT)
    with pytest.raises(GuestError, match="indirect"):
        r.queue.pop()


@pytest.mark.parametrize("size", [0, 1, 15, 17, 16 * 1025, 0xFFFF_FFF0, 0xFFFF_FFFF])
def test_an_indirect_table_of_a_wrong_size_breaks_the_queue(ring: MakeRing, size: int) -> None:
    r = ring()
    r.descriptor(r.guest.alloc(1 << 15), size, INDIRECT)
    with pytest.raises(GuestError, match=f"indirect table of {size} bytes"):
        r.queue.pop()


@pytest.mark.parametrize("addr", [0, 0xFFFF_FFFF_FFFF_FFF0])
def test_an_indirect_table_outside_memory_breaks_the_queue(ring: MakeRing, addr: int) -> None:
    r = ring()
    r.descriptor(addr, 32, INDIRECT)
    with pytest.raises(GuestError, match="guest address"):
        r.queue.pop()


@pytest.mark.parametrize("flags", [0, INDIRECT])
@pytest.mark.parametrize(
    ("addr", "size"),
    [(0, 1), (-1, 1), (-8, 16), (0x4000_0000 - 1, 2), (0x4010_0000 - 1, 2), (0x4010_0000, 1)],
)
def test_a_buffer_outside_memory_breaks_the_queue(
    ring: MakeRing, addr: int, size: int, flags: int
) -> None:
    r = ring()
    addr &= (1 << 64) - 1
    if flags:
        r.descriptor(*r.table((addr, size, 0, 0)), INDIRECT)
    else:
        r.descriptor(addr, size)
    with pytest.raises(GuestError, match="in no memory region"):
        r.queue.pop()


def test_a_buffer_across_a_hole_breaks_the_queue(ring: MakeRing) -> None:
    low = Region(0x10000, 1 << 16, 0x7000_0000, 0)
    r = ring(ring.memory([low, Region(0x21000, 1 << 16, 0x8000_0000, 0)]))
    r.descriptor(0x1FFFF, 0x1002)
    with pytest.raises(GuestError, match="0x20000"):
        r.queue.pop()


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("sizes", [(101,), (0xFFFF_FFFF,), (50, 51), (100, 1), (34, 34, 34)])
def test_a_chain_of_more_bytes_than_the_cap_breaks_the_queue(
    ring: MakeRing, sizes: tuple[int, ...], indirect: bool
) -> None:
    r = ring(most=100)
    addr = r.guest.alloc(100)
    r.driver.add_buffers([Buffer(addr, size, False) for size in sizes], indirect=indirect)
    r.driver.publish()
    with pytest.raises(GuestError, match="more than 100 bytes"):
        r.queue.pop()


@pytest.mark.parametrize("sizes", [(100,), (50, 50), (99, 1, 0)])
def test_a_chain_of_just_the_cap_is_fine(ring: MakeRing, sizes: tuple[int, ...]) -> None:
    r = ring(most=100)
    addr = r.guest.alloc(100)
    r.driver.add_buffers([Buffer(addr, size, False) for size in sizes])
    r.driver.publish()
    assert r.pop().size == 100


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("ways", ["w", "r w", "w r", "r", "r r w", "w w r"])
@pytest.mark.parametrize("writable", [False, True])
def test_a_descriptor_of_the_wrong_direction_breaks_the_queue(
    ring: MakeRing, ways: str, writable: bool, indirect: bool
) -> None:
    r = ring(writable=writable)
    addr = r.guest.alloc(8)
    r.driver.add_buffers([Buffer(addr, 8, way == "w") for way in ways.split()], indirect=indirect)
    r.driver.publish()
    if set(ways.split()) == {"w" if writable else "r"}:
        assert r.pop().size == 8
        return
    with pytest.raises(GuestError, match="only the other kind"):
        r.queue.pop()


@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize("pieces", [1, 3])
def test_zero_length_buffers_are_completed(ring: MakeRing, writable: bool, pieces: int) -> None:
    r = ring(writable=writable)
    for _ in range(SIZE // pieces):
        r.driver.add_buffers([Buffer(0, 0, writable)] * pieces)
    r.driver.publish()
    r.done(SIZE // pieces)
    assert [used.length for used in r.driver.reap()] == [0] * (SIZE // pieces)
    assert r.queue.pop() is None


def test_an_error_is_found_each_time_it_is_looked_at(ring: MakeRing) -> None:
    r = ring()
    r.descriptor(0, 1)
    for _ in range(2):
        with pytest.raises(GuestError):
            r.queue.pop()


def test_what_was_completed_before_a_mistake_can_be_published(ring: MakeRing) -> None:
    r = ring()
    r.give(b"good")
    r.driver.write_desc(7, 0, 1)
    r.driver.offer(7)
    r.driver.publish()
    r.queue.push(r.pop().head, 0)
    with pytest.raises(GuestError):
        r.queue.pop()
    assert r.queue.publish()
    assert len(r.driver.reap()) == 1


def test_a_descriptor_changed_after_it_was_popped_means_nothing(ring: MakeRing) -> None:
    r = ring()
    r.give(b"first")
    chain = r.pop()
    r.driver.write_desc(chain.head, 0, 0xFFFF_FFFF, WRITE | NEXT, 0xFFFF)
    assert (data_of(chain), chain.size) == (b"first", 5)


def test_an_indirect_table_changed_after_it_was_popped_means_nothing(ring: MakeRing) -> None:
    r = ring()
    addr = r.guest.alloc(8)
    r.guest.write(addr, b"original")
    table, size = r.table((addr, 8, 0, 0))
    r.descriptor(table, size, INDIRECT)
    chain = r.pop()
    r.guest.write(table, bytes(16))
    assert data_of(chain) == b"original"


def test_a_used_index_that_the_guest_rewrites_means_nothing(ring: MakeRing) -> None:
    r = ring()
    r.give(b"a", b"b", b"c")
    r.done()
    r.driver.set_used_idx(1000)
    assert data_of(r.pop()) == b"b"
    r.queue.push(1, 0)
    r.queue.publish()
    assert r.driver.used_idx == r.queue.index == 2


def test_used_elements_that_the_guest_rewrites_mean_nothing(ring: MakeRing) -> None:
    r = ring()
    r.give(b"a", b"b")
    r.guest.write(r.driver.used_addr, b"\xff" * (6 + 8 * SIZE))
    assert r.done(2)
    assert [used.chain.head for used in r.driver.reap()] == [0, 1]
