"""A console's state: out of one console into another, and nothing else into any."""

from __future__ import annotations

import struct
from collections.abc import Callable

import msgspec
import pytest
from vhost_device_console.errors import RefusedError
from vhost_device_console.journal import Input, Output
from vhost_device_console.worker import state
from vhost_device_console.worker.console.control import Event, State
from vhost_device_console.worker.console.device import Console
from vhost_device_console.worker.console.port import Port

SIZE = 4096


def make(*kinds: bool, size: int = SIZE) -> Console:
    """Return a console with a port of each kind: True for a console port."""

    def port(at: int, console: bool) -> Port:
        output, input_ = (memoryview(bytearray(size)) for _ in range(2))
        words = memoryview(bytearray(64)).cast("Q")
        return Port(at, f"port{at}", Output(output, words), Input(input_, words), console=console)

    return Console([port(at, kind) for at, kind in enumerate(kinds)], max(1, len(kinds)))


def talk(console: Console, *said: tuple[int, Event, int]) -> None:
    for message in said:
        console.control.receive(struct.pack("<IHH", *message))


@pytest.fixture
def source() -> Console:
    """A console whose guest has its first port open and its second added."""
    console = make(True, False)
    talk(console, (0, Event.DEVICE_READY, 1), (0, Event.PORT_READY, 1), (0, Event.PORT_OPEN, 1))
    for _ in console.control.replies:
        console.control.take()
    talk(console, (1, Event.PORT_READY, 1))
    port = console.ports[0]
    port.output.append(b"seenunseen")
    port.output.commit()
    port.output.seen = 4
    port.input.feed(b"gonetyped")
    port.input.consume(4)
    port.size = (132, 43)
    return console


def move(source: Console, destination: Console) -> Port:
    """Move the state and return the destination's first port."""
    state.load(destination, state.save(source)).apply()
    return destination.ports[0]


def test_pending_bytes_of_both_directions_move(source: Console) -> None:
    port = move(source, make(True, False))
    assert (port.output.copy(port.output.seen), port.input.copy()) == (b"unseen", b"typed")


def test_offsets_move(source: Console) -> None:
    port = move(source, make(True, False))
    assert (port.output.seen, port.output.head, port.input.tail) == (4, 10, 4)


def test_how_far_the_guest_is_with_its_ports_moves(source: Console) -> None:
    destination = make(True, False)
    port = move(source, destination)
    assert (port.opened, destination.ports[1].opened) == (True, False)
    assert [destination.control.state(at) for at in (0, 1)] == [State.READY, State.READY]


def test_messages_for_the_guest_move(source: Console) -> None:
    destination = make(True, False)
    move(source, destination)
    events = [struct.unpack_from("<IHH", message) for message in destination.control.replies]
    assert (1, Event.PORT_NAME, 1) in events


def test_the_size_moves_where_there_is_none(source: Console) -> None:
    assert move(source, make(True, False)).size == (132, 43)


def test_a_size_that_is_known_stays_and_the_guest_is_told(source: Console) -> None:
    destination = make(True, False)
    destination.control.resizes = True
    destination.ports[0].size = (80, 25)
    move(source, destination)
    assert struct.pack("<IHHHH", 0, Event.RESIZE, 0, 80, 25) in destination.control.replies


def test_a_port_that_is_only_here_is_told_to_the_guest(source: Console) -> None:
    source.control.promised = 3
    destination = make(True, False, False)
    move(source, destination)
    assert struct.pack("<IHH", 2, Event.PORT_ADD, 0) in destination.control.replies


def test_ports_that_a_driver_could_not_be_told_of_are_no_more_known_where_it_goes(
    source: Console,
) -> None:
    talk(source, (0, Event.DEVICE_READY, 0))
    destination = make(True, False)
    move(source, destination)
    assert destination.control.state(1) is State.FAILED
    destination.remove(destination.ports[1])
    assert not destination.control.replies


def test_a_state_that_moved_moves_on(source: Console) -> None:
    first, second = make(True, False), make(True, False)
    move(source, first)
    move(first, second)
    assert state.save(second) == state.save(first)


def test_saving_changes_nothing(source: Console) -> None:
    assert state.save(source) == state.save(source)


