"""What each vhost-user message means: a message in, effects and a reply out.

A handler is a generator. It yields the effects it wants and is sent their results; what it returns
is the reply's payload, None where the protocol has none. It changes the session only after the last
of its effects was carried out, so a refused message changes nothing.

Source: QEMU docs/interop/vhost-user.rst, the sections "Starting and stopping rings", "Multiple
queue support" and "Message types".
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from ...errors import FrontendError, RefusedError
from . import message as wire
from .message import ProtocolFeature, Request, VringAddr


class SetFeatures(NamedTuple):
    """The guest's choice of virtio features."""

    features: int


class MapMemory(NamedTuple):
    """A new memory table, in place of the old one; one fd a region."""

    regions: list[wire.Region]
    fds: list[int]


class CheckRing(NamedTuple):
    """Are a ring's three areas in memory? It is not running."""

    ring: int
    size: int
    addr: VringAddr


class StartRing(NamedTuple):
    """Run a ring from now on, or give a running one another kick fd."""

    ring: int
    size: int
    addr: VringAddr
    kick: int
    enabled: bool


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
    """Where to tell the frontend that a ring is broken."""

    ring: int
    fd: int | None


class SetBackendChannel(NamedTuple):
    """The socket for messages of ours to the frontend."""

    fd: int


class ReadConfig(NamedTuple):
    """The result is that span of the device's configuration space."""

    offset: int
    size: int


class WriteConfig(NamedTuple):
    """A write of the guest's, or the frontend's, to the configuration space."""

    offset: int
    data: bytes


Effect = (
    SetFeatures
    | MapMemory
    | CheckRing
    | StartRing
    | EnableRing
    | StopRing
    | SetCall
    | SetError
    | SetBackendChannel
    | ReadConfig
    | WriteConfig
)

#: What a handler is: it yields effects, is sent results, returns the reply's payload.
Steps = Generator[Effect, Any, bytes | None]


def _done(reply: bytes | None = None) -> Steps:
    """Return the steps of a message that needs nothing done outside the session."""
    yield from ()
    return reply


PROTOCOL_FEATURES = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
)

#: Requests that may carry file descriptors.
_WITH_FDS = frozenset(
    {
        Request.SET_MEM_TABLE,
        Request.SET_VRING_KICK,
        Request.SET_VRING_CALL,
        Request.SET_VRING_ERR,
        Request.SET_BACKEND_REQ_FD,
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
    }
)


@dataclass(slots=True)
class _Ring:
    size: int = 0
    addr: VringAddr | None = None
    running: bool = False
    enabled: bool = False


