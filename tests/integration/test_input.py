"""The guest's input: held until the guest takes it, bounded, never lost."""

from __future__ import annotations

import os
import select
import socket
from threading import Thread
from typing import Any

import pytest
from scene import (
    assert_same,
    attach,
    boot,
    call,
    exactly,
    footprint,
    noise,
    port_of,
    reset,
    untaken,
    wait_footprint,
    wait_port,
)
from vhost_device_console.testing import ConsoleDriver, GuestMemory, connect_like_qemu

from conftest import StartDaemon
from launch import WITHIN, Daemon, until

MIB = 1 << 20
KIB64 = 1 << 16

BACKENDS = pytest.mark.parametrize("backend", ["unix", "network"])


def small_guest(daemon: Daemon, memory: GuestMemory, **options: Any) -> ConsoleDriver:
    """Return a console that has four receive buffers, and is not open yet."""
    frontend = connect_like_qemu(daemon.sockets[0], memory, timeout=WITHIN)
    return ConsoleDriver(frontend, buffers=4, **options)


# The guest is not ready


def test_typed_before_the_guest_is_there(daemon: StartDaemon) -> None:
    """What is typed before any guest has come reaches the first one."""
    running = daemon("unix")
    with attach(running) as peer:
        peer.sendall(b"early")
        until(lambda: not untaken(peer), "never taken")
        with boot(running) as console:
            assert console.read(5) == b"early"


def test_typed_before_the_port_is_open(daemon: StartDaemon) -> None:
    """Input is held until the guest has the port open: it would discard it."""
    running = daemon("unix")
    with GuestMemory() as memory, attach(running) as peer:
        console = small_guest(running, memory, auto_open=False)
        with console.frontend:
            console.wait_open()
            peer.sendall(b"early")
            until(lambda: not untaken(peer), "never taken")
            console.write(b"a sign of life")
            assert exactly(peer, 14) == b"a sign of life"
            console.pump()
            assert not console.port.received
            console.open()
            assert console.read(5) == b"early"


def test_typed_while_the_port_is_closed(daemon: StartDaemon) -> None:
    """Input is held again when the guest has closed the port."""
    running = daemon("unix")
    with boot(running) as console, attach(running) as peer:
        console.close_port()
        peer.sendall(b"held")
        until(lambda: not untaken(peer), "never taken")
        console.write(b".")
        exactly(peer, 1)
        console.pump()
        assert not console.port.received
        console.open()
        assert console.read(4) == b"held"


@BACKENDS
def test_guest_that_does_not_read(daemon: StartDaemon, backend: str) -> None:
    """A guest without buffers makes its client wait, soon; once it reads, nothing is lost."""
    running = daemon(backend)
    data = noise(4 * MIB)
    with GuestMemory() as memory, small_guest(running, memory).frontend as frontend:
        pass
    with GuestMemory() as memory:
        console = small_guest(running, memory)
        with console.frontend as frontend, attach(running) as peer:
            console.wait_open()
            console.port.throttle()
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, KIB64)
            peer.setblocking(False)
            sent = 0
            while True:  # until neither we nor the worker can do any more
                try:
                    sent += peer.send(data[sent : sent + KIB64])
                except BlockingIOError:
                    frontend.barrier()
                    if not select.select([], [peer], [], 0.3)[1]:
                        break
            console.pump()
            given = len(console.port.received)
            assert given == 4 * 4096
            # What the journal holds, and what sockets do.
            assert KIB64 <= sent - given < 2 * MIB
            wait_port(running, input=given)
            console.port.unthrottle()
            rest = Thread(target=lambda: (peer.settimeout(WITHIN), peer.sendall(data[sent:])))
            rest.start()
            got = console.read(len(data))
            rest.join(WITHIN)
            assert_same(got, data)
            wait_port(running, input=len(data))


def test_held_input_survives_the_guest(daemon: StartDaemon) -> None:
    """What a guest did not take is there for it when it has booted again."""
    running = daemon("unix")
    with attach(running) as peer:
        with GuestMemory() as memory:
            console = small_guest(running, memory)
            with console.frontend:
                console.wait_open()
                console.port.throttle()
                peer.sendall(noise(40_000))
                console.wait_until(lambda: len(console.port.received) == 4 * 4096, "input")
                got = bytes(console.port.received)
        with boot(running) as again:
            assert_same(got + again.read(40_000 - len(got)), noise(40_000))


# Exactly


def test_used_length_is_what_was_written(daemon: StartDaemon) -> None:
    """The guest is told of every byte, and of none that is not there."""
    running = daemon("unix")
    with boot(running) as console, attach(running) as peer:
        for size in (1, 2, 4095, 4096, 4097, 10_000):
            console.port.input_lengths.clear()
            peer.sendall(noise(size))
            assert_same(console.read(size), noise(size))
            assert sum(console.port.input_lengths) == size
            assert 0 not in console.port.input_lengths
            assert max(console.port.input_lengths) <= 4096


def test_paste(daemon: StartDaemon) -> None:
    """A paste of 64 KiB comes in few buffers, not one a byte."""
    running = daemon("unix")
    with GuestMemory() as memory:
        console = small_guest(running, memory)
        with console.frontend, attach(running) as peer:
            console.wait_open()
            console.port.throttle()
            peer.sendall(noise(KIB64))
            console.wait_until(lambda: len(console.port.received) == 4 * 4096, "full buffers")
            console.port.unthrottle()
            assert_same(console.read(KIB64), noise(KIB64))


