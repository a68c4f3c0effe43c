"""What a predecessor left of the buffers in flight, in regions that hold anything.

Whatever is found, `recover` returns what can be, or nothing; a second look finds the same; and what
is kept there from then on is found again by a successor, wherever the one before it died.
"""

from __future__ import annotations

from collections.abc import Iterable

from source import Source
from vhost_device_console.errors import GuestError
from vhost_device_console.worker.virtqueue.inflight import PackedState, SplitState

SIZES = [1, 2, 3, 4, 8]
_WRAP = 1 << 15

VALUES = [0, 1, 2, 3, 4, 7, 8, 9, 0x8000, 0xFFFF, (1 << 32) - 1, 1 << 63, (1 << 64) - 2]

#: What may be added to the counters of all chains.
LIFTS = [*[0] * 6, 1 << 63, (1 << 64) - 3]

#: (offset, size) of fields in the region's head and in its first entry.
SPLIT_FIELDS = [(0, 8), (8, 2), (10, 2), (12, 2), (14, 2), (16, 1), (22, 2), (24, 8)]
PACKED_FIELDS = [
    *((0, 8), (8, 2), (10, 2), (12, 2), (14, 2), (16, 2), (18, 2), (20, 1), (21, 1)),
    *((32, 1), (34, 2), (36, 2), (38, 2), (40, 8), (48, 2), (50, 2), (52, 4), (56, 8)),
]


