"""The monitor socket: what a daemon says about itself and does for a command, and how to ask.

One socket per daemon. A message is one line of JSON with a `type`; a client may send any number of
requests and gets one reply to each, in order.
"""

from __future__ import annotations

import errno
import os
import re
import selectors
import socket
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Annotated

import msgspec

from . import endpoints
from .admission import Sparing, refusal
from .config import PortTable
from .errors import ConfigError, ConsoleError
from .health import Privileges

#: Clients served at once; one more takes the place of the oldest.
MOST_CLIENTS = 16

#: Bytes a request may have.
LARGEST_REQUEST = 1 << 16

#: Bytes of replies kept for a client that does not read them; then it is dropped.
MOST_UNREAD = 1 << 22

#: Seconds a daemon has to answer a command.
ANSWER_WITHIN = 5.0

_NAME = "vhost-device-console"

#: For those without a folder of their own; whose a folder there is, is looked at.
_TEMPORARY = "/tmp"  # noqa: S108

#: Other sockets may lie in the same folder, and asking is not for them.
_OWN_NAME = re.compile(r"[0-9]+\.sock")


#: A number of characters: what a le16 of the console's has room for.
_Characters = Annotated[int, msgspec.Meta(ge=0, le=(1 << 16) - 1)]


class StatusRequest(msgspec.Struct, tag_field="type", tag="status"):
    """Ask how every guest is."""


class PortAdd(msgspec.Struct, tag_field="type", tag="port-add"):
    """Give a running guest another port."""

    guest: str
    port: PortTable


class PortRemove(msgspec.Struct, tag_field="type", tag="port-remove"):
    """Take a port from a running guest; `port` is its id or its name."""

    guest: str
    port: str


class Resize(msgspec.Struct, tag_field="type", tag="resize"):
    """Give a console port, its id or its name, a size; 0 x 0 leaves it to the clients again."""

    guest: str
    port: str
    columns: _Characters
    rows: _Characters


Change = PortAdd | PortRemove | Resize
Request = StatusRequest | Change


class PortStatus(msgspec.Struct, kw_only=True):
    """One port: what it is, and all of `health.PortHealth`, its counters over all workers so far.

    `endpoint` is where people attach: `127.0.0.1:12345`, a path, or `terminal`. `log` is the path
    of its log, if it has one, which cannot be written now if `log_failing`.
    """

    id: int
    name: str
    endpoint: str
    console: bool
    overflow: str
    state: str
    open: bool
    host_open: bool
    held: bool
    readers: int
    output: int
    input: int
    missed: int
    discarded: int
    stalls: int
    columns: int
    rows: int
    size_by: str
    log: str | None = None
    log_failing: bool = False


class GuestStatus(msgspec.Struct, kw_only=True):
    """One guest.

    `daemon` and `worker` are process ids. `uptime` is the worker's age in seconds, `rss` its
    resident bytes, `cpu` its share of one processor in percent since it was last asked, all None
    when there is no worker. `frontend` and what follows it are as in `health.Health`, the counters
    over all workers so far. `died` says why the last worker fell, None while none did.
    """

    name: str
    socket: str
    state: str
    daemon: int
    worker: int | None
    frontend: int | None
    uptime: float | None
    restarts: int
    rss: int | None
    cpu: float | None
    sessions: int
    kicks: int
    calls: int
    chains: int
    refused: int
    broken: int
    ignored: int
    max_ports: int
    privileges: Privileges | None = None
    died: str | None = None
    ports: list[PortStatus]


class Status(msgspec.Struct, tag_field="type", tag="status", kw_only=True):
    """The reply to `StatusRequest`."""

    version: str
    guests: list[GuestStatus]


class Done(msgspec.Struct, tag_field="type", tag="done"):
    """The reply to a change that was made; `message` says in a line what there is now."""

    message: str


class Failure(msgspec.Struct, tag_field="type", tag="failure"):
    """The reply to a request that makes no sense or cannot be met; `message` is a line."""

    message: str


Reply = Status | Done | Failure

#: What a decoder raises: nothing that is read may go deeper than Python itself.
_UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)

_encoder = msgspec.json.Encoder()
_request: msgspec.json.Decoder[Request] = msgspec.json.Decoder(Request)
_reply: msgspec.json.Decoder[Reply] = msgspec.json.Decoder(Reply)


def plain(guests: list[GuestStatus]) -> object:
    """Return `guests` as lists and dicts, for json."""
    return msgspec.to_builtins(guests)


def text(name: str) -> str:
    """Return a path or name as text that JSON can carry, undecodable bytes spelled out."""
    return os.fsencode(name).decode(errors="backslashreplace")


