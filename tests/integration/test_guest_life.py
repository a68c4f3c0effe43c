"""Frontends and guests come and go; the console stays."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from scene import (
    Pair,
    assert_same,
    attach,
    boot,
    converse,
    exactly,
    footprint,
    noise,
    untaken,
    wait_footprint,
    wait_port,
)
from vhost_device_console.testing import (
    DRIVER_FEATURES,
    ConsoleDriver,
    Feature,
    Frontend,
    GuestMemory,
    SplitDriver,
    connect_like_qemu,
    connect_like_uml,
    stop_like_qemu,
    stop_like_uml,
)

from conftest import StartDaemon
from launch import WITHIN, Daemon, receive_until, until

CONNECTIONS = pytest.mark.parametrize("connect", [connect_like_qemu, connect_like_uml])


@contextmanager
def guest(daemon: Daemon, connect: Any = connect_like_qemu) -> Iterator[ConsoleDriver]:
    """Give an open console whose frontend a test may close or reconnect."""
    with boot(daemon, connect=connect) as console:
        yield console


# Frontends


def test_fifty_frontends(pair: Pair) -> None:
    """After fifty frontends the worker holds what it held; offsets go on, the client stays."""
    with attach(pair.daemon) as peer:
        held = footprint(pair.worker)
        start = wait_port(pair.daemon, readers=1)["output"]
        for number in range(50):
            connect, stop = [
                (connect_like_qemu, stop_like_qemu),
                (connect_like_uml, stop_like_uml),
                (connect_like_uml, Frontend.close),
            ][number % 3]
            with (
                GuestMemory(8 << 20) as memory,
                connect(pair.daemon.sockets[0], memory, timeout=WITHIN) as frontend,
            ):
                console = ConsoleDriver(frontend, buffers=4)
                console.wait_open()
                console.write(b"%06d\n" % number)
                stop(frontend)
        assert exactly(peer, 350) == b"".join(b"%06d\n" % number for number in range(50))
        wait_port(pair.daemon, output=start + 350, readers=1)
        wait_footprint(pair.worker, held)


def test_killed_frontend(pair: Pair) -> None:
    """When a frontend is killed the client stays and the next frontend is served."""
    code = """
import sys, time
from vhost_device_console.testing import *
with GuestMemory() as memory, connect_like_qemu(sys.argv[1], memory) as frontend:
    console = ConsoleDriver(frontend)
    console.wait_open()
    console.write(b"before the end\\n")
    console.read(1, timeout=600)
