"""The driver side of a split virtqueue (VIRTIO 1.2, section 2.7), with raw access to every byte."""

from __future__ import annotations

from collections.abc import Sequence

from .driver import (
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    Buffer,
    Chain,
    RingDriver,
    Used,
    fence,
    need_event,
)
from .errors import DeviceError, RingFullError
from .features import Feature
from .memory import GuestMemory

__all__ = [
    "DESC_F_INDIRECT",
    "DESC_F_NEXT",
    "DESC_F_WRITE",
    "Buffer",
    "Chain",
    "SplitDriver",
    "Used",
    "fence",
    "need_event",
]

AVAIL_F_NO_INTERRUPT = 1
USED_F_NO_NOTIFY = 1

_INDEX = 0xFFFF


class SplitDriver(RingDriver):
    """The driver of a split virtqueue.

    `size` is a power of two. Both indices begin at `start`, so a wrap-around is a few buffers
    away. `desc`, `avail` and `used` place the ring's parts at guest addresses of the caller's; by
    default they are allocated, each with the alignment section 2.7 asks for.
    """

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        *,
        start: int = 0,
        event_idx: bool = False,
        in_order: bool = False,
        desc: int | None = None,
        avail: int | None = None,
        used: int | None = None,
    ) -> None:
        super().__init__(memory, size, event_idx=event_idx, in_order=in_order)
        self.desc_addr = memory.alloc(16 * size, 16) if desc is None else desc
        self.avail_addr = memory.alloc(6 + 2 * size, 2) if avail is None else avail
        self.used_addr = memory.alloc(6 + 8 * size, 4) if used is None else used
        self._desc = memory.view(self.desc_addr, 16 * size, "Q")
        self._avail = memory.view(self.avail_addr, 6 + 2 * size, "H")
        self._used = memory.view(self.used_addr, 6 + 8 * size, "H")
        self._elements = memory.view(self.used_addr + 4, 8 * size, "I")
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
        """Go by the features that were negotiated; before the ring is used, or after `reset`.

        Raises ValueError when they are for packed rings.
        """
        if features & Feature.RING_PACKED:
            raise ValueError("packed rings were negotiated, and this is the driver of a split one")
        self.in_order = bool(features & Feature.IN_ORDER)
        event_idx = bool(features & Feature.EVENT_IDX)
        if event_idx != self.event_idx:
            self.event_idx = event_idx
            self.set_used_event(self._reaped if event_idx else 0)
            self._used[2 + 4 * self.size] = self.avail_idx if event_idx else 0

    @property
    def base(self) -> int:
        """Where the ring goes on: at its used index."""
        return self.used_idx

    # Offering buffers.

    @property
    def free(self) -> int:
        """How many descriptors are free."""
        return len(self._free)

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
        needed = 1 if indirect else len(buffers)
        if not buffers:
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
        owned: tuple[int, ...] = ()
        if indirect:
            last = len(buffers) - 1
            table, size = self._table(
                (buffer.addr, buffer.size, _flags(buffer, at < last), (at + 1) * (at < last))
                for at, buffer in enumerate(buffers)
            )
            owned = (table,)
            self.write_desc(descriptors[0], table, size, DESC_F_INDIRECT)
        else:
            for at, buffer in enumerate(buffers):
                more = at + 1 < needed
                following = descriptors[at + 1] if more else 0
                flags = _flags(buffer, more)
                self.write_desc(descriptors[at], buffer.addr, buffer.size, flags, following)
        del self._free[-needed:]
        chain = Chain(descriptors[0], tuple(buffers), tuple(descriptors), owned)
        self._push(chain)
        return chain

    def offer(self, head: int, *, buffers: Sequence[Buffer] = ()) -> Chain:
        """Offer descriptors written by hand, from `head` on; any number at all is taken.

        Descriptors written by hand are best taken from a ring without other chains.
        """
        chain = Chain(head, tuple(buffers), ())
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
        new = self.avail_idx
        old, self._notified = self._notified, new
        if old == new:
            return False
        if self.event_idx:
            return need_event(self.avail_event, new, old)
        return not self.used_flags & USED_F_NO_NOTIFY

    # Taking them back.

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
        done: list[Used] = []
        while len(done) < count:
            head, length = self.used_entry(self._reaped)
            try:
                batch = self._returned(head, length)
            except KeyError:
                raise DeviceError(
                    f"used element {self._reaped} names chain {head}, not in flight"
                ) from None
            self._reaped = (self._reaped + len(batch)) & _INDEX
            done += batch
        if len(done) > count:
            raise DeviceError(f"used.idx moved by {count}, its elements stand for {len(done)}")
        if self._calls and self.event_idx:
            self.set_used_event(self._reaped)
        return done

    def _give_back(self, chain: Chain) -> None:
        super()._give_back(chain)
        if self.in_order:  # 2.7.5: descriptors go in ring order, so these are the last to be taken
            self._free[:0] = reversed(chain.descriptors)
        else:
            self._free.extend(reversed(chain.descriptors))

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
