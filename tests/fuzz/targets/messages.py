"""Every decoder of vhost-user messages: what is accepted says the same when it is encoded again."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from vhost_device_console.errors import FrontendError
from vhost_device_console.worker.vhost_user import message as wire


def _header(data: bytes) -> bytes | None:
    if len(data) < wire.HEADER_SIZE:
        return None
    header = wire.decode_header(data[: wire.HEADER_SIZE])
    assert header.size <= wire.LARGEST_PAYLOAD
    encoded = wire.encode(
        header.request, bytes(header.size), reply=header.reply, need_reply=header.need_reply
    )
    again = wire.decode_header(encoded)
    assert again == header
    return None


def _regions(payload: bytes) -> bytes | None:
    regions = wire.decode_regions(payload)
    assert len(regions) <= wire.MOST_REGIONS
    assert wire.decode_regions(wire.encode_regions(regions)) == regions
    return None


def _region(payload: bytes) -> bytes:
    return bytes(8) + wire.encode_region(wire.decode_region(payload))[8:]


def _inflight(payload: bytes) -> bytes:
    return wire.InflightArea.decode(payload).encode()[: len(payload)]


#: Each returns what it makes of a payload when it encodes it again, None where that may differ.
DECODERS: list[Callable[[bytes], bytes | None]] = [
    _header,
    lambda payload: wire.encode_u64(wire.decode_u64(payload)),
    lambda payload: wire.VringState.decode(payload).encode(),
    lambda payload: wire.VringAddr.decode(payload).encode(),
    lambda payload: wire.VringFd.decode(payload).encode(),
    _regions,
    _region,
    lambda payload: wire.LogArea.decode(payload).encode(),
    _inflight,
    lambda payload: wire.StateTransfer.decode(payload).encode(),
    lambda payload: wire.ConfigSpan.decode(payload).encode(),
]


def run(data: bytes) -> None:
    """The first byte chooses the decoder, the others are its payload."""
    decode = DECODERS[data[0] % len(DECODERS)] if data else _header
    payload = data[1:]
    try:
        again = decode(payload)
    except FrontendError:
        return
    known = payload
    if decode is _region:
        known = bytes(8) + payload[8:]  # padding, which is not looked at
    elif decode is _inflight:
        known = payload[:20] + bytes(len(payload) - 20)
    assert again is None or again == known, f"{payload.hex()} became {again.hex()}"


def seeds() -> Iterable[bytes]:
    region = wire.Region(0x1000, 0x2000, 0x7F00_0000_0000, 0x3000)
    payloads = [
        wire.encode(wire.Request.SET_OWNER, b"12345678", need_reply=True),
        wire.encode_u64(1 << 30),
        wire.VringState(3, 256).encode(),
        wire.VringAddr(1, 1, 0x1000, 0x2000, 0x3000, 0x4000).encode(),
        wire.VringFd(255, False).encode(),
        wire.encode_regions([region] * 2) + bytes(32),
        wire.encode_region(region),
        wire.LogArea(4096, 8).encode(),
        wire.InflightArea(1024, 64, 4, 256).encode(),
        wire.StateTransfer(wire.Direction.LOAD, 0).encode(),
        wire.ConfigSpan(8, 1, b"abcd").encode(),
    ]
    for at, payload in enumerate(payloads):
        yield bytes([at]) + payload
        yield bytes([at]) + payload[:-1]
    yield b"\x08" + wire.InflightArea(1024, 64, 4, 256).encode()[:20]
