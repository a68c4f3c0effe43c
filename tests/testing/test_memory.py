"""Guest memory: addresses, allocation, access."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from vhost_device_console.testing import GuestMemory
from vhost_device_console.worker.vhost_user.message import Region

PAGE = 4096

# Two regions that touch in the guest but nowhere else, and one apart.
REGIONS = [
    Region(0x10000, 2 * PAGE, 0x7F0000000000, PAGE),
    Region(0x12000, PAGE, 0x7E0000000000, 0),
    Region(0x20000, PAGE, 0x7D0000000000, 3 * PAGE),
]


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory(REGIONS) as memory:
        yield memory


def test_regions_are_as_asked(memory: GuestMemory) -> None:
    """regions() gives back what the constructor was told."""
    assert [region for region, _ in memory.regions()] == REGIONS


def test_files_reach_to_their_regions_end(memory: GuestMemory) -> None:
    """Each region's file is as long as its offset and size say."""
    sizes = [os.fstat(fd).st_size for _, fd in memory.regions()]
    assert sizes == [3 * PAGE, PAGE, 4 * PAGE]


def test_write_lands_at_the_region_offset(memory: GuestMemory) -> None:
    """A guest address is that many bytes past the region's offset in its file."""
    memory.write(0x10123, b"hello")
    _, fd = memory.regions()[0]
    assert os.pread(fd, 5, PAGE + 0x123) == b"hello"


def test_read_sees_the_file(memory: GuestMemory) -> None:
    """What another process writes to the file is read."""
    _, fd = memory.regions()[2]
    os.pwrite(fd, b"there", 3 * PAGE + 7)
    assert memory.read(0x20007, 5) == b"there"


def test_access_across_adjacent_regions(memory: GuestMemory) -> None:
    """Bytes may cross from one region into the next."""
    memory.write(0x11FFC, b"12345678")
    assert memory.read(0x11FFC, 8) == b"12345678"
    assert os.pread(memory.regions()[1][1], 4, 0) == b"5678"


@pytest.mark.parametrize("addr", [0, 0xFFFF, 0x13000, 0x21000])
def test_access_outside(memory: GuestMemory, addr: int) -> None:
    """An address in no region is an IndexError."""
    with pytest.raises(IndexError, match=f"{addr:#x} is no guest memory"):
        memory.read(addr, 1)


def test_access_across_a_hole(memory: GuestMemory) -> None:
    """Bytes cannot cross a hole."""
    with pytest.raises(IndexError, match="0x13000 is no guest memory"):
        memory.write(0x12FFF, b"12")


def test_user_addr(memory: GuestMemory) -> None:
    """A user address is the region's user base plus the offset in the region."""
    assert memory.user_addr(0x12010) == 0x7E0000000010


def test_view_shares_memory(memory: GuestMemory) -> None:
    """A view's stores are in the memory."""
    memory.view(0x20000, 4, "H")[1] = 0x4142
    assert memory.read(0x20000, 4) == b"\0\0\x42\x41"


def test_view_across_regions(memory: GuestMemory) -> None:
    """A view does not cross regions."""
    with pytest.raises(IndexError, match="leave their region"):
        memory.view(0x11FFE, 4)


def test_alloc_is_aligned_to_the_guest_address() -> None:
    """Alignment is that of the guest's address."""
    with GuestMemory([Region(0x11000, 16 * PAGE, 0, 0)]) as memory:
        assert memory.alloc(1, 0x10000) == 0x20000


def test_alloc_never_overlaps(memory: GuestMemory) -> None:
    """No byte is given out twice."""
    spans = [(memory.alloc(size, align), size) for size in (1, 7, 100) for align in (1, 16, 64)]
    taken = [byte for start, size in spans for byte in range(start, start + size)]
    assert len(taken) == len(set(taken))


def test_alloc_stays_in_one_region(memory: GuestMemory) -> None:
    """An allocation does not cross regions."""
    memory.alloc(PAGE + 1, 1)
    assert memory.alloc(PAGE, 1) == 0x12000


def test_alloc_in_chosen_region(memory: GuestMemory) -> None:
    """A region can be chosen."""
    assert memory.alloc(16, region=2) == 0x20000


def test_alloc_without_room(memory: GuestMemory) -> None:
    """No room is a MemoryError that says how much was asked for."""
    with pytest.raises(MemoryError, match="no 8193 free bytes"):
        memory.alloc(2 * PAGE + 1)


def test_free_joins_holes(memory: GuestMemory) -> None:
    """What was freed, in any order, can be allocated as one piece."""
    parts = [memory.alloc(PAGE, 1, region=0) for _ in range(2)]
    for part in parts:
        memory.free(part)
    assert memory.alloc(2 * PAGE, 1) == 0x10000


def test_free_between_others(memory: GuestMemory) -> None:
    """A freed piece between two that are taken is found again."""
    parts = [memory.alloc(32) for _ in range(3)]
    memory.free(parts[1])
    assert memory.alloc(32) == parts[1]


def test_free_twice(memory: GuestMemory) -> None:
    """Freeing what is not allocated is a ValueError."""
    part = memory.alloc(16)
    memory.free(part)
    with pytest.raises(ValueError, match="not allocated"):
        memory.free(part)


def test_overlapping_regions() -> None:
    """Regions must not overlap."""
    with pytest.raises(ValueError, match="overlap"):
        GuestMemory([Region(0, 2 * PAGE, 0, 0), Region(PAGE, PAGE, 0, 0)])


@pytest.mark.parametrize(
    "region", [Region(0, 100, 0, 0), Region(0, 0, 0, 0), Region(0, PAGE, 0, 8)]
)
def test_regions_of_odd_size(region: Region) -> None:
    """Regions are whole pages."""
    with pytest.raises(ValueError, match="whole pages"):
        GuestMemory([region])


def test_close_gives_up_every_descriptor() -> None:
    """After close no descriptor is left, though a view was taken."""
    before = set(os.listdir("/proc/self/fd"))
    memory = GuestMemory(REGIONS)
    memory.view(0x10000, 8)
    memory.close()
    assert set(os.listdir("/proc/self/fd")) == before


def test_view_after_close(memory: GuestMemory) -> None:
    """A view of closed memory raises instead of touching it."""
    view = memory.view(0x10000, 8)
    memory.close()
    with pytest.raises(ValueError, match="released"):
        view[0]


def test_like_uml() -> None:
    """User Mode Linux' guest, user and file addresses are one number, and not zero."""
    with GuestMemory.like_uml(PAGE) as memory:
        ((region, _),) = memory.regions()
        assert region.guest_addr == region.user_addr == region.mmap_offset > 0


def test_like_qemu() -> None:
    """QEMU's memory begins at guest address 0 and at the file's start."""
    with GuestMemory.like_qemu(PAGE) as memory:
        ((region, _),) = memory.regions()
        assert (region.guest_addr, region.mmap_offset) == (0, 0)
