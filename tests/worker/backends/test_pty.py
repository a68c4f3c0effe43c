"""The pty backend, on real ptys."""

from __future__ import annotations

import errno
import os
import select
import tty
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from vhost_device_console.worker.backends import pty
from vhost_device_console.worker.backends.pty import PtyClient, PtyEndpoint, slave_name

Wait = Callable[..., int]


class Pty:
    """A pty as the master process makes it, and those who have its slave open."""

    def __init__(self, ends: ExitStack) -> None:
        fd, slave = os.openpty()
        tty.setraw(slave)
        self.name = os.ttyname(slave)
        os.close(slave)
        self.users: list[int] = []
        self.endpoint: PtyEndpoint = pty.endpoint(fd)
        self.fd = fd
        ends.callback(self.endpoint.close)
        ends.callback(self.leave)

    def open(self) -> int:
        self.users.append(os.open(self.name, os.O_RDWR | os.O_NOCTTY))
        return self.users[-1]

    def leave(self) -> None:
        while self.users:
            os.close(self.users.pop())

    def accept(self) -> PtyClient:
        client = self.endpoint.accept()
        assert client is not None
        self.clients.callback(client.close)
        return client

    clients: ExitStack


@pytest.fixture
def pair() -> Iterator[Pty]:
    with ExitStack() as ends:
        made = Pty(ends)
        made.clients = ends.enter_context(ExitStack())
        yield made


ROOM = memoryview(bytearray(64))


def test_a_slave_is_named_by_its_controlling_side(pair: Pty) -> None:
    assert slave_name(pair.fd) == pair.name


def test_nobody_is_there_while_the_slave_is_closed(pair: Pty) -> None:
    assert pair.endpoint.accept() is None


def test_opening_the_slave_is_noticed_and_is_one_arrival(pair: Pty, wait: Wait) -> None:
    pair.open()
    wait(pair.endpoint.fileno())
    client = pair.accept()
    assert (client.name, client.stays) == (pair.name, False)
    assert pair.endpoint.accept() is None
    poll = select.poll()
    poll.register(pair.endpoint.fileno(), select.POLLIN)
    assert poll.poll(0) == []


def test_who_has_it_open_already_is_there(pair: Pty) -> None:
    pair.open()
    again = PtyEndpoint(os.dup(pair.fd))
    client = again.accept()
    assert client is not None
    client.close()
    again.close()


def test_a_second_opener_is_the_same_client(pair: Pty, wait: Wait) -> None:
    pair.open()
    pair.accept()
    pair.open()
    wait(pair.endpoint.fileno())
    assert pair.endpoint.accept() is None


def test_who_opened_and_closed_at_once_is_nobody(pair: Pty, wait: Wait) -> None:
    pair.open()
    pair.leave()
    wait(pair.endpoint.fileno())
    assert pair.endpoint.accept() is None


def test_who_typed_and_closed_at_once_is_read_and_then_gone(pair: Pty, wait: Wait) -> None:
    os.write(pair.open(), b"typed")
    pair.leave()
    wait(pair.endpoint.fileno())
    client = pair.accept()
    assert client.read([ROOM]) == 5
    with pytest.raises(ConnectionError):
        client.read([ROOM])
    client.close()
    assert pair.endpoint.accept() is None


def test_who_closed_at_once_is_given_no_output(pair: Pty) -> None:
    os.write(pair.open(), b"typed")
    pair.leave()
    with pytest.raises(ConnectionError):
        pair.accept().write(b"for the next one")


def test_what_one_who_left_typed_is_read_by_one_client(pair: Pty, wait: Wait) -> None:
    """Its own, as long as that reads on; nobody arrives at a pty that nobody has open."""
    os.write(pair.open(), b"typed")
    client = pair.accept()
    pair.leave()
    client.end_output()
    wait(client.reads, 0)
    assert pair.endpoint.accept() is None
    assert client.read([ROOM]) == 5


