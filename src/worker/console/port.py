"""One port: the guest's buffers on one side, a journal on the other.

Output is appended to the journal and the buffer returned at once, whoever watches. Only when the
journal is full of bytes that the port's *holder* has not taken is the buffer kept: the holder is
the reader that has been here longest and is not stuck. One that takes nothing for the stall limit
is stuck until it has caught up; the oldest bytes give way meanwhile, and it finds a gap.

A *blocking* port never lets bytes give way that nobody has taken: its holder is the reader that has
been here longest, stuck or not, and the journal itself while nobody is here. Only a console's guest
does not wait for an absent reader, since Linux' hvc would spin until one comes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

from ...errors import GuestError
from ...journal import Input, Output, Reader

#: Reads what a client has typed into these spans, as `backends.base.Client.read` does.
Read = Callable[[list[memoryview]], int | None]

#: Buffers of the guest's that one read may fill.
_MOST_AT_ONCE = 64

#: Spans that the system fills in one read (readv(2), IOV_MAX).
_MOST_SPANS = 1024

#: No read came to be.
_UNREAD = -1

#: A read that is under way is one word: where its bytes go in two bits (0: none is under way), who
#: typed them in eight, and the low bits of the offset at which they begin. The next word is, once
#: the read has returned, how many they are and 1.
TO_RING, TO_GUEST = 1, 2
_WHO_AT, _OFFSET_AT = 2, 10
_WHO, _OFFSET = (1 << 8) - 1, (1 << 54) - 1

#: More than any offset.
_NO_LIMIT = (1 << 63) - 1


class Chain(Protocol):
    """A guest's buffer: `head` names it, its `size` bytes are `spans`."""

    head: int
    size: int
    spans: list[memoryview]


class Queue(Protocol):
    """A virtqueue, whatever its format; see `virtqueue.ring`."""

    def pop(self) -> Chain | None:
        """Return the guest's next buffer, None when there is none; may raise GuestError."""

    @property
    def held(self) -> int:
        """The size of the buffer that `take` left for want of room, 0 for none."""

    def take(self, output: Output, most: int, limit: int, linger_ns: int) -> int:
        """Move up to `most` buffers into `output`, up to offset `limit`; may raise GuestError."""

    def unpop(self, head: int) -> None:
        """Put the buffer popped last, `head`, back; again and again, until the one pushed last."""

    def push(self, head: int, written: int) -> None:
        """Complete the oldest buffer popped."""


class Inlet(NamedTuple):
    """The way of input straight into the guest's buffers: while their `ring` runs and is enabled.

    `open` says whether the guest would keep input now; `serve` calls a function that completes
    buffers and returns how many, and lets the guest see them at once.
    """

    ring: Queue
    open: Callable[[], bool]
    serve: Callable[[Callable[[], int]], None]


class UnderWay(NamedTuple):
    """A read that was not finished: whose, where its bytes go (`TO_RING`, `TO_GUEST`), from where.

    `known` is how many there are, None if it had not returned.
    """

    who: int
    way: int
    offset: int
    known: int | None

    @classmethod
    def of(cls, words: memoryview) -> UnderWay | None:
        """Return what a port's `under_way` says, None for nothing."""
        word, known = words
        count = known - 1 if known else None
        way = word & (1 << _WHO_AT) - 1
        return cls(word >> _WHO_AT & _WHO, way, word >> _OFFSET_AT, count) if way else None


class Log(Protocol):
    """A file that gets all output; see `backends.log`."""

    @property
    def limit(self) -> int:
        """The offset that output may not pass before `flush`, lest bytes give way."""

    @property
    def missed(self) -> int:
        """How many bytes gave way before they were written."""

    def begin_at(self, offset: int) -> None:
        """Go on there with an output that is still empty, and about to begin there."""

    def urge(self) -> bool:
        """Write all that is there; return whether some of it was written."""


class Watcher(Reader):
    """A reader of a port's output, since it `joined` at that offset.

    `stuck` while it has shown that it does not read. One that only `looks` is none of the port's
    `watchers`: nothing waits for it, and what it has read nobody has seen. `jumped` hears when it
    is put elsewhere.
    """

    stuck = False
    joined = 0
    looks = False
    jumped: Callable[[], None] | None = None

    def jump(self, offset: int) -> None:
        """Go on at `offset`, whatever lies between."""
        self.offset = offset
        if self.jumped is not None:
            self.jumped()


