"""Every layout against literal bytes, little-endian as on every machine this runs on."""

import sys

import pytest
from vhost_device_console.errors import FrontendError, RefusedError
from vhost_device_console.worker.vhost_user import message
from vhost_device_console.worker.vhost_user.message import (
    BackendRequest,
    ConfigSpan,
    Header,
    InflightArea,
    LogArea,
    ProtocolFeature,
    Region,
    Request,
    StateTransfer,
    VringAddr,
    VringFd,
    VringState,
)

pytestmark = pytest.mark.skipif(sys.byteorder != "little", reason="the bytes are little-endian")


def h(text: str) -> bytes:
    return bytes.fromhex(text)


REQUESTS = {
    "GET_FEATURES": 1,
    "SET_FEATURES": 2,
    "SET_OWNER": 3,
    "RESET_OWNER": 4,
    "SET_MEM_TABLE": 5,
    "SET_LOG_BASE": 6,
    "SET_LOG_FD": 7,
    "SET_VRING_NUM": 8,
    "SET_VRING_ADDR": 9,
    "SET_VRING_BASE": 10,
    "GET_VRING_BASE": 11,
    "SET_VRING_KICK": 12,
    "SET_VRING_CALL": 13,
    "SET_VRING_ERR": 14,
    "GET_PROTOCOL_FEATURES": 15,
    "SET_PROTOCOL_FEATURES": 16,
    "GET_QUEUE_NUM": 17,
    "SET_VRING_ENABLE": 18,
    "SEND_RARP": 19,
    "NET_SET_MTU": 20,
    "SET_BACKEND_REQ_FD": 21,
    "IOTLB_MSG": 22,
    "SET_VRING_ENDIAN": 23,
    "GET_CONFIG": 24,
    "SET_CONFIG": 25,
    "POSTCOPY_ADVISE": 28,
    "POSTCOPY_LISTEN": 29,
    "POSTCOPY_END": 30,
    "GET_INFLIGHT_FD": 31,
    "SET_INFLIGHT_FD": 32,
    "GPU_SET_SOCKET": 33,
    "RESET_DEVICE": 34,
    "VRING_KICK": 35,
    "GET_MAX_MEM_SLOTS": 36,
    "ADD_MEM_REG": 37,
    "REM_MEM_REG": 38,
    "SET_STATUS": 39,
    "GET_STATUS": 40,
    "SET_DEVICE_STATE_FD": 42,
    "CHECK_DEVICE_STATE": 43,
}

FEATURE_BITS = {
    "MQ": 0,
    "LOG_SHMFD": 1,
    "REPLY_ACK": 3,
    "BACKEND_REQ": 5,
    "CONFIG": 9,
    "BACKEND_SEND_FD": 10,
    "INFLIGHT_SHMFD": 12,
    "RESET_DEVICE": 13,
    "INBAND_NOTIFICATIONS": 14,
    "CONFIGURE_MEM_SLOTS": 15,
    "STATUS": 16,
    "DEVICE_STATE": 19,
}


def test_request_numbers() -> None:
    """Requests have the specification's numbers."""
    assert {request.name: int(request) for request in Request} == REQUESTS


def test_backend_request_numbers() -> None:
    """The backend's requests have the specification's numbers."""
    numbers = {request.name: int(request) for request in BackendRequest}
    assert numbers == {"CONFIG_CHANGE_MSG": 2, "VRING_CALL": 4, "VRING_ERR": 5}


def test_protocol_feature_bits() -> None:
    """Protocol features have the specification's bits."""
    bits = {feature.name: feature.bit_length() - 1 for feature in ProtocolFeature}
    assert bits == FEATURE_BITS


def test_protocol_features_bit() -> None:
    """Virtio feature bit 30 opens the protocol features, bit 26 the log."""
    assert (message.PROTOCOL_FEATURES_BIT, message.LOG_ALL_BIT) == (0x40000000, 0x4000000)


@pytest.mark.parametrize(
    ("flags", "reply", "need_reply"),
    [("01", False, False), ("05", True, False), ("09", False, True), ("0d", True, True)],
)
def test_header_flags(flags: str, reply: bool, need_reply: bool) -> None:
    """Bit 2 is a reply, bit 3 asks for one, in both directions."""
    data = h("12000000" + flags + "000000 08000000")
    assert message.decode_header(data) == Header(18, 8, reply, need_reply)
    assert message.encode(18, bytes(8), reply=reply, need_reply=need_reply) == data + bytes(8)


def test_encode_without_payload() -> None:
    """A message without payload is its header alone."""
    assert message.encode(Request.SET_OWNER) == h("03000000 01000000 00000000")


