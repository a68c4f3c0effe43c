"""Recordings: what a console shows, live or kept in its journal and its logs, as asciicast v3."""

from __future__ import annotations

import os
import selectors
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime
from typing import IO

from .. import monitor
from ..attachment import Hello, Size
from ..errors import ConsoleError
from ..words import clean
from .cast import Writer
from .link import Event, Gap, Link, LinkLostError
from .logged import Index, Piece, journal_index, log_pieces
from .looking import ANSWER_WITHIN, port_log

#: Seconds between two tries to find the guest again.
_AGAIN_S = 0.2


def parse_time(text: str) -> int:
    """Return an RFC 3339 time, also without a zone or just a date, as nanoseconds since 1970.

    Raises ConsoleError.
    """
    try:
        return round(datetime.fromisoformat(text).timestamp() * 1_000_000) * 1000
    except ValueError:
        raise ConsoleError(f"{text} is no time such as 2026-11-23T12:00:00Z") from None


def export_log(
    path: str, writer: Writer, begin: int | None = None, end: int | None = None
) -> tuple[int, bool]:
    """Write what the log at `path` has from `begin` to `end`, nanoseconds since 1970, if given.

    Returns how many bytes, and whether all their times are known: one that is not is the one
    before. Raises ConsoleError.
    """
    count = 0
    known = True
    now = 0
    for piece in log_pieces(path):
        known &= piece.at is not None
        now = max(now, piece.at or 0)
        if (begin is not None and now < begin) or (end is not None and now >= end):
            continue
        if piece.missed:
            writer.mark(f"{piece.missed} bytes missing", now)
        if piece.data:
            writer.output(piece.data, now)
            count += len(piece.data)
    if not count:
        raise ConsoleError(f"{path}: there is no output in that span")
    writer.end(0, now)
    return count, known


