"""A log's old files, in real folders, compressed by real children."""

from __future__ import annotations

import gzip
import os
import resource
import select
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from vhost_device_console import archive
from vhost_device_console.archive import Archive, files
from vhost_device_console.config import Log

from launch import WITHIN

Make = Callable[..., Archive]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Give the archive of the file `log` in `tmp_path`, closed after the test."""
    with ExitStack() as ends:

        def made(keep: int = 3, **more: Any) -> Archive:
            path = str(tmp_path / "log")
            begun = Archive(path, Log(path, 4096, keep, **more))
            ends.callback(begun.stop)
            return begun

        yield made


def child(begun: Archive) -> int:
    pid = begun._pid  # noqa: SLF001
    assert pid is not None
    return pid


def wait_ended(begun: Archive) -> None:
    fd = os.pidfd_open(child(begun))
    try:
        assert select.select([fd], [], [], WITHIN)[0], "the child never ends"
    finally:
        os.close(fd)


def finish(begun: Archive) -> None:
    """Wait for the child's end, and have it known."""
    wait_ended(begun)
    assert begun.reap()


def write(folder: Path, **texts: str) -> None:
    for name, text in texts.items():
        path = folder / name.replace("_", ".")
        if name.endswith("gz"):
            path.write_bytes(gzip.compress(text.encode()))
        else:
            path.write_text(text)


def texts(folder: Path) -> dict[str, str]:
    read = {}
    for path in folder.iterdir():
        data = path.read_bytes()
        read[path.name] = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    return read


# Numbers


def test_compressed_files_and_indices_are_numbered_along(tmp_path: Path, make: Make) -> None:
    write(tmp_path, log="now", log_times="t", log_1="a", log_1_times="ta", log_2_gz="b")
    make().shift()
    assert texts(tmp_path) == {
        "log.1": "now",
        "log.1.times": "t",
        "log.2": "a",
        "log.2.times": "ta",
        "log.3.gz": "b",
    }


def test_the_oldest_gives_way_whatever_it_is(tmp_path: Path, make: Make) -> None:
    write(tmp_path, log="now", log_1_gz="a", log_2_gz="b", log_2_times="tb")
    begun = make(keep=2)
    begun.shift()
    assert texts(tmp_path) == {"log.1": "now", "log.2.gz": "a"}
    write(tmp_path, log="next")
    begun.shift()
    assert texts(tmp_path) == {"log.1": "next", "log.2": "now"}


def test_of_a_file_that_is_there_twice_the_compressed_one_counts(
    tmp_path: Path, make: Make
) -> None:
    """Its master died before it could remove the other."""
    write(tmp_path, log="now", log_1="a", log_1_gz="a")
    make().shift()
    assert texts(tmp_path) == {"log.1": "now", "log.2.gz": "a"}


def test_files_are_listed_oldest_first_and_once(tmp_path: Path) -> None:
    path = str(tmp_path / "log")
    assert [*files(path)] == []
    write(tmp_path, log="x", log_1="x", log_2="x", log_2_gz="x", log_10_gz="x")
    found = [(os.path.basename(name), os.path.basename(index)) for name, index in files(path)]
    assert found == [
        ("log.10.gz", "log.10.times"),
        ("log.2.gz", "log.2.times"),
        ("log.1", "log.1.times"),
        ("log", "log.times"),
    ]


# Compression


def test_a_file_is_compressed_and_is_as_it_was(tmp_path: Path, make: Make) -> None:
    text = "a line\n" * 100_000
    write(tmp_path, log_1=text)
    (tmp_path / "log.1").chmod(0o640)
    os.utime(tmp_path / "log.1", (1000, 2000))
    begun = make(compress=True)
    assert begun.mind(0, [])
    finish(begun)
    now = (tmp_path / "log.1.gz").stat()
    assert texts(tmp_path) == {"log.1.gz": text}
    assert (stat.S_IMODE(now.st_mode), now.st_mtime) == (0o640, 2000)
    assert now.st_size < 10_000


def test_it_is_compressed_when_nothing_else_wants_to_run(tmp_path: Path, make: Make) -> None:
    write(tmp_path, log_1="a")
    begun = make(compress=True)
    begun.mind(0, [])
    wait_ended(begun)
    assert os.sched_getscheduler(child(begun)) == os.SCHED_IDLE


