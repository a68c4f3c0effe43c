"""Where a ring is made, and what holds for rings of either format."""

from __future__ import annotations

import json
import os
import random
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rings import MakeSides, data_of
from vhost_device_console.errors import RefusedError
from vhost_device_console.testing import Buffer, Feature, GuestMemory, make_driver
from vhost_device_console.worker.vhost_user.message import Region
from vhost_device_console.worker.virtqueue.features import EVENT_IDX, IN_ORDER, RING_PACKED
from vhost_device_console.worker.virtqueue.packed import PackedQueue
from vhost_device_console.worker.virtqueue.ring import RING_FEATURES, check_size
from vhost_device_console.worker.virtqueue.split import SplitQueue

FORMATS = pytest.mark.parametrize("format_", [0, RING_PACKED], ids=["split", "packed"])
FRESH = {0: 0, RING_PACKED: 0x8000_8000}


# Where a ring is made


@pytest.mark.parametrize("size", [1, 2, 64, 1 << 15])
def test_split_rings_have_powers_of_two(size: int) -> None:
    check_size(size, 0)


@pytest.mark.parametrize("size", [0, 3, 63, 65, (1 << 15) + 1, 1 << 16, 0xFFFF_FFFF])
def test_split_rings_have_nothing_but_powers_of_two(size: int) -> None:
    with pytest.raises(RefusedError):
        check_size(size, EVENT_IDX)


@pytest.mark.parametrize("size", [1, 2, 3, 100, 32767, 1 << 15])
def test_packed_rings_have_any_size(size: int) -> None:
    check_size(size, RING_PACKED)


@pytest.mark.parametrize("size", [0, (1 << 15) + 1, 1 << 16, 0xFFFF_FFFF])
def test_packed_rings_end_at_32768(size: int) -> None:
    with pytest.raises(RefusedError):
        check_size(size, RING_PACKED)


def test_the_packed_bit_chooses_the_format(sides: MakeSides) -> None:
    assert isinstance(sides(EVENT_IDX).queue, SplitQueue)
    assert isinstance(sides(RING_PACKED).queue, PackedQueue)


@pytest.mark.parametrize("size", [0, 3, 7, 1 << 16])
def test_a_size_of_no_split_ring_is_refused(sides: MakeSides, size: int) -> None:
    with pytest.raises(RefusedError, match=f"cannot have {size} entries: a power of two"):
        sides(0).serve(0, size=size)


@pytest.mark.parametrize("size", [0, (1 << 15) + 1])
def test_a_size_of_no_packed_ring_is_refused(sides: MakeSides, size: int) -> None:
    with pytest.raises(RefusedError, match=f"cannot have {size} entries: any number"):
        sides(RING_PACKED).serve(0, size=size)


def test_what_is_offered_is_what_the_mock_driver_knows() -> None:
    assert RING_FEATURES & ~sum(Feature) == 0


# Both formats


@FORMATS
def test_buffers_are_used_in_order(sides: MakeSides, format_: int) -> None:
    """With IN_ORDER, a driver goes by the order alone."""
    r = sides(format_ | IN_ORDER)
    rng = random.Random(7)
    for _ in range(50):
        chains = []
        while r.driver.free >= 3 and rng.random() < 0.8:
            chains.append(r.driver.add([b"x"] * rng.randrange(1, 4), indirect=rng.random() < 0.3))
        r.driver.publish()
        r.done(len(chains))
        assert [used.chain for used in r.driver.reap()] == chains
    assert r.driver.free == 8


@FORMATS
@pytest.mark.parametrize("size", [2, 8, 64])
def test_a_ring_that_was_reset_starts_anew(sides: MakeSides, format_: int, size: int) -> None:
    """RING_RESET: the ring is stopped, and started with indices at 0 and any other size."""
    r = sides(format_, size=16)
    for _ in range(37):
        r.give(b"before")
        r.done()
        r.driver.reap()
    r.give(b"lost", b"with the reset")
    r.driver.reset()
    r.driver = make_driver(r.guest, size, r.features)
    r.queue = r.serve(FRESH[format_])
    assert r.queue.pop() is None
    for turn in range(3 * size):
        r.give(b"%d" % turn)
        chain = r.pop()
        assert data_of(chain) == b"%d" % turn
        r.queue.push(chain.head, 0)
        r.queue.publish()
        assert len(r.driver.reap()) == 1


