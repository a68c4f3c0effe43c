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
    return take(control)


def take(control: Control) -> list[bytes]:
    """Return and take what waits for the guest."""
    return [control.take() for _ in control.replies]


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
    return promising({0: port})


def promising(ports: dict[int, Port], **options: bool) -> Control:
    """Return the dialogue with a guest that has room for many ports."""
    control = Control(ports, **options)
    control.promised = 127
    return control


# The table: (state, event, value) -> next state, answers, ignored, open if it was closed / open

KEEPS = (False, True)
OPENS = (True, True)
CLOSES = (False, False)


@pytest.mark.parametrize("was_open", [False, True])
@pytest.mark.parametrize(
    ("state", "event", "value", "after", "answers", "ignored", "opened"),
    [
        (State.ABSENT, Event.PORT_READY, 1, State.READY, INTRODUCTION, 0, CLOSES),
        (State.ABSENT, Event.PORT_READY, 0, State.ABSENT, [], 1, KEEPS),
        (State.ABSENT, Event.PORT_OPEN, 1, State.ABSENT, [], 1, KEEPS),
        (State.ABSENT, Event.PORT_OPEN, 0, State.ABSENT, [], 1, KEEPS),
        (State.ABSENT, Event.DEVICE_READY, 1, State.ADDED, [ADD], 0, CLOSES),
        (State.ABSENT, Event.DEVICE_READY, 0, State.FAILED, [], 0, CLOSES),
        (State.ADDED, Event.PORT_READY, 1, State.READY, INTRODUCTION, 0, CLOSES),
        (State.ADDED, Event.PORT_READY, 0, State.FAILED, [], 0, CLOSES),
        (State.ADDED, Event.PORT_OPEN, 1, State.ADDED, [], 1, KEEPS),
        (State.ADDED, Event.PORT_OPEN, 0, State.ADDED, [], 1, KEEPS),
        (State.ADDED, Event.DEVICE_READY, 1, State.ADDED, [ADD], 0, CLOSES),
        (State.ADDED, Event.DEVICE_READY, 0, State.FAILED, [], 0, CLOSES),
        (State.READY, Event.PORT_READY, 1, State.READY, INTRODUCTION, 0, CLOSES),
        (State.READY, Event.PORT_READY, 0, State.FAILED, [], 0, CLOSES),
        (State.READY, Event.PORT_OPEN, 1, State.READY, [], 0, OPENS),
        (State.READY, Event.PORT_OPEN, 0, State.READY, [], 0, CLOSES),
        (State.READY, Event.DEVICE_READY, 1, State.ADDED, [ADD], 0, CLOSES),
        (State.READY, Event.DEVICE_READY, 0, State.FAILED, [], 0, CLOSES),
        (State.FAILED, Event.PORT_READY, 1, State.READY, INTRODUCTION, 0, CLOSES),
        (State.FAILED, Event.PORT_READY, 0, State.FAILED, [], 0, KEEPS),
        (State.FAILED, Event.PORT_OPEN, 1, State.FAILED, [], 1, KEEPS),
        (State.FAILED, Event.PORT_OPEN, 0, State.FAILED, [], 1, KEEPS),
        (State.FAILED, Event.DEVICE_READY, 1, State.ADDED, [ADD], 0, CLOSES),
        (State.FAILED, Event.DEVICE_READY, 0, State.FAILED, [], 0, CLOSES),
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
    control = dialogue(ports(True, False))
    assert events(say(control, Event.PORT_READY, 1, 1)) == [
        (1, Event.PORT_NAME, 1),
        (1, Event.PORT_OPEN, 0),
    ]


def test_ports_have_states_of_their_own(ports: Ports) -> None:
    made = ports(True, True)
    control = dialogue(made)
    say(control, Event.PORT_READY, 1, 1)
    say(control, Event.PORT_OPEN, 1, 1)
    assert [control.state(0), control.state(1)] == [State.ADDED, State.READY]
    assert [port.opened for port in made] == [False, True]


def test_a_name_is_utf8_without_an_end(port: Port) -> None:
    port.name = "Konsole ü"
    control = promising({0: port})
    _, name, _ = say(control, Event.PORT_READY)
    assert name[8:] == "Konsole ü".encode()


@pytest.mark.parametrize("event", [Event.DEVICE_READY, Event.PORT_READY])
def test_a_flood_without_buffers_for_the_answers_is_bounded(control: Control, event: Event) -> None:
    message = struct.pack("<IHH", 0, event, 1)
    for _ in range(1000):
        control.receive(message)
    assert len(control.replies) <= 8


@pytest.mark.parametrize("state", State)
def test_a_reset_forgets_everything(control: Control, port: Port, state: State) -> None:
    bring(control, state)
    control.receive(struct.pack("<IHH", 0, Event.PORT_READY, 1))
    port.opened = True
    control.reset()
    assert (control.state(0), port.opened, control.replies) == (State.ABSENT, False, [])


# Ports come and go


def dialogue(made: list[Port]) -> Control:
    """Return the dialogue with a guest that was told of these ports and has added none yet."""
    control = promising({port.id: port for port in made})
    assert events(say(control, Event.DEVICE_READY)) == [(p.id, Event.PORT_ADD, 0) for p in made]
    return control


def events(messages: list[bytes]) -> list[tuple[int, ...]]:
    """Return (port, event, value) of each message."""
    return [struct.unpack_from("<IHH", message) for message in messages]


def test_a_guest_that_talks_is_told_of_a_new_port(control: Control, ports: Ports) -> None:
    bring(control, State.READY)
    control.add(ports(True, False)[1])
    assert events(take(control)) == [(1, Event.PORT_ADD, 0)]
    assert control.state(1) is State.ADDED


def test_a_guest_that_came_back_from_hibernation_is_told_of_a_new_port(
    control: Control, ports: Ports
) -> None:
    say(control, Event.PORT_READY)
    control.add(ports(True, False)[1])
    assert events(take(control)) == [(1, Event.PORT_ADD, 0)]


def test_a_guest_is_told_of_no_port_it_has_no_room_for(control: Control, ports: Ports) -> None:
    control.promised = 1
    bring(control, State.READY)
    control.add(ports(True, False)[1])
    assert (take(control), control.state(1)) == ([], State.ABSENT)


def test_a_guest_that_has_not_asked_is_told_of_no_port(control: Control, ports: Ports) -> None:
    control.add(ports(True, False)[1])
    assert (take(control), control.state(1)) == ([], State.ABSENT)


@pytest.mark.parametrize("state", [State.ADDED, State.READY, State.FAILED])
def test_a_guest_is_told_once_that_a_port_it_knows_is_gone(
    control: Control, port: Port, state: State
) -> None:
    bring(control, state)
    control.remove(port.id)
    assert events(take(control)) == [(0, Event.PORT_REMOVE, 0)]
    assert control.state(0) is State.ABSENT


def test_a_port_the_guest_never_heard_of_is_not_removed(control: Control, port: Port) -> None:
    control.remove(port.id)
    assert take(control) == []


def test_a_guest_that_could_not_set_the_device_up_knows_no_port_to_remove(
    control: Control, port: Port
) -> None:
    bring(control, State.READY)
    say(control, Event.DEVICE_READY, 0)
    control.remove(port)
    assert take(control) == []


def test_a_port_removed_before_the_guest_took_the_news_leaves_no_word(
    control: Control, port: Port
) -> None:
    control.receive(struct.pack("<IHH", 0, Event.DEVICE_READY, 1))
    control.remove(port.id)
    assert take(control) == []


def test_what_was_to_be_said_of_a_port_is_not_said_once_it_is_gone(
    control: Control, port: Port
) -> None:
    bring(control, State.ADDED)
    control.receive(struct.pack("<IHH", 0, Event.PORT_READY, 1))
    control.remove(port.id)
    assert events(take(control)) == [(0, Event.PORT_REMOVE, 0)]


def test_a_number_removed_and_added_again_is_told_in_that_order(
    control: Control, port: Port
) -> None:
    bring(control, State.READY)
    control.remove(port.id)
    control.add(port)
    assert events(take(control)) == [(0, Event.PORT_REMOVE, 0), (0, Event.PORT_ADD, 0)]


def test_coming_and_going_makes_nothing_grow(control: Control, port: Port) -> None:
    bring(control, State.READY)
    for _ in range(1000):
        control.remove(port.id)
        control.add(port)
    assert len(control.replies) <= 2


def test_states_of_another_device_are_gone_on_with(ports: Ports) -> None:
    made = ports(True, False)
    control = promising({port.id: port for port in made})
    waiting = (1, Event.PORT_ADD, b"add")
    control.restore({0: State.READY, 1: State.ADDED}, [waiting], unset=False)
    assert [control.state(at) for at in (0, 1)] == [State.READY, State.ADDED]
    assert control.waiting == [waiting]
    assert take(control) == [b"add"]
    control.add(ports(True, True, True)[2])
    assert events(take(control)) == [(2, Event.PORT_ADD, 0)]


def test_a_guest_that_talked_to_somebody_else_has_its_ports_and_its_console_open(
    ports: Ports,
) -> None:
    made = ports(True, False)
    control = promising(dict(enumerate(made)))
    control.presume(told=True)
    assert [control.state(at) for at in (0, 1)] == [State.READY, State.READY]
    assert [port.opened for port in made] == [True, False]


def test_a_guest_that_was_told_nothing_is_told_its_ports(control: Control, port: Port) -> None:
    control.presume(told=False)
    assert take(control) == [ADD]
    assert not port.opened


def test_nothing_is_presumed_of_a_device_that_could_not_be_set_up(control: Control) -> None:
    say(control, Event.DEVICE_READY, 0)
    control.presume(told=True)
    assert control.state(0) is State.FAILED


def test_a_successor_knows_that_the_device_could_not_be_set_up(
    control: Control, port: Port
) -> None:
    say(control, Event.DEVICE_READY, 0)
    successor = promising({0: port})
    successor.resume(control.save())
    successor.presume(told=True)
    assert successor.state(0) is State.FAILED


def test_a_new_port_is_closed_whatever_was_said_of_the_one_before(
    control: Control, port: Port
) -> None:
    bring(control, State.ADDED)
    control.remove(port.id)
    control.add(port)
    for event in (Event.PORT_READY, Event.PORT_OPEN, Event.PORT_READY):
        say(control, event)
    assert not port.opened


def test_a_port_opened_for_what_a_departed_client_typed_is_said_to_be_open(ports: Ports) -> None:
    made = ports(True, False)
    control, generic = dialogue(made), made[1]
    say(control, Event.PORT_READY, 1, 1)
    generic.input.fed(1)
    assert events(say(control, Event.PORT_OPEN, 1, 1)) == [(1, Event.PORT_OPEN, 1)]


def test_nothing_is_presumed_of_a_guest_that_has_spoken(control: Control, port: Port) -> None:
    bring(control, State.FAILED)
    control.presume(told=True)
    assert (control.state(0), port.opened) == (State.FAILED, False)


# This side opens and closes


def test_a_generic_port_is_open_to_the_guest_while_a_client_is_there(ports: Ports) -> None:
    made = ports(True, False)
    control, generic = dialogue(made), made[1]
    say(control, Event.PORT_READY, 1, 1)
    said = []
    for generic.attended in (False, True, True, False):
        control.host_changed(generic)
        said += events(take(control))
    assert said == [(1, Event.PORT_OPEN, 1), (1, Event.PORT_OPEN, 0)]


def test_a_console_port_is_always_open_to_the_guest(control: Control, port: Port) -> None:
    bring(control, State.READY)
    port.attended = False
    control.host_changed(port)
    assert (take(control), port.host_open) == ([], True)


def test_a_port_the_guest_has_not_added_is_not_said_to_be_open(ports: Ports) -> None:
    made = ports(True, False)
    control, generic = dialogue(made), made[1]
    generic.attended = True
    control.host_changed(generic)
    assert take(control) == []
    assert events(say(control, Event.PORT_READY, 1, 1))[-1] == (1, Event.PORT_OPEN, 1)


def test_a_client_that_left_is_there_until_the_guest_has_what_it_typed(ports: Ports) -> None:
    made = ports(True, False)
    control, generic = dialogue(made), made[1]
    generic.attended = True
    say(control, Event.PORT_READY, 1, 1)
    say(control, Event.PORT_OPEN, 1, 1)
    generic.input.room()[:1] = b"x"
    generic.input.fed(1)
    generic.attended = False
    control.host_changed(generic)
    assert take(control) == []
    generic.input.consume(1)
    control.host_changed(generic)
    assert events(take(control)) == [(1, Event.PORT_OPEN, 0)]


def test_the_guest_closing_a_port_ends_the_wait_for_it(ports: Ports) -> None:
    made = ports(True, False)
    control, generic = dialogue(made), made[1]
    generic.attended = True
    say(control, Event.PORT_READY, 1, 1)
    say(control, Event.PORT_OPEN, 1, 1)
    generic.input.fed(1)
    generic.attended = False
    assert events(say(control, Event.PORT_OPEN, 0, 1)) == [(1, Event.PORT_OPEN, 0)]


# Sizes

RESIZE = struct.pack("<IHH", 0, Event.RESIZE, 0)


@pytest.mark.parametrize(("rows_first", "size"), [(False, (132, 43)), (True, (43, 132))])
def test_a_size_is_columns_first_unless_asked_otherwise(
    port: Port, rows_first: bool, size: tuple[int, int]
) -> None:
    control = promising({0: port}, rows_first=rows_first)
    control.resizes = True
    bring(control, State.READY)
    port.size = (132, 43)
    control.resized(port)
    assert take(control) == [RESIZE + struct.pack("<HH", *size)]


def test_a_known_size_is_part_of_the_introduction_after_the_port_is_a_console(
    control: Control, port: Port
) -> None:
    control.resizes = True
    port.size = (80, 25)
    said = events(say(control, Event.PORT_READY))
    assert [event for _, event, _ in said] == [
        Event.CONSOLE_PORT,
        Event.RESIZE,
        Event.PORT_NAME,
        Event.PORT_OPEN,
    ]


@pytest.mark.parametrize("state", [State.ABSENT, State.ADDED, State.FAILED])
def test_a_port_the_guest_does_not_have_gets_no_size(
    control: Control, port: Port, state: State
) -> None:
    control.resizes = True
    bring(control, state)
    port.size = (80, 25)
    control.resized(port)
    assert take(control) == []


def test_a_guest_that_wants_no_sizes_gets_none(control: Control, port: Port) -> None:
    bring(control, State.READY)
    port.size = (80, 25)
    control.resized(port)
    assert take(control) == []


def test_a_generic_port_has_no_size(ports: Ports) -> None:
    made = ports(True, False)
    control, generic = dialogue(made), made[1]
    control.resizes = True
    generic.size = (80, 25)
    assert Event.RESIZE not in [e for _, e, _ in events(say(control, Event.PORT_READY, 1, 1))]
    control.resized(generic)
    assert take(control) == []


def test_only_the_latest_size_waits_for_the_guest(control: Control, port: Port) -> None:
    control.resizes = True
    bring(control, State.READY)
    for columns in range(1, 1000):
        port.size = (columns, 25)
        control.resized(port)
    assert take(control) == [RESIZE + struct.pack("<HH", 999, 25)]