def test_decode_header_reads_the_first_twelve_bytes() -> None:
    """What follows the header is not looked at."""
    data = memoryview(h("01000000 01000000 00000000 ffffffff"))
    assert message.decode_header(data) == Header(1, 0, False, False)


def test_decode_header_of_unknown_request() -> None:
    """A request nobody knows is not the header's business."""
    assert message.decode_header(h("ffffffff 01000000 00000000")).request == 0xFFFFFFFF


def test_decode_header_ignores_reserved_flags() -> None:
    """Flag bits that have no meaning yet change none."""
    assert message.decode_header(h("01000000 f1ffffff 00000000")) == Header(1, 0, False, False)


@pytest.mark.parametrize("version", [0, 2, 3])
def test_decode_header_of_other_version(version: int) -> None:
    """A version other than 1 ends the connection."""
    with pytest.raises(FrontendError, match=f"version {version}") as caught:
        message.decode_header(h(f"01000000 0{version}000000 00000000"))
    assert not isinstance(caught.value, RefusedError)


def test_decode_header_of_largest_size() -> None:
    """4096 bytes of payload are the most there can be."""
    assert message.decode_header(h("05000000 01000000 00100000")).size == 4096


@pytest.mark.parametrize("size", ["01100000", "ffffffff"])
def test_decode_header_of_oversize(size: str) -> None:
    """A larger size ends the connection."""
    with pytest.raises(FrontendError, match="limit is 4096"):
        message.decode_header(h("05000000 01000000" + size))


def test_u64() -> None:
    """A u64 message is eight bytes."""
    data = h("0807060504030201")
    assert message.decode_u64(data) == 0x0102030405060708
    assert message.encode_u64(0x0102030405060708) == data


def test_vring_state() -> None:
    """A vring state is index, number."""
    data = h("03000000 00010000")
    assert VringState.decode(data) == VringState(3, 256)
    assert VringState(3, 256).encode() == data


def test_vring_addr() -> None:
    """A vring address is index, flags, descriptors, used, available, log: used comes first."""
    data = h(
        "02000000 01000000 0010000000007f00 0030000000007f00 0020000000007f00 ffffffffffffffff"
    )
    value = VringAddr(
        ring=2,
        flags=1,
        desc=0x7F000000001000,
        used=0x7F000000003000,
        avail=0x7F000000002000,
        log=0xFFFFFFFFFFFFFFFF,
    )
    assert VringAddr.decode(data) == value
    assert value.encode() == data


@pytest.mark.parametrize(
    ("data", "ring", "has_fd"),
    [
        ("0000000000000000", 0, True),
        ("ff00000000000000", 255, True),
        ("0201000000000000", 2, False),
    ],
)
def test_vring_fd(data: str, ring: int, has_fd: bool) -> None:
    """Bits 0 to 7 are the index, bit 8 says that no descriptor came along."""
    assert VringFd.decode(h(data)) == VringFd(ring, has_fd)
    assert VringFd(ring, has_fd).encode() == h(data)


@pytest.mark.parametrize("data", ["0002000000000000", "0000000000000080"])
def test_vring_fd_with_unknown_bits(data: str) -> None:
    """An unknown bit is refused."""
    with pytest.raises(RefusedError, match="unknown bits"):
        VringFd.decode(h(data))


@pytest.mark.parametrize(
    "decode",
    [
        message.decode_u64,
        VringState.decode,
        VringAddr.decode,
        VringFd.decode,
        message.decode_region,
        LogArea.decode,
        InflightArea.decode,
        StateTransfer.decode,
    ],
    ids=["u64", "state", "addr", "fd", "region", "log", "inflight", "transfer"],
)
@pytest.mark.parametrize("size", [0, 7, 9, 15, 17, 19, 21, 23, 25, 39, 41])
def test_fixed_payload_of_wrong_size(decode: object, size: int) -> None:
    """A payload of another size than its message's ends the connection."""
    assert callable(decode)
    with pytest.raises(FrontendError, match=f"{size} bytes") as caught:
        decode(bytes(size))
    assert not isinstance(caught.value, RefusedError)


TWO_REGIONS = h(
    "02000000 00000000"
    "0000000000000000 0000000800000000 0000000000007f00 0000000000000000"
    "0000000001000000 0010000000000000 0000000100007f00 0020000000000000"
)


def test_regions() -> None:
    """A memory table is count, padding, and guest address, size, user address, offset of each."""
    regions = [
        Region(0, 0x8000000, 0x7F000000000000, 0),
        Region(0x100000000, 0x1000, 0x7F000001000000, 0x2000),
    ]
    assert message.decode_regions(TWO_REGIONS) == regions
    assert message.encode_regions(regions) == TWO_REGIONS


