"""What a terminal would show, of output that means nothing to a terminal."""

from __future__ import annotations

import pytest
from vhost_device_console.people.screen import Terminal, ansi


@pytest.mark.parametrize(
    "nonsense",
    [
        b"\x1b[4J",
        b"\x1b[9K",
        b"\x1b[38;5;\xc2\xb2m",
        b"\x1b[1;99999999999999999999H\x1b[H",
        b"\x1b[38;5m",
        b"\x1b[48;2;1mx\x1b[1D",
    ],
)
def test_a_sequence_without_sense_costs_nothing_but_itself(nonsense: bytes) -> None:
    terminal = Terminal(20, 2)
    terminal.feed(b"\x1b[2;1H" + nonsense + b"\x1b[2;1Hgoes on")
    assert terminal.text(1).startswith("goes on")


def test_a_sequence_that_has_only_begun_is_not_shown() -> None:
    terminal = Terminal(20, 2)
    terminal.feed(b"a\x1b[")
    assert terminal.text(0) == "a"


def test_a_part_of_a_colour_that_is_too_large_is_as_large_as_one_can_be() -> None:
    terminal = Terminal(20, 2)
    terminal.feed(b"\x1b[38;2;312;0;00099999999mx")
    assert ansi(terminal) == "\x1b[0;38;2;255;0;255mx\x1b[m\n"


def test_zeros_before_a_number_say_nothing() -> None:
    terminal = Terminal(20, 2)
    terminal.feed(b"\x1b[000002;0000000003Hx")
    assert terminal.text(1) == "  x"
