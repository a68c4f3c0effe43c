"""The nested backend, on pty pairs, pipes and files as standard input and output."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import termios
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pytest
from vhost_device_console.worker.backends.base import Endpoint
from vhost_device_console.worker.backends.terminal import Terminal

Wait = Callable[..., int]


class Desk:
    """Where terminals are made; `left` counts how often the user asked to leave."""

    def __init__(self, ends: ExitStack) -> None:
        self.ends = ends
        self.left = 0
        self.user = -1
        self._owned: set[int] = set()

    def own(self, fd: int) -> int:
        """Let a descriptor be closed at the end, unless `close` was called for it."""
        self._owned.add(fd)
        self.ends.callback(self.close, fd)
        return fd

    def close(self, fd: int) -> None:
        if fd in self._owned:
            self._owned.remove(fd)
            os.close(fd)

    def pty(self) -> tuple[int, int]:
        """Return the user's side and the terminal that a program is started on."""
        user, tty = os.openpty()
        return self.own(user), self.own(tty)

    def pipe(self) -> tuple[int, int]:
        read, write = os.pipe()
        return self.own(read), self.own(write)

    def terminal(self, stdin: int, stdout: int, kept: memoryview | None = None) -> Terminal:
        def leave() -> None:
            self.left += 1

        made = Terminal(leave, stdin, stdout, kept)
        self.ends.callback(made.close)
        return made


@pytest.fixture
def desk() -> Iterator[Desk]:
    with ExitStack() as ends:
        yield Desk(ends)


def read(terminal: Terminal, size: int = 4096) -> bytes | None:
    """Return what is read, None for nothing now."""
    room = bytearray(size)
    count = terminal.read([memoryview(room)])
    return None if count is None else bytes(room[:count])


def modes(fd: int) -> list[Any]:
    return termios.tcgetattr(fd)


# A terminal


@pytest.fixture
def typed(desk: Desk, wait: Wait) -> Callable[..., bytes | None]:
    """Give a function that types keys, a write each, and returns what the guest gets."""
    user, tty = desk.pty()
    terminal = desk.terminal(tty, tty)
    desk.user = user

    def keys(*pieces: bytes) -> bytes | None:
        got: bytes | None = None
        for piece in pieces:
            os.write(user, piece)
            wait(terminal.reads)
            data = read(terminal)
            got = data if got is None else got + (data or b"")
        return got

    return keys


def test_a_terminal_is_raw_while_it_is_the_guests(desk: Desk) -> None:
    _, tty = desk.pty()
    desk.terminal(tty, tty)
    iflag, oflag, _, lflag, *_ = modes(tty)
    assert not lflag & (termios.ICANON | termios.ECHO | termios.ISIG | termios.IEXTEN)
    assert not iflag & (termios.ICRNL | termios.IXON)
    assert not oflag & termios.OPOST


def test_a_terminal_is_given_back_as_it_was(desk: Desk) -> None:
    _, tty = desk.pty()
    before = modes(tty)
    terminal = desk.terminal(tty, tty)
    assert modes(tty) != before
    terminal.close()
    assert modes(tty) == before


def test_a_killed_worker_s_successor_gives_back_what_was_there_before_both(desk: Desk) -> None:
    _, tty = desk.pty()
    before = modes(tty)
    kept = memoryview(bytearray(128))
    desk.terminal(tty, tty, kept)
    again = desk.terminal(tty, tty, kept)
    again.close()
    assert modes(tty) == before


def test_a_successor_gives_back_whether_a_descriptor_blocked(desk: Desk) -> None:
    ours, theirs = socket.socketpair()
    kept = memoryview(bytearray(128))
    with ours, theirs:
        theirs.setblocking(True)
        desk.terminal(theirs.fileno(), theirs.fileno(), kept)
        assert not os.get_blocking(theirs.fileno())
        desk.terminal(theirs.fileno(), theirs.fileno(), kept).close()
        assert os.get_blocking(theirs.fileno())


def test_an_abandoned_terminal_is_given_back_and_nobody_leaves(desk: Desk) -> None:
    _, tty = desk.pty()
    before = modes(tty)
    desk.terminal(tty, tty).abandon()
    assert (modes(tty), desk.left) == (before, 0)


def test_closing_twice_gives_back_once(desk: Desk) -> None:
    _, tty = desk.pty()
    terminal = desk.terminal(tty, tty)
    terminal.close()
    changed = modes(tty)
    changed[3] ^= termios.ECHO
    termios.tcsetattr(tty, termios.TCSANOW, changed)
    terminal.close()
    assert modes(tty) == changed


def test_a_terminal_that_is_gone_can_be_closed(desk: Desk) -> None:
    user, tty = desk.pty()
    terminal = desk.terminal(tty, tty)
    desk.close(user)
    terminal.close()


