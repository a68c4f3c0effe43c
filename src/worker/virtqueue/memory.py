"""Guest memory: regions mapped from the frontend's files, as slices that copy nothing.

An address is either the guest's (in descriptors) or the frontend's (in SET_VRING_ADDR). Nothing is
unmapped by hand: a region lives as long as someone holds a slice of it, so a stale slice is at
worst memory of a guest that is gone, never a fault.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import mmap
import os
from bisect import bisect_right
from typing import NamedTuple

from ...errors import GuestError, RefusedError

_TOP = 1 << 64


class Region(NamedTuple):
    """A mapped region, half open: [guest, guest_end) and [user, user_end) are the same bytes."""

    guest: int
    guest_end: int
    user: int
    user_end: int
    view: memoryview


def map_file(fd: int, size: int, offset: int, what: str) -> memoryview:
    """Map `size` bytes from `offset` of the file `fd`, which stays the caller's to close.

    Where the file allows it, it is sealed against shrinking, since a page that is gone would kill
    this process (SIGBUS). Raises RefusedError, about `what`, when the file cannot give them.
    """
    if size == 0:
        raise RefusedError(f"{what} has no bytes")
    if offset + size > _TOP:
        raise RefusedError(f"{what} reaches past the end of the address space")
    with contextlib.suppress(OSError):  # no memfd, sealed for good, or read-only
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    try:
        # Huge page files are mapped, and unmapped, in whole huge pages only; their block size says
        # how large.
        status = os.fstat(fd)
        unit = max(mmap.ALLOCATIONGRANULARITY, status.st_blksize)
        lead = offset % unit
        units = -(-(lead + size) // unit) * unit
        length = max(lead + size, min(units, status.st_size - offset + lead))
        whole = memoryview(mmap.mmap(fd, length, offset=offset - lead))
    except (OSError, ValueError, OverflowError) as error:
        raise RefusedError(f"{what} of {size} bytes cannot be mapped: {error}") from None
    return whole[lead : lead + size]


def map_region(fd: int, guest_addr: int, size: int, user_addr: int, offset: int) -> Region:
    """Map one region of guest memory; see `map_file`."""
    if max(guest_addr, user_addr) + size > _TOP:
        raise RefusedError("a memory region reaches past the end of the address space")
    view = map_file(fd, size, offset, "a memory region")
    return Region(guest_addr, guest_addr + size, user_addr, user_addr + size, view)


class GuestMemory:
    """The regions of one memory table."""

    def __init__(self, regions: list[Region]) -> None:
        """Raise RefusedError when there are none, or two of them overlap."""
        if not regions:
            raise RefusedError("a memory table has no regions")
        by_guest = sorted(regions, key=lambda region: region.guest)
        by_user = sorted(regions, key=lambda region: region.user)
        if any(a.guest_end > b.guest for a, b in itertools.pairwise(by_guest)) or any(
            a.user_end > b.user for a, b in itertools.pairwise(by_user)
        ):
            raise RefusedError("memory regions overlap")
        self._regions = by_guest
        self._starts = [region.guest for region in by_guest]

    @property
    def end(self) -> int:
        """The first guest address after the last region."""
        return self._regions[-1].guest_end

    def user(self, addr: int, size: int) -> memoryview:
        """Return `size` bytes at a frontend address. Raises RefusedError outside one region."""
        region = self._user(addr, size)
        return region.view[addr - region.user : addr - region.user + size]

    def guest_addr(self, user_addr: int) -> int:
        """Return the guest address of a frontend address. Raises RefusedError if it has none."""
        region = self._user(user_addr, 1)
        return user_addr - region.user + region.guest

    def region(self, addr: int) -> Region:
        """Return the region with a guest address. Raises GuestError when there is none."""
        at = bisect_right(self._starts, addr) - 1
        if at >= 0 and addr < self._regions[at].guest_end:
            return self._regions[at]
        raise GuestError(f"guest address {addr:#x} is in no memory region")

    def spans(self, addr: int, size: int) -> list[memoryview]:
        """Return `size` bytes at a guest address, in pieces where they cross adjacent regions.

        Raises GuestError when any of them is in no region.
        """
        pieces = []
        while size:
            region = self.region(addr)
            count = min(size, region.guest_end - addr)
            pieces.append(region.view[addr - region.guest : addr - region.guest + count])
            addr += count
            size -= count
        return pieces

    def _user(self, addr: int, size: int) -> Region:
        for region in self._regions:
            if region.user <= addr and addr + size <= region.user_end:
                return region
        raise RefusedError(f"{size} bytes at frontend address {addr:#x} are in no memory region")
