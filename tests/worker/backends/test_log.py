"""Logs in real files: full disks, other writers, new files, and deaths at every line."""

from __future__ import annotations

import json
import logging
import mmap
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from vhost_device_console import journal, ledger
from vhost_device_console.config import LogFormat
from vhost_device_console.journal import Journal, Output
from vhost_device_console.worker.backends import log as module
from vhost_device_console.worker.backends.base import gap
from vhost_device_console.worker.backends.lines import rfc3339
from vhost_device_console.worker.backends.log import RECORD_BYTES, Log
from vhost_device_console.worker.poller import Timer

SIZE = 4096
LOGGER = logging.LoggerAdapter(logging.getLogger("test"), {})

#: A stream that no two places of look alike.
STREAM = b"".join(b"%06x\n" % n for n in range(8192))


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """Let files have at most `size` bytes: a write stops there, and the next one fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Clock:
    """What a log wants of a poller: timers, which the test fires."""

    def __init__(self) -> None:
        self.timers: list[Timer] = []

    def timer(self, callback: Callable[[], None]) -> Timer:
        self.timers.append(Timer(callback, set()))
        return self.timers[-1]

    def ring(self) -> None:
        for timer in self.timers:
            if timer.due is not None:
                timer.fire()


class Scene:
    """A journal, a record and files; `begin` makes the log of one worker after the other."""

    def __init__(self, folder: Path, ends: ExitStack) -> None:
        self.folder = folder
        self.clock = Clock()
        self.files: dict[int, int] = {}
        self.changes: list[None] = []
        self.journal = journal.create("test", SIZE, SIZE)
        ends.callback(os.close, self.journal)
        self.output: Output = Journal(self.journal).output
        self.record = memoryview(mmap.mmap(-1, RECORD_BYTES))
        self.form = LogFormat.RAW
        self.open(1)
        ends.callback(self.close)

    def path(self, generation: int) -> Path:
        return self.folder / f"log.{generation}"

    def open(self, generation: int) -> None:
        """Have the master open another file."""
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self.files[generation] = os.open(self.path(generation), flags, 0o600)

    def begin(self, limit: int = 0, newest: int = 9, times: bool = False) -> Log:
        """Return the log of another worker, as after the death of the one before."""
        self.clock = Clock()
        files = {number: os.dup(fd) for number, fd in self.files.items() if number <= newest}
        return Log(
            "LOG",
            self.output,
            self.record,
            files,
            limit,
            self.clock,  # type: ignore[arg-type]
            LOGGER,
            lambda: self.changes.append(None),
            form=self.form,
            times=times,
        )

    def put(self, count: int) -> None:
        """Have the guest write the next bytes of the stream."""
        head = self.output.head
        self.output.append(STREAM[head : head + count])
        self.output.commit()

    def text(self, generation: int = 1) -> bytes:
        return self.path(generation).read_bytes()

    def close(self) -> None:
        for fd in self.files.values():
            os.close(fd)
        del self.output, self.clock, self.record  # with the last of them the journal is unmapped


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with ExitStack() as ends:
        yield Scene(tmp_path, ends)


def end(log: Log) -> None:
    """Let go of a log as a worker's death does: nothing is written any more."""
    os.close(log._fd)  # noqa: SLF001


# Writing


def test_everything_is_written_in_order(scene: Scene) -> None:
    log = scene.begin()
    for count in (1, SIZE, 100, 3000, 3000):
        scene.put(count)
        assert log.flush()
        assert scene.text() == STREAM[: scene.output.head]
    assert not log.flush()
    assert (log.size, log.generation, log.missed) == (scene.output.head, 1, 0)
    end(log)


def test_what_was_in_the_file_stays(scene: Scene) -> None:
    scene.path(1).write_bytes(b"before\n")
    log = scene.begin()
    scene.put(10)
    log.flush()
    assert scene.text() == b"before\n" + STREAM[:10]
    assert log.size == 17
    end(log)


def test_a_first_log_begins_with_what_the_journal_still_has(scene: Scene) -> None:
    for _ in range(3):
        scene.put(3000)
    log = scene.begin()
    log.flush()
    assert scene.text() == STREAM[9000 - SIZE : 9000]
    assert log.missed == 0
    end(log)


def test_output_may_go_as_far_as_nothing_gives_way(scene: Scene) -> None:
    log = scene.begin()
    scene.put(100)
    assert log.limit == SIZE
    log.flush()
    assert log.limit == 100 + SIZE
    end(log)


