"""A descriptor chain: one buffer of the guest's, in one or more pieces, and what may be one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence

from ...errors import GuestError, RefusedError
from .features import EVENT_IDX, INDIRECT_DESC
from .log import DirtyLog
from .memory import GuestMemory

NEXT = 1
WRITE = 2
INDIRECT = 4

DESC_SIZE = 16

#: Linux and QEMU allow indirect tables longer than the ring itself, up to this many entries.
_LONGEST_INDIRECT = 1024


class Chain:
    """One buffer: `head` names it to the ring, `spans` are its `size` bytes in order.

    Every queue of a console moves bytes one way, so all spans are readable or all are writable.
    """

    __slots__ = ("head", "size", "spans")

    def __init__(self, head: int, size: int, spans: list[memoryview]) -> None:
        self.head = head
        self.size = size
        self.spans = spans


class ChainReader(ABC):
    """What both ring formats have in common: which chains are allowed, which bytes were written.

    A ring's `pop` builds the commonest chain itself, one direct descriptor of the right direction
    with 1 to `_inline` bytes; for all others it gathers the pieces and calls `_chain`. While a
    dirty log is set, `_inline` leaves nothing to the short way, so that every piece is noted here.
    """

    def __init__(
        self, memory: GuestMemory, size: int, *, features: int, writable: bool, most_bytes: int
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
        self._log = log
        self._log_used = None if log is None else used_addr
        self._inline = self._most_bytes if log is None or not self._direction else 0
        self._noted.clear()

    @abstractmethod
    def _own_words(self, used_addr: int) -> list[tuple[int, int]]:
        """Return (guest address, size) of the areas that this side of the ring writes to."""

    def _mark_written(self, written: int) -> None:
        """Mark the first `written` bytes of the oldest chain popped."""
        if self._log is not None and self._noted:
            for addr, size in self._noted.popleft():
                self._log.mark(addr, min(size, written))
                written -= min(size, written)

    def _mark_own(self, addr: int, size: int) -> None:
        if self._log is not None:
            self._log.mark(addr, size)
