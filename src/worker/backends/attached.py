"""Clients who speak the attachment protocol: a person's command, a page's or a shell's gateway.

What they typed and was not taken they type again to a successor, and output has offsets: whoever is
killed, nothing is lost or comes twice. See `attachment`.
"""

from __future__ import annotations

import contextlib
import os
import socket
from socket import MSG_DONTWAIT, MSG_NOSIGNAL, MSG_PEEK

from ... import attachment
from ...attachment import Acknowledged, Ask, AskWho, Bye, Resumed, Role, Told
from .stream import StreamClient, adopt

# Every call says itself that it does not wait: whoever sent this end may have kept it, too, and
# make it one that waits.

#: What a client asks without waiting for an answer before it is hung up on, unless it reads.
_MOST_ASKED = 64


class Attached(StreamClient):
    """One such client, whose terminal has `columns_rows`; its owner answers with `tell`.

    `asked` are its questions, and `resized` says that its size is another. What it types counts
    while it is the `writer`, if it was typed in that `epoch`. `at` is where in the output the next
    bytes to be written stand, and `read_to` how far in what it typed the last read went; both are
    the owner's to set at first.
    """

    framed = True

    def __init__(self, sock: socket.socket, name: str, columns_rows: tuple[int, int]) -> None:
        super().__init__(sock, name)
        self.columns_rows = columns_rows
        self.writer = False
        self.epoch = 0
        self.at = 0
        self.read_to = 0
        self.asked: list[Ask | AskWho] = []
        self.resized = False
        self._due: dict[type[Told], bytes] = {}
        self._scratch = memoryview(bytearray(attachment.MOST_INPUT + 64))

    @property
    def due(self) -> bool:
        """Whether it has to be told something."""
        return bool(self._due)

    # The output half

    def play(self, by: str, *, writer: bool, epoch: int) -> None:
        """Take a role from now on, while `by` has the writer's."""
        self.writer, self.epoch = writer, epoch
        self.tell(Role(writer=writer, epoch=epoch, read=self.read_to, by=by))

    def tell(self, message: Told) -> None:
        """Have it told before its next output: of each kind the latest."""
        self._due.pop(type(message), None)  # what is said later counts more
        self._due[type(message)] = attachment.encode(message)

    def say(self) -> bool:
        """Tell it what is due; return whether that was all."""
        while self._due:
            kind, record = next(iter(self._due.items()))
            try:
                self._sock.send(record, MSG_NOSIGNAL | MSG_DONTWAIT)
            except BlockingIOError:
                return False
            del self._due[kind]
        return True

    def write(self, data: memoryview | bytes) -> int:
        """See `Client.write`; the bytes stand at `at`."""
        piece = data[: attachment.MOST_OUTPUT]
        header = attachment.output_header(self.at)
        try:
            self._sock.sendmsg([header, piece], [], MSG_NOSIGNAL | MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        return len(piece)

    # The input half

    def resumed(self) -> None:
        """Have it type again what no predecessor has taken."""
        self.tell(Resumed(self.read_to))

    def read(self, into: list[memoryview]) -> int | None:
        """See `Client.read`. A client that makes no sense is gone, too."""
        typed = self.waiting()
        if typed is None:
            return None
        count = 0
        for span in into:
            part = typed[count : count + len(span)]
            span[: len(part)] = part
            count += len(part)
            if count == len(typed):
                self._take()  # else the rest of the record is read once there is room
                break
        self.read_to += count
        self.tell(Acknowledged(self.read_to))
        return count

    def waiting(self) -> memoryview | None:
        """Return what it has typed and `read` would take, None when there is nothing.

        What it asks before that is heard. Raises ConnectionError as `read` does.
        """
        while True:
            try:
                size = self._sock.recv_into(self._scratch, 0, MSG_PEEK | MSG_DONTWAIT)
            except BlockingIOError:
                return None
            except OSError as error:
                raise ConnectionResetError(str(error)) from None
            if size == 0:
                raise ConnectionResetError("the client has hung up")
            try:
                said = attachment.said(self._scratch[:size])
            except ValueError as error:
                raise ConnectionResetError(str(error)) from None
            if isinstance(said, attachment.Input):
                if typed := self._new_part(said):
                    return typed
                self._take()
            else:
                self._take()
                self._hear(said)
                return None

    def _take(self) -> None:
        """Take the record that was looked at."""
        try:
            self._sock.recv(1, MSG_DONTWAIT)
        except OSError as error:  # somebody else has taken it
            raise ConnectionResetError(str(error)) from None

    def _hear(self, said: attachment.Said) -> None:
        if isinstance(said, attachment.Size):
            self.columns_rows = (said.columns & 0xFFFF, said.rows & 0xFFFF)
            self.resized = True
        elif len(self.asked) < _MOST_ASKED:
            self.asked.append(said)
        else:
            raise ConnectionResetError("it asks and asks")

    def _new_part(self, typed: attachment.Input) -> memoryview:
        """Return what of it was not taken before; it comes again if something before it is missing.

        Nothing counts that was typed before it had learned whether it may.
        """
        if not self.writer or typed.epoch != self.epoch or typed.offset > self.read_to:
            return self._scratch[:0]
        return typed.data[self.read_to - typed.offset :]

    def size(self) -> tuple[int, int]:
        """Return its terminal's size."""
        return self.columns_rows

    def end_output(self) -> int:
        """See `Client.end_output`: what did not arrive it will ask for again."""
        return 0

    def close(self) -> None:
        """Say goodbye, and let it go."""
        if self.writes < 0:
            return
        with contextlib.suppress(OSError):
            self.tell(Bye("the console is gone"))
            self.say()
            self._sock.shutdown(socket.SHUT_RDWR)
        os.close(self.writes)
        self.reads = self.writes = -1
        self._sock.close()


def client(fd: int, name: str, columns_rows: tuple[int, int]) -> Attached:
    """Return the client of a connected SOCK_SEQPACKET socket, and own it; see `stream.adopt`."""
    return adopt(fd, lambda sock: Attached(sock, name, columns_rows))