class Session:
    """One frontend's connection: what was offered, what it chose, and where its rings are."""

    def __init__(self, features: int, queues: int, largest: int) -> None:
        """Offer `features` and `queues` queues of at most `largest` entries."""
        self.features = features | wire.PROTOCOL_FEATURES_BIT
        self.queues = queues
        self.largest = largest
        self.chosen = 0
        self.protocol = ProtocolFeature(0)
        self._rings = [_Ring() for _ in range(queues)]

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
        if fds and request not in _WITH_FDS:
            raise RefusedError(f"vhost-user request {request} came with {len(fds)} fds")
        return handler(self, payload, fds)

    def _ring(self, index: int) -> _Ring:
        if index >= self.queues:
            raise RefusedError(f"there is no queue {index}, only {self.queues}")
        return self._rings[index]

    def _stopped(self, index: int) -> _Ring:
        ring = self._ring(index)
        if ring.running:
            raise RefusedError(f"queue {index} cannot be changed while it runs")
        return ring

    def _get_features(self, payload: bytes, _: list[int]) -> Steps:
        _no_payload(payload)
        return _done(wire.encode_u64(self.features))

    def _set_features(self, payload: bytes, _: list[int]) -> Steps:
        chosen = wire.decode_u64(payload)
        if chosen & ~self.features:
            raise RefusedError(f"features {chosen & ~self.features:#x} were never offered")
        if chosen != self.chosen and any(ring.running for ring in self._rings):
            raise RefusedError("features cannot change while a queue runs")
        yield SetFeatures(chosen)
        self.chosen = chosen
        return None

    def _get_protocol_features(self, payload: bytes, _: list[int]) -> Steps:
        _no_payload(payload)
        return _done(wire.encode_u64(PROTOCOL_FEATURES))

    def _set_protocol_features(self, payload: bytes, _: list[int]) -> Steps:
        chosen = wire.decode_u64(payload)
        unknown = chosen & ~int(PROTOCOL_FEATURES)  # ~ of a flag forgets the bits without a name
        if unknown:
            raise RefusedError(f"protocol features {unknown:#x} were never offered")
        self.protocol = ProtocolFeature(chosen)
        return _done()

    def _nothing(self, payload: bytes, _: list[int]) -> Steps:
        _no_payload(payload)
        return _done()

    def _get_queue_num(self, payload: bytes, _: list[int]) -> Steps:
        _no_payload(payload)
        return _done(wire.encode_u64(self.queues))

    def _set_mem_table(self, payload: bytes, fds: list[int]) -> Steps:
        regions = wire.decode_regions(payload)
        if len(fds) != len(regions):
            raise RefusedError(f"{len(regions)} memory regions came with {len(fds)} fds")
        yield MapMemory(regions, fds)
        return None

    def _set_vring_num(self, payload: bytes, _: list[int]) -> Steps:
        index, size = wire.VringState.decode(payload)
        ring = self._stopped(index)
        if not 0 < size <= self.largest or size & (size - 1):
            raise RefusedError(
                f"queue {index} cannot have {size} entries: a power of two up to {self.largest}"
            )
        ring.size = size
        return _done()

    def _set_vring_addr(self, payload: bytes, _: list[int]) -> Steps:
        addr = VringAddr.decode(payload)
        ring = self._stopped(addr.ring)
        if not ring.size:
            raise RefusedError(f"queue {addr.ring} was given addresses before a size")
        yield CheckRing(addr.ring, ring.size, addr)
        ring.addr = addr
        return None

    def _set_vring_base(self, payload: bytes, _: list[int]) -> Steps:
        index, _base = wire.VringState.decode(payload)
        self._stopped(index)
        # The ring itself says where to go on: what is in its used index is done, nothing else is.
        return _done()

    def _get_vring_base(self, payload: bytes, _: list[int]) -> Steps:
        index, _num = wire.VringState.decode(payload)
        ring = self._ring(index)
        base = yield StopRing(index)
        ring.running = False
        return wire.VringState(index, base).encode()

    def _set_vring_kick(self, payload: bytes, fds: list[int]) -> Steps:
        index, fd = _vring_fd(payload, fds)
        ring = self._ring(index)
        if fd is None:
            raise RefusedError(f"queue {index} has no kick fd: rings are not polled here")
        if ring.addr is None:
            raise RefusedError(f"queue {index} cannot start: it has no addresses")
        # Without protocol features there is no SET_VRING_ENABLE: rings start enabled.
        enabled = ring.enabled or not self.chosen & wire.PROTOCOL_FEATURES_BIT
        yield StartRing(index, ring.size, ring.addr, fd, enabled)
        ring.running = True
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
        if len(fds) != 1:
            raise RefusedError(f"the backend channel is one fd, not {len(fds)}")
        yield SetBackendChannel(fds[0])
        return None

    def _get_config(self, payload: bytes, _: list[int]) -> Steps:
        offset, flags, data = wire.ConfigSpan.decode(payload)
        try:
            found = yield ReadConfig(offset, len(data))
        except RefusedError:
            return b""  # "zero length of payload to indicate an error"
        return wire.ConfigSpan(offset, flags, found).encode()

    def _set_config(self, payload: bytes, _: list[int]) -> Steps:
        offset, _flags, data = wire.ConfigSpan.decode(payload)
        yield WriteConfig(offset, data)
        return None

    _HANDLERS: ClassVar[dict[int, Callable[[Session, bytes, list[int]], Steps]]] = {
        Request.GET_FEATURES: _get_features,
        Request.SET_FEATURES: _set_features,
        Request.SET_OWNER: _nothing,
        # Deprecated; the specification recommends to ignore it.
        Request.RESET_OWNER: _nothing,
        Request.SET_MEM_TABLE: _set_mem_table,
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
    }


def _no_payload(payload: bytes) -> None:
    if payload:
        raise FrontendError(f"a message without payload has {len(payload)} bytes of it")


def _vring_fd(payload: bytes, fds: list[int]) -> tuple[int, int | None]:
    index, has_fd = wire.VringFd.decode(payload)
    if len(fds) != has_fd:
        raise RefusedError(f"a message for {int(has_fd)} fds came with {len(fds)}")
    return index, (fds[0] if has_fd else None)
