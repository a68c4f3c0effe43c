"""The split ring, device side (VIRTIO 1.2, section 2.7).

Three areas in guest memory, seen through casts made once: descriptors as u64 pairs, the available
and the used ring as u16, used elements as u64. Item stores of such a cast are single stores of the
machine; `struct.pack_into` is not, it shows a zero in between. Whatever the guest can change is
read once and only that copy is used; whatever this side writes is remembered here, never read back.
"""

from __future__ import annotations

from typing import Any

from ...errors import GuestError, RefusedError
from ...journal import Output
from ...ledger import Pending
from . import fence
from .chain import DESC_SIZE, INDIRECT, NEXT, Chain, ChainReader
from .fence import WEAKLY_ORDERED
from .memory import GuestMemory

_NO_INTERRUPT = 1
_NO_NOTIFY = 1

_FLAGS = 7  # NEXT, WRITE and INDIRECT
_INDEX = 0xFFFF
_LOW32 = 0xFFFFFFFF


class SplitQueue(ChainReader):
    """One running split ring: `pop` buffers, `push` them back in order, `publish`.

    Goes on at the used index found in memory: buffers are completed in order here, so everything
    before it is done and everything after it is not, whoever served the ring before. What a
    predecessor pushed is in the used ring whether the guest was to see it by then or not.
    """

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        desc: int,
        avail: int,
        used: int,
        *,
        resume: Pending | None,
        **options: Any,
    ) -> None:
        """Place a ring of `size` entries at the frontend addresses `desc`, `avail`, `used`.

        Raises RefusedError when an area is misaligned or not within one memory region.
        """
        if desc % 16 or avail % 2 or used % 4:
            raise RefusedError(
                f"a ring is misaligned: descriptors {desc:#x}, available {avail:#x}, used {used:#x}"
            )
        super().__init__(memory, size, resumed=resume is not None, **options)
        self._desc = memory.user(desc, DESC_SIZE * size).cast("Q")
        # Each ring ends with the other side's event index, used with EVENT_IDX only.
        event = 2 if self._event_idx else 0
        self._avail = memory.user(avail, 4 + 2 * size + event).cast("H")
        whole = memory.user(used, 4 + 8 * size + event)
        self._used = whole.cast("H")
        self._elements = whole[4 : 4 + 8 * size].cast("Q")
        self._used_event_at = 2 + size
        self._avail_event_at = 2 + 4 * size
        if resume is None:
            start = self._used[1]
        else:
            start = self._used[1] = (resume.begin + resume.pushed) & _INDEX
        self._next = start  # the available entry to pop next
        self._known = start  # avail.idx as last read
        self._pushed = start
        self._published = start
        self._record(start, 0)

    @property
    def index(self) -> int:
        """The ring's position: how many buffers were completed, modulo 2^16."""
        return self._published

    @property
    def fresh(self) -> bool:
        """Whether the ring is new; after 65536 buffers it looks so again, for one of them."""
        return self._published == 0

    def ready(self) -> bool:
        """Say whether `pop` has something to look at."""
        return self._avail[1] != self._next

    def pop(self) -> Chain | None:
        """Return the next buffer, or None when the guest has given no more.

        Raises GuestError when the ring or the chain is not what the specification allows; the
        queue can then only be stopped.
        """
        position = self._next
        if position == self._known:
            known = self._avail[1]
            done = self._published
            if (known - done) & _INDEX > self.size:
                raise GuestError(
                    f"available index {known} is more than {self.size} ahead of {done}"
                )
            if known == position:
                return None
            self._known = known
            if WEAKLY_ORDERED:  # 2.7.13.3: the entry may be read only after the index
                fence.full()
        head = self._avail[2 + position % self.size]
        if head >= self.size:
            raise GuestError(f"available entry {position} names descriptor {head} of {self.size}")
        addr = self._desc[2 * head]
        word = self._desc[2 * head + 1]
        size = word & _LOW32
        if word >> 32 & _FLAGS != self._direction or not 0 < size <= self._inline:
            chain = self._walk(head, addr, word)
        else:
            chain = Chain(head, size, self._spans(addr, size))
        self._next = (position + 1) & _INDEX
        return chain

    def _walk(self, head: int, addr: int, word: int) -> Chain:
        """Return the chain that begins with this copy of descriptor `head`."""
        table, entries, direct = self._desc, self.size, True
        pieces: list[tuple[int, int, int]] = []
        most = entries
        while True:
            size, flags = word & _LOW32, word >> 32 & _INDEX
            if flags & INDIRECT:
                # 2.7.5.3: WRITE is ignored here; the table cannot be chained on or nested.
                table = self._table(addr, size, direct and not flags & NEXT)
                direct = False
                entries = len(table) // 2
                most = len(pieces) + entries
                index = 0
            else:
                pieces.append((addr, size, flags))
                if not flags & NEXT:
                    return self._chain(head, pieces)
                index = word >> 48
                if index >= entries:
                    raise GuestError(f"a descriptor names {index} of {entries} as its next")
                if len(pieces) == most:
                    raise GuestError("a descriptor chain has a loop")
            addr, word = table[2 * index], table[2 * index + 1]

    def _move_direct(self, output: Output, most: int, limit: int) -> int:
        """See `ChainReader._move_direct`."""
        avail, desc, elements, size = self._avail, self._desc, self._elements, self.size
        source, start, room = self._bytes, self._start, self._room
        largest = min(self._inline, output.size)
        position, known, pushed = self._next, self._known, self._pushed
        done = self._published
        moved = 0
        while moved < most:
            if position == known:
                known = avail[1]
                if (known - done) & _INDEX > size:
                    known = position  # `pop` says what is wrong
                if known == position:
                    break
                if WEAKLY_ORDERED:  # as in `pop`
                    fence.full()
            head = avail[2 + position % size]
            if head >= size:
                break
            word = desc[2 * head + 1]
            count = word & _LOW32
            at = desc[2 * head] - start
            if word >> 32 & _FLAGS or not 0 < count <= largest or at < 0 or at > room - count:
                break
            if output.head + count > limit:
                self.held = count
                break
            output.append_from(source, at, count)
            elements[pushed % size] = head
            pushed = (pushed + 1) & _INDEX
            position = (position + 1) & _INDEX
            moved += 1
        self._next, self._known, self._pushed = position, known, pushed
        return moved

    def unpop(self, head: int) -> None:  # noqa: ARG002
        """Put the chain popped last, `head`, back; again and again, until the one pushed last."""
        self._next = (self._next - 1) & _INDEX
        if self._noted:
            self._noted.pop()

    def push(self, head: int, written: int) -> None:
        """Complete the oldest popped chain, `head`, with `written` bytes; not visible yet."""
        self._elements[self._pushed % self.size] = head | written << 32
        self._pushed = (self._pushed + 1) & _INDEX
        if self._log is not None:
            self._mark_written(written)

    def pending(self) -> Pending:
        """Return what was pushed and is not visible yet; it is in the used ring."""
        return Pending(self._published, (self._pushed - self._published) & _INDEX, [])

    def _expose(self) -> None:
        old, new = self._published, self._pushed
        if old == new:
            return
        self._record(old, (new - old) & _INDEX)
        if WEAKLY_ORDERED:  # 2.7.14: elements before the index that makes them visible
            fence.full()
        self._used[1] = new
        self._published = new
        self._unasked += (new - old) & _INDEX
        if self._log_used is not None:
            first = old % self.size
            until = first + (new - old & _INDEX)
            self._mark_own(self._log_used + 4 + 8 * first, 8 * (min(until, self.size) - first))
            self._mark_own(self._log_used + 4, 8 * (until - self.size))
            self._mark_own(self._log_used + 2, 2)

    def _asks_for_call(self) -> bool:
        if self._event_idx:
            event = self._avail[self._used_event_at]
            return (self._published - event - 1) & _INDEX < self._unasked
        return not self._avail[0] & _NO_INTERRUPT

    def want_kicks(self) -> bool:
        """Ask the guest to kick at its next buffer; return whether there already is one."""
        if self._event_idx:
            self._used[self._avail_event_at] = self._next
        else:
            self._used[0] = 0
        if self._log_used is not None:
            self._mark_own(self._log_used + (2 * self._avail_event_at if self._event_idx else 0), 2)
        fence.full()  # 2.7.10.1: the wish before the last look
        return self._avail[1] != self._next

    def refuse_kicks(self) -> None:
        """Ask the guest not to kick.

        With EVENT_IDX nothing is to be done: the index asked for falls behind by itself.
        """
        if not self._event_idx:
            self._used[0] = _NO_NOTIFY
            if self._log_used is not None:
                self._mark_own(self._log_used, 2)

    def _own_words(self, used_addr: int) -> list[tuple[int, int]]:
        return [(used_addr, 4 + 8 * self.size + (2 if self._event_idx else 0))]