"""
    with attach(pair.daemon) as peer:
        held = footprint(pair.worker)
        child = subprocess.Popen([sys.executable, "-c", code, pair.daemon.sockets[0]])
        try:
            receive_until(peer, b"before the end\n")
            pair.daemon.until(lambda guests: guests[0]["frontend"] == child.pid, "frontend's pid")
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
        wait_footprint(pair.worker, held)
        pair.daemon.until(lambda guests: guests[0]["frontend"] is None, "frontend gone")
        with guest(pair.daemon) as console:
            converse(console, peer)


def test_output_in_the_ring_when_the_frontend_dies(pair: Pair) -> None:
    """What a guest has put in its ring is read, although its frontend hung up unkicked."""
    with attach(pair.daemon) as peer:
        with guest(pair.daemon) as console:
            console.frontend.barrier()
            for number in range(20):
                console.port.tx.driver.add([b"%d" % (number % 10)])
            console.port.tx.driver.publish()
        assert exactly(peer, 20) == b"01234567890123456789"


@CONNECTIONS
def test_reconnected_frontend_goes_on(pair: Pair, connect: Any) -> None:
    """A frontend that comes back with the same memory and rings goes on where it was."""
    with attach(pair.daemon) as peer, guest(pair.daemon, connect) as console:
        for number in range(5):
            console.write(b"output %d\n" % number)
            assert exactly(peer, 9) == b"output %d\n" % number
            peer.sendall(b"input %d\n" % number)
            assert console.read(8) == b"input %d\n" % number
            console.frontend.reconnect()
        converse(console, peer)


def test_output_across_reconnections_is_whole(pair: Pair) -> None:
    """Nothing is lost and nothing repeated, whenever the frontend comes back."""
    data = noise(200_000)
    with attach(pair.daemon) as peer, guest(pair.daemon) as console:
        for start in range(0, len(data), 20_000):
            for at in range(start, start + 20_000, 1000):
                console.wait_until(lambda: console.port.in_flight < 16, "room")
                console.port.submit(data[at : at + 1000])
            console.frontend.reconnect()  # with buffers in flight
        console.port.flush()
        assert_same(exactly(peer, len(data)), data)


def test_input_across_reconnections_is_whole(pair: Pair) -> None:
    """Input waits while nobody is connected, and arrives once."""
    data = noise(50_000)
    with attach(pair.daemon) as peer, guest(pair.daemon) as console:
        got = b""
        for start in range(0, len(data), 10_000):
            peer.sendall(data[start : start + 10_000])
            console.frontend.reconnect()
            got += console.read(10_000)
        assert_same(got, data)


# Guests


@CONNECTIONS
def test_reboot(pair: Pair, connect: Any) -> None:
    """A guest that boots again on new rings says DEVICE_READY again and is answered."""
    with attach(pair.daemon) as peer, GuestMemory() as memory:
        drivers = [SplitDriver(memory, 64) for _ in range(4)]
        for number in range(3):
            for driver in drivers:
                driver.reset()
            with connect(pair.daemon.sockets[0], memory, drivers, timeout=WITHIN) as frontend:
                console = ConsoleDriver(frontend, buffers=8)
                console.wait_open()
                assert console.port.host_open
                console.write(b"boot %d\n" % number)
                assert receive_until(peer, b"boot %d\n" % number) == b"boot %d\n" % number
                converse(console, peer)


def test_the_log_says_where_a_guest_has_begun_anew(daemon: StartDaemon) -> None:
    served = daemon("unix", 1)
    with boot(served) as console:
        console.write(b"before")
        served.expect_log("port 0: a driver begins at byte 0$")
    with boot(served):
        served.expect_log("port 0: a driver begins at byte 6$")


def test_driver_reloaded(pair: Pair) -> None:
    """A driver that says DEVICE_READY again is told its ports again; input is held meanwhile."""
    with attach(pair.daemon) as peer, guest(pair.daemon) as console:
        for _ in range(3):
            console.port.is_console = False
            console.send_control(0, 0, 1)
            console.wait_open()
            converse(console, peer)


def test_hibernated_guest(pair: Pair) -> None:
    """PORT_READY and PORT_OPEN with no DEVICE_READY, on new rings, open the port."""
    with attach(pair.daemon) as peer, guest(pair.daemon) as console:
        console.control.clear()
        console.send_control(0, 3, 1)
        console.wait_control(6, value=1)
        converse(console, peer)


# Stop and go on


def test_stop_and_start(pair: Pair) -> None:
    """Rings stopped by GET_VRING_BASE and started again go on without loss or repetition."""
    with attach(pair.daemon) as peer, guest(pair.daemon) as console:
        frontend = console.frontend
        for number in range(5):
            bases = {index: frontend.stop_queue(index) for index in range(4)}
            assert bases == {i: q.driver.used_idx for i, q in frontend.queues.items()}
            peer.sendall(b"in %d\n" % number)
            console.port.tx.driver.add([b"out %d\n" % number])
            console.port.tx.driver.publish()
            for index in range(4):
                frontend.start_queue(index, frontend.queues[index].driver, base=bases[index])
            assert exactly(peer, 6) == b"out %d\n" % number
            assert console.read(5) == b"in %d\n" % number


def test_stopped_ring_is_left_alone(pair: Pair) -> None:
    """After GET_VRING_BASE nothing in that ring is touched."""
    with attach(pair.daemon) as peer, guest(pair.daemon) as console:
        frontend, tx = console.frontend, console.port.tx
        rx_used = console.port.rx.driver.used_idx
        tx_used = frontend.get_vring_base(1)
        assert frontend.get_vring_base(0) == rx_used
        tx.driver.add([b"not now"])
        tx.notify()
        tx.kick()
        peer.sendall(b"nor this")
        frontend.barrier()
        frontend.set_config(0, bytes(12))
        assert (console.port.rx.driver.used_idx, tx.driver.used_idx) == (rx_used, tx_used)
        frontend.start_queue(0, console.port.rx.driver)
        frontend.start_queue(1, tx.driver)
        assert exactly(peer, 7) == b"not now"
        assert console.read(8) == b"nor this"


def test_stop_and_cont_like_qemu(pair: Pair) -> None:
    """Output in the ring when QEMU stops is neither lost nor repeated after cont."""
    with attach(pair.daemon) as peer, GuestMemory() as memory:
        drivers = [SplitDriver(memory, 64) for _ in range(4)]
        path = pair.daemon.sockets[0]
        with connect_like_qemu(path, memory, drivers, timeout=WITHIN) as frontend:
            console = ConsoleDriver(frontend, buffers=8)
            console.wait_open()
            for number in range(40):
                console.port.submit(b"%02d" % number)
            bases = stop_like_qemu(frontend)
            for number in range(40, 50):
                drivers[1].add([b"%02d" % number])
            drivers[1].publish()
            assert bases[1] == drivers[1].used_idx
            frontend.reconnect()
            console.port.flush()
            wanted = b"".join(b"%02d" % number for number in range(50))
            assert exactly(peer, 100) == wanted
            converse(console, peer)


def test_disabled_ring_shows_nothing(pair: Pair) -> None:
    """Output written to a disabled ring is discarded and counted, input is held."""
    with attach(pair.daemon) as peer, guest(pair.daemon) as console:
        discarded = wait_port(pair.daemon, readers=1)["discarded"]
        console.frontend.disable(1)
        console.frontend.disable(0)
        console.frontend.get_features()  # a kick is faster than a message
        console.write(b"unseen")
        peer.sendall(b"held")
        wait_port(pair.daemon, discarded=discarded + 6)
        console.pump()
        assert not console.port.received
        console.frontend.enable(1)
        console.frontend.enable(0)
        assert console.read(4) == b"held"
        console.write(b"seen")
        assert exactly(peer, 4) == b"seen"


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_the_memory_of_a_disabled_ring_is_left_alone(pair: Pair, packed: bool) -> None:
    """UML gives it to somebody else, with no word but that the ring is disabled."""
    features = DRIVER_FEATURES | (Feature.RING_PACKED if packed else Feature(0))
    features &= ~Feature.EVENT_IDX
    with boot(pair.daemon, connect=connect_like_uml, features=features) as console:
        frontend = console.frontend
        drivers = [frontend.queues[index].driver for index in range(4)]
        memory = drivers[0].memory
        for index in (3, 2, 1, 0):
            frontend.disable(index)
        areas = [(each.desc_addr, 256 * 16) for each in drivers]
        if not packed:
            areas += [(each.avail_addr, 4 + 2 * 256) for each in drivers]
            areas += [(each.used_addr, 4 + 8 * 256) for each in drivers]
        else:
            areas += [(each.used_addr, 4) for each in drivers]
        for addr, size in areas:
            memory.write(addr, b"\xa5" * size)
        frontend.set_memory(memory)
        with attach(pair.daemon) as peer:
            peer.sendall(b"typed")
            wait_port(pair.daemon, readers=1)
        wait_port(pair.daemon, readers=0)
        assert all(memory.read(addr, size) == b"\xa5" * size for addr, size in areas)
        console.frontend.close()


@CONNECTIONS
def test_memory_table_again_under_running_rings(pair: Pair, connect: Any) -> None:
    """A new memory table with the same memory changes nothing for the rings that run."""
    with attach(pair.daemon) as peer, guest(pair.daemon, connect) as console:
        held = footprint(pair.worker)
        memory = console.port.tx.driver.memory
        data = noise(100_000)
        got = hashlib.sha256()
        for start in range(0, len(data), 10_000):
            console.frontend.set_memory(memory)
            console.write(data[start : start + 10_000])
            got.update(exactly(peer, 10_000))
        assert got.digest() == hashlib.sha256(data).digest()
        converse(console, peer)
        wait_footprint(pair.worker, held)


def test_memory_table_again_leaves_a_disabled_ring(pair: Pair) -> None:
    """A ring that is disabled stays so under a new memory table."""
    with attach(pair.daemon) as peer, guest(pair.daemon) as console:
        console.frontend.disable(0)
        console.frontend.set_memory(console.port.tx.driver.memory)
        peer.sendall(b"held")
        console.write(b"a sign of life")
        assert exactly(peer, 14) == b"a sign of life"
        until(lambda: not untaken(peer), "never taken")
        console.write(b".")
        exactly(peer, 1)
        console.pump()
        assert not console.port.received
        console.frontend.enable(0)
        assert console.read(4) == b"held"


# The rest of the daemon


def test_another_guest_of_the_daemon(pair: Pair) -> None:
    """While a guest comes and goes another one's traffic is whole."""
    data = noise(1 << 18)
    for start in range(0, len(data), 1 << 15):
        with guest(pair.daemon) as console:
            pair.bystander.write(data[start : start + (1 << 14)])
            console.write(b"x")
        pair.bystander.write(data[start + (1 << 14) : start + (1 << 15)])
    assert_same(exactly(pair.peer, len(data)), data)


def test_inherited_connection_ends_the_daemon(daemon: StartDaemon) -> None:
    """With a connected --fd the daemon serves that frontend and ends, status 0, when it goes."""
    ours, theirs = socket.socketpair()
    with theirs:
        running = daemon(
            "pty", 1, "--fd", str(theirs.fileno()), socket_path=None, pass_fds=[theirs.fileno()]
        )
    name = running.expect_out(r"(/dev/pts/\d+)").group(1)
    with GuestMemory() as memory, connect_like_qemu(ours, memory, timeout=WITHIN) as frontend:
        console = ConsoleDriver(frontend)
        console.wait_open()
        console.write(b"hello")
        slave = os.open(name, os.O_RDWR | os.O_NOCTTY)
        try:
            assert os.read(slave, 5) == b"hello"
        finally:
            os.close(slave)
    assert running.wait() == 0
