"""The control dialogue of a multiport console, as a table (VIRTIO 1.2, section 5.3.6.2).

The guest says it is ready and is told its ports; for each it adds it is told the rest and says
when a program has the port open. Ports come, go and change their size later on. Linux says
PORT_READY and PORT_OPEN again after hibernation, with no DEVICE_READY before: it is answered as the
first time.

What waits for the guest's buffers is the latest message of each kind for each port, so a guest that
asks and asks and takes no answer makes nothing grow.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from enum import Enum, IntEnum

import msgspec

from .port import Port

_MESSAGE = struct.Struct("<IHH")
_SIZE = struct.Struct("<HH")


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


class Saved(msgspec.Struct, array_like=True, kw_only=True):
    """How far a dialogue is, by the ports' numbers; `waiting` as `Control.waiting`."""

    resizes: bool
    promised: int
    states: dict[int, State]
    told_open: dict[int, bool]
    talking: bool
    unset: bool
    waiting: list[tuple[int, Event, bytes]]


class Control:
    """The device's side of the dialogue about `ports`, by their number, which others may change.

    `receive` takes the guest's messages, `replies` are those that wait for the guest's buffers.
    `resizes` says that the guest wants sizes (F_SIZE), `rows_first` in which order, `promised` how
    many ports it has made room for: it is told of no port past them (5.3.5).
    """

    def __init__(self, ports: Mapping[int, Port], *, rows_first: bool = False) -> None:
        self.resizes = False
        self.promised = 0
        self.ignored = 0
        self._rows_first = rows_first
        self._ports = ports
        self._states: dict[int, State] = {}
        self._unset = False  # the driver could not set the device up, and was told of no port
        self._told_open: dict[int, bool] = {}
        self._talking = False
        self._waiting: dict[tuple[int, Event], bytes] = {}

    @property
    def replies(self) -> list[bytes]:
        """The messages for the guest, oldest first."""
        return [*self._waiting.values()]

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def take(self) -> bytes:
        """Return the next message for the guest, which waits no more."""
        return self._waiting.pop(next(iter(self._waiting)))

    def state(self, port_id: int) -> State:
        """Return how far the guest is with that port."""
        state = self._states.get(port_id, State.ABSENT)
        return State.FAILED if self._unset and state is State.ABSENT else state

    def reset(self) -> None:
        """Forget the dialogue: another driver starts, which has said nothing yet."""
        self._waiting.clear()
        self._states.clear()
        self._told_open.clear()
        self._talking = self._unset = False
        for port in self._ports.values():
            port.opened = False

    def save(self) -> Saved:
        """Return what `resume` takes."""
        return Saved(
            resizes=self.resizes,
            promised=self.promised,
            states=self._states,
            told_open=self._told_open,
            talking=self._talking,
            unset=self._unset,
            waiting=self.waiting,
        )

    def resume(self, saved: Saved) -> None:
        """Go on where another device of the same ports was, with the same guest."""
        self.resizes = saved.resizes
        self.promised = saved.promised
        self._states = saved.states
        self._told_open = saved.told_open
        self._talking = saved.talking
        self._unset = saved.unset
        self._waiting = {(port_id, event): data for port_id, event, data in saved.waiting}

    @property
    def waiting(self) -> list[tuple[int, Event, bytes]]:
        """The messages for the guest, oldest first, each with its port and event."""
        return [(port_id, event, data) for (port_id, event), data in self._waiting.items()]

    def restore(
        self,
        states: Mapping[int, State],
        waiting: Iterable[tuple[int, Event, bytes]],
        *,
        unset: bool,
    ) -> None:
        """Go on with a guest that another device talked to, and with what it had to say.

        `unset` says that its driver could not set that device up.
        """
        self.reset()
        self._states.update(states)
        self._talking = any(state is not State.ABSENT for state in states.values())
        self._unset = unset
        for port_id, event, message in waiting:
            self._waiting[port_id, event] = message

    def presume(self, *, told: bool) -> None:
        """Go on with a guest that talked to somebody else, nobody knows what about.

        One that was `told` of its ports has added them, and has a console open; it would say so no
        more. One that was told nothing has asked. Does nothing once the guest has spoken here.
        """
        if self._talking or self._states or self._unset:
            return
        if not told:
            self._device_ready(True)
            return
        self._talking = True
        for port in self._ports.values():
            if port.id < self.promised:
                self._states[port.id] = State.READY
                port.opened = port.console
                self.settle(port)

    def settle(self, port: Port) -> None:
        """Tell a guest that was restored what may be different here."""
        if self.state(port.id) is State.ABSENT:
            self.add(port)
        self.resized(port)
        self.host_changed(port)

    # This side changes something

    def add(self, port: Port) -> None:
        """Tell the guest of a new port, if it has begun to ask for ports and has room for it."""
        if self._talking and port.id < self.promised:
            self._states[port.id] = State.ADDED
            self._send(port.id, Event.PORT_ADD)

    def remove(self, port_id: int) -> None:
        """Tell the guest that a port is gone, if it was ever told of it."""
        never_told = (port_id, Event.PORT_ADD) in self._waiting
        for event in Event:
            if event is not Event.PORT_REMOVE:  # of another port with this number, before
                self._waiting.pop((port_id, event), None)
        if self._states.pop(port_id, State.ABSENT) is not State.ABSENT and not never_told:
            self._send(port_id, Event.PORT_REMOVE)
        self._told_open.pop(port_id, None)

    def resized(self, port: Port) -> None:
        """Tell the guest the size of a console port, where it is known and wanted."""
        if not (self.resizes and port.console and self.state(port.id) is State.READY):
            return
        if port.size != (0, 0):
            size = port.size[::-1] if self._rows_first else port.size
            self._send(port.id, Event.RESIZE, 0, _SIZE.pack(*size))

    def host_changed(self, port: Port) -> None:
        """Tell the guest whether this side of a port is open, if that is news."""
        is_open = port.host_open
        if self.state(port.id) is State.READY and self._told_open.get(port.id) is not is_open:
            self._told_open[port.id] = is_open
            self._send(port.id, Event.PORT_OPEN, int(is_open))

    # The guest says something

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
        port = self._ports.get(port_id)
        if port is None or event not in (Event.PORT_READY, Event.PORT_OPEN):
            self.ignored += 1
            return
        state, action = _TABLE[self.state(port_id), Event(event), bool(value)]
        self._states[port_id] = state
        self._act(action, port)

    def _device_ready(self, ready: bool) -> None:
        self.reset()
        if not ready:
            self._unset = True  # it may try again
            return
        self._talking = True
        for port in self._ports.values():
            self.add(port)

    def _act(self, action: _Do, port: Port) -> None:
        match action:
            case _Do.INTRODUCE:
                self._introduce(port)
            case _Do.OPEN:
                port.opened = True
                self.host_changed(port)
            case _Do.CLOSE:
                port.opened = False
                self.host_changed(port)
            case _Do.IGNORE:
                self.ignored += 1
            case _Do.NOTHING:
                pass

    def _introduce(self, port: Port) -> None:
        self._talking = True
        port.opened = False  # until the guest says so, of this port and no other of its number
        if port.console:
            self._send(port.id, Event.CONSOLE_PORT, 1)
            self.resized(port)  # Linux takes a size only after it knows the port for a console
        self._send(port.id, Event.PORT_NAME, 1, port.name.encode())
        self._told_open.pop(port.id, None)
        self.host_changed(port)

    def _send(self, port_id: int, event: Event, value: int = 0, tail: bytes = b"") -> None:
        key = (port_id, event)
        self._waiting.pop(key, None)  # what it says is out of date; the new one goes last
        self._waiting[key] = _MESSAGE.pack(port_id, event, value) + tail
