"""A link to a console: what is attached over the monitor socket, seen from the program's side.

Nothing here blocks but `connect`. Output comes once and in order, whatever became of the worker or
the daemon meanwhile, and what is missing is told as a gap. Input is kept until it is acknowledged.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator

import msgspec

from .. import attachment, monitor
from ..attachment import Acknowledged, Ask, AskWho, Bye, Hello, Resumed, Role, Size, Who
from ..errors import ConsoleError
from ..words import clean

#: Records taken before the caller has a turn.
_AT_ONCE = 64


class Gap(msgspec.Struct):
    """So many bytes are missing here, None if nobody knows: the daemon has begun anew."""

    missing: int | None


class Dropped(msgspec.Struct):
    """So many bytes that were typed never reached the port: another has the writer's role.

    Or nobody knows whether they did, since the daemon that they went to is gone.
    """

    typed: int


News = Gap | Dropped | Hello | Role | Size | Who | Bye
Event = memoryview | News


class LinkLostError(Exception):
    """The other side is gone: `connect` again, to go on where this was."""


class Link:
    """Somebody attached as `request` says; `at` is the offset of the next byte of output.

    `writer` says whether what is typed counts.
    """

    def __init__(self, request: monitor.Attach) -> None:
        self.request = request
        self.at: int | None = request.since
        self.journal = request.journal
        self.writer = False
        self._sock: socket.socket | None = None
        self._record = memoryview(bytearray(attachment.LARGEST))
        self._unsure = 0  # bytes that were typed before the last connection was lost
        self._greeted = False
        self._begin_typing(0, 0)

    def _begin_typing(self, epoch: int, offset: int) -> None:
        self._epoch = epoch
        self._offset = offset  # of the first byte that is not acknowledged
        self._typed = bytearray()  # from there on
        self._sent = 0  # of those
        self._due: dict[type, bytes] = {}  # of each kind of question the latest

    def connect(self, path: str) -> None:
        """Attach by the daemon behind the monitor socket `path`, where the last one ended.

        Raises ConsoleError when that cannot be.
        """
        self.close()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            ours.setblocking(False)
            request = msgspec.structs.replace(self.request, since=self.at, journal=self.journal)
            try:
                monitor.attach(path, request, theirs)
            except BaseException:
                ours.close()
                raise
        self.adopt(ours)

    def adopt(self, sock: socket.socket) -> None:
        """Go on over `sock`, which does not block and whose other end is attached already."""
        self._sock = sock
        self._unsure = len(self._typed)
        self._greeted = False
        self._begin_typing(0, 0)

    def fileno(self) -> int:
        """Return the descriptor to wait on, -1 when it is not connected."""
        return -1 if self._sock is None else self._sock.fileno()

    @property
    def wants_room(self) -> bool:
        """Whether something waits to be sent."""
        return bool(self._due) or self._sent < len(self._typed)

    @property
    def unacknowledged(self) -> int:
        """How many bytes that were typed have not reached the port, as far as is known."""
        return len(self._typed)

    def close(self) -> None:
        """Hang up."""
        self.writer = False
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    # What comes

    def receive(self) -> Iterator[Event]:
        """Yield what has come, at most a share of it; a memoryview, output, lasts until the next.

        Raises LinkLostError, and ConsoleError when something comes that nobody here understands.
        """
        for _ in range(_AT_ONCE):
            if self._sock is None:
                raise LinkLostError
            try:
                size = self._sock.recv_into(self._record)
            except BlockingIOError:
                return
            except OSError:
                size = 0
            if size == 0:
                self.close()
                raise LinkLostError
            try:
                told = attachment.told(self._record[:size])
            except ValueError:
                self.close()
                raise ConsoleError(
                    f"the daemon of {clean(self.request.guest)} says what this command does not "
                    "know: use one of the daemon's version"
                ) from None
            yield from self._take(told)

    def _take(self, told: attachment.Told | attachment.Output) -> Iterator[Event]:
        if isinstance(told, attachment.Output):
            yield from self._output(told)
        elif isinstance(told, Acknowledged):
            self._acknowledged(told.read)
        elif isinstance(told, Resumed):
            self._acknowledged(told.read)
            self._sent = 0
            self.flush()
        elif isinstance(told, Role):
            yield from self._role(told)
        elif not isinstance(told, Hello):
            yield told
        elif not self._greeted:  # a killed worker's successor may not know that it was
            yield from self._hello(told)
            yield told

    def _hello(self, hello: Hello) -> Iterator[Event]:
        self._greeted = True
        if self.at is not None and self.journal not in (0, hello.journal):
            yield Gap(None)
        elif self.at is not None and hello.at > self.at:
            yield Gap(hello.at - self.at)
        self.at, self.journal = hello.at, hello.journal
        if self._unsure:
            yield Dropped(self._unsure)
            self._unsure = 0

    def _output(self, output: attachment.Output) -> Iterator[Event]:
        at = output.offset if self.at is None else self.at
        if output.offset > at:
            yield Gap(output.offset - at)
            at = output.offset
        # What a killed worker had sent, its successor may send again.
        data = output.data[at - output.offset :]
        self.at = at + len(data)
        if data:
            yield data

    def _acknowledged(self, read: int) -> None:
        count = max(0, read - self._offset)
        del self._typed[:count]
        self._offset += count
        self._sent = max(0, self._sent - count)

    def _role(self, role: Role) -> Iterator[Event]:
        self.writer = role.writer
        if role.epoch != self._epoch:
            self._acknowledged(role.read)
            dropped = len(self._typed)
            due = self._due
            self._begin_typing(role.epoch, role.read)
            self._due = due
            if dropped:
                yield Dropped(dropped)
        yield role

    # What goes

    def type(self, data: bytes) -> int:
        """Type as much of `data` as there is room for; return how many bytes."""
        if not self.writer:
            return 0
        part = data[: attachment.WINDOW - len(self._typed)]
        self._typed += part
        self.flush()
        return len(part)

    def ask(self, question: Ask | AskWho | Size) -> None:
        """Ask something, or say how large the terminal is now."""
        self._due.pop(type(question), None)
        self._due[type(question)] = attachment.encode(question)
        if isinstance(question, Size):
            self.request.columns, self.request.rows = question.columns, question.rows
        self.flush()

    def flush(self) -> None:
        """Send what can be sent; if something is left, `wants_room`."""
        if self._sock is None:
            return
        try:
            while self._due:
                kind, record = next(iter(self._due.items()))
                self._sock.send(record, socket.MSG_NOSIGNAL)
                del self._due[kind]
            while self._sent < len(self._typed):
                data = self._typed[self._sent : self._sent + attachment.MOST_INPUT]
                header = attachment.input_header(self._epoch, self._offset + self._sent)
                self._sock.send(header + data, socket.MSG_NOSIGNAL)
                self._sent += len(data)
        except OSError:  # no room for now; or it is gone, which `receive` will find
            return
