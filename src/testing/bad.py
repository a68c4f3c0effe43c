"""vhost-user messages that are wrong on purpose, as bytes for `Frontend.send_raw`.

Each is one thing wrong and otherwise well-formed; ring indices are 0 where they do not matter.
"""

from __future__ import annotations

import struct
from enum import Enum
from typing import NamedTuple

_HEADER = struct.Struct("=III")
_VERSION = 1
_REPLY = 4
_NEED_REPLY = 8


class Consequence(Enum):
    """What a careful backend does."""

    REFUSE = "refuse"  #: says no, where REPLY_ACK allows it, and goes on
    CLOSE = "close"  #: drops the connection, since the stream cannot be trusted any more


class BadMessage(NamedTuple):
    """A wrong message: its bytes, how many descriptors to send along, what should follow.

    `hang_up` says that the message only shows to be wrong once the frontend has hung up. A message
    to be refused asks for a reply, so that the refusal can be seen.
    """

    name: str
    data: bytes
    consequence: Consequence
    fds: int = 0
    hang_up: bool = False


def raw_message(
    request: int, payload: bytes = b"", *, flags: int = _VERSION, size: int | None = None
) -> bytes:
    """Return a message with any flags and any size field."""
    return _HEADER.pack(request, flags, len(payload) if size is None else size) + payload


def _refused(name: str, request: int, payload: bytes = b"", *, fds: int = 0) -> BadMessage:
    data = raw_message(request, payload, flags=_VERSION | _NEED_REPLY)
    return BadMessage(name, data, Consequence.REFUSE, fds)


def _closed(name: str, data: bytes, *, hang_up: bool = False) -> BadMessage:
    return BadMessage(name, data, Consequence.CLOSE, 0, hang_up)


def _state(ring: int, num: int) -> bytes:
    return struct.pack("=II", ring, num)


def _u64(value: int) -> bytes:
    return struct.pack("=Q", value)


def _table(count: int, *regions: tuple[int, int, int, int]) -> bytes:
    body = b"".join(struct.pack("=QQQQ", *region) for region in regions)
    return struct.pack("=II", count, 0) + body


def _slot(guest: int, size: int, user: int, offset: int) -> bytes:
    return struct.pack("=QQQQQ", 0, guest, size, user, offset)


def _config(offset: int, size: int, data: bytes) -> bytes:
    return struct.pack("=III", offset, size, 0) + data


_GET_FEATURES, _SET_FEATURES, _SET_OWNER, _SET_MEM_TABLE = 1, 2, 3, 5
_SET_VRING_NUM, _SET_VRING_ADDR, _SET_VRING_BASE, _GET_VRING_BASE = 8, 9, 10, 11
_SET_VRING_KICK, _SET_VRING_CALL, _SET_PROTOCOL_FEATURES, _ENABLE = 12, 13, 16, 18
_BACKEND_REQ_FD, _GET_CONFIG, _SET_CONFIG = 21, 24, 25
_SET_LOG_BASE, _SET_LOG_FD, _GET_INFLIGHT_FD, _SET_INFLIGHT_FD = 6, 7, 31, 32
_RESET_DEVICE, _VRING_KICK, _ADD_MEM_REG, _REM_MEM_REG = 34, 35, 37, 38
_SET_STATUS, _SET_DEVICE_STATE_FD, _CHECK_DEVICE_STATE = 39, 42, 43

_ALL = (1 << 64) - 1
_PAGE = 4096

TRUNCATED = tuple(
    _closed(f"header cut after {count} bytes", raw_message(_GET_FEATURES)[:count], hang_up=True)
    for count in range(1, _HEADER.size)
)

#: After these no byte of the stream means anything. Send them after a negotiation of everything.
BROKEN = (
    _closed("version 0", raw_message(_GET_FEATURES, flags=0)),
    _closed("version 2", raw_message(_GET_FEATURES, flags=2)),
    _closed("version 3", raw_message(_GET_FEATURES, flags=3)),
    _closed("reply bit on a request", raw_message(_GET_FEATURES, flags=_VERSION | _REPLY)),
    _closed("size 4097", raw_message(_SET_FEATURES, size=4097)),
    _closed("size of all ones", raw_message(_SET_FEATURES, size=0xFFFF_FFFF)),
    _closed("payload cut short", raw_message(_SET_FEATURES, bytes(7), size=8), hang_up=True),
    _closed("u64 of 7 bytes", raw_message(_SET_FEATURES, bytes(7))),
    _closed("u64 of 9 bytes", raw_message(_SET_FEATURES, bytes(9))),
    _closed("vring state of 4 bytes", raw_message(_SET_VRING_NUM, bytes(4))),
    _closed("vring address of 32 bytes", raw_message(_SET_VRING_ADDR, bytes(32))),
    _closed("payload on SET_OWNER", raw_message(_SET_OWNER, bytes(8))),
    _closed("payload on GET_FEATURES", raw_message(_GET_FEATURES, bytes(8))),
    _closed("memory table without its count", raw_message(_SET_MEM_TABLE, bytes(7))),
    _closed("memory table shorter than its count", raw_message(_SET_MEM_TABLE, _table(1))),
    _closed("config without its header", raw_message(_GET_CONFIG, bytes(11))),
    _closed("config size unlike its data", raw_message(_GET_CONFIG, _config(0, 12, bytes(8)))),
    _closed("log area of 8 bytes", raw_message(_SET_LOG_BASE, bytes(8))),
    _closed("payload on SET_LOG_FD", raw_message(_SET_LOG_FD, bytes(8))),
    _closed("inflight area of 16 bytes", raw_message(_GET_INFLIGHT_FD, bytes(16))),
    _closed("inflight area of 23 bytes", raw_message(_SET_INFLIGHT_FD, bytes(23))),
    _closed("payload on RESET_DEVICE", raw_message(_RESET_DEVICE, bytes(8))),
    _closed("memory slot without its padding", raw_message(_ADD_MEM_REG, bytes(32))),
    _closed("memory slot of 48 bytes", raw_message(_REM_MEM_REG, bytes(48))),
    _closed("status of 1 byte", raw_message(_SET_STATUS, bytes(1))),
    _closed("state transfer of 4 bytes", raw_message(_SET_DEVICE_STATE_FD, bytes(4))),
    _closed("payload on CHECK_DEVICE_STATE", raw_message(_CHECK_DEVICE_STATE, bytes(8))),
    _closed("config of 257 bytes", raw_message(_GET_CONFIG, _config(0, 257, bytes(257)))),
)

