"""Health records into a pipe that may be full."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest
from vhost_device_console.health import Decoder, Health, PortHealth
from vhost_device_console.worker.poller import Poller, Timer
from vhost_device_console.worker.report import Report


class Rig:
    """A report over a pipe; `health` is what it collects."""

    def __init__(self) -> None:
        self.health = Health()
        self.poller = Poller(0)
        self.timers: list[Timer] = []
        made = self.poller.timer

        def timer(callback: object) -> Timer:
            self.timers.append(made(callback))  # type: ignore[arg-type]
            return self.timers[-1]

        self.poller.timer = timer  # type: ignore[method-assign]
        self.pipe, fd = os.pipe2(os.O_NONBLOCK)
        self.report = Report(fd, self.poller, lambda: self.health)
        self.fd = fd
        self.decoder = Decoder()

    @property
    def soon(self) -> bool:
        """Whether a record is due."""
        return any(timer.due is not None for timer in self.timers)

    def fire(self) -> None:
        for timer in self.timers:
            if timer.due is not None:
                timer.fire()

    def records(self) -> list[Health]:
        """Return what reached the master since the last time."""
        found: list[Health] = []
        with suppress(BlockingIOError):
            while data := os.read(self.pipe, 1 << 16):
                found += self.decoder.feed(data)
        return found

    def clog(self, room: int) -> int:
        """Fill the pipe but for `room` bytes; return how many bytes are in it."""
        total = 0
        with suppress(BlockingIOError):
            while True:
                total += os.write(self.fd, bytes(4096))
        os.read(self.pipe, room)
        return total - room

    def unclog(self, size: int) -> None:
        """Take what `clog` put in."""
        while size:
            size -= len(os.read(self.pipe, size))


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    with suppress(OSError):
        os.close(made.fd)
    with suppress(OSError):
        os.close(made.pipe)
    made.poller.close()


def delay_ms(rig: Rig) -> int:
    """Return how long the record that is due waits, in steps of 250 ms."""
    (due,) = (timer.due for timer in rig.timers if timer.due is not None)
    return round((due - time.monotonic_ns()) / 250e6) * 250


def test_a_change_after_a_quiet_time_is_reported_within_a_quarter_of_a_second(rig: Rig) -> None:
    rig.report.changed()
    assert delay_ms(rig) == 250


def test_changes_that_go_on_are_reported_once_a_second(rig: Rig) -> None:
    rig.report.changed()
    rig.fire()
    rig.report.changed()
    assert delay_ms(rig) == 1000


def test_a_record_is_sent_at_once_when_it_matters(rig: Rig) -> None:
    rig.health.kicks = 5
    rig.report.send()
    assert [record.kicks for record in rig.records()] == [5]


def test_a_change_is_sent_soon_and_once(rig: Rig) -> None:
    for kicks in range(10):
        rig.health.kicks = kicks
        rig.report.changed()
    assert rig.records() == []
    rig.fire()
    assert [record.kicks for record in rig.records()] == [9]
    assert not rig.soon


def test_a_record_sent_at_once_is_not_sent_again_soon(rig: Rig) -> None:
    rig.report.changed()
    rig.report.send()
    assert not rig.soon


def test_changes_do_not_put_a_record_off(rig: Rig) -> None:
    rig.report.changed()
    due = [timer.due for timer in rig.timers]
    rig.report.changed()
    assert [timer.due for timer in rig.timers] == due


def test_a_full_pipe_waits_and_then_has_the_latest_record(rig: Rig) -> None:
    size = rig.clog(0)
    rig.report.send()
    assert rig.soon
    rig.health.kicks = 7
    rig.unclog(size)
    rig.fire()
    assert [record.kicks for record in rig.records()] == [7]


def big() -> Health:
    """Return a record that is no atomic write to a pipe."""
    return Health(ports=[PortHealth(id=at, name="x" * 50) for at in range(120)])


def test_a_record_that_fits_in_part_is_finished_before_a_newer_one(rig: Rig) -> None:
    rig.health = big()
    rig.health.kicks = 1
    size = rig.clog(4096)
    rig.report.send()
    rig.health.kicks = 2
    rig.unclog(size)
    rig.report.send()
    assert rig.soon
    rig.fire()
    assert [record.kicks for record in rig.records()] == [1, 2]


def test_a_master_that_is_gone_is_no_error(rig: Rig) -> None:
    os.close(rig.pipe)
    rig.report.send()
    assert not rig.soon
    rig.pipe = os.dup(rig.fd)


def test_closing_sends_the_last_record(rig: Rig) -> None:
    rig.health.kicks = 3
    rig.report.changed()
    rig.report.close()
    assert [record.kicks for record in rig.records()] == [3]
    assert os.read(rig.pipe, 1) == b""
    rig.fd = -1