class Recorder:
    """Records GUEST's console `port`; `find` returns its daemon's monitor socket.

    With `follow` it goes on until `stop`, or for `duration` seconds; else it has what there was
    when it came. With `stay` it waits for a daemon that is gone. Of the journal it has the last
    `replay` bytes, all if that is None, or what is from the offset `since` and up to `until`.
    """

    def __init__(
        self,
        guest: str,
        port: str | None,
        find: Callable[[], str],
        make_writer: Callable[[tuple[int, int]], Writer],
        *,
        follow: bool = True,
        stay: bool = False,
        replay: int | None = None,
        since: int | None = None,
        until: int | None = None,
        duration: float | None = None,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self._guest = guest
        self._link = Link(
            monitor.Attach(
                guest=guest,
                port=port,
                name="recorder",
                write=False,
                replay=replay if since is None else None,
            )
        )
        self._find = find
        self._make_writer = make_writer
        self._follow = follow
        self._stay = stay
        self._since = since
        self._until = until
        self._duration = duration
        self._clock = clock
        self._writer: Writer | None = None
        self._index = Index([])
        self._live_from = 0  # offset
        self._over = False
        self._labels: list[str] = []  # of markers before the next output
        self.bytes = 0
        self.why = ""

    def run(self) -> int:
        """Record; return the exit status: 0 when it ended as it was to.

        Raises ConsoleError, also when what was kept has nothing in that span.
        """
        deadline = None if self._duration is None else time.monotonic() + self._duration
        # Signals are the main thread's, and a recording of what there was ends by itself.
        heard = _signals(self) if self._follow else nullcontext()
        with heard as wakeup, selectors.DefaultSelector() as selector:
            if wakeup is not None:
                selector.register(wakeup, selectors.EVENT_READ)
            self._link.connect(self._find())
            selector.register(self._link.fileno(), selectors.EVENT_READ)
            try:
                while not self._over:
                    self._turn(selector, wakeup, deadline)
            finally:
                self._link.close()
        status = 1 if self.why else 0
        if self._writer is not None and (self._follow or self.bytes):
            at = self._clock() if self._follow else 0
            self._put_marks(at)
            self._writer.end(status, at)
        if not (self._follow or self.bytes):
            raise ConsoleError(f"{clean(self._guest)}: there is no output in that span")
        return status

    def stop(self) -> None:
        """End the recording."""
        self._over = True

    def _turn(
        self, selector: selectors.BaseSelector, wakeup: socket.socket | None, deadline: float | None
    ) -> None:
        fd = self._link.fileno()
        left = [] if deadline is None else [deadline - time.monotonic()]
        if left and left[0] <= 0:
            self.stop()
            return
        if fd < 0:
            left.append(_AGAIN_S)
        if not self._follow:
            left.append(ANSWER_WITHIN)
        ready = selector.select(min(left) if left else None)
        if not (ready or self._follow):
            raise ConsoleError(f"{clean(self._guest)} does not answer")
        for key, _ in ready:
            if key.fileobj is wakeup:
                self.stop()
                return
        if fd < 0:
            with suppress(ConsoleError):
                self._link.connect(self._find())
                selector.register(self._link.fileno(), selectors.EVENT_READ)
            return
        try:
            for event in self._link.receive():
                self._take(event)
                if self._over:
                    return
        except LinkLostError:
            selector.unregister(fd)
            if not self._stay:
                self.why = "the console is gone"
                self.stop()

    def _take(self, event: Event) -> None:
        match event:
            case memoryview():
                self._output(bytes(event))
            case Gap(None):
                self._labels.append("another daemon: what came meanwhile is not known")
            case Gap(missing):
                self._labels.append(f"{missing} bytes missing")
            case Hello():
                self._index = journal_index(port_log(event, self._find()), event.journal)
                self._live_from = event.head
                if not self._follow and self._until is None:
                    self._until = event.head
                if self._since is not None and event.at > self._since:
                    self._labels.append(f"{event.at - self._since} bytes missing")
                    self._since = None
            case Size(columns, rows):
                if self._writer is None:
                    self._writer = self._make_writer((columns, rows))
                else:
                    self._writer.resize(columns, rows, self._clock())
        at = self._link.at
        if self._until is not None and at is not None and at >= self._until and self._writer:
            self.stop()

    def _output(self, data: bytes) -> None:
        writer = self._writer
        if writer is None or self._link.at is None:
            return
        offset = self._link.at - len(data)
        if self._since is not None:
            data = data[max(0, self._since - offset) :]
            offset = self._link.at - len(data)
        if self._until is not None:
            data = data[: max(0, self._until - offset)]
        self.bytes += len(data)
        now = self._clock()
        old = data[: max(0, self._live_from - offset)]
        for piece in (*self._index.split(offset, old), Piece(now, data[len(old) :])):
            if piece.data:
                at = now if piece.at is None else min(now, piece.at)
                self._put_marks(at)
                writer.output(piece.data, at)

    def _put_marks(self, at: int) -> None:
        while self._writer is not None and self._labels:
            self._writer.mark(self._labels.pop(0), at)


@contextmanager
def _signals(recorder: Recorder) -> Iterator[socket.socket]:
    """Have Ctrl-C and the like end a recording; yield what is readable then."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        handlers = [signal.signal(number, lambda *_: recorder.stop()) for number in numbers]
        try:
            yield ours
        finally:
            for number, handler in zip(numbers, handlers, strict=True):
                signal.signal(number, handler)
            signal.set_wakeup_fd(before)


@contextmanager
def target(path: str, overwrite: bool) -> Iterator[IO[bytes]]:
    """Open a recording to be written, `-` for standard output; raises ConsoleError."""
    try:
        # Nothing is held back: what is recorded so far can be played, and outlives a kill.
        if path == "-":
            file: IO[bytes] = open(1, "wb", buffering=0, closefd=False)  # noqa: SIM115
        else:
            file = open(path, "wb" if overwrite else "xb", buffering=0)  # noqa: SIM115
    except FileExistsError:
        raise ConsoleError(f"{path} is there already: name another, or say --overwrite") from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConsoleError(f"cannot write {path}: {reason}") from error
    with file:
        try:
            yield file
        except BaseException:
            if path != "-" and os.fstat(file.fileno()).st_size == 0:
                os.unlink(path)
            raise
