"""The transfer of the device's state, whatever is in it, and what can go wrong on its way."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from scene import Pair, attach, boot, converse, footprint, wait_footprint
from vhost_device_console.testing import (
    ConsoleDriver,
    Frontend,
    GuestMemory,
    NackError,
    connect_like_qemu,
    pause_like_qemu,
    resume_like_qemu,
)

from launch import WITHIN, wait_readable

SAVE, LOAD = 0, 1
ACCEPTED = 0x100
REFUSED = 0x101


@pytest.fixture
def frontend(pair: Pair) -> Iterator[Frontend]:
    """Give a frontend of the first guest that has agreed on features, no more."""
    with Frontend(pair.daemon.sockets[0], timeout=WITHIN) as frontend:
        frontend.negotiate()
        yield frontend


@contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    """Give a pipe's ends, of which the block may close each by itself."""
    ends = os.pipe()
    before = [os.fstat(end).st_ino for end in ends]
    yield ends
    for end, ino in zip(ends, before, strict=True):
        try:
            same = os.fstat(end).st_ino == ino
        except OSError:
            continue
        if same:
            os.close(end)


def read_all(fd: int) -> bytes:
    """Return all that comes to the end."""
    data = b""
    deadline = time.monotonic() + WITHIN
    while True:
        wait_readable(fd, deadline, f"no end after {len(data)} bytes")
        more = os.read(fd, 1 << 16)
        if not more:
            return data
        data += more


def much(console: ConsoleDriver) -> bytes:
    """Let a guest write more than any pipe holds, and return it."""
    data = os.urandom(300_000)
    console.write(data)
    return data


def test_a_state_goes_out_and_in_again(pair: Pair) -> None:
    """A paused guest's state can be saved, and loaded into the same device."""
    with GuestMemory.like_qemu() as memory:
        frontend = connect_like_qemu(pair.daemon.sockets[0], memory, timeout=WITHIN)
        with frontend:
            console = ConsoleDriver(frontend)
            console.wait_open()
            data = much(console)
            pause_like_qemu(frontend)
            state = frontend.save_state()
            assert data in state
            frontend.load_state(state)
            resume_like_qemu(frontend, memory)
            with attach(pair.daemon) as peer:
                converse(console, peer)


def test_a_state_is_not_moved_while_a_queue_runs(pair: Pair) -> None:
    """A running device has no state to be saved, and takes none."""
    with boot(pair.daemon) as console, attach(pair.daemon) as peer, pipe() as (read, write):
        assert console.frontend.set_device_state_fd(SAVE, write) == REFUSED
        assert console.frontend.set_device_state_fd(LOAD, read) == REFUSED
        assert console.frontend.check_device_state() != 0
        converse(console, peer)


@pytest.mark.parametrize(("direction", "phase"), [(2, 0), (0xFFFF_FFFF, 0), (SAVE, 1)])
def test_a_transfer_there_is_not(frontend: Frontend, direction: int, phase: int) -> None:
    """An unknown direction or phase is refused in the answer."""
    with pipe() as (read, write):
        fd = read if direction else write
        assert frontend.set_device_state_fd(direction, fd, phase=phase) == REFUSED
    frontend.barrier()


def test_a_frontend_that_reads_slowly_holds_nothing_up(pair: Pair) -> None:
    """The worker answers while the state waits to be read."""
    with GuestMemory.like_qemu() as memory:
        frontend = connect_like_qemu(pair.daemon.sockets[0], memory, timeout=WITHIN)
        with frontend, pipe() as (read, write):
            console = ConsoleDriver(frontend)
            console.wait_open()
            data = much(console)
            pause_like_qemu(frontend)
            assert frontend.set_device_state_fd(SAVE, write) == ACCEPTED
            os.close(write)
            for _ in range(100):
                frontend.barrier()
            assert data in read_all(read)
            assert frontend.check_device_state() == 0


