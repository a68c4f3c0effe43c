"""A stream's checks say what is lost, what came twice, and what was never sent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from load import PERIOD, Violation, check, piece

from logs import Follower


def test_what_was_sent_is_found_right_at_any_offset() -> None:
    for offset in (0, 1, PERIOD - 5, 3 * PERIOD + 7):
        check(piece(99, offset, 100), 99, offset, "it")


@pytest.mark.parametrize(
    ("got", "found"),
    [
        (piece(5, 1000, 50) + piece(5, 1057, 50), "it: 7 bytes are lost at 1050"),
        (piece(5, 1000, 50) + piece(5, 1030, 50), "it: 20 bytes came twice at 1050"),
        (piece(5, 1000, 50) + bytes(50), "it: at 1050 is what was never sent"),
    ],
)
def test_what_is_not_as_it_was_sent_is_named(got: bytes, found: str) -> None:
    with pytest.raises(Violation, match=found):
        check(got, 5, 1000, "it")


def test_a_log_is_followed_through_its_files(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(piece(7, 0, 1000))
    follower = Follower("it", path, 7)
    try:
        follower.read()
        with path.open("ab") as old:
            os.rename(path, tmp_path / "log.1")
            path.touch()
            follower.read()
            old.write(piece(7, 1000, 10))
        path.write_bytes(piece(7, 1010, 500))
        follower.read()
        assert (follower.offset, follower.rotations) == (1510, 1)
    finally:
        follower.close()


def test_a_byte_that_is_in_none_of_a_logs_files_is_found(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(piece(7, 0, 1000))
    follower = Follower("it", path, 7)
    try:
        os.rename(path, tmp_path / "log.1")
        path.write_bytes(piece(7, 1001, 500))
        with pytest.raises(Violation, match="1 bytes are lost at 1000"):
            follower.read()
    finally:
        follower.close()