def test_what_was_typed_stays_in_the_pty_when_a_client_is_let_go(pair: Pty) -> None:
    os.write(pair.open(), b"typed")
    client = pair.accept()
    assert client.unread() == 0
    client.close()
    assert pair.accept().read([ROOM]) == 5


def test_bytes_pass_unchanged_both_ways(pair: Pty, wait: Wait) -> None:
    user = pair.open()
    client = pair.accept()
    every = bytes(range(256))
    assert client.write(every) == 256
    assert os.read(user, 512) == every
    os.write(user, every[:64])
    wait(client.reads)
    assert client.read([ROOM]) == 64
    assert bytes(ROOM) == every[:64]


def test_nothing_typed_is_nothing_for_now(pair: Pty) -> None:
    pair.open()
    assert pair.accept().read([ROOM]) is None


def test_a_user_that_does_not_read_does_not_block(pair: Pty) -> None:
    user = pair.open()
    client = pair.accept()
    assert any(client.write(bytes(4096)) == 0 for _ in range(1000))
    assert os.read(user, 4096)


def test_what_was_typed_before_closing_is_read_and_then_the_client_is_gone(
    pair: Pty, wait: Wait
) -> None:
    user = pair.open()
    client = pair.accept()
    os.write(user, b"last")
    wait(client.reads)
    pair.leave()
    assert client.read([ROOM]) == 4
    with pytest.raises(ConnectionError):
        client.read([ROOM])


def test_a_closed_slave_hangs_up(pair: Pty, wait: Wait) -> None:
    pair.open()
    client = pair.accept()
    pair.leave()
    assert wait(client.reads) & select.POLLHUP


def test_one_of_two_openers_leaving_changes_nothing(pair: Pty) -> None:
    first = pair.open()
    client = pair.accept()
    pair.open()
    pair.users.remove(first)
    os.close(first)
    assert client.read([ROOM]) is None


def test_a_slave_opened_again_is_a_new_client(pair: Pty, wait: Wait) -> None:
    for data in (b"one", b"two"):
        user = pair.open()
        wait(pair.endpoint.fileno())
        client = pair.accept()
        client.write(data)
        assert os.read(user, 16) == data
        pair.leave()
        wait(client.reads)
        with pytest.raises(ConnectionError):
            client.read([ROOM])
        client.close()


def test_a_slave_opened_before_its_last_client_was_let_go_is_noticed_then(pair: Pty) -> None:
    pair.open()
    client = pair.accept()
    pair.leave()
    client.close()
    pair.open()
    assert pair.accept() is not client


def test_a_client_that_left_leaves_the_pty_as_it_was(pair: Pty) -> None:
    user = pair.open()
    client = pair.accept()
    client.close()
    client.close()
    os.write(pair.fd, b"still there")
    assert os.read(user, 16) == b"still there"


def test_a_pty_keeps_what_it_took(pair: Pty) -> None:
    pair.open()
    client = pair.accept()
    client.write(b"kept")
    assert client.end_output() == 0


def test_a_pty_that_cannot_be_watched_leaves_nothing_open(
    pair: Pty, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(pty, "slave_name", lambda _: "/dev/pts/none")
    with pytest.raises(FileNotFoundError, match="/dev/pts/none"):
        pty.endpoint(pair.fd)
    assert os.listdir("/proc/self/fd") == before


def test_no_room_for_a_client_s_second_half_leaves_nothing_open(
    pair: Pty, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.open()
    before = os.listdir("/proc/self/fd")
    dup = os.dup
    fds = iter([dup])

    def full(fd: int) -> int:
        for make in fds:
            return make(fd)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "dup", full)
    with pytest.raises(OSError, match="Too many open files"):
        pair.endpoint.accept()
    assert os.listdir("/proc/self/fd") == before


def test_abandoning_a_pty_changes_nothing(pair: Pty) -> None:
    user = pair.open()
    client = pair.accept()
    pair.endpoint.abandon()
    client.write(b"still there")
    assert os.read(user, 16) == b"still there"
    assert (client.total_written(), client.total_read()) == (None, None)
