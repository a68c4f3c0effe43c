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
    connect_like_cloud_hypervisor,
    connect_like_crosvm,
    connect_like_qemu,
    connect_like_uml,
    pause_like_qemu,
    rebind_like_uml,
    resume_like_qemu,
    stop_like_qemu,
    stop_like_uml,
)

Serve = Callable[..., tuple[Any, socket.socket]]

# Requests by number; a negative one asks for a reply.
UML = [3, 1, 15, -16, -21, -2, 24, -5] + [-13, -8, -10, -9] * 4 + [-12, -18] * 4
UML_NEWER = [3, 1, 15, -16, -21, 17, -2, 24, -5] + [-13, -8, -10, -9] * 4 + [-12, -18] * 4
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

#: Everything there is.
ALL = 0x9F62B | 1 << 14
UML_INBAND = [3, 1, 15, -16, -21, -2, 24, -5] + [-8, -10, -9] * 4 + [-18] * 4
QEMU_ALL = (
    [1, 15, 16, 17, 36, -21, 3, 1]
    + [-13, -14] * 4
    + [24, 2, 40, 39, -37]
    + [8, 10, 9, -12, -13] * 4
    + [-18] * 4
    + [40, 39]
    + [-13] * 4
)
QEMU_RESUME = [2, 40, 39] + [8, 10, 9, -12, -13] * 4 + [-18] * 4 + [40, 39] + [-13] * 4
CLOUD_HYPERVISOR = (
    [3, 1, 15, 16, -17, -2, -5, -8, -8, -31, -32] + [-9, -10, -13, -12] * 2 + [-18, -18] + [-21]
)
CROSVM = [3, 1, 15, 16, 21, 17, 2, 5] + [8, 9, 10, 13, 12, 18] * 4


TIMEOUT = 30.0


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


def test_uml_inband_order(serve: Serve) -> None:
    """With in-band notifications UML sends no descriptor, neither for kicks nor for calls."""
    device, connection = serve(protocol=ALL)
    with GuestMemory.like_uml() as memory:
        stop_like_uml(connect_like_uml(connection, memory))
    assert requests(device) == UML_INBAND + UML_STOP


def test_uml_rebind_order(serve: Serve) -> None:
    """A driver bound again says everything of its rings anew, and that none has stopped."""
    device, connection = serve()
    with GuestMemory.like_uml() as memory:
        frontend = connect_like_uml(connection, memory)
        rebind_like_uml(frontend, memory)
        stop_like_uml(frontend)
    again = [-2, 24, -5] + [-13, -8, -10, -9] * 4 + [-12, -18] * 4
    assert requests(device) == UML + UML_STOP + again + UML_STOP


def test_qemu_order_with_everything(serve: Serve) -> None:
    """Where all is offered QEMU adds memory regions one by one, and tells the status."""
    device, connection = serve(protocol=ALL)
    with GuestMemory.like_qemu() as memory:
        stop_like_qemu(connect_like_qemu(connection, memory))
    assert device.done.wait(TIMEOUT)  # the last message has no reply
    assert requests(device) == [*QEMU_ALL, *QEMU_STOP, 39]
    assert [payload[0] for payload in payloads(device, 39)] == [8, 15, 0]


def test_qemu_pauses(serve: Serve) -> None:
    """A guest that is paused looks as if it had been reset, and keeps its memory."""
    device, connection = serve(protocol=ALL)
    with GuestMemory.like_qemu() as memory:
        frontend = connect_like_qemu(connection, memory)
        pause_like_qemu(frontend)
        resume_like_qemu(frontend, memory)
        stop_like_qemu(frontend)
    assert device.done.wait(TIMEOUT)
    assert requests(device) == [*QEMU_ALL, *QEMU_STOP, 39, *QEMU_RESUME, *QEMU_STOP, 39]


def test_cloud_hypervisor_order(serve: Serve) -> None:
    """cloud-hypervisor asks for a reply to everything once it can."""
    device, connection = serve(protocol=ALL)
    with GuestMemory() as memory, connect_like_cloud_hypervisor(connection, memory) as frontend:
        frontend.barrier()
        assert requests(device) == [*CLOUD_HYPERVISOR, 1]


def test_cloud_hypervisor_takes_no_feature_of_the_console(serve: Serve) -> None:
    """cloud-hypervisor's mask leaves the rings' features."""
    device, connection = serve(virtio=(1 << 64) - 1)
    with GuestMemory() as memory, connect_like_cloud_hypervisor(connection, memory) as frontend:
        frontend.barrier()
        assert device.features == 1 << 28 | 1 << 29 | 1 << 30 | 1 << 32


def test_cloud_hypervisor_reconnects(serve: Serve) -> None:
    """cloud-hypervisor gets an area for buffers in flight once, and brings it back."""
    _, connection = serve(protocol=ALL)
    second, another = serve(protocol=ALL)
    with GuestMemory() as memory, connect_like_cloud_hypervisor(connection, memory) as frontend:
        frontend.reconnect(another)
        frontend.barrier()
        asked = requests(second)
    assert -31 not in asked
    assert -32 in asked


def test_crosvm_order(serve: Serve) -> None:
    """crosvm asks for no reply at all, and starts each queue before it describes the next."""
    device, connection = serve(protocol=ALL)
    with GuestMemory() as memory, connect_like_crosvm(connection, memory) as frontend:
        frontend.barrier()
        assert requests(device) == [*CROSVM, 1]
        assert [ring.size for ring in device.rings] == [1 << 15] * 4


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
