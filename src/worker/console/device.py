"""The device as the guest sees it: features, configuration space, and which queue is whose.

Queues (VIRTIO 1.2, section 5.3.2): 0 and 1 are port 0's, 2 and 3 carry the control dialogue, then
two for every further port. Without MULTIPORT there are only the first two. A frontend may have more
queues than the ports need; those carry nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from enum import Enum

import msgspec

from ...errors import RefusedError
from . import control
from .control import Control
from .port import Port, Queue

#: The console's own feature bits (VIRTIO 1.2, section 5.3.3).
SIZE = 1 << 0
MULTIPORT = 1 << 1
EMERG_WRITE = 1 << 2

_VERSION_1 = 1 << 32

#: What this device offers, the rings' own features apart.
FEATURES = _VERSION_1 | SIZE | MULTIPORT | EMERG_WRITE

_CONFIG = struct.Struct("<HHII")
_EMERGENCY_AT = 8


class Role(Enum):
    """What a queue carries."""

    INPUT = "input"
    OUTPUT = "output"
    CONTROL_TO_GUEST = "control to guest"
    CONTROL_FROM_GUEST = "control from guest"

    @property
    def writable(self) -> bool:
        """Whether the device writes into this queue's buffers."""
        return self in (Role.INPUT, Role.CONTROL_TO_GUEST)


class Saved(msgspec.Struct, array_like=True, kw_only=True):
    """What a device knows of its guest: its dialogue and the configuration space as it saw it."""

    multiport: bool
    known: bytes
    control: control.Saved


class Console:
    """One virtio console; `ports` by their number, of which 0 is always there.

    `max_ports` is how many the guest makes room for, one more than the largest number a port can
    have. `rows_first` is the order of a RESIZE message's two halves.
    """

    def __init__(self, ports: Iterable[Port], max_ports: int, *, rows_first: bool = False) -> None:
        self.ports = {port.id: port for port in ports}
        self.max_ports = max_ports
        self.control = Control(self.ports, rows_first=rows_first)
        self.control.promised = max_ports
        self.multiport = False
        self._known = bytearray(_CONFIG.size)  # the space as the frontend has it

    def negotiated(self, features: int) -> None:
        """Go by the features that the guest chose."""
        self.multiport = bool(features & MULTIPORT)
        self.control.resizes = bool(features & SIZE)

    def save(self) -> Saved:
        """Return what `resume` takes."""
        return Saved(
            multiport=self.multiport, known=bytes(self._known), control=self.control.save()
        )

    def resume(self, saved: Saved) -> None:
        """Go on where another device of the same ports was, with the same guest."""
        self.multiport = saved.multiport
        self._known[:] = saved.known
        self.control.resume(saved.control)

    def add(self, port: Port) -> None:
        """Have another port from now on."""
        self.ports[port.id] = port
        self.control.add(port)

    def remove(self, port: Port) -> None:
        """Have a port no more."""
        self.control.remove(port.id)
        del self.ports[port.id]

    def role(self, index: int) -> tuple[Role, Port | None]:
        """Return what queue `index` carries, and whose it is: None for control and for no port.

        Without MULTIPORT the guest never uses the queues after the first two, but a frontend may
        start them all the same.
        """
        if index in (2, 3):
            return Role.CONTROL_FROM_GUEST if index == 3 else Role.CONTROL_TO_GUEST, None
        role = Role.OUTPUT if index % 2 else Role.INPUT
        return role, self.ports.get(0 if index < 2 else index // 2 - 1)

    def read_config(self, offset: int, size: int, queues: int | None = None) -> bytes:
        """Return that span of the configuration space. Raises RefusedError past its end.

        A frontend known to have only so many `queues` has no room for more ports than those serve:
        a guest that was promised more would fail to start its driver.
        """
        self._check(offset, size)
        ports = self.max_ports
        if queues is not None:
            ports = max(1, min(ports, (queues - 2) // 2))
        self.control.promised = ports
        span = _CONFIG.pack(*self.ports[0].size, ports, 0)[offset : offset + size]
        self._known[offset : offset + size] = span
        return span

    def write_config(self, offset: int, data: bytes) -> None:
        """Take a write; only one to emerg_wr means anything. Raises RefusedError past the end.

        Its low byte is output of port 0, whatever state the device is in (5.3.4, 5.3.5). QEMU
        writes the whole space back, as it knows it, whenever its guest touches any of it: then it
        is an emergency write if emerg_wr differs, or is all that can have been touched.
        """
        self._check(offset, len(data))
        end = offset + len(data)
        known = bytes(self._known[offset:end])
        self._known[offset:end] = data
        if not offset <= _EMERGENCY_AT < end:
            return
        at = _EMERGENCY_AT - offset
        if at and data[at:] == known[at:] and not (data[:at] == known[:at] and any(data[at:])):
            return
        output = self.ports[0].output
        output.append(data[at : at + 1])
        output.commit()

    @staticmethod
    def _check(offset: int, size: int) -> None:
        if offset + size > _CONFIG.size:
            raise RefusedError(
                f"configuration bytes {offset} to {offset + size} of {_CONFIG.size} do not exist"
            )

    def takes_input(self, port: Port) -> bool:
        """Whether the guest would keep input now; it discards what comes while none has it open."""
        return port.opened or not self.multiport

    def hear(self, queue: Queue, most: int) -> int:
        """Take up to `most` control messages of the guest's; return how many.

        Their buffers are pushed, not yet published. Raises GuestError as `queue` does.
        """
        taken = 0
        while taken < most and (chain := queue.pop()) is not None:
            self.control.receive(b"".join(chain.spans))
            queue.push(chain.head, 0)
            taken += 1
        return taken

    def speak(self, queue: Queue, most: int) -> int:
        """Put up to `most` waiting control messages into the guest's buffers; return how many.

        A buffer too small for its message gets what fits. Raises GuestError as `queue` does.
        """
        control = self.control
        given = 0
        while given < most and control and (chain := queue.pop()) is not None:
            rest = memoryview(control.take())
            written = 0
            for span in chain.spans:
                count = min(len(span), len(rest))
                span[:count] = rest[:count]
                rest = rest[count:]
                written += count
            queue.push(chain.head, written)
            given += 1
        return given
