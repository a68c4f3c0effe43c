"""The driver side of a packed virtqueue (VIRTIO 1.2, section 2.8), with raw access to all of it."""

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
from .split import SplitDriver

DESC_F_AVAIL = 1 << 7
DESC_F_USED = 1 << 15

EVENT_ENABLE = 0
EVENT_DISABLE = 1
EVENT_DESC = 2

#: Where a fresh ring begins: at entry 0 with its wrap counters at 1 (section 2.8.1).
FRESH = 1 << 15

_WRAP = 1 << 15
_INDEX = 0xFFFF
_LOW32 = 0xFFFF_FFFF


class PackedDriver(RingDriver):
    """The driver of a packed virtqueue.

    `size` is any number from 1 to 32768. `start` is where both sides begin: an entry, and the wrap
    counter in bit 15, so a wrap-around is a few buffers away. `desc` places the descriptor ring,
    `avail` the driver's and `used` the device's event suppression structure at guest addresses of
    the caller's; by default they are allocated, each with the alignment section 2.8.10.1 asks for.
    """

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        *,
        start: int = FRESH,
        event_idx: bool = False,
        in_order: bool = False,
        desc: int | None = None,
        avail: int | None = None,
        used: int | None = None,
    ) -> None:
        super().__init__(memory, size, event_idx=event_idx, in_order=in_order)
        self.desc_addr = memory.alloc(16 * size, 16) if desc is None else desc
        self.avail_addr = memory.alloc(4, 4) if avail is None else avail
        self.used_addr = memory.alloc(4, 4) if used is None else used
        self._desc = memory.view(self.desc_addr, 16 * size, "Q")
        self._driver_event = memory.view(self.avail_addr, 4, "I")
        self._device_event = memory.view(self.used_addr, 4, "I")
        self.reset(start)

    def reset(self, start: int = FRESH) -> None:
        """Make the ring as new, as after a reboot: nothing offered, nothing used."""
        for chain in self.pending.values():
            self._give_back(chain)
        self.pending.clear()
        self._next, self._avail_wrap = start & ~_WRAP, start >> 15
        self._reaped, self._used_wrap = self._next, self._avail_wrap
        # What is behind `start` has the wrap counter of this lap, what is ahead that of the last.
        for at in range(self.size):
            lap = self._avail_wrap if at < self._next else self._avail_wrap ^ 1
            self.write_desc(at, 0, 0, 0, (DESC_F_AVAIL | DESC_F_USED) * lap)
        self._ids = list(range(self.size - 1, -1, -1))
        self._free = self.size
        self._added = 0  # descriptors made available since the last `kick_needed`
        self._unseen = 0  # descriptors offered and not published
        self._withheld: tuple[int, int] | None = None
        self._calls = True
        self.set_driver_event(EVENT_ENABLE, 0)
        self._device_event[0] = 0
        if self.event_idx:
            self._ask()

    def set_features(self, features: int) -> None:
        """Go by the features that were negotiated; before the ring is used, or after `reset`.

        Raises ValueError when they are for split rings.
        """
        if not features & Feature.RING_PACKED:
            raise ValueError("split rings were negotiated, and this is the driver of a packed one")
        self.in_order = bool(features & Feature.IN_ORDER)
        event_idx = bool(features & Feature.EVENT_IDX)
        if event_idx != self.event_idx:
            self.event_idx = event_idx
            self._ask()

    @property
    def base(self) -> int:
        """Where the ring goes on: at the next used descriptor, with all before it completed.

        Both halves have that entry and its wrap counter (vhost-user.rst, "Vring descriptor indices
        for packed virtqueues").
        """
        at, wrap = self._reaped, self._used_wrap
        pending = dict(self.pending)
        while self._is_used(at, wrap):  # what was used and not reaped is completed too
            for chain in self._batch(self.used_entry(at)[0], pending):
                at, wrap = self._forward(at, wrap, len(chain.descriptors))
                del pending[chain.head]
        place = at | wrap << 15
        return place | place << 16

    # Offering buffers.

    @property
    def free(self) -> int:
        """How many descriptors are free."""
        return self._free

    def add_buffers(self, buffers: Sequence[Buffer], *, indirect: bool = False) -> Chain:
        """Offer one chain of the caller's own buffers, which stay the caller's.

        Nothing is checked, so any order of readable and writable goes. Raises RingFullError, and
        then changes nothing.
        """
        if not buffers:
            raise ValueError("a chain needs at least one buffer")
        self._room(1 if indirect else len(buffers))
        if not indirect:
            last = len(buffers) - 1
            return self.offer(
                [
                    (buffer.addr, buffer.size, _flags(buffer) | (DESC_F_NEXT if at < last else 0))
                    for at, buffer in enumerate(buffers)
                ],
                buffers=buffers,
            )
        # Section 2.8.7: WRITE is the only flag in a table, and ids there mean nothing.
        table, size = self._table(
            (buffer.addr, buffer.size, 0, _flags(buffer)) for buffer in buffers
        )
        chain = self.offer([(table, size, DESC_F_INDIRECT)], buffers=buffers)
        chain.owned = (table,)
        return chain

    def offer(
        self,
        descriptors: Sequence[tuple[int, int, int]],
        *,
        buffers: Sequence[Buffer] = (),
        buffer_id: int | None = None,
    ) -> Chain:
        """Offer descriptors by hand: address, size and flags of each, without AVAIL and USED.

        They take the next entries of the ring and are available by its wrap counter. The id, by
        default a free one, is in the last of them. Raises RingFullError, and then changes nothing.
        """
        self._room(len(descriptors))
        if buffer_id is None:
            buffer_id = self._ids.pop()
        elif buffer_id in self._ids:
            self._ids.remove(buffer_id)
        taken: list[int] = []
        for addr, size, flags in descriptors:
            flags |= DESC_F_AVAIL if self._avail_wrap else DESC_F_USED
            last = len(taken) + 1 == len(descriptors)
            word = size | (buffer_id if last else 0) << 32 | flags << 48
            at = self._next
            self._desc[2 * at] = addr
            if self._withheld is None:
                # 2.8.21.1: of all that is offered together, the device sees this one first.
                self._withheld = at, word
            else:
                self._desc[2 * at + 1] = word
            taken.append(at)
            self._next, self._avail_wrap = self._forward(at, self._avail_wrap, 1)
        self._free -= len(taken)
        self._unseen += len(taken)
        chain = Chain(buffer_id, tuple(buffers), tuple(taken))
        self.pending[buffer_id] = chain
        return chain

    def _room(self, needed: int) -> None:
        if needed > self._free:
            raise RingFullError(
                f"{needed} descriptors are needed, {self._free} of {self.size} are free"
            )

    def _forward(self, at: int, wrap: int, count: int) -> tuple[int, int]:
        at += count
        return (at, wrap) if at < self.size else (at - self.size, wrap ^ 1)

    def publish(self) -> None:
        """Let the device see every chain offered so far."""
        fence()  # section 2.8.21.1.1: all the rest is visible before the first one's flags
        if self._withheld is not None:
            at, word = self._withheld
            self._desc[2 * at + 1] = word
            self._withheld = None
        self._added += self._unseen
        self._unseen = 0

    def kick_needed(self) -> bool:
        """Tell, once, whether the device wants to be told of what was published (2.8.21.3)."""
        fence()  # the flags are stored before the device's event structure is loaded
        added, self._added = self._added, 0
        if not added:
            return False
        mode, place = self.device_event
        if not (self.event_idx and mode == EVENT_DESC):
            return mode != EVENT_DISABLE
        new = self._next - self._unseen
        wrap = self._avail_wrap
        if new < 0:
            new, wrap = new + self.size, wrap ^ 1
        event = place & ~_WRAP
        if place >> 15 != wrap:
            event -= self.size
        return need_event(event, new, new - added)

    # Taking them back.

    def _is_used(self, at: int, wrap: int) -> bool:
        flags = self._desc[2 * at + 1] >> 48
        return flags & (DESC_F_AVAIL | DESC_F_USED) == (DESC_F_AVAIL | DESC_F_USED) * wrap

    def has_used(self) -> bool:
        """Tell whether there is a chain to reap."""
        return self._is_used(self._reaped, self._used_wrap)

    def reap(self) -> list[Used]:
        """Return the chains used since the last call, in the device's order.

        Raises DeviceError when the device returns what it was not given.
        """
        done: list[Used] = []
        while self.has_used():
            fence()  # section 2.8.22: the flags are loaded before the rest
            buffer_id, length, _ = self.used_entry(self._reaped)
            try:
                batch = self._returned(buffer_id, length)
            except KeyError:
                raise DeviceError(
                    f"used descriptor {self._reaped} names buffer {buffer_id}, not in flight"
                ) from None
            for used in batch:
                self._reaped, self._used_wrap = self._forward(
                    self._reaped, self._used_wrap, len(used.chain.descriptors)
                )
            done += batch
        if done and self._calls and self.event_idx:
            self._ask()
        return done

    def _give_back(self, chain: Chain) -> None:
        super()._give_back(chain)
        self._free += len(chain.descriptors)
        self._ids.append(chain.head)

    def _ask(self) -> None:
        """Ask for a call at the next used descriptor."""
        mode = EVENT_DESC if self.event_idx else EVENT_ENABLE
        self.set_driver_event(mode, (self._reaped | self._used_wrap << 15) * self.event_idx)

    def enable_calls(self) -> bool:
        """Ask to be called when the next chain is used (section 2.8.10).

        Return True when one was used meanwhile, so that no call may come: reap it.
        """
        self._calls = True
        self._ask()
        fence()  # the wish is stored before the descriptor is loaded
        return self.has_used()

    def disable_calls(self) -> None:
        """Ask not to be called."""
        self._calls = False
        self.set_driver_event(EVENT_DISABLE, 0)

    # The ring's words, unchecked.

    @property
    def next_avail(self) -> int:
        """Where the next descriptor goes: an entry, and the wrap counter in bit 15."""
        return self._next | self._avail_wrap << 15

    @property
    def next_used(self) -> int:
        """Where the next used descriptor is awaited: an entry, and the wrap counter in bit 15."""
        return self._reaped | self._used_wrap << 15

    @property
    def device_event(self) -> tuple[int, int]:
        """The device's event suppression: flags, and the entry with its wrap counter in bit 15."""
        word = self._device_event[0]
        return word >> 16 & 3, word & _INDEX

    @property
    def driver_event(self) -> tuple[int, int]:
        """The driver's own event suppression: flags, and the entry with its wrap counter."""
        word = self._driver_event[0]
        return word >> 16, word & _INDEX

    def set_driver_event(self, flags: int, place: int) -> None:
        """Store the driver's event suppression structure at once."""
        self._driver_event[0] = place & _INDEX | flags << 16

    def used_entry(self, at: int) -> tuple[int, int, int]:
        """Return (id, length, flags) of a descriptor."""
        word = self._desc[2 * at + 1]
        return word >> 32 & _INDEX, word & _LOW32, word >> 48

    def write_desc(self, at: int, addr: int, size: int, buffer_id: int, flags: int) -> None:
        """Write one descriptor as it is; what it replaces is forgotten."""
        self._desc[2 * at] = addr
        self._desc[2 * at + 1] = size | buffer_id << 32 | flags << 48


def make_driver(
    memory: GuestMemory, size: int, features: int, *, start: int | None = None
) -> RingDriver:
    """Return a driver of the ring format that `features` choose, which goes by them.

    `start` is in that format's own terms; by default the ring is fresh.
    """
    driver: RingDriver
    if features & Feature.RING_PACKED:
        driver = PackedDriver(memory, size, start=FRESH if start is None else start)
    else:
        driver = SplitDriver(memory, size, start=start or 0)
    driver.set_features(features)
    return driver


def _flags(buffer: Buffer) -> int:
    return DESC_F_WRITE if buffer.writable else 0
