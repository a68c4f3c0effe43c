"""What a desk makes of keys and events, without a terminal or a daemon."""

from __future__ import annotations

import time

import pytest
from vhost_device_console.attachment import Ask, AskWho, Bye, Hello, Person, Role, Size, Who
from vhost_device_console.people import desk
from vhost_device_console.people.desk import Desk, Effect, Leave, Say, Show, ToggleLog
from vhost_device_console.people.link import Dropped, Gap

ESCAPE = b"\x1d"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Typed:
    """Who takes what is typed, at most `room` bytes of it."""

    def __init__(self, room: int = 1 << 20) -> None:
        self.data = b""
        self.room = room

    def __call__(self, data: bytes) -> int:
        part = data[: self.room]
        self.data += part
        self.room -= len(part)
        return len(part)


def role(writer: bool, by: str = "") -> Role:
    return Role(writer=writer, epoch=1, read=0, by=by)


def hello(guest: str = "vm3", name: str = "") -> Hello:
    return Hello(guest=guest, port=0, name=name, console=True, journal=1, tail=0, head=0, at=0)


def at_terminal(writer: bool = True, **options: object) -> Desk:
    desk = Desk(terminal=True, **options)  # type: ignore[arg-type]
    desk.take(role(writer))
    return desk


def typed(desk: Desk) -> bytes:
    taken = Typed()
    assert desk.type(taken) == []
    return taken.data


def said(effects: list[Effect]) -> list[str]:
    return [effect.text for effect in effects if isinstance(effect, Say)]


# The keys


def test_keys_are_typed() -> None:
    desk = at_terminal()
    assert desk.keys(b"ls\r") == []
    assert typed(desk) == b"ls\r"


@pytest.mark.parametrize(
    ("key", "effect"),
    [
        (b"q", Leave()),
        (b"f", Ask(write=True, force=True)),
        (b"r", Ask(write=False)),
        (b"w", AskWho()),
        (b"t", Say("timestamps on")),
        (b"l", ToggleLog()),
    ],
)
def test_a_key_of_the_menu_does_what_it_says_and_is_not_typed(key: bytes, effect: Effect) -> None:
    desk = at_terminal(can_log=True)
    assert desk.keys(ESCAPE + key) == [effect]
    assert typed(desk) == b""


def test_keys_after_one_that_leaves_are_nobody_s() -> None:
    desk = at_terminal()
    assert desk.keys(ESCAPE + b"q" + ESCAPE + b"w" + b"a") == [Leave()]
    assert desk.keys(b"a") == []
    assert typed(desk) == b""


def test_what_was_typed_before_leaving_is_taken_first() -> None:
    now = [100.0]
    desk = at_terminal(clock=lambda: now[0])
    assert desk.keys(b"a" + ESCAPE + b"q") == []
    assert desk.leaves_at(0) == 101.0
    assert typed(desk) == b"a"
    assert desk.leaves_at(1) == 100.0
    assert desk.leave() == [Leave()]


def test_what_nobody_took_before_leaving_is_said() -> None:
    desk = at_terminal()
    desk.keys(b"abc" + ESCAPE + b"q")
    assert desk.leave() == [Say("3 bytes that were typed did not reach the guest"), Leave()]


def test_the_menu_may_come_a_key_at_a_time() -> None:
    desk = at_terminal()
    assert desk.keys(ESCAPE) == []
    assert desk.keys(b"q") == [Leave()]


def test_the_escape_key_twice_is_typed() -> None:
    desk = at_terminal()
    desk.keys(ESCAPE + ESCAPE)
    assert typed(desk) == ESCAPE


def test_another_escape_key() -> None:
    desk = at_terminal(escape=1)
    desk.keys(ESCAPE + b"\x01q")
    assert typed(desk) == ESCAPE
    assert desk.leave() == [Leave()]


def test_without_an_escape_key_there_is_no_menu() -> None:
    desk = at_terminal(escape=None)
    assert desk.keys(ESCAPE + b"q") == []
    assert typed(desk) == ESCAPE + b"q"


def test_sysrq_is_the_hvc_console_s_prefix_and_the_key() -> None:
    desk = at_terminal()
    desk.keys(ESCAPE + b"b")
    desk.keys(b"h")
    assert typed(desk) == b"\x0fh"


def test_the_help_names_the_escape_key_and_the_log_only_where_there_is_one() -> None:
    (with_log,) = said(at_terminal(can_log=True, escape=1).keys(b"\x01?"))
    (without,) = said(at_terminal().keys(ESCAPE + b"l"))
    assert "Ctrl-A  type Ctrl-A itself" in with_log
    assert "\nl  write" in with_log
    assert "\nl  " not in without


