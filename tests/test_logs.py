"""Log files as the master has them."""

from __future__ import annotations

import errno
import fcntl
import gzip
import os
import resource
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from vhost_device_console import logs
from vhost_device_console.config import Log
from vhost_device_console.errors import ConfigError
from vhost_device_console.ledger import LogEntry
from vhost_device_console.logs import LogFiles

Make = Callable[..., LogFiles]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Give LogFiles of the file `log` in `tmp_path`, closed after the test."""
    with ExitStack() as ends:

        def made(
            path: str = "log", keep: int = 3, *, files: dict[int, int] | None = None, **more: Any
        ) -> LogFiles:
            described = Log(str(tmp_path / path), 4096, keep, **{"times": False, **more})
            made = LogFiles(described, files)
            ends.callback(made.close)
            return made

        yield made


def write(files: LogFiles, text: str, generation: int | None = None) -> None:
    os.write(files.files[generation or files.newest], text.encode())


def texts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


# Opening


def test_a_file_is_made_for_its_owner_alone(tmp_path: Path, make: Make) -> None:
    files = make()
    assert stat.S_IMODE((tmp_path / "log").stat().st_mode) == 0o600
    assert [*files.files] == [files.newest]


def test_what_is_in_the_file_stays_before_what_comes(tmp_path: Path, make: Make) -> None:
    (tmp_path / "log").write_text("old ")
    write(make(), "new")
    assert texts(tmp_path) == {"log": "old new"}


def test_its_descriptor_is_nobody_s_after_an_exec(make: Make) -> None:
    assert not os.get_inheritable(next(iter(make().files.values())))


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path, make: Make) -> None:
    with pytest.raises(ConfigError) as caught:
        make("no/log")
    assert str(caught.value) == (
        f"cannot write log {tmp_path}/no/log: folder {tmp_path}/no does not exist"
    )


def test_a_folder_in_its_place_is_one_line(tmp_path: Path, make: Make) -> None:
    (tmp_path / "log").mkdir()
    with pytest.raises(ConfigError, match=f"cannot write log {tmp_path}/log: is a directory"):
        make()


def test_a_pipe_in_its_place_is_one_line_and_not_waited_for(tmp_path: Path, make: Make) -> None:
    os.mkfifo(tmp_path / "log")
    with pytest.raises(ConfigError, match="it is not a file"):
        make()
    reader = os.open(tmp_path / "log", os.O_RDONLY | os.O_NONBLOCK)
    try:
        with pytest.raises(ConfigError, match="it is not a file"):
            make()
    finally:
        os.close(reader)


def test_a_device_is_no_log() -> None:
    with pytest.raises(ConfigError, match="cannot write log /dev/null: it is not a file"):
        LogFiles(Log("/dev/null"))


@pytest.mark.parametrize("name", ["log", "linked"])
def test_a_file_has_one_writer_whatever_it_is_called(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(logs, "_FREE_WITHIN", 0)
    first = make()
    if name == "linked":
        os.link(tmp_path / "log", tmp_path / name)
    with pytest.raises(ConfigError, match=f"{name}: another port or daemon writes it"):
        make(name)
    first.close()
    make(name)


def test_a_writer_that_is_about_to_end_is_waited_for(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make()
    monkeypatch.setattr(logs.time, "sleep", lambda _: first.close())
    write(make(), "x")
    assert texts(tmp_path) == {"log": "x"}


def test_a_file_system_without_locks_has_logs_too(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)
    make()


def test_another_program_s_files_are_taken_over_as_they_are(make: Make) -> None:
    before = make()
    before.rotate()
    after = make(files=before.files)
    assert after.files == before.files
    before.files.clear()


def test_nothing_is_left_open_by_a_log_that_is_closed(make: Make) -> None:
    files = make()
    files.rotate()
    made = list(files.files.values())
    files.close()
    for fd in made:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


# Beginning another


def test_old_files_are_numbered_and_the_oldest_gives_way(tmp_path: Path, make: Make) -> None:
    files = make(keep=2)
    for text in "abcde":
        write(files, text)
        assert files.rotate()
        files.settled(files.newest)
    assert texts(tmp_path) == {"log": "", "log.1": "e", "log.2": "d"}
    assert len(files.files) == 1


def test_none_is_kept_if_none_is_wanted(tmp_path: Path, make: Make) -> None:
    files = make(keep=0)
    write(files, "a")
    assert files.rotate()
    write(files, "b")
    assert texts(tmp_path) == {"log": "b"}


def test_a_gap_in_the_numbers_is_filled_first(tmp_path: Path, make: Make) -> None:
    files = make()
    for name in ("log.1", "log.3"):
        (tmp_path / name).write_text(name)
    write(files, "now")
    files.rotate()
    assert texts(tmp_path) == {"log": "", "log.1": "now", "log.2": "log.1", "log.3": "log.3"}


def test_a_worker_writes_the_old_one_to_its_end(tmp_path: Path, make: Make) -> None:
    files = make()
    write(files, "a")
    first = files.newest
    assert files.rotate()
    write(files, "b", first)
    write(files, "c")
    assert texts(tmp_path) == {"log": "c", "log.1": "ab"}


def test_there_is_no_third_file_until_the_worker_writes_the_second(make: Make) -> None:
    files = make()
    first = files.newest
    assert files.rotate()
    assert not files.rotate()
    files.settled(first)
    assert not files.rotate()
    files.settled(first + 1)
    assert files.rotate()


def test_a_worker_that_writes_what_is_not_known_yet_closes_nothing_newer(make: Make) -> None:
    files = make()
    files.settled(files.newest + 7)
    assert [*files.files] == [files.newest]


def test_readers_of_the_old_one_may_read_the_new_one(tmp_path: Path, make: Make) -> None:
    files = make()
    (tmp_path / "log").chmod(0o640)
    files.rotate()
    assert stat.S_IMODE((tmp_path / "log").stat().st_mode) == 0o640


def test_a_link_s_target_is_what_changes_its_name(tmp_path: Path, make: Make) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "log").symlink_to(tmp_path / "far/file")
    files = make()
    write(files, "a")
    files.rotate()
    write(files, "b")
    assert (tmp_path / "log").is_symlink()
    assert texts(tmp_path / "far") == {"file": "b", "file.1": "a"}


def test_a_file_that_somebody_else_renamed_is_not_renamed_again(tmp_path: Path, make: Make) -> None:
    files = make()
    write(files, "a")
    (tmp_path / "log").rename(tmp_path / "mine")
    assert files.rotate()
    write(files, "b")
    assert texts(tmp_path) == {"log": "b", "mine": "a"}


def test_why_there_is_no_other_file_is_said_once_and_the_old_one_stays(
    tmp_path: Path, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    files = make(keep=1)
    write(files, "a")
    (tmp_path / "log.1").mkdir()
    for _ in range(2):
        assert not files.rotate()
    write(files, "b")
    (tmp_path / "log.1").rmdir()
    assert texts(tmp_path) == {"log": "ab"}
    assert caplog.messages == [f"log {tmp_path}/log cannot be rotated: is a directory"]
    assert files.rotate()
    assert texts(tmp_path) == {"log": "", "log.1": "ab"}


def test_without_descriptors_nothing_is_renamed(
    tmp_path: Path, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    files = make()
    write(files, "a")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        assert not files.rotate()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert texts(tmp_path) == {"log": "a"}
    assert caplog.messages == [f"log {tmp_path}/log cannot be rotated: too many open files"]


def test_what_a_master_that_died_left_half_done_is_no_hindrance(tmp_path: Path, make: Make) -> None:
    files = make()
    write(files, "a")
    (tmp_path / "log.new").touch()
    files.rotate()
    assert texts(tmp_path) == {"log": "", "log.1": "a"}


# Opening anew


def test_a_file_in_its_place_is_not_opened_again(make: Make) -> None:
    files = make()
    assert not files.reopen()
    assert len(files.files) == 1


def test_no_two_logs_have_a_generation_in_common(make: Make) -> None:
    assert make().newest < make("other").newest


def test_a_file_that_was_renamed_is_left_for_a_new_one(tmp_path: Path, make: Make) -> None:
    files = make()
    for name in ("b", "a"):
        write(files, name)
        (tmp_path / "log").rename(tmp_path / name)
        assert files.reopen()
    write(files, "now")
    assert texts(tmp_path) == {"b": "b", "a": "a", "log": "now"}
    assert len(files.files) == 3
    files.settled(files.newest)
    assert [*files.files] == [files.newest]


def test_a_path_that_cannot_be_opened_anew_leaves_the_file_that_was_there(
    tmp_path: Path, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    files = make()
    (tmp_path / "log").rename(tmp_path / "old")
    (tmp_path / "log").mkdir()
    for _ in range(2):
        assert not files.reopen()
    write(files, "a")
    (tmp_path / "log").rmdir()
    assert texts(tmp_path) == {"old": "a"}
    assert caplog.messages == [f"log {tmp_path}/log cannot be opened anew: is a directory"]


# Ages


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Give the time that a log reads, at first the middle of an hour."""
    now = [500_000 * 3600 + 1800.0]
    monkeypatch.setattr(logs.time, "time", lambda: now[0])
    return now


