"""Memory, dirty logs and inflight areas that a frontend describes: any numbers, any descriptor.

What is mapped is as large as it was said to be, all of it is there, and an address means one byte
of it or none; what cannot be is refused.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterable

from source import Source
from vhost_device_console.errors import FrontendError, GuestError, RefusedError
from vhost_device_console.worker.virtqueue.features import RING_PACKED
from vhost_device_console.worker.virtqueue.inflight import Inflight
from vhost_device_console.worker.virtqueue.log import DirtyLog
from vhost_device_console.worker.virtqueue.memory import GuestMemory, Region, map_region

PAGE = 4096
_TOP = 1 << 64

NUMBERS = [
    *(0, 1, 2, 8, 100, PAGE - 1, PAGE, PAGE + 8, 2 * PAGE, 3 * PAGE, 3 * PAGE + 100, 5 * PAGE),
    *(0x10_0000, 0x10_1000, 0x10_2000, 1 << 31, 1 << 32, 1 << 47, 1 << 62, (1 << 63) - 1, 1 << 63),
    *(_TOP - PAGE, _TOP - 1),
]


def _files() -> list[int]:
    """Return descriptors of all kinds, of which some have 3 pages and a bit."""
    memory = os.memfd_create("memory", os.MFD_CLOEXEC)
    os.ftruncate(memory, 3 * PAGE + 100)
    empty = os.memfd_create("empty", os.MFD_CLOEXEC)
    return [
        *(memory, memory, memory, memory, empty),
        os.open(f"/proc/self/fd/{memory}", os.O_RDONLY | os.O_CLOEXEC),
        os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC),
        os.open("/", os.O_RDONLY | os.O_CLOEXEC),
        os.open("/", os.O_PATH | os.O_CLOEXEC),
        os.eventfd(0, os.EFD_CLOEXEC),
        socket.socket(socket.AF_UNIX).detach(),
        1 << 20,
    ]


_FILES = _files()


def _number(source: Source) -> int:
    """Return a number that is often worth a try, or one near such a number."""
    how = source.byte()
    if how >= 0xF0:
        return source.number(8)
    number = NUMBERS[how % len(NUMBERS)]
    return number + how // len(NUMBERS) * 8 & _TOP - 1


def _maps(source: Source) -> None:
    regions: list[Region] = []
    while source and len(regions) < 8:
        fd = source.pick(_FILES)
        guest, size, user, offset = (_number(source) for _ in range(4))
        try:
            region = map_region(fd, guest, size, user, offset)
        except RefusedError:
            continue
        assert len(region.view) == size > 0
        assert region.guest_end - region.guest == region.user_end - region.user == size
        assert not region.view.readonly
        region.view[0] = region.view[-1] = 1  # there it is
        regions.append(region)
    _addresses(regions, [1, 100, PAGE])


def _tables(source: Source) -> None:
    """Tables of regions whose memory is small and made here."""
    regions: list[Region] = []
    for at in range(source.byte() % 9):
        guest, user, size = _number(source), _number(source), 1 + source.byte()
        if max(guest, user) + size <= _TOP:
            view = memoryview(bytearray([at + 1]) * size)
            regions.append(Region(guest, guest + size, user, user + size, view))
    _addresses(regions, [1 + source.byte(), 1 + source.byte()])


def _addresses(regions: list[Region], sizes: list[int]) -> None:
    overlap = any(
        (one.guest < other.guest_end and other.guest < one.guest_end)
        or (one.user < other.user_end and other.user < one.user_end)
        for at, one in enumerate(regions)
        for other in regions[:at]
    )
    try:
        memory = GuestMemory(regions)
    except RefusedError:
        assert overlap or not regions
        return
    assert regions
    assert not overlap
    assert memory.end == max(region.guest_end for region in regions)
    for region in regions:
        for size in sizes:
            for addr in (region.guest, region.guest_end - 1, region.guest - 1):
                _spans(memory, regions, addr & _TOP - 1, size)
            for addr in (region.user, region.user_end - 1, region.user - 1):
                _user(memory, regions, addr & _TOP - 1, size)


def _spans(memory: GuestMemory, regions: list[Region], addr: int, size: int) -> None:
    covered = 0
    at = addr
    while covered < size:
        here = [region for region in regions if region.guest <= at < region.guest_end]
        if not here:
            break
        covered += here[0].guest_end - at
        at = here[0].guest_end
    try:
        spans = memory.spans(addr, size)
    except GuestError:
        assert covered < size
    else:
        assert covered >= size
        assert sum(map(len, spans)) == size


def _user(memory: GuestMemory, regions: list[Region], addr: int, size: int) -> None:
    inside = [each for each in regions if each.user <= addr and addr + size <= each.user_end]
    try:
        view = memory.user(addr, size)
    except RefusedError:
        assert not inside
    else:
        assert inside
        assert len(view) == size
        assert memory.guest_addr(addr) == addr - inside[0].user + inside[0].guest


def _log(source: Source) -> None:
    fd = source.pick(_FILES)
    size, offset, end = _number(source), _number(source), _number(source)
    try:
        log = DirtyLog(fd, size, offset, end)
    except RefusedError:
        return
    assert log.covers(0, end)
    for addr in (0, end - 1, end - 100, _number(source)):
        if log.covers(addr, 100):
            log.mark(addr, 100)
            assert log.marked


def _area(source: Source) -> None:
    fd = source.pick(_FILES)
    features = RING_PACKED * (source.byte() & 1)
    size, offset = _number(source), _number(source)
    queues, entries = source.number(2), source.number(2) >> (source.byte() & 15)
    try:
        area = Inflight(fd, size, offset, queues % 257, entries, features)
    except RefusedError:
        return
    for index in (0, queues - 1, queues, 255):
        state = area.queue(index)
        assert (state is None) == (index >= queues % 257)


_KINDS = [_maps, _tables, _log, _area]


def run(data: bytes) -> None:
    """The first byte chooses what is described."""
    source = Source(data)
    try:
        source.pick(_KINDS)(source)
    except RefusedError:
        raise
    except FrontendError as error:
        # The kernel could not set a bit: the file has been cut, which nobody does here.
        raise AssertionError(os.strerror(errno.EFAULT)) from error


def seeds() -> Iterable[bytes]:
    page, addr, user = (NUMBERS.index(number) for number in (PAGE, 0x10_0000, 1 << 32))
    for file in range(12):
        yield bytes([0, file, addr, page, user, 0, file, addr + 1, page, 0, page])
        yield bytes([2, file, page, 0, addr, addr])
        yield bytes([3, file, 0, page, 0, 2, 0, 8, 0, 0])
    yield bytes([1, 3, addr, user, 255, addr + 1, 3, 255, 0, 2, 100, 7, 200])
    yield bytes([1, 2, addr, user, 255, 0xF1]) + (0x10_0100).to_bytes(8, "little") + bytes([9, 99])
