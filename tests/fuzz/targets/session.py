"""Sequences of messages through a session, whose effects a model carries out or refuses.

A session and whoever carries out its effects must agree on which rings run, and a refused message
must leave no trace. The model refuses what it may: never to stop a ring.
"""

from __future__ import annotations

import copy
import struct
from collections.abc import Iterable
from typing import Any

import msgspec
from source import Source
from vhost_device_console.errors import FrontendError, RefusedError
from vhost_device_console.worker.vhost_user import message as wire
from vhost_device_console.worker.vhost_user import session as fx
from vhost_device_console.worker.vhost_user.message import Request

_FEATURES = 1 << 32 | 1 << 34 | 0b111
_LARGEST = 256

REQUESTS = list(Request)
RINGS = [0, 1, 2, 3, 4, 5, 255, 256, 65536, 0xFFFF_FFFF]
NUMBERS = [0, 1, 2, 3, 4, 64, 256, 512, 0x8000, 0xFFFF, 0x1_0000, 0x8000_8000, 0xFFFF_FFFF]
WORDS = [
    *(0, 1, 2, 0x1000, 0x10_0000, 1 << 30, 1 << 32, 1 << 34, 1 << 26, 1 << 32 | 1 << 30),
    *(1 << 34 | 1 << 32 | 1 << 30, 1 << 26 | 1 << 30, 0x7F00_0000_0000, (1 << 64) - 1),
    int(fx.PROTOCOL_FEATURES),
    int(fx.PROTOCOL_FEATURES | wire.ProtocolFeature.INBAND_NOTIFICATIONS),
    int(wire.ProtocolFeature.INBAND_NOTIFICATIONS),
]

_STATES = {
    *(Request.SET_VRING_NUM, Request.SET_VRING_BASE, Request.GET_VRING_BASE),
    *(Request.SET_VRING_ENABLE, Request.VRING_KICK),
}
_U64S = {Request.SET_FEATURES, Request.SET_PROTOCOL_FEATURES, Request.SET_STATUS}
_FDS = {Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR}

#: Refused or not, these rings are left as they are.
_NEVER_REFUSED = (fx.StopRing, fx.AnyBroken, fx.CheckState, fx.ResetDevice, fx.KickRing)


_BLANK = fx.Session(0, 0, 0)._ring(0)  # noqa: SLF001


class Model:
    """Who carries out effects: `running` are the rings that do, each enabled or not."""

    def __init__(self) -> None:
        self.running: dict[int, bool] = {}
        self.stopped_at = 0

    def apply(self, effect: fx.Effect) -> Any:
        match effect:
            case fx.StartRing(ring, size, addr, base, _kick, enabled):
                assert 0 <= ring < wire.MOST_QUEUES
                assert 0 < size <= _LARGEST
                assert addr.ring == ring
                assert 0 <= base <= 0xFFFF_FFFF
                self.running.setdefault(ring, enabled)
            case fx.StopRing(ring):
                del self.running[ring]
                self.stopped_at = (self.stopped_at + 1) & 0xFFFF
                return self.stopped_at
            case fx.EnableRing(ring, enabled):
                self.running[ring] = enabled
            case fx.KickRing(ring) | fx.LogRing(ring):
                assert ring in self.running
            case fx.ResetDevice() | fx.SaveState() | fx.LoadState():
                assert not self.running
            case fx.MakeInflight(queues, _):
                assert queues <= wire.MOST_QUEUES
                return 4096, 0, 99
            case fx.ReadConfig(_, size):
                assert size <= wire.LARGEST_CONFIG
                return bytes(size)
            case fx.AnyBroken() | fx.CheckState():
                return True
            case fx.MapMemory(regions, fds):
                assert len(regions) == len(fds) > 0
        return None