def test_receive_chain_of_several_pieces(daemon: StartDaemon) -> None:
    """A buffer in pieces is filled piece by piece."""
    running = daemon("unix")
    with GuestMemory() as memory:
        frontend = connect_like_qemu(running.sockets[0], memory, timeout=WITHIN)
        with frontend, attach(running) as peer:
            console = ConsoleDriver(frontend, buffers=0)
            console.wait_open()
            rx = console.port.rx
            rx.driver.add(writable=[3, 0, 5, 100])
            rx.notify()
            peer.sendall(b"0123456789")
            (used,) = rx.wait(WITHIN)
            assert (used.length, used.data) == (10, b"0123456789")


def test_every_byte_value(daemon: StartDaemon) -> None:
    """No byte means anything to a socket's backend."""
    running = daemon()
    with boot(running) as console, attach(running) as peer:
        peer.sendall(bytes(range(256)) * 4)
        assert_same(console.read(1024), bytes(range(256)) * 4)


def test_several_clients_type(daemon: StartDaemon) -> None:
    """What any of several clients types reaches the guest."""
    running = daemon()
    with boot(running) as console, attach(running) as one, attach(running, readers=2) as two:
        one.sendall(b"1" * 5000)
        two.sendall(b"2" * 5000)
        got = console.read(10_000)
        assert (got.count(b"1"), got.count(b"2")) == (5000, 5000)


# Clients leave


@BACKENDS
def test_typed_and_closed_at_once(daemon: StartDaemon, backend: str) -> None:
    """What a client sends and runs away from still arrives."""
    running = daemon(backend)
    with boot(running) as console:
        for number in range(20):
            peer = call(running)
            peer.sendall(b"<%d>" % number)
            peer.close()
            assert console.read(len(b"<%d>" % number)) == b"<%d>" % number
        wait_port(running, readers=0)


@BACKENDS
def test_half_closed_client_gets_its_answer(daemon: StartDaemon, backend: str) -> None:
    """Who will not type any more is answered, and then let go."""
    running = daemon(backend)
    with boot(running) as console, attach(running) as peer:
        peer.sendall(b"date\n")
        peer.shutdown(socket.SHUT_WR)
        assert console.read(5) == b"date\n"
        console.write(b"Sunday\n")
        assert exactly(peer, 7) == b"Sunday\n"
        assert peer.recv(1) == b""
        wait_port(running, readers=0)


@pytest.mark.parametrize("how", ["close", "reset", "half close", "reset with input pending"])
@BACKENDS
def test_nothing_stays_of_a_client(daemon: StartDaemon, backend: str, how: str) -> None:
    """However a client goes, no descriptor and no reader stays."""
    running = daemon(backend)
    (worker,) = running.workers()
    with boot(running) as console:
        if how == "reset with input pending":
            console.close_port()
        held = footprint(worker)
        for _ in range(2):
            peer = attach(running)
            peer.sendall(b"typed")
            if how == "half close":
                peer.shutdown(socket.SHUT_WR)
                assert peer.recv(1) == b""
            if how.startswith("reset") and backend == "network":
                reset(peer)
            peer.close()
            wait_port(running, readers=0)
        wait_footprint(worker, held)


def test_vanished_client_with_input_pending(daemon: StartDaemon) -> None:
    """A client that leaves while its input has no room gives all of it all the same."""
    running = daemon("unix")
    (worker,) = running.workers()
    held = footprint(worker)
    data = noise(150_000)
    peer = attach(running)
    peer.sendall(data)
    peer.close()
    with boot(running) as console:
        assert_same(console.read(len(data)), data)
    wait_port(running, readers=0)
    wait_footprint(worker, held)


def test_half_closed_client_while_paused(daemon: StartDaemon) -> None:
    """A client that half-closes while its input has no room is heard to the end."""
    running = daemon("unix")
    data = noise(150_000)
    with attach(running) as peer:
        peer.sendall(data)
        peer.shutdown(socket.SHUT_WR)
        with boot(running) as console:
            assert_same(console.read(len(data)), data)
            assert peer.recv(1) == b""
    assert port_of(running)["input"] == len(data) or wait_port(running, input=len(data))


def test_worker_sleeps_while_input_has_no_room(daemon: StartDaemon) -> None:
    """Clients that wait, also those that hung up, cost no time."""
    running = daemon("unix")
    (worker,) = running.workers()
    with attach(running) as peer, attach(running, readers=2) as gone:
        peer.setblocking(False)
        while select.select([], [peer], [], 0.2)[1]:
            peer.send(bytes(KIB64))
        gone.shutdown(socket.SHUT_RDWR)
        wait_port(running, readers=1)

        def ticks() -> int:
            with open(f"/proc/{worker}/stat") as stat:
                fields = stat.read().rpartition(") ")[2].split()
            return int(fields[11]) + int(fields[12])

        before = ticks()
        silent, other = socket.socketpair()
        with silent, other:
            assert not select.select([silent], [], [], 1)[0]
        assert ticks() - before <= os.sysconf("SC_CLK_TCK") // 10
