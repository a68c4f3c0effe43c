"""Clients of workers that are killed: they come and go, lag, half-close, or are no sockets."""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
from scene import MARKER, assert_same, attach, boot, call, converse, exactly, numbered, wait_port
from vhost_device_console.testing import ConsoleDriver

from launch import WITHIN, Daemon, receive_until, until, wait_readable

HASTY = "from vhost_device_console import cli, supervision; supervision.delay = lambda _: 0.0; "
PROGRAM = [sys.executable, "-c", f"{HASTY}cli.main()"]

StartDaemon = Callable[..., Daemon]


@pytest.fixture(params=["network", "unix"])
def served(request: pytest.FixtureRequest, daemon: StartDaemon) -> Daemon:
    """Give a daemon that restarts its workers at once."""
    return daemon(request.param, 1, program=PROGRAM)


@pytest.fixture
def tcp(daemon: StartDaemon) -> Daemon:
    return daemon("network", 1, program=PROGRAM)


@contextmanager
def killing(daemon: Daemon, pause: float = 0.0) -> Iterator[None]:
    """Kill one worker after another meanwhile, each once it has served for `pause` seconds."""
    enough = threading.Event()
    failed: list[BaseException] = []

    def work() -> None:
        try:
            while not enough.wait(pause):
                daemon.kill_worker()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        enough.set()
        thread.join()
    assert not failed


def to_the_end(peer: socket.socket, end: bytes) -> bytes:
    return receive_until(peer, end, within=3 * WITHIN)


def in_step(data: bytes) -> None:
    """Check that the lines of `numbered` follow one another, from wherever they begin."""
    lines = data.splitlines()[1:-1]
    first = int(lines[0], 16)
    assert_same(b"\n".join(lines), numbered(8 * len(lines), first)[:-1])


def test_clients_that_come_and_go_meanwhile_get_every_byte_once(tcp: Daemon) -> None:
    """The first sees all; whoever joins sees all from there on; who leaves costs nobody a byte."""
    end = b"the end\n"
    written = 0
    others: list[socket.socket] = []
    got: list[bytes] = []
    with attach(tcp) as first, boot(tcp) as console, killing(tcp), ExitStack() as ends:

        def write() -> None:
            nonlocal written
            console.write(numbered(8000, written))
            written += 8000

        def all_joined() -> bool:
            write()
            return len(select.select(others, [], [], 0)[0]) == len(others)

        reader = threading.Thread(target=lambda: got.append(to_the_end(first, end)))
        reader.start()
        for number in range(50):
            if number % 5 == 0:
                others.append(ends.enter_context(call(tcp)))
            if number % 10 == 5:
                others.pop(0).close()
            write()
        until(all_joined, "who came last sees nothing")
        write()
        console.write(end)
        for other in others:
            in_step(to_the_end(other, end)[: -len(end)] + b"\n")
        reader.join()
    assert_same(got[0], numbered(written) + end)


def test_one_who_never_reads_finds_gaps_that_add_up(tcp: Daemon) -> None:
    """Nor does any successor's guest wait for it again."""
    total = 6 << 20
    with attach(tcp, receive_buffer=4096) as peer, boot(tcp) as console:
        with killing(tcp, pause=0.3):
            for at in range(0, total, 1 << 16):
                console.write(numbered(1 << 16, at))
        console.write(b"the end\n")
        got = to_the_end(peer, b"the end\n")[: -len(b"the end\n")]
    at = done = gaps = 0
    whole = numbered(total)
    for gap in [*MARKER.finditer(got), None]:
        stop = gap.start() if gap else len(got)
        assert_same(got[done:stop], whole[at : at + stop - done])
        at += stop - done
        if gap:
            at += int(gap[1])
            done = gap.end()
            gaps += 1
    assert (at, gaps > 0) == (total, True)


def test_keys_arrive_once_and_in_order(tcp: Daemon) -> None:
    keys = numbered(8000)
    with attach(tcp) as peer, boot(tcp) as console, killing(tcp):
        for at in range(0, len(keys), 5):
            peer.sendall(keys[at : at + 5])
            if at % 50 == 0:
                os.sched_yield()  # let the threads that kill have their turn
        assert_same(console.read(len(keys)), keys)


