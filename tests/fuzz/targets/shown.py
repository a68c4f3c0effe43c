"""What a guest puts out, as people are shown it: the screen, the plain text, a recording.

Nothing in it steers who looks, and text and recordings are the same wherever it is cut.
"""

from __future__ import annotations

import io
import json
import re
from collections import deque
from collections.abc import Iterable
from xml.etree import ElementTree

from source import Source
from vhost_device_console.errors import ConsoleError
from vhost_device_console.people import cast, screen
from vhost_device_console.people.plain import Plain

#: What may stand in a screen with colours: text, and how it looks.
_COLOURED = re.compile(r"(?:\x1b\[[0-9;]*m|[^\x00-\x09\x0b-\x1f\x7f-\x9f])*")

_TAGS = {"svg", "title", "rect", "text", "tspan"}


def _pieces(source: Source) -> list[bytes]:
    size = 1 + source.byte() % 16
    data = source.rest()
    return [data[at : at + size] for at in range(0, len(data), size)]


def _screens(size: tuple[int, int], data: bytes) -> None:
    terminal = screen.Terminal(*size)
    terminal.feed(data)
    for form in ("text", "ansi", "svg", "json"):
        text = screen.render(terminal, form).decode()
        if form == "json":
            json.loads(text)
        elif form == "svg":
            found = {
                element.tag.rpartition("}")[2] for element in ElementTree.fromstring(text).iter()
            }
            assert found <= _TAGS
        else:
            assert _COLOURED.fullmatch(text)
            assert form == "ansi" or "\x1b" not in text


def _texts(pieces: list[bytes]) -> None:
    whole, cut = Plain(), Plain()
    text = whole.feed(b"".join(pieces)) + whole.end()
    assert text == "".join(map(cut.feed, pieces)) + cut.end()
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)


def _recordings(pieces: list[bytes]) -> None:
    file = io.BytesIO()
    writer = cast.Writer(file, (80, 24), "it")
    for number, piece in enumerate(pieces):
        writer.output(piece, number * 10**6)
    writer.end(0, len(pieces) * 10**6)
    file.seek(0)
    _, events = cast.read(file, "it")
    text = "".join(event.data for event in events if event.code == "o")
    assert text == b"".join(pieces).decode(errors="replace")


def run(data: bytes) -> None:
    """The first bytes say how large the screen is and where it is cut, or it is a recording."""
    source = Source(data)
    how = source.byte()
    if how & 1:
        try:
            deque(cast.read(io.BytesIO(source.rest()), "it")[1], 0)
        except ConsoleError as error:
            if not str(error).isprintable():
                raise AssertionError("what is said of it could steer a terminal") from error
        return
    size = (1 + how % 40, 1 + source.byte() % 12)
    pieces = _pieces(source)
    _screens(size, b"".join(pieces))
    _texts(pieces)
    if pieces:
        _recordings(pieces)


def seeds() -> Iterable[bytes]:
    """Colours, other screens, wide characters and what is not UTF-8; recordings."""
    return (
        b"\x14\x05\x03\x1b[1;38;5;9mred\x1b[0m\r\n\x1b]0;title\x07\x1b[?1049hother\x1b[2J\x1b[5;5Hx",
        b"\x14\x05\x02"
        + "wide 漢字 é e\u0301 \U0001f469\u200d\U0001f680".encode()
        + b"\xff\xc3\x1b[",
        b"\x14\x05\x07\x1bP+q\x1b\\\x1b[38:2:1:2:3m\x1b[4:3m\x1b#8\x1b(0qqq\x1b[1;3r\x1bM\x1b[2L\x1b[3P",
        b'\x01{"version":3,"term":{"cols":80,"rows":24}}\n[0.5,"o","x"]\n[1,"r","9x9"]\n# n\n',
        b'\x01{"version":2,"width":80,"height":24}\n[0.5,"o","x"]\n[1e400,"o",5]\n',
    )