def test_keys_typed_ahead_are_kept(desk: Desk, wait: Wait) -> None:
    user, tty = desk.pty()
    os.write(user, b"ahead\nand more")
    wait(tty)
    assert read(desk.terminal(tty, tty)) == b"ahead\nand more"


@pytest.mark.parametrize("key", [b"\x03", b"\x04", b"\x1a", b"\x1c", b"\r", b"\x11\x13", b"\x7f"])
def test_every_key_is_the_guests(typed: Callable[..., bytes | None], key: bytes) -> None:
    assert typed(key) == key


def test_keys_pass_unchanged(typed: Callable[..., bytes | None]) -> None:
    every = bytes(set(range(256)) - {0x1D})
    assert typed(every) == every


def test_output_passes_unchanged(desk: Desk) -> None:
    user, tty = desk.pty()
    every = bytes(range(256))
    assert desk.terminal(tty, tty).write(every) == 256
    assert os.read(user, 512) == every


def test_the_escape_and_q_leave(typed: Callable[..., bytes | None], desk: Desk) -> None:
    assert typed(b"before\x1dqafter") == b"before"
    assert desk.left == 1


def test_the_escape_may_come_key_by_key(typed: Callable[..., bytes | None], desk: Desk) -> None:
    assert typed(b"\x1d", b"q") is None
    assert desk.left == 1


def test_the_escape_twice_is_the_key_itself(typed: Callable[..., bytes | None], desk: Desk) -> None:
    assert typed(b"a\x1d\x1db") == b"a\x1db"
    assert typed(b"\x1d", b"\x1d") == b"\x1d"
    assert desk.left == 0


def test_a_question_mark_lists_the_keys(typed: Callable[..., bytes | None], desk: Desk) -> None:
    assert typed(b"a\x1d?b") == b"ab"
    text = os.read(desk.user, 4096)
    assert b"Ctrl-]" in text
    assert b"q: leave" in text
    assert desk.left == 0


@pytest.mark.parametrize("key", [b"x", b"Q", b"\r", b"\x03", b"\x1b"])
def test_the_escape_and_another_key_are_nothing(
    typed: Callable[..., bytes | None], desk: Desk, key: bytes
) -> None:
    assert typed(b"a\x1d" + key + b"b") == b"ab"
    assert typed(b"\x1d", key) is None
    assert desk.left == 0


def test_q_alone_is_a_key(typed: Callable[..., bytes | None], desk: Desk) -> None:
    assert typed(b"q?") == b"q?"
    assert desk.left == 0


def test_nothing_typed_is_nothing_for_now(desk: Desk) -> None:
    _, tty = desk.pty()
    assert read(desk.terminal(tty, tty)) is None


def test_a_terminal_hung_up_is_gone(desk: Desk) -> None:
    user, tty = desk.pty()
    terminal = desk.terminal(tty, tty)
    desk.close(user)
    with suppress(ConnectionError):
        assert read(terminal) == b""


def test_a_terminal_that_nobody_reads_does_not_block(desk: Desk) -> None:
    _, tty = desk.pty()
    terminal = desk.terminal(tty, tty)
    assert any(terminal.write(bytes(4096)) == 0 for _ in range(1000))


def test_the_size_is_the_terminals(desk: Desk) -> None:
    user, tty = desk.pty()
    ioctl(user, termios.TIOCSWINSZ, struct.pack("HHHH", 25, 90, 0, 0))
    read_end, write_end = desk.pipe()
    assert desk.terminal(tty, tty).size() == (90, 25)
    assert desk.terminal(tty, write_end).size() == (90, 25)
    assert desk.terminal(read_end, tty).size() == (90, 25)


def test_without_a_terminal_there_is_no_size(desk: Desk) -> None:
    assert desk.terminal(*desk.pipe()).size() == (0, 0)


def test_the_terminal_arrives_once(desk: Desk) -> None:
    terminal = desk.terminal(*desk.pipe())
    endpoint: Endpoint = terminal
    assert endpoint.fileno() is None
    assert terminal.accept() is terminal
    assert terminal.accept() is None
    assert terminal.stays


# Pipes and files


def both(desk: Desk) -> tuple[Terminal, int, int]:
    """Return a terminal on pipes, and the user's ends of them."""
    stdin, keyboard = desk.pipe()
    screen, stdout = desk.pipe()
    terminal = desk.terminal(stdin, stdout)
    desk.close(stdin)
    desk.close(stdout)
    return terminal, keyboard, screen


def test_pipes_pass_bytes_and_end(desk: Desk) -> None:
    terminal, keyboard, screen = both(desk)
    assert read(terminal) is None
    os.write(keyboard, b"uname\n")
    assert read(terminal) == b"uname\n"
    assert terminal.write(b"Linux\n") == 6
    assert os.read(screen, 16) == b"Linux\n"
    desk.close(keyboard)
    assert read(terminal) == b""


