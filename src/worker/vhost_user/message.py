"""The vhost-user wire: numbers, layouts and syntax checks; meaning lives in `session`.

Source: QEMU docs/interop/vhost-user.rst. A message is a header of three u32 (request, flags,
payload size) and a payload, all in the machine's own byte order; file descriptors ride on the
header's first bytes.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import NamedTuple

from ...errors import FrontendError, RefusedError

VERSION = 1
_VERSION_MASK = 0x3
_REPLY = 1 << 2
_NEED_REPLY = 1 << 3

_HEADER = struct.Struct("=III")
HEADER_SIZE = _HEADER.size

#: No message of the protocol is longer; checked before anything is allocated.
LARGEST_PAYLOAD = 4096

MOST_REGIONS = 8


class Request(IntEnum):
    """Messages from the frontend to the backend."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43


class BackendRequest(IntEnum):
    """Messages from the backend to the frontend, on the channel of SET_BACKEND_REQ_FD."""

    CONFIG_CHANGE_MSG = 2
    VRING_CALL = 4
    VRING_ERR = 5


class ProtocolFeature(IntFlag):
    """Bits of GET_PROTOCOL_FEATURES and SET_PROTOCOL_FEATURES."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    REPLY_ACK = 1 << 3
    BACKEND_REQ = 1 << 5
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    DEVICE_STATE = 1 << 19


#: The virtio feature bit that says protocol features can be negotiated.
PROTOCOL_FEATURES_BIT = 1 << 30

#: The virtio feature bit by which a frontend starts and stops the logging of written pages.
LOG_ALL_BIT = 1 << 26

#: The most queues there can be: SET_VRING_KICK names them in eight bits.
MOST_QUEUES = 256

#: The most memory regions that ADD_MEM_REG can make, as libvhost-user has it.
MOST_SLOTS = 509


class Header(NamedTuple):
    """A message's first twelve bytes, checked; `size` counts the payload's bytes."""

    request: int
    size: int
    reply: bool
    need_reply: bool


def decode_header(data: bytes | bytearray | memoryview) -> Header:
    """Return the header in the first `HEADER_SIZE` bytes of `data`.

    Raises FrontendError when no later byte of the stream could be trusted: another protocol
    version, or a size that no message has.
    """
    request, flags, size = _HEADER.unpack_from(data)
    if flags & _VERSION_MASK != VERSION:
        raise FrontendError(
            f"vhost-user message {request} has protocol version {flags & _VERSION_MASK}, "
            f"only {VERSION} exists"
        )
    if size > LARGEST_PAYLOAD:
        raise FrontendError(
            f"vhost-user message {request} says it has {size} bytes, the limit is {LARGEST_PAYLOAD}"
        )
    return Header(request, size, bool(flags & _REPLY), bool(flags & _NEED_REPLY))


def encode(
    request: int, payload: bytes = b"", *, reply: bool = False, need_reply: bool = False
) -> bytes:
    """Return one whole message: header and payload."""
    flags = VERSION | (_REPLY if reply else 0) | (_NEED_REPLY if need_reply else 0)
    return _HEADER.pack(request, flags, len(payload)) + payload


def _exactly(layout: struct.Struct, payload: bytes, what: str) -> tuple[int, ...]:
    if len(payload) != layout.size:
        raise FrontendError(f"{what} has {len(payload)} bytes of payload, not {layout.size}")
    return layout.unpack(payload)


_U64 = struct.Struct("=Q")


def encode_u64(value: int) -> bytes:
    """Return the payload of every message that carries one u64."""
    return _U64.pack(value)


def decode_u64(payload: bytes) -> int:
    """Return the u64 that is the whole payload. Raises FrontendError on another size."""
    (value,) = _exactly(_U64, payload, "a u64 message")
    return value


_STATE = struct.Struct("=II")


class VringState(NamedTuple):
    """A ring's index (`ring`) and a number: size, base, or 1 for enabled."""

    ring: int
    num: int

    def encode(self) -> bytes:
        """Return the 8-byte payload."""
        return _STATE.pack(*self)

    @classmethod
    def decode(cls, payload: bytes) -> VringState:
        """Return the payload's meaning. Raises FrontendError on another size."""
        return cls(*_exactly(_STATE, payload, "a vring state"))


_ADDR = struct.Struct("=IIQQQQ")


#: In `VringAddr.flags`: writes to the used ring are logged, as if it lay at `VringAddr.log`.
VRING_F_LOG = 1


class VringAddr(NamedTuple):
    """Where a ring's three parts are, as addresses of the frontend's own process.

    `log` is a guest address. On the wire the used ring stands before the available ring.
    """

    ring: int
    flags: int
    desc: int
    used: int
    avail: int
    log: int

    def encode(self) -> bytes:
        """Return the 40-byte payload."""
        return _ADDR.pack(*self)

    @classmethod
    def decode(cls, payload: bytes) -> VringAddr:
        """Return the payload's meaning. Raises FrontendError on another size."""
        return cls(*_exactly(_ADDR, payload, "a vring address"))


_VRING_INDEX_MASK = 0xFF

#: In the u64 of SET_VRING_KICK, CALL and ERR, and in the answer to SET_DEVICE_STATE_FD: no fd.
NO_FD = 1 << 8


class VringFd(NamedTuple):
    """Payload of SET_VRING_KICK, CALL and ERR: whose fd it is, and whether one came along."""

    ring: int
    has_fd: bool

    def encode(self) -> bytes:
        """Return the 8-byte payload."""
        return encode_u64(self.ring | (0 if self.has_fd else NO_FD))

    @classmethod
    def decode(cls, payload: bytes) -> VringFd:
        """Return the payload's meaning. Raises FrontendError on another size or unknown bits."""
        value = decode_u64(payload)
        if value & ~(_VRING_INDEX_MASK | NO_FD):
            raise RefusedError(f"vring fd message has unknown bits: {value:#x}")
        return cls(value & _VRING_INDEX_MASK, not value & NO_FD)