def test_what_a_watcher_types_goes_nowhere_and_is_not_kept() -> None:
    desk = at_terminal(writer=False)
    desk.keys(b"rm -rf\r")
    assert typed(desk) == b""
    desk.take(role(True))
    assert typed(desk) == b""


def test_what_is_typed_before_the_role_is_known_waits_for_it() -> None:
    desk = Desk(terminal=True)
    desk.keys(b"early")
    assert typed(desk) == b""
    desk.take(role(True))
    assert typed(desk) == b"early"


def test_who_watches_asks_to_type_again() -> None:
    assert at_terminal(writer=False).keys(ESCAPE + b"r") == [Ask(write=True)]


@pytest.mark.parametrize("key", [b"f", b"r"])
def test_who_may_only_watch_asks_for_nothing(key: bytes) -> None:
    desk = at_terminal(writer=False, may_write=False, force=True)
    assert desk.keys(ESCAPE + key) == [Say("you may only watch")]
    assert not [e for e in desk.take(hello()) if isinstance(e, Ask)]


def test_keys_that_there_is_no_room_for_are_dropped_and_the_menu_works() -> None:
    terminal = at_terminal(can_log=True)
    assert terminal.keys(b"x" * desk.MOST_KEYS) == []
    assert terminal.keys(b"yyy") == [Say("there is no room for more keys: they are dropped")]
    terminal.type(Typed(room=1))
    assert terminal.keys(b"y" + ESCAPE + ESCAPE + ESCAPE + b"bh") == [
        Say("SysRq: which key? h lists them")
    ]
    assert terminal.keys(ESCAPE + b"l") == [ToggleLog()]
    assert not terminal.full
    taken, said = Typed(), []
    while len(taken.data) < desk.MOST_KEYS - 1:
        assert said == []
        said = terminal.type(taken)
    assert said == [Say("there is room again: 7 bytes that were typed were dropped")]
    terminal.keys(b"z")
    assert typed(terminal) == b"z"
    assert taken.data == b"x" * len(taken.data)


def test_dropped_keys_did_not_reach_the_guest_either() -> None:
    terminal = at_terminal()
    terminal.keys(b"x" * (desk.MOST_KEYS + 1) + ESCAPE + b"q")
    (said, _) = terminal.leave()
    assert said == Say(f"{desk.MOST_KEYS + 1} bytes that were typed did not reach the guest")


def test_what_there_is_no_room_for_is_kept_and_no_more_is_read_of_a_pipe() -> None:
    desk = Desk(terminal=False)
    desk.take(role(True))
    desk.keys(b"x" * (1 << 16) + b"y")
    assert desk.full
    taken = Typed(room=1)
    desk.type(taken)
    assert (taken.data, desk.full) == (b"x", False)
    assert typed(desk) == b"x" * ((1 << 16) - 1) + b"y"


# Pipes


def test_a_pipe_is_typed_as_it_is() -> None:
    desk = Desk(terminal=False)
    desk.take(role(True))
    assert desk.keys(ESCAPE + b"q") == []
    assert typed(desk) == ESCAPE + b"q"


def test_a_terminal_s_end_leaves() -> None:
    assert at_terminal().end() == [Leave()]


def test_a_pipe_at_its_end_leaves_once_all_is_typed_and_the_guest_is_quiet() -> None:
    clock = Clock()
    desk = Desk(terminal=False, linger=2.0, clock=clock)
    desk.take(role(True))
    desk.keys(b"poweroff\n")
    assert desk.end() == []
    assert desk.leaves_at(0) is None  # it is not typed
    assert typed(desk) == b"poweroff\n"
    clock.now = 150.0
    assert desk.leaves_at(9) is None  # the guest has not taken it
    assert desk.leaves_at(0) == 152.0
    clock.now = 151.0
    desk.take(memoryview(b"bye"))
    assert desk.leaves_at(0) == 153.0


def test_a_pipe_that_never_had_anything_only_watches() -> None:
    for nothing in ([], [b""]):
        desk = Desk(terminal=False)
        desk.take(role(True))
        for each in nothing:
            desk.keys(each)
        desk.end()
        assert desk.leaves_at(0) is None


@pytest.mark.parametrize("late", [False, True])
def test_a_pipe_that_may_not_type_says_what_to_do_and_leaves(late: bool) -> None:
    pipe = Desk(terminal=False, denied="ask ann")
    if late:
        pipe.take(role(False, by="ann"))
    pipe.keys(b"x")
    if not late:
        pipe.take(role(False, by="ann"))
    effects = pipe.type(Typed())
    assert effects == [
        Say("what comes from the pipe cannot be typed: ask ann"),
        Leave(desk.NOT_WRITER),
    ]


