"""The virtio feature bits a console driver can use."""

from __future__ import annotations

from enum import IntFlag


class Feature(IntFlag):
    """Bits of GET_FEATURES and SET_FEATURES (VIRTIO 1.2, sections 5.3.3 and 6; vhost-user.rst)."""

    SIZE = 1 << 0
    MULTIPORT = 1 << 1
    EMERG_WRITE = 1 << 2
    NOTIFY_ON_EMPTY = 1 << 24
    LOG_ALL = 1 << 26
    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    PROTOCOL_FEATURES = 1 << 30
    VERSION_1 = 1 << 32
    RING_PACKED = 1 << 34
    IN_ORDER = 1 << 35
    RING_RESET = 1 << 40


#: What the mock driver accepts when it is offered.
DRIVER_FEATURES = (
    Feature.SIZE
    | Feature.MULTIPORT
    | Feature.INDIRECT_DESC
    | Feature.EVENT_IDX
    | Feature.PROTOCOL_FEATURES
    | Feature.VERSION_1
)
