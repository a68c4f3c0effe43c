"""What each vhost-user message means: a message in, effects and a reply out.

A handler is a generator. It yields the effects it wants and is sent their results; what it returns
is the reply, None where the protocol has none. It changes the session only after the last of its
effects was carried out, so a refused message changes nothing.

Source: QEMU docs/interop/vhost-user.rst, the sections "Ring states", "Multiple queue support",
"Migration", "In-band notifications" and "Front-end message types".
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import msgspec

from ...errors import FrontendError, RefusedError
from . import message as wire
from .message import ProtocolFeature, Request, VringAddr


class SetFeatures(NamedTuple):
    """The guest's choice of virtio features; with LOG_ALL, written pages are logged."""

    features: int


class SetProtocolFeatures(NamedTuple):
    """The frontend's choice of protocol features."""

    features: ProtocolFeature


class MapMemory(NamedTuple):
    """A new memory table, in place of the old one; one fd a region."""

    regions: list[wire.Region]
    fds: list[int]


class AddMemory(NamedTuple):
    """One more memory region."""

    region: wire.Region
    fd: int


class RemoveMemory(NamedTuple):
    """One memory region less: that with these addresses and this size, wherever in its file."""

    region: wire.Region


class CheckSize(NamedTuple):
    """Refuse a number of entries that no ring of the chosen format has."""

    size: int


class CheckRing(NamedTuple):
    """Are a ring's three areas in memory? It is not running, or will be stopped."""

    ring: int
    size: int
    addr: VringAddr
    base: int


class StartRing(NamedTuple):
    """Run a ring from now on, or give a running one another kick fd.

    None: kicks are messages, or there are none and the ring is to be polled.

    `base` is where a ring goes on that cannot tell by itself.
    """

    ring: int
    size: int
    addr: VringAddr
    base: int
    kick: int | None
    enabled: bool


class KickRing(NamedTuple):
    """Serve a running ring now: the guest gave it buffers."""

    ring: int


class LogRing(NamedTuple):
    """Log a running ring's used writes as `addr` says; the ring stays where it is."""

    ring: int
    addr: VringAddr


class EnableRing(NamedTuple):
    """Let a running ring do its work, or let it run without effect."""

    ring: int
    enabled: bool


class StopRing(NamedTuple):
    """Stop a ring; the result is its index, where it is to go on."""

    ring: int


class SetCall(NamedTuple):
    """Where to tell the guest of used buffers; None: nowhere, it looks by itself."""

    ring: int
    fd: int | None


class SetError(NamedTuple):
    """Where to tell the frontend that a ring is broken; None: nowhere."""

    ring: int
    fd: int | None


class SetBackendChannel(NamedTuple):
    """The socket for messages of ours to the frontend."""

    fd: int


class SetLog(NamedTuple):
    """The bitmap of written pages, in place of any before it."""

    area: wire.LogArea
    fd: int


class SetLogEvent(NamedTuple):
    """Where to tell the frontend that the bitmap has changed."""

    fd: int


class MakeInflight(NamedTuple):
    """Make an area for buffers in flight; the result is (size, offset, fd), the fd to be closed."""

    queues: int
    queue_size: int


class SetInflight(NamedTuple):
    """Where the rings started from now on keep what is in flight."""

    area: wire.InflightArea
    fd: int


class AnyBroken(NamedTuple):
    """The result says whether a queue had to be stopped for what its guest did."""


class ResetDevice(NamedTuple):
    """Forget what the guest said; all rings are stopped."""


class SaveState(NamedTuple):
    """Write the device's state into a pipe or socket; all rings are stopped."""

    fd: int


class LoadState(NamedTuple):
    """Read the device's state from a pipe or socket; all rings are stopped."""

    fd: int


class CheckState(NamedTuple):
    """The result says whether the last state was saved or loaded whole."""


class ReadConfig(NamedTuple):
    """The result is that span of the device's configuration space."""

    offset: int
    size: int


