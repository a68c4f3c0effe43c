"""A player with a clock of its own: nothing here waits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from vhost_device_console.people.cast import Event
from vhost_device_console.people.play import Player


@dataclass
class Scene:
    """`typed` are keys and the moments, in seconds, when they are typed; `shown` what came when."""

    typed: list[tuple[float, bytes]] = field(default_factory=list)
    now: float = 0.0
    shown: list[tuple[float, bytes]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    longest: float = 0.0  # wait at once

    def keys(self, seconds: float | None) -> bytes:
        self.longest = max(self.longest, seconds or 0.0)
        due = self.typed[0][0] if self.typed else None
        if due is None:
            assert seconds is not None, "it waits for ever"
        if due is not None and (seconds is None or due <= self.now + seconds):
            self.now = max(self.now, due)
            return self.typed.pop(0)[1]
        self.now += seconds or 0.0
        return b""

    def play(self, *events: Event, **options: Any) -> bool:
        player = Player(
            lambda data: self.shown.append((round(self.now, 6), data)),
            self.said.append,
            self.keys,
            lambda: self.now,
            **options,
        )
        return player.play(events)


ABC = (Event(1, "o", "a"), Event(10, "o", "b"), Event(2, "o", "c"), Event(5, "x", "0"))


def test_output_comes_as_it_came() -> None:
    scene = Scene()
    assert scene.play(*ABC)
    assert scene.shown == [(1, b"a"), (11, b"b"), (13, b"c")]
    assert scene.now == 18


def test_faster() -> None:
    scene = Scene()
    scene.play(*ABC, speed=2)
    assert scene.shown == [(0.5, b"a"), (5.5, b"b"), (6.5, b"c")]


def test_no_pause_is_longer_than_the_limit() -> None:
    scene = Scene()
    scene.play(*ABC, idle_limit=1.5)
    assert scene.shown == [(1, b"a"), (2.5, b"b"), (4, b"c")]


def test_space_pauses_and_goes_on_where_it_was() -> None:
    scene = Scene([(4, b" "), (104, b" ")])
    scene.play(*ABC)
    assert scene.shown == [(1, b"a"), (111, b"b"), (113, b"c")]


def test_a_pause_goes_on_event_by_event() -> None:
    scene = Scene([(7, b"."), (8, b"."), (9, b" ")])
    scene.play(*ABC, paused=True)
    assert scene.shown == [(7, b"a"), (8, b"b"), (11, b"c")]


def test_the_speed_changes_while_it_waits() -> None:
    scene = Scene([(3, b"+"), (6, b"--")])
    scene.play(*ABC)
    # 2 s, then 3 s twice as fast, then 2 s half as fast.
    assert scene.shown == [(1, b"a"), (10, b"b"), (14, b"c")]


@pytest.mark.parametrize(("key", "at"), [(b"-", 2000), (b"+", 0.000002)])
def test_the_speed_has_bounds_however_often_it_is_changed(key: bytes, at: float) -> None:
    scene = Scene([(0, key * 2000)])
    assert scene.play(Event(2, "o", "a"))
    assert scene.shown == [(at, b"a")]


def test_a_pause_of_a_million_years_is_one_in_which_keys_are_heard() -> None:
    scene = Scene([(1e9, b"q")])
    assert not scene.play(Event(1e300, "o", "a"))
    assert scene.longest <= 24 * 60 * 60


@pytest.mark.parametrize("key", [b"q", b"\x03", b"\x04"])
def test_it_is_left(key: bytes) -> None:
    scene = Scene([(5, key)])
    assert not scene.play(*ABC)
    assert scene.shown == [(1, b"a")]


def test_what_a_terminal_answers_is_no_key() -> None:
    scene = Scene([(5, b"\x1b[24;80R"), (6, b"\x1b]11;rgb:q q q\x07")])
    assert scene.play(*ABC)
    assert scene.now == 18


def test_a_marker_is_gone_to_and_stopped_at() -> None:
    events = (ABC[0], Event(50, "o", "b"), Event(1, "m", "here"), Event(1, "o", "c"))
    scene = Scene([(2, b"]"), (20, b" ")])
    scene.play(*events)
    assert scene.shown == [(1, b"a"), (2, b"b"), (21, b"c")]
    assert scene.said == ["here"]


def test_a_key_is_heard_however_dense_the_output_is() -> None:
    scene = Scene([(0, b"q")])
    assert not scene.play(*(Event(0, "o", "x") for _ in range(100)))
    assert len(scene.shown) <= 1
