"""What ports' logs have of their output, and when that came: all their files, in any format.

Where a raw log has an index, that says which bytes of which journal are there, too: from one entry
to the next there are as many bytes as offsets, or there is a gap in between, with its notice.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from base64 import b64decode
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from datetime import datetime
from itertools import pairwise
from typing import IO, NamedTuple

from .. import archive
from ..errors import ConsoleError
from ..logs import ENTRY
from .looking import Span

#: Bytes of a log read at a time, and the longest line that is looked at as one.
_CHUNK = 1 << 16
_LONGEST_LINE = 1 << 18

#: So much is searched for the notice of a gap.
_MOST_SEARCHED = 1 << 23

_STAMP = re.compile(rb"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z) ")

#: What stands in a log where bytes are missing.
_GAP = re.compile(rb"\r\n\[vhost-device-console: (\d+) bytes missed\]\r\n")

_File = IO[bytes] | gzip.GzipFile


class Piece(NamedTuple):
    """Output that came at that moment, nanoseconds since 1970, None where nobody knows.

    Or `missed` bytes that are not there.
    """

    at: int | None
    data: bytes
    missed: int = 0


def _utc(text: bytes | str) -> int:
    """Return a time as a log has it, as nanoseconds since 1970; raises ValueError."""
    given = text if isinstance(text, str) else text.decode()
    return round(datetime.fromisoformat(given).timestamp() * 1_000_000) * 1000


# The index


class Index:
    """When bytes came: `moments` are pairs of an offset and nanoseconds since 1970, both rising."""

    def __init__(self, moments: list[tuple[int, int]]) -> None:
        self._offsets: list[int] = []
        self._times: list[int] = []
        # The last to say something of an offset is right: a file may have been cut off.
        kept: list[tuple[int, int]] = []
        for offset, moment in sorted(moments, key=lambda each: each[1], reverse=True):
            if not kept or offset < kept[-1][0]:
                kept.append((offset, moment))
        for offset, moment in reversed(kept):
            self._offsets.append(offset)
            self._times.append(moment)

    def __bool__(self) -> bool:
        return bool(self._offsets)

    def split(self, offset: int, data: bytes) -> Iterator[Piece]:
        """Yield `data`, which begins at `offset`, in pieces, each with when it came."""
        at = 0
        while at < len(data):
            number = bisect_right(self._offsets, offset + at)
            # What came before the first entry was there when that was made.
            moment = self._times[max(0, number - 1)] if self._offsets else None
            end = self._offsets[number] - offset if number < len(self._offsets) else len(data)
            yield Piece(moment, data[at:end])
            at = min(end, len(data))


def _entries(path: str) -> list[tuple[int, int, int, int]]:
    """Return the entries of an index (see `logs`), none when it cannot be read."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError:
        return []
    whole = data[: len(data) // ENTRY.size * ENTRY.size]
    # One with a time from before there was any is half a one.
    return [entry for entry in ENTRY.iter_unpack(whole) if entry[3] > 1 << 60]


def journal_index(log: str | None, number: int) -> Index:
    """Return when the bytes of the journal with that number came, as the log beside it knows."""
    found = []
    if log is not None:
        for _, index in archive.files(os.path.realpath(log)):
            found += [(at, moment) for _, key, at, moment in _entries(index) if key == number]
    return Index(found)


# Logs


def log_pieces(path: str) -> Iterator[Piece]:
    """Yield all output in the files of the log at `path`, oldest first, whatever their format.

    A file of another name, an old one, is one file. Raises ConsoleError when one cannot be read.
    """
    names = [*archive.files(os.path.realpath(path))]
    if not names:
        raise ConsoleError(f"cannot read {path}: no such file or directory")
    for name, index in names:
        try:
            with _open(name) as file:
                yield from _file_pieces(file, index)
        except (OSError, EOFError, zlib.error) as error:
            reason = (getattr(error, "strerror", None) or str(error)).lower()
            raise ConsoleError(f"cannot read {name}: {reason}") from error


def _open(name: str) -> IO[bytes] | gzip.GzipFile:
    if name.endswith(".gz"):
        return gzip.open(name, "rb")
    return open(name, "rb")


def _file_pieces(file: IO[bytes] | gzip.GzipFile, index: str) -> Iterator[Piece]:
    first = file.readline(_LONGEST_LINE)
    if _STAMP.match(first):
        yield from _stamped_pieces(first, file)
    elif _object(first) is not None:
        yield from _object_pieces(first, file)
    else:
        times = Index([(size, moment) for size, _, _, moment in _entries(index)])
        at = 0
        data = first
        while data:
            yield from times.split(at, data)
            at += len(data)
            data = file.read(_CHUNK)


def _lines(first: bytes, file: IO[bytes] | gzip.GzipFile) -> Iterator[bytes]:
    line = first
    while line:
        yield line
        line = file.readline(_LONGEST_LINE)


def _stamped_pieces(first: bytes, file: IO[bytes] | gzip.GzipFile) -> Iterator[Piece]:
    begins = True
    at: int | None = None
    for line in _lines(first, file):
        match = _STAMP.match(line) if begins else None
        if match is not None:
            with suppress(ValueError):
                at = _utc(match[1])
        yield Piece(at, line[match.end() if match else 0 :])
        begins = line.endswith(b"\n")


def _object(line: bytes) -> tuple[int, bytes, int] | None:
    """Return the moment, the bytes and the gap of an object; None when it is none of a log."""
    try:
        said = json.loads(line)
        data = b64decode(said["base64"]) if "base64" in said else said.get("text", "").encode()
        return _utc(said["time"]), data, int(said.get("missed", 0))
    except (ValueError, LookupError, TypeError, AttributeError):
        return None


def _object_pieces(first: bytes, file: IO[bytes] | gzip.GzipFile) -> Iterator[Piece]:
    for line in _lines(first, file):
        said = _object(line)
        if said is None:  # half a one, for want of room: the whole is in the next file
            continue
        yield Piece(*said)


# What a journal does not keep any more


class UnknownError(Exception):
    """The log does not tell, for this reason."""


def before(path: str, journal: int, since: int, until: int) -> Iterator[Span]:
    """Yield what the log at `path` has of a journal from the offset `since` up to `until`.

    In order, and what it does not have is left out. Raises UnknownError when it cannot be read, or
    has no index.
    """
    with ExitStack() as stack:
        files = _Files(path, stack)
        points = _points(files, journal)
        if not any(offset is not None for _, offset in points):
            raise UnknownError("its log has no index of them")
        for (place, offset), (end, then) in pairwise([*points, (files.size, None)]):
            if offset is not None and offset < until:
                for at, begin, count in _whole(files, place, offset, end, then):
                    skipped = max(0, since - at)
                    yield from files.spans(
                        at + skipped, begin + skipped, min(count, until - at) - skipped
                    )


class _Files:
    """The files of a log as one; raises UnknownError when they cannot be read."""

    def __init__(self, path: str, stack: ExitStack) -> None:
        self.indices: list[tuple[int, int, str]] = []  # where each file begins and ends
        self._files: list[tuple[int, int, _File]] = []
        self.size = 0
        seen = set()
        name = path
        try:
            for name, index in archive.files(os.path.realpath(path)):
                file = _open(name)
                stack.callback(file.close)
                status = os.fstat(file.fileno())
                if (status.st_dev, status.st_ino) in seen:  # it was rotated meanwhile
                    continue
                seen.add((status.st_dev, status.st_ino))
                begin = self.size
                self.size += file.seek(0, os.SEEK_END)
                self._files.append((begin, self.size, file))
                self.indices.append((begin, self.size, index))
        except (OSError, EOFError, zlib.error) as error:
            reason = (getattr(error, "strerror", None) or str(error)).lower()
            raise UnknownError(f"its log {name} cannot be read: {reason}") from error
        if not self._files:
            raise UnknownError(f"its log {path} is not there")

    def read(self, start: int, end: int) -> Iterator[bytes]:
        """Yield the bytes between two places."""
        for begin, over, file in self._files:
            at, stop = max(start, begin), min(end, over)
            if at < stop:
                file.seek(at - begin)
            while at < stop and (data := file.read(min(stop - at, _CHUNK))):
                at += len(data)
                yield data

    def spans(self, offset: int, place: int, count: int) -> Iterator[Span]:
        """Yield `count` bytes from `place` on as those from `offset` on."""
        for data in self.read(place, place + count):
            yield Span(offset, data)
            offset += len(data)


def _points(files: _Files, journal: int) -> list[tuple[int, int | None]]:
    """Return places in the log with the journal's offset there, None where it is another's."""
    points = []
    for begin, end, index in files.indices:
        for size, number, offset, _ in _entries(index):
            if begin + size <= end:  # else it was cut off since
                points.append((begin + size, offset if number == journal else None))
    return sorted(points, key=lambda point: point[0])


def _whole(
    files: _Files, place: int, offset: int, end: int, then: int | None
) -> Iterator[tuple[int, int, int]]:
    """Yield offsets, places and counts of what is between two points, none of it in doubt."""
    if then is not None and then - offset == end - place:
        yield offset, place, end - place
        return
    if end - place > _MOST_SEARCHED:
        return
    text = b"".join(files.read(place, end))
    found = []
    at = 0
    for match in _GAP.finditer(text):
        found.append((offset, place + at, match.start() - at))
        offset += match.start() - at + int(match[1])
        at = match.end()
    found.append((offset, place + at, len(text) - at))
    # A guest may write what looks like a notice.
    if then is None or offset + len(text) - at == then:
        yield from found if then is not None else found[:1]