def test_it_is_compressed_where_that_is_not_allowed(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    for name in ("nice", "sched_setscheduler"):  # as the unit's filter of system calls does
        monkeypatch.setattr(os, name, refuse)
    write(tmp_path, log_1="a")
    begun = make(compress=True)
    begun.mind(0, [])
    finish(begun)
    assert texts(tmp_path) == {"log.1.gz": "a"}


def test_one_after_the_other_is_compressed(tmp_path: Path, make: Make) -> None:
    write(tmp_path, log="now", log_1="a", log_2="b", log_3_gz="c")
    begun = make(compress=True)
    for _ in range(2):
        begun.mind(0, [])
        finish(begun)
    begun.mind(0, [])
    assert begun._pid is None  # noqa: SLF001
    assert texts(tmp_path) == {"log": "now", "log.1.gz": "a", "log.2.gz": "b", "log.3.gz": "c"}


def test_nothing_is_compressed_unasked(tmp_path: Path, make: Make) -> None:
    write(tmp_path, log_1="a")
    begun = make()
    assert begun.mind(0, [])
    assert begun._pid is None  # noqa: SLF001


def test_a_file_that_is_still_written_is_left_alone(tmp_path: Path, make: Make) -> None:
    write(tmp_path, log_1="a")
    begun = make(compress=True)
    assert begun.mind(0, [os.stat(tmp_path / "log.1")])
    assert begun._pid is None  # noqa: SLF001


def test_a_file_that_is_renamed_meanwhile_is_found(tmp_path: Path, make: Make) -> None:
    write(tmp_path, log="now", log_1="a")
    begun = make(compress=True)
    begun.mind(0, [])
    begun.shift()
    finish(begun)
    assert texts(tmp_path) == {"log.1": "now", "log.2.gz": "a"}


def test_a_file_that_gave_way_meanwhile_does_not_come_back(tmp_path: Path, make: Make) -> None:
    write(tmp_path, log="now", log_1="a")
    begun = make(compress=True, keep=1)
    begun.mind(0, [])
    begun.shift()
    finish(begun)
    assert texts(tmp_path) == {"log.1": "now"}


def test_the_next_file_is_not_taken_for_one_that_gave_way_meanwhile(
    tmp_path: Path, make: Make
) -> None:
    """Which might have its inode's number by then."""
    write(tmp_path, log_1="old")
    begun = make(compress=True)
    begun.mind(0, ())
    fd = os.pidfd_open(child(begun))
    try:
        assert select.select([fd], [], [], WITHIN)[0], "the child never ends"
    finally:
        os.close(fd)
    was = (tmp_path / "log.1").stat().st_ino
    (tmp_path / "log.1").unlink()
    for number in range(20):
        write(tmp_path, **{f"next_{number}": "new"})
        assert (tmp_path / f"next.{number}").stat().st_ino != was
    (tmp_path / "next.0").rename(tmp_path / "log.1")
    assert begun.reap()
    assert (tmp_path / "log.1").read_text() == "new"


def test_a_child_that_is_stopped_leaves_the_file(tmp_path: Path, make: Make) -> None:
    write(tmp_path, log_1="a" * 1_000_000)
    begun = make(compress=True)
    begun.mind(0, [])
    begun.stop()
    assert texts(tmp_path) == {"log.1": "a" * 1_000_000}
    begun.mind(0, [])
    finish(begun)
    assert [*texts(tmp_path)] == ["log.1.gz"]


def test_a_master_that_dies_leaves_the_file(tmp_path: Path, make: Make) -> None:
    """And what its child had made is nobody's."""
    write(tmp_path, log_1="a", log_gz_new="half")
    make()
    assert texts(tmp_path) == {"log.1": "a"}


def test_a_child_that_is_killed_is_one_line(
    tmp_path: Path, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, log_1="a" * 10_000_000)
    begun = make(compress=True)
    begun.mind(0, [])
    os.kill(child(begun), signal.SIGKILL)
    finish(begun)
    begun.mind(0, [])
    assert begun._pid is None  # noqa: SLF001
    assert caplog.messages == [f"an old file of log {tmp_path}/log cannot be compressed: killed"]
    assert [*texts(tmp_path)] == ["log.1"]


def test_a_full_disk_is_one_line_and_tried_again_at_the_next_rotation(
    tmp_path: Path, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, log="now", log_1="a")
    begun = make(compress=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5, hard))
    try:
        begun.mind(0, [])
        finish(begun)
        begun.mind(0, [])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caplog.messages == [
        f"an old file of log {tmp_path}/log cannot be compressed: file too large"
    ]
    assert texts(tmp_path) == {"log": "now", "log.1": "a"}
    begun.shift()
    for _ in range(2):
        begun.mind(0, [])
        finish(begun)
    assert texts(tmp_path) == {"log.1.gz": "now", "log.2.gz": "a"}


def test_no_more_children_are_at_work_than_may_be(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "_MOST_CHILDREN", 0)
    write(tmp_path, log_1="a")
    begun = make(compress=True)
    assert not begun.mind(0, [])
    monkeypatch.undo()
    assert begun.mind(0, [])
    finish(begun)
    assert [*texts(tmp_path)] == ["log.1.gz"]


def test_a_child_holds_nothing_of_its_master_s(tmp_path: Path, make: Make) -> None:
    """A listener of ours would live as long as it does."""
    write(tmp_path, log_1="a" * 50_000_000)
    read, held = os.pipe()
    begun = make(compress=True)
    try:
        begun.mind(0, [])
        os.close(held)
        assert select.select([read], [], [], WITHIN)[0]
        assert os.read(read, 1) == b""
    finally:
        os.close(read)
    begun.stop()


# The total


def test_all_files_together_are_kept_within_the_total(tmp_path: Path, make: Make) -> None:
    write(tmp_path, log="n" * 10, log_1="a" * 4000, log_2="b" * 100, log_2_times="t" * 200)
    write(tmp_path, log_3="c" * 1000, log_4="d", log_99="e")
    make(keep=99, total_bytes=4096 + 4000 + 300).mind(10, [])
    assert sorted(texts(tmp_path)) == ["log", "log.1", "log.2", "log.2.times"]


def test_without_a_total_everything_stays(tmp_path: Path, make: Make) -> None:
    write(tmp_path, log_1="a" * 100_000)
    make().mind(10**9, [])
    assert [*texts(tmp_path)] == ["log.1"]