def run(data: bytes) -> None:
    """A few numbers, the region, and steps that a ring would take on it."""
    source = Source(data)
    packed = source.byte() % 2
    size = source.pick(SIZES)
    ring = min(size, source.pick(SIZES))
    position = source.number(2)
    more = source.byte()
    steps = source.take(more % 64)
    lift = source.pick(LIFTS)
    count = source.byte() % 9
    patches = source.take(24)[: 3 * count]
    extra = source.take(16 * ring).ljust(16 * ring, b"\0") if packed else b""
    used = 32 + 32 * size if packed else 16 + 16 * size
    area = memoryview(bytearray(-(-used // 64) * 64))
    rest = source.rest()[: len(area)]
    area[: len(rest)] = rest
    _lift(area, packed, lift)
    for at in range(0, len(patches) - 2, 3):
        _patch(area, packed, *patches[at : at + 3])
    if packed:
        start = position % ring | position & _WRAP
        _packed(area, size, ring, start, memoryview(bytearray(extra)).cast("Q"), steps)
    else:
        _split(area, size, ring, position, more % (ring + 1), steps)


def _lift(area: memoryview, packed: int, lift: int) -> None:
    """Have every chain in the region begun so much later."""
    words = area.cast("Q")
    for at in range(5 if packed else 3, len(words), 4 if packed else 2):
        words[at] = words[at] + lift & (1 << 64) - 1


def _patch(area: memoryview, packed: int, entry: int, field: int, value: int) -> None:
    """Put a number that is worth a try into one field of an entry, or of the region's head."""
    fields = PACKED_FIELDS if packed else SPLIT_FIELDS
    offset, size = fields[field % len(fields)]
    step = 32 if packed else 16
    at = offset + (step * (entry % (len(area) // step - 1)) if offset >= step else 0)
    number = VALUES[value % len(VALUES)] & (1 << 8 * size) - 1
    area[at : at + size] = number.to_bytes(size, "little")


def _split(area: memoryview, size: int, ring: int, used: int, waiting: int, steps: bytes) -> None:
    state = SplitState(area, size)
    heads = state.recover(used, waiting, ring)
    assert len(set(heads)) == len(heads) <= waiting
    assert all(0 <= head < ring for head in heads)
    assert not heads or state.discarded is None
    found = bytes(area)
    assert SplitState(area, size).recover(used, waiting, ring) == heads
    assert bytes(area) == found
    flight = list(heads)  # oldest first
    batch: list[int] = []
    for step in steps:
        head = step >> 2
        if step & 3 == 0 and head < ring and head not in flight and head not in batch:
            state.fetched(head)
            flight.append(head)
        elif step & 3 == 1 and flight:
            state.completing(flight[0])
            batch.append(flight.pop(0))
        elif step & 3 == 2 and batch:
            used = used + len(batch) & 0xFFFF
            if head & 1:  # it dies before it can say so
                state = SplitState(area, size)
                assert state.recover(used, ring, ring) == flight
            else:
                state.completed(batch, used)
            batch.clear()
        elif step & 3 == 3 and flight and not batch:
            state.put_back(flight.pop())
    if not batch:
        again = SplitState(area, size)
        assert again.recover(used, ring, ring) == flight
        assert again.discarded is None


def _packed(
    area: memoryview, size: int, ring: int, start: int, words: memoryview, steps: bytes
) -> None:
    state = PackedState(area, size)
    place, chains = state.recover(start, words, ring)
    keys = [key for key, _ in chains]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < size for key in keys)
    assert sum(len(entries) for _, entries in chains) <= ring
    assert place & ~_WRAP < ring
    assert state.discarded is None or (place, chains) == (start, [])
    found = bytes(area)
    assert PackedState(area, size).recover(start, words, ring) == (place, chains)
    assert bytes(area) == found
    flight = list(chains)
    for step in steps:
        count = (step >> 2 & 3) + 1
        if step & 3 in (0, 1):
            entries = [(step << at, step << 8 * at & (1 << 64) - 1) for at in range(count)]
            try:
                flight.append((state.fetched(entries), entries))
            except GuestError:
                assert sum(len(entries) for _, entries in flight) + count > size
        elif step & 3 == 2 and flight:
            batch = flight[:count]
            at = place & ~_WRAP
            at += sum(len(entries) for _, entries in batch)
            if sum(len(entries) for _, entries in flight) > ring:
                continue  # no ring of this size does that
            place = at % ring | (place ^ (_WRAP if at >= ring else 0)) & _WRAP
            keys = [key for key, _ in batch]
            state.completing(keys, place)
            state.completed(keys, place)
            del flight[:count]
        elif step & 3 == 3 and flight:
            state.put_back(flight.pop()[0])
    if sum(len(entries) for _, entries in flight) <= ring:
        again = PackedState(area, size)
        assert again.recover(start, words, ring) == (place, flight)
        assert again.discarded is None


def _region(packed: bool, size: int, most: int) -> bytes:
    """Return a region with some chains in flight, as a ring that worked leaves it."""
    area = memoryview(bytearray(-(-(32 + 32 * size if packed else 16 + 16 * size) // 64) * 64))
    if packed:
        state = PackedState(area, size)
        state.recover(_WRAP, memoryview(bytes(16 * size)).cast("Q"), size)
        keys = [state.fetched([(0x1000, at)]) for at in range(most)]
        if keys:
            state.completing(keys[:1], 1 % size | _WRAP)
            if most % 2:
                state.completed(keys[:1], 1 % size | _WRAP)
        return bytes(area)
    split = SplitState(area, size)
    split.recover(7, 0, size)
    for at in range(most):
        split.fetched(at)
    if most:
        split.completing(0)
        if most % 2:
            split.completed([0], 8)
    return bytes(area)


def seeds() -> Iterable[bytes]:
    steps = bytes([0, 4, 8, 1, 2, 3, 0, 12, 1, 6])
    for at, size in enumerate(SIZES):
        for most in range(min(size, 3) + 1):
            head = bytes([at, at]) + (7 + bool(most)).to_bytes(2, "little")
            for waiting in (0, 10):
                split = bytes([0]) + head + bytes([waiting]) + steps[:waiting] + bytes(26)
                yield split + _region(False, size, most)
                packed = bytes([1]) + head + bytes([waiting]) + steps[:waiting] + bytes(26)
                yield packed + bytes(16 * size) + _region(True, size, most)
