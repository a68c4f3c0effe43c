"""The log of written pages, with which a guest's memory is copied while it runs."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from scene import Pair, attach, boot, converse, footprint, wait_footprint
from vhost_device_console.testing import (
    DRIVER_FEATURES,
    ConsoleDriver,
    Feature,
    Frontend,
    GuestMemory,
    NackError,
    connect_like_qemu,
)
from vhost_device_console.worker.vhost_user.message import (
    VRING_F_LOG,
    LogArea,
    Region,
    Request,
)

from launch import WITHIN, wait_readable

PAGE = 4096
PACKED = DRIVER_FEATURES | Feature.RING_PACKED


class Log:
    """A log in a file of its own, behind a page that is none of it."""

    def __init__(self, memory: GuestMemory) -> None:
        end = max(region.guest_addr + region.size for region, _ in memory.regions())
        size = -(-end // (8 * PAGE))
        self.area = LogArea(size, PAGE)
        self.fd = os.memfd_create("log")
        os.ftruncate(self.fd, PAGE + size)
        self._map = mmap.mmap(self.fd, PAGE + size)

    def take(self) -> set[int]:
        """Return the pages marked since the last time."""
        pages = set()
        for at in range(PAGE, len(self._map)):
            if byte := self._map[at]:
                self._map[at] = 0
                pages |= {8 * (at - PAGE) + bit for bit in range(8) if byte >> bit & 1}
        assert self._map[:PAGE] == bytes(PAGE)
        return pages

    def close(self) -> None:
        self._map.close()
        os.close(self.fd)


@pytest.fixture(params=[DRIVER_FEATURES, PACKED], ids=["split", "packed"])
def console(pair: Pair, request: pytest.FixtureRequest) -> Iterator[ConsoleDriver]:
    """Give a guest's console, with rings of either format."""
    with boot(pair.daemon, features=request.param) as console:
        yield console


@pytest.fixture
def memory(console: ConsoleDriver) -> GuestMemory:
    return console.port.tx.driver.memory


@pytest.fixture
def log(memory: GuestMemory) -> Iterator[Log]:
    made = Log(memory)
    yield made
    made.close()


def refused(do: Callable[[], Any]) -> None:
    with pytest.raises(NackError):
        do()


def page(addr: int) -> int:
    return addr // PAGE


def page_of_used(console: ConsoleDriver, index: int) -> set[int]:
    """Return the pages of what the device writes in a ring itself."""
    driver = console.frontend.queues[index].driver
    if console.frontend.features & Feature.RING_PACKED:
        span = driver.desc_addr, 16 * driver.size
    else:
        span = driver.used_addr, 6 + 8 * driver.size
    return set(range(page(span[0]), page(span[0] + span[1] - 1) + 1))


def test_input_is_logged_with_its_ring(pair: Pair, console: ConsoleDriver, log: Log) -> None:
    """Every page that input was written to is marked, and the used ring's."""
    console.frontend.start_log(log.area, log.fd)
    log.take()
    with attach(pair.daemon) as peer:
        pending = {
            addr for chain in console.port.rx.driver.pending.values() for addr, *_ in chain.buffers
        }
        peer.sendall(b"x" * 10)
        console.read(10)
    marked = log.take()
    assert marked & {page(addr) for addr in pending}
    if console.frontend.features & Feature.RING_PACKED:
        # The used descriptor is where the available one was; SET_VRING_ADDR says where.
        assert len(marked) >= 2
    else:
        assert marked & page_of_used(console, 0)


def test_nothing_is_logged_unless_chosen(pair: Pair, console: ConsoleDriver, log: Log) -> None:
    """A log alone is not used; it is once LOG_ALL is chosen, and not any more when it is not."""
    frontend = console.frontend
    with attach(pair.daemon) as peer:
        frontend.set_log_base(log.area, log.fd)
        converse(console, peer)
        assert log.take() == set()
        frontend.start_log(log.area, log.fd)
        converse(console, peer)
        assert log.take()
        frontend.stop_log()
        log.take()
        converse(console, peer)
        assert log.take() == set()


def test_rings_are_logged_only_where_they_are_to_be(
    pair: Pair, console: ConsoleDriver, log: Log
) -> None:
    """Without the flag of SET_VRING_ADDR the used ring is not logged, the buffers are."""
    frontend = console.frontend
    with attach(pair.daemon) as peer:
        frontend.start_log(log.area, log.fd)
        for index in range(4):
            queue = frontend.queues[index]
            frontend._set_addr(queue, 0, 0, None)  # noqa: SLF001
        log.take()
        console.write(b"out")
        assert log.take() == set()
        peer.sendall(b"in")
        console.read(2)
        assert len(log.take()) == 1


def test_a_log_takes_the_place_of_another(
    pair: Pair, console: ConsoleDriver, memory: GuestMemory, log: Log
) -> None:
    """cloud-hypervisor gives a new log for each round: from then on the old one is left alone."""
    other = Log(memory)
    try:
        console.frontend.start_log(log.area, log.fd)
        with attach(pair.daemon) as peer:
            converse(console, peer)
            assert log.take()
            console.frontend.set_log_base(other.area, other.fd)
            log.take()
            converse(console, peer)
        assert other.take()
        assert log.take() == set()
    finally:
        other.close()


