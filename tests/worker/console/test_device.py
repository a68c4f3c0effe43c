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
    return Console([port], 1)


def test_the_device_offers_all_its_features_and_the_present_virtio() -> None:
    assert device.FEATURES == 1 << 32 | 0b111


@pytest.mark.parametrize("count", [1, 2, 5])
def test_queues_are_numbered_as_the_specification_says(ports: Ports, count: int) -> None:
    console = Console(ports(*[True] * count), count)
    roles = [console.role(index) for index in range(2 * count + 2)]
    assert [role for role, _ in roles[:4]] == [
        Role.INPUT,
        Role.OUTPUT,
        Role.CONTROL_TO_GUEST,
        Role.CONTROL_FROM_GUEST,
    ]
    assert [role for role, _ in roles[4:]] == [Role.INPUT, Role.OUTPUT] * (count - 1)
    owners = [port and port.id for _, port in roles]
    assert owners == [0, 0, None, None, *(at for port in range(1, count) for at in (port, port))]


@pytest.mark.parametrize(("index", "role"), [(4, Role.INPUT), (5, Role.OUTPUT), (254, Role.INPUT)])
def test_a_queue_without_a_port_has_a_direction_and_no_owner(
    console: Console, index: int, role: Role
) -> None:
    assert console.role(index) == (role, None)


def test_the_device_writes_where_the_guest_reads() -> None:
    writable = {role for role in Role if role.writable}
    assert writable == {Role.INPUT, Role.CONTROL_TO_GUEST}


@pytest.mark.parametrize("count", [1, 3])
def test_the_configuration_space(ports: Ports, count: int) -> None:
    space = Console(ports(*[True] * count), count + 2).read_config(0, 12)
    assert space == struct.pack("<HHII", 0, 0, count + 2, 0)


def test_the_configuration_has_the_size_of_port_0(console: Console, port: Port) -> None:
    port.size = (132, 43)
    assert console.read_config(0, 4) == struct.pack("<HH", 132, 43)


@pytest.mark.parametrize(
    ("queues", "most"),
    [(2, 1), (4, 1), (5, 1), (6, 2), (10, 4), (64, 7), (None, 7)],
)
def test_a_guest_is_promised_no_more_ports_than_its_frontend_has_queues_for(
    port: Port, queues: int | None, most: int
) -> None:
    assert Console([port], 7).read_config(4, 4, queues) == struct.pack("<I", most)


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


WHOLE = struct.Struct("<HHII")


def emergency(console: Console, port: Port, offset: int, data: bytes) -> bytes:
    """Write to the configuration; return what port 0 has put out by it."""
    start = port.output.head
    console.write_config(offset, data)
    return bytes(port.output.span(start))


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("text", [b"A", b"\0", b"\xff"])
def test_an_emergency_write_is_output_whatever_the_byte(
    console: Console, port: Port, size: int, text: bytes
) -> None:
    for _ in range(2):
        assert emergency(console, port, 8, text + bytes(size - 1)) == text


def test_the_same_character_twice_comes_twice_from_a_frontend_that_writes_all(
    console: Console, port: Port
) -> None:
    port.size = (80, 25)
    console.read_config(0, 12)
    for _ in range(2):
        assert emergency(console, port, 0, WHOLE.pack(80, 25, 1, ord("A"))) == b"A"


def test_a_write_to_something_else_repeats_no_emergency_character(
    console: Console, port: Port
) -> None:
    console.read_config(0, 12)
    console.write_config(0, WHOLE.pack(0, 0, 1, ord("A")))
    assert emergency(console, port, 0, WHOLE.pack(99, 0, 1, ord("A"))) == b""


def test_a_write_of_everything_as_it_was_is_no_emergency(console: Console, port: Port) -> None:
    assert emergency(console, port, 0, console.read_config(0, 12)) == b""


@pytest.mark.parametrize(("offset", "size"), [(0, 8), (0, 4), (4, 4), (9, 3), (11, 1), (12, 0)])
def test_a_write_beside_the_emergency_byte_is_none(
    console: Console, port: Port, offset: int, size: int
) -> None:
    assert emergency(console, port, offset, b"\x01" * size) == b""


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


def with_answers(ports: Ports, count: int) -> Console:
    """Return a console with so many PORT_ADD messages waiting."""
    console = Console(ports(*[True] * count), count)
    console.control.receive(READY)
    return console


def test_answers_are_spoken_one_a_buffer(ports: Ports, queue: Queue) -> None:
    rooms = [queue.room(16)[0] for _ in range(3)]
    assert with_answers(ports, 2).speak(queue, 64) == 2
    assert queue.used == [(0, 8), (1, 8)]
    assert [bytes(room[:9]) for room in rooms] == [ADD + b"\0", b"\1" + ADD[1:] + b"\0", bytes(9)]
    assert len(queue.given) == 1


def test_without_an_answer_no_buffer_is_taken(console: Console, queue: Queue) -> None:
    queue.room(16)
    assert console.speak(queue, 64) == 0
    assert len(queue.given) == 1


def test_answers_wait_for_buffers(ports: Ports, queue: Queue) -> None:
    console = with_answers(ports, 1)
    assert console.speak(queue, 64) == 0
    (room,) = queue.room(8)
    assert console.speak(queue, 64) == 1
    assert room == ADD


def test_an_answer_is_spread_over_the_pieces_of_a_buffer(ports: Ports, queue: Queue) -> None:
    rooms = queue.room(3, 0, 4, 10)
    with_answers(ports, 1).speak(queue, 64)
    assert [bytes(room) for room in rooms] == [ADD[:3], b"", ADD[3:7], ADD[7:] + bytes(9)]
    assert queue.used == [(0, 8)]


@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_buffer_too_small_gets_what_fits(ports: Ports, queue: Queue, size: int) -> None:
    (room,) = queue.room(size)
    with_answers(ports, 1).speak(queue, 64)
    assert room == ADD[:size]
    assert queue.used == [(0, size)]


def test_no_more_is_spoken_than_the_budget(ports: Ports, queue: Queue) -> None:
    console = with_answers(ports, 5)
    for _ in range(5):
        queue.room(8)
    assert console.speak(queue, 2) == 2
    assert len(console.control.replies) == 3
