"""What a log has of the output when it has not the very bytes: lines with times.

Nothing here is lost: without the times, or with the texts of all objects one after the other, it is
the output again.
"""

from __future__ import annotations

import time

import msgspec

#: Bytes of the longest piece of a line that one object has.
LONGEST_LINE = 4096

#: More than the object of such a piece, all of it escaped and in base64 too.
MOST_TEXT = 32768

#: Bytes of a time with what follows it.
STAMP_BYTES = 28


class Line(msgspec.Struct, omit_defaults=True):
    r"""An object of a JSON log: a line with its end, a piece of a long one, or a gap.

    `time` is when it began to come, `offset` where it lies in the journal. `base64` are the bytes
    of a `text` that are not UTF-8, and `missed` counts those that gave way before they were
    written.
    """

    time: str
    offset: int
    text: str = ""
    base64: bytes | None = None
    missed: int = 0


_encoder = msgspec.json.Encoder()


def rfc3339(ns: int) -> str:
    """Return a time, nanoseconds since 1970, in UTC with microseconds: 27 characters."""
    seconds, rest = divmod(ns, 1_000_000_000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{rest // 1000:06d}Z"


def stamped(data: bytes, begun: bool, now: int) -> bytes:
    """Return `data` with the time before each line that begins in it; `begun`: one is under way."""
    stamp = b"%b " % rfc3339(now).encode()
    text = data.replace(b"\n", b"\n" + stamp)
    if data.endswith(b"\n"):
        text = text[: -len(stamp)]
    return text if begun else stamp + text


def gap_object(missed: int, offset: int, now: int) -> bytes:
    """Return the object that says how many bytes gave way before `offset`."""
    return _encoder.encode(Line(rfc3339(now), offset, missed=missed)) + b"\n"


def objects(
    data: bytes, offset: int, now: int, since: int, *, all_of_it: bool
) -> tuple[bytes, int]:
    """Return as many objects of `data`, which lies at `offset`, as there is room for, and its size.

    The first has the time `since`. A line that has no end yet is left out unless `all_of_it`.
    """
    when, first = rfc3339(now), rfc3339(since)
    at = 0
    parts: list[bytes] = []
    room = MOST_TEXT
    while at < len(data):
        end = data.find(b"\n", at, at + LONGEST_LINE) + 1
        if not end:
            end = min(len(data), at + LONGEST_LINE)
            if end < at + LONGEST_LINE and not all_of_it:
                break
            end = _whole(data, at, end)
        part = _object(data[at:end], offset + at, when if at else first)
        if len(part) > room:
            break
        room -= len(part)
        parts.append(part)
        at = end
    return b"".join(parts), at


def _object(piece: bytes, offset: int, when: str) -> bytes:
    try:
        line = Line(when, offset, piece.decode())
    except UnicodeDecodeError:
        line = Line(when, offset, piece.decode(errors="replace"), piece)
    return _encoder.encode(line) + b"\n"


def _whole(data: bytes, at: int, end: int) -> int:
    """Return where the last character that is whole in `data[at:end]` ends, else `end`."""
    for back in range(1, min(4, end - at) + 1):
        byte = data[end - back]
        if byte & 0xC0 != 0x80:
            length = 1 if byte < 0xC0 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            cut = end - back
            return cut if length > back and cut > at else end
    return end