def test_a_pipe_has_no_escape(desk: Desk) -> None:
    terminal, keyboard, _ = both(desk)
    os.write(keyboard, b"a\x1dq\x1d\x1d\x1d?")
    assert read(terminal) == b"a\x1dq\x1d\x1d\x1d?"
    assert desk.left == 0


def test_an_output_pipe_that_nobody_reads_is_the_end(desk: Desk) -> None:
    terminal, _, screen = both(desk)
    desk.close(screen)
    with pytest.raises(ConnectionError):
        terminal.write(b"anybody?")
    assert desk.left == 1


def test_a_full_output_pipe_does_not_block(desk: Desk) -> None:
    terminal, _, _ = both(desk)
    while terminal.write(bytes(4096)):
        pass


def test_files_are_read_to_their_end_and_written(desk: Desk, folder: Path) -> None:
    (folder / "in").write_bytes(b"script")
    stdin = desk.own(os.open(folder / "in", os.O_RDONLY))
    stdout = desk.own(os.open(folder / "out", os.O_WRONLY | os.O_CREAT))
    terminal = desk.terminal(stdin, stdout)
    assert [read(terminal), read(terminal)] == [b"script", b""]
    assert terminal.write(b"result") == 6
    assert (folder / "out").read_bytes() == b"result"


def test_a_file_is_written_on_where_it_stands(desk: Desk, folder: Path) -> None:
    stdout = desk.own(os.open(folder / "out", os.O_WRONLY | os.O_CREAT))
    os.write(stdout, b"before ")
    desk.terminal(desk.pipe()[0], stdout).write(b"after")
    assert (folder / "out").read_bytes() == b"before after"


def test_a_full_disk_is_the_end(desk: Desk) -> None:
    stdout = desk.own(os.open("/dev/full", os.O_WRONLY))
    terminal = desk.terminal(desk.pipe()[0], stdout)
    with pytest.raises(ConnectionError, match=os.strerror(errno.ENOSPC)):
        terminal.write(b"x")
    assert desk.left == 1


def test_nothing_in_and_nothing_out(desk: Desk) -> None:
    null = desk.own(os.open("/dev/null", os.O_RDWR))
    terminal = desk.terminal(null, null)
    assert read(terminal) == b""
    assert terminal.write(b"gone") == 4


# The caller's descriptors


def kinds(desk: Desk, folder: Path) -> dict[str, tuple[int, int]]:
    _, tty = desk.pty()
    file = desk.own(os.open(folder / "file", os.O_RDWR | os.O_CREAT))
    null = desk.own(os.open("/dev/null", os.O_RDWR))
    one, _other = (desk.own(end.detach()) for end in socket.socketpair())
    return {
        "terminal": (tty, tty),
        "pipes": (desk.pipe()[0], desk.pipe()[1]),
        "file": (file, file),
        "null": (null, null),
        "socket": (one, one),
    }


KINDS = pytest.mark.parametrize("kind", ["terminal", "pipes", "file", "null", "socket"])


@KINDS
def test_the_callers_descriptors_block_as_before_once_it_is_closed(
    desk: Desk, folder: Path, kind: str
) -> None:
    stdin, stdout = kinds(desk, folder)[kind]
    desk.terminal(stdin, stdout).close()
    assert os.get_blocking(stdin)
    assert os.get_blocking(stdout)


@pytest.mark.parametrize("kind", ["terminal", "pipes"])
def test_the_callers_descriptors_block_even_while_it_is_open(
    desk: Desk, folder: Path, kind: str
) -> None:
    stdin, stdout = kinds(desk, folder)[kind]
    terminal = desk.terminal(stdin, stdout)
    assert os.get_blocking(stdin)
    assert os.get_blocking(stdout)
    assert not os.get_blocking(terminal.reads)
    assert not os.get_blocking(terminal.writes)


@KINDS
def test_the_callers_descriptors_stay_open(desk: Desk, folder: Path, kind: str) -> None:
    stdin, stdout = kinds(desk, folder)[kind]
    terminal = desk.terminal(stdin, stdout)
    assert not {terminal.reads, terminal.writes} & {stdin, stdout}
    terminal.close()
    os.fstat(stdin)
    os.fstat(stdout)


def test_a_descriptor_that_did_not_block_does_not_block_afterwards(desk: Desk) -> None:
    one, other = socket.socketpair()
    with one, other:
        one.setblocking(False)
        desk.terminal(one.fileno(), one.fileno()).close()
        assert not one.getblocking()


def test_end_of_input_can_be_waited_for(desk: Desk, wait: Wait) -> None:
    terminal, keyboard, _ = both(desk)
    desk.close(keyboard)
    assert wait(terminal.reads) & select.POLLHUP
