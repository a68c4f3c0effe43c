"""Memory that comes and goes region by region, as with QEMU's memory hotplug."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from scene import Pair, attach, boot, converse, exactly, footprint, wait_footprint
from vhost_device_console.testing import (
    Buffer,
    ConsoleDriver,
    Frontend,
    GuestMemory,
    NackError,
    SplitDriver,
    connect_like_qemu,
)
from vhost_device_console.worker.vhost_user.message import Region

from launch import WITHIN

PAGE = 4096
LOW = Region(0, 1 << 20, 0x7000_0000, 0)
HIGH = Region(1 << 32, 1 << 20, 0x9000_0000, PAGE)


@pytest.fixture
def frontend(pair: Pair) -> Iterator[Frontend]:
    """Give a frontend of the first guest that has agreed on features, no more."""
    with Frontend(pair.daemon.sockets[0], timeout=WITHIN) as frontend:
        frontend.negotiate()
        yield frontend


@contextmanager
def memfd(size: int) -> Iterator[int]:
    fd = os.memfd_create("memory")
    try:
        os.ftruncate(fd, size)
        yield fd
    finally:
        os.close(fd)


def refused(do: Callable[[], Any]) -> None:
    with pytest.raises(NackError):
        do()


def test_a_guest_whose_regions_are_added_one_by_one(pair: Pair) -> None:
    """A guest with several regions has its console in all of them."""
    with (
        GuestMemory([LOW, HIGH]) as memory,
        connect_like_qemu(pair.daemon.sockets[0], memory, timeout=WITHIN) as frontend,
        attach(pair.daemon) as peer,
    ):
        console = ConsoleDriver(frontend, buffers=8)
        console.wait_open()
        for addr in (1024, HIGH.guest_addr + 1024):
            memory.write(addr, b"here")
            console.port.tx.driver.add_buffers([Buffer(addr, 4, False)])
            console.port.tx.notify()
            assert exactly(peer, 4) == b"here"
            console.port.flush()


def test_memory_is_added_and_removed_while_the_guest_runs(pair: Pair) -> None:
    """Memory that is plugged is used, and once it is unplugged it is not."""
    with (
        GuestMemory([LOW, HIGH]) as memory,
        Frontend(pair.daemon.sockets[0], timeout=WITHIN) as frontend,
        attach(pair.daemon) as peer,
    ):
        (low, low_fd), (high, high_fd) = memory.regions()
        frontend.negotiate()
        frontend.add_mem_reg(low, low_fd)
        for index in range(4):
            frontend.start_queue(index, SplitDriver(memory, 64))
        console = ConsoleDriver(frontend, buffers=8)
        console.wait_open()
        converse(console, peer)
        held = footprint(pair.worker)
        for _ in range(3):
            frontend.add_mem_reg(high, high_fd)
            memory.write(high.guest_addr, b"plugged")
            console.port.tx.driver.add_buffers([Buffer(high.guest_addr, 7, False)])
            console.port.tx.notify()
            assert exactly(peer, 7) == b"plugged"
            console.port.flush()
            frontend.rem_mem_reg(high)
            converse(console, peer)
        wait_footprint(pair.worker, held)
        console.port.tx.driver.add_buffers([Buffer(high.guest_addr, 7, False)])
        console.port.tx.notify()
        pair.daemon.expect_log(r"queue 1 is broken.*in no memory region")


@pytest.mark.parametrize("with_fd", [False, True])
def test_a_removed_region_is_told_by_its_addresses_and_size(
    frontend: Frontend, with_fd: bool
) -> None:
    """Where it was in its file does not matter; a descriptor that comes along is closed."""
    with memfd(HIGH.size + PAGE) as fd:
        frontend.add_mem_reg(HIGH, fd)
        for other in (
            HIGH._replace(guest_addr=PAGE),
            HIGH._replace(user_addr=PAGE),
            HIGH._replace(size=PAGE),
        ):
            refused(lambda other=other: frontend.rem_mem_reg(other))
        frontend.rem_mem_reg(HIGH._replace(mmap_offset=7), fd if with_fd else None)
        refused(lambda: frontend.rem_mem_reg(HIGH))


def test_memory_removed_under_a_ring(pair: Pair) -> None:
    """Removing a running ring's memory is refused, and that ring stopped."""
    with boot(pair.daemon) as console:
        ((region, _),) = console.port.tx.driver.memory.regions()
        refused(lambda: console.frontend.rem_mem_reg(region))
        tx = console.port.tx
        used = tx.driver.base
        tx.driver.add([b"lost"])
        tx.driver.publish()
        tx.kick()
        assert console.frontend.get_vring_base(1) == used


def test_a_table_replaces_all_slots(pair: Pair, frontend: Frontend) -> None:
    """SET_MEM_TABLE forgets what ADD_MEM_REG added."""
    held = footprint(pair.worker)
    with memfd(2 << 20) as fd, GuestMemory([LOW]) as memory:
        frontend.add_mem_reg(HIGH, fd)
        frontend.set_memory(memory)
        refused(lambda: frontend.rem_mem_reg(HIGH))
        frontend.rem_mem_reg(LOW)
    wait_footprint(pair.worker, held)


@pytest.mark.parametrize(
    "region",
    [
        LOW,
        LOW._replace(user_addr=0x8000_0000),
        LOW._replace(guest_addr=1 << 40),
        Region(PAGE, PAGE, 0x8000_0000, 0),
    ],
    ids=["the same", "guest addresses", "frontend addresses", "inside"],
)
def test_slots_that_overlap(pair: Pair, frontend: Frontend, region: Region) -> None:
    """A slot that overlaps another is refused, and nothing of it stays mapped."""
    with memfd(1 << 20) as fd:
        frontend.add_mem_reg(LOW, fd)
        held = footprint(pair.worker)
        for _ in range(100):
            refused(lambda: frontend.add_mem_reg(region, fd))
        wait_footprint(pair.worker, held)


def test_as_many_slots_as_were_told(pair: Pair, frontend: Frontend) -> None:
    """So many slots there can be as GET_MAX_MEM_SLOTS says, and not one more."""
    most = frontend.get_max_mem_slots()
    held = footprint(pair.worker)

    def slot(number: int) -> Region:
        return Region(number * PAGE, PAGE, 0x7000_0000 + number * PAGE, 0)

    with memfd(PAGE) as fd:
        for number in range(most):
            frontend.add_mem_reg(slot(number), fd)
        refused(lambda: frontend.add_mem_reg(slot(most), fd))
        for number in range(most):
            frontend.rem_mem_reg(slot(number))
    assert most == 509
    wait_footprint(pair.worker, held)