def begun_at(path: Path, files: LogFiles, text: str, at: float) -> None:
    write(files, text)
    os.utime(path, (at, at))


def test_another_file_is_begun_when_the_hour_is_over(
    tmp_path: Path, make: Make, clock: list[float]
) -> None:
    files = make(max_age=3600)
    begun_at(tmp_path / "log", files, "a", clock[0])
    assert files.left == 1800
    assert not files.grow_old()
    clock[0] += 1800
    assert files.grow_old()
    assert texts(tmp_path) == {"log": "", "log.1": "a"}
    assert files.left == 3600


def test_a_file_of_an_earlier_hour_is_not_written_on(
    tmp_path: Path, make: Make, clock: list[float]
) -> None:
    """Its daemon was away when that was over."""
    (tmp_path / "log").write_text("old")
    os.utime(tmp_path / "log", (clock[0] - 3600, clock[0] - 3600))
    assert make(max_age=3600).grow_old()
    assert texts(tmp_path) == {"log": "", "log.1": "old"}


def test_an_empty_file_grows_no_older(tmp_path: Path, make: Make, clock: list[float]) -> None:
    files = make(max_age=3600)
    clock[0] += 7200
    assert not files.grow_old()
    assert files.left == 1800
    assert texts(tmp_path) == {"log": ""}


