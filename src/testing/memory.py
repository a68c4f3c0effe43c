"""Guest memory: regions over memory files, an allocator, and access by guest-physical address."""

from __future__ import annotations

import mmap
import os
from bisect import insort
from collections.abc import Sequence
from itertools import pairwise
from types import TracebackType
from typing import Self

from ..worker.vhost_user.message import Region

_DEFAULT_SIZE = 16 << 20
_PAGE = mmap.ALLOCATIONGRANULARITY

#: Where the default memory lies: three numbers that no translation can mix up.
_GUEST_BASE = 0x4000_0000
_USER_BASE = 0x7F00_0000_0000


class _Mapping:
    """One region's file, mapped, and its unused holes as sorted (start, size) offsets."""

    def __init__(self, region: Region) -> None:
        self.region = region
        self.fd = os.memfd_create("guest-memory", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, region.mmap_offset + region.size)
            self.map = mmap.mmap(self.fd, region.size, offset=region.mmap_offset)
        except BaseException:
            os.close(self.fd)
            raise
        self.holes: list[tuple[int, int]] = [(0, region.size)]

    def alloc(self, size: int, align: int) -> int | None:
        for index, (start, room) in enumerate(self.holes):
            # The guest address is what must be aligned, not the offset in the region.
            at = -(-(self.region.guest_addr + start) // align) * align - self.region.guest_addr
            if at + size <= start + room:
                rest = [(start, at - start), (at + size, start + room - at - size)]
                self.holes[index : index + 1] = [hole for hole in rest if hole[1]]
                return at
        return None

    def free(self, at: int, size: int) -> None:
        insort(self.holes, (at, size))
        merged: list[tuple[int, int]] = []
        for start, room in self.holes:
            if merged and sum(merged[-1]) == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + room)
            else:
                merged.append((start, room))
        self.holes = merged

    def close(self) -> None:
        self.map.close()
        os.close(self.fd)


class GuestMemory:
    """A guest's memory, for use in a `with` block.

    `regions` says where each region lies: guest address, size, user address and offset in its own
    memory file, in bytes, offset and size in whole pages. Regions may touch: buffers may then
    cross from one into the next. One number makes a single region of that size.

    Raises ValueError when regions overlap or are not whole pages.
    """

    def __init__(self, regions: int | Sequence[Region] = _DEFAULT_SIZE) -> None:
        if isinstance(regions, int):
            regions = [Region(_GUEST_BASE, regions, _USER_BASE, 0)]
        ordered = sorted(regions)
        for region in ordered:
            if region.size <= 0 or region.size % _PAGE or region.mmap_offset % _PAGE:
                raise ValueError(f"a memory region must be whole pages: {region}")
        for low, high in pairwise(ordered):
            if low.guest_addr + low.size > high.guest_addr:
                raise ValueError(f"memory regions overlap: {low} and {high}")
        self._mappings: list[_Mapping] = []
        self._views: list[memoryview] = []
        self._sizes: dict[int, int] = {}
        try:
            for region in regions:
                self._mappings.append(_Mapping(region))
        except BaseException:
            self.close()
            raise

    @classmethod
    def like_uml(cls, size: int = _DEFAULT_SIZE) -> Self:
        """Return memory as User Mode Linux has it: guest, user and file address are the same."""
        base = 0x60A0_0000
        return cls([Region(base, size, base, base)])

    @classmethod
    def like_qemu(cls, size: int = _DEFAULT_SIZE) -> Self:
        """Return memory as a small QEMU guest has it: from guest address 0, at the file's start."""
        return cls([Region(0, size, _USER_BASE, 0)])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unmap and close everything; every view that `view` returned is released."""
        for view in self._views:
            view.release()
        self._views.clear()
        while self._mappings:
            self._mappings.pop().close()

    def regions(self) -> list[tuple[Region, int]]:
        """Return each region with its file descriptor, which stays this memory's."""
        return [(mapping.region, mapping.fd) for mapping in self._mappings]

    def alloc(self, size: int, align: int = 16, *, region: int | None = None) -> int:
        """Return the guest address of `size` unused bytes that lie in one region.

        `region` is that region's index; by default any. Raises MemoryError when there is no room.
        """
        if size <= 0 or align <= 0:
            raise ValueError(f"cannot allocate {size} bytes aligned to {align}")
        mappings = self._mappings if region is None else [self._mappings[region]]
        for mapping in mappings:
            at = mapping.alloc(size, align)
            if at is not None:
                addr = mapping.region.guest_addr + at
                self._sizes[addr] = size
                return addr
        raise MemoryError(f"guest memory has no {size} free bytes in one piece")

    def free(self, addr: int) -> None:
        """Give back what `alloc` returned. Raises ValueError for any other address."""
        size = self._sizes.pop(addr, None)
        if size is None:
            raise ValueError(f"guest address {addr:#x} is not allocated")
        mapping, at = self._find(addr)
        mapping.free(at, size)

    def read(self, addr: int, size: int) -> bytes:
        """Return a copy of `size` bytes. Raises IndexError when they are not all guest memory."""
        parts = []
        while size:
            mapping, at = self._find(addr)
            part = mapping.map[at : at + size]
            parts.append(part)
            addr += len(part)
            size -= len(part)
        return b"".join(parts)

    def write(self, addr: int, data: bytes | bytearray | memoryview) -> None:
        """Copy `data` to `addr`. Raises IndexError when that is not all guest memory.

        The copy is not atomic: never publish a ring index or flag with it, use `view`.
        """
        rest = memoryview(data).cast("B")
        while rest:
            mapping, at = self._find(addr)
            count = min(len(rest), mapping.region.size - at)
            mapping.map[at : at + count] = rest[:count]
            addr += count
            rest = rest[count:]

    def view(self, addr: int, size: int, format: str = "B") -> memoryview:  # noqa: A002
        """Return `size` bytes as items of a native format: loads and stores of one are atomic.

        `struct.pack_into` and byte copies are not: they let the other side see torn values.
        Raises IndexError when the bytes do not lie in one region. Slices of the view must be gone
        before `close`.
        """
        mapping, at = self._find(addr)
        if at + size > mapping.region.size:
            raise IndexError(f"{size} bytes at guest address {addr:#x} leave their region")
        view = memoryview(mapping.map)[at : at + size].cast(format)  # type: ignore[call-overload]
        self._views.append(view)
        return view  # type: ignore[no-any-return]

    def user_addr(self, addr: int) -> int:
        """Return the frontend's own address of `addr`, as SET_VRING_ADDR wants it."""
        mapping, at = self._find(addr)
        return mapping.region.user_addr + at

    def _find(self, addr: int) -> tuple[_Mapping, int]:
        for mapping in self._mappings:
            at = addr - mapping.region.guest_addr
            if 0 <= at < mapping.region.size:
                return mapping, at
        raise IndexError(f"guest address {addr:#x} is no guest memory")
