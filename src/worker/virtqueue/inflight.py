"""What is popped and not completed, kept in memory that outlives this process.

The frontend holds the area (GET_INFLIGHT_FD, SET_INFLIGHT_FD) and gives it to the next backend.
Each queue has a region of it, laid out as the specification says, and changed in the order that it
says, so that after a death at any point every chain is either completed or found in flight. The
region is written for a successor; while a ring runs nothing is read back from it. What is found at
the start is somebody else's: it is used whole, or discarded whole if anything in it cannot be.

Source: QEMU docs/interop/vhost-user.rst, "Inflight I/O tracking".
"""

from __future__ import annotations

import fcntl
import os
import struct
import sys

from ... import config
from ...errors import GuestError, RefusedError
from .features import RING_PACKED
from .memory import map_file

_VERSION = 1
_ALIGNMENT = 64  # of each queue's region; the specification leaves it to the backend

_AVAIL = 1 << 7
_USED = 1 << 15
_WRAP = 1 << 15
_INDEX = 0xFFFF
_LOW32 = 0xFFFF_FFFF
_PLACES = struct.Struct("=HHBBxx")
_MOST_CHAINS = 1 << 63  # nobody ever fetched so many


def _region_size(size: int, features: int) -> int:
    used = 32 + 32 * size if features & RING_PACKED else 16 + 16 * size
    return -(-used // _ALIGNMENT) * _ALIGNMENT


def create(queues: int, size: int, features: int) -> tuple[int, int]:
    """Make an area for `queues` queues of `size` entries in the format that `features` choose.

    Return a descriptor, the caller's to close, and the area's size in bytes; it begins at offset 0.
    Raises RefusedError when there is no such ring.
    """
    _check(queues, size)
    total = queues * _region_size(size, features)
    fd = os.memfd_create("inflight", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.truncate(fd, total)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(fd)
        raise
    return fd, total


def _check(queues: int, size: int) -> None:
    if not queues or not 0 < size <= config.LARGEST_QUEUE:
        raise RefusedError(f"no area can keep {queues} queues of {size} entries")


class Inflight:
    """A mapped area; it is unmapped with the last of its queues' states."""

    def __init__(
        self, fd: int, mmap_size: int, mmap_offset: int, queues: int, size: int, features: int
    ) -> None:
        """Map the area of `queues` queues of `size` entries, as SET_INFLIGHT_FD describes it.

        `fd` stays the caller's to close. `features` choose the format. Raises RefusedError when
        the area is too small for that, misaligned, or not in the file.
        """
        _check(queues, size)
        region = _region_size(size, features)
        if mmap_size < queues * region or mmap_offset % 8:
            raise RefusedError(
                f"{mmap_size} bytes at {mmap_offset:#x} cannot keep {queues} queues of {size}"
            )
        self._view = map_file(fd, queues * region, mmap_offset, "an inflight area")
        self._kind = PackedState if features & RING_PACKED else SplitState
        self._queues, self._size, self._region = queues, size, region
        self._states: dict[int, SplitState | PackedState] = {}

    def queue(self, index: int) -> SplitState | PackedState | None:
        """Return the state of a queue, to be given to `place`; None when the area has none."""
        if index >= self._queues:
            return None
        if index not in self._states:
            view = self._view[index * self._region :][: self._region]
            self._states[index] = self._kind(view, self._size)
        return self._states[index]


class _DamageError(Exception):
    """A region is not what a backend leaves behind."""


class _State:
    """One queue's region. `discarded` says what was wrong with what was found, if it was."""

    def __init__(self, view: memoryview, size: int) -> None:
        self.size = size
        self.discarded: str | None = None
        self._bytes = view
        self._u16 = view.cast("H")
        self._u32 = view.cast("I")
        self._u64 = view.cast("Q")
        self._count = 0  # of chains fetched

    def _initialise(self) -> None:
        """Make the region as new; it is valid once its version is there."""
        self._u16[4] = 0
        self._bytes[:8] = bytes(8)
        self._bytes[10:] = bytes(len(self._bytes) - 10)
        self._u16[5] = self.size

    def _check_header(self) -> None:
        features, version, size = self._u64[0], self._u16[4], self._u16[5]
        if features or version != _VERSION or size != self.size:
            raise _DamageError(
                f"features {features:#x}, version {version}, {size} entries instead of {self.size}"
            )

    def _in_order(self, counts: dict[int, int]) -> list[int]:
        """Return the keys by their counter values, and count on from there."""
        last = max(counts.values(), default=-1)
        if len(set(counts.values())) < len(counts) or last >= _MOST_CHAINS:
            raise _DamageError("counters that are no order")
        self._count = last + 1
        return sorted(counts, key=counts.__getitem__)


class SplitState(_State):
    """The chains of a split ring in flight, by their heads (QueueRegionSplit)."""

    def recover(self, used: int, waiting: int, size: int) -> list[int]:
        """Return the heads in flight, oldest first, for a ring of `size` entries.

        Its used index is `used`, and the available one `waiting` further. A region that is new is
        initialised; one that cannot be right is, too, and nothing is in flight.
        """
        if self._u16[4]:
            try:
                return self._found(used, waiting, size)
            except _DamageError as error:
                self.discarded = str(error)
        self._initialise()
        self._u16[7] = used
        self._u16[4] = _VERSION
        self._last_batch_head = self._count = 0
        return []

    def _found(self, used: int, waiting: int, size: int) -> list[int]:
        self._check_header()
        self._last_batch_head = at = self._u16[6]
        batch: set[int] = set()  # became visible to the guest, and may still be marked
        for _ in range((used - self._u16[7]) & _INDEX):
            if at >= self.size or at in batch:
                raise _DamageError("a last batch that never was")
            batch.add(at)
            at = self._u16[11 + 8 * at]
        marks = list(self._bytes[16 : 16 + 16 * self.size : 16])
        heads = [head for head, mark in enumerate(marks) if mark and head not in batch]
        if max(marks) > 1 or len(heads) > waiting or any(head >= size for head in heads):
            raise _DamageError(f"{len(heads)} chains in flight, of {waiting} that can be")
        heads = self._in_order({head: self._u64[3 + 2 * head] for head in heads})
        for head in batch:
            self._bytes[16 + 16 * head] = 0
        self._u16[7] = used
        return heads

    def fetched(self, head: int) -> None:
        """Keep that this chain was popped."""
        self._u64[3 + 2 * head] = self._count
        self._count += 1
        self._bytes[16 + 16 * head] = 1

    def put_back(self, head: int) -> None:
        """Keep that this chain was not popped after all."""
        self._bytes[16 + 16 * head] = 0

    def completing(self, head: int) -> None:
        """Keep that this chain is in the batch that the used index makes visible next."""
        self._u16[11 + 8 * head] = self._last_batch_head
        self._last_batch_head = self._u16[6] = head

    def completed(self, heads: list[int], used: int) -> None:
        """Keep that the used index is `used`, and these chains completed."""
        for head in heads:
            self._bytes[16 + 16 * head] = 0
        self._u16[7] = used


class PackedState(_State):
    """The chains of a packed ring in flight, with their descriptors (QueueRegionPacked).

    The descriptors are in entries of the region, linked in the order of the chain; so are the free
    entries. A *place* is an entry of the ring with its wrap counter in bit 15.
    """

    def __init__(self, view: memoryview, size: int) -> None:
        super().__init__(view, size)
        self._place = 0  # where the ring uses its next descriptor
        self._known: int | None = None  # where it does if we brought it there, not a predecessor
        self._links = list(range(1, size + 1))  # what is in the region's `next` fields
        self._free = 0
        self._lasts: dict[int, int] = {}  # of each chain in flight, by its first entry

    def recover(
        self, start: int, ring: memoryview, size: int
    ) -> tuple[int, list[tuple[int, list[tuple[int, int]]]]]:
        """Return where the ring uses descriptors next, and the chains in flight, oldest first.

        Each is the key by which it is completed, and its descriptors as two words each. `ring` is
        the descriptor ring of `size` entries. `start` is where SET_VRING_BASE says to go on: it
        counts if the region is new, if it cannot be right, or if a ring that we ourselves stopped
        is started elsewhere.
        """
        if self._u16[4] and self._known in (None, start):
            try:
                return self._found(ring, size)
            except _DamageError as error:
                self.discarded = str(error)
        self._initialise()
        for at in range(self.size):
            self._u16[17 + 16 * at] = at + 1
        self._links = list(range(1, self.size + 1))
        self._free = self._count = 0
        self._lasts.clear()
        self._set_places(start, start)
        self._u16[4] = _VERSION
        self._place = self._known = start
        return start, []

    def _found(
        self, ring: memoryview, size: int
    ) -> tuple[int, list[tuple[int, list[tuple[int, int]]]]]:
        self._check_header()
        free, old_free = self._u16[6], self._u16[7]
        wrap, old_wrap = self._bytes[20], self._bytes[21]
        place, old = self._u16[8] | wrap << 15, self._u16[9] | old_wrap << 15
        if wrap > 1 or old_wrap > 1 or self._u16[8] >= size or self._u16[9] >= size:
            raise _DamageError(f"places {place:#x} and {old:#x} in a ring of {size} entries")
        # The guest sees a batch with its first descriptor: it is what tells whether that was done.
        flags = ring[2 * (old & ~_WRAP) + 1] >> 48 & (_AVAIL | _USED)
        if place != old and flags != (_AVAIL if old_wrap else _USED):
            old, old_free = place, free
        links = [self._u16[17 + 16 * at] for at in range(self.size)]
        marks = list(self._bytes[32 : 32 + 32 * self.size : 32])
        taken: set[int] = set()
        at = old_free
        while at < self.size:
            if at in taken:
                raise _DamageError("a free list with a loop")
            taken.add(at)
            at = links[at]
        unmarked = [at for at in taken if marks[at]]
        chains: dict[int, list[int]] = {}
        for first in range(self.size):
            if marks[first] and first not in taken:
                chains[first] = self._entries(first, links, taken)
        if max(marks) > 1 or len(taken) != self.size or sum(map(len, chains.values())) > size:
            raise _DamageError(f"{len(chains)} chains in flight that cannot be")
        order = self._in_order({first: self._u64[5 + 4 * first] for first in chains})
        self._u16[7] = old_free
        self._set_places(old, old)
        self._u16[6] = old_free
        for at in unmarked:
            self._bytes[32 + 32 * at] = 0
        self._links, self._free, self._place = links, old_free, old
        self._lasts = {first: entries[-1] for first, entries in chains.items()}
        return old, [(first, [self._descriptor(at) for at in chains[first]]) for first in order]

    def _entries(self, first: int, links: list[int], taken: set[int]) -> list[int]:
        entries: list[int] = []
        at = first
        for _ in range(self._u16[19 + 16 * first]):
            if at >= self.size or at in taken:
                raise _DamageError("a chain through entries that are not its own")
            taken.add(at)
            entries.append(at)
            at = links[at]
        if not entries or entries[-1] != self._u16[18 + 16 * first]:
            raise _DamageError("a chain that does not end where it should")
        return entries

    def _descriptor(self, at: int) -> tuple[int, int]:
        buffer_id, flags = self._u16[24 + 16 * at], self._u16[25 + 16 * at]
        return self._u64[7 + 4 * at], self._u32[13 + 8 * at] | buffer_id << 32 | flags << 48

    def _set_places(self, place: int, old: int) -> None:
        """Store the used index and the old one with their wrap counters, all in one store.

        A death between an index and its wrap counter would leave a place on another lap, which an
        entry within a chain can make look right: those keep the driver's flags when it is used.
        """
        self._u64[2] = int.from_bytes(
            _PLACES.pack(place & ~_WRAP, old & ~_WRAP, place >> 15, old >> 15), sys.byteorder
        )

    def fetched(self, descriptors: list[tuple[int, int]]) -> int:
        """Keep that the chain of these descriptors was popped; return its key.

        Raises GuestError when more is in flight than the ring has descriptors.
        """
        first = at = self._free
        entries = []
        for _ in descriptors:
            if at >= self.size:
                raise GuestError("more descriptors are in flight than the ring has")
            entries.append(at)
            at = self._links[at]
        self._u16[19 + 16 * first] = 0
        self._u64[5 + 4 * first] = self._count
        self._count += 1
        self._bytes[32 + 32 * first] = 1
        self._u16[18 + 16 * first] = entries[-1]
        for count, (entry, (addr, word)) in enumerate(zip(entries, descriptors, strict=True), 1):
            self._u16[19 + 16 * first] = count
            self._u64[7 + 4 * entry] = addr
            self._u32[13 + 8 * entry] = word & _LOW32
            self._u16[25 + 16 * entry] = word >> 48
            self._u16[24 + 16 * entry] = word >> 32 & _INDEX
            self._u16[6] = self._links[entry]
        self._free = self._u16[7] = at
        self._lasts[first] = entries[-1]
        self._known = self._place
        return first

    def put_back(self, first: int) -> None:
        """Keep that this chain was not popped after all."""
        self._release(first)
        self._u16[7] = first
        self._bytes[32 + 32 * first] = 0

    def completing(self, firsts: list[int], place: int) -> None:
        """Keep that these chains become visible to the guest next, which takes the ring to `place`.

        Nothing may be fetched before `completed`.
        """
        for first in firsts:
            self._release(first)
        self._set_places(place, self._place)

    def completed(self, firsts: list[int], place: int) -> None:
        """Keep that these chains are completed, and the ring is at `place`."""
        for first in firsts:
            self._bytes[32 + 32 * first] = 0
        self._u16[7] = self._free
        self._set_places(place, place)
        self._place = self._known = place

    def _release(self, first: int) -> None:
        last = self._lasts.pop(first)
        self._links[last] = self._u16[17 + 16 * last] = self._free
        self._free = self._u16[6] = first
