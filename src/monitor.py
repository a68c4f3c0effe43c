"""The monitor socket: what a daemon says about itself and does for a command, and how to ask.

One socket per daemon. A message is one line of JSON with a `type`; a client may send any number of
requests and gets one reply to each, in order.
"""

from __future__ import annotations

import os
import re
import socket
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Annotated

import msgspec

from .claims import remove_if_stale
from .config import PortTable
from .errors import ConfigError, ConsoleError
from .health import Privileges

#: Seconds a daemon has to answer a command.
ANSWER_WITHIN = 5.0

_NAME = "vhost-device-console"

#: For those without a folder of their own; whose a folder there is, is looked at.
_TEMPORARY = "/tmp"  # noqa: S108

#: Other sockets may lie in the same folder, and asking is not for them.
_OWN_NAME = re.compile(r"[0-9]+\.sock")


#: A number of characters: what a le16 of the console's has room for.
_Characters = Annotated[int, msgspec.Meta(ge=0, le=(1 << 16) - 1)]

#: A number of bytes, or of a journal.
_Word = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


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


class Attach(msgspec.Struct, tag_field="type", tag="attach", kw_only=True):
    """Attach to a port: its name or its id as text, its id as a number, None for the console.

    With the request comes one end of a SOCK_SEQPACKET pair, on which the two sides talk as in
    `attachment`. What the rest means stands at `custody.Attach`.
    """

    guest: str
    port: str | int | None = None
    name: Annotated[str, msgspec.Meta(max_length=64)]
    write: bool = True
    replay: _Word | None = None
    since: _Word | None = None
    journal: _Word = 0
    columns: _Characters = 0
    rows: _Characters = 0
    look: bool = False


Change = PortAdd | PortRemove | Resize
Request = StatusRequest | Change | Attach


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
    lag: int = 0


class Services(msgspec.Struct, kw_only=True):
    """How long it took to serve what woke a worker up, as in `health.Health`.

    `counts` are how often it took no longer than each of `bounds`, in seconds, and longer than the
    one before; the last count is for anything longer. `seconds` is the sum.
    """

    bounds: list[float]
    counts: list[int]
    seconds: float


class GuestStatus(msgspec.Struct, kw_only=True):
    """One guest.

    `daemon` and `worker` are process ids. `uptime` is the worker's age in seconds, `rss` its
    resident bytes, `cpu` its share of one processor in percent since it was last asked, all None
    when there is no worker. `frontend` and what follows it are as in `health.Health`, the counters
    over all workers so far. `died` says why the last worker fell, None while none did.
    `cpu_seconds` is what all workers have used, None when it cannot be had now.
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
    cpu_seconds: float | None = None
    services: Services | None = None


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


def encode(message: Request | Reply) -> bytes:
    """Return `message` as the line that it is sent as."""
    return _encoder.encode(message) + b"\n"


def decode(line: bytearray) -> Request:
    """Return the request that `line` is; raises ConsoleError."""
    try:
        return _request.decode(line)
    except _UNREADABLE as error:
        raise ConsoleError(str(error)) from error


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


def _is_trusted(status: os.stat_result) -> bool:
    """Say whether nobody but this user and root can put anything into that folder."""
    roots = status.st_uid == 0 and not status.st_mode & 0o022
    return stat.S_ISDIR(status.st_mode) and (status.st_uid == os.geteuid() or roots)


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
            if me != 0 and not _is_trusted(os.lstat(folder)):
                continue
            for entry in os.scandir(folder):
                inner: Iterable[os.DirEntry[str]] = [entry]
                if entry.is_dir(follow_symlinks=False):
                    mine = me in (0, entry.stat(follow_symlinks=False).st_uid)
                    inner = os.scandir(entry.path) if mine else []
                found += [e.path for e in inner if _OWN_NAME.fullmatch(e.name)]
    return [path for path in sorted(found) if not remove_if_stale(path)]


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


def attach(path: str, request: Attach, connection: socket.socket) -> None:
    """Have the daemon behind the monitor socket `path` attach the other end of `connection`.

    Which stays the caller's. Raises ConsoleError when it does not.
    """
    reply = _exchange(path, request, connection.fileno())
    if not isinstance(reply, Done):
        message = reply.message if isinstance(reply, Failure) else f"no answer from {path}"
        raise ConsoleError(message)


def _exchange(path: str, request: Request, *fds: int) -> Reply:
    try:
        line = encode(request)
    except UnicodeEncodeError as error:
        raise ConsoleError(f"{error.object!r} is not UTF-8: no daemon can be told of it") from None
    received = bytearray()
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(ANSWER_WITHIN)
            client.connect(path)
            sent = socket.send_fds(client, [line], fds)
            if sent < len(line):  # whoever has read it all may have answered, and hung up
                client.sendall(line[sent:])
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