def test_without_an_age_a_file_is_never_too_old(make: Make) -> None:
    files = make()
    assert files.left is None
    assert not files.grow_old()


# Old files


def test_a_file_is_compressed_once_its_worker_writes_another(tmp_path: Path, make: Make) -> None:
    files = make(compress=True)
    first = files.newest
    write(files, "a")
    files.rotate()
    files.mind()
    write(files, "b", first)
    assert not (tmp_path / "log.gz.new").exists()
    files.settled(files.newest)
    files.mind()
    while not (tmp_path / "log.1.gz").exists():
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
        files.reap()
    assert gzip.decompress((tmp_path / "log.1.gz").read_bytes()) == b"ab"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "log.1.gz"]


# The index


def index(path: Path) -> list[tuple[int, ...]]:
    return [*logs.ENTRY.iter_unpack(path.read_bytes())]


def test_the_index_goes_with_its_file(tmp_path: Path, make: Make) -> None:
    files = make(times=True)
    first = files.newest
    files.note([LogEntry(first, 0, 7, 100)], journal=5)
    files.rotate()
    files.note([LogEntry(first, 1, 8, 200), LogEntry(files.newest, 0, 9, 300)], journal=5)
    assert index(tmp_path / "log.1.times") == [(0, 5, 7, 100), (1, 5, 8, 200)]
    assert index(tmp_path / "log.times") == [(0, 5, 9, 300)]


def test_the_index_is_for_whom_the_log_is_for(tmp_path: Path, make: Make) -> None:
    files = make(times=True)
    (tmp_path / "log").chmod(0o644)
    files.note([LogEntry(files.newest, 0, 0, 1)], journal=5)
    assert stat.S_IMODE((tmp_path / "log.times").stat().st_mode) == 0o644


def test_half_an_entry_spoils_no_other(tmp_path: Path, make: Make) -> None:
    (tmp_path / "log.times").write_bytes(b"half")
    files = make(times=True)
    files.note([LogEntry(files.newest, 1, 2, 3)], journal=4)
    assert index(tmp_path / "log.times")[-1] == (1, 4, 2, 3)


def test_an_index_has_a_limit(tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_SMALL_INDEX", 64)
    files = make(times=True)
    for number in range(9):
        files.note([LogEntry(files.newest, number, number, number)], journal=4)
    assert len(index(tmp_path / "log.times")) == 2
    write(files, "x" * 100)
    for number in range(9):
        files.note([LogEntry(files.newest, number, number, number)], journal=4)
    assert len(index(tmp_path / "log.times")) == 4


def test_an_index_that_cannot_be_is_missed_by_nobody(tmp_path: Path, make: Make) -> None:
    (tmp_path / "log.times").mkdir()
    files = make(times=True)
    files.note([LogEntry(files.newest, 1, 2, 3)], journal=4)
    write(files, "a")
    assert (tmp_path / "log").read_text() == "a"