def test_served_says_whether_there_is_more_to_write(scene: Scene) -> None:
    log = scene.begin()
    assert log.served
    scene.put(1)
    assert not log.served
    log.flush()
    assert log.served
    end(log)


def test_what_gave_way_is_a_counted_gap_in_the_file(scene: Scene) -> None:
    log = scene.begin()
    scene.put(10)
    log.flush()
    for _ in range(2):
        scene.put(SIZE)
    log.flush()
    assert scene.text() == STREAM[:10] + gap(SIZE) + STREAM[10 + SIZE : 10 + 2 * SIZE]
    assert log.missed == SIZE
    end(log)


def test_what_another_journal_had_before_a_guest_moved_is_no_gap(scene: Scene) -> None:
    log = scene.begin()
    log.begin_at(5000)
    end(log)  # and a death in between changes nothing
    log = scene.begin()
    assert not log.flush()
    scene.output.begin_at(5000)
    scene.put(100)
    log.flush()
    assert scene.text() == STREAM[5000:5100]
    end(log)


def test_a_head_that_a_successor_finds_behind_is_waited_for(scene: Scene) -> None:
    log = scene.begin()
    log.begin_at(50)
    scene.put(40)
    assert not log.flush()
    scene.put(40)
    log.flush()
    assert scene.text() == STREAM[50:80]
    end(log)


# A full disk