def test_several_typists_lose_nothing(tcp: Daemon) -> None:
    with ExitStack() as ends:
        peers = [ends.enter_context(attach(tcp, readers=count)) for count in (1, 2, 3)]
        console = ends.enter_context(boot(tcp))
        with killing(tcp):
            for at in range(2000):
                for who, peer in enumerate(peers):
                    peer.sendall(bytes([who << 6 | at % 61]))
            got = console.read(3 * 2000)
    for who in range(3):
        mine = bytes(byte & 63 for byte in got if byte >> 6 == who)
        assert_same(mine, bytes(at % 61 for at in range(2000)))


def test_a_half_closed_client_gets_its_answer_from_a_successor_and_then_the_end(
    served: Daemon,
) -> None:
    with attach(served) as peer, boot(served) as console:
        peer.sendall(b"question")
        peer.shutdown(socket.SHUT_WR)
        assert console.read(8) == b"question"
        served.kill_worker()
        console.write(b"answer")
        assert exactly(peer, 6) == b"answer"
        assert peer.recv(1) == b""
        wait_port(served, readers=0)


def test_who_left_while_nobody_was_there_has_left(served: Daemon) -> None:
    with attach(served) as peer, boot(served) as console, call(served) as other:
        wait_port(served, readers=2)
        worker = served.workers()[0]
        os.kill(worker, signal.SIGSTOP)
        other.sendall(b"last words")
        other.close()
        os.kill(worker, signal.SIGKILL)
        assert console.read(10) == b"last words"
        wait_port(served, readers=1)
        converse(console, peer)


def test_who_came_while_nobody_was_there_is_served(served: Daemon) -> None:
    with attach(served) as peer, boot(served) as console:
        converse(console, peer)
        worker = served.workers()[0]
        os.kill(worker, signal.SIGSTOP)
        with call(served) as other:
            other.sendall(b"hello")
            os.kill(worker, signal.SIGKILL)
            assert console.read(5) == b"hello"
            console.write(b"to both")
            assert [exactly(each, 7) for each in (peer, other)] == [b"to both"] * 2


# What is no socket


def read_fd(fd: int, count: int) -> bytes:
    """Return the next `count` bytes of a terminal."""
    data = b""
    while len(data) < count:
        wait_readable(fd, time.monotonic() + WITHIN, f"{data!r} came")
        data += os.read(fd, count - len(data))
    return data


def both_ways(console: ConsoleDriver, fd: int) -> None:
    console.write(b"to people")
    assert read_fd(fd, 9) == b"to people"
    os.write(fd, b"to the guest")
    assert console.read(12) == b"to the guest"


def nothing_comes(fd: int) -> bool:
    return not select.select([fd], [], [], 0)[0]


def test_who_has_a_pty_open_goes_on(daemon: StartDaemon) -> None:
    running = daemon("pty", 1, program=PROGRAM)
    slave = os.open(running.expect_out(r"(/dev/pts/\d+)")[1], os.O_RDWR | os.O_NOCTTY)
    try:
        tty.setraw(slave)
        with boot(running) as console:
            for _ in range(3):
                both_ways(console, slave)
                running.kill_worker()
            both_ways(console, slave)
            assert nothing_comes(slave)
            assert wait_port(running, readers=1)["missed"] == 0
    finally:
        os.close(slave)


def test_a_terminal_goes_on_and_is_given_back_as_it_was_before_all_workers(
    daemon: StartDaemon,
) -> None:
    user, inner = os.openpty()
    try:
        modes = termios.tcgetattr(inner)
        running = daemon("nested", stdin=inner, stdout=inner, program=PROGRAM)
        with boot(running) as console:
            for _ in range(2):
                both_ways(console, user)
                running.kill_worker()
            both_ways(console, user)
            assert nothing_comes(user)
            assert termios.tcgetattr(inner) != modes
        running.close()
        assert termios.tcgetattr(inner) == modes
    finally:
        os.close(user)
        os.close(inner)