class WriteConfig(NamedTuple):
    """A write of the guest's, or (flags 1) of a migration's, to the configuration space."""

    offset: int
    data: bytes
    flags: int


Effect = (
    SetFeatures
    | SetProtocolFeatures
    | MapMemory
    | AddMemory
    | RemoveMemory
    | CheckSize
    | CheckRing
    | StartRing
    | KickRing
    | LogRing
    | EnableRing
    | StopRing
    | SetCall
    | SetError
    | SetBackendChannel
    | SetLog
    | SetLogEvent
    | MakeInflight
    | SetInflight
    | AnyBroken
    | ResetDevice
    | SaveState
    | LoadState
    | CheckState
    | ReadConfig
    | WriteConfig
)


class Reply(NamedTuple):
    """What goes back to the frontend; `fd` is to be closed once it has been sent."""

    payload: bytes
    fd: int | None = None


#: What a handler is: it yields effects, is sent results, returns the reply.
Steps = Generator[Effect, Any, Reply | None]


def _done(payload: bytes | None = None) -> Steps:
    """Return the steps of a message that needs nothing done outside the session."""
    yield from ()
    return None if payload is None else Reply(payload)


PROTOCOL_FEATURES = (
    ProtocolFeature.MQ
    | ProtocolFeature.LOG_SHMFD
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.BACKEND_SEND_FD
    | ProtocolFeature.INFLIGHT_SHMFD
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
    | ProtocolFeature.DEVICE_STATE
)

#: What in-band notifications need: a way to send them and a way to wait for them.
_INBAND_NEEDS = ProtocolFeature.BACKEND_REQ | ProtocolFeature.REPLY_ACK

#: Requests that may carry file descriptors.
_WITH_FDS = frozenset(
    {
        Request.SET_MEM_TABLE,
        Request.SET_LOG_BASE,
        Request.SET_LOG_FD,
        Request.SET_VRING_KICK,
        Request.SET_VRING_CALL,
        Request.SET_VRING_ERR,
        Request.SET_BACKEND_REQ_FD,
        Request.SET_INFLIGHT_FD,
        Request.ADD_MEM_REG,
        # "For compatibility with existing incorrect implementations"; it is closed, unused.
        Request.REM_MEM_REG,
        Request.SET_DEVICE_STATE_FD,
    }
)

#: Requests that are answered with more than an acknowledgement.
_ANSWERED = frozenset(
    {
        Request.GET_FEATURES,
        Request.GET_PROTOCOL_FEATURES,
        Request.GET_QUEUE_NUM,
        Request.GET_VRING_BASE,
        Request.GET_CONFIG,
        Request.SET_LOG_BASE,
        Request.GET_INFLIGHT_FD,
        Request.GET_MAX_MEM_SLOTS,
        Request.GET_STATUS,
        Request.SET_DEVICE_STATE_FD,
        Request.CHECK_DEVICE_STATE,
    }
)

#: Requests that only exist once a protocol feature was chosen. GET_QUEUE_NUM and
#: SET_BACKEND_REQ_FD are not here: for them it is enough that theirs is offered.
_NEEDS: dict[int, ProtocolFeature] = {
    Request.SET_LOG_BASE: ProtocolFeature.LOG_SHMFD,
    Request.SET_LOG_FD: ProtocolFeature.LOG_SHMFD,
    Request.GET_CONFIG: ProtocolFeature.CONFIG,
    Request.SET_CONFIG: ProtocolFeature.CONFIG,
    Request.GET_INFLIGHT_FD: ProtocolFeature.INFLIGHT_SHMFD,
    Request.SET_INFLIGHT_FD: ProtocolFeature.INFLIGHT_SHMFD,
    Request.RESET_DEVICE: ProtocolFeature.RESET_DEVICE,
    Request.VRING_KICK: ProtocolFeature.INBAND_NOTIFICATIONS,
    Request.GET_MAX_MEM_SLOTS: ProtocolFeature.CONFIGURE_MEM_SLOTS,
    Request.ADD_MEM_REG: ProtocolFeature.CONFIGURE_MEM_SLOTS,
    Request.REM_MEM_REG: ProtocolFeature.CONFIGURE_MEM_SLOTS,
    Request.SET_STATUS: ProtocolFeature.STATUS,
    Request.GET_STATUS: ProtocolFeature.STATUS,
    Request.SET_DEVICE_STATE_FD: ProtocolFeature.DEVICE_STATE,
    Request.CHECK_DEVICE_STATE: ProtocolFeature.DEVICE_STATE,
}

