"""What is read from logs: when bytes came, and what a journal does not keep any more."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import pytest
from vhost_device_console.people.logged import Index, UnknownError, before, journal_index

NOW = 1_800_000_000_000_000_000


def index(*entries: tuple[int, int, int, int]) -> bytes:
    return b"".join(struct.pack("<4Q", *entry) for entry in entries)


# When bytes came


def test_output_is_split_where_times_change() -> None:
    times = Index([(0, 1), (10, 2), (20, 3)])
    assert [*times.split(5, b"x" * 20)] == [(1, b"x" * 5, 0), (2, b"x" * 10, 0), (3, b"x" * 5, 0)]


def test_what_came_before_the_first_entry_was_there_by_then() -> None:
    assert [*Index([(10, 7)]).split(0, b"x" * 12)] == [(7, b"x" * 10, 0), (7, b"xx", 0)]


def test_without_an_index_no_time_is_known() -> None:
    assert [*Index([]).split(3, b"abc")] == [(None, b"abc", 0)]


def test_what_was_said_last_counts() -> None:
    """A file may have been cut off; entries may come twice, and in any order."""
    times = Index([(0, 1), (100, 2), (50, 3), (50, 3), (60, 4)])
    assert [*times.split(0, b"x" * 61)] == [(1, b"x" * 50, 0), (3, b"x" * 10, 0), (4, b"x", 0)]


def test_a_journal_s_times_are_in_all_files_beside_its_log(tmp_path: Path) -> None:
    for name in ("log", "log.1.gz"):
        (tmp_path / name).touch()
    (tmp_path / "log.1.times").write_bytes(index((0, 5, 100, NOW), (9, 4, 300, NOW + 1)))
    (tmp_path / "log.times").write_bytes(index((0, 5, 200, NOW + 2)) + b"half")
    found = journal_index(str(tmp_path / "log"), 5)
    assert [*found.split(150, b"x" * 60)] == [(NOW, b"x" * 50, 0), (NOW + 2, b"x" * 10, 0)]
    assert not journal_index(str(tmp_path / "log"), 6)
    assert not journal_index(None, 5)


# What a journal does not keep any more


def kept(path: Path, since: int, until: int) -> list[tuple[int, bytes]]:
    """Return what the log has of journal 5, what lies side by side as one."""
    found: list[tuple[int, bytes]] = []
    for span in before(str(path), 5, since, until):
        if found and found[-1][0] + len(found[-1][1]) == span.at:
            found[-1] = (found[-1][0], found[-1][1] + span.data)
        else:
            found.append((span.at, span.data))
    return found


def test_bytes_are_where_the_index_says(tmp_path: Path) -> None:
    """What another journal had put there is not this one's."""
    (tmp_path / "log").write_bytes(b"otherabcdefgh")
    (tmp_path / "log.times").write_bytes(
        index((0, 4, 900, NOW), (5, 5, 0, NOW), (8, 5, 3, NOW + 1))
    )
    assert kept(tmp_path / "log", 0, 100) == [(0, b"abcdefgh")]
    assert kept(tmp_path / "log", 2, 4) == [(2, b"cd")]
    assert kept(tmp_path / "log", 8, 100) == []


def test_all_files_are_one(tmp_path: Path) -> None:
    (tmp_path / "log.1.gz").write_bytes(gzip.compress(b"abcde"))
    (tmp_path / "log.1.times").write_bytes(index((0, 5, 0, NOW), (4, 5, 4, NOW)))
    (tmp_path / "log").write_bytes(b"fgh")
    (tmp_path / "log.times").write_bytes(index((1, 5, 6, NOW + 1)))
    assert kept(tmp_path / "log", 3, 7) == [(3, b"defg")]


def test_a_gap_is_left_out(tmp_path: Path) -> None:
    text = b"abc\r\n[vhost-device-console: 7 bytes missed]\r\ndef"
    (tmp_path / "log").write_bytes(text)
    (tmp_path / "log.times").write_bytes(index((0, 5, 0, NOW), (len(text) - 1, 5, 12, NOW + 1)))
    assert kept(tmp_path / "log", 0, 100) == [(0, b"abc"), (10, b"def")]


def test_a_notice_that_the_guest_wrote_is_output(tmp_path: Path) -> None:
    text = b"abc\r\n[vhost-device-console: 7 bytes missed]\r\ndef"
    (tmp_path / "log").write_bytes(text)
    (tmp_path / "log.times").write_bytes(index((0, 5, 0, NOW), (len(text), 5, len(text), NOW + 1)))
    assert kept(tmp_path / "log", 0, 100) == [(0, text)]


def test_what_is_in_doubt_is_left_out(tmp_path: Path) -> None:
    """Bytes and offsets between two entries do not agree, nor do they with a notice."""
    (tmp_path / "log").write_bytes(b"abcdefgh")
    (tmp_path / "log.times").write_bytes(
        index((0, 5, 0, NOW), (2, 5, 2, NOW), (4, 5, 9, NOW), (99, 5, 99, NOW))
    )
    assert kept(tmp_path / "log", 0, 100) == [(0, b"ab"), (9, b"efgh")]


@pytest.mark.parametrize("entries", [(), ((0, 4, 0, NOW),)])
def test_without_an_entry_of_the_journal_nothing_is_known(
    tmp_path: Path, entries: tuple[tuple[int, int, int, int], ...]
) -> None:
    (tmp_path / "log").write_bytes(b"abc")
    (tmp_path / "log.times").write_bytes(index(*entries))
    with pytest.raises(UnknownError, match="its log has no index of them"):
        kept(tmp_path / "log", 0, 100)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "log.1.gz").write_bytes(b"no gzip")
    with pytest.raises(UnknownError, match=r"its log .*/log.1.gz cannot be read: not a gzipped"):
        kept(tmp_path / "log", 0, 100)
    with pytest.raises(UnknownError, match=r"its log .*/none is not there"):
        kept(tmp_path / "none", 0, 100)