class Port:
    """One port of the console: `opened` says whether a program in the guest has it open.

    `attended` says whether a client is here, `holding` that a buffer of the guest's waits until the
    holder has read on. `size` is that of the terminal at the port, in columns and rows, (0, 0)
    where it is not known, and `size_by` names who decided it.
    Counters are in bytes: `discarded` what the guest wrote to a disabled queue, `missed` what
    readers that are gone were skipped over; `stalls` counts readers found stuck. `inlet` is there
    while the guest can be given input, and `log` where there is one: output waits for it too.

    A successor of a killed worker goes on with the same `spare` memory, of the output ring's size,
    and the same two words `under_way`; it has to be told `opened`, `size` and `left`: how many
    bytes the guest wrote last of all and nobody took, in a ring that was stopped.
    """

    def __init__(
        self,
        port_id: int,
        name: str,
        output: Output,
        input_: Input,
        *,
        console: bool,
        blocking: bool = False,
        spare: memoryview | None = None,
    ) -> None:
        self.id = port_id
        self.name = name
        self.console = console
        self.blocking = blocking
        self.output = output
        self.input = input_
        self.inlet: Inlet | None = None
        self.opened = False
        self.attended = False
        self.holding = False
        self.watchers: list[Watcher] = []
        self._lookers: list[Watcher] = []
        self.size = (0, 0)
        self.size_by = ""
        self.discarded = 0
        self.stalls = 0
        self._missed = 0
        self._share = 1  # buffers that the next read may fill
        self._received: int | None = None  # what the last one returned
        self.log: Log | None = None
        self.under_way = memoryview(bytearray(16)).cast("Q")
        self.left = 0
        self._spare = spare  # the last of those, by their number: a ring

    @property
    def missed(self) -> int:
        """Bytes that some reader was skipped over, each gap counted for everyone who met it.

        So is the one that a reader will meet when it reads on.
        """
        tail = self.output.tail
        logged = 0 if self.log is None else self.log.missed
        return (
            self._missed
            + logged
            + sum(watcher.missed + max(0, tail - watcher.offset) for watcher in self.watchers)
        )

    @property
    def host_open(self) -> bool:
        """Whether the guest is to see this side open: what a departed client typed counts too."""
        return self.console or self.attended or (self.opened and len(self.input) > 0)

    def attach(self, at: int | None = None, *, looks: bool = False) -> Watcher:
        """Return a new reader: what nobody has seen yet is the first one's, others join live.

        At a blocking port they join where the first one is: it may leave what it did not take.
        Whoever asks for another place joins `at` that offset, but passes nothing over there.
        """
        if not self.watchers:
            start = self.output.seen
        elif self.blocking:
            start = self.watchers[0].offset
        else:
            start = self.output.head
        if at is not None:
            start = min(at, start) if self.blocking and not looks else at
        return self.go_on(start, start, looks=looks)

    def go_on(self, offset: int, joined: int, *, looks: bool = False) -> Watcher:
        """Return the reader, the next in line, that a killed worker had at `offset`."""
        watcher = Watcher(self.output, offset)
        watcher.joined = joined
        watcher.looks = looks
        (self._lookers if looks else self.watchers).append(watcher)
        return watcher

    def resumed(self) -> None:
        """Go on with those readers, now that it is known which of the output counts.

        What they missed, or are to find missing by now, was counted before.
        """
        output = self.output
        for watcher in self.watchers + self._lookers:
            if watcher.offset > output.head:
                watcher.jump(output.head)
        for watcher in self.watchers:
            output.seen = max(output.seen, watcher.offset)
            self._missed -= max(0, output.tail - watcher.offset)

    def took(self, watcher: Watcher, count: int) -> None:
        """Move a reader on by `count` bytes that its client has taken."""
        watcher.advance(count)
        if watcher.offset > self.output.seen and not watcher.looks:
            self.output.seen = watcher.offset
        if not watcher.pending:
            watcher.stuck = False

    def detach(self, watcher: Watcher, undelivered: int) -> None:
        """Let a reader go; `undelivered` bytes it took are known not to have arrived.

        If nobody else has read as far, the next first reader gets them again.
        """
        if watcher.looks:
            self._lookers.remove(watcher)
            return
        self.watchers.remove(watcher)
        self._missed += watcher.missed
        left = watcher.offset - undelivered
        if self.watchers:
            # What the others joined too late for is seen by nobody any more, and the gap before
            # this one is met by nobody; a last one leaves it to the next to come.
            joined = min(other.joined for other in self.watchers)
            self._missed += max(0, joined - left)
            self._missed += max(0, self.output.tail - max(watcher.offset, joined))
        if watcher.offset == self.output.seen:
            others = (other.offset for other in self.watchers)
            self.output.seen = max(left, *others, 0)

    def stall(self) -> None:
        """Count the holder as stuck: it kept the guest waiting for the whole stall limit."""
        holder = self.holder
        if holder is not None and not holder.stuck:
            holder.stuck = True
            self.stalls += 1

    @property
    def holder(self) -> Watcher | None:
        """The reader whose pace a full journal keeps, if any."""
        for watcher in self.watchers:
            if self.blocking or not watcher.stuck:
                return watcher
        return None

    def _limit(self) -> int:
        """Return the offset that output may not pass for now; there is none where the oldest go."""
        limit = _NO_LIMIT if self.log is None else self.log.limit
        holder = self.holder
        if holder is not None:
            return min(limit, holder.offset + self.output.size)
        if self.blocking and not self.console:
            return min(limit, self.output.seen + self.output.size)
        return limit

    def adopt_output(self, seen: int, head: int, data: bytes) -> None:
        """Go on with the output of a guest that moved here: nobody has seen it from `seen` on.

        `data` is what is left of it, up to `head`; there is room. The guest's offsets go on too,
        where this port has put nothing out before.
        """
        start = head - len(data)
        if not self.output.head:
            if self.log is not None:
                self.log.begin_at(start)
            self.output.begin_at(start)
            self.output.seen = seen
            for watcher in self.watchers + self._lookers:
                watcher.jump(seen)
        else:
            self._missed += start - seen
        self.output.append(data)
        self.output.commit()

    def adopt_input(self, tail: int, data: bytes) -> None:
        """Go on with input that a guest which moved here had not taken, before what waits here."""
        later = self.input.copy()
        self.input.consume(len(later))
        if not self.input.head:
            self.input.begin_at(tail)
        self.input.feed(data)
        self.input.feed(later)

    def take_rest(self, queue: Queue) -> None:
        """Take what is held, since the guest will not wait: the oldest bytes give way.

        A blocking port keeps those, and counts what it cannot take. Raises GuestError as `queue`
        does.
        """
        while self.holding and (chain := queue.pop()) is not None:
            if self.blocking:
                self.discarded += chain.size
                continue
            if self.log is not None:
                self.log.urge()
            for span in chain.spans:
                self.output.append(span)
            self.output.commit()
            queue.push(chain.head, 0)
        self.holding = False

    def remember(self, queue: Queue) -> None:
        """Copy what is held in a ring that stops; it counts if the guest never comes back for it.

        Raises GuestError as `queue` does.
        """
        while self.holding and (chain := queue.pop()) is not None:
            if self.blocking:
                self.left += chain.size
                continue
            for span in chain.spans:
                self._keep(span)
        self.holding = False

    def _keep(self, data: memoryview) -> None:
        if self._spare is None:
            self._spare = memoryview(bytearray(self.output.size))
        at = self.left % len(self._spare)
        first, rest = data[: len(self._spare) - at], data[len(self._spare) - at :]
        self._spare[at : at + len(first)] = first
        self._spare[: len(rest)] = rest
        self.left += len(data)

    def come_back(self) -> None:
        """Drop what was remembered: the guest goes on, here or elsewhere."""
        self.left = 0

    def stay_away(self) -> None:
        """Take what was remembered as `take_rest` does: the guest is gone for good."""
        if self._spare is None or self.blocking:
            self.discarded += self.left
        elif self.left:
            if self.log is not None:
                self.log.urge()
            size = len(self._spare)
            kept = min(self.left, size)
            start = (self.left - kept) % size
            self.output.append(self._spare[start : start + kept])
            self.output.append(self._spare[: max(0, start + kept - size)])
            self.output.commit()
            self.discarded += self.left - kept
        self.come_back()

    def forget(self) -> None:
        """Give up all that waits in both directions: it has gone where the guest went."""
        for watcher in self.watchers:
            watcher.jump(self.output.head)
        self.output.seen = self.output.head
        self.input.consume(len(self.input))

    def take_output(self, queue: Queue, most: int, linger_ns: int = 0) -> int:
        """Move up to `most` buffers of the guest's into the journal; return how many.

        Stops early, `holding`, when the journal has no room for the next one that the holder can
        spare, and otherwise looks for `linger_ns` for more. Raises GuestError as `queue` does.
        """
        self.holding = False
        taken = queue.take(self.output, most, self._limit(), linger_ns)
        self.holding = queue.held > 0
        return taken

    def receive(self, read: Read, who: int = 0) -> int | None:
        """Have a client's bytes read, and return what `read` does; the input ring must have room.

        They go straight into the guest's buffers, which the guest then sees, while nothing is
        before them in the input ring and there are such buffers; else into the ring. `under_way`
        tells where, and that client number `who` typed them, until the caller has counted them and
        clears it.
        """
        waiting, inlet = self.input, self.inlet
        if inlet is not None and waiting.head == waiting.tail and (self.opened or inlet.open()):
            self._received = _UNREAD
            inlet.serve(partial(self._receive, inlet.ring, read, who))
            if self._received != _UNREAD:
                return self._received
        self.under_way[1] = 0
        self.under_way[0] = (waiting.head & _OFFSET) << _OFFSET_AT | who << _WHO_AT | TO_RING
        count = read([waiting.room()])
        self.under_way[1] = (count or 0) + 1
        if count:
            waiting.fed(count)
        return count

    def _receive(self, queue: Queue, read: Read, who: int) -> int:
        """Have bytes read into the guest's buffers; return how many are completed."""
        chains: list[Chain] = []
        spans: list[memoryview] = []
        try:
            while len(chains) < self._share and len(spans) < _MOST_SPANS:
                chain = queue.pop()
                if chain is None:
                    break
                chains.append(chain)
                spans += chain.spans
        except GuestError:
            if not chains:
                raise
            # The next read meets it; these are good.
        if not chains:
            return 0
        count: int | None = None
        used = 0
        at = self.input.tail & _OFFSET
        self.under_way[1] = 0
        self.under_way[0] = at << _OFFSET_AT | who << _WHO_AT | TO_GUEST
        try:
            # Buffers of no size would look like the end of the input.
            count = read(spans[:_MOST_SPANS]) if spans else None
        finally:
            left = count or 0
            self.under_way[1] = left + 1
            while used < len(chains) and (left > 0 or not spans):
                left -= chains[used].size
                used += 1
            for chain in reversed(chains[used:]):
                queue.unpop(chain.head)
        self._received = count
        filled = used == len(chains) and left == 0
        self._share = min(4 * used, _MOST_AT_ONCE) if filled else max(used, 1)
        self.input.bypass(count or 0)
        for chain in chains[:used]:
            last = chain is chains[used - 1]
            queue.push(chain.head, chain.size + left if last else chain.size)
        return used

    def finish(self, read: UnderWay, count: int) -> int:
        """Give the guest what a killed worker's last read brought, unless it has it already.

        The input must be back where it counts, and the inlet there if there is to be one. `count`
        are the bytes of that read; return how many of them are lost, in buffers that the guest has
        taken back.
        """
        input_ = self.input
        reached = input_.head if read.way == TO_RING else input_.tail
        count = max(0, count - (reached - read.offset & _OFFSET))
        if read.way == TO_RING:
            input_.fed(min(count, len(input_.room())))
            return 0
        self._received = 0
        if self.inlet is not None and count:
            self.inlet.serve(partial(self._finish, self.inlet.ring, count))
        return count - self._received

    def _finish(self, queue: Queue, count: int) -> int:
        """Complete the next buffers: the first `count` bytes are in them."""
        used: list[tuple[int, int]] = []
        left = count
        try:
            while left and (chain := queue.pop()) is not None:
                used.append((chain.head, min(left, chain.size)))
                left -= used[-1][1]
        except GuestError:
            if not used:
                raise
        self._received = count - left
        self.input.bypass(count - left)
        for head, written in used:
            queue.push(head, written)
        return len(used)

    def give_input(self, queue: Queue, most: int) -> int:
        """Move waiting input into up to `most` buffers of the guest's; return how many.

        They are pushed, not yet published. Raises GuestError as `queue` does.
        """
        given = 0
        waiting = self.input
        while given < most and len(waiting) and (chain := queue.pop()) is not None:
            written = 0
            for span in chain.spans:
                written += self._fill(span)
            queue.push(chain.head, written)
            given += 1
        return given

    def _fill(self, span: memoryview) -> int:
        filled = 0
        while filled < len(span) and (data := self.input.span()):
            count = min(len(span) - filled, len(data))
            span[filled : filled + count] = data[:count]
            self.input.consume(count)
            filled += count
        return filled


def discard(queue: Queue, most: int, port: Port | None) -> int:
    """Complete up to `most` buffers unread, counted as `port`'s if it has one; return how many."""
    taken = 0
    while taken < most and (chain := queue.pop()) is not None:
        if port is not None:
            port.discarded += chain.size
        queue.push(chain.head, 0)
        taken += 1
    return taken
