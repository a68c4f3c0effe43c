"""The wrong messages are wrong in the one way their names say."""

from __future__ import annotations

import struct

import pytest
from vhost_device_console.testing import bad

EVERY = [*bad.TRUNCATED, *bad.BROKEN, *bad.REFUSED]


def test_names_are_unique() -> None:
    """Each message is another mistake."""
    assert len({message.name for message in EVERY}) == len(EVERY)


def test_truncated_headers() -> None:
    """Every length a header can be cut to is there, and needs a hang-up to show."""
    assert [len(message.data) for message in bad.TRUNCATED] == list(range(1, 12))
    assert all(message.hang_up for message in bad.TRUNCATED)


@pytest.mark.parametrize("message", bad.REFUSED, ids=[message.name for message in bad.REFUSED])
def test_refused_messages_keep_the_stream_in_step(message: bad.BadMessage) -> None:
    """A message to be refused has a sound header that asks for a reply."""
    _, flags, size = struct.unpack_from("=III", message.data)
    assert flags == 1 | 8
    assert size == len(message.data) - 12 <= 4096
    assert message.consequence is bad.Consequence.REFUSE


def test_literal_bytes() -> None:
    """Some of them, byte for byte."""
    data = {message.name: message.data.hex() for message in EVERY}
    assert data["version 2"] == "010000000200000000000000"
    assert data["size of all ones"] == "0200000001000000ffffffff"
    assert data["reply bit on a request"] == "010000000500000000000000"
    assert data["ring of 3 descriptors"] == "080000000900000008000000" + "0000000003000000"
    assert data["enabling ring 65537"] == "120000000900000008000000" + "0100010001000000"


def test_raw_message_with_any_size() -> None:
    """The size field can be any number."""
    assert bad.raw_message(2, b"x", size=7).hex() == "02000000010000000700000078"