def test_a_write_that_stops_half_way_goes_on_at_the_right_byte(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    log = scene.begin()
    with file_limit(100):
        scene.put(250)
        assert log.flush()
        assert scene.text() == STREAM[:100]
        assert log.failing
        for _ in range(3):
            scene.clock.ring()
            assert not log.flush()
    with file_limit(200):
        scene.clock.ring()
        assert scene.text() == STREAM[:200]
    scene.clock.ring()
    assert scene.text() == STREAM[:250]
    assert not log.failing
    assert caplog.messages == [
        "the log LOG cannot be written, tried again every second: file too large",
        "the log LOG is written again",
    ]
    assert len(scene.changes) == 2
    end(log)


def test_nothing_waits_for_a_full_disk(scene: Scene) -> None:
    log = scene.begin()
    with file_limit(0):
        scene.put(10)
        log.flush()
        assert log.limit > 1 << 62
        assert log.served
        scene.put(SIZE)
        assert not log.flush()  # before it is tried again
    scene.clock.ring()
    assert scene.text() == gap(10) + STREAM[10 : 10 + SIZE]
    assert log.limit == 10 + 2 * SIZE
    end(log)


def test_a_notice_that_is_cut_by_a_full_disk_is_completed(scene: Scene) -> None:
    log = scene.begin()
    scene.put(SIZE)
    scene.put(10)
    for size in range(1, 60):
        with file_limit(size):
            log.flush()
            scene.clock.ring()
            assert os.stat(scene.path(1)).st_size == size
    scene.clock.ring()
    assert scene.text() == gap(10) + STREAM[10 : 10 + SIZE]
    assert log.missed == 10
    end(log)


def test_a_successor_goes_on_on_a_full_disk(scene: Scene) -> None:
    scene.put(SIZE)
    log = scene.begin()
    with file_limit(100):
        log.flush()
        end(log)
        log = scene.begin()
        log.flush()
        end(log)
        scene.put(200)
        log = scene.begin()
        log.flush()
        assert log.failing
        end(log)
    with file_limit(110):  # in the middle of the notice
        log = scene.begin()
        log.flush()
        end(log)
    log = scene.begin()
    log.flush()
    assert scene.text() == STREAM[:100] + gap(100) + STREAM[200 : SIZE + 200]
    end(log)


def test_a_file_that_does_not_tell_its_size_is_one_that_cannot_be_written(scene: Scene) -> None:
    log = scene.begin()
    scene.put(10)
    log.flush()
    end(log)
    mine = scene.files[1]
    scene.files[1], other = os.pipe()  # as one on a network whose server is away
    try:
        log = scene.begin()
        scene.put(10)
        assert not log.flush()
        assert log.failing
        os.dup2(mine, log._fd)  # noqa: SLF001
        scene.clock.ring()
        assert scene.text() == STREAM[:20]
        assert not log.failing
        end(log)
    finally:
        for fd in (mine, other):
            os.close(fd)


def test_who_ends_says_what_could_not_be_written(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    log = scene.begin()
    scene.put(30)
    with file_limit(10):
        log.flush()
        log.end()
    assert caplog.messages[-1] == "the log LOG lacks the last 20 bytes"
    assert all(timer.due is None for timer in scene.clock.timers)


def test_who_ends_writes_what_is_left(scene: Scene) -> None:
    log = scene.begin()
    scene.put(30)
    with file_limit(10):
        log.flush()
    log.end()
    assert scene.text() == STREAM[:30]


# Somebody else


def test_a_file_that_was_cut_off_is_written_on_and_said(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    log = scene.begin()
    for _ in range(3):
        scene.put(100)
        log.flush()
        os.truncate(scene.path(1), 0)
    scene.put(100)
    log.flush()
    assert scene.text() == STREAM[300:400]
    assert log.size == 100
    assert caplog.messages == ["the log LOG was changed by somebody else"]
    end(log)


def test_another_writer_costs_and_repeats_nothing(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    log = scene.begin()
    scene.put(10)
    log.flush()
    os.write(scene.files[1], b"HELLO")
    scene.put(10)
    log.flush()
    assert scene.text() == STREAM[:10] + b"HELLO" + STREAM[10:20]
    assert log.size == 25
    assert caplog.messages == ["the log LOG was changed by somebody else"]
    end(log)


@pytest.mark.parametrize("cut", [0, 5, None], ids=["empty", "shorter", "longer"])
def test_a_successor_repeats_nothing_in_a_file_that_was_changed_meanwhile(
    scene: Scene, caplog: pytest.LogCaptureFixture, cut: int | None
) -> None:
    log = scene.begin()
    scene.put(10)
    log.flush()
    end(log)
    if cut is None:
        os.write(scene.files[1], b"HELLO")
    else:
        os.truncate(scene.path(1), cut)
    between = scene.text()
    log = scene.begin()
    scene.put(10)
    log.flush()
    assert scene.text() == between + STREAM[10:20]
    assert caplog.messages == ["the log LOG was changed by somebody else"]
    end(log)


def test_what_was_being_written_to_a_file_that_was_changed_counts_as_written(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    log = scene.begin()
    scene.put(10)
    log.flush()
    scene.put(20)
    with file_limit(10):  # fails, so that it is under way
        log.flush()
    end(log)
    os.truncate(scene.path(1), 0)
    log = scene.begin()
    scene.put(10)
    log.flush()
    assert scene.text() == STREAM[30:40]
    assert caplog.messages[-1] == (
        "the log LOG was changed by somebody else: 20 bytes may be missing in it"
    )
    end(log)


# New files


def test_a_new_file_goes_on_where_the_old_one_ends(scene: Scene) -> None:
    log = scene.begin()
    scene.put(100)
    log.flush()
    scene.put(100)
    scene.open(2)
    log.switch(2, os.dup(scene.files[2]))
    log.flush()
    assert (scene.text(1), scene.text(2)) == (STREAM[:100], STREAM[100:200])
    assert (log.generation, log.size) == (2, 100)
    end(log)


def test_a_file_that_is_not_newer_is_closed(scene: Scene) -> None:
    log = scene.begin()
    spare = os.dup(scene.files[1])
    log.switch(1, spare)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(spare)
    scene.put(1)
    log.flush()
    assert scene.text() == STREAM[:1]
    end(log)


def test_it_is_told_once_a_file_that_it_is_full(scene: Scene) -> None:
    log = scene.begin(limit=100)
    for generation in (1, 2):
        for _ in range(4):
            scene.put(50)
            log.flush()
        assert len(scene.changes) == 2 * generation - 1  # and that the one before is whole
        scene.open(generation + 1)
        log.switch(generation + 1, os.dup(scene.files[generation + 1]))
    end(log)


def test_a_file_that_is_full_from_the_start_is_told_too(scene: Scene) -> None:
    scene.path(1).write_bytes(bytes(100))
    log = scene.begin(limit=100)
    log.flush()
    assert len(scene.changes) == 1
    end(log)


def test_a_new_file_is_tried_at_once_when_the_old_one_failed(scene: Scene) -> None:
    log = scene.begin()
    scene.put(100)
    with file_limit(60):
        log.flush()
    scene.open(2)
    log.switch(2, os.dup(scene.files[2]))
    log.flush()
    assert (scene.text(1), scene.text(2)) == (STREAM[:60], STREAM[60:100])
    assert not log.failing
    end(log)


def test_half_a_notice_is_whole_in_the_new_file(scene: Scene) -> None:
    log = scene.begin()
    scene.put(SIZE)
    scene.put(10)
    with file_limit(20):
        log.flush()
    scene.open(2)
    log.switch(2, os.dup(scene.files[2]))
    log.flush()
    assert scene.text(1) == gap(10)[:20]
    assert scene.text(2) == gap(10) + STREAM[10 : 10 + SIZE]
    end(log)


def test_a_successor_that_inherits_both_files_ends_the_old_one_first(scene: Scene) -> None:
    log = scene.begin()
    scene.put(100)
    with file_limit(60):
        log.flush()
    end(log)
    scene.open(2)
    log = scene.begin()
    log.flush()
    assert (scene.text(1), scene.text(2)) == (STREAM[:60], STREAM[60:100])
    end(log)


def test_a_successor_without_the_old_file_repeats_nothing(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    log = scene.begin()
    scene.put(100)
    with file_limit(60):
        log.flush()
    end(log)
    os.close(scene.files.pop(1))
    scene.open(2)
    log = scene.begin()
    scene.put(10)
    log.flush()
    assert scene.text(2) == STREAM[100:110]
    assert caplog.messages[-1] == (
        "the log LOG was changed by somebody else: 40 bytes may be missing in it"
    )
    end(log)


# Lines

STAMP = re.compile(rb"(?m)^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z ")


@pytest.fixture(params=[LogFormat.TIMESTAMPS, LogFormat.JSON])
def lined(scene: Scene, request: pytest.FixtureRequest) -> Scene:
    """Give the scene of a log that is not the very bytes."""
    scene.form = request.param
    return scene


def check(form: LogFormat, *texts: bytes) -> tuple[int, int]:
    """Return how much of the stream is in these files, and how much is told to be missing."""
    return _check_objects(texts) if form is LogFormat.JSON else _check_stamped(texts)


def _check_objects(texts: Iterable[bytes]) -> tuple[int, int]:
    at = gaps = 0
    for text in texts:
        *whole, torn = text.split(b"\n")
        assert torn == b"" or not torn.endswith(b"}")
        for line in map(json.loads, whole):
            gaps += line.get("missed", 0)
            at += line.get("missed", 0)
            assert line["offset"] == at
            data = line.get("text", "").encode()
            assert data == STREAM[at : at + len(data)]
            at += len(data)
    return at, gaps


def _check_stamped(texts: Iterable[bytes]) -> tuple[int, int]:
    # Half a time, where a file ends for want of room, is none.
    bodies = [STAMP.sub(b"", re.sub(rb"(?m)^2[0-9T:.Z-]*\Z", b"", text)) for text in texts]
    at = gaps = 0
    parts = re.split(
        rb"(?:\r\n)?\[vhost-device-console: (\d+) bytes missed\]\r\n", b"".join(bodies)
    )
    for number, part in enumerate(parts):
        if number % 2:
            gaps += int(part)
            at += int(part)
        else:
            assert part == STREAM[at : at + len(part)]
            at += len(part)
    return at, gaps


def test_each_line_has_its_time(scene: Scene) -> None:
    scene.form = LogFormat.TIMESTAMPS
    log = scene.begin()
    before = rfc3339(time.time_ns()).encode()
    for count in (5, 2, 70, 3, 4):
        scene.put(count)
        assert log.flush()
    after = rfc3339(time.time_ns()).encode()
    assert STAMP.sub(b"", scene.text()) == STREAM[:84]
    stamps = STAMP.findall(scene.text())
    assert len(stamps) == 12
    assert before <= min(stamps) <= max(stamps) <= after + b" "
    assert log.size == len(scene.text())
    end(log)


def test_lines_are_all_there_whatever_their_pieces(lined: Scene) -> None:
    log = lined.begin()
    for count in (1, 6, 7, 1000, SIZE - 10, 20, 500):
        lined.put(count)
        log.flush()
        assert log.served
    log.end()
    assert check(lined.form, lined.text()) == (lined.output.head, 0)


def test_many_lines_that_come_at_once_are_written_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And none is cut, though each look sees a part of them."""
    monkeypatch.setattr(sys.modules[__name__], "SIZE", 1 << 16)
    with ExitStack() as ends:
        scene = Scene(tmp_path, ends)
        scene.form = LogFormat.JSON
        log = scene.begin()
        for count in (7 * 5000 + 3, 7 * 2000):
            scene.put(count)
            assert log.flush()
            assert log.served
        lines = [json.loads(line)["text"] for line in scene.text().splitlines()]
        assert lines == [f"{n:06x}\n" for n in range(7000)]
        assert not log.flush()
        end(log)
        del log


def test_half_a_line_waits_for_its_end_for_a_while(scene: Scene) -> None:
    scene.form = LogFormat.JSON
    log = scene.begin()
    scene.put(3)
    assert not log.flush()
    assert log.served
    assert scene.text() == b""
    scene.clock.ring()
    assert check(scene.form, scene.text()) == (3, 0)
    scene.put(6)
    assert log.flush()
    assert check(scene.form, scene.text()) == (7, 0)
    end(log)
    log = scene.begin()  # a successor has it wait again
    log.flush()
    scene.put(5)
    log.flush()
    assert check(scene.form, scene.text()) == (14, 0)
    assert [json.loads(line)["text"] for line in scene.text().splitlines()] == [
        "000",
        "000\n",
        "000001\n",
    ]
    end(log)


def test_half_a_line_is_written_when_there_must_be_room(scene: Scene) -> None:
    scene.form = LogFormat.JSON
    log = scene.begin()
    scene.put(3)
    assert log.urge()
    assert check(scene.form, scene.text()) == (3, 0)
    assert not log.urge()
    end(log)


def test_lines_that_gave_way_are_a_counted_gap(lined: Scene) -> None:
    log = lined.begin()
    lined.put(10)
    log.flush()
    for _ in range(2):
        lined.put(SIZE)
    log.end()
    missed = log.missed
    assert missed in (SIZE, SIZE + 3)  # with half a line that waited for its end
    assert check(lined.form, lined.text()) == (10 + 2 * SIZE, missed)


@pytest.mark.parametrize("room", [1, 20, 27, 28, 29, 40, 60, 100, 1000, 2000])
@pytest.mark.parametrize("moves", [False, True])
def test_lines_that_are_cut_by_a_full_disk_are_completed(
    lined: Scene, room: int, moves: bool
) -> None:
    """In the same file; or, whole objects and times, in another one."""
    log = lined.begin()
    lined.put(500)
    with file_limit(room):
        log.flush()
        end(log)
        log = lined.begin()
        log.flush()
        assert log.failing
        lined.put(3000)
    if moves:
        lined.open(2)
        log.switch(2, os.dup(lined.files[2]))
    lined.clock.ring()
    lined.put(100)
    log.end()
    texts = [lined.text(number) for number in lined.files]
    assert len(texts[0]) == room or not moves
    assert check(lined.form, *texts) == (3600, 0)


def test_a_new_file_begins_with_a_time(scene: Scene) -> None:
    scene.form = LogFormat.TIMESTAMPS
    log = scene.begin()
    scene.put(3)
    log.flush()
    scene.open(2)
    log.switch(2, os.dup(scene.files[2]))
    scene.put(20)
    log.flush()
    assert STAMP.match(scene.text(2))
    assert check(scene.form, scene.text(1), scene.text(2)) == (23, 0)
    end(log)


@pytest.mark.parametrize("after", LogFormat)
def test_a_log_goes_on_in_another_format(lined: Scene, after: LogFormat) -> None:
    before = lined.form
    log = lined.begin()
    lined.put(70)
    with file_limit(35):
        log.flush()
    end(log)
    written = lined.text()
    lined.form = after
    log = lined.begin()
    lined.put(14)
    log.end()
    whole = lined.text()
    assert whole.startswith(written)
    if after is LogFormat.RAW:
        assert whole.endswith(STREAM[70:84])
        assert check(before, whole[:-14]) == (70, 0)
    else:
        assert b"00000b" in whole
    assert len(whole) == log.size


# The index of times


def test_the_index_says_when_bytes_came(scene: Scene) -> None:
    ledger_fd = ledger.create("test")
    try:
        scene.record = ledger.Ledger(ledger_fd).log(3)
        log = scene.begin(times=True)
        begun = time.time_ns()
        scene.put(10)
        log.flush()
        log._noted -= 10_000_000  # noqa: SLF001
        scene.put(20)
        log.flush()
        scene.put(1)  # too soon for another entry
        log.flush()
        count, entries = ledger.log_entries(ledger_fd, 3, 0)
        assert count == 2
        assert [each[:3] for each in entries] == [(1, 0, 0), (1, 10, 10)]
        assert begun <= entries[0].time <= entries[1].time <= time.time_ns()
        assert ledger.log_entries(ledger_fd, 3, 2) == (2, [])
        end(log)
    finally:
        os.close(ledger_fd)


def test_a_number_of_entries_that_jumps_back_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a worker that somebody has taken over writes such."""
    ledger_fd = ledger.create("test")
    pread, counts = os.pread, iter([1 << 40, 0])

    def lie(fd: int, size: int, at: int) -> bytes:
        return next(counts).to_bytes(8, sys.byteorder) if size == 8 else pread(fd, size, at)

    monkeypatch.setattr(os, "pread", lie)
    try:
        assert len(ledger.log_entries(ledger_fd, 0, 0)[1]) == ledger.LOG_ENTRIES
    finally:
        os.close(ledger_fd)


def test_the_index_keeps_its_last_entries(scene: Scene) -> None:
    ledger_fd = ledger.create("test")
    try:
        scene.record = ledger.Ledger(ledger_fd).log(127)
        log = scene.begin(times=True)
        for _ in range(300):
            log._noted -= 10_000_000  # noqa: SLF001
            scene.put(1)
            log.flush()
        count, entries = ledger.log_entries(ledger_fd, 127, 0)
        assert count == 300
        assert [each.offset for each in entries] == [*range(301 - ledger.LOG_ENTRIES, 300)]
        end(log)
    finally:
        os.close(ledger_fd)


# Deaths

#: The story of a log: how far its guest has written when a second file comes, when the disk is full
#: and when it is not any more, and at the end; and what fits on the disk.
ORDERED, FULL, ROOM_AGAIN, END = 2000, 4000, 10000, 12000
STEP, ROOM = 2000, 3000

#: The second file comes before what the guest wrote last is written.
SWITCHED = ORDERED - STEP


def story(scene: Scene) -> None:
    """Do what a worker does from where the journal is until the end."""
    log = scene.begin(newest=2 if scene.output.head >= ORDERED else 1)
    while True:
        head = scene.output.head
        if head >= ORDERED and log.generation == 1:
            log.switch(2, os.dup(scene.files[2]))
        with file_limit(ROOM) if FULL <= head < ROOM_AGAIN else nullcontext():
            scene.clock.ring()
            log.flush()
        if head == END:
            log.end()
            return
        scene.put(STEP)


def lives(scene: Scene, dies_at: int) -> bool:
    """Have a worker go on with the story; return whether it did not get to that line of log.py."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            sys.settrace(_dying_at(dies_at))
            story(scene)
            status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL)
    scene.output = Journal(scene.journal).output  # as the next one finds it
    return status == 0


def _dying_at(line: int) -> Callable[[FrameType, str, Any], Any]:
    left = line

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename != module.__file__:
            return None
        if event == "line":
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    return trace


WHOLE = (
    STREAM[:SWITCHED],
    STREAM[SWITCHED : SWITCHED + ROOM]
    + gap(ROOM_AGAIN - SIZE - SWITCHED - ROOM)
    + STREAM[ROOM_AGAIN - SIZE : END],
)


def deaths(tmp_path: Path, part: int, form: LogFormat) -> Iterator[tuple[Scene, int]]:
    """Yield the scene after each death in the story; at the end one whose worker lived."""
    died_at = 1 + part
    while True:
        folder = tmp_path / str(died_at)
        folder.mkdir()
        with ExitStack() as ends:
            scene = Scene(folder, ends)
            scene.form = form
            scene.open(2)
            if lives(scene, died_at):
                break
            if died_at % 8 < 4:
                lives(scene, 1 + died_at // 8)  # the next one dies soon as well
            story(scene)
            yield scene, died_at
        died_at += 4
    assert died_at > 300


@pytest.mark.parametrize("part", range(4))
def test_a_worker_that_dies_at_any_line_leaves_a_log_that_its_successors_make_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, part: int
) -> None:
    caplog.set_level(logging.CRITICAL)  # many lines, which nobody reads
    for scene, died_at in deaths(tmp_path, part, LogFormat.RAW):
        assert (scene.text(1), scene.text(2)) == WHOLE, f"died at line {died_at}"


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("form", [LogFormat.TIMESTAMPS, LogFormat.JSON])
def test_a_worker_that_dies_at_any_line_leaves_lines_that_its_successors_make_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, part: int, form: LogFormat
) -> None:
    caplog.set_level(logging.CRITICAL)
    for scene, died_at in deaths(tmp_path, part, form):
        at, gaps = check(form, scene.text(1), scene.text(2))
        assert at == END, f"died at line {died_at}"
        # What is not written when the disk is full is in the journal, but for the oldest.
        assert 0 < gaps < ROOM_AGAIN - SIZE, f"died at line {died_at}"
