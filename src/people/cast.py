"""asciicast v3: recordings of terminals as lines of JSON, written and read.

The first line is an object, the header; each other one an event: [seconds since the one before,
code, data]. The codes here are "o" output, "r" a new size such as "80x24", "m" a marker with a
label, "x" the end. Source: https://docs.asciinema.org/manual/asciicast/v3/; of version 2, which is
read too, seconds count from the beginning.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterable, Iterator
from typing import IO, Any, NamedTuple

import msgspec

from ..errors import ConsoleError

#: What a terminal is taken for whose size nobody knows.
USUAL_SIZE = (80, 24)

#: A line that is longer is none of a recording.
_LONGEST = 1 << 24

_encoder = msgspec.json.Encoder()


class Writer:
    """Writes a recording of a console to `file`, line by line.

    Moments are nanoseconds since 1970; one that is before another counts as that. Bytes are UTF-8
    wherever they are cut; what is not is U+FFFD.
    """

    def __init__(
        self, file: IO[bytes], size: tuple[int, int], title: str, idle_limit: float | None = None
    ) -> None:
        self._file = file
        self._size = size if all(size) else USUAL_SIZE
        self._title = title
        self._idle_limit = idle_limit
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._written: int | None = None  # microseconds, of the last event
        self._now = 0

    def output(self, data: bytes | memoryview, at: int) -> None:
        """Have these bytes be put out."""
        self._now = max(self._now, at)
        if text := self._decoder.decode(data):
            self._event("o", text)

    def resize(self, columns: int, rows: int, at: int) -> None:
        """Have the terminal be that large; 0 x 0 is no size."""
        if (columns, rows) == self._size or not (columns and rows):
            return
        self._size = columns, rows
        if self._written is not None:
            self._now = max(self._now, at)
            self._event("r", f"{columns}x{rows}")

    def mark(self, label: str, at: int) -> None:
        """Have a marker there: something is to be said of what comes next."""
        self._cut(at)
        self._event("m", label)

    def end(self, status: int, at: int) -> None:
        """Write that this is the end: 0 when it was to be."""
        self._cut(at)
        self._event("x", str(status))

    def _cut(self, at: int) -> None:
        """End a character that will never be whole."""
        if text := self._decoder.decode(b"", final=True):
            self._event("o", text)
        self._now = max(self._now, at)

    def _event(self, code: str, data: str) -> None:
        now = self._now // 1000
        if self._written is None:
            self._begin()
            self._written = now
        interval = now - self._written
        self._written = now
        self._line([interval / 1_000_000, code, data])

    def _begin(self) -> None:
        header: dict[str, Any] = {
            "version": 3,
            "term": {"cols": self._size[0], "rows": self._size[1]},
            "timestamp": self._now // 1_000_000_000,
            "title": self._title,
        }
        if self._idle_limit is not None:
            header["idle_time_limit"] = self._idle_limit
        self._line(header)

    def _line(self, what: object) -> None:
        # In one write, so that a recorder that is killed leaves whole lines.
        self._file.write(_encoder.encode(what) + b"\n")


class Event(NamedTuple):
    """Something that happens `wait` seconds after what was before it."""

    wait: float
    code: str
    data: str


class Header(msgspec.Struct, kw_only=True):
    """What is said of a recording; times in seconds, the size in characters."""

    version: int
    columns: int
    rows: int
    title: str
    idle_limit: float | None


def read(lines: Iterable[bytes], name: str) -> tuple[Header, Iterator[Event]]:
    """Return a recording's header and its events; raises ConsoleError when it is none.

    So does the iterator, at a line that is no event; half a line at the end is none.
    """
    numbered = enumerate(lines, 1)
    first = next(numbered, (0, b""))[1]
    try:
        said = msgspec.json.decode(first, type=dict[str, Any])
        version = said["version"]
        if version == 3:
            columns, rows = said["term"]["cols"], said["term"]["rows"]
        elif version == 2:
            columns, rows = said["width"], said["height"]
        else:
            raise ConsoleError(
                f"{name} is an asciicast of version {version}: only 2 and 3 are known"
            )
        limit = said.get("idle_time_limit")
        header = Header(
            version=version,
            columns=int(columns),
            rows=int(rows),
            title=str(said.get("title") or ""),
            idle_limit=None if limit is None else float(limit),
        )
    except (msgspec.MsgspecError, UnicodeDecodeError, LookupError, TypeError, ValueError):
        raise ConsoleError(f"{name} is no recording: its first line is no header") from None
    return header, _events(numbered, header.version, name)


def _events(numbered: Iterable[tuple[int, bytes]], version: int, name: str) -> Iterator[Event]:
    decoder = msgspec.json.Decoder(tuple[float, str, str])
    before = 0.0
    for number, line in numbered:
        if line.startswith(b"#") or not line.strip():
            continue
        try:
            time, code, data = decoder.decode(line[:_LONGEST])
        except (msgspec.MsgspecError, UnicodeDecodeError):
            if not line.endswith(b"\n"):
                return  # its recorder was killed
            raise ConsoleError(f"{name}: line {number} is no event") from None
        wait = time if version == 3 else time - before
        before = time
        yield Event(max(0.0, wait) if math.isfinite(wait) else 0.0, code, data)