#: The virtio feature bit that chooses the packed format for all rings.
_RING_PACKED = 1 << 34

#: Where a packed ring begins that nobody says more of: both indices 0, both wrap counters 1.
_PACKED_START = 0x8000_8000

#: The bits of the device status (VIRTIO 1.2, section 2.1).
_STATUS_BITS = 0x01 | 0x02 | 0x04 | 0x08 | 0x40 | 0x80
_NEEDS_RESET = 0x40

_TRANSFERS: dict[int, type[SaveState | LoadState]] = {
    wire.Direction.SAVE: SaveState,
    wire.Direction.LOAD: LoadState,
}

#: The answer to SET_DEVICE_STATE_FD: the frontend's own fd will do, or the transfer cannot be.
_STATE_ACCEPTED = wire.NO_FD
_STATE_REFUSED = wire.NO_FD | 1


@dataclass(slots=True)
class _Ring:
    """`base` is None until somebody says where the ring begins."""

    size: int = 0
    addr: VringAddr | None = None
    base: int | None = None
    running: bool = False
    enabled: bool = False


class SavedRing(msgspec.Struct, array_like=True):
    """A ring as the frontend described it, and whether it runs and is enabled."""

    size: int
    addr: tuple[int, ...] | None
    base: int | None
    running: bool
    enabled: bool


class Saved(msgspec.Struct, array_like=True, kw_only=True):
    """All that the frontend has said and that another process needs to go on with it."""

    chosen: int
    protocol: int
    named: int | None
    naming: bool
    status: int
    rings: dict[int, SavedRing]


