"""The order of messages, and which of them ask for a reply, as measured on the real frontends."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import pytest
from vhost_device_console.testing import (
    GuestMemory,
    NackError,
    SplitDriver,
    connect_like_qemu,
    connect_like_uml,
    stop_like_qemu,
    stop_like_uml,
)

Serve = Callable[..., tuple[Any, socket.socket]]

# Requests by number; a negative one asks for a reply.
UML = [3, 1, 15, -16, -21, -2, 24, -5] + [-13, -8, -10, -9] * 4 + [-12, -18] * 4
UML_NEWER = [3, 1, 15, -16, 17, -21, -2, 24, -5] + [-13, -8, -10, -9] * 4 + [-12, -18] * 4
UML_STOP = [-18, -18, -18, -18, 1]
QEMU = (
    [1, 15, 16, 17, -21, 3, 1]
    + [-13, -14] * 4
    + [24, 2, -5]
    + [8, 10, 9, -12, -13] * 4
    + [-18] * 4
    + [-13] * 4
)
QEMU_STOP = [-18, -18, -18, -18, 11, 11, 11, 11]


def requests(device: Any) -> list[int]:
    return [-seen.request if seen.need_reply else seen.request for seen in device.seen]


def payloads(device: Any, request: int) -> list[bytes]:
    return [seen.payload for seen in device.seen if seen.request == request]


@pytest.mark.parametrize(("newer", "expected"), [(False, UML), (True, UML_NEWER)])
def test_uml_order(serve: Serve, newer: bool, expected: list[int]) -> None:
    """UML's messages come in its order, and its off in reverse."""
    device, connection = serve()
    with GuestMemory.like_uml() as memory:
        stop_like_uml(connect_like_uml(connection, memory, newer=newer))
    assert requests(device) == expected + UML_STOP


def test_qemu_order(serve: Serve) -> None:
    """QEMU's messages come in its order."""
    device, connection = serve()
    with GuestMemory.like_qemu() as memory:
        stop_like_qemu(connect_like_qemu(connection, memory))
    assert requests(device) == QEMU + QEMU_STOP


def test_qemu_without_backend_req(serve: Serve) -> None:
    """Where BACKEND_REQ is not offered, there is no such channel."""
    device, connection = serve(protocol=1 << 0 | 1 << 3 | 1 << 9)
    with GuestMemory() as memory, connect_like_qemu(connection, memory) as frontend:
        assert frontend.backend_channel is None
    assert 21 not in [seen.request for seen in device.seen]


@pytest.mark.parametrize(("newer", "size"), [(False, 72), (True, 40)])
def test_uml_memory_table(serve: Serve, newer: bool, size: int) -> None:
    """UML's memory table always has two slots, up to 6.12."""
    device, connection = serve()
    with GuestMemory.like_uml() as memory, connect_like_uml(connection, memory, newer=newer):
        (table,) = payloads(device, 5)
        assert (len(table), table[:4]) == (size, b"\x01\0\0\0")


def test_uml_logs_nowhere(serve: Serve) -> None:
    """UML's log address is all ones."""
    device, connection = serve()
    with GuestMemory.like_uml() as memory, connect_like_uml(connection, memory):
        assert {payload[32:] for payload in payloads(device, 9)} == {b"\xff" * 8}


@pytest.mark.parametrize(
    ("connect", "size"), [(connect_like_uml, 256), (connect_like_qemu, 64)], ids=["uml", "qemu"]
)
def test_ring_sizes(serve: Serve, connect: Any, size: int) -> None:
    """UML's rings have 256 entries, QEMU's 64."""
    device, connection = serve()
    with GuestMemory() as memory, connect(connection, memory):
        assert [ring.size for ring in device.rings] == [size] * 4


@pytest.mark.parametrize(
    ("connect", "kind"),
    [(connect_like_uml, "socket:"), (connect_like_qemu, "anon_inode:[eventfd]")],
    ids=["uml", "qemu"],
)
def test_call_descriptors(serve: Serve, connect: Any, kind: str) -> None:
    """UML is called through sockets, QEMU through event descriptors."""
    device, connection = serve()
    with GuestMemory() as memory, connect(connection, memory):
        links = [os.readlink(f"/proc/self/fd/{ring.call}") for ring in device.rings]
        assert all(link.startswith(kind) for link in links)


@pytest.mark.parametrize("connect", [connect_like_uml, connect_like_qemu], ids=["uml", "qemu"])
def test_two_queues(serve: Serve, connect: Any) -> None:
    """A conversation can have any number of queues."""
    device, connection = serve()
    with GuestMemory() as memory, connect(connection, memory, queue_count=2):
        assert [ring.size > 0 for ring in device.rings] == [True, True, False, False]


def test_failure_closes_everything(serve: Serve) -> None:
    """A refused conversation raises and leaves no descriptor."""
    _, connection = serve(refuse={5})
    with GuestMemory() as memory:
        with pytest.raises(NackError, match="SET_MEM_TABLE"):
            connect_like_uml(connection, memory)
        assert connection.fileno() == -1


@pytest.mark.parametrize("connect", [connect_like_uml, connect_like_qemu], ids=["uml", "qemu"])
def test_reconnect(serve: Serve, connect: Any) -> None:
    """A reconnect repeats the conversation; each ring's base is its used.idx."""
    first, connection = serve()
    second, another = serve()
    with GuestMemory() as memory:
        drivers = [SplitDriver(memory, 8, start=65535) for _ in range(4)]
        with connect(connection, memory, drivers) as frontend:
            queue = frontend.queues[1]
            queue.driver.add([b"x"])
            queue.notify()
            queue.wait()
            frontend.reconnect(another)
            assert requests(second) == requests(first)
            bases = [int.from_bytes(payload[4:], "little") for payload in payloads(second, 10)]
            assert bases == [65535, 0, 65535, 65535]
