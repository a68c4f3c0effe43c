"""Looking at a console through a link, without a hand on it."""

from __future__ import annotations

import select
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from .. import monitor
from ..attachment import AskWho, Bye, Hello, Person, Size, Who
from ..errors import ConsoleError
from ..words import clean
from .link import Event, Gap, Link, LinkLostError

#: Seconds in which a console has to say something.
ANSWER_WITHIN = 10.0


@contextmanager
def looking(path: str, request: monitor.Attach) -> Iterator[Link]:
    """Give a link to the console behind the monitor socket `path`; raises ConsoleError."""
    link = Link(request)
    try:
        link.connect(path)
        yield link
    finally:
        link.close()


def events(link: Link) -> Iterator[Event]:
    """Yield all that comes; a memoryview lasts until the next.

    Raises ConsoleError when nothing comes for a while, or nothing will.
    """
    guest = clean(link.request.guest)
    while True:
        if not select.select([link.fileno()], [], [], ANSWER_WITHIN)[0]:
            raise ConsoleError(f"{guest} does not answer")
        try:
            for event in link.receive():
                if isinstance(event, Bye):
                    raise ConsoleError(f"{guest}: {clean(event.why)}")
                yield event
        except LinkLostError:
            raise ConsoleError(f"the daemon of {guest} is gone") from None


def kept(link: Link) -> Iterator[Event]:
    """Yield what comes until all has that the journal kept when the link was made, and the size."""
    head: int | None = None
    sized = False
    for event in events(link):
        if isinstance(event, Hello):
            head = event.head
        sized = sized or isinstance(event, Size)
        yield event
        if sized and head is not None and link.at is not None and link.at >= head:
            return


class Span:
    """A part of a port's output, the bytes from the offset `at` on."""

    def __init__(self, at: int, data: bytes) -> None:
        self.at = at
        self.data = data

    @property
    def end(self) -> int:
        """The offset of what comes next."""
        return self.at + len(self.data)


class History:
    """What a journal keeps: `spans`, none empty; what is between two of them is missing.

    `hello` says whose it is; `size` is the port's, (0, 0) if nobody knows it.
    """

    def __init__(self, hello: Hello, size: tuple[int, int], spans: list[Span]) -> None:
        self.hello = hello
        self.size = size
        self.spans = spans

    @property
    def at(self) -> int:
        """The offset at which it begins."""
        return self.spans[0].at if self.spans else self.hello.at

    @property
    def end(self) -> int:
        """The offset at which it ends."""
        return self.spans[-1].end if self.spans else self.hello.at


def history(link: Link) -> History:
    """Return all that `link` has to say up to now. Raises ConsoleError."""
    hello: Hello | None = None
    size = (0, 0)
    spans: list[tuple[int, bytearray]] = []
    for event in kept(link):
        if isinstance(event, Hello):
            hello = event
        elif isinstance(event, Size):
            size = (event.columns, event.rows)
        elif isinstance(event, memoryview) and link.at is not None:
            at = link.at - len(event)
            if not spans or spans[-1][0] + len(spans[-1][1]) != at:
                spans.append((at, bytearray()))
            spans[-1][1].extend(event)
        elif isinstance(event, Gap) and event.missing is None:
            spans.clear()
    if hello is None:
        raise ConsoleError(f"{clean(link.request.guest)} does not answer")
    return History(hello, size, [Span(at, bytes(data)) for at, data in spans])


def who(link: Link) -> list[Person]:
    """Return who is at the port, but for whoever asks. Raises ConsoleError."""
    link.ask(AskWho())
    for event in events(link):
        link.flush()
        if isinstance(event, Who):
            return [person for person in event.people if not person.you]
    raise AssertionError  # events ends by an error only


def port_log(hello: Hello, path: str) -> str | None:
    """Return the path of the log of the port that said hello, by the monitor socket `path`."""
    with suppress(ConsoleError):
        for guest in monitor.ask(path).guests:
            for port in guest.ports:
                if (guest.name, port.id) == (hello.guest, hello.port):
                    return port.log
    return None