def make_payload(request: int, source: Source) -> bytes:
    """Return a payload of the right shape, with numbers that are often worth a try."""
    if request in _STATES:
        return wire.VringState(source.pick(RINGS), source.pick(NUMBERS)).encode()
    if request in _U64S:
        return wire.encode_u64(source.pick(WORDS))
    if request in _FDS:
        return wire.encode_u64(source.pick(RINGS) & 0xFF | source.byte() % 2 << 8)
    match request:
        case Request.SET_VRING_ADDR:
            words = [source.pick(WORDS) for _ in range(4)]
            return wire.VringAddr(source.pick(RINGS), source.byte() % 2, *words).encode()
        case Request.SET_MEM_TABLE:
            region = wire.Region(*[source.pick(WORDS) for _ in range(4)])
            return wire.encode_regions([region] * (source.byte() % 10))
        case Request.ADD_MEM_REG | Request.REM_MEM_REG:
            return wire.encode_region(wire.Region(*[source.pick(WORDS) for _ in range(4)]))
        case Request.SET_LOG_BASE:
            return wire.LogArea(source.pick(WORDS), source.pick(WORDS)).encode()
        case Request.GET_INFLIGHT_FD | Request.SET_INFLIGHT_FD:
            queues, size = source.number(2), source.number(2)
            area = wire.InflightArea(source.pick(WORDS), source.pick(WORDS), queues, size)
            return area.encode()[: 20 + 4 * (source.byte() % 2)]
        case Request.SET_DEVICE_STATE_FD:
            return wire.StateTransfer(source.byte() % 3, source.byte() % 2).encode()
        case Request.GET_CONFIG | Request.SET_CONFIG:
            size = source.byte()
            return wire.ConfigSpan(source.byte(), source.byte() % 2, bytes(size)).encode()
    return b""


def _trace(session: fx.Session) -> dict[str, Any]:
    """Return all that a session remembers; a ring of which nothing is known is no ring."""
    known = dict(vars(session))
    rings = known["_rings"].items()
    known["_rings"] = {at: copy.copy(ring) for at, ring in rings if ring != _BLANK}
    # How many queues the frontend has it tells by naming them, rightly or not.
    del known["named"]
    return known


def run(data: bytes) -> None:
    """The first byte chooses what is offered; then one message after another."""
    source = Source(data)
    session = fx.Session(_FEATURES, 16, _LARGEST, inband=bool(source.byte() % 2))
    model = Model()
    while source:
        chosen = source.byte()
        if chosen & 0x80:
            request: int = source.number(1 + chosen % 4)
            payload = source.take(source.byte())
        else:
            request = REQUESTS[chosen % len(REQUESTS)]
            payload = make_payload(request, source)
        how = source.byte()
        fds = [*range(100, 100 + (how & 3))]
        if request == Request.SET_MEM_TABLE and not how & 4 and len(payload) >= 4:
            fds = [*range(100, 100 + struct.unpack_from("=I", payload)[0] % 16)]
        _handle(session, model, request, payload, fds, how >> 3)


def _handle(
    session: fx.Session, model: Model, request: int, payload: bytes, fds: list[int], refuse: int
) -> None:
    """Have one message carried out, whose effect number `refuse` is refused, 0 for none."""
    before = _trace(session)
    running = model.running.copy()
    session.acknowledges(request, asked=True)
    try:
        reply = _carry_out(session.handle(request, payload, fds), model, refuse)
    except RefusedError:
        if running == model.running:
            assert _trace(session) == before
    except FrontendError:
        assert _trace(session) == before
    else:
        if reply is not None:
            assert len(reply.payload) <= wire.LARGEST_PAYLOAD
            wire.encode(request, reply.payload, reply=True)
            assert not session.acknowledges(request, asked=True)
    _check_saved(session)
    known = session._rings  # noqa: SLF001
    assert len(known) <= wire.MOST_QUEUES
    assert {at: ring.enabled for at, ring in known.items() if ring.running} == {
        at: known[at].enabled for at in model.running
    }


