"""The device as the guest sees it: features, configuration space, and which queue is whose.

Queues (VIRTIO 1.2, section 5.3.2): 0 and 1 are port 0's, 2 and 3 carry the control dialogue, then
two for every further port. Without MULTIPORT there are only the first two.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import Enum

from ...errors import RefusedError
from .control import Control
from .port import Port, Queue

#: The console's own feature bits.
MULTIPORT = 1 << 1

_VERSION_1 = 1 << 32

#: What this device offers, the rings' own features apart.
FEATURES = _VERSION_1 | MULTIPORT

_CONFIG = struct.Struct("<HHII")


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


class Console:
    """One virtio console with its ports, of which the first is port 0."""

    def __init__(self, ports: Sequence[Port]) -> None:
        self.ports = ports
        self.control = Control(ports)
        self.multiport = False
        self.queues = 2 * len(ports) + 2

    def role(self, index: int) -> tuple[Role, Port]:
        """Return what queue `index` carries and the port it belongs to (0 for control).

        Without MULTIPORT the guest never uses the queues after the first two, but a frontend may
        start them all the same. Raises RefusedError when there is no such queue.
        """
        if index >= self.queues:
            raise RefusedError(f"the console has no queue {index}")
        if index in (2, 3):
            role = Role.CONTROL_FROM_GUEST if index == 3 else Role.CONTROL_TO_GUEST
            return role, self.ports[0]
        port = self.ports[0 if index < 2 else index // 2 - 1]
        return (Role.OUTPUT if index % 2 else Role.INPUT), port

    def read_config(self, offset: int, size: int) -> bytes:
        """Return that span of the configuration space. Raises RefusedError past its end."""
        space = _CONFIG.pack(0, 0, max(port.id for port in self.ports) + 1, 0)
        self._check(offset, size)
        return space[offset : offset + size]

    def write_config(self, offset: int, data: bytes) -> None:
        """Accept a write: nothing in this space changes by one. Raises RefusedError past its end.

        QEMU writes the whole space back whenever its guest touches any of it.
        """
        self._check(offset, len(data))

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
        replies = self.control.replies
        given = 0
        while given < most and replies and (chain := queue.pop()) is not None:
            rest = memoryview(replies.popleft())
            written = 0
            for span in chain.spans:
                count = min(len(span), len(rest))
                span[:count] = rest[:count]
                rest = rest[count:]
                written += count
            queue.push(chain.head, written)
            given += 1
        return given
