"""A console's state as one piece of bytes: what a guest takes along when it moves.

That is how far it is with each port, what waits for it, and what it wrote that nobody has read. The
bytes are a MessagePack array that begins with a name and a version; another version is refused, for
a guess would lose bytes silently.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from ..config import MOST_PORTS
from ..errors import RefusedError
from .console.control import Event, State
from .console.device import Console
from .console.port import Port

_KIND = "vhost-device-console"
_VERSION = 1

#: A control message is eight bytes and a port's name.
_LONGEST_MESSAGE = 4096


class _Port(msgspec.Struct, array_like=True, kw_only=True):
    """One port; `seen` is where an absent reader of the output goes on, `output` ends at the head.

    `tail` is the offset of the first byte of `input`.
    """

    id: int
    name: str
    console: bool
    state: State
    opened: bool
    columns: int
    rows: int
    seen: int
    head: int
    output: bytes
    tail: int
    input: bytes


class _Device(msgspec.Struct, array_like=True, kw_only=True):
    kind: str
    version: int
    promised: int
    ports: list[_Port]
    waiting: list[tuple[int, Event, bytes]]
    unset: bool = False


class _Head(msgspec.Struct, array_like=True):
    kind: str
    version: int


_encoder = msgspec.msgpack.Encoder()
_head = msgspec.msgpack.Decoder(_Head)
_device = msgspec.msgpack.Decoder(_Device)


def save(console: Console) -> bytes:
    """Return the state of `console`, whose queues do not run."""
    control = console.control.save()
    ports = console.ports.values()
    return _encoder.encode(
        _Device(
            kind=_KIND,
            version=_VERSION,
            promised=control.promised,
            ports=[_describe(port, control.states.get(port.id, State.ABSENT)) for port in ports],
            waiting=control.waiting,
            unset=control.unset,
        )
    )


def _describe(port: Port, state: State) -> _Port:
    columns, rows = port.size
    output, input_ = port.output, port.input
    return _Port(
        id=port.id,
        name=port.name,
        console=port.console,
        state=state,
        opened=port.opened,
        columns=columns,
        rows=rows,
        seen=output.seen,
        head=output.head,
        output=output.copy(max(output.seen, output.tail)),
        tail=input_.tail,
        input=input_.copy(),
    )


class Loaded:
    """A state that fits a console, which nothing may change until it is applied or given up."""

    def __init__(self, console: Console, device: _Device) -> None:
        self._console = console
        self._device = device

    def apply(self) -> None:
        """Let the console go on where the state was taken, with the features as they are chosen."""
        control, ports = self._console.control, self._device.ports
        control.promised = self._device.promised
        states = {port.id: port.state for port in ports}
        control.restore(states, self._device.waiting, unset=self._device.unset)
        for saved in ports:
            port = self._console.ports[saved.id]
            port.opened = saved.opened
            if port.size == (0, 0):
                port.size = (saved.columns, saved.rows)
            port.adopt_output(saved.seen, saved.head, saved.output)
            port.adopt_input(saved.tail, saved.input)
        for port in self._console.ports.values():
            control.settle(port)


def load(console: Console, data: bytes) -> Loaded:
    """Return the state in `data`, fit for `console`.

    Raises RefusedError when it is no such state, or one of other ports than the console's.
    """
    try:
        head = _head.decode(data)
        if head.kind != _KIND or head.version != _VERSION:
            raise RefusedError(
                f"a device state of {head.kind[:40]!r}, version {head.version}; "
                f"only version {_VERSION} of {_KIND!r} is known here"
            )
        device = _device.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RefusedError(f"no device state: {error}") from None
    if not 0 <= device.promised <= MOST_PORTS:
        raise RefusedError(f"the device state has room for {device.promised} ports")
    _check(console, device.ports)
    for port_id, event, message in device.waiting:
        known = port_id in console.ports or event is Event.PORT_REMOVE
        if not known or not 8 <= len(message) <= _LONGEST_MESSAGE:
            raise RefusedError(f"the device state has an impossible message for port {port_id}")
    return Loaded(console, device)


def _check(console: Console, saved: Iterable[_Port]) -> None:
    known = set()
    for each in saved:
        port = console.ports.get(each.id)
        if port is None or (port.name, port.console) != (each.name, each.console):
            kind = "console" if each.console else "generic"
            raise RefusedError(
                f"the device state has a {kind} port {each.id} named {each.name[:40]!r}: "
                "give this daemon the same ports"
            )
        if each.id in known:
            raise RefusedError(f"the device state has port {each.id} twice")
        known.add(each.id)
        if not 0 <= each.seen <= each.head < 1 << 63 or not 0 <= each.tail < 1 << 63:
            raise RefusedError(f"the device state of port {each.id} has impossible offsets")
        if len(each.output) > min(port.output.size, each.head - each.seen):
            raise RefusedError(f"port {each.id} has no room for the state's output")
        if (
            port.blocking
            and port.output.head - port.output.seen + len(each.output) > port.output.size
        ):
            raise RefusedError(
                f"port {each.id} has no room for the state's output: read what it has first"
            )
        if len(each.input) + len(port.input) > port.input.size:
            raise RefusedError(
                f"port {each.id} has no room for the state's input: {len(port.input)} bytes were "
                "typed here before the guest came"
            )
        if max(each.columns, each.rows) > 0xFFFF or min(each.columns, each.rows) < 0:
            raise RefusedError(f"the device state of port {each.id} has an impossible size")
