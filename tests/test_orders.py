"""Orders: what the master says arrives whole, with its descriptors, or the asker hears of it."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterator
from itertools import count

import pytest
from vhost_device_console import orders
from vhost_device_console.config import Network, Overflow, Port, Pty, Unix
from vhost_device_console.errors import ConsoleError
from vhost_device_console.orders import AddPort, Order, RemovePort, Resize

Pair = tuple[socket.socket, socket.socket]

PORT = Port(id=7, name="org.qemu.guest_agent.0", backend=Unix("/tmp/ü"), console=False)


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Give the master's and the worker's end."""
    master, worker = orders.pair()
    with master, worker:
        yield master, worker


def fill(sock: socket.socket) -> None:
    """Send orders until there is an error."""
    for number in count():
        orders.send(sock, Resize(0, number, 1))


@pytest.mark.parametrize(
    "order",
    [
        Resize(3, 132, 43),
        RemovePort(126),
        AddPort(PORT),
        AddPort(Port(id=1, name="c", backend=Network("127.0.0.1", 1), overflow=Overflow.BLOCK)),
        AddPort(Port(id=1, name="c", backend=Pty("/dev/link"), stall_ms=5)),
        AddPort(Port(id=1, name="n" * 255, backend=Unix("/" + "x" * 106))),
    ],
)
def test_what_is_sent_is_received(order: Order, pair: Pair) -> None:
    orders.send(pair[0], order)
    assert orders.receive(pair[1]) == (order, [])


def test_orders_keep_their_order_and_their_borders(pair: Pair) -> None:
    sent = [Resize(0, n, n) for n in range(20)]
    for order in sent:
        orders.send(pair[0], order)
    assert [got[0] for _ in sent if (got := orders.receive(pair[1]))] == sent


def test_descriptors_come_with_their_order_close_on_exec(pair: Pair) -> None:
    read, write = os.pipe()
    orders.send(pair[0], AddPort(PORT), [read, write])
    os.close(read)
    os.close(write)
    got = orders.receive(pair[1])
    assert got is not None
    inheritable = [os.get_inheritable(fd) for fd in got[1]]
    os.write(got[1][1], b"through")
    said = os.read(got[1][0], 100)
    for fd in got[1]:
        os.close(fd)
    assert (said, inheritable) == (b"through", [False, False])


def test_without_an_order_there_is_none_and_no_wait(pair: Pair) -> None:
    assert orders.receive(pair[1]) is None


def test_without_a_master_there_is_none(pair: Pair) -> None:
    pair[0].close()
    assert orders.receive(pair[1]) is None


def test_a_worker_that_takes_no_orders_is_an_error_and_not_a_wait(pair: Pair) -> None:
    with pytest.raises(BlockingIOError):
        fill(pair[0])


def test_an_order_that_was_refused_leaves_those_before_it_whole(pair: Pair) -> None:
    with pytest.raises(BlockingIOError):
        fill(pair[0])
    received = []
    while got := orders.receive(pair[1]):
        received.append(got[0])
    assert len(received) > 100
    assert received == [Resize(0, n, 1) for n in range(len(received))]


def test_an_order_to_a_worker_that_is_gone_is_an_error(pair: Pair) -> None:
    pair[1].close()
    with pytest.raises(BrokenPipeError):
        orders.send(pair[0], RemovePort(1))


def test_descriptors_without_room_are_an_error_and_none_is_left(pair: Pair) -> None:
    orders.send(pair[0], AddPort(PORT), [0, 1])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, hard))
    try:
        with pytest.raises(ConsoleError, match="too many open files"):
            orders.receive(pair[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
