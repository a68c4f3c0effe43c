"""asciicast v3, written and read."""

from __future__ import annotations

import io
import json
import random
from typing import Any

import pytest
from vhost_device_console.errors import ConsoleError
from vhost_device_console.people.cast import Event, Writer, read

S = 1_000_000_000
NOW = 1_763_901_775 * S


class Scene:
    def __init__(self, size: tuple[int, int] = (80, 24), **more: Any) -> None:
        self.file = io.BytesIO()
        self.writer = Writer(self.file, size, "vm3", **more)

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.file.getvalue().splitlines()]

    @property
    def text(self) -> str:
        return "".join(line[2] for line in self.lines[1:] if line[1] == "o")


def test_a_recording_is_a_header_and_events() -> None:
    scene = Scene(idle_limit=2.5)
    scene.writer.output(b"one", NOW)
    scene.writer.resize(132, 50, NOW + S)
    scene.writer.mark("5 bytes missing", NOW + 3 * S)
    scene.writer.output(b"\x1b[1mtwo\r\n", NOW + 3 * S + 250_000_000)
    scene.writer.end(0, NOW + 4 * S)
    assert scene.lines == [
        {
            "version": 3,
            "term": {"cols": 80, "rows": 24},
            "timestamp": 1_763_901_775,
            "title": "vm3",
            "idle_time_limit": 2.5,
        },
        [0.0, "o", "one"],
        [1.0, "r", "132x50"],
        [2.0, "m", "5 bytes missing"],
        [0.25, "o", "\x1b[1mtwo\r\n"],
        [0.75, "x", "0"],
    ]


def test_nothing_is_written_before_there_is_something() -> None:
    assert Scene().file.getvalue() == b""


def test_a_size_that_nobody_knows_is_the_usual_one() -> None:
    scene = Scene((0, 0))
    scene.writer.resize(0, 0, NOW)
    scene.writer.output(b"x", NOW)
    assert scene.lines[0]["term"] == {"cols": 80, "rows": 24}


def test_a_size_before_all_output_is_the_header_s() -> None:
    scene = Scene()
    scene.writer.resize(100, 30, NOW)
    scene.writer.output(b"x", NOW)
    assert scene.lines[0]["term"] == {"cols": 100, "rows": 30}


def test_characters_are_whole_wherever_they_are_cut() -> None:
    text = "aé€🙂e\u0301" * 20
    data = text.encode()
    chance = random.Random(1)
    for _ in range(50):
        scene = Scene()
        at = 0
        while at < len(data):
            count = chance.randint(1, 5)
            scene.writer.output(data[at : at + count], NOW)
            at += count
        assert scene.text == text


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        ((b"a\xff", b"b"), "a\ufffdb"),
        ((b"\xe2\x82", b"x"), "\ufffdx"),
        ((b"\xe2", b"\x82"), "\ufffd"),
        ((b"\xed\xa0\x80",), "\ufffd\ufffd\ufffd"),
    ],
)
def test_what_is_no_character_is_replaced(pieces: tuple[bytes, ...], text: str) -> None:
    scene = Scene()
    for piece in pieces:
        scene.writer.output(piece, NOW)
    scene.writer.end(0, NOW)
    assert scene.text == text


def test_a_character_does_not_go_on_behind_a_gap() -> None:
    scene = Scene()
    scene.writer.output(b"a\xe2\x82", NOW)
    scene.writer.mark("gap", NOW)
    scene.writer.output(b"\xac", NOW)
    assert [line[2] for line in scene.lines[1:]] == ["a", "\ufffd", "gap", "\ufffd"]


def test_times_never_go_back() -> None:
    scene = Scene()
    for at in (0, 5 * S, 2 * S, 6 * S):
        scene.writer.output(b"x", NOW + at)
    assert [line[0] for line in scene.lines[1:]] == [0.0, 5.0, 0.0, 1.0]


def test_rounded_times_add_up() -> None:
    scene = Scene()
    for number in range(1001):
        scene.writer.output(b"x", NOW + number * 1_234_567)
    assert round(sum(line[0] for line in scene.lines[1:]), 6) == 1.234567


# Reading


def reads(*lines: str) -> tuple[Any, list[Event]]:
    header, events = read([line.encode() + b"\n" for line in lines], "x.cast")
    return header, [*events]


V3 = '{"version": 3, "term": {"cols": 90, "rows": 20}, "idle_time_limit": 2}'


def test_what_was_written_is_read() -> None:
    scene = Scene()
    scene.writer.output("é".encode(), NOW)
    scene.writer.end(0, NOW + S)
    header, events = read(io.BytesIO(scene.file.getvalue()), "x.cast")
    assert (header.version, header.columns, header.rows, header.title) == (3, 80, 24, "vm3")
    assert [*events] == [(0.0, "o", "é"), (1.0, "x", "0")]


def test_comments_and_unknown_events_are_no_mistake() -> None:
    header, events = reads(V3, "# a comment", '[0.5, "o", "a"]', "", '[1, "z", "?"]')
    assert header.idle_limit == 2
    assert events == [(0.5, "o", "a"), (1.0, "z", "?")]


def test_times_of_version_2_count_from_the_beginning() -> None:
    header, events = reads(
        '{"version": 2, "width": 80, "height": 24}', '[1.5, "o", "a"]', '[2.0, "o", "b"]'
    )
    assert (header.columns, header.rows) == (80, 24)
    assert [event.wait for event in events] == [1.5, 0.5]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ((), "x.cast is no recording: its first line is no header"),
        (("hello",), "x.cast is no recording: its first line is no header"),
        (("[]",), "x.cast is no recording: its first line is no header"),
        (('{"version": 3}',), "x.cast is no recording: its first line is no header"),
        (('{"version": 1}',), "x.cast is an asciicast of version 1: only 2 and 3 are known"),
        ((V3, "[1]"), "x.cast: line 2 is no event"),
        ((V3, '["a", "o", "b"]'), "x.cast: line 2 is no event"),
    ],
)
def test_what_is_no_recording_is_one_line(lines: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConsoleError) as caught:
        reads(*lines)
    assert str(caught.value) == said


def test_half_a_line_at_the_end_is_none() -> None:
    _, events = read([V3.encode() + b"\n", b'[1, "o", "a"]\n', b'[1, "o", "ha'], "x.cast")
    assert [*events] == [(1.0, "o", "a")]
