"""A worker says what it can go on from before it does."""

from __future__ import annotations

import pytest
from vhost_device_console.worker import can_resume


@pytest.mark.parametrize(
    "snapshot",
    [b"snapshot", b"\x91\xa1\x80", b"\x91\xff", b"\x92\x01" + b"\x91" * 9000],
    ids=["no MessagePack", "no text", "a version that never was", "deep"],
)
def test_nobody_goes_on_from_a_snapshot_that_is_none(snapshot: bytes) -> None:
    assert not can_resume(snapshot)


def test_without_a_snapshot_there_is_nothing_in_the_way() -> None:
    assert can_resume(b"")
