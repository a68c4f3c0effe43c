"""The device status and the device's reset, as a frontend tells and asks of them."""

from __future__ import annotations

import os

import pytest
from scene import Pair, attach, boot, converse
from vhost_device_console.testing import (
    ConsoleDriver,
    Frontend,
    GuestMemory,
    NackError,
    SplitDriver,
    connect_like_qemu,
    pause_like_qemu,
    resume_like_qemu,
)

from launch import WITHIN

NEEDS_RESET = 64
RUNNING = 15


def test_the_status_is_what_was_set(pair: Pair) -> None:
    """QEMU's steps show, one after the other, and are gone when it stops the device."""
    with (
        GuestMemory.like_qemu() as memory,
        connect_like_qemu(pair.daemon.sockets[0], memory, timeout=WITHIN) as frontend,
    ):
        assert frontend.get_status() == RUNNING
        pause_like_qemu(frontend)
        assert frontend.get_status() == 0
        resume_like_qemu(frontend, memory)
        assert frontend.get_status() == RUNNING


def test_a_broken_queue_shows_in_the_status(pair: Pair) -> None:
    """The device needs a reset once a queue had to be stopped, until the driver is reset."""
    with boot(pair.daemon) as console:
        frontend, tx = console.frontend, console.port.tx
        assert isinstance(tx.driver, SplitDriver)
        tx.driver.offer(tx.driver.size)
        tx.notify()
        pair.daemon.expect_log("queue 1 is broken")
        assert frontend.get_status() == RUNNING | NEEDS_RESET
        frontend.set_status(RUNNING | NEEDS_RESET)  # QEMU writes back what it read
        frontend.set_status(0)
        assert frontend.get_status() == 0


def test_a_status_of_zero_stops_the_rings(pair: Pair) -> None:
    """After a status of zero no buffer is used, though nobody stopped the rings one by one."""
    with boot(pair.daemon) as console:
        frontend, tx = console.frontend, console.port.tx
        frontend.set_status(0)
        used = tx.driver.base
        tx.driver.add([b"too late"])
        tx.driver.publish()
        tx.kick()
        assert frontend.get_vring_base(1) == used
        assert not tx.driver.has_used()


def again(frontend: Frontend, memory: GuestMemory) -> ConsoleDriver:
    """Start the device anew, as a guest that has booted again."""
    frontend.set_features(frontend.offered & frontend.features)
    for index in range(4):
        frontend.start_queue(index, SplitDriver(memory, 64))
    return ConsoleDriver(frontend)


@pytest.mark.parametrize("stops", [False, True])
def test_a_reset_device_is_as_new(pair: Pair, stops: bool) -> None:
    """RESET_DEVICE stops the rings, and the console begins anew; memory and clients stay."""
    with boot(pair.daemon) as console, attach(pair.daemon) as peer:
        frontend, memory = console.frontend, console.port.tx.driver.memory
        converse(console, peer)
        features = frontend.features
        if stops:
            for index in range(4):
                frontend.stop_queue(index)
        frontend.reset_device()
        assert frontend.get_vring_base(1) == 0
        frontend.features = features
        later = again(frontend, memory)
        later.wait_open()
        converse(later, peer)


def test_a_reset_device_does_not_start_as_it_was(pair: Pair) -> None:
    """What was said of a ring before the reset counts no more."""
    with boot(pair.daemon) as console:
        frontend = console.frontend
        frontend.reset_device()
        fd = os.eventfd(0)
        try:
            with pytest.raises(NackError, match="SET_VRING_KICK"):
                frontend.set_vring_kick(1, fd)
        finally:
            os.close(fd)


def test_a_reset_clears_what_was_broken(pair: Pair) -> None:
    """After a reset the device needs none."""
    with boot(pair.daemon) as console:
        tx = console.port.tx
        assert isinstance(tx.driver, SplitDriver)
        tx.driver.offer(tx.driver.size)
        tx.notify()
        pair.daemon.expect_log("queue 1 is broken")
        console.frontend.reset_device()
        assert console.frontend.get_status() == 0
