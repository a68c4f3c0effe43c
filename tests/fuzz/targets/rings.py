"""Rings of both formats in guest memory that means harm, and served as every user of a ring does.

The guest sets descriptors, tables, indices and any words between the device's steps. Whatever it
does, only its queue may break: the device writes nothing but its own areas and the buffers it was
given, all of it is in the dirty log where there is one, `take` moves what `pop` would have found, a
successor shows what was committed, and everything ends after as much work as the ring has entries.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterable

from source import Source
from vhost_device_console.errors import GuestError, RefusedError
from vhost_device_console.journal import Input, Output
from vhost_device_console.ledger import Page, Pending
from vhost_device_console.worker.virtqueue.chain import Chain
from vhost_device_console.worker.virtqueue.features import (
    EVENT_IDX,
    IN_ORDER,
    INDIRECT_DESC,
    RING_PACKED,
)
from vhost_device_console.worker.virtqueue.inflight import PackedState, SplitState
from vhost_device_console.worker.virtqueue.log import DirtyLog
from vhost_device_console.worker.virtqueue.memory import GuestMemory, Region
from vhost_device_console.worker.virtqueue.ring import Ring, place

PAGE = 4096
OUTPUT = 4096

#: (guest address, user address, size, where in the memory below): the first one is for the rings,
#: the next two touch in the guest's eyes alone, the last one ends where addresses end.
_REGIONS = [
    (0x1_0000, 0x7F00_0000_0000, 4 * PAGE, PAGE),
    (0x2_0000, 0x6000_0000_0000, 2 * PAGE, 10 * PAGE),
    (0x2_2000, 0x5000_0000_0000, PAGE, 7 * PAGE),
    (0x4_0000, 0x4000_0000_0000, PAGE, 14 * PAGE),
]
_LAST = ((1 << 64) - PAGE, 0x3000_0000_0000, PAGE, 16 * PAGE)
_BACKING = 18 * PAGE

_RING_AT, _RING_USER, _RING_SIZE, _RING_PLACE = _REGIONS[0]
_LOG_BYTES = 0x4_1000 // PAGE // 8 + 1

_ADDRESSES = [
    *(0x2_0000, 0x2_0000, 0x2_0FFF, 0x2_1000, 0x2_1FF0, 0x2_2000, 0x2_2FFF, 0x4_0000),
    *(0x4_0FF0, 0x3_0000, 0x1_0000, 0x1_2000, (1 << 64) - PAGE, (1 << 64) - 1, 0, 0x1_1000),
]
_SIZES = [1, 2, 3, 4, 8, 16, 5, 64]
_LAYOUTS = [
    *[(0, 0x2000, 0x3000)] * 4,
    *((0, 0, 0), (0, 0x100, 0x80), (0x3FC0, 0x2000, 0x3000), (0x10, 0x3FF0, 0x3FF4)),
]

# Bits of the first byte.
PACKED, EVENTS, INDIRECT, WRITABLE, TRACKED, LOGGED, OWN, ORDER = (1 << bit for bit in range(8))

_NEXT, _WRITE, _TABLE, _AVAIL, _USED = 1, 2, 4, 1 << 7, 1 << 15

#: One step: what, and three numbers.
STEP = struct.Struct("<BBHI")
DESC, OFFER, WORD, QUAD, INDEX, ENTRY, AREA, EVENT = range(8)
READY, POP, PUSH, UNPOP, PUBLISH, TAKE, KICKS, NO_KICKS, LOG, AGAIN, CRASH, SERVE = range(8, 20)

_MOST_STEPS = 200
_MOST_POPPED = 64  # nobody pops more without a push


class _Log:
    """The file of a dirty log, mapped for good; there is more of it than the log may touch."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("log", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, PAGE)
        self._map = mmap.mmap(self._fd, PAGE)
        self.dirty = DirtyLog(self._fd, _LOG_BYTES, 0, 0x4_1000)

    def clear(self) -> None:
        self._map[:] = bytes(PAGE)

    def has(self, page: int) -> bool:
        return bool(self._map[page >> 3] >> (page & 7) & 1)

    def check(self) -> None:
        beyond = self._map[_LOG_BYTES:]
        assert beyond == bytes(len(beyond)), "marks beyond the log's end"