_TABLE = struct.Struct("=II")
_REGION = struct.Struct("=QQQQ")


class Region(NamedTuple):
    """One memory region, in bytes: where the guest and the frontend see it, and where its fd."""

    guest_addr: int
    size: int
    user_addr: int
    mmap_offset: int


def encode_regions(regions: list[Region]) -> bytes:
    """Return the payload of SET_MEM_TABLE."""
    return _TABLE.pack(len(regions), 0) + b"".join(_REGION.pack(*region) for region in regions)


def decode_regions(payload: bytes) -> list[Region]:
    """Return the regions of SET_MEM_TABLE.

    Linux' virtio_uml before 7.0 always sends room for two regions, so bytes past the last counted
    one are passed over. Raises FrontendError when the payload is shorter than its count says,
    RefusedError when the count is more than the protocol allows.
    """
    if len(payload) < _TABLE.size:
        raise FrontendError(f"a memory table has {len(payload)} bytes, not even its count")
    count, _ = _TABLE.unpack_from(payload)
    if count > MOST_REGIONS:
        raise RefusedError(f"a memory table has {count} regions, the limit is {MOST_REGIONS}")
    if len(payload) < _TABLE.size + count * _REGION.size:
        raise FrontendError(f"a memory table of {count} regions has only {len(payload)} bytes")
    return [
        Region(*_REGION.unpack_from(payload, _TABLE.size + index * _REGION.size))
        for index in range(count)
    ]


_SINGLE_REGION = struct.Struct("=QQQQQ")


def encode_region(region: Region) -> bytes:
    """Return the payload of ADD_MEM_REG and REM_MEM_REG: 8 bytes of padding, one region."""
    return _SINGLE_REGION.pack(0, *region)


def decode_region(payload: bytes) -> Region:
    """Return the region of ADD_MEM_REG or REM_MEM_REG. Raises FrontendError on another size."""
    return Region(*_exactly(_SINGLE_REGION, payload, "a memory region")[1:])


_LOG = struct.Struct("=QQ")


class LogArea(NamedTuple):
    """Payload of SET_LOG_BASE: how large the dirty bitmap is and where in its fd, in bytes."""

    size: int
    offset: int

    def encode(self) -> bytes:
        """Return the 16-byte payload."""
        return _LOG.pack(*self)

    @classmethod
    def decode(cls, payload: bytes) -> LogArea:
        """Return the payload's meaning. Raises FrontendError on another size."""
        return cls(*_exactly(_LOG, payload, "a log area"))


_INFLIGHT = struct.Struct("=QQHH")
_INFLIGHT_PADDING = 4


class InflightArea(NamedTuple):
    """Payload of GET_INFLIGHT_FD and SET_INFLIGHT_FD.

    Where in its fd the area is, in bytes, and for how many queues of how many entries.
    """

    size: int
    offset: int
    queues: int
    queue_size: int

    def encode(self) -> bytes:
        """Return the payload as C compilers lay it out, in 24 bytes."""
        return _INFLIGHT.pack(*self) + bytes(_INFLIGHT_PADDING)

    @classmethod
    def decode(cls, payload: bytes) -> InflightArea:
        """Return the payload's meaning, with or without the four bytes of padding at its end.

        Raises FrontendError on another size.
        """
        if len(payload) == _INFLIGHT.size + _INFLIGHT_PADDING:
            payload = payload[: _INFLIGHT.size]
        return cls(*_exactly(_INFLIGHT, payload, "an inflight area"))


class Direction(IntEnum):
    """Which way SET_DEVICE_STATE_FD moves the device's state."""

    SAVE = 0  #: from the backend to the frontend
    LOAD = 1


#: The one phase of a transfer there is: all rings are stopped.
PHASE_STOPPED = 0


class StateTransfer(NamedTuple):
    """Payload of SET_DEVICE_STATE_FD: a `Direction` and a phase, as they came."""

    direction: int
    phase: int

    def encode(self) -> bytes:
        """Return the 8-byte payload."""
        return _STATE.pack(*self)

    @classmethod
    def decode(cls, payload: bytes) -> StateTransfer:
        """Return the payload's meaning. Raises FrontendError on another size."""
        return cls(*_exactly(_STATE, payload, "a state transfer"))


_CONFIG = struct.Struct("=III")

#: The most bytes of device configuration that one message moves.
LARGEST_CONFIG = 256


class ConfigSpan(NamedTuple):
    """Payload of GET_CONFIG and SET_CONFIG: a span of the device's configuration space."""

    offset: int
    flags: int
    data: bytes

    def encode(self) -> bytes:
        """Return the payload: offset, size, flags, data."""
        return _CONFIG.pack(self.offset, len(self.data), self.flags) + self.data

    @classmethod
    def decode(cls, payload: bytes) -> ConfigSpan:
        """Return the payload's meaning.

        Raises FrontendError when the size field and the payload's length differ, or are too large.
        """
        if len(payload) < _CONFIG.size:
            raise FrontendError(f"a config message has {len(payload)} bytes, not even its header")
        offset, size, flags = _CONFIG.unpack_from(payload)
        if size > LARGEST_CONFIG or len(payload) != _CONFIG.size + size:
            raise FrontendError(
                f"a config message of {size} bytes has {len(payload) - _CONFIG.size}"
            )
        return cls(offset, flags, payload[_CONFIG.size :])
