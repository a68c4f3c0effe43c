"""The control dialogue: every (state, event, value) and the bytes of every answer."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from vhost_device_console.worker.console.control import Control, Event, State
from vhost_device_console.worker.console.port import Port

Ports = Callable[..., list[Port]]

ADD = bytes.fromhex("00000000 0100 0000")
CONSOLE = bytes.fromhex("00000000 0400 0100")
NAME = bytes.fromhex("00000000 0700 0100") + b"port0"
OPEN = bytes.fromhex("00000000 0600 0100")
INTRODUCTION = [CONSOLE, NAME, OPEN]


def say(control: Control, event: int, value: int = 1, port: int = 0) -> list[bytes]:
    """Let the guest say something; return and take the answers."""
    control.receive(struct.pack("<IHH", port, event, value))
    answers = list(control.replies)
    control.replies.clear()
    return answers


#: How a guest brings a fresh port into each state.
WAYS: dict[State, list[tuple[Event, int]]] = {
    State.ABSENT: [],
    State.ADDED: [(Event.DEVICE_READY, 1)],
    State.READY: [(Event.DEVICE_READY, 1), (Event.PORT_READY, 1)],
    State.FAILED: [(Event.DEVICE_READY, 1), (Event.PORT_READY, 0)],
}


def bring(control: Control, state: State) -> None:
    for event, value in WAYS[state]:
        say(control, event, value)
    assert control.state(0) is state


@pytest.fixture
def control(port: Port) -> Control:
    return Control([port])


# The table: (state, event, value) -> next state, answers, ignored, open if it was closed / open

KEEPS = (False, True)
OPENS = (True, True)
CLOSES = (False, False)


@pytest.mark.parametrize("was_open", [False, True])
@pytest.mark.parametrize(
    ("state", "event", "value", "after", "answers", "ignored", "opened"),
    [
        (State.ABSENT, Event.PORT_READY, 1, State.READY, INTRODUCTION, 0, KEEPS),
        (State.ABSENT, Event.PORT_READY, 0, State.ABSENT, [], 1, KEEPS),
        (State.ABSENT, Event.PORT_OPEN, 1, State.ABSENT, [], 1, KEEPS),
        (State.ABSENT, Event.PORT_OPEN, 0, State.ABSENT, [], 1, KEEPS),
        (State.ABSENT, Event.DEVICE_READY, 1, State.ADDED, [ADD], 0, CLOSES),
        (State.ABSENT, Event.DEVICE_READY, 0, State.ABSENT, [], 0, CLOSES),
        (State.ADDED, Event.PORT_READY, 1, State.READY, INTRODUCTION, 0, KEEPS),
        (State.ADDED, Event.PORT_READY, 0, State.FAILED, [], 0, CLOSES),
        (State.ADDED, Event.PORT_OPEN, 1, State.ADDED, [], 1, KEEPS),
        (State.ADDED, Event.PORT_OPEN, 0, State.ADDED, [], 1, KEEPS),
        (State.ADDED, Event.DEVICE_READY, 1, State.ADDED, [ADD], 0, CLOSES),
        (State.ADDED, Event.DEVICE_READY, 0, State.ABSENT, [], 0, CLOSES),
        (State.READY, Event.PORT_READY, 1, State.READY, INTRODUCTION, 0, KEEPS),
        (State.READY, Event.PORT_READY, 0, State.FAILED, [], 0, CLOSES),
        (State.READY, Event.PORT_OPEN, 1, State.READY, [], 0, OPENS),
        (State.READY, Event.PORT_OPEN, 0, State.READY, [], 0, CLOSES),
        (State.READY, Event.DEVICE_READY, 1, State.ADDED, [ADD], 0, CLOSES),
        (State.READY, Event.DEVICE_READY, 0, State.ABSENT, [], 0, CLOSES),
        (State.FAILED, Event.PORT_READY, 1, State.READY, INTRODUCTION, 0, KEEPS),
        (State.FAILED, Event.PORT_READY, 0, State.FAILED, [], 0, KEEPS),
        (State.FAILED, Event.PORT_OPEN, 1, State.FAILED, [], 1, KEEPS),
        (State.FAILED, Event.PORT_OPEN, 0, State.FAILED, [], 1, KEEPS),
        (State.FAILED, Event.DEVICE_READY, 1, State.ADDED, [ADD], 0, CLOSES),
        (State.FAILED, Event.DEVICE_READY, 0, State.ABSENT, [], 0, CLOSES),
    ],
)
def test_the_table(
    control: Control,
    port: Port,
    state: State,
    event: Event,
    value: int,
    after: State,
    answers: list[bytes],
    ignored: int,
    opened: tuple[bool, bool],
    was_open: bool,
) -> None:
    bring(control, state)
    port.opened = was_open
    assert say(control, event, value) == answers
    assert control.state(0) is after
    assert control.ignored == ignored
    assert port.opened is opened[was_open]


DEVICES = [Event.PORT_ADD, Event.PORT_REMOVE, Event.CONSOLE_PORT, Event.RESIZE, Event.PORT_NAME]


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("event", [*DEVICES, 8, 255, 0xFFFF])
def test_events_that_a_guest_does_not_send_are_ignored(
    control: Control, state: State, event: int
) -> None:
    bring(control, state)
    assert say(control, event) == []
    assert (control.state(0), control.ignored) == (state, 1)


@pytest.mark.parametrize("port_id", [1, 127, 0xFFFF_FFFF])
@pytest.mark.parametrize("event", [Event.PORT_READY, Event.PORT_OPEN])
def test_ports_that_do_not_exist_are_ignored(control: Control, event: Event, port_id: int) -> None:
    bring(control, State.READY)
    assert say(control, event, 1, port_id) == []
    assert (control.state(0), control.ignored) == (State.READY, 1)


@pytest.mark.parametrize("size", range(8))
def test_a_short_message_is_ignored(control: Control, size: int) -> None:
    control.receive(struct.pack("<IHH", 0, Event.DEVICE_READY, 1)[:size])
    assert (control.state(0), control.ignored) == (State.ABSENT, 1)
    assert not control.replies


@pytest.mark.parametrize("more", [1, 8, 1 << 20])
def test_bytes_after_the_message_are_passed_over(control: Control, more: int) -> None:
    control.receive(struct.pack("<IHH", 0, Event.DEVICE_READY, 1) + bytes(more))
    assert control.state(0) is State.ADDED


@pytest.mark.parametrize("value", [1, 2, 0xFFFF])
def test_any_value_but_zero_is_yes(control: Control, port: Port, value: int) -> None:
    say(control, Event.DEVICE_READY, value)
    say(control, Event.PORT_READY, value)
    say(control, Event.PORT_OPEN, value)
    assert port.opened


def test_device_ready_names_no_port(control: Control) -> None:
    assert say(control, Event.DEVICE_READY, 1, 0xFFFF_FFFF) == [ADD]


def test_a_whole_dialogue(control: Control, port: Port) -> None:
    assert say(control, Event.DEVICE_READY) == [ADD]
    assert say(control, Event.PORT_READY) == INTRODUCTION
    assert say(control, Event.PORT_OPEN) == []
    assert port.opened
    say(control, Event.PORT_OPEN, 0)
    assert not port.opened


def test_after_hibernation_a_port_is_introduced_without_device_ready(
    control: Control, port: Port
) -> None:
    assert say(control, Event.PORT_READY) == INTRODUCTION
    say(control, Event.PORT_OPEN)
    assert port.opened
    assert control.ignored == 0


def test_only_a_console_port_is_called_one(ports: Ports) -> None:
    control = Control(ports(True, False))
    add = [struct.pack("<IHH", port, Event.PORT_ADD, 0) for port in (0, 1)]
    assert say(control, Event.DEVICE_READY) == add
    events = [struct.unpack_from("<IHH", answer) for answer in say(control, Event.PORT_READY, 1, 1)]
    assert events == [(1, Event.PORT_NAME, 1), (1, Event.PORT_OPEN, 1)]


def test_ports_have_states_of_their_own(ports: Ports) -> None:
    made = ports(True, True)
    control = Control(made)
    say(control, Event.DEVICE_READY)
    say(control, Event.PORT_READY, 1, 1)
    say(control, Event.PORT_OPEN, 1, 1)
    assert [control.state(0), control.state(1)] == [State.ADDED, State.READY]
    assert [port.opened for port in made] == [False, True]


def test_a_name_is_utf8_without_an_end(port: Port) -> None:
    port.name = "Konsole ü"
    control = Control([port])
    _, name, _ = say(control, Event.PORT_READY)
    assert name[8:] == "Konsole ü".encode()


@pytest.mark.parametrize("event", [Event.DEVICE_READY, Event.PORT_READY])
def test_a_flood_without_buffers_for_the_answers_is_bounded(control: Control, event: Event) -> None:
    message = struct.pack("<IHH", 0, event, 1)
    for _ in range(1000):
        control.receive(message)
    assert len(control.replies) <= 8


def test_answers_that_find_no_place_are_counted(control: Control) -> None:
    for _ in range(10):
        control.receive(struct.pack("<IHH", 0, Event.PORT_READY, 1))
    assert len(control.replies) + control.ignored == 10 * len(INTRODUCTION)


@pytest.mark.parametrize("state", State)
def test_a_reset_forgets_everything(control: Control, port: Port, state: State) -> None:
    bring(control, state)
    control.replies.append(OPEN)
    port.opened = True
    control.reset()
    assert (control.state(0), port.opened, list(control.replies)) == (State.ABSENT, False, [])