class Session:
    """One frontend's connection: what was offered, what it chose, and where its rings are.

    `named` is how many queues the frontend has, as far as it told before it started a ring or read
    the configuration: QEMU names all of them as it connects. None: it named none.
    """

    def __init__(self, features: int, queues: int, largest: int, *, inband: bool = False) -> None:
        """Offer `features` and `queues` queues of at most `largest` entries.

        A frontend may describe more queues than that, up to 256: QEMU describes as many as its
        user said. `inband` offers in-band notifications too, which cost a round trip each.
        """
        self.features = features | wire.LOG_ALL_BIT | wire.PROTOCOL_FEATURES_BIT
        self.protocol_features = PROTOCOL_FEATURES | (
            ProtocolFeature.INBAND_NOTIFICATIONS if inband else ProtocolFeature(0)
        )
        self.queues = queues
        self.largest = largest
        self.chosen = 0
        self.protocol = ProtocolFeature(0)
        self.named: int | None = None
        self._naming = True
        self._status = 0
        self._rings: dict[int, _Ring] = {}

    def save(self) -> Saved:
        """Return what `resume` takes."""
        return Saved(
            chosen=self.chosen,
            protocol=self.protocol,
            named=self.named,
            naming=self._naming,
            status=self._status,
            rings={
                index: SavedRing(
                    ring.size,
                    None if ring.addr is None else tuple(ring.addr),
                    ring.base,
                    ring.running,
                    ring.enabled,
                )
                for index, ring in self._rings.items()
            },
        )

    def resume(self, saved: Saved) -> None:
        """Be the session that was saved; what is offered is as it is here."""
        self.chosen = saved.chosen
        self.protocol = ProtocolFeature(saved.protocol)
        self.named = saved.named
        self._naming = saved.naming
        self._status = saved.status
        self._rings = {
            index: _Ring(
                ring.size,
                None if ring.addr is None else VringAddr(*ring.addr),
                ring.base,
                ring.running,
                ring.enabled,
            )
            for index, ring in saved.rings.items()
        }

    def acknowledges(self, request: int, *, asked: bool) -> bool:
        """Say whether `request`, once handled, gets a u64 that tells how it went."""
        return asked and request not in _ANSWERED and ProtocolFeature.REPLY_ACK in self.protocol

    def handle(self, request: int, payload: bytes, fds: list[int]) -> Steps:
        """Return the steps that carry out one message.

        Running them raises RefusedError for a message that cannot be carried out, FrontendError
        for one whose payload is not what its request has. The effects that name fds own them once
        all steps are done; until then, and whenever a step fails, they are the caller's.
        """
        handler = self._HANDLERS.get(request)
        if handler is None:
            raise RefusedError(f"vhost-user request {request} is unknown or not supported")
        needed = _NEEDS.get(request)
        if needed is not None and needed not in self.protocol:
            raise RefusedError(f"vhost-user request {request} without {needed.name}")
        if fds and request not in _WITH_FDS:
            raise RefusedError(f"vhost-user request {request} came with {len(fds)} fds")
        return handler(self, payload, fds)

    def _ring(self, index: int) -> _Ring:
        if index >= wire.MOST_QUEUES:
            raise RefusedError(f"there is no queue {index}, only {wire.MOST_QUEUES}")
        if self._naming:
            self.named = max(self.named or 0, index + 1)
        return self._rings.setdefault(index, _Ring())

    def _running(self) -> list[int]:
        return [index for index, ring in self._rings.items() if ring.running]

    def _packed(self) -> bool:
        return bool(self.chosen & _RING_PACKED)

    def _base(self, ring: _Ring) -> int:
        if ring.base is None:
            return _PACKED_START if self._packed() else 0
        return ring.base

    def _stop(self, index: int) -> Steps:
        ring = self._rings[index]
        ring.base = yield StopRing(index)
        ring.running = False
        return None

    def _describe(self, index: int, ring: _Ring) -> Steps:
        """Stop a ring that is described anew.

        UML's driver, unbound and bound again, never says that a ring has stopped; it only disables
        it. A ring that is at work cannot be changed.
        """
        if ring.running:
            if ring.enabled or not self._can_disable():
                raise RefusedError(f"queue {index} cannot be changed while it runs")
            yield from self._stop(index)
        return None

    def _can_disable(self) -> bool:
        # Without protocol features there is no SET_VRING_ENABLE: rings are always enabled.
        return bool(self.chosen & wire.PROTOCOL_FEATURES_BIT)

    # Features

    def _get_features(self, payload: bytes, _: list[int]) -> Steps:
        _no_payload(payload)
        return _done(wire.encode_u64(self.features))

    def _set_features(self, payload: bytes, _: list[int]) -> Steps:
        chosen = wire.decode_u64(payload)
        if chosen & ~self.features:
            raise RefusedError(f"features {chosen & ~self.features:#x} were never offered")
        if (chosen ^ self.chosen) & ~wire.LOG_ALL_BIT and self._running():
            raise RefusedError("features other than LOG_ALL cannot change while a queue runs")
        yield SetFeatures(chosen)
        self.chosen = chosen
        return None

    def _get_protocol_features(self, payload: bytes, _: list[int]) -> Steps:
        _no_payload(payload)
        return _done(wire.encode_u64(self.protocol_features))

    def _set_protocol_features(self, payload: bytes, _: list[int]) -> Steps:
        chosen = wire.decode_u64(payload)
        # ~ of a flag forgets the bits without a name
        unknown = chosen & ~int(self.protocol_features)
        if unknown:
            raise RefusedError(f"protocol features {unknown:#x} were never offered")
        features = ProtocolFeature(chosen)
        if ProtocolFeature.INBAND_NOTIFICATIONS in features and _INBAND_NEEDS not in features:
            # "it has no other way of signalling this error": the connection is closed.
            raise FrontendError("in-band notifications without BACKEND_REQ and REPLY_ACK")
        yield SetProtocolFeatures(features)
        self.protocol = features
        return None

    def _nothing(self, payload: bytes, _: list[int]) -> Steps:
        _no_payload(payload)
        return _done()

    def _get_queue_num(self, payload: bytes, _: list[int]) -> Steps:
        _no_payload(payload)
        return _done(wire.encode_u64(self.queues))

    # Memory

    def _set_mem_table(self, payload: bytes, fds: list[int]) -> Steps:
        regions = wire.decode_regions(payload)
        if len(fds) != len(regions):
            raise RefusedError(f"{len(regions)} memory regions came with {len(fds)} fds")
        if not regions:
            raise RefusedError("a memory table has no regions")
        yield MapMemory(regions, fds)
        return None

    def _get_max_mem_slots(self, payload: bytes, _: list[int]) -> Steps:
        _no_payload(payload)
        return _done(wire.encode_u64(wire.MOST_SLOTS))

    def _add_mem_reg(self, payload: bytes, fds: list[int]) -> Steps:
        region = wire.decode_region(payload)
        yield AddMemory(region, _one(fds, "a memory region"))
        return None

    def _rem_mem_reg(self, payload: bytes, fds: list[int]) -> Steps:
        region = wire.decode_region(payload)
        if len(fds) > 1:
            raise RefusedError(f"a memory region to remove came with {len(fds)} fds")
        yield RemoveMemory(region)
        return None

    # Rings

    def _set_vring_num(self, payload: bytes, _: list[int]) -> Steps:
        index, size = wire.VringState.decode(payload)
        ring = self._ring(index)
        if size > self.largest:
            raise RefusedError(f"queue {index} cannot have {size} entries, only {self.largest}")
        yield CheckSize(size)
        yield from self._describe(index, ring)
        ring.size = size
        return None

    def _set_vring_addr(self, payload: bytes, _: list[int]) -> Steps:
        addr = VringAddr.decode(payload)
        ring = self._ring(addr.ring)
        if not ring.size:
            raise RefusedError(f"queue {addr.ring} was given addresses before a size")
        if ring.running and ring.addr is not None and _same_place(ring.addr, addr):
            # How a migration begins and ends.
            yield LogRing(addr.ring, addr)
        else:
            yield CheckRing(addr.ring, ring.size, addr, self._base(ring))
            yield from self._describe(addr.ring, ring)
        ring.addr = addr
        return None

    def _set_vring_base(self, payload: bytes, _: list[int]) -> Steps:
        index, base = wire.VringState.decode(payload)
        ring = self._ring(index)
        if base > 0xFFFF and not self._packed():
            raise RefusedError(f"queue {index} cannot begin at {base}: indices have 16 bits")
        yield from self._describe(index, ring)
        ring.base = base
        return None

    def _get_vring_base(self, payload: bytes, _: list[int]) -> Steps:
        index, _num = wire.VringState.decode(payload)
        ring = self._ring(index)
        if ring.running:
            yield from self._stop(index)
        return Reply(wire.VringState(index, self._base(ring)).encode())

    def _set_vring_kick(self, payload: bytes, fds: list[int]) -> Steps:
        index, fd = _vring_fd(payload, fds)
        ring = self._ring(index)
        yield from self._start(index, ring, fd)
        return None

    def _start(self, index: int, ring: _Ring, kick: int | None) -> Steps:
        if ring.addr is None:
            raise RefusedError(f"queue {index} cannot start: it has no addresses")
        enabled = ring.enabled or not self._can_disable()
        yield StartRing(index, ring.size, ring.addr, self._base(ring), kick, enabled)
        ring.running = True
        self._naming = False
        return None

    def _vring_kick(self, payload: bytes, _: list[int]) -> Steps:
        index, num = wire.VringState.decode(payload)
        ring = self._ring(index)
        if num:
            raise RefusedError(f"a kick of queue {index} has the reserved number {num}")
        if not ring.running:
            yield from self._start(index, ring, None)
        yield KickRing(index)
        return None

    def _set_vring_call(self, payload: bytes, fds: list[int]) -> Steps:
        index, fd = _vring_fd(payload, fds)
        self._ring(index)
        yield SetCall(index, fd)
        return None

    def _set_vring_err(self, payload: bytes, fds: list[int]) -> Steps:
        index, fd = _vring_fd(payload, fds)
        self._ring(index)
        yield SetError(index, fd)
        return None

    def _set_vring_enable(self, payload: bytes, _: list[int]) -> Steps:
        index, num = wire.VringState.decode(payload)
        ring = self._ring(index)
        if num > 1:
            raise RefusedError(f"queue {index} can be enabled (1) or not (0), not {num}")
        if ring.running:
            yield EnableRing(index, bool(num))
        ring.enabled = bool(num)
        return None

    def _set_backend_req_fd(self, payload: bytes, fds: list[int]) -> Steps:
        _no_payload(payload)
        yield SetBackendChannel(_one(fds, "the backend channel"))
        return None

    # Migration

    def _set_log_base(self, payload: bytes, fds: list[int]) -> Steps:
        area = wire.LogArea.decode(payload)
        yield SetLog(area, _one(fds, "a log"))
        # QEMU reads any answer; the rust-vmm frontend wants its own words back.
        return Reply(payload)

    def _set_log_fd(self, payload: bytes, fds: list[int]) -> Steps:
        _no_payload(payload)
        yield SetLogEvent(_one(fds, "a log's event"))
        return None

    def _get_inflight_fd(self, payload: bytes, _: list[int]) -> Steps:
        _size, _offset, queues, queue_size = wire.InflightArea.decode(payload)
        try:
            _check_queues(queues)
            size, offset, fd = yield MakeInflight(queues, queue_size)
        except RefusedError:
            size, offset, fd = 0, 0, None  # QEMU then does without
        area = wire.InflightArea(size, offset, queues, queue_size)
        return Reply(area.encode()[: len(payload)], fd)

    def _set_inflight_fd(self, payload: bytes, fds: list[int]) -> Steps:
        area = wire.InflightArea.decode(payload)
        _check_queues(area.queues)
        yield SetInflight(area, _one(fds, "an inflight area"))
        return None

    def _set_device_state_fd(self, payload: bytes, fds: list[int]) -> Steps:
        direction, phase = wire.StateTransfer.decode(payload)
        effect = _TRANSFERS.get(direction)
        if len(fds) != 1 or effect is None or phase != wire.PHASE_STOPPED or self._running():
            return Reply(wire.encode_u64(_STATE_REFUSED))
        try:
            yield effect(fds[0])
        except RefusedError:
            return Reply(wire.encode_u64(_STATE_REFUSED))
        return Reply(wire.encode_u64(_STATE_ACCEPTED))

    def _check_device_state(self, payload: bytes, _: list[int]) -> Steps:
        _no_payload(payload)
        whole = yield CheckState()
        return Reply(wire.encode_u64(0 if whole else 1))

    # The device

    def _reset_device(self, payload: bytes, _: list[int]) -> Steps:
        _no_payload(payload)
        for index in self._running():
            yield from self._stop(index)
        yield SetFeatures(0)
        yield ResetDevice()
        self._rings.clear()
        self.chosen = self._status = 0
        return None

    def _set_status(self, payload: bytes, _: list[int]) -> Steps:
        status = wire.decode_u64(payload)
        if status & ~_STATUS_BITS:
            raise RefusedError(f"the device status {status:#x} has unknown bits")
        if not status:
            # The console itself is not reset: QEMU says this whenever a guest is paused, and a
            # guest that really resets its device has rings that begin anew.
            for index in self._running():
                yield from self._stop(index)
        self._status = status
        return None

    def _get_status(self, payload: bytes, _: list[int]) -> Steps:
        _no_payload(payload)
        broken = yield AnyBroken()
        return Reply(wire.encode_u64(self._status | (_NEEDS_RESET if broken else 0)))

    def _get_config(self, payload: bytes, _: list[int]) -> Steps:
        offset, flags, data = wire.ConfigSpan.decode(payload)
        self._naming = False
        try:
            found = yield ReadConfig(offset, len(data))
        except RefusedError:
            return Reply(b"")  # "zero length of payload to indicate an error"
        return Reply(wire.ConfigSpan(offset, flags, found).encode())

    def _set_config(self, payload: bytes, _: list[int]) -> Steps:
        offset, flags, data = wire.ConfigSpan.decode(payload)
        yield WriteConfig(offset, data, flags)
        return None

    _HANDLERS: ClassVar[dict[int, Callable[[Session, bytes, list[int]], Steps]]] = {
        Request.GET_FEATURES: _get_features,
        Request.SET_FEATURES: _set_features,
        Request.SET_OWNER: _nothing,
        # Deprecated; the specification recommends to ignore it.
        Request.RESET_OWNER: _nothing,
        Request.SET_MEM_TABLE: _set_mem_table,
        Request.SET_LOG_BASE: _set_log_base,
        Request.SET_LOG_FD: _set_log_fd,
        Request.SET_VRING_NUM: _set_vring_num,
        Request.SET_VRING_ADDR: _set_vring_addr,
        Request.SET_VRING_BASE: _set_vring_base,
        Request.GET_VRING_BASE: _get_vring_base,
        Request.SET_VRING_KICK: _set_vring_kick,
        Request.SET_VRING_CALL: _set_vring_call,
        Request.SET_VRING_ERR: _set_vring_err,
        Request.GET_PROTOCOL_FEATURES: _get_protocol_features,
        Request.SET_PROTOCOL_FEATURES: _set_protocol_features,
        Request.GET_QUEUE_NUM: _get_queue_num,
        Request.SET_VRING_ENABLE: _set_vring_enable,
        Request.SET_BACKEND_REQ_FD: _set_backend_req_fd,
        Request.GET_CONFIG: _get_config,
        Request.SET_CONFIG: _set_config,
        Request.GET_INFLIGHT_FD: _get_inflight_fd,
        Request.SET_INFLIGHT_FD: _set_inflight_fd,
        Request.RESET_DEVICE: _reset_device,
        Request.VRING_KICK: _vring_kick,
        Request.GET_MAX_MEM_SLOTS: _get_max_mem_slots,
        Request.ADD_MEM_REG: _add_mem_reg,
        Request.REM_MEM_REG: _rem_mem_reg,
        Request.SET_STATUS: _set_status,
        Request.GET_STATUS: _get_status,
        Request.SET_DEVICE_STATE_FD: _set_device_state_fd,
        Request.CHECK_DEVICE_STATE: _check_device_state,
    }


def _no_payload(payload: bytes) -> None:
    if payload:
        raise FrontendError(f"a message without payload has {len(payload)} bytes of it")


def _one(fds: list[int], what: str) -> int:
    if len(fds) != 1:
        raise RefusedError(f"{what} is one fd, not {len(fds)}")
    return fds[0]


def _check_queues(queues: int) -> None:
    if queues > wire.MOST_QUEUES:
        raise RefusedError(f"there are no {queues} queues, only {wire.MOST_QUEUES}")


def _vring_fd(payload: bytes, fds: list[int]) -> tuple[int, int | None]:
    index, has_fd = wire.VringFd.decode(payload)
    if len(fds) != has_fd:
        raise RefusedError(f"a message for {int(has_fd)} fds came with {len(fds)}")
    return index, (fds[0] if has_fd else None)


def _same_place(one: VringAddr, other: VringAddr) -> bool:
    return one._replace(flags=0, log=0) == other._replace(flags=0, log=0)
