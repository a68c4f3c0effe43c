"""Every backend through the command line, on real terminals, pipes and sockets."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import socket
import struct
import termios
import tty
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from scene import assert_same, attach, boot, exactly, noise, wait_port
from vhost_device_console.testing import ConsoleDriver

from conftest import StartDaemon
from launch import WITHIN, Daemon, command, until

#: Every byte value, in an order that repeats nowhere.
ALL = bytes(range(256)) + noise((256 << 10) - 256)

#: Beyond its size a terminal does not take what nobody reads.
TERMINAL = 2048


def read_some(fd: int, most: int) -> bytes:
    """Return what a descriptor has, at least one byte."""
    assert select.select([fd], [], [], WITHIN)[0], "nothing came"
    data = os.read(fd, most)
    assert data, "it came to its end"
    return data


def read_fd(fd: int, count: int) -> bytes:
    """Return the next `count` bytes of a descriptor."""
    data = b""
    while len(data) < count:
        data += read_some(fd, count - len(data))
    return data


def read_until(fd: int, end: bytes) -> bytes:
    """Return all that comes up to `end`, which nothing follows."""
    data = bytearray()
    while not data.endswith(end):
        data += read_some(fd, 1 << 16)
    return bytes(data)


def write_fd(fd: int, data: bytes) -> None:
    """Write all of `data`, however long it takes."""
    while data:
        data = data[os.write(fd, data) :]


def both_ways(console: ConsoleDriver, read: int, write: int, data: bytes) -> None:
    """Check that `data` goes to the reader and from the writer to the guest, both at once."""
    out = Thread(target=write_fd, args=(write, data))
    got = bytearray()
    into = Thread(target=lambda: got.extend(read_fd(read, len(data))))
    out.start()
    into.start()
    console.write(data)
    typed = console.read(len(data))
    for thread in (out, into):
        thread.join(WITHIN)
    assert_same(typed, data)
    assert_same(bytes(got), data)


class Tty:
    """A terminal: the test has `user`, a daemon the side `inner`, which has modes and a size.

    A test asks for it before the daemon, which so ends first: without its terminal it ends itself.
    """

    def __init__(self) -> None:
        self.user, self.inner = pty.openpty()
        self.modes = termios.tcgetattr(self.inner)
        self.resize(80, 24)

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.inner, termios.TIOCSWINSZ, struct.pack("=HHHH", rows, columns, 0, 0))

    @property
    def raw(self) -> bool:
        local = termios.tcgetattr(self.inner)[tty.LFLAG]
        return not local & (termios.ICANON | termios.ECHO | termios.ISIG)

    def close(self) -> None:
        os.close(self.user)
        os.close(self.inner)


@pytest.fixture
def terminal() -> Iterator[Tty]:
    made = Tty()
    yield made
    made.close()


def own_terminal() -> None:
    """Make standard input the controlling terminal, as a login shell's."""
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def nested(daemon: StartDaemon, terminal: Tty, **more: Any) -> Daemon:
    """Start a daemon in that terminal; its log goes elsewhere."""
    running = daemon(
        "nested",
        stdin=terminal.inner,
        stdout=terminal.inner,
        preexec_fn=own_terminal,
        **more,
    )
    wait_port(running, readers=1)
    return running


# Sockets and ptys


@pytest.mark.parametrize("backend", ["unix", "network"])
def test_sockets(daemon: StartDaemon, backend: str) -> None:
    """256 KiB of all byte values go both ways at once, unchanged."""
    running = daemon(backend)
    with boot(running) as console, attach(running) as peer:
        peer.setblocking(True)
        both_ways(console, peer.fileno(), peer.fileno(), ALL)


def test_unix_socket_of_each_guest(daemon: StartDaemon) -> None:
    """Each guest's data socket is beside its vhost-user socket."""
    running = daemon("unix", 3)
    with ExitStack() as stack:
        for guest in range(3):
            assert running.data[guest] == running.sockets[guest] + ".data"
            console = stack.enter_context(boot(running, guest))
            console.write(b"guest %d" % guest)
        for guest in range(3):
            with attach(running, guest) as peer:
                assert exactly(peer, 7) == b"guest %d" % guest


def test_tcp_port_of_each_guest(daemon: StartDaemon) -> None:
    """Each guest's TCP port is one after the other."""
    running = daemon("network", 3)
    with ExitStack() as stack:
        for guest in range(3):
            console = stack.enter_context(boot(running, guest))
            console.write(b"guest %d" % guest)
        for guest in range(3):
            assert running.tcp is not None
            with socket.create_connection(("127.0.0.1", running.tcp + guest), WITHIN) as peer:
                assert exactly(peer, 7) == b"guest %d" % guest


@contextmanager
def opened(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | os.O_NOCTTY)
    try:
        yield fd
    finally:
        os.close(fd)