def test_regions_none() -> None:
    """An empty table is well-formed: what it means is decided elsewhere."""
    assert message.decode_regions(h("00000000 00000000")) == []


def test_regions_with_room_to_spare() -> None:
    """Linux before 7.0 sends 72 bytes for one region."""
    data = h("01000000 00000000 0000a060 00000000 00000008 00000000") + h(
        "0000a060 00000000 0000a060 00000000"
    )
    data = data + bytes(32)
    assert len(data) == 72
    assert message.decode_regions(data) == [Region(0x60A00000, 0x8000000, 0x60A00000, 0x60A00000)]


def test_regions_most() -> None:
    """Eight regions are the most."""
    data = h("08000000 00000000") + bytes(8 * 32)
    assert message.decode_regions(data) == [Region(0, 0, 0, 0)] * 8


@pytest.mark.parametrize("count", ["09000000", "ffffffff"])
def test_regions_too_many(count: str) -> None:
    """More than eight regions are refused, however many bytes came."""
    with pytest.raises(RefusedError, match="the limit is 8"):
        message.decode_regions(h(count + "00000000") + bytes(9 * 32))


@pytest.mark.parametrize("size", [0, 7])
def test_regions_without_count(size: int) -> None:
    """A table shorter than its count ends the connection."""
    with pytest.raises(FrontendError, match="not even its count"):
        message.decode_regions(bytes(size))


def test_regions_cut_short() -> None:
    """A table shorter than its regions ends the connection."""
    with pytest.raises(FrontendError, match="2 regions has only 71 bytes"):
        message.decode_regions(TWO_REGIONS[:-1])


def test_region() -> None:
    """One region for a slot: eight bytes of nothing, then the region."""
    data = h("0000000000000000 0010000000000000 0020000000000000 0030000000000000 0040000000000000")
    region = Region(0x1000, 0x2000, 0x3000, 0x4000)
    assert message.encode_region(region) == data
    assert message.decode_region(data) == region


def test_log_area() -> None:
    """A log: its size, and its offset in the file."""
    data = h("0010000000000000 2000000000000000")
    assert LogArea(0x1000, 0x20).encode() == data
    assert LogArea.decode(data) == LogArea(0x1000, 0x20)


def test_inflight_area() -> None:
    """An area for buffers in flight: size, offset, queues, entries, with or without padding."""
    data = h("0010000000000000 2000000000000000 0400 4000 00000000")
    area = InflightArea(0x1000, 0x20, 4, 64)
    assert area.encode() == data
    assert InflightArea.decode(data) == InflightArea.decode(data[:20]) == area


def test_state_transfer() -> None:
    """A state's transfer: its direction and phase."""
    assert StateTransfer(1, 0).encode() == h("01000000 00000000")
    assert StateTransfer.decode(h("01000000 02000000")) == (1, 2)
    assert (message.Direction.SAVE, message.Direction.LOAD, message.PHASE_STOPPED) == (0, 1, 0)


def test_limits() -> None:
    """The most queues, slots and regions, as the specification and QEMU have them."""
    assert (message.MOST_QUEUES, message.MOST_SLOTS, message.MOST_REGIONS) == (256, 509, 8)


def test_config() -> None:
    """A config message is offset, size, flags, data."""
    data = h("04000000 08000000 01000000 0102030405060708")
    value = ConfigSpan(4, 1, h("0102030405060708"))
    assert ConfigSpan.decode(data) == value
    assert value.encode() == data


def test_config_largest() -> None:
    """256 bytes are the most."""
    data = h("00000000 00010000 00000000") + bytes(256)
    assert ConfigSpan.decode(data) == ConfigSpan(0, 0, bytes(256))


@pytest.mark.parametrize(
    "data",
    [
        h("00000000 0c000000 00000000") + bytes(11),
        h("00000000 0c000000 00000000") + bytes(13),
        h("00000000 01010000 00000000") + bytes(257),
        h("00000000 ffffffff 00000000"),
    ],
    ids=["short", "long", "over the limit", "all ones"],
)
def test_config_of_wrong_size(data: bytes) -> None:
    """A size field that is not the data's length, or over 256, ends the connection."""
    with pytest.raises(FrontendError, match="a config message of"):
        ConfigSpan.decode(data)


def test_config_without_header() -> None:
    """A config message shorter than its own header ends the connection."""
    with pytest.raises(FrontendError, match="not even its header"):
        ConfigSpan.decode(bytes(11))
