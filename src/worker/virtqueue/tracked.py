"""Rings that keep in an inflight area what they popped; a successor pops that again first."""

from __future__ import annotations

from collections import deque
from typing import Any

from ...errors import RefusedError
from ...ledger import Pending
from .chain import Chain
from .inflight import PackedState, SplitState
from .log import DirtyLog
from .packed import PackedQueue
from .split import SplitQueue

_AVAIL = 1 << 7
_WRAP = 1 << 15
_INDEX = 0xFFFF

# Parents are named where they are called by a method that tracked.pxd has: `super` is not compiled.


class TrackedSplitQueue(SplitQueue):
    """A split ring whose chains in flight are in `state`; the rest is as in `SplitQueue`."""

    def __init__(self, *place: Any, state: SplitState, **options: Any) -> None:
        super().__init__(*place, **options)
        _check(self.size, state)
        self._in_batches = False  # each one is kept in the area
        self._state = state
        waiting = (self._avail[1] - self._published) & _INDEX
        heads = state.recover(self._published, waiting, self.size)
        self._again = deque(heads)  # in flight in a predecessor, still to be popped
        self._next = self._known = (self._published + len(heads)) & _INDEX
        self._taken: list[bool] = []  # of what was popped since the last push: was it one of those
        self._batch: list[int] = []

    @property
    def index(self) -> int:
        """Where the ring goes on; what is in flight is in the area."""
        return self._next

    def ready(self) -> bool:
        """Say whether `pop` has something to look at."""
        return bool(self._again) or SplitQueue.ready(self)

    def pop(self) -> Chain | None:
        """Return the next buffer; see `SplitQueue.pop`."""
        if self._again:
            head = self._again[0]
            chain = self._walk(head, self._desc[2 * head], self._desc[2 * head + 1])
            self._taken.append(True)
            del self._again[0]
            return chain
        found = super().pop()
        if found is not None:
            self._state.fetched(found.head)
            self._taken.append(False)
        return found

    def unpop(self, head: int) -> None:
        """Put the chain popped last, `head`, back; again and again, until the one pushed last."""
        super().unpop(head)
        if self._taken.pop():
            self._next = (self._next + 1) & _INDEX
            self._again.appendleft(head)
        else:
            self._state.put_back(head)

    def push(self, head: int, written: int) -> None:
        """Complete the oldest popped chain, `head`, with `written` bytes; not visible yet."""
        self._taken.clear()
        self._state.completing(head)
        self._batch.append(head)
        super().push(head, written)

    def _expose(self) -> None:
        SplitQueue._expose(self)  # noqa: SLF001
        if self._batch:
            self._state.completed(self._batch, self._published)
            self._batch.clear()

    def want_kicks(self) -> bool:
        """Ask the guest to kick at its next buffer; return whether there already is one."""
        return super().want_kicks() or bool(self._again)


class TrackedPackedQueue(PackedQueue):
    """A packed ring whose chains in flight are in `state`; the rest is as in `PackedQueue`."""

    def __init__(self, *place: Any, state: PackedState, **options: Any) -> None:
        _check(place[1], state)
        self._state = state
        self._batch: list[int] = []
        super().__init__(*place, **options)
        self._in_batches = False  # each one is kept in the area
        self._inline = 0  # every chain's descriptors are kept: `_walk` sees them all
        self._open: deque[int] = deque()  # keys of what is popped and not pushed
        # Keys of what was popped since the last push, each with what `_again` had, if it had it.
        self._taken: list[tuple[int, tuple[int, list[tuple[int, int]]] | None]] = []
        self._walked: list[tuple[int, int]] = []

    def _go_on(self, place: int, resume: Pending | None) -> None:
        """Begin where the area says; see `PackedQueue._go_on`."""
        used, chains = self._state.recover(place, self._desc, self.size)
        if resume is None:
            place = used
        elif used == place:  # what was pushed is still in flight
            self._batch = [key for key, _ in chains[: resume.pushed]]
            del chains[: resume.pushed]
        super()._go_on(place, resume)
        place = super().index & _INDEX
        self._state.completed(self._batch, place)
        self._batch = []
        self._again = deque(chains)  # in flight in a predecessor, still to be popped
        at = (place & ~_WRAP) + sum(len(descriptors) for _, descriptors in chains)
        wrap = place & _WRAP
        if at >= self.size:
            at, wrap = at - self.size, wrap ^ _WRAP
        self._begin(at | wrap, place)

    @property
    def index(self) -> int:
        """Where the ring goes on; what is in flight is in the area."""
        available = self._next | (_WRAP if self._lap == _AVAIL else 0)
        return available | super().index & _INDEX << 16

    def log(self, log: DirtyLog | None, used_addr: int | None) -> None:
        """From now on, mark in `log` what is written for the guest; None: nowhere."""
        super().log(log, used_addr)
        self._inline = 0

    def ready(self) -> bool:
        """Say whether `pop` has something to look at."""
        return bool(self._again) or PackedQueue.ready(self)

    def _walk(self, entries: list[tuple[int, int]]) -> Chain:
        self._walked = entries
        return super()._walk(entries)

    def pop(self) -> Chain | None:
        """Return the next buffer; see `PackedQueue.pop`."""
        if self._again:
            key, descriptors = self._again[0]
            chain = self._walk(descriptors)
            self._taken.append((key, self._again.popleft()))
            self._open.append(key)
            return chain
        found = super().pop()
        if found is not None:
            key = self._state.fetched(self._walked)
            self._taken.append((key, None))
            self._open.append(key)
        return found

    def unpop(self, head: int) -> None:
        """Put the chain popped last, `head`, back; again and again, until the one pushed last."""
        key, again = self._taken.pop()
        self._open.pop()
        if again is None:
            super().unpop(head)
            self._state.put_back(key)
        else:
            if self._noted:
                self._noted.pop()
            self._again.appendleft(again)

    def push(self, head: int, written: int) -> None:
        """Complete the oldest popped chain, `head`, with `written` bytes; not visible yet."""
        self._taken.clear()
        self._batch.append(self._open.popleft())
        super().push(head, written)

    def _expose(self) -> None:
        if not self._pushed:
            return
        place = self._end()
        self._state.completing(self._batch, place)
        PackedQueue._expose(self)  # noqa: SLF001
        self._state.completed(self._batch, place)
        self._batch.clear()

    def want_kicks(self) -> bool:
        """Ask the guest to kick at its next buffer; return whether there already is one."""
        return super().want_kicks() or bool(self._again)


def _check(size: int, state: SplitState | PackedState) -> None:
    if size > state.size:
        raise RefusedError(
            f"an inflight area for rings of {state.size} entries cannot keep one of {size}"
        )
