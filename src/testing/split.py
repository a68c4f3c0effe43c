"""The driver side of a split virtqueue (VIRTIO 1.2, section 2.7), with raw access to every byte."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .errors import DeviceError, RingFullError
from .features import Feature
from .memory import GuestMemory

DESC_F_NEXT = 1
DESC_F_WRITE = 2
DESC_F_INDIRECT = 4
AVAIL_F_NO_INTERRUPT = 1
USED_F_NO_NOTIFY = 1

_DESC = struct.Struct("<QIHH")
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

    `descriptors` are the ring's own, the head first; `owned` is memory to free once it is used.
    """

    head: int
    buffers: tuple[Buffer, ...]
    descriptors: tuple[int, ...]
    owned: tuple[int, ...] = ()


class Used(NamedTuple):
    """A chain the device returned: the length it wrote in used.len, and what is there.

    `data` is at most as long as the chain's writable buffers, whatever `length` says.
    """

    chain: Chain
    length: int
    data: bytes


class SplitDriver:
    """One virtqueue's driver.

    `size` is a power of two. Both indices begin at `start`, so a wrap-around is a few buffers
    away. `desc`, `avail` and `used` place the ring's parts at guest addresses of the caller's; by
    default they are allocated, each with the alignment section 2.7 asks for.

    Not for two threads at once.
    """

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        *,
        start: int = 0,
        event_idx: bool = False,
        desc: int | None = None,
        avail: int | None = None,
        used: int | None = None,
    ) -> None:
        self.memory = memory
        self.size = size
        self.event_idx = event_idx
        self.desc_addr = memory.alloc(16 * size, 16) if desc is None else desc
        self.avail_addr = memory.alloc(6 + 2 * size, 2) if avail is None else avail
        self.used_addr = memory.alloc(6 + 8 * size, 4) if used is None else used
        self._desc = memory.view(self.desc_addr, 16 * size, "Q")
        self._avail = memory.view(self.avail_addr, 6 + 2 * size, "H")
        self._used = memory.view(self.used_addr, 6 + 8 * size, "H")
        self._elements = memory.view(self.used_addr + 4, 8 * size, "I")
        self.pending: dict[int, Chain] = {}
        self.reset(start)

    def reset(self, start: int = 0) -> None:
        """Make the ring as new, as after a reboot: nothing offered, nothing used."""
        for chain in self.pending.values():
            self._give_back(chain)
        self.pending.clear()
        for view in (self._desc, self._avail, self._used):
            for at in range(len(view)):
                view[at] = 0
        self._free = list(range(self.size - 1, -1, -1))
        self._next = self._notified = self._reaped = start
        self._calls = True
        self.set_avail_idx(start)
        self._used[1] = start
        if self.event_idx:
            self.set_used_event(start)
            self._used[2 + 4 * self.size] = start

    def set_features(self, features: int) -> None:
        """Go by the features that were negotiated; before the ring is used, or after `reset`."""
        event_idx = bool(features & Feature.EVENT_IDX)
        if event_idx != self.event_idx:
            self.event_idx = event_idx
            self.set_used_event(self._reaped if event_idx else 0)
            self._used[2 + 4 * self.size] = self.avail_idx if event_idx else 0

    # Offering buffers.

    @property
    def free(self) -> int:
        """How many descriptors are free."""
        return len(self._free)

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
            return self._offer(buffers, indirect, None, [buffer.addr for buffer in buffers])
        except BaseException:
            for buffer in buffers:
                self.memory.free(buffer.addr)
            raise

    def add_buffers(
        self,
        buffers: Sequence[Buffer],
        *,
        indirect: bool = False,
        descriptors: Sequence[int] | None = None,
    ) -> Chain:
        """Offer one chain of the caller's own buffers, which stay the caller's.

        Nothing is checked, so any order of readable and writable goes. `descriptors` says which
        free ones to use, the head first. Raises RingFullError, and then changes nothing.
        """
        return self._offer(buffers, indirect, descriptors, [])

    def offer(self, head: int, *, buffers: Sequence[Buffer] = ()) -> Chain:
        """Offer descriptors written by hand, from `head` on; any number at all is taken.

        Descriptors written by hand are best taken from a ring without other chains.
        """
        chain = Chain(head, tuple(buffers), ())
        self._push(chain)
        return chain

    def _offer(
        self,
        buffers: Sequence[Buffer],
        indirect: bool,
        descriptors: Sequence[int] | None,
        owned: list[int],
    ) -> Chain:
        needed = 1 if indirect else len(buffers)
        if not needed:
            raise ValueError("a chain needs at least one buffer")
        if descriptors is None:
            if needed > len(self._free):
                raise RingFullError(
                    f"{needed} descriptors are needed, {len(self._free)} of {self.size} are free"
                )
            descriptors = self._free[: -needed - 1 : -1]
        elif len(descriptors) != needed or len(set(descriptors) & set(self._free)) != needed:
            raise RingFullError(f"descriptors {list(descriptors)} are not {needed} free ones")
        else:  # move them to where the next ones are taken from
            self._free = [index for index in self._free if index not in descriptors]
            self._free += reversed(descriptors)
        if indirect:
            table = self.memory.alloc(16 * len(buffers))
            owned = [*owned, table]
            last = len(buffers) - 1
            self.memory.write(
                table,
                b"".join(
                    _DESC.pack(
                        buffer.addr, buffer.size, _flags(buffer, at < last), (at + 1) * (at < last)
                    )
                    for at, buffer in enumerate(buffers)
                ),
            )
            self.write_desc(descriptors[0], table, 16 * len(buffers), DESC_F_INDIRECT)
        else:
            for at, buffer in enumerate(buffers):
                more = at + 1 < needed
                following = descriptors[at + 1] if more else 0
                flags = _flags(buffer, more)
                self.write_desc(descriptors[at], buffer.addr, buffer.size, flags, following)
        del self._free[-needed:]
        chain = Chain(descriptors[0], tuple(buffers), tuple(descriptors), tuple(owned))
        self._push(chain)
        return chain

    def _push(self, chain: Chain) -> None:
        self.set_avail_entry(self._next, chain.head)
        self._next = (self._next + 1) & _INDEX
        self.pending[chain.head] = chain

    def publish(self) -> None:
        """Let the device see every chain offered so far."""
        fence()  # section 2.7.13.3: descriptors and entries are visible before the index
        self._avail[1] = self._next

    def kick_needed(self) -> bool:
        """Tell, once, whether the device wants to be told of what was published (2.7.13.4)."""
        fence()  # the index is stored before the device's suppression word is loaded
        old, self._notified = self._notified, self._next
        if old == self._next:
            return False
        if self.event_idx:
            return need_event(self.avail_event, self._next, old)
        return not self.used_flags & USED_F_NO_NOTIFY

    # Taking them back.

    @property
    def in_flight(self) -> int:
        """How many chains were offered and not reaped."""
        return len(self.pending)

    def has_used(self) -> bool:
        """Tell whether there is a chain to reap."""
        return self._used[1] != self._reaped

    def reap(self) -> list[Used]:
        """Return the chains used since the last call, in the device's order.

        Raises DeviceError when the device returns what it was not given.
        """
        count = (self._used[1] - self._reaped) & _INDEX
        if not count:
            return []
        if count > len(self.pending):
            raise DeviceError(
                f"used.idx is {self._used[1]}, {count} past the last one, "
                f"with {len(self.pending)} chains in flight"
            )
        fence()  # section 2.7.14: the index is loaded before the elements
        done = []
        for _ in range(count):
            head, length = self.used_entry(self._reaped)
            chain = self.pending.pop(head, None)
            if chain is None:
                raise DeviceError(f"used element {self._reaped} names chain {head}, not in flight")
            self._reaped = (self._reaped + 1) & _INDEX
            done.append(Used(chain, length, self._written(chain, length)))
            self._give_back(chain)
        if self._calls and self.event_idx:
            self.set_used_event(self._reaped)
        return done

    def _written(self, chain: Chain, length: int) -> bytes:
        parts = []
        for buffer in chain.buffers:
            if buffer.writable and length > 0:
                parts.append(self.memory.read(buffer.addr, min(buffer.size, length)))
                length -= buffer.size
        return b"".join(parts)

    def _give_back(self, chain: Chain) -> None:
        self._free.extend(reversed(chain.descriptors))
        for addr in chain.owned:
            self.memory.free(addr)

    def enable_calls(self) -> bool:
        """Ask to be called when the next chain is used (section 2.7.7).

        Return True when one was used meanwhile, so that no call may come: reap it.
        """
        self._calls = True
        self.set_avail_flags(0)
        if self.event_idx:
            self.set_used_event(self._reaped)
        fence()  # the wish is stored before used.idx is loaded
        return self.has_used()

    def disable_calls(self) -> None:
        """Ask not to be called: by flag, or by an event as far away as there is."""
        self._calls = False
        if self.event_idx:
            self.set_used_event(self._reaped - 1)
        else:
            self.set_avail_flags(AVAIL_F_NO_INTERRUPT)

    # The ring's words, unchecked.

    @property
    def avail_idx(self) -> int:
        """avail.idx as the device sees it."""
        return self._avail[1]

    @property
    def used_idx(self) -> int:
        """used.idx as the device left it: where a ring goes on when it is started again."""
        return self._used[1]

    @property
    def used_flags(self) -> int:
        """used.flags."""
        return self._used[0]

    @property
    def avail_event(self) -> int:
        """avail_event, the word after the used ring."""
        return self._used[2 + 4 * self.size]

    @property
    def used_event(self) -> int:
        """used_event, the word after the available ring."""
        return self._avail[2 + self.size]

    def used_entry(self, slot: int) -> tuple[int, int]:
        """Return (id, len) of a used element; `slot` may be an index that still counts."""
        at = slot % self.size * 2
        return self._elements[at], self._elements[at + 1]

    def write_desc(
        self, index: int, addr: int, size: int, flags: int = 0, following: int = 0
    ) -> None:
        """Write one descriptor of the ring's table."""
        self._desc[2 * index] = addr
        self._desc[2 * index + 1] = size | flags << 32 | following << 48

    def set_avail_entry(self, slot: int, head: int) -> None:
        """Write one entry of the available ring; `slot` may be an index that still counts."""
        self._avail[2 + slot % self.size] = head

    def set_avail_idx(self, idx: int) -> None:
        """Store avail.idx, whatever was offered."""
        self._avail[1] = idx & _INDEX

    def set_avail_flags(self, flags: int) -> None:
        """Store avail.flags."""
        self._avail[0] = flags

    def set_used_event(self, idx: int) -> None:
        """Store used_event."""
        self._avail[2 + self.size] = idx & _INDEX

    def set_used_idx(self, idx: int) -> None:
        """Store used.idx, which is the device's: only a hostile guest does that."""
        self._used[1] = idx & _INDEX


def _flags(buffer: Buffer, more: bool) -> int:
    return (DESC_F_WRITE if buffer.writable else 0) | (DESC_F_NEXT if more else 0)
