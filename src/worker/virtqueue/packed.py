"""The packed ring, device side (VIRTIO 1.2, section 2.8).

One ring of descriptors that both sides write: the driver makes an entry available, this side stores
a used descriptor over the first one of each chain. Whose an entry is, its AVAIL and USED flags say,
against a wrap counter that changes with each lap. Two words of 32 bits say who wants notifications.

Seen through casts made once, as in `split`: each descriptor is two u64, so that flags, length and
id are read at once and a used descriptor appears at once.
"""

from __future__ import annotations

from typing import Any

from ...errors import GuestError, RefusedError
from ...journal import Input, Output
from ...ledger import MOST_PUSHES, Page, Pending
from . import fence
from .chain import DESC_SIZE, INDIRECT, NEXT, WRITE, Chain, ChainReader
from .fence import WEAKLY_ORDERED
from .memory import GuestMemory

_AVAIL = 1 << 7
_USED = 1 << 15
_LAP = _AVAIL | _USED

_EVENT_ENABLE = 0
_EVENT_DISABLE = 1
_EVENT_DESC = 2

_FLAGS = 7  # NEXT, WRITE and INDIRECT
_WRAP = 1 << 15
_ENTRY = _WRAP - 1
_INDEX = 0xFFFF
_LOW32 = 0xFFFFFFFF


