"""The daemon's side of the monitor socket: whom it answers, and what waits to be sent."""

from __future__ import annotations

import errno
import os
import selectors
import socket
from collections.abc import Callable, Iterable
from contextlib import suppress

import msgspec

from . import custody, monitor
from .admission import Sparing, refusal
from .errors import ConsoleError
from .monitor import Done, Request, Status

#: Clients served at once; one more takes the place of the oldest.
MOST_CLIENTS = 16

#: Bytes a request may have.
LARGEST_REQUEST = 1 << 16

#: Descriptors that may come with it.
MOST_FDS = 4

#: Bytes of replies kept for a client that does not read them; then it is dropped.
MOST_UNREAD = 1 << 22


class _Client:
    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.received = bytearray()
        self.fds: list[int] = []  # that came with it
        self.unsent = bytearray()


class Visitor(msgspec.Struct, array_like=True):
    """A client that another program goes on with: what it asked and was not sent yet."""

    fd: int
    received: bytes
    unsent: bytes


class Server:
    """Answers clients from the caller's selector, whose keys carry a callable as data.

    Those are processes of the daemon's user or root; all others are hung up on.
    `listener` is a non-blocking listening socket's descriptor, which stays the caller's. `answer`
    is given the descriptors that came with a request, of which it takes those that it keeps, and
    may raise ConsoleError, whose text the client gets as a Failure.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        listener: int,
        answer: Callable[[Request, list[int]], Status | Done],
        visitors: Iterable[Visitor] = (),
    ) -> None:
        self._selector = selector
        self._listener = listener
        self._answer = answer
        self._clients: dict[int, _Client] = {}
        self._spare: int | None = None
        self._refusals = Sparing()
        self._take_spare()
        selector.register(listener, selectors.EVENT_READ, self._accept)
        for visitor in visitors:
            client = self._welcome(socket.socket(fileno=visitor.fd))
            client.received += visitor.received
            client.unsent += visitor.unsent
            self._flush(client)

    def hand_over(self) -> list[Visitor]:
        """Stop listening; return the clients, who are the caller's from now on."""
        clients = [*self._clients.values()]
        for client in clients:
            self._selector.unregister(client.connection)
        self._clients.clear()
        self.close()
        return [
            Visitor(each.connection.detach(), bytes(each.received), bytes(each.unsent))
            for each in clients
        ]

    def close(self) -> None:
        """Drop every client and stop listening."""
        self._selector.unregister(self._listener)
        for client in list(self._clients.values()):
            self._drop(client)
        self._give_spare()

    def _take_spare(self) -> None:
        with suppress(OSError):
            self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def _give_spare(self) -> None:
        spare, self._spare = self._spare, None
        if spare is not None:
            os.close(spare)

    def _accept(self) -> None:
        borrowed = socket.socket(fileno=self._listener)
        try:
            connection, _ = borrowed.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._turn_away(borrowed)
            return
        finally:
            borrowed.detach()
        # Who may reach the socket by its mode is not the question: only these may command.
        if (why := refusal(connection, {0, os.geteuid()})) is not None:
            connection.close()
            self._refusals.warn(f"a command was refused: {why}")
            return
        if len(self._clients) >= MOST_CLIENTS:
            self._drop(next(iter(self._clients.values())))
        self._welcome(connection)

    def _welcome(self, connection: socket.socket) -> _Client:
        connection.setblocking(False)
        client = _Client(connection)
        self._clients[connection.fileno()] = client
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._serve(client))
        return client

    def _turn_away(self, listener: socket.socket) -> None:
        """Hang up on a client there is no descriptor for, or the listener stays readable."""
        self._give_spare()
        with suppress(OSError):
            listener.accept()[0].close()
        self._take_spare()

    def _drop(self, client: _Client) -> None:
        del self._clients[client.connection.fileno()]
        self._selector.unregister(client.connection)
        client.connection.close()
        custody.close(client.fds)

    def _serve(self, client: _Client) -> None:
        if self._clients.get(client.connection.fileno()) is not client:
            return  # dropped since it was found ready
        try:
            alive = self._flush(client) and self._read(client)
        except OSError:
            alive = False
        if not alive:
            self._drop(client)

    def _read(self, client: _Client) -> bool:
        try:
            data, fds, _ = custody.receive_fds(client.connection, LARGEST_REQUEST)
        except BlockingIOError:
            return True
        client.fds += fds
        *requests, client.received = (client.received + data).split(b"\n")
        for request in requests:
            client.unsent += self._reply(request, client.fds)
            custody.close(client.fds)
            client.fds.clear()
            if not self._flush(client):
                return False
        few = len(client.fds) <= MOST_FDS and len(client.received) < LARGEST_REQUEST
        return bool(data) and few

    def _reply(self, line: bytearray, fds: list[int]) -> bytes:
        try:
            return monitor.encode(self._answer(monitor.decode(line), fds))
        except ConsoleError as error:
            return monitor.encode(monitor.Failure(monitor.text(str(error))))

    def _flush(self, client: _Client) -> bool:
        """Send what can be sent; tell whether the client reads fast enough to be kept."""
        with suppress(BlockingIOError):
            while client.unsent:
                del client.unsent[: client.connection.send(client.unsent)]
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.unsent else 0)
        key = self._selector.get_key(client.connection)
        if key.events != wanted:
            self._selector.modify(client.connection, wanted, key.data)
        return len(client.unsent) <= MOST_UNREAD
