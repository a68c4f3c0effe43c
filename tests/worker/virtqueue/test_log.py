"""The dirty log: which bits are set, that none is lost, and logs that cannot be."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from marker import mark_and_clear
from rings import MakeSides
from vhost_device_console.errors import FrontendError, RefusedError
from vhost_device_console.testing import Buffer, PackedDriver
from vhost_device_console.worker.vhost_user.message import Region
from vhost_device_console.worker.virtqueue import log as module
from vhost_device_console.worker.virtqueue.features import EVENT_IDX, RING_PACKED
from vhost_device_console.worker.virtqueue.log import DirtyLog

PAGE = 4096
FORMATS = pytest.mark.parametrize("format_", [0, RING_PACKED], ids=["split", "packed"])
MODES = pytest.mark.parametrize("event_idx", [0, EVENT_IDX], ids=["flags", "event index"])

Memfd = Callable[..., int]


@pytest.fixture
def memfd() -> Iterator[Memfd]:
    made: list[int] = []

    def make(size: int, flags: int = 0) -> int:
        fd = os.memfd_create("test-dirty-log", flags | os.MFD_CLOEXEC)
        made.append(fd)
        os.truncate(fd, size)
        return fd

    yield make
    for fd in made:
        os.close(fd)


def bits(data: bytes) -> set[int]:
    """Return the numbers of the bits that are set, as in vhost-user.rst, "Migration"."""
    return {8 * at + bit for at, byte in enumerate(data) for bit in range(8) if byte >> bit & 1}


# The bits


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 4, 6, PAGE, PAGE + 5])
@pytest.mark.parametrize(
    ("addr", "size", "pages"),
    [
        (0, 1, [0]),
        (PAGE - 1, 1, [0]),
        (PAGE - 1, 2, [0, 1]),
        (7 * PAGE, PAGE, [7]),
        (8 * PAGE, PAGE + 1, [8, 9]),
        (31 * PAGE, 2 * PAGE, [31, 32]),
        (3 * PAGE + 5, 100 * PAGE, range(3, 104)),
        (799 * PAGE, PAGE, [799]),
        (0, 800 * PAGE, range(800)),
        (5 * PAGE, 0, []),
    ],
)
def test_a_bit_for_every_page(
    memfd: Memfd, offset: int, addr: int, size: int, pages: range | list[int]
) -> None:
    fd = memfd(3 * PAGE)
    DirtyLog(fd, 100, offset, 0).mark(addr, size)
    assert bits(os.pread(fd, 100, offset)) == set(pages)
    assert bits(os.pread(fd, 3 * PAGE, 0)) == {8 * offset + page for page in pages}


def test_bits_of_others_stay(memfd: Memfd) -> None:
    fd = memfd(PAGE)
    os.pwrite(fd, b"\x55" * 8, 0)
    DirtyLog(fd, 8, 0, 0).mark(9 * PAGE, PAGE)
    assert os.pread(fd, 8, 0) == b"\x55\x57" + b"\x55" * 6


def test_it_is_known_that_something_was_marked(memfd: Memfd) -> None:
    log = DirtyLog(memfd(PAGE), 8, 0, 0)
    log.mark(0, 0)
    assert not log.marked
    log.mark(0, 1)
    assert log.marked


def test_no_bit_is_lost_to_others_in_the_same_word(memfd: Memfd) -> None:
    """Another process sets and clears the odd bits meanwhile, and this one the even ones."""
    fd = memfd(PAGE)
    script = str(Path(__file__).with_name("marker.py"))
    with subprocess.Popen(
        [sys.executable, script, str(fd), "60000", "1"],
        pass_fds=[fd],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        try:
            assert other.stdout.readline() == "ready\n"
            other.stdin.write("go\n")
            other.stdin.flush()
            lost = mark_and_clear(fd, 60000, 0)
            assert (lost, other.stdout.readline()) == (0, "0\n")
        finally:
            other.kill()


# Logs that cannot be


@pytest.mark.parametrize(
    ("size", "end", "fits"),
    [(1, 8 * PAGE, True), (1, 8 * PAGE + 1, False), (0, 1, False), (16, 1 << 19, True)],
)
def test_a_log_must_reach_as_far_as_the_memory(
    memfd: Memfd, size: int, end: int, fits: bool
) -> None:
    fd = memfd(PAGE)
    if fits:
        assert DirtyLog(fd, size, 0, end).covers(end - 1, 1)
    else:
        with pytest.raises(RefusedError, match="too small"):
            DirtyLog(fd, size, 0, end)


@pytest.mark.parametrize(
    ("size", "offset"),
    [
        (PAGE + 1, 0),
        (PAGE, 1),
        (8, PAGE),
        (1 << 62, 0),
        (8, (1 << 64) - 8),
        (8, (1 << 64) - 7),
        ((1 << 64) - 1, (1 << 64) - 1),
    ],
)
def test_a_log_that_the_file_does_not_have_is_refused(memfd: Memfd, size: int, offset: int) -> None:
    with pytest.raises(RefusedError, match="dirty log"):
        DirtyLog(memfd(PAGE), size, offset, 0)


@pytest.mark.parametrize("mode", [os.O_RDONLY, os.O_WRONLY])
def test_a_log_that_cannot_be_written_is_refused(memfd: Memfd, mode: int) -> None:
    fd = os.open(f"/proc/self/fd/{memfd(PAGE)}", mode)
    try:
        with pytest.raises(RefusedError, match="cannot be mapped"):
            DirtyLog(fd, 8, 0, 0)
    finally:
        os.close(fd)


def test_a_log_is_refused_where_no_bit_can_be_set(
    memfd: Memfd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FUTEX", None)
    with pytest.raises(RefusedError, match="cannot be kept"):
        DirtyLog(memfd(PAGE), 8, 0, 0)


def test_a_log_is_refused_where_the_kernel_sets_no_bit(
    memfd: Memfd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FUTEX", 0x7FFF)  # no system call
    with pytest.raises(RefusedError, match="Function not implemented"):
        DirtyLog(memfd(PAGE), 8, 0, 0)


def test_a_log_that_is_cut_off_is_the_frontends_fault(memfd: Memfd) -> None:
    """A store would be a SIGBUS, of which this process would die."""
    fd = memfd(2 * PAGE)  # not to be sealed: made without MFD_ALLOW_SEALING
    log = DirtyLog(fd, 2 * PAGE, 0, 0)
    os.truncate(fd, PAGE)
    log.mark(0, 1)
    with pytest.raises(FrontendError, match="cannot be written: Bad address"):
        log.mark(8 * PAGE * PAGE, 1)


def test_a_log_is_sealed_where_it_can_be(memfd: Memfd) -> None:
    fd = memfd(PAGE, os.MFD_ALLOW_SEALING)
    DirtyLog(fd, PAGE, 0, 0)
    with pytest.raises(PermissionError):
        os.truncate(fd, 0)


def test_a_log_stays_when_its_descriptor_is_closed(memfd: Memfd) -> None:
    fd = memfd(PAGE)
    other = os.dup(fd)
    log = DirtyLog(other, 8, 0, 0)
    os.close(other)
    log.mark(PAGE, 1)
    assert bits(os.pread(fd, 8, 0)) == {1}


# What a ring marks

LOG = 1 << 12  # bytes, for 128 MiB of guest memory
GUEST = [Region(0x10_0000, 1 << 20, 0x7000_0000, 0), Region(0x20_0000, 1 << 20, 0x8000_0000, 0)]
USED_LOG = 0x500_0000  # "might be outside the legal guest physical address range"


class Logged:
    """A ring and its log, whose marks are taken away by looking at them."""

    def __init__(self, sides: MakeSides, memfd: Memfd, features: int, **options: Any) -> None:
        self.side = sides(features, memory=sides.memory(GUEST), **options)
        self.fd = memfd(LOG)
        self.log = DirtyLog(self.fd, LOG, 0, self.side.memory.end)

    def pages(self) -> set[int]:
        """Return the addresses of the pages marked since the last time."""
        found = {bit * PAGE for bit in bits(os.pread(self.fd, LOG, 0))}
        os.pwrite(self.fd, bytes(LOG), 0)
        return found

    def fill(self, *spans: tuple[int, int], written: int) -> None:
        """Offer (address, size) spans as one chain, and complete it with `written` bytes."""
        self.side.driver.add_buffers([Buffer(addr, size, True) for addr, size in spans])
        self.side.driver.publish()
        self.side.queue.push(self.side.pop().head, written)


@pytest.fixture
def logged(sides: MakeSides, memfd: Memfd) -> Callable[..., Logged]:
    def make(features: int, **options: Any) -> Logged:
        return Logged(sides, memfd, features, **options)

    return make


MakeLogged = Callable[..., Logged]


@FORMATS
def test_exactly_the_pages_with_written_bytes_are_marked(logged: MakeLogged, format_: int) -> None:
    r = logged(format_, writable=True)
    r.side.queue.log(r.log, None)
    base = 0x18_0000
    for written, pages in [(0, 0), (1, 1), (PAGE, 1), (PAGE + 1, 2), (3 * PAGE, 3)]:
        r.fill((base, 4 * PAGE), written=written)
        r.side.queue.publish()
        assert r.pages() == {base + at * PAGE for at in range(pages)}, written
        r.side.driver.reap()


@FORMATS
@pytest.mark.parametrize("indirect", [False, True])
def test_the_pages_of_every_piece_are_marked(
    logged: MakeLogged, format_: int, indirect: bool
) -> None:
    """The pieces are filled in order, and one of them crosses from a region into the next."""
    r = logged(format_, writable=True)
    r.side.queue.log(r.log, None)
    pieces = [(0x18_0FF0, 16), (0x1F_FFFC, 8), (0x28_0000, 2), (0x29_0000, 100)]
    r.side.driver.add_buffers([Buffer(*piece, True) for piece in pieces], indirect=indirect)
    r.side.driver.publish()
    r.side.queue.push(r.side.pop().head, 25)
    assert r.pages() == {0x18_0000, 0x1F_F000, 0x20_0000, 0x28_0000}


@FORMATS
def test_chains_are_marked_in_the_order_of_their_completion(
    logged: MakeLogged, format_: int
) -> None:
    r = logged(format_, writable=True)
    r.side.queue.log(r.log, None)
    for page in range(4):
        r.side.driver.add_buffers([Buffer(0x18_0000 + page * PAGE, 10, True)])
    r.side.driver.publish()
    first, second = r.side.pop(), r.side.pop()
    third = r.side.pop()
    r.side.queue.unpop(third.head)
    r.side.queue.push(first.head, 0)
    assert r.pages() == set()
    r.side.queue.push(second.head, 1)
    assert r.pages() == {0x18_1000}
    r.side.queue.push(r.side.pop().head, 1)
    assert r.pages() == {0x18_2000}


@FORMATS
def test_a_log_may_come_go_and_change_while_a_ring_runs(
    logged: MakeLogged, memfd: Memfd, format_: int
) -> None:
    r = logged(format_, writable=True)
    other_fd = memfd(LOG)
    other = DirtyLog(other_fd, LOG, 0, 0)
    seen = []
    for log in (None, r.log, None, r.log, other, None):
        r.side.queue.log(log, None if log is None else USED_LOG)
        r.fill((0x18_0000, 1), written=1)
        r.side.queue.publish()
        r.side.driver.reap()
        seen.append((bool(r.pages()), bool(bits(os.pread(other_fd, LOG, 0)))))
        os.pwrite(other_fd, bytes(LOG), 0)
    yes, no = True, False
    assert seen == [(no, no), (yes, no), (no, no), (yes, no), (no, yes), (no, no)]


@FORMATS
@MODES
def test_a_readable_queue_marks_none_of_its_buffers(
    logged: MakeLogged, format_: int, event_idx: int
) -> None:
    r = logged(format_ | event_idx)
    r.side.queue.log(r.log, None)
    r.side.give(b"x")
    r.side.done()
    r.side.queue.want_kicks()
    r.side.queue.refuse_kicks()
    assert r.pages() == set()


def written_words(r: Logged, step: Callable[[], object]) -> set[int]:
    """Return the pages a ring's own words have been changed in by `step`, told by its memory."""
    driver = r.side.driver
    areas = {driver.used_addr: (driver.used_addr, USED_LOG, 6 + 8 * driver.size)}
    if isinstance(driver, PackedDriver):
        areas = {
            driver.used_addr: (driver.used_addr, USED_LOG, 4),
            driver.desc_addr: (driver.desc_addr, driver.desc_addr, 16 * driver.size),
        }
    before = {addr: r.side.guest.read(addr, size) for addr, _, size in areas.values()}
    step()
    pages = set()
    for addr, logged_at, size in areas.values():
        after = r.side.guest.read(addr, size)
        for at, (old, new) in enumerate(zip(before[addr], after, strict=True)):
            if old != new:
                pages.add((logged_at + at) // PAGE * PAGE)
    return pages


@FORMATS
@MODES
def test_the_rings_own_words_are_marked_where_its_log_address_says(
    logged: MakeLogged, format_: int, event_idx: int
) -> None:
    """Over three laps of a ring of many pages, each changed word's page is marked, no other."""
    rng = random.Random(5)
    r = logged(format_ | event_idx, size=2048)
    queue, driver = r.side.queue, r.side.driver
    queue.log(r.log, USED_LOG)
    buffer = Buffer(r.side.guest.alloc(1), 1, False)
    steps: list[Callable[[], object]] = [queue.want_kicks, queue.refuse_kicks, queue.publish]
    for _ in range(40):
        count = rng.randrange(1, 300)
        for _ in range(count):
            driver.add_buffers([buffer])
        driver.publish()
        for _ in range(count):
            queue.push(r.side.pop().head, 0)
        for step in steps:
            changed = written_words(r, step)
            marked = r.pages()
            assert changed <= marked
            if step is queue.publish:
                first = USED_LOG // PAGE * PAGE
                assert marked - changed <= {first}  # the index, when its low byte alone changed
        driver.reap()


@FORMATS
def test_without_a_log_address_the_rings_own_words_are_not_marked(
    logged: MakeLogged, format_: int
) -> None:
    r = logged(format_, writable=True)
    r.side.queue.log(r.log, None)
    r.fill((0x18_0000, 1), written=0)
    r.side.queue.publish()
    r.side.queue.want_kicks()
    r.side.queue.refuse_kicks()
    assert r.pages() == set()


@FORMATS
@pytest.mark.parametrize("addr", [LOG * 8 * PAGE, LOG * 8 * PAGE - 2, 1 << 63])
def test_a_log_that_ends_before_a_rings_words_is_refused(
    logged: MakeLogged, format_: int, addr: int
) -> None:
    r = logged(format_, writable=True)
    with pytest.raises(RefusedError, match="ends before"):
        r.side.queue.log(r.log, addr)
    r.fill((0x18_0000, 1), written=1)  # and nothing has changed
    assert r.pages() == set()
