"""Both sides of one ring, of either format."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from vhost_device_console.testing import GuestMemory, RingDriver, make_driver
from vhost_device_console.worker.vhost_user.message import Region
from vhost_device_console.worker.virtqueue import memory as mapped
from vhost_device_console.worker.virtqueue.chain import Chain
from vhost_device_console.worker.virtqueue.features import INDIRECT_DESC
from vhost_device_console.worker.virtqueue.ring import Ring, place

MOST = 1 << 16


class Sides:
    """A ring in guest memory: the guest's `driver`, and the `queue` that serves it."""

    def __init__(
        self,
        guest: GuestMemory,
        features: int,
        *,
        size: int = 8,
        start: int | None = None,
        writable: bool = False,
        most: int = MOST,
        indirect: bool = True,
        **more: Any,
    ) -> None:
        self.guest = guest
        self.features = features | (INDIRECT_DESC if indirect else 0)
        self.writable = writable
        self.most = most
        self.memory = mapped.GuestMemory(
            [mapped.map_region(fd, *region) for region, fd in guest.regions()]
        )
        self.driver: RingDriver = make_driver(guest, size, self.features, start=start)
        self.queue = self.serve(self.driver.base, **more)

    def serve(self, base: int, **other: Any) -> Ring:
        """Return the device's side, as another server of the same ring would make it."""
        user = self.guest.user_addr
        arguments = {
            "size": self.driver.size,
            "desc": user(self.driver.desc_addr),
            "avail": user(self.driver.avail_addr),
            "used": user(self.driver.used_addr),
            **other,
        }
        return place(
            self.memory,
            features=self.features,
            base=base,
            writable=self.writable,
            most_bytes=self.most,
            **arguments,
        )

    def give(self, *data: bytes, indirect: bool = False) -> None:
        """Offer one chain a piece of data."""
        for piece in data:
            self.driver.add([piece], indirect=indirect)
        self.driver.publish()

    def pop(self) -> Chain:
        chain = self.queue.pop()
        assert chain is not None
        return chain

    def done(self, count: int = 1, written: int = 0) -> bool:
        """Complete the next `count` buffers; return whether the guest wants a call."""
        for _ in range(count):
            self.queue.push(self.pop().head, written)
        return self.queue.publish()


class MakeSides:
    """The `sides` fixture: call it for a ring in memory of its own, or in `memory`."""

    def __init__(self, ends: ExitStack) -> None:
        self._ends = ends

    def memory(self, what: int | list[Region]) -> GuestMemory:
        return self._ends.enter_context(GuestMemory(what))

    def __call__(
        self, features: int, *, memory: GuestMemory | None = None, **options: Any
    ) -> Sides:
        return Sides(memory or self.memory(1 << 20), features, **options)


def data_of(chain: Chain) -> bytes:
    return b"".join(chain.spans)
