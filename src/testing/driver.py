"""What the driver sides of both ring formats have in common: chains, and how they come and go."""

from __future__ import annotations

import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .memory import GuestMemory

DESC_F_NEXT = 1
DESC_F_WRITE = 2
DESC_F_INDIRECT = 4

_INDEX = 0xFFFF

_fence_lock = threading.Lock()


def fence() -> None:
    """Order every load and store before it against every one after it.

    Taking and giving a lock is an atomic read-modify-write each: on x86 a locked instruction, a
    full barrier; on ARM64 a store-release after which comes a load-acquire of the same word, which
    no other access passes in either direction.
    """
    _fence_lock.acquire()
    _fence_lock.release()
    _fence_lock.acquire()
    _fence_lock.release()


def need_event(event: int, new: int, old: int) -> bool:
    """Tell whether moving an index from `old` to `new` passes `event` (section 2.7.10)."""
    return (new - event - 1) & _INDEX < (new - old) & _INDEX


class Buffer(NamedTuple):
    """One element of a chain, as its descriptor says: guest address and size in bytes."""

    addr: int
    size: int
    writable: bool


@dataclass(slots=True, eq=False)
class Chain:
    """A descriptor chain the device has not used yet, or has just used.

    `head` is what the device returns it by: the first descriptor's index in a split ring, the
    buffer id in a packed one. `descriptors` are the ring's own, in order; `owned` is memory to free
    once it is used.
    """

    head: int
    buffers: tuple[Buffer, ...]
    descriptors: tuple[int, ...]
    owned: tuple[int, ...] = ()


class Used(NamedTuple):
    """A chain the device returned: the length it wrote in the used element, and what is there.

    `data` is at most as long as the chain's writable buffers, whatever `length` says.
    """

    chain: Chain
    length: int
    data: bytes


class RingDriver(ABC):
    """One virtqueue's driver, whatever the ring's format.

    `desc_addr`, `avail_addr` and `used_addr` are the guest addresses of its three parts, as
    SET_VRING_ADDR has them. `pending` has the chains in flight by their `head`, oldest first.
    With `in_order` (IN_ORDER), the device may return a batch of chains by its last one alone.

    Not for two threads at once.
    """

    desc_addr: int
    avail_addr: int
    used_addr: int

    def __init__(self, memory: GuestMemory, size: int, *, event_idx: bool, in_order: bool) -> None:
        self.memory = memory
        self.size = size
        self.event_idx = event_idx
        self.in_order = in_order
        self.pending: dict[int, Chain] = {}

    @abstractmethod
    def reset(self) -> None:
        """Make the ring as new, as after a reboot: nothing offered, nothing used."""

    @abstractmethod
    def set_features(self, features: int) -> None:
        """Go by the features that were negotiated; before the ring is used, or after `reset`.

        Raises ValueError when they are for rings of the other format.
        """

    @property
    @abstractmethod
    def base(self) -> int:
        """What SET_VRING_BASE says when this ring is started, again or for the first time."""

    # Offering buffers.

    @property
    @abstractmethod
    def free(self) -> int:
        """How many descriptors are free."""

    def add(
        self,
        readable: Iterable[bytes | bytearray | memoryview] = (),
        writable: Iterable[int] = (),
        *,
        indirect: bool = False,
    ) -> Chain:
        """Offer one chain: `readable` bytes first, then `writable` room, a descriptor for each.

        The device sees it at the next `publish`. The memory is allocated, and freed when the chain
        is reaped. Raises RingFullError or MemoryError, and then changes nothing.
        """
        buffers: list[Buffer] = []
        try:
            for data in readable:
                size = len(data)
                addr = self.memory.alloc(max(size, 1))
                buffers.append(Buffer(addr, size, False))
                self.memory.write(addr, data)
            for size in writable:
                buffers.append(Buffer(self.memory.alloc(max(size, 1)), size, True))
            chain = self.add_buffers(buffers, indirect=indirect)
        except BaseException:
            for buffer in buffers:
                self.memory.free(buffer.addr)
            raise
        chain.owned += tuple(buffer.addr for buffer in buffers)
        return chain

    @abstractmethod
    def add_buffers(self, buffers: Sequence[Buffer], *, indirect: bool = False) -> Chain:
        """Offer one chain of the caller's own buffers, which stay the caller's.

        Nothing is checked, so any order of readable and writable goes. Raises RingFullError, and
        then changes nothing.
        """

    @abstractmethod
    def publish(self) -> None:
        """Let the device see every chain offered so far."""

    @abstractmethod
    def kick_needed(self) -> bool:
        """Tell, once, whether the device wants to be told of what was published."""

    # Taking them back.

    @property
    def in_flight(self) -> int:
        """How many chains were offered and not reaped."""
        return len(self.pending)

    @abstractmethod
    def has_used(self) -> bool:
        """Tell whether there is a chain to reap."""

    @abstractmethod
    def reap(self) -> list[Used]:
        """Return the chains used since the last call, in the device's order.

        Raises DeviceError when the device returns what it was not given.
        """

    @abstractmethod
    def enable_calls(self) -> bool:
        """Ask to be called when the next chain is used.

        Return True when one was used meanwhile, so that no call may come: reap it.
        """

    @abstractmethod
    def disable_calls(self) -> None:
        """Ask not to be called, as far as that can be said."""

    # For both formats.

    def _table(self, entries: Iterable[tuple[int, int, int, int]]) -> tuple[int, int]:
        """Write descriptors, 16 bytes each, into fresh memory; return its address and size."""
        data = b"".join(_DESC.pack(*entry) for entry in entries)
        addr = self.memory.alloc(len(data))
        self.memory.write(addr, data)
        return addr, len(data)

    def _batch(self, head: int, pending: dict[int, Chain]) -> list[Chain]:
        """Return the chain the device named and, with IN_ORDER, all those offered before it.

        Raises KeyError when no such chain is pending.
        """
        named = pending[head]
        batch = [named]
        if self.in_order:
            batch = []
            for chain in pending.values():
                batch.append(chain)
                if chain is named:
                    break
        return batch

    def _returned(self, head: int, length: int) -> list[Used]:
        """Take back what the device returned by `head`; see `_batch`.

        Those it did not name are "assumed to have been used completely" (2.7.9 and 2.8.9).
        """
        batch = self._batch(head, self.pending)
        done = []
        for chain in batch:
            written = sum(buffer.size for buffer in chain.buffers if buffer.writable)
            if chain is batch[-1]:
                written = length
            done.append(Used(chain, written, self._written(chain, written)))
            del self.pending[chain.head]
            self._give_back(chain)
        return done

    def _written(self, chain: Chain, length: int) -> bytes:
        parts = []
        for buffer in chain.buffers:
            if buffer.writable and length > 0:
                parts.append(self.memory.read(buffer.addr, min(buffer.size, length)))
                length -= buffer.size
        return b"".join(parts)

    def _give_back(self, chain: Chain) -> None:
        for addr in chain.owned:
            self.memory.free(addr)


_DESC = struct.Struct("<QIHH")