def test_a_frontend_that_asks_too_early_is_told_so(pair: Pair) -> None:
    """A state that is not over when its outcome is asked for has failed, and its pipe is closed."""
    with GuestMemory.like_qemu() as memory:
        frontend = connect_like_qemu(pair.daemon.sockets[0], memory, timeout=WITHIN)
        with frontend, pipe() as (read, write):
            console = ConsoleDriver(frontend)
            console.wait_open()
            data = much(console)
            pause_like_qemu(frontend)
            frontend.set_device_state_fd(SAVE, write)
            os.close(write)
            assert frontend.check_device_state() == 1
            assert data not in read_all(read)
            assert data in frontend.save_state()  # another time


def test_a_load_without_its_end_fails(frontend: Frontend) -> None:
    """A state whose end did not come is not loaded."""
    with pipe() as (read, write):
        assert frontend.set_device_state_fd(LOAD, read) == ACCEPTED
        os.write(write, b"half")
        assert frontend.check_device_state() == 1


@pytest.mark.parametrize("state", [b"", b"\xff", os.urandom(1000), bytes(1 << 20)])
def test_nonsense_is_not_loaded(pair: Pair, frontend: Frontend, state: bytes) -> None:
    """What is no state is refused once it is whole, and said so in the log."""
    with pytest.raises(NackError, match="CHECK_DEVICE_STATE"):
        frontend.load_state(state)
    pair.daemon.expect_log("the device's state was not transferred")


def test_a_socket_will_do(frontend: Frontend) -> None:
    """The way may be a socket, as cloud-hypervisor's is."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert frontend.set_device_state_fd(SAVE, theirs.fileno()) == ACCEPTED
        theirs.close()
        state = read_all(ours.fileno())
    assert frontend.check_device_state() == 0
    frontend.load_state(state)


@pytest.mark.parametrize("direction", [SAVE, LOAD])
def test_a_way_that_leads_nowhere(frontend: Frontend, direction: int) -> None:
    """The wrong end of a pipe, or one whose other end is closed, fails the transfer."""
    with pipe() as (read, write):
        assert frontend.set_device_state_fd(direction, write if direction else read) == ACCEPTED
        assert frontend.check_device_state() == 1
    with pipe() as (read, write):
        if direction == SAVE:
            os.close(read)
            assert frontend.set_device_state_fd(SAVE, write) == ACCEPTED
            assert frontend.check_device_state() == 1


def test_a_transfer_is_given_up_with_its_frontend(pair: Pair, frontend: Frontend) -> None:
    """A frontend that goes away in the middle leaves nothing behind."""
    with pipe() as (read, _):
        frontend.set_device_state_fd(LOAD, read)
        frontend.close()
        wait_footprint(pair.worker, pair.held)


def test_a_state_asked_for_again_and_again(pair: Pair, frontend: Frontend) -> None:
    """Each transfer takes the place of the one before."""
    held = footprint(pair.worker)
    with pipe() as (read, write):
        for _ in range(300):
            assert frontend.set_device_state_fd(LOAD, read) == ACCEPTED
            assert frontend.set_device_state_fd(SAVE, write) == ACCEPTED
        frontend.check_device_state()
        wait_footprint(pair.worker, held)


def test_a_ring_that_starts_ends_a_transfer(pair: Pair) -> None:
    """A device that goes on is not overwritten by a state that was still on its way."""
    with GuestMemory.like_qemu() as memory:
        frontend = connect_like_qemu(pair.daemon.sockets[0], memory, timeout=WITHIN)
        with frontend, pipe() as (read, write), attach(pair.daemon) as peer:
            console = ConsoleDriver(frontend)
            console.wait_open()
            pause_like_qemu(frontend)
            frontend.set_device_state_fd(LOAD, read)
            os.close(read)
            resume_like_qemu(frontend, memory)
            with pytest.raises(BrokenPipeError):
                os.write(write, b"too late")
            assert frontend.check_device_state() == 1
            converse(console, peer)