#: These change nothing; the next message is understood. Send them after the negotiation.
REFUSED = (
    _refused("request 0", 0),
    _refused("request 41", 41),
    _refused("request of all ones", 0xFFFF_FFFF, bytes(16)),
    _refused("features never offered", _SET_FEATURES, _u64(_ALL)),
    _refused("protocol features never offered", _SET_PROTOCOL_FEATURES, _u64(_ALL)),
    _refused("a descriptor with SET_OWNER", _SET_OWNER, fds=1),
    _refused("253 descriptors with SET_OWNER", _SET_OWNER, fds=253),
    _refused("two kick descriptors", _SET_VRING_KICK, _u64(0), fds=2),
    _refused("kick without its descriptor", _SET_VRING_KICK, _u64(0)),
    _refused("call without its descriptor", _SET_VRING_CALL, _u64(0)),
    _refused("call for no descriptor that has one", _SET_VRING_CALL, _u64(1 << 8), fds=1),
    _refused("call with unknown bits", _SET_VRING_CALL, _u64(1 << 9), fds=1),
    _refused("kick of ring 255", _SET_VRING_KICK, _u64(255), fds=1),
    _refused("backend channel without its descriptor", _BACKEND_REQ_FD),
    _refused("size of ring 256", _SET_VRING_NUM, _state(256, 64)),
    _refused("size of ring 65536", _SET_VRING_NUM, _state(65536, 64)),
    _refused("base of ring of all ones", _SET_VRING_BASE, _state(0xFFFF_FFFF, 0)),
    _refused("enabling ring 65537", _ENABLE, _state(65537, 1)),
    _refused("enabling with 2", _ENABLE, _state(0, 2)),
    _refused("ring of no descriptors", _SET_VRING_NUM, _state(0, 0)),
    _refused("ring of 3 descriptors", _SET_VRING_NUM, _state(0, 3)),
    _refused("ring of 32769 descriptors", _SET_VRING_NUM, _state(0, 32769)),
    _refused("ring of 65536 descriptors", _SET_VRING_NUM, _state(0, 65536)),
    _refused("ring of 2^32 - 1 descriptors", _SET_VRING_NUM, _state(0, 0xFFFF_FFFF)),
    _refused("no memory regions", _SET_MEM_TABLE, _table(0)),
    _refused("9 memory regions", _SET_MEM_TABLE, _table(9, *[(0, _PAGE, 0, 0)] * 9), fds=8),
    _refused("region without a descriptor", _SET_MEM_TABLE, _table(1, (0, _PAGE, 0, 0))),
    _refused("region that is no file", _SET_MEM_TABLE, _table(1, (0, _PAGE, 0, 0)), fds=1),
    _refused("empty region", _SET_MEM_TABLE, _table(1, (0, 0, 0, 0)), fds=1),
    _refused("region of 2^62 bytes", _SET_MEM_TABLE, _table(1, (0, 1 << 62, 0, 0)), fds=1),
    _refused("region past 2^64", _SET_MEM_TABLE, _table(1, (_ALL - 1, _PAGE, 0, 0)), fds=1),
    _refused("file offset past 2^64", _SET_MEM_TABLE, _table(1, (0, _PAGE, 0, _ALL)), fds=1),
    _refused("memory slot without its descriptor", _ADD_MEM_REG, _slot(0, _PAGE, 0, 0)),
    _refused("memory slot with two descriptors", _ADD_MEM_REG, _slot(0, _PAGE, 0, 0), fds=2),
    _refused("memory slot that is no file", _ADD_MEM_REG, _slot(0, _PAGE, 0, 0), fds=1),
    _refused("empty memory slot", _ADD_MEM_REG, _slot(0, 0, 0, 0), fds=1),
    _refused("memory slot of 2^62 bytes", _ADD_MEM_REG, _slot(0, 1 << 62, 0, 0), fds=1),
    _refused("memory slot past 2^64", _ADD_MEM_REG, _slot(_ALL - 1, _PAGE, 0, 0), fds=1),
    _refused("removing a slot that is none", _REM_MEM_REG, _slot(_PAGE, _PAGE, _PAGE, 0)),
    _refused("removing with two descriptors", _REM_MEM_REG, _slot(_PAGE, _PAGE, 0, 0), fds=2),
    _refused("status with unknown bits", _SET_STATUS, _u64(0x100)),
    _refused("status 16", _SET_STATUS, _u64(0x10)),
    _refused("a descriptor with SET_STATUS", _SET_STATUS, _u64(1), fds=1),
    _refused("a descriptor with RESET_DEVICE", _RESET_DEVICE, fds=1),
    _refused("log event without its descriptor", _SET_LOG_FD),
    _refused("inflight area without its descriptor", _SET_INFLIGHT_FD, bytes(24)),
    _refused("in-band kick of a ring without addresses", _VRING_KICK, _state(0, 0)),
    _refused("SET_CONFIG past the end", _SET_CONFIG, _config(200, 12, bytes(12))),
)