def folders(environ: Mapping[str, str], uid: int) -> list[str]:
    """Return where monitor sockets of user `uid` may be, best place first.

    systemd's $RUNTIME_DIRECTORY alone counts when it is given.
    """
    given = environ.get("RUNTIME_DIRECTORY")
    if given:
        return [given.split(":")[0]]
    places = []
    if session := environ.get("XDG_RUNTIME_DIR"):
        places.append(f"{session}/{_NAME}")
    places.append(f"/run/{_NAME}" if uid == 0 else f"{_TEMPORARY}/{_NAME}-{uid}")
    return places


def _is_private(folder: str) -> bool:
    status = os.lstat(folder)
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()


def own_path(environ: Mapping[str, str]) -> str:
    """Return where this process is to listen, its folder made (0700) when it is missing.

    Raises OSError or ConfigError when there is no such place.
    """
    failure: Exception = ConfigError("no runtime folder")
    for folder in folders(environ, os.geteuid()):
        try:
            with suppress(FileExistsError):
                os.mkdir(folder, 0o700)
            if _is_private(folder):
                return f"{folder}/{os.getpid()}.sock"
            failure = ConfigError(f"{folder} belongs to another user")
        except OSError as error:
            failure = error
    raise failure


def _others(environ: Mapping[str, str]) -> Iterator[str]:
    """Yield the folders of other users' daemons, some of which root has started (`--user`)."""
    if "RUNTIME_DIRECTORY" not in environ:
        for entry in os.scandir(_TEMPORARY):
            name, _, uid = entry.name.rpartition("-")
            if name == _NAME and uid == str(entry.stat(follow_symlinks=False).st_uid):
                yield entry.path


def find(environ: Mapping[str, str]) -> list[str]:
    """Return the monitor sockets of the daemons that run, by process id; remove stale ones."""
    found = []
    me = os.geteuid()
    for folder in [*folders(environ, me), *(_others(environ) if me == 0 else [])]:
        with suppress(OSError):
            # Under a service manager the folder is the service's user's, which root may ask.
            if me != 0 and not _is_private(folder):
                continue
            for entry in os.scandir(folder):
                inner = os.scandir(entry.path) if entry.is_dir(follow_symlinks=False) else [entry]
                found += [e.path for e in inner if _OWN_NAME.fullmatch(e.name)]
    return [path for path in sorted(found) if not endpoints.remove_if_stale(path)]


def ask(path: str) -> Status:
    """Return the status of the daemon behind the monitor socket `path`.

    Raises ConsoleError when it does not answer as it should.
    """
    reply = _exchange(path, StatusRequest())
    if isinstance(reply, Status):
        return reply
    raise ConsoleError(f"the daemon at {path} refused: {reply.message}")


def change(path: str, request: Change) -> str:
    """Have the daemon behind the monitor socket `path` change a guest; return what it says then.

    Raises ConsoleError when it does not, and then nothing has changed.
    """
    reply = _exchange(path, request)
    if isinstance(reply, Done):
        return reply.message
    raise ConsoleError(reply.message if isinstance(reply, Failure) else f"no answer from {path}")


def _exchange(path: str, request: Request) -> Reply:
    try:
        line = _encoder.encode(request) + b"\n"
    except UnicodeEncodeError as error:
        raise ConsoleError(f"{error.object!r} is not UTF-8: no daemon can be told of it") from None
    received = bytearray()
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(ANSWER_WITHIN)
            client.connect(path)
            client.sendall(line)
            while not received.endswith(b"\n"):
                data = client.recv(1 << 16)
                if not data:
                    raise ConsoleError(f"the daemon at {path} hung up")
                received += data
        return _reply.decode(received)
    except TimeoutError:
        raise ConsoleError(f"the daemon at {path} does not answer") from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConsoleError(f"cannot ask the daemon at {path}: {reason}") from error
    except _UNREADABLE as error:
        raise ConsoleError(f"no answer from {path}: {error}") from error


class _Client:
    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.received = bytearray()
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
    may raise ConsoleError, whose text the client gets as a Failure.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        listener: int,
        answer: Callable[[Request], Status | Done],
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
            data = client.connection.recv(LARGEST_REQUEST)
        except BlockingIOError:
            return True
        *requests, client.received = (client.received + data).split(b"\n")
        for request in requests:
            client.unsent += self._reply(request)
            if not self._flush(client):
                return False
        return bool(data) and len(client.received) < LARGEST_REQUEST

    def _reply(self, request: bytearray) -> bytes:
        reply: Reply
        try:
            reply = self._answer(_request.decode(request))
        except (*_UNREADABLE, ConsoleError) as error:
            reply = Failure(text(str(error)))
        return _encoder.encode(reply) + b"\n"

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