def test_a_logs_event(pair: Pair, console: ConsoleDriver, log: Log) -> None:
    """SET_LOG_FD's descriptor is signalled when the log has changed, and not before."""
    event = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        console.frontend.set_log_fd(event)
        console.write(b"unlogged")
        with pytest.raises(BlockingIOError):
            os.eventfd_read(event)
        console.frontend.start_log(log.area, log.fd)
        with attach(pair.daemon) as peer:
            peer.sendall(b"logged")
            console.read(6)
        wait_readable(event, time.monotonic() + WITHIN, "no event")
    finally:
        os.close(event)


def test_a_log_that_is_too_small(pair: Pair, console: ConsoleDriver, log: Log) -> None:
    """A log that does not reach the end of memory, or leaves its file, ends the connection.

    Its answer has no room for a refusal: whoever believes that pages are logged loses them.
    """
    frontend = console.frontend
    size, offset = log.area
    frontend.send(Request.SET_LOG_BASE, LogArea(size - 1, offset).encode(), [log.fd])
    frontend.wait_closed()
    pair.daemon.expect_log("too small|cannot be mapped")


@pytest.mark.parametrize(
    "area", [LogArea(0, 0), LogArea(1 << 40, 0), LogArea(1 << 20, 1 << 62), LogArea(1 << 63, 1)]
)
def test_a_log_that_cannot_be(pair: Pair, area: LogArea) -> None:
    """A log that its file does not have ends the connection."""
    fd = os.memfd_create("log")
    try:
        with Frontend(pair.daemon.sockets[0], timeout=WITHIN) as frontend:
            frontend.negotiate()
            frontend.send(Request.SET_LOG_BASE, area.encode(), [fd])
            frontend.wait_closed()
    finally:
        os.close(fd)


def test_a_ring_that_would_be_logged_outside(console: ConsoleDriver, log: Log) -> None:
    """The log must reach to the end of the used ring too, wherever it is to be logged."""
    console.frontend.start_log(log.area, log.fd)
    driver = console.port.tx.driver
    user = driver.memory.user_addr
    for addr in (8 * PAGE * log.area.size, (1 << 64) - 1):
        refused(
            lambda addr=addr: console.frontend.set_vring_addr(
                1,
                user(driver.desc_addr),
                user(driver.used_addr),
                user(driver.avail_addr),
                addr,
                flags=VRING_F_LOG,
            )
        )
    console.frontend.barrier()


def test_memory_may_not_outgrow_its_log(pair: Pair) -> None:
    """While pages are logged, memory past the log's end is refused; a larger log lets it in."""
    low = Region(0, 1 << 24, 0x7000_0000, 0)
    high = Region(1 << 30, PAGE, 0x9000_0000, 0)
    with (
        GuestMemory([low]) as memory,
        GuestMemory([low, high]) as larger,
        connect_like_qemu(pair.daemon.sockets[0], memory, timeout=WITHIN) as frontend,
    ):
        console = ConsoleDriver(frontend, buffers=64)
        console.wait_open()
        small, large = Log(memory), Log(larger)
        try:
            frontend.start_log(small.area, small.fd)
            region, fd = larger.regions()[1]
            refused(lambda: frontend.add_mem_reg(region, fd))
            frontend.set_log_base(large.area, large.fd)
            frontend.add_mem_reg(region, fd)
            console.write(b"x")
            assert large.take()
        finally:
            small.close()
            large.close()


def test_a_frontend_that_cuts_off_its_log_is_dropped(
    pair: Pair, console: ConsoleDriver, log: Log
) -> None:
    """A log that is gone ends the connection, and neither the worker nor the other guest."""
    fd = os.open(f"/tmp/vdc-log-{os.getpid()}", os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        os.unlink(f"/tmp/vdc-log-{os.getpid()}")
        os.ftruncate(fd, PAGE + log.area.size)  # a file that cannot be sealed
        console.frontend.start_log(log.area, fd)
        os.ftruncate(fd, 0)
        with pytest.raises((ConnectionError, TimeoutError)):
            console.write(b"x" * 100, chunk=1)
        console.frontend.wait_closed()
        pair.daemon.expect_log("the dirty log cannot be written")
    finally:
        os.close(fd)


def test_logs_again_and_again(pair: Pair, console: ConsoleDriver, log: Log) -> None:
    """Each log takes the place of the one before, which is given back."""
    console.frontend.start_log(log.area, log.fd)
    held = footprint(pair.worker)
    event = os.eventfd(0)
    console.frontend.set_log_fd(event)
    for _ in range(300):
        console.frontend.set_log_base(log.area, log.fd)
        console.frontend.set_log_fd(event)
    os.close(event)
    wait_footprint(pair.worker, (held[0] + 1, held[1]))
