"""Custody: what master and worker tell each other arrives whole, with its descriptors."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Callable, Iterator
from itertools import count

import pytest
from vhost_device_console import custody
from vhost_device_console.config import Network, Overflow, Port, Pty, Unix
from vhost_device_console.custody import (
    AddPort,
    ClientCame,
    Commit,
    FrontendCame,
    FrontendGone,
    FrontendSaid,
    Leave,
    Order,
    Ping,
    Pong,
    RemovePort,
    Resize,
    Vault,
    Word,
)

Pair = tuple[socket.socket, socket.socket]

PORT = Port(id=7, name="org.qemu.guest_agent.0", backend=Unix("/tmp/ü"), console=False)


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Give the master's and the worker's end."""
    master, worker = custody.pair()
    with master, worker:
        yield master, worker


def fill(sock: socket.socket) -> None:
    """Send orders until there is an error."""
    for number in count():
        custody.send(sock, Resize(0, number, 1))


@pytest.mark.parametrize(
    "order",
    [
        Resize(3, 132, 43),
        RemovePort(126),
        AddPort(PORT, []),
        AddPort(Port(id=1, name="c", backend=Network("127.0.0.1", 1), overflow=Overflow.BLOCK), []),
        AddPort(Port(id=1, name="c", backend=Pty("/dev/link"), stall_ms=5), []),
        AddPort(Port(id=1, name="n" * 255, backend=Unix("/" + "x" * 106)), []),
        ClientCame(126, 1 << 40),
        FrontendCame(1, 4711),
        FrontendSaid(1 << 40, 5, False, True, b"\xff" * 4096, True, [*range(253)]),
        FrontendGone(3),
        Ping(),
        Leave(),
    ],
)
def test_an_order_that_is_sent_is_received(order: Order, pair: Pair) -> None:
    custody.send(pair[0], order)
    assert custody.receive_order(pair[1]) == (order, [])


@pytest.mark.parametrize(
    "word",
    [
        Commit(serial=7, newest=9, snapshot=b"\0" * 100, keys=[-1, 5, 9]),
        Commit(serial=7, newest=9, snapshot=b"", keys=[], answer=b"yes", dismiss=True),
        Commit(serial=7, newest=9, snapshot=b"s" * 1_000_000, keys=[*range(40_000)]),
        Pong(),
    ],
)
def test_a_word_that_is_sent_is_received(word: Word, pair: Pair) -> None:
    custody.send(pair[1], word)
    assert custody.receive_word(pair[0]) == (word, [])


def test_orders_keep_their_order_and_their_borders(pair: Pair) -> None:
    sent = [Resize(0, n, n) for n in range(20)]
    for order in sent:
        custody.send(pair[0], order)
    assert [got[0] for _ in sent if (got := custody.receive_order(pair[1]))] == sent


@pytest.mark.parametrize("size", [10, 1_000_000])
def test_descriptors_come_with_their_message_close_on_exec(size: int, pair: Pair) -> None:
    read, write = os.pipe()
    commit = Commit(serial=1, newest=1, snapshot=bytes(size), keys=[])
    custody.send(pair[1], commit, [read, write])
    custody.close([read, write])
    got = custody.receive_word(pair[0])
    assert got is not None
    inheritable = [os.get_inheritable(fd) for fd in got[1]]
    os.write(got[1][1], b"through")
    said = os.read(got[1][0], 100)
    custody.close(got[1])
    assert (said, inheritable) == (b"through", [False, False])


def test_without_a_message_there_is_none_and_no_wait(pair: Pair) -> None:
    assert custody.receive_order(pair[1]) is None
    assert custody.receive_word(pair[0]) is None


def test_the_end_of_the_other_side_is_an_error(pair: Pair) -> None:
    pair[0].close()
    with pytest.raises(ConnectionError):
        custody.receive_order(pair[1])