_log = _Log()


class Scene:
    """The guest's memory, one ring there, and what its user has popped."""

    def __init__(self, source: Source) -> None:
        flags, size, layout, limits = source.take(4).ljust(4, b"\0")
        base = source.number(4)
        self.flags = flags
        self.size = _SIZES[size % len(_SIZES)]
        self.packed = bool(flags & PACKED)
        self.writable = bool(flags & WRITABLE)
        self.features = (
            (RING_PACKED if flags & PACKED else 0)
            | (EVENT_IDX if flags & EVENTS else 0)
            | (INDIRECT_DESC if flags & INDIRECT else 0)
            | (IN_ORDER if flags & ORDER else 0)
        )
        self.desc, self.avail, self.used = _LAYOUTS[layout % len(_LAYOUTS)]
        # Not the common layout: the guest may have the device's words for its own.
        self.aliased = layout % len(_LAYOUTS) >= 4
        self.most = (OUTPUT, 100, 2 * OUTPUT, 1)[limits % 4]
        self.backing = bytearray(_BACKING)
        regions = [*_REGIONS] if flags & LOGGED else [*_REGIONS, _LAST]
        whole = memoryview(self.backing)
        self.memory = GuestMemory(
            [
                Region(guest, guest + size, user, user + size, whole[at : at + size])
                for guest, user, size, at in regions
            ]
        )
        self.ring_area = whole[_RING_PLACE : _RING_PLACE + _RING_SIZE]
        self.area = memoryview(bytearray(32 + 32 * 64))
        self.state: SplitState | PackedState | None = None
        if flags & TRACKED:
            self.new_state()
        words = memoryview(bytearray(64)).cast("Q")
        self.output = Output(memoryview(bytearray(OUTPUT)), words)
        self.input = Input(memoryview(bytearray(OUTPUT)), words)
        self.ledger = memoryview(bytearray(PAGE))
        self.page = Page(self.ledger)
        self.logging = False
        _log.clear()
        self.owed: set[int] = set()
        self.popped: list[Chain] = []
        self.hidden = False  # whether something is pushed that the guest does not see yet
        self.again = 0  # of these, so many may be put back
        self.at = 0 if self.packed else base & 0xFFFF  # where the guest offers next
        self.wrap = 1
        self.ring: Ring | None = None
        self.index = base
        if not self.packed:
            self.put16(self.used + 2, self.at)
            self.put16(self.avail + 2, self.at)

    def new_state(self) -> None:
        self.state = (PackedState if self.packed else SplitState)(self.area, self.size)

    # The guest

    def put16(self, at: int, value: int) -> None:
        at &= _RING_SIZE - 2
        self.ring_area[at : at + 2] = (value & 0xFFFF).to_bytes(2, "little")

    def put64(self, at: int, value: int) -> None:
        at &= _RING_SIZE - 8
        self.ring_area[at : at + 8] = value.to_bytes(8, "little")

    def get16(self, at: int) -> int:
        at &= _RING_SIZE - 2
        return int.from_bytes(self.ring_area[at : at + 2], "little")

    def entry(self, what: int, b: int, c: int) -> tuple[int, int]:
        """Return a descriptor's two words: `what` has its flags and about where it points."""
        addr = _ADDRESSES[what & 15] + (c >> 16 & 0xF)
        if what & 15 in (10, 11, 15):
            self.aliased = True
        size = c & 0xFFFF
        flags = what >> 4 & 7
        if not size:
            size = (16, 48, 1 << 31, 0)[c >> 24 & 3]
        elif size & 0x8000 and not what & 0x80:
            size &= 0xFF
        return addr & (1 << 64) - 1, size | flags << 32 | (b & 0xFF) << 48

    def guest(self, what: int, a: int, b: int, c: int) -> None:
        match what:
            case 0:  # DESC
                addr, word = self.entry(a, b, c)
                at = self.desc + 16 * (b >> 8) % (16 * self.size)
                if self.packed:
                    at, word = self.next_packed(word, b)
                self.put64(at, addr)
                self.put64(at + 8, word)
            case 1:  # OFFER
                if self.packed:
                    return
                self.put16(self.avail + 4 + 2 * (self.at % self.size), a if a & 0x80 else a & 7)
                self.at = self.at + 1 & 0xFFFF
                self.put16(self.avail + 2, self.at)
            case 2:  # WORD
                self.aliased = True
                self.put16(b, c)
            case 3:  # QUAD
                self.aliased = True
                self.put64(b, c | a << 56 | a << 40)
            case 4:  # INDEX
                if self.packed:
                    self.at, self.wrap = b % self.size, a & 1
                else:
                    self.put16(self.avail + 2, b)
                    self.at = b
            case 5:  # ENTRY of an indirect table
                addr, word = self.entry(a, b, c)
                at = 10 * PAGE + 16 * (b >> 8 & 31)
                self.backing[at : at + 16] = struct.pack("<QQ", addr, word)
            case 6:  # AREA of what is in flight, or the ledger, which is no guest's to write
                area = self.ledger if a & 0x80 else self.area
                at = b % (len(area) - 4)
                area[at : at + 4] = c.to_bytes(4, "little")
            case 7:  # EVENT: what suppresses calls
                if self.packed:
                    self.put16(self.avail, b)
                    self.put16(self.avail + 2, c)
                else:
                    self.put16(self.avail + 4 + 2 * self.size, b)
                    self.put16(self.avail, c)

    def next_packed(self, word: int, b: int) -> tuple[int, int]:
        """Give a packed descriptor its flags and buffer id, and return its place too."""
        at = self.desc + 16 * self.at
        flags = word >> 32 & 7 | (_AVAIL if self.wrap else _USED)
        self.at += 1
        if self.at >= self.size:
            self.at, self.wrap = 0, self.wrap ^ 1
        return at, word & 0xFFFF_FFFF | (b >> 8) << 32 | flags << 48

    # The device, and who uses it

    def start(self, killed: bool, resume: Pending | None = None) -> None:
        """Place the ring where it goes on, or where a worker that was killed had committed."""
        if killed and self.state is not None:
            self.new_state()
        self.popped.clear()
        self.again = 0
        self.hidden = False
        try:
            self.ring = self.placed(self.state, self.page, resume)
        except RefusedError:
            self.ring = None
            self.owed.clear()
            return
        if resume is not None and not self.packed:
            visible = (resume.begin + resume.pushed) & 0xFFFF
            assert self.aliased or self.get16(self.used + 2) == visible
        if self.logging:
            self.ring.log(_log.dirty, _RING_AT + self.used if self.flags & OWN else None)
            assert resume is None or all(map(_log.has, self.owed)), "a page is not in the log"
        self.owed.clear()

    def placed(
        self,
        state: SplitState | PackedState | None,
        page: Page | None = None,
        resume: Pending | None = None,
    ) -> Ring:
        return place(
            self.memory,
            self.size,
            _RING_USER + self.desc,
            _RING_USER + self.avail,
            _RING_USER + self.used,
            features=self.features,
            base=self.index,
            writable=self.writable,
            most_bytes=(1 << 63) - 1 if self.writable else self.most,
            inflight=state,
            ledger=page,
            stream=self.input if self.writable else self.output,
            resume=resume,
        )

    def own(self) -> list[tuple[int, int]]:
        """Return from where to where the device may write, but for buffers."""
        start = _RING_PLACE
        if self.packed:
            areas = [(self.desc, 16 * self.size), (self.used, 4)]
        else:
            areas = [(self.used, 4 + 8 * self.size + (2 if self.flags & EVENTS else 0))]
        return [(start + at, start + at + size) for at, size in areas]

    def device(self, what: int, a: int, b: int, c: int) -> None:
        ring = self.ring
        if what in (AGAIN, CRASH):
            resume = None
            if ring is not None:
                self.index = ring.index
                if what == CRASH and a & 1:
                    # Committed in the ledger or, of a control queue, in the snapshot.
                    resume = ring.pending() if a & 2 else self.page.pending()
            self.start(what == CRASH, resume)
            return
        if ring is None:
            return
        before = bytes(self.backing)
        try:
            exposed = self.serve(ring, what, a, b, c)
        except GuestError:
            exposed = True
            ring.publish()
            self.index = ring.index
            self.ring = None
        if what == LOG:
            before = bytes(self.backing)  # what came before the log is in none
        self.hidden = what == PUSH or (self.hidden and not exposed)
        self.check(before, exposed=exposed)

    def serve(self, ring: Ring, what: int, a: int, b: int, c: int) -> bool:
        """Take one step; return whether the guest sees all that was pushed then."""
        if what == READY:
            ring.ready()
        elif what == POP:
            if len(self.popped) < _MOST_POPPED:
                self.pop(ring)
        elif what == PUSH:
            if self.popped:
                self.push(ring, b)
        elif what == UNPOP:
            for _ in range(min(a, self.again)):
                ring.unpop(self.popped.pop().head)
                self.again -= 1
        elif what == PUBLISH:
            assert ring.publish() in (True, False)
            return True
        elif what == TAKE:
            if not self.popped and not self.writable:
                self.take(ring, a, b, c)
                return True
        elif what == KICKS:
            ring.want_kicks()
        elif what == NO_KICKS:
            ring.refuse_kicks()
        elif what == LOG:
            if not self.popped and self.flags & LOGGED:
                ring.publish()
                self.logging = not self.logging
                _log.clear()
                self.owed.clear()
                own = _RING_AT + self.used if self.flags & OWN else None
                ring.log(_log.dirty if self.logging else None, own)
        elif what == SERVE:  # as `discard`, `hear` and `give_input` do
            for _ in range(a % 64):
                if self.popped or not self.pop(ring):
                    break
                self.push(ring, b)
            ring.publish()
            return True
        return False

    def pop(self, ring: Ring) -> bool:
        chain = ring.pop()
        if chain is None:
            return False
        assert chain.size == sum(map(len, chain.spans))
        if not self.writable:
            assert chain.size <= self.most
        assert len(chain.spans) <= 5 * max(self.size, 1024)
        self.popped.append(chain)
        self.again += 1
        return True

    def push(self, ring: Ring, written: int) -> None:
        chain = self.popped.pop(0)
        self.again = 0
        written = min(written, chain.size) if self.writable else 0
        left = written
        before = bytes(self.backing)
        for span in chain.spans:
            count = min(len(span), left)
            span[:count] = bytes([written & 0xFF | 1]) * count
            left -= count
        pages = self.changed(before)
        ring.push(chain.head, written)
        if self.logging:
            for page in pages:
                assert _log.has(page), f"page {page:#x} was written and is not in the log"

    def take(self, ring: Ring, most: int, limit: int, linger_ns: int) -> None:
        output = self.output
        limit = output.head + limit if limit & 1 else (1 << 63) - 1
        known = not (self.aliased or self.hidden or self.state)
        wanted = self.peek(ring, most) if known else None
        start = output.head
        try:
            taken = ring.take(output, most, limit, linger_ns % 3000)
        except GuestError:
            if wanted is not None:
                assert wanted.pop() is None, "what is wrong with it?"
                assert output.copy(max(start, output.tail)) == b"".join(wanted)[-OUTPUT:]
            raise
        assert 0 <= taken <= most
        assert output.head <= limit
        assert not ring.held or output.head + ring.held > limit
        if wanted is not None:
            found = wanted[:taken]
            assert len(found) == taken
            assert None not in found
            assert output.copy(max(start, output.tail)) == b"".join(found)[-OUTPUT:]

    def peek(self, ring: Ring, most: int) -> list[bytes | None] | None:
        """Return what popping finds in each buffer, and None at the end if that is an error."""
        index, self.index = self.index, ring.index
        probe = self.placed(None)
        self.index = index
        found: list[bytes | None] = []
        while len(found) < most:
            try:
                chain = probe.pop()
            except GuestError:
                return [*found, None]
            if chain is None:
                break
            if self.packed and len(found) == self.size:
                return None  # it offers again what it was not given back
            if chain.size > OUTPUT:
                return [*found, None]
            found.append(b"".join(chain.spans))
        return found

    def changed(self, before: bytes) -> list[int]:
        """Return the guest's pages that are not as before."""
        pages = []
        if self.backing != before:
            for guest, _, size, at in _REGIONS:
                for offset in range(at, at + size, PAGE):
                    if self.backing[offset : offset + PAGE] != before[offset : offset + PAGE]:
                        pages.append(guest + offset - at >> 12)
        return pages

    def check(self, before: bytes, *, exposed: bool) -> None:
        """Compare what the device has written with what it may write."""
        if self.logging and self.flags & OWN:
            self.owed.update(self.changed(before))
            if exposed:
                assert all(map(_log.has, self.owed)), "a page of the ring is not in the log"
                self.owed.clear()
        if not self.writable and self.backing != before:
            now = bytearray(self.backing)
            for start, end in self.own():
                now[start:end] = before[start:end]
            assert now == before, "the device wrote where nothing is its own"

    def close(self) -> None:
        """Nothing lies between the regions or after the log, and nobody may write there."""
        _log.check()
        for region in (*_REGIONS, _LAST):
            at, size = region[3], region[2]
            self.backing[at : at + size] = bytes(size)
        assert self.backing == bytes(_BACKING)