def test_pty(daemon: StartDaemon) -> None:
    """256 KiB of all byte values go both ways through a pty that nobody has to set raw."""
    running = daemon("pty")
    name = running.expect_out(r"c\.sock0: (/dev/pts/\d+)").group(1)
    with boot(running) as console, opened(name) as slave:
        wait_port(running, readers=1)
        both_ways(console, slave, slave, ALL)


def test_pty_link(daemon: StartDaemon, folder: Path) -> None:
    """The symlink leads to the pty, and is gone with the daemon."""
    running = daemon("pty", 2, "--pty-link", str(folder / "tty"))
    with boot(running, 1) as console, opened(str(folder / "tty1")) as slave:
        console.write(b"hello")
        assert read_fd(slave, 5) == b"hello"
    running.close()
    assert not os.path.lexists(folder / "tty0")
    assert not os.path.lexists(folder / "tty1")


def test_pty_opened_again(daemon: StartDaemon) -> None:
    """Output while nobody has the pty open waits for the next one who opens it."""
    running = daemon("pty")
    name = running.expect_out(r"(/dev/pts/\d+)").group(1)
    with boot(running) as console:
        for number in range(5):
            console.write(b"for %d" % number)
            with opened(name) as slave:
                assert read_fd(slave, 5) == b"for %d" % number
                write_fd(slave, b"%d" % number)
                assert console.read(1) == b"%d" % number
            wait_port(running, readers=0)


def test_pty_typed_into_and_closed_at_once(daemon: StartDaemon) -> None:
    """What somebody types who is gone before the worker looks is the guest's all the same."""
    running = daemon("pty")
    name = running.expect_out(r"(/dev/pts/\d+)").group(1)
    with boot(running) as console:
        (worker,) = running.workers()
        os.kill(worker, signal.SIGSTOP)
        try:
            with opened(name) as slave:
                write_fd(slave, b"reboot\n")
        finally:
            os.kill(worker, signal.SIGCONT)
        assert console.read(7) == b"reboot\n"
        wait_port(running, readers=0)


def test_half_closed_tcp_client_that_pauses(daemon: StartDaemon) -> None:
    """What it is still given after it was let go is not the next client's too."""
    running = daemon("network")
    data = noise(256 << 10)
    with boot(running) as console, attach(running, receive_buffer=4096) as first:
        first.shutdown(socket.SHUT_WR)
        console.write(data, depth=8)
        wait_port(running, readers=0)
        got = bytearray()
        first.settimeout(WITHIN)
        while piece := first.recv(1 << 20):
            got += piece
        console.write(b"end")
        with attach(running) as second:
            assert_same(bytes(got) + exactly(second, len(data) - len(got) + 3), data + b"end")


# Pipes


def test_nested_with_pipes(daemon: StartDaemon) -> None:
    """With pipes for a terminal 256 KiB of all byte values go both ways; no key is special."""
    with ExitStack() as stack:
        inner_read, write = os.pipe()
        read, inner_write = os.pipe()
        for fd in (write, read):
            stack.callback(os.close, fd)
        try:
            running = daemon("nested", stdin=inner_read, stdout=inner_write)
        finally:
            os.close(inner_read)
            os.close(inner_write)
        with boot(running) as console:
            both_ways(console, read, write, ALL)
        running.close()  # with its pipes closed it would end by itself


def test_end_of_piped_input_is_not_the_end(daemon: StartDaemon) -> None:
    """With standard input at its end, all of it arrives and output goes on."""
    read, inner_write = os.pipe()
    inner_read, write = os.pipe()
    os.write(write, b"poweroff\n")
    os.close(write)
    try:
        running = daemon("nested", stdin=inner_read, stdout=inner_write)
        with boot(running) as console:
            assert console.read(9) == b"poweroff\n"
            console.write(b"bye")
            assert read_fd(read, 3) == b"bye"
        running.close()
    finally:
        for fd in (read, inner_read, inner_write):
            os.close(fd)


def test_a_file_as_input(daemon: StartDaemon, folder: Path) -> None:
    """A file that is longer than the port's input reaches the guest whole."""
    (folder / "typed").write_bytes(ALL)
    with (folder / "typed").open("rb") as file:
        running = daemon("nested", stdin=file)
        with boot(running) as console:
            assert_same(console.read(len(ALL)), ALL)


def test_nobody_reads_the_pipe_any_more(daemon: StartDaemon) -> None:
    """When standard output's reader is gone, so is the daemon, with status 0."""
    read, inner_write = os.pipe()
    running = daemon("nested", stdout=inner_write)
    os.close(inner_write)
    with boot(running) as console:
        os.close(read)
        console.port.submit(b"anyone?")
        assert running.wait() == 0


# Terminals


