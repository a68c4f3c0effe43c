"""`history`: what a console has put out, to standard output, and what is said of it beside that."""

from __future__ import annotations

import base64
import json
import select
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from .. import monitor
from ..errors import ConsoleError
from ..words import clean
from .link import Gap, Link, LinkLostError
from .logged import UnknownError, before
from .looking import History, Span, history, looking, port_log
from .plain import Plain

#: Seconds between two tries to find the guest again.
_AGAIN_S = 0.2

#: A line of JSON has no more than that of the output.
_LONGEST = 1 << 16


@dataclass
class Options:
    """What to show: all from the offset `since`, the last `tail` lines or the last `most` bytes."""

    request: monitor.Attach
    since: int | None = None
    tail: int | None = None
    most: int | None = None
    follow: bool = False
    strip: bool = False
    as_json: bool = False


def show(options: Options, find: Callable[[], str]) -> None:
    """Print what `options` say; `find` returns the monitor socket of the guest's daemon.

    Raises ConsoleError, and BrokenPipeError when nobody reads.
    """
    with looking(find(), options.request) as link:
        found = history(link)
        if not options.follow:
            link.close()  # whoever reads may be slow
        start = _start(found, options)
        printer = (_Objects if options.as_json else _Bytes)(start, strip=options.strip)
        if start < found.at:
            _print_logged(found, start, port_log(found.hello, find()), printer)
        for span in _from(found.spans, start):
            printer.put(span.at, span.data)
        printer.flush()
        if options.follow:
            _follow(link, find, printer)
        printer.end()


def _start(found: History, options: Options) -> int:
    if options.since is not None:
        if options.since > found.end:
            raise ConsoleError(
                f"{clean(options.request.guest)} has put out {found.end} bytes so far, "
                f"not {options.since}"
            )
        return options.since
    if options.most is not None:
        return max(found.at, found.end - options.most)
    return found.at if options.tail is None else _last_lines(found, options.tail)


def _last_lines(found: History, count: int) -> int:
    """Return the offset at which the last `count` lines begin; the last may have no end."""
    if not count:
        return found.end
    for span in reversed(found.spans):
        at = len(span.data)
        if span is found.spans[-1] and span.data.endswith(b"\n"):
            at -= 1
        while (at := span.data.rfind(b"\n", 0, at)) >= 0:
            count -= 1
            if not count:
                return span.at + at + 1
    return found.at


def _from(spans: Iterable[Span], start: int) -> Iterator[Span]:
    for span in spans:
        if span.end > start:
            skipped = max(0, start - span.at)
            yield Span(span.at + skipped, span.data[skipped:])


def _print_logged(found: History, start: int, path: str | None, printer: _Printer) -> None:
    """Print what a log has of what came before the journal begins."""
    try:
        if path is None:
            raise UnknownError("it has no log")
        for span in before(path, found.hello.journal, start, found.at):
            printer.put(span.at, span.data)
    except UnknownError as error:
        _say(f"what came before offset {found.at} is not kept: {clean(str(error))}")


def _say(text: str) -> None:
    sys.stdout.flush()
    sys.stderr.write(f"[{text}]\n")
    sys.stderr.flush()


def _follow(link: Link, find: Callable[[], str], printer: _Printer) -> None:
    """Print what comes, for ever; raises BrokenPipeError once nobody reads."""
    poll = select.poll()
    poll.register(1, 0)  # says when there is no reader any more
    while True:
        fd = link.fileno()
        if fd >= 0:
            poll.register(fd, select.POLLIN)
        ready = dict(poll.poll(None if fd >= 0 else _AGAIN_S * 1000))
        if ready.get(1, 0) & (select.POLLERR | select.POLLHUP):  # a pipe's, a socket's
            raise BrokenPipeError
        try:
            if fd < 0:
                link.connect(find())
                _say("the daemon is there again")
            else:
                _print(link, printer)
        except LinkLostError:
            poll.unregister(fd)
            _say("the daemon is gone; waiting for it")
        except ConsoleError:
            if fd >= 0:
                raise
        printer.flush()


def _print(link: Link, printer: _Printer) -> None:
    for event in link.receive():
        if isinstance(event, memoryview):
            printer.put((link.at or 0) - len(event), bytes(event))
        elif isinstance(event, Gap) and event.missing is None:
            printer.begin_anew()


class _Printer(ABC):
    """Writes output to stdout and says what is missing; `at` is the offset of what comes next."""

    def __init__(self, at: int, *, strip: bool) -> None:
        self.at = at
        self.plain = Plain() if strip else None

    def put(self, at: int, data: bytes) -> None:
        """Print `data`, which is what there is from the offset `at` on."""
        if at > self.at:
            self.missing(at - self.at)
        self.at = at + len(data)
        self.write(at, data)

    def begin_anew(self) -> None:
        """Say that what follows is another daemon's, whose offsets begin anew."""
        self.missing(None)
        self.at = 0

    def flush(self) -> None:
        """See that it is read."""
        sys.stdout.flush()

    @abstractmethod
    def write(self, at: int, data: bytes, /) -> None:
        """Print what there is."""

    @abstractmethod
    def missing(self, count: int | None) -> None:
        """Say that so many bytes are missing, None if nobody knows."""

    @abstractmethod
    def end(self) -> None:
        """Print what was held back."""


class _Bytes(_Printer):
    def write(self, _: int, data: bytes, /) -> None:
        self._write(data if self.plain is None else self.plain.feed(data).encode())

    def _write(self, data: bytes) -> None:
        # Beside the text layer, whose buffer is always empty here.
        sys.stdout.buffer.write(data)

    def missing(self, count: int | None) -> None:
        _say(_missing(count))

    def end(self) -> None:
        if self.plain is not None:
            self._write(self.plain.end().encode())
        self.flush()


class _Objects(_Printer):
    """A line of JSON for each line of the output, which ends with its line feed."""

    def __init__(self, at: int, *, strip: bool) -> None:
        super().__init__(at, strip=strip)
        self._line = bytearray()
        self._line_at = at

    def write(self, at: int, data: bytes, /) -> None:
        if not self._line:
            self._line_at = at
        for part in _lines(data):
            self._line += part
            if part.endswith(b"\n") or len(self._line) >= _LONGEST:
                self._put_line()

    def _put_line(self) -> None:
        data = bytes(self._line)
        told: dict[str, object] = {"offset": self._line_at, "bytes": len(data)}
        if self.plain is not None:
            told["text"] = self.plain.feed(data)
        else:
            told["text"] = data.decode(errors="replace")
            if told["text"] != data.decode(errors="backslashreplace"):
                told["base64"] = base64.b64encode(data).decode()
        print(json.dumps(told))
        self._line_at += len(data)
        self._line.clear()

    def missing(self, count: int | None) -> None:
        if self._line:
            self._put_line()
        self._line_at = self.at + (count or 0)
        print(json.dumps({"offset": self.at, "missing": count}))

    def end(self) -> None:
        if self._line:
            self._put_line()
        self.flush()


def _lines(data: bytes) -> list[bytes]:
    lines = [line + b"\n" for line in data.split(b"\n")]
    lines[-1] = lines[-1][:-1]
    return [line for line in lines if line]


def _missing(count: int | None) -> str:
    if count is None:
        return "another daemon: what came meanwhile is not known"
    return f"{count} bytes are missing here"