def run(data: bytes) -> None:
    """Eight bytes describe the ring; each eight after them are a step of one of its two sides."""
    source = Source(data)
    scene = Scene(source)
    scene.start(killed=False)
    for _ in range(_MOST_STEPS):
        step = source.take(STEP.size)
        if len(step) < STEP.size:
            break
        what, a, b, c = STEP.unpack(step)
        what %= 20
        if what < READY:
            scene.guest(what, a, b, c)
        else:
            scene.device(what, a, b, c)
    scene.close()


def _seed(flags: int, size: int, *steps: tuple[int, int, int, int], base: int = 0) -> bytes:
    head = bytes([flags, size, 0, 0]) + base.to_bytes(4, "little")
    return head + b"".join(STEP.pack(*step) for step in steps)


def seeds() -> Iterable[bytes]:
    length = 20
    for flags in range(256):
        if flags & OWN and not flags & LOGGED:
            continue
        write = 0x20 if flags & WRITABLE else 0
        chain = [
            (DESC, 0x10 | write, 0x0001, length),
            (DESC, 0x01 | write, 0x0100, length),
            (OFFER, 0, 0, 0),
        ]
        table = [
            (ENTRY, 0x13 | write, 1, length),
            (ENTRY, 0x04 | write, 0x0100, length | 8 << 16),
            (DESC, 0x40, 0x0200, 32),
            (OFFER, 2, 0, 0),
        ]
        across = [(DESC, 0x04 | write, 0x0300, 0x40), (OFFER, 3, 0, 0)]
        serve = [(POP, 0, 0, 0), (PUSH, 0, length, 0), (PUBLISH, 0, 0, 0)]
        yield _seed(
            flags,
            4,
            (EVENT, 0, 0xFFFF, 2),
            (LOG, 0, 0, 0),
            *chain,
            (READY, 0, 0, 0),
            *serve,
            *(table if flags & INDIRECT else across),
            (POP, 0, 0, 0),
            (UNPOP, 1, 0, 0),
            (CRASH, 0, 0, 0),
            *serve[:2],
            (CRASH, 1 + flags % 4, 0, 0),
            *serve,
            *across,
            (TAKE, 4, 0, 0),
            (SERVE, 4, 5, 0),
            (KICKS, 0, 0, 0),
            (NO_KICKS, 0, 0, 0),
            (AGAIN, 0, 0, 0),
            base=0xFFFE if flags & ORDER and not flags & PACKED else 0x8000_8000,
        )
    for flags in (0, PACKED, TRACKED, PACKED | TRACKED):
        for word in (0x0001_0001, 0x8000_0001, 0x8000_0002, 0xFFFF_FFFF, 0x8002_0003):
            pages = [(AREA, 0x80, 0, word), (AREA, 0x80, 8, 0x0001_0000), (AREA, 0x80, 12, word)]
            yield _seed(flags, 4, *pages, (CRASH, 1, 0, 0), (DESC, 0, 0, 9), (POP, 0, 0, 0))
    one = (DESC, 0, 0, length)
    yield _seed(PACKED, 0, *[one, (POP, 0, 0, 0), (PUSH, 0, 0, 0)] * 2, base=0x8000_8000)