def test_what_a_dead_worker_has_sent_is_received(pair: Pair) -> None:
    custody.send(pair[1], Pong())
    pair[1].close()
    assert custody.receive_word(pair[0]) == (Pong(), [])
    with pytest.raises(ConnectionError):
        custody.receive_word(pair[0])


def test_a_worker_that_takes_no_orders_is_an_error_and_not_a_wait(pair: Pair) -> None:
    with pytest.raises(BlockingIOError):
        fill(pair[0])


def test_an_order_that_was_refused_leaves_those_before_it_whole(pair: Pair) -> None:
    with pytest.raises(BlockingIOError):
        fill(pair[0])
    received = []
    while got := custody.receive_order(pair[1]):
        received.append(got[0])
    assert len(received) > 100
    assert received == [Resize(0, n, 1) for n in range(len(received))]


def test_an_order_to_a_worker_that_is_gone_is_an_error(pair: Pair) -> None:
    pair[1].close()
    with pytest.raises(BrokenPipeError):
        custody.send(pair[0], RemovePort(1))


def test_of_descriptors_without_room_none_is_left(pair: Pair) -> None:
    custody.send(pair[0], AddPort(PORT, []), [0, 1])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, hard))
    try:
        got = custody.receive_order(pair[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert got == (AddPort(PORT, []), [])
    after = os.dup(0)
    os.close(after)
    assert after == free


# The vault


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def a_file(size: int) -> int:
    fd = os.memfd_create("said")
    os.truncate(fd, size)
    return fd


@pytest.mark.parametrize(
    "said",
    [
        b"\x91\xa6Reboot",
        b"\x81\xa4type\xa1\x80",
        b"\x82\xa4type\xa4Pong\xa1x" + b"\x91" * 9000,
        b"\xc1",
    ],
    ids=["no word", "no text", "deep", "a file that did not come"],
)
def test_what_is_no_word_is_a_value_error(said: bytes, pair: Pair) -> None:
    master, worker = pair
    socket.send_fds(worker, [said], [])
    with pytest.raises(ValueError, match="what was said"):
        custody.receive_word(master)


@pytest.mark.parametrize(
    "fd",
    [
        lambda: os.eventfd(0),
        lambda: os.open("/dev/zero", os.O_RDONLY),
        lambda: a_file((1 << 24) + 1),
        lambda: a_file(5),
    ],
    ids=["an eventfd", "a file without end", "a vast file", "zeros"],
)
def test_a_file_with_no_word_in_it_is_a_value_error_and_no_wait(
    fd: Callable[[], int], pair: Pair
) -> None:
    """And of all descriptors that came along none is left, as for every test."""
    master, worker = pair
    file = fd()
    socket.send_fds(worker, [b"\xc1"], [file, file])
    os.close(file)
    with pytest.raises(ValueError, match="what was said"):
        custody.receive_word(master)


def test_a_vault_closes_what_is_not_kept_and_not_newer() -> None:
    vault = Vault()
    keys = [vault.put(os.dup(0)) for _ in range(4)]
    fds = [vault.fds[key] for key in keys]
    vault.keep([keys[1]], newest=keys[2])
    open_ = [is_open(fd) for fd in fds]
    vault.keep([], newest=keys[3])
    assert open_ == [False, True, False, True]
    assert not any(map(is_open, fds))


def test_a_vault_never_gives_a_key_twice() -> None:
    vault = Vault()
    first = vault.put(os.dup(0))
    vault.keep([], newest=first)
    second = vault.put(os.dup(0))
    vault.keep([], newest=second)
    assert second > first


def test_what_a_worker_made_is_replaced_by_its_key() -> None:
    vault = Vault()
    old, new = os.dup(0), os.dup(0)
    vault.replace(-1, old)
    vault.replace(-1, new)
    assert (is_open(old), vault.fds) == (False, {-1: new})
    vault.keep([], newest=0)
    assert not is_open(new)
