"""Notifications of one queue."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest
from vhost_device_console.testing import GuestMemory, Queue, SplitDriver


@pytest.fixture
def queue() -> Iterator[Queue]:
    with GuestMemory(1 << 16) as memory:
        queue = Queue(0, SplitDriver(memory, 8))
        yield queue
        queue.close()


def test_kick_writes_one(queue: Queue) -> None:
    """A kick adds one to the event descriptor."""
    fd = queue.new_kick_fd()
    queue.kick()
    assert os.read(fd, 8) == (1).to_bytes(8, "little")


@pytest.mark.parametrize("blocking", [False, True])
def test_kick_descriptor_mode(queue: Queue, blocking: bool) -> None:
    """The kick descriptor blocks only if asked to."""
    assert os.get_blocking(queue.new_kick_fd(blocking=blocking)) is blocking


def test_kick_before_start(queue: Queue) -> None:
    """A queue that is not started cannot be kicked."""
    with pytest.raises(ValueError, match="not started"):
        queue.kick()


def test_notify_only_when_wanted(queue: Queue) -> None:
    """A device that asks for no kick gets none."""
    queue.new_kick_fd()
    queue.driver.memory.view(queue.driver.used_addr, 2, "H")[0] = 1
    queue.driver.add([b"x"])
    assert not queue.notify()
    assert queue.kicks == 0


def test_calls_by_eventfd(queue: Queue) -> None:
    """Calls through an event descriptor are counted."""
    fd = queue.new_call_fd("eventfd")
    os.eventfd_write(fd, 3)
    os.close(fd)
    assert queue.take_calls() == 3
    assert queue.take_calls() == 0


def test_calls_by_socketpair(queue: Queue) -> None:
    """A call through a socket pair is 8 bytes."""
    with socket.socket(fileno=queue.new_call_fd("socketpair")) as theirs:
        theirs.send(bytes(8))
        theirs.send(bytes(8))
        assert queue.take_calls() == 2


def test_call_socket_closed_by_the_device(queue: Queue) -> None:
    """A call channel that the device closed is given up."""
    os.close(queue.new_call_fd("socketpair"))
    assert queue.take_calls() == 0
    assert queue.call_fd is None


def test_wait_finds_what_came_without_a_call(queue: Queue) -> None:
    """A chain used before the wait is found without a call."""
    driver = queue.driver
    os.close(queue.new_call_fd("eventfd"))
    chain = driver.add([b"x"])
    driver.memory.view(driver.used_addr, 4, "H")[1] = 1
    assert [used.chain for used in queue.wait(1)] == [chain]


def test_wait_in_vain(queue: Queue) -> None:
    """A device that uses nothing is a TimeoutError naming the queue."""
    os.close(queue.new_call_fd("eventfd"))
    with pytest.raises(TimeoutError, match="a used chain on queue 0"):
        queue.wait(0.01)


def test_call_without_a_chain(queue: Queue) -> None:
    """A spurious call ends no wait."""
    fd = queue.new_call_fd("eventfd")
    os.eventfd_write(fd, 1)
    os.close(fd)
    with pytest.raises(TimeoutError):
        queue.wait(0.01)
