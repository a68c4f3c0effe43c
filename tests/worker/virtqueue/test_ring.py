"""Where a ring is made: its format and its size follow the features."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from vhost_device_console.errors import RefusedError
from vhost_device_console.testing import Feature, GuestMemory, SplitDriver
from vhost_device_console.worker.virtqueue import memory as mapped
from vhost_device_console.worker.virtqueue.features import EVENT_IDX, RING_PACKED
from vhost_device_console.worker.virtqueue.ring import RING_FEATURES, Ring, place, valid_size
from vhost_device_console.worker.virtqueue.split import SplitQueue


@pytest.fixture
def guest() -> Iterator[GuestMemory]:
    with GuestMemory(1 << 20) as memory:
        yield memory


def ring_of(guest: GuestMemory, driver: SplitDriver, size: int, features: int) -> Ring:
    user = guest.user_addr
    return place(
        mapped.GuestMemory([mapped.map_region(fd, *region) for region, fd in guest.regions()]),
        size,
        user(driver.desc_addr),
        user(driver.avail_addr),
        user(driver.used_addr),
        features=features,
        base=0,
        writable=False,
        most_bytes=1 << 16,
    )


@pytest.mark.parametrize("size", [1, 2, 64, 1 << 15])
def test_split_rings_have_powers_of_two(size: int) -> None:
    assert valid_size(size, 0)


@pytest.mark.parametrize("size", [0, 3, 63, 65, (1 << 15) + 1, 1 << 16, 0xFFFF_FFFF])
def test_split_rings_have_nothing_but_powers_of_two(size: int) -> None:
    assert not valid_size(size, EVENT_IDX)


@pytest.mark.parametrize("size", [1, 2, 3, 100, 32767, 1 << 15])
def test_packed_rings_have_any_size(size: int) -> None:
    assert valid_size(size, RING_PACKED)


@pytest.mark.parametrize("size", [0, (1 << 15) + 1, 1 << 16, 0xFFFF_FFFF])
def test_packed_rings_end_at_32768(size: int) -> None:
    assert not valid_size(size, RING_PACKED)


def test_without_the_packed_bit_a_ring_is_split(guest: GuestMemory) -> None:
    assert isinstance(ring_of(guest, SplitDriver(guest, 8), 8, EVENT_IDX), SplitQueue)


@pytest.mark.parametrize("size", [0, 3, 7, 1 << 16])
def test_a_size_of_no_ring_is_refused(guest: GuestMemory, size: int) -> None:
    with pytest.raises(RefusedError, match=f"cannot have {size} entries: a power of two"):
        ring_of(guest, SplitDriver(guest, 8), size, 0)


def test_what_is_offered_is_what_the_mock_driver_knows() -> None:
    assert RING_FEATURES & ~sum(Feature) == 0
