"""Health records and their framing."""

from __future__ import annotations

import pytest
from msgspec.structs import replace
from vhost_device_console.config import LONGEST_NAME, MOST_PORTS
from vhost_device_console.health import (
    SERVICE_NS,
    Decoder,
    Health,
    LogHealth,
    PortHealth,
    encode,
    service_bucket,
)

RECORD = Health(
    frontend=1234,
    sessions=1,
    kicks=2,
    calls=3,
    chains=4,
    refused=5,
    broken=6,
    ignored=7,
    services=[0, 1, 2],
    service_ns=9000,
    ports=[
        PortHealth(
            id=0,
            name="console0",
            open=True,
            readers=2,
            output=1 << 40,
            input=3,
            missed=4,
            discarded=5,
            stalls=6,
            columns=80,
            rows=24,
            state="ready",
            host_open=True,
            held=True,
            size_by="127.0.0.1:5",
            log=LogHealth(generation=2, size=1 << 40, failing=True),
            lag=7,
        )
    ],
)


def test_a_record_is_a_length_and_a_messagepack_array() -> None:
    assert encode(Health()) == b"\x0d\x00\x00\x00\x9c\xc0" + bytes(7) + b"\x90\xc0\x90\x00"


def test_a_port_is_an_array_within_it() -> None:
    port = PortHealth(id=1, name="a", open=True, readers=2, columns=80, rows=24)
    port.state, port.held, port.size_by = "added", True, "x"
    port.log = LogHealth(generation=3, size=4, failing=False)
    assert encode(Health(frontend=5, ports=[port])) == (
        b"\x2b\x00\x00\x00"
        b"\x9c\x05\x00\x00\x00\x00\x00\x00\x00"
        b"\x91\xdc\x00\x11\x01\xa1a\xc3\x02\x00\x00\x00\x00\x00\x50\x18\xa5added\xc2\xc3\xa1x"
        b"\x93\x03\x04\xc2\x00\xc0\x90\x00"
    )


def test_what_is_encoded_is_decoded() -> None:
    assert [*Decoder().feed(encode(RECORD))] == [RECORD]


def test_a_record_may_come_byte_by_byte() -> None:
    decoder = Decoder()
    frame = encode(RECORD)
    assert [r for i in range(len(frame)) for r in decoder.feed(frame[i : i + 1])] == [RECORD]


def test_several_records_may_come_at_once_oldest_first() -> None:
    frames = b"".join(encode(Health(kicks=n)) for n in range(5))
    assert [record.kicks for record in Decoder().feed(frames)] == [0, 1, 2, 3, 4]


def test_a_piece_of_the_next_record_is_kept() -> None:
    frame = encode(RECORD)
    decoder = Decoder()
    assert [*decoder.feed(frame + frame[:7])] == [RECORD]
    assert [*decoder.feed(frame[7:])] == [RECORD]


def test_127_ports_fit_in_a_record() -> None:
    ports = [replace(RECORD.ports[0], id=n, name="n" * LONGEST_NAME) for n in range(MOST_PORTS)]
    full = replace(RECORD, ports=ports)
    assert [*Decoder().feed(encode(full))] == [full]


def test_a_length_beyond_any_record_is_refused_before_its_bytes_come() -> None:
    with pytest.raises(ValueError, match="record of 65537 bytes"):
        next(Decoder().feed((65537).to_bytes(4, "little")))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"\x80",
        b"\x99\xa1x\x00\x00\x00\x00\x00\x00\x00\x90",
        b"\x90\x00",
        b"\xff" * 40,
        encode(RECORD).replace(RECORD.ports[0].name.encode(), b"\x80" * len(RECORD.ports[0].name))[
            4:
        ],
        b"\xdc\xff\xff" + b"\xc0" + bytes(7) + b"\x90\xc0" + b"\x91" * 5000,
    ],
    ids=["empty", "reserved", "map", "number", "trailing", "noise", "no text", "deep"],
)
def test_bytes_that_are_no_record_are_refused(body: bytes) -> None:
    with pytest.raises(ValueError, match="not a health record"):
        next(Decoder().feed(len(body).to_bytes(4, "little") + body))


def test_a_record_of_a_worker_that_knew_less_is_read() -> None:
    port = b"\xdc\x00\x10\x01\xa1a\xc3\x02\x00\x00\x00\x00\x00\x50\x18\xa5added\xc2\xc3\xa1x\xc0"
    body = b"\x9a\x05\x00\x00\x00\x00\x00\x00\x00\x91" + port + b"\xc0"
    (record,) = Decoder().feed(len(body).to_bytes(4, "little") + body)
    assert (record.frontend, record.services, record.service_ns) == (5, [], 0)
    assert (record.ports[0].columns, record.ports[0].lag) == (80, 0)


def test_a_record_of_a_worker_that_knew_more_is_read() -> None:
    body = b"\x9d" + encode(RECORD)[5:] + b"\xa4more"
    assert [*Decoder().feed(len(body).to_bytes(4, "little") + body)] == [RECORD]


@pytest.mark.parametrize("bucket", range(len(SERVICE_NS)))
def test_a_bucket_has_all_times_up_to_its_bound_and_above_the_one_before(bucket: int) -> None:
    bound = SERVICE_NS[bucket]
    assert service_bucket(bound) == bucket
    assert service_bucket(bound // 2 + 1) == bucket
    assert service_bucket(bound + 1) == bucket + 1


@pytest.mark.parametrize(("took", "bucket"), [(0, 0), (1, 0), (1 << 62, len(SERVICE_NS))])
def test_no_time_is_too_short_or_too_long_to_be_counted(took: int, bucket: int) -> None:
    assert service_bucket(took) == bucket


def test_records_before_one_that_is_none_are_not_lost() -> None:
    records = Decoder().feed(encode(RECORD) + b"\x01\x00\x00\x00\xc1")
    assert next(records) == RECORD
    with pytest.raises(ValueError, match="not a health record"):
        next(records)
