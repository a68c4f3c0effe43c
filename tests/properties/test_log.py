"""A log under any order of output, full disks, new files and deaths, and the files beside it.

The master's side is the real one. At the end all files together are what the guest wrote, but for
gaps that say how much is missing, of which there are none as long as the disk took it in time.
VDC_EXAMPLES=n tries more: see `budget`.
"""

from __future__ import annotations

import logging
import mmap
import os
import re
import resource
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from budget import Machine, run
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from vhost_device_console import config, journal
from vhost_device_console.journal import Journal
from vhost_device_console.logs import LogFiles
from vhost_device_console.worker.backends.base import gap
from vhost_device_console.worker.backends.log import RECORD_BYTES, Log
from vhost_device_console.worker.poller import Timer

SIZE = 4096
LOGGER = logging.LoggerAdapter(logging.getLogger("test"), {})

#: Every seven bytes say where they are.
STREAM = b"".join(b"%06x\n" % n for n in range(1 << 16))

GAP = re.compile(rb"\r\n\[vhost-device-console: (\d+) bytes missed\]\r\n")


class Clock:
    """What a log wants of a poller."""

    def __init__(self) -> None:
        self.timers: list[Timer] = []

    def timer(self, callback: Callable[[], None]) -> Timer:
        self.timers.append(Timer(callback, set()))
        return self.timers[-1]


class Logs(Machine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="vdc", dir="/tmp"))
        self.files = LogFiles(config.Log(str(self.folder / "log"), 4096, 99))
        fd = journal.create("test", SIZE, SIZE)
        self.output = Journal(fd).output
        os.close(fd)
        self.record = memoryview(mmap.mmap(-1, RECORD_BYTES))
        self.told = 0  # the generation that the worker knows of
        self.room: int | None = None  # on the disk, for each file
        self.missed = 0  # as the workers said
        self.begin()

    def begin(self) -> None:
        """Have a worker begin, with all that the master has."""
        self.clock = Clock()
        files = {generation: os.dup(fd) for generation, fd in self.files.files.items()}
        self.told = max(files)
        self.log = Log(
            "log",
            self.output,
            self.record,
            files,
            0,
            self.clock,  # type: ignore[arg-type]
            LOGGER,
            lambda: None,
        )

    def limited(self, act: Callable[[], object]) -> None:
        """Do what a worker does, on a disk with as much room as there is."""
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if self.room is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.room, hard))
        try:
            act()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    @rule(count=st.integers(1, SIZE))
    def write(self, count: int) -> None:
        """Have the guest write, no more than the port lets it."""
        count = min(count, self.log.limit - self.output.head)
        head = self.output.head
        if count and head + count <= len(STREAM):
            self.output.append(STREAM[head : head + count])
            self.output.commit()

    @rule()
    def flush(self) -> None:
        self.limited(self.log.flush)

    @rule(room=st.integers(0, 3 * SIZE))
    def fill_disk(self, room: int) -> None:
        self.room = room

    @rule()
    def free_disk(self) -> None:
        self.room = None

    @rule()
    def wait(self) -> None:
        """Let the second until the next try pass."""
        for timer in self.clock.timers:
            if timer.due is not None:
                self.limited(timer.fire)

    @rule()
    def die(self) -> None:
        """End a worker without a word."""
        self.missed += self.log.missed
        os.close(self.log._fd)  # noqa: SLF001
        self.limited(self.begin)

    @rule()
    def report(self) -> None:
        """Have the worker say which file it writes."""
        self.files.settled(self.log.generation)

    @rule()
    def rotate(self) -> None:
        self.files.rotate()

    @precondition(lambda self: self.told < self.files.newest)
    @rule()
    def order(self) -> None:
        """Tell the worker of the newest file."""
        self.told = self.files.newest
        self.limited(lambda: self.log.switch(self.told, os.dup(self.files.files[self.told])))

    def finish(self) -> None:
        """Read all of it, oldest first."""
        self.room = None
        self.wait()
        self.flush()
        assert not self.log.failing
        at = gaps = 0
        names = [f"log.{number}" for number in range(99, 0, -1)]
        for name in [*names, "log"]:
            path = self.folder / name
            if path.exists():
                at, missed = self._read(path.read_bytes(), at)
                gaps += missed
        assert at == self.output.head
        assert gaps == self.missed + self.log.missed

    def _read(self, text: bytes, at: int) -> tuple[int, int]:
        """Check a file that begins `at` that offset; return where it ends, and what it lacks."""
        begun = at
        gaps = 0
        while text:
            cut = text.find(b"\r") if b"\r" in text else len(text)
            assert text[:cut] == STREAM[at : at + cut]
            at += cut
            text = text[cut:]
            if whole := GAP.match(text):
                at += int(whole[1])
                gaps += int(whole[1])
                text = text[whole.end() :]
            elif text:
                # A notice for which there was no room; the next file has a whole one.
                assert len(text) < len(gap(1 << 20))
                assert text == gap(0)[: len(text)] or text.startswith(gap(0)[:25])
                break
        assert at >= begun
        return at, gaps

    def close(self) -> None:
        os.close(self.log._fd)  # noqa: SLF001
        self.files.close()
        shutil.rmtree(self.folder)


def test_all_files_together_are_what_the_guest_wrote() -> None:
    run(Logs, examples=100, steps=60)
