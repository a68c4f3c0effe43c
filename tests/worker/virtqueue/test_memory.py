"""Guest memory: files of the frontend, mapped, and slices of them."""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
from vhost_device_console.errors import GuestError, RefusedError
from vhost_device_console.worker.virtqueue.memory import GuestMemory, Region, map_region

PAGE = 4096
TOP = 1 << 64

Memfd = Callable[..., int]


@pytest.fixture
def memfd() -> Iterator[Memfd]:
    """Give a function from a size to a memory file of counting u16 words."""
    made: list[int] = []

    def make(size: int = 4 * PAGE, flags: int = os.MFD_ALLOW_SEALING) -> int:
        fd = os.memfd_create("test-guest-memory", flags | os.MFD_CLOEXEC)
        made.append(fd)
        words = b"".join((at & 0xFFFF).to_bytes(2, "little") for at in range(size // 2))
        os.pwrite(fd, words, 0)
        return fd

    yield make
    for fd in made:
        os.close(fd)


def guest(memory: GuestMemory, addr: int, size: int) -> memoryview:
    """Return `size` bytes at a guest address, which lie in one region."""
    region = memory.region(addr)
    return region.view[addr - region.guest : addr - region.guest + size]


def mappings() -> int:
    """Count this process's mappings of the files that `memfd` makes."""
    with open("/proc/self/maps") as maps:
        return sum("memfd:test-guest-memory" in line for line in maps)


def seals(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_GET_SEALS)


# Mapping a file


def test_a_region_and_its_file_are_the_same_bytes(memfd: Memfd) -> None:
    fd = memfd()
    view = map_region(fd, 0, 4 * PAGE, 0, 0).view
    view[10:14] = b"ours"
    assert os.pread(fd, 4, 10) == b"ours"
    os.pwrite(fd, b"theirs", 20)
    assert bytes(view[20:26]) == b"theirs"


def test_a_region_says_where_it_lies(memfd: Memfd) -> None:
    region = map_region(memfd(), 0x1000, 2 * PAGE, 0x9000, PAGE)
    assert region[:4] == (0x1000, 0x3000, 0x9000, 0xB000)
    assert len(region.view) == 2 * PAGE


@pytest.mark.parametrize("offset", [0, 2, 4094, PAGE, PAGE + 2, 5000, 2 * PAGE + 100])
def test_an_offset_may_lie_anywhere_in_a_page(memfd: Memfd, offset: int) -> None:
    fd = memfd()
    view = map_region(fd, 0, PAGE, 0, offset).view
    assert view == os.pread(fd, PAGE, offset)


def test_a_size_need_not_be_whole_pages(memfd: Memfd) -> None:
    fd = memfd()
    assert map_region(fd, 0, 1234, 0, 567).view == os.pread(fd, 1234, 567)


HUGE = 2 << 20


@pytest.mark.parametrize(
    ("offset", "size"),
    [
        (0, HUGE),
        (PAGE, 2 * PAGE),
        (HUGE + PAGE, HUGE - 2 * PAGE),
        (HUGE, HUGE + PAGE),
        (PAGE, HUGE),
    ],
)
def test_a_file_of_huge_pages_is_mapped_in_whole_ones(
    memfd: Memfd, monkeypatch: pytest.MonkeyPatch, offset: int, size: int
) -> None:
    """Anywhere else the kernel refuses to map such a file, or to unmap it (mmap(2), munmap(2))."""
    fd = memfd(3 * HUGE)
    real_mmap, real_fstat = mmap.mmap, os.fstat
    mapped: list[tuple[int, int]] = []

    def fstat(fd: int) -> SimpleNamespace:
        return SimpleNamespace(st_blksize=HUGE, st_size=real_fstat(fd).st_size)

    def record(fd: int, length: int, *, offset: int) -> mmap.mmap:
        mapped.append((length, offset))
        return real_mmap(fd, length, offset=offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", fstat)
        patch.setattr(mmap, "mmap", record)
        view = map_region(fd, 0, size, 0, offset).view
    assert [(length % HUGE, start % HUGE) for length, start in mapped] == [(0, 0)]
    assert bytes(view) == os.pread(fd, size, offset)


def test_the_last_blocks_of_a_file_may_be_cut_short(memfd: Memfd) -> None:
    fd = memfd(3 * PAGE + 100)
    view = map_region(fd, 0, PAGE + 100, 0, 2 * PAGE).view
    assert bytes(view) == os.pread(fd, PAGE + 100, 2 * PAGE)


def test_regions_may_be_of_one_file(memfd: Memfd) -> None:
    """QEMU's memory below and above the hole for devices is one file, sent twice."""
    fd = memfd()
    memory = GuestMemory(
        [map_region(fd, 0, 2 * PAGE, 0, 0), map_region(fd, TOP // 2, 2 * PAGE, TOP // 4, 2 * PAGE)]
    )
    guest(memory, PAGE, 4)[:] = b"down"
    guest(memory, TOP // 2 + PAGE, 2)[:] = b"up"
    assert (os.pread(fd, 4, PAGE), os.pread(fd, 2, 3 * PAGE)) == (b"down", b"up")


def test_the_descriptor_stays_the_callers(memfd: Memfd) -> None:
    fd = os.dup(memfd())
    view = map_region(fd, 0, PAGE, 0, 0).view
    os.close(fd)
    assert bytes(view[2:4]) == b"\1\0"


def test_a_region_is_unmapped_with_its_last_slice(memfd: Memfd) -> None:
    memory = GuestMemory([map_region(memfd(), 0, 4 * PAGE, 0, 0)])
    slices = [guest(memory, 0, 16), memory.user(PAGE, 16), *memory.spans(2 * PAGE, 16)]
    del memory
    while slices:
        assert mappings() == 1
        slices.pop()
    assert mappings() == 0


def test_no_bytes_are_refused(memfd: Memfd) -> None:
    with pytest.raises(RefusedError, match="no bytes"):
        map_region(memfd(), 0, 0, 0, 0)


@pytest.mark.parametrize("which", ["guest", "user", "offset"])
def test_an_address_past_the_end_of_addresses_is_refused(memfd: Memfd, which: str) -> None:
    place = {"guest": 0, "user": 0, "offset": 0, which: TOP - PAGE + 1}
    with pytest.raises(RefusedError, match="address space"):
        map_region(memfd(), place["guest"], PAGE, place["user"], place["offset"])


def test_a_region_may_end_at_the_last_address(memfd: Memfd) -> None:
    memory = GuestMemory([map_region(memfd(), TOP - PAGE, PAGE, TOP - PAGE, 0)])
    assert bytes(guest(memory, TOP - 2, 2)) == b"\xff\x07"
    assert bytes(memory.user(TOP - 2, 2)) == b"\xff\x07"


@pytest.mark.parametrize(
    ("size", "offset"),
    [
        (4 * PAGE + 1, 0),
        (PAGE, 3 * PAGE + 1),
        (1, 4 * PAGE),
        (PAGE, 1 << 40),
        (PAGE, 1 << 63),
        (1 << 62, 0),
        (1 << 63, 0),
        ((1 << 64) - 1, 0),
    ],
)
def test_more_than_the_file_has_is_refused(memfd: Memfd, size: int, offset: int) -> None:
    with pytest.raises(RefusedError, match="cannot be mapped"):
        map_region(memfd(), 0, size, 0, offset)


@pytest.mark.parametrize("mode", [os.O_RDONLY, os.O_WRONLY])
def test_a_file_that_cannot_be_read_and_written_is_refused(memfd: Memfd, mode: int) -> None:
    fd = os.open(f"/proc/self/fd/{memfd()}", mode)
    try:
        with pytest.raises(RefusedError, match="cannot be mapped"):
            map_region(fd, 0, PAGE, 0, 0)
    finally:
        os.close(fd)


def test_a_socket_is_refused() -> None:
    one, other = socket.socketpair()
    with one, other, pytest.raises(RefusedError, match="cannot be mapped"):
        map_region(one.fileno(), 0, PAGE, 0, 0)


def test_a_folder_is_refused() -> None:
    fd = os.open("/", os.O_RDONLY)
    try:
        with pytest.raises(RefusedError, match="cannot be mapped"):
            map_region(fd, 0, PAGE, 0, 0)
    finally:
        os.close(fd)


def test_a_refused_file_is_not_mapped(memfd: Memfd) -> None:
    with pytest.raises(RefusedError):
        map_region(memfd(), 0, 5 * PAGE, 0, 0)
    assert mappings() == 0


# Seals


def test_a_file_is_sealed_against_shrinking(memfd: Memfd) -> None:
    fd = memfd()
    map_region(fd, 0, PAGE, 0, 0)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, PAGE)


def test_a_file_can_still_grow(memfd: Memfd) -> None:
    fd = memfd()
    map_region(fd, 0, PAGE, 0, 0)
    os.ftruncate(fd, 8 * PAGE)
    assert seals(fd) == fcntl.F_SEAL_SHRINK


def test_a_file_that_takes_no_seals_is_mapped_without(memfd: Memfd) -> None:
    fd = memfd(flags=0)
    assert len(map_region(fd, 0, PAGE, 0, 0).view) == PAGE
    assert seals(fd) == fcntl.F_SEAL_SEAL


def test_a_file_of_a_filesystem_is_mapped_without_a_seal(folder: os.PathLike[str]) -> None:
    path = os.path.join(folder, "memory")
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        os.ftruncate(fd, PAGE)
        map_region(fd, 0, PAGE, 0, 0).view[:5] = b"there"
        assert os.pread(fd, 5, 0) == b"there"
    finally:
        os.close(fd)


# A table of regions


def region(guest: int, size: int, user: int) -> Region:
    return Region(guest, guest + size, user, user + size, memoryview(bytearray(size)))


def test_a_table_without_regions_is_refused() -> None:
    with pytest.raises(RefusedError, match="no regions"):
        GuestMemory([])


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("guest", "user"),
    [(0x1FFF, 0x9000), (0x1000, 0x9000), (0x0FFF, 0x9000), (0x5000, 0x8FFF), (0x5000, 0x7001)],
)
def test_overlapping_regions_are_refused(guest: int, user: int, order: int) -> None:
    table = [region(0x1000, 0x1000, 0x8000), region(guest, 0x1000, user)]
    with pytest.raises(RefusedError, match="overlap"):
        GuestMemory(table[::order])


def test_a_region_inside_another_is_refused() -> None:
    with pytest.raises(RefusedError, match="overlap"):
        GuestMemory([region(0, 0x3000, 0x8000), region(0x1000, 0x1000, 0x10000)])


def test_regions_may_touch_in_any_order() -> None:
    low, high = region(0, 0x1000, 0x9000), region(0x1000, 0x1000, 0x8000)
    low.view[0], high.view[0] = 1, 2
    for table in ([low, high], [high, low]):
        memory = GuestMemory(table)
        assert (guest(memory, 0, 1)[0], guest(memory, 0x1000, 1)[0]) == (1, 2)
        assert (memory.user(0x9000, 1)[0], memory.user(0x8000, 1)[0]) == (1, 2)


@pytest.fixture
def memory() -> GuestMemory:
    """Give regions [0x1000, 0x3000), [0x3000, 0x4000), [0x6000, 0x7000), bytes that tell."""
    table = [region(0x6000, 0x1000, 0xA000), region(0x1000, 0x2000, 0x5000)]
    table.append(region(0x3000, 0x1000, 0x7000))
    for each in table:
        for at in range(0, len(each.view), 4):
            each.view[at : at + 4] = (each.guest + at).to_bytes(4, "little")
    return GuestMemory(table)


@pytest.mark.parametrize("addr", [0x1000, 0x2FFC, 0x3000, 0x3FFC, 0x6000, 0x6FFC])
def test_a_guest_address_names_its_bytes(memory: GuestMemory, addr: int) -> None:
    for _ in range(2):  # from whichever region was looked at before
        assert guest(memory, addr, 4) == addr.to_bytes(4, "little")
        assert bytes(guest(memory, 0x6000, 4)) == b"\x00\x60\x00\x00"


@pytest.mark.parametrize(("user", "guest"), [(0x5000, 0x1000), (0x7000, 0x3000), (0xA010, 0x6010)])
def test_a_frontend_address_names_its_bytes(memory: GuestMemory, user: int, guest: int) -> None:
    assert memory.user(user, 4) == guest.to_bytes(4, "little")


OUTSIDE = [(0xFFF, 4), (0xFFE, 1), (0x4000, 1), (0x5FFF, 1), (0x5FFF, 2), (0x7000, 1), (0x6FFF, 2)]


@pytest.mark.parametrize("addr", [0, 0xFFF, 0x4000, 0x5FFF, 0x7000, TOP])
def test_a_guest_address_outside_all_regions_is_an_error(memory: GuestMemory, addr: int) -> None:
    with pytest.raises(GuestError):
        memory.region(addr)


@pytest.mark.parametrize(
    ("addr", "size"), [(0x4FFF, 1), (0x4FFF, 4), (0x8000, 1), (0x7FFF, 2), (0x6FFF, 2), (TOP, 1)]
)
def test_frontend_bytes_outside_one_region_are_refused(
    memory: GuestMemory, addr: int, size: int
) -> None:
    with pytest.raises(RefusedError):
        memory.user(addr, size)


def test_bytes_in_one_region_are_one_span(memory: GuestMemory) -> None:
    assert len(memory.spans(0x1000, 0x2000)) == 1


def test_bytes_across_adjacent_regions_are_two_spans(memory: GuestMemory) -> None:
    assert memory.spans(0x2FFC, 8) == [b"\xfc\x2f\0\0", b"\x00\x30\0\0"]


def test_spans_are_the_memory_itself(memory: GuestMemory) -> None:
    for span in memory.spans(0x2FFE, 4):
        span[:] = b"xy"
    assert bytes(guest(memory, 0x2FFE, 2)) == bytes(guest(memory, 0x3000, 2)) == b"xy"


def test_no_bytes_are_no_spans_wherever_they_are(memory: GuestMemory) -> None:
    assert memory.spans(0xDEAD_0000, 0) == []


@pytest.mark.parametrize(("addr", "size"), [*OUTSIDE, (0x3FFF, 0x2002), (0x1000, 0xFFFF_FFFF)])
def test_spans_into_a_hole_are_an_error(memory: GuestMemory, addr: int, size: int) -> None:
    with pytest.raises(GuestError):
        memory.spans(addr, size)


def test_spans_do_not_wrap_around_the_address_space() -> None:
    memory = GuestMemory([region(0, 0x1000, 0), region(TOP - 0x1000, 0x1000, 0x1000)])
    with pytest.raises(GuestError):
        memory.spans(TOP - 1, 2)


def test_memory_ends_after_its_last_region(memory: GuestMemory) -> None:
    assert memory.end == 0x7000


@pytest.mark.parametrize(("user", "guest"), [(0x5000, 0x1000), (0x7000, 0x3000), (0xA010, 0x6010)])
def test_a_frontend_address_has_a_guest_address(memory: GuestMemory, user: int, guest: int) -> None:
    assert memory.guest_addr(user) == guest


@pytest.mark.parametrize("user", [0x4FFF, 0x8000, 0, TOP])
def test_a_frontend_address_of_nothing_has_no_guest_address(memory: GuestMemory, user: int) -> None:
    with pytest.raises(RefusedError):
        memory.guest_addr(user)


def test_each_of_many_regions_is_found(memfd: Memfd) -> None:
    fd = memfd(PAGE)
    memory = GuestMemory(
        [map_region(fd, at * 2 * PAGE, PAGE, at * 2 * PAGE, 0) for at in range(1, 510)]
    )
    for at in range(1, 510):
        assert len(guest(memory, at * 2 * PAGE + 1, PAGE - 1)) == PAGE - 1
        assert len(memory.spans(at * 2 * PAGE + 1, PAGE - 1)) == 1
        with pytest.raises(GuestError):
            memory.spans(at * 2 * PAGE - 1, 1)