@FORMATS
def test_a_ring_goes_on_in_other_mappings(sides: MakeSides, format_: int) -> None:
    """A new memory table means the ring is placed again, at its index."""
    r = sides(format_, size=4)
    for turn in range(9):
        r.give(b"%d" % turn, b"kept")
        r.done()
        r.queue = r.serve(r.queue.index)
        kept = r.pop()
        assert data_of(kept) == b"kept"
        r.queue.unpop(kept.head)
        r.done()
        assert len(r.driver.reap()) == 2


TOUCHING = [Region(0x10000, 1 << 16, 0x7000_0000, 0), Region(0x20000, 1 << 16, 0x8000_0000, 0)]


@FORMATS
@pytest.mark.parametrize("cut", [1, 8, 16, 31])
def test_an_indirect_table_may_cross_adjacent_regions(
    sides: MakeSides, format_: int, cut: int
) -> None:
    r = sides(format_, memory=sides.memory(TOUCHING))
    addr = r.guest.alloc(16)
    r.guest.write(addr, b"abcdef")
    chain = r.driver.add_buffers(
        [Buffer(addr + 2, 4, False), Buffer(addr, 2, False)], indirect=True
    )
    r.guest.write(0x20000 - cut, r.guest.read(chain.owned[0], 32))
    r.guest.view(r.driver.desc_addr, 16, "Q")[0] = 0x20000 - cut
    r.driver.publish()
    assert data_of(r.pop()) == b"cdefab"


@contextmanager
def served(guest: GuestMemory, ring: dict[str, int], call: int) -> Iterator[int]:
    """Serve a ring from another process; yield the eventfd that kicks it."""
    ((region, fd),) = guest.regions()
    kick = os.eventfd(0)
    what = {"kick": kick, "call": call, "region": [*region], "fd": fd, "ring": ring}
    command = [sys.executable, str(Path(__file__).with_name("server.py")), json.dumps(what)]
    with subprocess.Popen(command, pass_fds=(kick, call, fd)) as process:
        try:
            yield kick
            assert process.wait(10) == 0
        finally:
            process.kill()
            os.close(kick)


@FORMATS
@pytest.mark.parametrize("event_idx", [0, EVENT_IDX], ids=["flags", "event index"])
def test_no_wake_up_is_lost_between_two_processes(
    sides: MakeSides, format_: int, event_idx: int
) -> None:
    """Both sleep whenever they may; each missed kick or call would stop them for good."""
    guest = sides.memory(1 << 20)
    features = format_ | event_idx
    driver = make_driver(guest, 8, features)
    user = guest.user_addr
    ring = {
        "size": 8,
        "desc": user(driver.desc_addr),
        "avail": user(driver.avail_addr),
        "used": user(driver.used_addr),
        "features": features,
        "base": driver.base,
    }
    rng = random.Random(3)
    buffer = Buffer(guest.alloc(2), 2, False)
    call = os.eventfd(0)
    try:
        with served(guest, ring, call) as kick:

            def notify() -> None:
                driver.publish()
                if driver.kick_needed():
                    os.write(kick, (1).to_bytes(8, "little"))

            left = 8000
            while left or driver.in_flight:
                for _ in range(min(rng.randrange(1, 5), driver.free, left)):
                    driver.add_buffers([buffer])
                    left -= 1
                notify()
                if not driver.reap() and not driver.enable_calls():
                    ready, _, _ = select.select([call], [], [], 20)
                    assert ready, f"no call came, {left} left, {driver.in_flight} in flight"
                    os.read(call, 8)
            driver.add_buffers([buffer._replace(size=1)])
            notify()
    finally:
        os.close(call)
