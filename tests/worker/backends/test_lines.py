"""Lines with times, and the output that they are made of."""

from __future__ import annotations

import json
import random
from base64 import b64decode

import pytest
from vhost_device_console.worker.backends.lines import (
    LONGEST_LINE,
    MOST_TEXT,
    STAMP_BYTES,
    gap_object,
    objects,
    rfc3339,
    stamped,
)

NOW = 1_763_901_775_123_456_789
TIME = "2025-11-23T12:42:55.123456Z"


def output(text: bytes) -> bytes:
    """Return the output that objects were made of."""
    parts = []
    for line in text.splitlines():
        made = json.loads(line)
        parts.append(b64decode(made["base64"]) if "base64" in made else made["text"].encode())
    return b"".join(parts)


def test_a_time_is_utc_with_microseconds() -> None:
    assert rfc3339(NOW) == TIME
    assert len(TIME) + 1 == STAMP_BYTES


@pytest.mark.parametrize(
    ("data", "begun", "text"),
    [
        (b"a\nb", False, "T a\nT b"),
        (b"a\nb\n", False, "T a\nT b\n"),
        (b"a\nb\n", True, "a\nT b\n"),
        (b"\n\n", False, "T \nT \n"),
        (b"\n", True, "\n"),
        (b"a\r\n", False, "T a\r\n"),
    ],
)
def test_a_time_stands_before_each_line(data: bytes, begun: bool, text: str) -> None:
    assert stamped(data, begun, NOW) == text.replace("T", TIME).encode()


def test_an_object_has_a_line_with_its_end() -> None:
    text, count = objects(b"one\r\ntwo\nthr", 7, NOW, NOW - 10**9, all_of_it=False)
    assert [json.loads(line) for line in text.splitlines()] == [
        {"time": TIME.replace("55.", "54."), "offset": 7, "text": "one\r\n"},
        {"time": TIME, "offset": 12, "text": "two\n"},
    ]
    assert count == 9


def test_half_a_line_is_an_object_on_demand() -> None:
    text, count = objects(b"login: ", 0, NOW, NOW, all_of_it=True)
    assert (json.loads(text)["text"], count) == ("login: ", 7)


def test_a_long_line_is_cut_between_characters() -> None:
    data = b"a" + "€".encode() * LONGEST_LINE + b"\n"
    text, count = objects(data, 0, NOW, NOW, all_of_it=False)
    assert count == len(data)
    assert output(text) == data
    assert len(text.splitlines()) == 4
    assert b"base64" not in text


def test_bytes_that_are_no_text_are_there_twice() -> None:
    text, _ = objects(b"\xff\x80\n", 0, NOW, NOW, all_of_it=False)
    assert json.loads(text)["text"] == "\ufffd\ufffd\n"
    assert output(text) == b"\xff\x80\n"


@pytest.mark.parametrize("byte", [b"\x00", b"\xff", b"\xbf", b"\xf0", b"\n", b'"'])
def test_whatever_comes_there_is_room_for_some_of_it(byte: bytes) -> None:
    data = byte * 8192
    text, count = objects(data, 1 << 62, NOW, NOW, all_of_it=False)
    assert 0 < len(text) <= MOST_TEXT
    assert count > 0
    assert output(text) == data[:count]


def test_random_bytes_come_back_as_they_were() -> None:
    chance = random.Random(5)
    for size in range(200):
        data = chance.randbytes(size * 40)
        seen = 0
        while seen < len(data):
            text, count = objects(data[seen:], seen, NOW, NOW, all_of_it=True)
            assert output(text) == data[seen : seen + count]
            assert count
            seen += count


def test_a_gap_is_an_object_too() -> None:
    assert json.loads(gap_object(5, 9, NOW)) == {"time": TIME, "offset": 9, "missed": 5}