def _check_saved(session: fx.Session) -> None:
    """What a successor makes of the saved session is the same session."""
    saved = msgspec.msgpack.decode(msgspec.msgpack.encode(session.save()), type=fx.Saved)
    again = fx.Session(_FEATURES, 16, _LARGEST)
    again.protocol_features = session.protocol_features
    again.resume(saved)
    assert vars(again) == vars(session)


def _carry_out(steps: fx.Steps, model: Model, refuse: int) -> fx.Reply | None:
    result: Any = None
    error: RefusedError | None = None
    while True:
        try:
            effect = next(steps) if error is None and result is None else None
            if effect is None:
                effect = steps.throw(error) if error is not None else steps.send(result)
        except StopIteration as end:
            value: fx.Reply | None = end.value
            return value
        result = error = None
        refuse -= 1
        impossible = isinstance(effect, fx.CheckSize) and not effect.size
        if impossible or (not refuse and not isinstance(effect, _NEVER_REFUSED)):
            error = RefusedError("as the input says")
        else:
            result = model.apply(effect)


def seeds() -> Iterable[bytes]:
    def named(request: Request, *rest: int) -> bytes:
        return bytes([REQUESTS.index(request), *rest])

    features = WORDS.index(1 << 32 | 1 << 30)
    everything = WORDS.index(int(fx.PROTOCOL_FEATURES | wire.ProtocolFeature.INBAND_NOTIFICATIONS))
    begin = b"\x01" + b"".join(
        [
            named(Request.SET_OWNER, 0),
            named(Request.GET_FEATURES, 0),
            named(Request.GET_PROTOCOL_FEATURES, 0),
            named(Request.SET_PROTOCOL_FEATURES, everything, 0),
            named(Request.SET_FEATURES, features, 0),
            named(Request.SET_MEM_TABLE, 3, 3, 12, 0, 1, 0),
        ]
    )
    ring = b"".join(
        [
            named(Request.SET_VRING_NUM, 0, 5, 0),
            named(Request.SET_VRING_BASE, 0, 0, 0),
            named(Request.SET_VRING_ADDR, 3, 3, 3, 3, 0, 1, 0),
            named(Request.SET_VRING_CALL, 0, 0, 1),
            named(Request.SET_VRING_ERR, 0, 1, 0),
            named(Request.SET_VRING_KICK, 0, 0, 1),
            named(Request.SET_VRING_ENABLE, 0, 1, 0),
        ]
    )
    yield begin
    yield begin + ring
    others = [
        named(Request.GET_VRING_BASE, 0, 0, 0),
        named(Request.VRING_KICK, 0, 0, 0),
        named(Request.RESET_DEVICE, 0),
        named(Request.SET_STATUS, 0, 0) + named(Request.GET_STATUS, 0),
        named(Request.SET_LOG_BASE, 3, 0, 1) + named(Request.SET_LOG_FD, 1),
        named(Request.GET_INFLIGHT_FD, 2, 0, 64, 0, 3, 0, 1, 0),
        named(Request.SET_INFLIGHT_FD, 2, 0, 64, 0, 3, 0, 1, 1),
        named(Request.ADD_MEM_REG, 3, 3, 3, 0, 1) + named(Request.REM_MEM_REG, 3, 3, 3, 0, 0),
        named(Request.GET_CONFIG, 12, 0, 0, 0) + named(Request.SET_CONFIG, 4, 8, 0, 0),
        named(Request.SET_DEVICE_STATE_FD, 0, 0, 1) + named(Request.CHECK_DEVICE_STATE, 0),
        named(Request.SET_VRING_NUM, 0, 4, 0),
        named(Request.SET_VRING_ADDR, 3, 3, 3, 4, 0, 1, 0),
        named(Request.SET_BACKEND_REQ_FD, 1),
        named(Request.GET_QUEUE_NUM, 0) + named(Request.GET_MAX_MEM_SLOTS, 0),
        b"\x80\x29\x04abcd\x00" + b"\x83\xff\xff\xff\xff\x00\x01",
    ]
    for other in others:
        yield begin + ring + other
        yield begin + other