def test_a_full_journal_moves_around_its_end() -> None:
    source, destination = make(True), make(True)
    output = source.ports[0].output
    data = bytes(range(256)) * (SIZE // 256)
    output.append(bytes(100))
    output.append(data)
    output.commit()
    port = move(source, destination)
    assert port.output.copy(port.output.tail) == data
    reader = port.attach()
    assert reader.skip_lost() == 100


# What is no state


def fields(console: Console) -> list[object]:
    """Return a state as plain lists."""
    decoded: list[object] = msgspec.msgpack.decode(state.save(console))
    return decoded


def unchanged(console: Console, data: bytes, match: str) -> None:
    """Check that `data` is refused and leaves `console` as it is."""
    before = state.save(console)
    with pytest.raises(RefusedError, match=match):
        state.load(console, data)
    assert state.save(console) == before


@pytest.mark.parametrize("size", [0, 1, 20, 60])
def test_a_cut_state_is_refused(source: Console, size: int) -> None:
    unchanged(make(True, False), state.save(source)[:size], "no device state")


@pytest.mark.parametrize(("at", "value"), [(0, "another"), (1, 0), (1, 2), (1, 1 << 40)])
def test_another_kind_or_version_is_refused(source: Console, at: int, value: object) -> None:
    found = fields(source)
    found[at] = value
    unchanged(make(True, False), msgspec.msgpack.encode(found), "version")


@pytest.mark.parametrize("kinds", [(True,), (True, True), (False, False)])
def test_other_ports_are_refused(source: Console, kinds: tuple[bool, ...]) -> None:
    unchanged(make(*kinds), state.save(source), "same ports")


def test_a_state_nested_without_end_is_refused(source: Console) -> None:
    found = msgspec.msgpack.encode(fields(source))
    nested = b"\x91" * 100_000 + b"\xc0"
    unchanged(make(True, False), b"\x96" + found[1:] + nested, "no device state")


@pytest.mark.parametrize("promised", [-1, 128, 1 << 31])
def test_room_for_an_impossible_number_of_ports_is_refused(source: Console, promised: int) -> None:
    found = fields(source)
    found[2] = promised
    unchanged(make(True, False), msgspec.msgpack.encode(found), "room for|no device state")


def test_a_blocking_port_is_not_made_to_lose_what_nobody_has_read(source: Console) -> None:
    destination = make(True, False)
    port = destination.ports[0]
    port.blocking = True
    port.output.append(bytes(SIZE - 5))
    unchanged(destination, state.save(source), "read what it has first")


def test_a_guest_is_told_of_no_port_it_had_no_room_for_where_it_was(source: Console) -> None:
    source.control.promised = 2
    destination = make(True, False, False)
    move(source, destination)
    assert struct.pack("<IHH", 2, Event.PORT_ADD, 0) not in destination.control.replies


def test_a_state_that_is_never_applied_changes_nothing(source: Console) -> None:
    destination = make(True, False)
    before = state.save(destination)
    state.load(destination, state.save(source))
    assert state.save(destination) == before


NAMES = list(state._Port.__struct_fields__)  # noqa: SLF001 (the layout is what is tested)


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("name", "other", "same ports"),
        ("id", 7, "same ports"),
        ("id", 1, "same ports|twice"),
        ("state", "unheard of", "no device state"),
        ("seen", 11, "offsets"),
        ("seen", -1, "offsets"),
        ("head", 1 << 63, "offsets|no device state"),
        ("tail", -5, "offsets"),
        ("output", b"x" * 7, "room"),
        ("output", "text", "no device state"),
        ("input", b"x" * (SIZE + 1), "room"),
        ("columns", 1 << 16, "size"),
        ("rows", -1, "size"),
        ("opened", 3, "no device state"),
    ],
)
def test_a_port_that_cannot_be_is_refused(
    source: Console, name: str, value: object, match: str
) -> None:
    found = fields(source)
    ports = found[3]
    assert isinstance(ports, list)
    ports[0][NAMES.index(name)] = value
    unchanged(make(True, False), msgspec.msgpack.encode(found), match)


def test_the_same_port_twice_is_refused(source: Console) -> None:
    found = fields(source)
    ports = found[3]
    assert isinstance(ports, list)
    ports.append(ports[0])
    unchanged(make(True, False), msgspec.msgpack.encode(found), "twice")


def test_output_that_a_smaller_journal_cannot_hold_is_refused() -> None:
    source = make(True, size=2 * SIZE)
    source.ports[0].output.append(bytes(SIZE + 1))
    unchanged(make(True), state.save(source), "room")


@pytest.mark.parametrize(
    "message",
    [[9, 1, b"x" * 8], [0, 1, b"x" * 7], [0, 7, b"x" * 5000], [0, 1, "x" * 8], [0, 99, b"x" * 8]],
)
def test_messages_that_cannot_be_are_refused(source: Console, message: list[object]) -> None:
    found = fields(source)
    found[4] = [message]
    unchanged(make(True, False), msgspec.msgpack.encode(found), "message|no device state")


@pytest.mark.parametrize("at", [6, 27])
def test_names_that_are_no_text_are_refused(source: Console, at: int) -> None:
    """Neither the kind of the state nor a port's name may be other bytes than UTF-8."""
    data = state.save(source)
    bad = data[:at] + b"\x80" + data[at + 1 :]
    unchanged(make(True, False), bad, "no device state")


def test_any_byte_changed_is_refused_or_harmless(source: Console) -> None:
    """No change of a byte makes anything but a refusal or a console that works."""
    data = state.save(source)
    harmless: Callable[[Console], object] = state.save
    for at in range(len(data)):
        console = make(True, False)
        try:
            state.load(console, data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]).apply()
        except RefusedError:
            continue
        harmless(console)