def test_terminal_both_ways(terminal: Tty, daemon: StartDaemon) -> None:
    """All bytes but the escape go both ways; the terminal is raw meanwhile, and not after."""
    running = nested(daemon, terminal)
    assert terminal.raw
    data = ALL.replace(b"\x1d", b"\x1c")
    with boot(running) as console:
        both_ways(console, terminal.user, terminal.user, data)
    running.close()
    assert termios.tcgetattr(terminal.inner) == terminal.modes


def test_control_keys_are_the_guests(terminal: Tty, daemon: StartDaemon) -> None:
    """Ctrl-C, Ctrl-D, Ctrl-Z and the like reach the guest as bytes."""
    running = nested(daemon, terminal)
    keys = b"\x03\x04\x1a\x1c\x11\x13\r\n\x7f"
    with boot(running) as console:
        write_fd(terminal.user, keys)
        assert console.read(len(keys)) == keys


def test_escape_leaves(terminal: Tty, daemon: StartDaemon) -> None:
    """Ctrl-] then q ends the daemon with status 0 and gives the terminal back."""
    running = nested(daemon, terminal)
    write_fd(terminal.user, b"\x1dq")
    assert running.wait() == 0
    assert termios.tcgetattr(terminal.inner) == terminal.modes


def test_escape_in_two_pieces_leaves(terminal: Tty, daemon: StartDaemon) -> None:
    """The escape's keys may come one after the other, with the guest's before them."""
    running = nested(daemon, terminal)
    with boot(running) as console:
        write_fd(terminal.user, b"before\x1d")
        assert console.read(6) == b"before"
        write_fd(terminal.user, b"q")
        assert running.wait() == 0


def test_escape_lists_its_keys(terminal: Tty, daemon: StartDaemon) -> None:
    """Ctrl-] then ? says what there is, to the person alone; twice Ctrl-] is the guest's one."""
    running = nested(daemon, terminal)
    with boot(running) as console:
        write_fd(terminal.user, b"\x1d?\x1d\x1dx")
        assert b"q: leave" in read_until(terminal.user, b"]\r\n")
        assert console.read(2) == b"\x1dx"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signal_gives_the_terminal_back(
    terminal: Tty, daemon: StartDaemon, number: signal.Signals
) -> None:
    """A signal that ends the daemon leaves the terminal as it was."""
    running = nested(daemon, terminal)
    running.signal(number)
    assert running.wait() == 0
    assert termios.tcgetattr(terminal.inner) == terminal.modes


def test_killed_worker_gives_the_terminal_back(terminal: Tty, daemon: StartDaemon) -> None:
    """A worker that is killed is replaced; the terminal is raw again, then given back."""
    running = nested(daemon, terminal)
    (worker,) = running.workers()
    assert running.kill_worker() != worker
    wait_port(running, readers=1)
    assert terminal.raw
    with boot(running) as console:
        write_fd(terminal.user, b"still here")
        assert console.read(10) == b"still here"
    running.close()
    assert termios.tcgetattr(terminal.inner) == terminal.modes


def test_terminal_is_left_alone_by_a_failed_start(terminal: Tty, folder: Path) -> None:
    """A daemon that cannot start says so in one line and never touches the terminal."""
    (folder / "taken0").write_text("a file")
    done = command(folder, "-s", str(folder / "taken"), stdin=terminal.inner)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert termios.tcgetattr(terminal.inner) == terminal.modes


def test_window_size(terminal: Tty, daemon: StartDaemon) -> None:
    """The status shows the terminal's size, and follows it."""
    running = nested(daemon, terminal)
    wait_port(running, columns=80, rows=24)
    terminal.resize(132, 43)
    wait_port(running, columns=132, rows=43)


def test_terminal_that_does_not_read(terminal: Tty, daemon: StartDaemon) -> None:
    """A terminal whose person looks away delays the guest once, and shows the end later."""
    running = nested(daemon, terminal)
    data = noise(3 << 20).replace(b"\x1d", b"\x1c")
    with boot(running) as console:
        console.write(data, depth=8, timeout=WITHIN)
        wait_port(running, stalls=1, output=len(data))
        seen = read_until(terminal.user, data[-16:])
        assert b" bytes missed]" in seen
        assert_same(seen[-TERMINAL:], data[-TERMINAL:])


def test_terminal_hangs_up(daemon: StartDaemon) -> None:
    """When the terminal itself is gone the daemon ends by itself."""
    terminal = Tty()
    try:
        running = nested(daemon, terminal)
    finally:
        terminal.close()
    assert running.wait() == 0


def test_typed_ahead(terminal: Tty, daemon: StartDaemon) -> None:
    """What was typed before the daemon started, line by line, is not thrown away."""
    write_fd(terminal.user, b"typed ahead\n")
    until(lambda: select.select([terminal.inner], [], [], 0)[0], "the terminal has it")
    running = nested(daemon, terminal)
    with boot(running) as console:
        assert console.read(12) == b"typed ahead\n"