def test_a_pipe_with_force_waits_for_the_role() -> None:
    desk = Desk(terminal=False, force=True)
    assert Ask(write=True, force=True) in desk.take(hello())
    desk.keys(b"x")
    desk.take(role(False, by="ann"))
    assert desk.type(Typed(room=0)) == []
    desk.take(role(True))
    assert typed(desk) == b"x"


# The events


def test_output_is_shown_as_it_is() -> None:
    data = memoryview(b"\x1b[0m\xff")
    assert at_terminal().take(data) == [Show(data)]


@pytest.mark.parametrize(
    ("parts", "shown"),
    [
        ((b"one\r\ntw", b"o\r\n"), b"@one\r\n@two\r\n"),
        ((b"one\n\rtwo",), b"@one\n\r@two"),
        ((b"one", b"\n", b"two"), b"@one\n@two"),
        ((b"\n\r\n", b"\r", b"\n", b"x"), b"\n\r\n\r\n@x"),
        ((b"10%\r20%\r", b"30%\r\nx"), b"@10%\r20%\r30%\r\n@x"),
    ],
)
def test_timestamps_begin_each_line_that_has_text_once(
    parts: tuple[bytes, ...], shown: bytes
) -> None:
    now = time.mktime((2026, 11, 23, 12, 34, 56, 0, 0, -1)) + 0.5
    desk = at_terminal(timestamps=True, wall=lambda: now)
    stamped = b"".join(
        bytes(effect.data)
        for part in parts
        for effect in desk.take(memoryview(part))
        if isinstance(effect, Show)
    )
    assert stamped == shown.replace(b"@", b"[12:34:56.500] ")


def test_lines_of_json_have_no_timestamps() -> None:
    desk = at_terminal(can_stamp=False)
    assert desk.keys(ESCAPE + b"t") == [Say("lines of JSON have no timestamps")]
    assert desk.take(memoryview(b"x")) == [Show(memoryview(b"x"))]


def test_a_greeting_says_where_one_is_and_that_it_is_again() -> None:
    desk = at_terminal()
    first = said(desk.take(hello(name="login")))
    assert first == ["attached to vm3, port 0, login; Ctrl-] then ? for help"]
    assert said(desk.take(hello())) == ["attached again to vm3, port 0; Ctrl-] then ? for help"]


def test_nothing_that_is_said_steers_the_terminal() -> None:
    desk, evil = at_terminal(), "\x1b]0;x\x07\n"
    person = Person(name=evil, attached=True, writer=True, you=True, columns=80, rows=24, lag=5)
    events = [hello(evil, evil), role(False, by=evil), Who([person]), Bye(evil)]
    lines = [line for event in events for line in said(desk.take(event))]
    assert len(lines) == 4
    assert all(line.isprintable() for line in lines)
    assert lines[2].endswith(" (you): types, 80x24, 5 bytes behind")


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (Gap(None), "another daemon: what came meanwhile is not known"),
        (Gap(7), "7 bytes are missing here"),
        (Dropped(3), "3 bytes that were typed may not have reached the guest"),
        (Bye("the console is gone"), "the console is gone"),
    ],
)
def test_what_is_missing_is_said(event: Gap | Dropped | Bye, line: str) -> None:
    assert at_terminal().take(event) == [Say(line)]


def test_the_port_s_size_is_not_worth_a_word() -> None:
    assert at_terminal().take(Size(80, 24)) == []


def test_every_change_of_the_role_is_said_and_no_other() -> None:
    desk = Desk(terminal=True)
    changes = [
        role(True),
        role(True),
        role(False, by="ann"),
        role(False, by="ann"),
        role(False, by="bob"),
        role(True),
    ]
    assert [said(desk.take(each)) for each in changes] == [
        [],
        [],
        ["you watch: ann types"],
        [],
        ["you watch: bob types"],
        ["you type now"],
    ]


def test_who_came_to_watch_is_not_told_so() -> None:
    assert Desk(terminal=True, wants_to=False).take(role(False, by="ann")) == []


def test_lines_in_brackets_stand_alone_in_a_raw_terminal() -> None:
    assert desk.bracketed("a\nb", raw=True) == b"\r\n[a]\r\n[b]\r\n"
    assert desk.bracketed("a\nb", raw=False) == b"[a]\n[b]\n"
