"""The feature bits of the rings themselves (VIRTIO 1.2, section 6)."""

INDIRECT_DESC = 1 << 28
EVENT_IDX = 1 << 29
RING_PACKED = 1 << 34
IN_ORDER = 1 << 35
RING_RESET = 1 << 40