class PackedQueue(ChainReader):
    """One running packed ring: `pop` buffers, `push` them back in order, `publish`.

    A chain's `head` is its buffer id, with the number of its descriptors in the bits from 16 up.
    What was pushed leaves no trace in the ring before it is published: it is in the ledger's page.
    """

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        desc: int,
        avail: int,
        used: int,
        *,
        base: int,
        page: Page,
        resume: Pending | None,
        **options: Any,
    ) -> None:
        """Place a ring of `size` descriptors at the frontend address `desc`.

        `avail` and `used` are those of the driver's and the device's event suppression. `base` is
        what SET_VRING_BASE said; its used half counts, since buffers are completed in order here:
        everything before it is done and everything after it is not. Raises RefusedError when an
        area is misaligned or not within one memory region, or `base` names no entry of the ring.
        """
        if desc % 16 or avail % 4 or used % 4:
            raise RefusedError(
                f"a ring is misaligned: descriptors {desc:#x}, events {avail:#x} and {used:#x}"
            )
        super().__init__(memory, size, page=page, resumed=resume is not None, **options)
        words = memory.user(desc, DESC_SIZE * size).cast("Q")
        self._desc = words
        self._desc_addr = memory.guest_addr(desc)
        self._driver_event = memory.user(avail, 4).cast("I")
        self._device_event = memory.user(used, 4).cast("I")
        self._heads, self._lengths = page.heads, page.lengths
        start = base >> 16 if resume is None else resume.begin
        if resume is None and start == 0 and not any(word >> 48 & _USED for word in words[1::2]):
            # After a lap some entry has USED set, the first one of a chain that was used on it. So
            # this ring is fresh, and somebody knows of no wrap counters (Linux says 0 of any fresh
            # ring in User Mode Linux).
            start = _WRAP
        if start & _ENTRY >= size:
            raise RefusedError(f"a packed ring of {size} entries cannot go on at {base:#x}")
        self._go_on(start, resume)

    def _begin(self, next_: int, used: int) -> None:
        """Go on at these places, each an entry and in bit 15 its wrap counter."""
        self._next = next_ & _ENTRY  # the entry to pop next
        self._lap = _AVAIL if next_ & _WRAP else _USED  # an available entry's flags there
        self._used = used & _ENTRY  # the entry to use next
        self._used_lap = _LAP if used & _WRAP else 0  # a used entry's flags there
        self._pushed = 0  # so many of `_heads` and `_lengths` are not published

    def _go_on(self, place: int, resume: Pending | None) -> None:
        """Begin there, after what a predecessor pushed, which the guest sees from now on."""
        self._begin(place, place)
        if resume is not None:
            if sum([head >> 16 for head, _ in resume.pushes]) > self.size:
                raise RefusedError(f"more was pushed than a ring of {self.size} entries can hold")
            for at, (head, written) in enumerate(resume.pushes):
                self._heads[at], self._lengths[at] = head, written
            self._pushed = len(resume.pushes)
            place = self._end()
            if PackedQueue.ready(self):  # the first of them is still as it was when it was popped
                self._expose()
                self._unasked = 0
            self._begin(place, place)
        self._record(place, 0)

    def _end(self) -> int:
        """Return the place after what was pushed."""
        skipped = sum([head >> 16 for head in self._heads[: self._pushed]])
        laps, at = divmod(self._used + skipped, self.size)
        return at | (_WRAP if bool(self._used_lap) != bool(laps & 1) else 0)

    @property
    def index(self) -> int:
        """Where the ring goes on, in both halves: what is not used yet will be popped again."""
        place = self._used | (_WRAP if self._used_lap else 0)
        return place | place << 16

    @property
    def fresh(self) -> bool:
        """Whether the ring is new: nothing was used yet.

        It is at this place again every two laps, but then its last entry shows it: nothing zeroes
        an entry of a running ring. Only a ring that is full by then looks like one just filled.
        """
        if self._used or not self._used_lap:
            return False
        addr, word = self._desc[2 * self.size - 2], self._desc[2 * self.size - 1]
        return not (addr or word) or word >> 48 & _LAP == _AVAIL

    def ready(self) -> bool:
        """Say whether `pop` has something to look at."""
        return self._desc[2 * self._next + 1] >> 48 & _LAP == self._lap

    def pop(self) -> Chain | None:
        """Return the next buffer, or None when the guest has given no more.

        Raises GuestError when the chain is not what the specification allows; the queue can then
        only be stopped.
        """
        at = self._next
        word = self._desc[2 * at + 1]
        flags = word >> 48
        if flags & _LAP != self._lap:
            return None
        if WEAKLY_ORDERED:  # 2.8.21.1: the rest may be read only after the flags
            fence.full()
            word = self._desc[2 * at + 1] & ~(_INDEX << 48) | flags << 48
        addr = self._desc[2 * at]
        size = word & _LOW32
        if flags & _FLAGS != self._direction or not 0 < size <= self._inline:
            chain = self._walk(self._gather(addr, word))
            count = chain.head >> 16
        else:
            chain = Chain(word >> 32 & _INDEX | 1 << 16, size, self._spans(addr, size))
            count = 1
        at += count
        if at >= self.size:
            at -= self.size
            self._lap ^= _LAP
        self._next = at
        return chain

    def _gather(self, addr: int, word: int) -> list[tuple[int, int]]:
        """Return copies of a chain's descriptors; the first is given, and is available."""
        entries = [(addr, word)]
        at, lap = self._next, self._lap
        while word >> 48 & NEXT:
            if len(entries) == self.size:
                raise GuestError("a descriptor chain has a loop")
            at += 1
            if at == self.size:
                at = 0
                lap ^= _LAP
            word = self._desc[2 * at + 1]
            if word >> 48 & _LAP != lap:
                raise GuestError("a descriptor chain goes on where nothing is available")
            entries.append((self._desc[2 * at], word))
        return entries

    def _walk(self, entries: list[tuple[int, int]]) -> Chain:
        """Return the chain of these descriptors, two words each."""
        addr, word = entries[-1]
        head = word >> 32 & _INDEX | len(entries) << 16
        if entries[0][1] >> 48 & INDIRECT:
            # 2.8.7: WRITE is ignored here, and in the table everything else is.
            table = self._table(addr, word & _LOW32, len(entries) == 1)
            entries = [(table[at], table[at + 1]) for at in range(0, len(table), 2)]
        if any(word >> 48 & INDIRECT for _, word in entries):
            raise GuestError("an indirect descriptor where none can be")
        return self._chain(head, [(addr, word & _LOW32, word >> 48) for addr, word in entries])

    def _move_direct(self, output: Output, most: int, limit: int) -> int:
        """See `ChainReader._move_direct`."""
        desc, heads, lengths, size = self._desc, self._heads, self._lengths, self.size
        source, start, room = self._bytes, self._start, self._room
        largest = min(self._inline, output.size)
        next_, lap, pushed = self._next, self._lap, self._pushed
        most = min(most, size - pushed, MOST_PUSHES - 1 - pushed)
        moved = 0
        while moved < most:
            word = desc[2 * next_ + 1]
            flags = word >> 48
            if flags & _LAP != lap or flags & _FLAGS:
                break
            if WEAKLY_ORDERED:  # as in `pop`
                fence.full()
                word = desc[2 * next_ + 1]
            count = word & _LOW32
            at = desc[2 * next_] - start
            if not 0 < count <= largest or at < 0 or at > room - count:
                break
            if output.head + count > limit:
                self.held = count
                break
            output.append_from(source, at, count)
            heads[pushed] = word >> 32 & _INDEX | 1 << 16
            lengths[pushed] = 0
            pushed += 1
            next_ += 1
            if next_ == size:
                next_ = 0
                lap ^= _LAP
            moved += 1
        self._next, self._lap, self._pushed = next_, lap, pushed
        return moved

    def unpop(self, head: int) -> None:
        """Put the chain popped last, `head`, back; again and again, until the one pushed last."""
        self._next -= head >> 16
        if self._next < 0:
            self._next += self.size
            self._lap ^= _LAP
        if self._noted:
            self._noted.pop()

    def push(self, head: int, written: int) -> None:
        """Complete the oldest popped chain, `head`, with `written` bytes; not visible yet."""
        if self._pushed == self.size:  # it made entries available again that it was not given back
            raise GuestError(f"more buffers than the {self.size} descriptors can make")
        self._heads[self._pushed] = head
        self._lengths[self._pushed] = written
        self._pushed += 1
        if self._log is not None:
            self._mark_written(written)
        if self._pushed == MOST_PUSHES:
            self._expose()

    def keep(self, page: Page | None, stream: Output | Input | None) -> None:
        """See `ChainReader.keep`."""
        page = page or Page()
        self._heads, self._lengths = page.heads, page.lengths
        super().keep(page, stream)

    def pending(self) -> Pending:
        """Return what was pushed and is not visible yet."""
        heads, lengths = self._heads[: self._pushed], self._lengths[: self._pushed]
        pushes = [*zip(heads, lengths, strict=True)]
        return Pending(self.index >> 16, self._pushed, pushes)

    def _expose(self) -> None:
        if not self._pushed:
            return
        desc, size, at, lap = self._desc, self.size, self._used, self._used_lap
        self._record(at | lap & _WRAP, self._pushed)
        first = 0
        skipped = 0
        for index in range(self._pushed):
            head, written = self._heads[index], self._lengths[index]
            word = written | (head & _INDEX) << 32 | lap << 48
            if written:
                word |= WRITE << 48
            if index:
                desc[2 * at + 1] = word
            else:
                first = word
            count = head >> 16
            skipped += count
            at += count
            if at >= size:
                at -= size
                lap ^= _LAP
        if WEAKLY_ORDERED:  # 2.8.12: the guest looks at the others once it saw the first
            fence.full()
        desc[2 * self._used + 1] = first
        # From here on the pushes can be overwritten.
        self._word[0] = self._word[0] & ~_LOW32 | (at | lap & _WRAP) << 16
        if self._log_used is not None:
            self._mark_used()
        self._pushed = 0
        self._used, self._used_lap = at, lap
        self._unasked += skipped

    def _asks_for_call(self) -> bool:
        event = self._driver_event[0]
        mode = event >> 16 & 3
        if mode != _EVENT_DESC or not self._event_idx:
            return mode != _EVENT_DISABLE
        wanted = event & _ENTRY
        if event & _WRAP != self._used_lap & _WRAP:
            wanted -= self.size
        return (self._used - wanted - 1) & _INDEX < self._unasked

    def want_kicks(self) -> bool:
        """Ask the guest to kick at its next buffer; return whether there already is one."""
        if self._event_idx:
            wrap = _WRAP if self._lap == _AVAIL else 0
            self._device_event[0] = self._next | wrap | _EVENT_DESC << 16
        else:
            self._device_event[0] = _EVENT_ENABLE << 16
        if self._log_used is not None:
            self._mark_own(self._log_used, 4)
        fence.full()  # 2.8.10: the wish before the last look
        return self.ready()

    def refuse_kicks(self) -> None:
        """Ask the guest not to kick."""
        self._device_event[0] = _EVENT_DISABLE << 16
        if self._log_used is not None:
            self._mark_own(self._log_used, 4)

    def _mark_used(self) -> None:
        """Mark the descriptors about to be used; SET_VRING_ADDR gives no log address for these."""
        at = self._used
        for head in self._heads[: self._pushed]:
            self._mark_own(self._desc_addr + DESC_SIZE * at, DESC_SIZE)
            at = (at + (head >> 16)) % self.size

    def _own_words(self, used_addr: int) -> list[tuple[int, int]]:
        return [(used_addr, 4), (self._desc_addr, DESC_SIZE * self.size)]
