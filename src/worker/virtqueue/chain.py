"""A descriptor chain: one buffer of the guest's, in one or more pieces, and what may be one."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from time import monotonic_ns
from typing import Protocol

from ...errors import GuestError, RefusedError
from ...journal import Input, Output
from ...ledger import Page, Pending
from . import fence
from .features import EVENT_IDX, INDIRECT_DESC
from .log import DirtyLog
from .memory import GuestMemory

NEXT = 1
WRITE = 2
INDIRECT = 4

DESC_SIZE = 16

_LOW32 = 0xFFFFFFFF

#: Linux and QEMU allow indirect tables longer than the ring itself, up to this many entries.
_LONGEST_INDIRECT = 1024

# A guest that spins until its buffer is back has it in less, and needs no call for it any more.
_CALL_NS = 1_000

#: How many buffers are moved before the guest sees them, so that it can go on meanwhile, or wake up
#: while the others are moved. After a large one it is one, unless that was so large that to move a
#: few of them takes as long as to wake up: then the guest would be called for each.
_PORTION = 16
_LARGE = 1024
_LARGEST = 16384

#: Looks at the ring between two at the clock.
_LOOKS = 8

#: With more bytes than this to pass on, looking for more would keep them waiting.
_LIGHT = 4096


_NOWHERE = memoryview(bytearray())


class Chain:
    """One buffer: `head` names it to the ring, `spans` are its `size` bytes in order.

    Every queue of a console moves bytes one way, so all spans are readable or all are writable.
    """

    __slots__ = ("head", "size", "spans")

    def __init__(self, head: int, size: int, spans: list[memoryview]) -> None:
        self.head = head
        self.size = size
        self.spans = spans


class Watched(Protocol):
    """A ring that can be looked at."""

    def ready(self) -> bool:
        """Say whether there is something for `pop` to look at."""


class ChainReader:
    """What both ring formats have in common: which chains are allowed, which bytes were written.

    A ring's `pop` builds the commonest chain itself, one direct descriptor of the right direction
    with 1 to `_inline` bytes; for all others it gathers the pieces and calls `_chain`. While a
    dirty log is set, `_inline` leaves nothing to the short way, so that every piece is noted here.

    What a format has to say itself is at the end.
    """

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        *,
        features: int,
        writable: bool,
        most_bytes: int,
        page: Page,
        stream: Output | Input | None,
        resumed: bool,
    ) -> None:
        self.size = size
        self._memory = memory
        self._event_idx = bool(features & EVENT_IDX)
        self._indirect = bool(features & INDIRECT_DESC)
        self._direction = WRITE if writable else 0
        self._most_bytes = self._inline = most_bytes
        self._log: DirtyLog | None = None
        self._log_used: int | None = None
        self._noted: deque[list[tuple[int, int]]] = deque()  # of each chain popped and not pushed
        self._word = page.word
        self._output = stream if isinstance(stream, Output) else None
        self._input = stream if isinstance(stream, Input) else None
        self._unmarked = resumed  # a predecessor may have written more than it marked
        self.held = 0
        self._in_batches = True
        self._portion = _PORTION
        self._unasked = 0  # exposed since the guest was last asked whether it wants a call
        # The region where the buffers were so far.
        self._start = self._room = 0
        self._view = self._bytes = _NOWHERE

    def keep(self, page: Page | None, stream: Output | Input | None) -> None:
        """Commit there from now on, as `place` has it; nothing is pushed that is not visible."""
        self._word = (page or Page()).word
        self._output = stream if isinstance(stream, Output) else None
        self._input = stream if isinstance(stream, Input) else None
        self._record(self.pending().begin, 0)

    def take(self, output: Output, most: int, limit: int, linger_ns: int) -> int:
        """Move up to `most` buffers into `output`, each completed and seen by the guest at once.

        Stops before a buffer that would bring the output's head past `limit`, and leaves its size
        in `held`, 0 otherwise. When there are no more it looks for `linger_ns` longer, unless the
        guest wants a call, which is the caller's to make: `publish` tells.

        Returns how many were moved. Raises GuestError as `pop` does; those before count.
        """
        self._output = output
        taken = 0
        began = output.head
        while True:
            before = output.head
            try:
                moved = self._move(output, min(most - taken, self._portion), limit)
                asleep = self._call_wanted()  # for what it could see all the while
            finally:
                self._expose()
            taken += moved
            size = output.head - before
            self._portion = 1 if _LARGE * moved < size <= _LARGEST * moved else _PORTION
            if not moved or asleep or self.held or taken >= most:
                return taken
            if output.head - began > _LIGHT:
                linger_ns = min(linger_ns, _CALL_NS)
            if not self._linger(linger_ns):
                return taken

    def _linger(self, linger_ns: int) -> bool:
        """Look for another buffer for so long, or until the guest wants a call."""
        if self.ready():
            return True
        if not linger_ns:
            return False
        now = monotonic_ns()
        last = now + linger_ns
        until = min(last, now + _CALL_NS)
        while True:
            for _ in range(_LOOKS):
                if self.ready():
                    return True
            if monotonic_ns() >= until:
                if until == last or self._call_wanted():
                    return False
                until = last

    def _move(self, output: Output, most: int, limit: int) -> int:
        """Append up to `most` buffers and push them; see `take`."""
        self.held = 0
        moved = 0
        while True:
            if self._in_batches:
                moved += self._move_direct(output, most - moved, limit)
            if moved >= most or self.held or not self.ready():
                return moved
            if not self._move_next(output, limit):
                return moved
            moved += 1

    def _move_next(self, output: Output, limit: int) -> bool:
        """Do the same for one buffer of any kind; return whether there was one and it fits."""
        chain = self.pop()
        if chain is None:
            return False
        if chain.size > output.size:  # the ring may have been made for another port
            raise GuestError(f"a chain of more than {output.size} bytes")
        if chain.size and output.head + chain.size > limit:  # one of no size needs no room
            self.unpop(chain.head)
            self.held = chain.size
            return False
        for span in chain.spans:
            output.append(span)
        self.push(chain.head, 0)
        return True

    def _spans(self, addr: int, size: int) -> list[memoryview]:
        """Return a direct buffer's bytes, and remember their region."""
        at = addr - self._start
        if at < 0 or at > self._room - size:
            region = self._memory.region(addr)
            at = addr - region.guest
            if at + size > len(region.view):
                return self._memory.spans(addr, size)
            self._start, self._room = region.guest, len(region.view)
            self._view = self._bytes = region.view
        return [self._view[at : at + size]]

    def publish(self) -> bool:
        """Let the guest see what was pushed; return whether it wants a call (2.7.7.2, 2.8.10)."""
        self._expose()
        wanted = self._call_wanted()
        self._unasked = 0
        return wanted

    def _record(self, begin: int, pushed: int) -> None:
        """Commit what the guest sees next: so many, from `begin` on, and the stream as it is.

        A successor shows it to the guest if it is not to be seen by then; all else that was popped
        is popped again.
        """
        offset = 0
        if self._output is not None:
            self._output.commit()
            offset = self._output.head
        elif self._input is not None:
            offset = self._input.tail
        self._word[0] = (offset & _LOW32) << 32 | begin << 16 | pushed

    def _call_wanted(self) -> bool:
        """Say whether the guest wants a call for what it was not asked about yet."""
        if not self._unasked:
            return False
        fence.full()  # 2.7.14, 2.8.22: what is used before a look at what suppresses calls
        wanted = self._asks_for_call()
        if not wanted:
            self._unasked = 0
        return wanted

    def _chain(self, head: int, pieces: Sequence[tuple[int, int, int]]) -> Chain:
        """Return the chain of these (address, size, flags). Raises GuestError if it may not be."""
        total = 0
        spans: list[memoryview] = []
        for addr, size, flags in pieces:
            if flags & WRITE != self._direction:
                way = "readable" if self._direction else "writable"
                raise GuestError(f"a {way} descriptor where only the other kind can be")
            total += size
            if total > self._most_bytes:
                raise GuestError(f"a chain of more than {self._most_bytes} bytes")
            spans += self._memory.spans(addr, size)
        if self._log is not None and self._direction:
            self._noted.append([(addr, size) for addr, size, _ in pieces])
        return Chain(head, total, spans)

    def _table(self, addr: int, size: int, allowed: bool) -> memoryview:
        """Return an indirect table as u64 pairs. Raises GuestError when there can be none."""
        if not self._indirect or not allowed:
            raise GuestError("an indirect descriptor where none can be")
        longest = max(self.size, _LONGEST_INDIRECT)
        if size % DESC_SIZE or not 0 < size // DESC_SIZE <= longest:
            raise GuestError(f"an indirect table of {size} bytes")
        spans = self._memory.spans(addr, size)
        return (spans[0] if len(spans) == 1 else memoryview(b"".join(spans))).cast("Q")

    def log(self, log: DirtyLog | None, used_addr: int | None) -> None:
        """From now on, mark in `log` what is written for the guest; None: nowhere.

        `used_addr` is SET_VRING_ADDR's log address, None without VHOST_VRING_F_LOG: then the ring's
        own words are not marked. Call it while no popped chain waits for its `push`. Raises
        RefusedError when the log does not reach as far as the ring's words.
        """
        if log is not None and used_addr is not None:
            for addr, size in self._own_words(used_addr):
                if not log.covers(addr, size):
                    raise RefusedError(f"the dirty log ends before a ring's words at {addr:#x}")
                if self._unmarked:
                    log.mark(addr, size)
        self._unmarked = False
        self._log = log
        self._log_used = None if log is None else used_addr
        self._inline = self._most_bytes if log is None or not self._direction else 0
        self._noted.clear()

    def _mark_written(self, written: int) -> None:
        """Mark the first `written` bytes of the oldest chain popped."""
        if self._log is not None and self._noted:
            for addr, size in self._noted.popleft():
                self._log.mark(addr, min(size, written))
                written -= min(size, written)

    def _mark_own(self, addr: int, size: int) -> None:
        if self._log is not None:
            self._log.mark(addr, size)

    # Each format's own

    def pending(self) -> Pending:
        """See `ring.Ring`."""
        raise NotImplementedError

    def ready(self) -> bool:
        """See `ring.Ring`, for the next ones too."""
        raise NotImplementedError

    def pop(self) -> Chain | None:
        """Return the next buffer."""
        raise NotImplementedError

    def unpop(self, head: int) -> None:
        """Put a buffer back."""
        raise NotImplementedError

    def push(self, head: int, written: int) -> None:
        """Complete a buffer."""
        raise NotImplementedError

    def _move_direct(self, output: Output, most: int, limit: int) -> int:
        """Do as `_move` until there is no buffer or one that is not a single direct descriptor."""
        raise NotImplementedError

    def _expose(self) -> None:
        """Commit what was pushed, let the guest see it, and count it as `_unasked`."""
        raise NotImplementedError

    def _asks_for_call(self) -> bool:
        """Say whether the guest wants a call for the `_unasked` last ones it can see."""
        raise NotImplementedError

    def _own_words(self, used_addr: int) -> list[tuple[int, int]]:
        """Return (guest address, size) of the areas that this side of the ring writes to."""
        raise NotImplementedError


def look(rings: Sequence[Watched], until_ns: int) -> int:
    """Look until then, on the monotonic clock, for one that is `ready`; return where, -1: none."""
    while rings:
        for _ in range(_LOOKS):
            for at, ring in enumerate(rings):
                if ring.ready():
                    return at
        if monotonic_ns() >= until_ns:
            break
    return -1
