"""The control dialogue of a multiport console, as a table (VIRTIO 1.2, section 5.3.6.2).

The guest says it is ready and is told its ports; for each it adds it is told the rest and says
when a program has the port open. Linux says PORT_READY and PORT_OPEN again after hibernation, with
no DEVICE_READY before: it is answered as the first time.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Sequence
from enum import Enum, IntEnum

from .port import Port

_MESSAGE = struct.Struct("<IHH")


class Event(IntEnum):
    """Control events of both directions."""

    DEVICE_READY = 0
    PORT_ADD = 1
    PORT_REMOVE = 2
    PORT_READY = 3
    CONSOLE_PORT = 4
    RESIZE = 5
    PORT_OPEN = 6
    PORT_NAME = 7


class State(Enum):
    """How far the guest is with one port."""

    ABSENT = "absent"
    ADDED = "added"
    READY = "ready"
    FAILED = "failed"


class _Do(Enum):
    NOTHING = "nothing"
    IGNORE = "ignore"
    INTRODUCE = "introduce"
    OPEN = "open"
    CLOSE = "close"


# What a guest's message about a port does, for (state, event, value): the next state, the action.
_TABLE: dict[tuple[State, Event, bool], tuple[State, _Do]] = {
    (State.ABSENT, Event.PORT_READY, True): (State.READY, _Do.INTRODUCE),
    (State.ABSENT, Event.PORT_READY, False): (State.ABSENT, _Do.IGNORE),
    (State.ABSENT, Event.PORT_OPEN, True): (State.ABSENT, _Do.IGNORE),
    (State.ABSENT, Event.PORT_OPEN, False): (State.ABSENT, _Do.IGNORE),
    (State.ADDED, Event.PORT_READY, True): (State.READY, _Do.INTRODUCE),
    (State.ADDED, Event.PORT_READY, False): (State.FAILED, _Do.CLOSE),
    (State.ADDED, Event.PORT_OPEN, True): (State.ADDED, _Do.IGNORE),
    (State.ADDED, Event.PORT_OPEN, False): (State.ADDED, _Do.IGNORE),
    (State.READY, Event.PORT_READY, True): (State.READY, _Do.INTRODUCE),
    (State.READY, Event.PORT_READY, False): (State.FAILED, _Do.CLOSE),
    (State.READY, Event.PORT_OPEN, True): (State.READY, _Do.OPEN),
    (State.READY, Event.PORT_OPEN, False): (State.READY, _Do.CLOSE),
    (State.FAILED, Event.PORT_READY, True): (State.READY, _Do.INTRODUCE),
    (State.FAILED, Event.PORT_READY, False): (State.FAILED, _Do.NOTHING),
    (State.FAILED, Event.PORT_OPEN, True): (State.FAILED, _Do.IGNORE),
    (State.FAILED, Event.PORT_OPEN, False): (State.FAILED, _Do.IGNORE),
}

#: Messages that may wait for the guest's control buffers: a whole dialogue for every port, twice.
_WAITING_PER_PORT = 8


class Control:
    """The device's side of the dialogue: `receive` the guest's messages, send `replies`."""

    def __init__(self, ports: Sequence[Port]) -> None:
        self.replies: deque[bytes] = deque()
        self.ignored = 0
        self._ports = {port.id: port for port in ports}
        self._most = _WAITING_PER_PORT * len(ports)
        self._states = dict.fromkeys(self._ports, State.ABSENT)

    def state(self, port_id: int) -> State:
        """Return how far the guest is with that port."""
        return self._states[port_id]

    def reset(self) -> None:
        """Forget the dialogue: another driver starts, which has said nothing yet."""
        self.replies.clear()
        for port_id, port in self._ports.items():
            self._states[port_id] = State.ABSENT
            port.opened = False

    def receive(self, message: bytes) -> None:
        """Take one message of the guest's; what makes no sense is counted in `ignored`.

        Bytes after the eight of the message itself are passed over, as Linux sends none.
        """
        if len(message) < _MESSAGE.size:
            self.ignored += 1
            return
        port_id, event, value = _MESSAGE.unpack_from(message)
        if event == Event.DEVICE_READY:
            self._device_ready(bool(value))
            return
        state = self._states.get(port_id)
        if state is None or event not in (Event.PORT_READY, Event.PORT_OPEN):
            self.ignored += 1
            return
        state, action = _TABLE[state, Event(event), bool(value)]
        self._states[port_id] = state
        self._act(action, self._ports[port_id])

    def _device_ready(self, ready: bool) -> None:
        self.reset()
        if not ready:
            return  # 5.3.6.2: the driver could not set the device up; it may try again
        for port_id in self._ports:
            self._states[port_id] = State.ADDED
            self._send(port_id, Event.PORT_ADD)

    def _act(self, action: _Do, port: Port) -> None:
        match action:
            case _Do.INTRODUCE:
                if port.console:
                    self._send(port.id, Event.CONSOLE_PORT, 1)
                self._send(port.id, Event.PORT_NAME, 1, port.name.encode())
                self._send(port.id, Event.PORT_OPEN, 1)
            case _Do.OPEN:
                port.opened = True
            case _Do.CLOSE:
                port.opened = False
            case _Do.IGNORE:
                self.ignored += 1
            case _Do.NOTHING:
                pass

    def _send(self, port_id: int, event: Event, value: int = 0, tail: bytes = b"") -> None:
        if len(self.replies) >= self._most:
            self.ignored += 1  # a guest that asks and asks and never takes an answer
            return
        self.replies.append(_MESSAGE.pack(port_id, event, value) + tail)
