"""The device: which queue is whose, the configuration space, control messages in buffers."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from vhost_device_console.errors import GuestError, RefusedError
from vhost_device_console.worker.console import device
from vhost_device_console.worker.console.control import Event, State
from vhost_device_console.worker.console.device import Console, Role
from vhost_device_console.worker.console.port import Port

from .conftest import Queue

Ports = Callable[..., list[Port]]

READY = struct.pack("<IHH", 0, Event.DEVICE_READY, 1)
ADD = bytes.fromhex("0000000001000000")


@pytest.fixture
def console(port: Port) -> Console:
    return Console([port])


def test_the_device_offers_ports_and_the_present_virtio() -> None:
    assert device.FEATURES == 1 << 32 | 1 << 1


@pytest.mark.parametrize("count", [1, 2, 5])
def test_queues_are_numbered_as_the_specification_says(ports: Ports, count: int) -> None:
    console = Console(ports(*[True] * count))
    roles = [console.role(index) for index in range(console.queues)]
    assert [role for role, _ in roles[:4]] == [
        Role.INPUT,
        Role.OUTPUT,
        Role.CONTROL_TO_GUEST,
        Role.CONTROL_FROM_GUEST,
    ]
    assert [role for role, _ in roles[4:]] == [Role.INPUT, Role.OUTPUT] * (count - 1)
    port_ids = [port.id for role, port in roles if role in (Role.INPUT, Role.OUTPUT)]
    assert port_ids == [at for port in range(count) for at in (port, port)]


@pytest.mark.parametrize("index", [4, 5, 255, 0xFFFF_FFFF])
def test_there_are_no_more_queues(console: Console, index: int) -> None:
    assert console.queues == 4
    with pytest.raises(RefusedError, match="no queue"):
        console.role(index)


def test_the_device_writes_where_the_guest_reads() -> None:
    writable = {role for role in Role if role.writable}
    assert writable == {Role.INPUT, Role.CONTROL_TO_GUEST}


@pytest.mark.parametrize("count", [1, 3])
def test_the_configuration_space(ports: Ports, count: int) -> None:
    space = Console(ports(*[True] * count)).read_config(0, 12)
    assert space == struct.pack("<HHII", 0, 0, count, 0)


def test_any_span_of_the_configuration_can_be_read(console: Console) -> None:
    whole = console.read_config(0, 12)
    for offset in range(13):
        for size in range(13 - offset):
            assert console.read_config(offset, size) == whole[offset : offset + size]


PAST = [(0, 13), (12, 1), (11, 2), (13, 0), (4, 252), (0xFFFF_FFFF, 1), (0xFFFF_FFFF, 256)]


@pytest.mark.parametrize(("offset", "size"), PAST)
def test_configuration_past_the_end_is_refused(console: Console, offset: int, size: int) -> None:
    with pytest.raises(RefusedError, match="do not exist"):
        console.read_config(offset, size)
    with pytest.raises(RefusedError, match="do not exist"):
        console.write_config(offset, bytes(size))


def test_a_write_changes_no_configuration(console: Console) -> None:
    before = console.read_config(0, 12)
    console.write_config(0, b"\xff" * 12)
    console.write_config(8, b"A\0\0\0")
    assert console.read_config(0, 12) == before


@pytest.mark.parametrize(
    ("multiport", "opened", "takes"),
    [(False, False, True), (False, True, True), (True, False, False), (True, True, True)],
)
def test_input_waits_for_a_port_that_a_program_has_open(
    console: Console, port: Port, multiport: bool, opened: bool, takes: bool
) -> None:
    console.multiport, port.opened = multiport, opened
    assert console.takes_input(port) is takes


# Control messages in buffers


def test_control_messages_are_heard_and_their_buffers_returned(
    console: Console, queue: Queue
) -> None:
    queue.write(READY)
    assert console.hear(queue, 64) == 1
    assert console.control.state(0) is State.ADDED
    assert queue.used == [(0, 0)]


@pytest.mark.parametrize("cut", [0, 1, 4, 8])
def test_a_control_message_may_be_in_pieces(console: Console, queue: Queue, cut: int) -> None:
    queue.write(READY[:cut], READY[cut:])
    console.hear(queue, 64)
    assert console.control.state(0) is State.ADDED


@pytest.mark.parametrize("message", [b"", b"short", bytes(1 << 20), b"\xff" * 8])
def test_buffers_of_senseless_messages_are_returned(
    console: Console, queue: Queue, message: bytes
) -> None:
    queue.write(message)
    assert console.hear(queue, 64) == 1
    assert queue.used == [(0, 0)]


@pytest.mark.parametrize("most", [1, 3])
def test_no_more_is_heard_than_the_budget(console: Console, queue: Queue, most: int) -> None:
    for _ in range(5):
        queue.write(READY)
    assert console.hear(queue, most) == most
    assert len(queue.given) == 5 - most


def test_what_was_heard_before_a_mistake_counts(console: Console, queue: Queue) -> None:
    queue.write(READY)
    queue.mistake()
    with pytest.raises(GuestError):
        console.hear(queue, 64)
    assert console.control.state(0) is State.ADDED
    assert queue.used == [(0, 0)]


def test_answers_are_spoken_one_a_buffer(console: Console, queue: Queue) -> None:
    console.control.replies.extend([b"one", b"three"])
    rooms = [queue.room(16)[0] for _ in range(3)]
    assert console.speak(queue, 64) == 2
    assert queue.used == [(0, 3), (1, 5)]
    assert [bytes(room[:5]) for room in rooms] == [b"one\0\0", b"three", bytes(5)]
    assert len(queue.given) == 1


def test_without_an_answer_no_buffer_is_taken(console: Console, queue: Queue) -> None:
    queue.room(16)
    assert console.speak(queue, 64) == 0
    assert len(queue.given) == 1


def test_answers_wait_for_buffers(console: Console, queue: Queue) -> None:
    console.control.replies.append(ADD)
    assert console.speak(queue, 64) == 0
    (room,) = queue.room(8)
    assert console.speak(queue, 64) == 1
    assert room == ADD


def test_an_answer_is_spread_over_the_pieces_of_a_buffer(console: Console, queue: Queue) -> None:
    console.control.replies.append(b"spread out")
    rooms = queue.room(3, 0, 4, 10)
    console.speak(queue, 64)
    assert [bytes(room) for room in rooms] == [b"spr", b"", b"ead ", b"out" + bytes(7)]
    assert queue.used == [(0, 10)]


@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_buffer_too_small_gets_what_fits(console: Console, queue: Queue, size: int) -> None:
    console.control.replies.append(ADD)
    (room,) = queue.room(size)
    console.speak(queue, 64)
    assert room == ADD[:size]
    assert queue.used == [(0, size)]


def test_no_more_is_spoken_than_the_budget(console: Console, queue: Queue) -> None:
    console.control.replies.extend([ADD] * 5)
    for _ in range(5):
        queue.room(8)
    assert console.speak(queue, 2) == 2
    assert len(console.control.replies) == 3
