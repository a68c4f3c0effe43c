"""What the master and a worker tell each other, and the descriptors that go with it.

The master keeps what a guest's worker must not lose: the connections, whole messages of the
frontend's until the worker has done what they ask for, and a snapshot of the worker as opaque
bytes. A `Commit` replaces all that was committed before it, in one datagram: a worker killed at any
moment has sent it or has not.

A message is one record of a SOCK_SEQPACKET socket pair: MessagePack, and descriptors as
SCM_RIGHTS. One that is too long for that goes as a memory file, which is then its last descriptor.

The master knows each descriptor that it keeps by a number, its *key*; so does the worker.
"""

from __future__ import annotations

import os
import socket
import stat
from array import array
from collections.abc import Iterable, Sequence
from typing import TypeVar

import msgspec

from .config import Port

#: What goes in a record; the system takes at least 200 KiB (net.core.wmem_default).
_LARGEST = 1 << 16

#: What goes in a file: many times a snapshot of all the ports and clients that there can be.
_LARGEST_FILE = 1 << 24

#: Instead of a message: it is in a file. MessagePack never uses this byte.
_IN_A_FILE = b"\xc1"

#: As many descriptors as the system lets one record have (unix(7)), and so a frontend's message.
MOST_FDS = 253

# What the master tells


class Resize(msgspec.Struct, frozen=True, tag=True):
    """Give port number `port` a size in characters; 0 x 0 leaves it to the clients again."""

    port: int
    columns: int
    rows: int


class AddPort(msgspec.Struct, frozen=True, tag=True):
    """Add a port; with it come its journal, a pty's controlling side, and its log's files.

    `logs` are the generations of those.
    """

    port: Port
    logs: list[int] = []


class RemovePort(msgspec.Struct, frozen=True, tag=True):
    """Remove port number `port`, its clients and its endpoint."""

    port: int


class LogFile(msgspec.Struct, frozen=True, tag=True):
    """Write the log of port number `port` to the file that comes along, if it is a newer one."""

    port: int
    generation: int


class Attach(msgspec.Struct, frozen=True, array_like=True):
    """How somebody attaches who speaks the attachment protocol.

    They go on at offset `since` of the journal numbered `journal`, if that is the port's, else that
    many bytes before the end, `replay`, None for all that is kept. `write` asks for the writer's
    role. Their terminal has `columns` and `rows`, 0 where it is not known. Those who only `look`
    are nobody to the guest and to the others: they hold nothing, and what they read stays unread.
    """

    name: str
    write: bool
    replay: int | None
    since: int | None
    journal: int
    columns: int
    rows: int
    look: bool = False


class ClientCame(msgspec.Struct, frozen=True, tag=True):
    """Somebody connected to port number `port`: the descriptor that comes along, kept as `key`."""

    port: int
    key: int
    attach: Attach | None = None


class FrontendCame(msgspec.Struct, frozen=True, tag=True):
    """A frontend connected: process `pid`, 0 if that cannot be known."""

    serial: int
    pid: int


class FrontendSaid(msgspec.Struct, frozen=True, tag=True):
    """A whole vhost-user message; its descriptors come along, kept as `keys`.

    `stray` says that some came inside the message and not with its first byte.
    """

    serial: int
    request: int
    reply: bool
    need_reply: bool
    payload: bytes
    stray: bool
    keys: list[int]


class FrontendGone(msgspec.Struct, frozen=True, tag=True):
    """The frontend is not there any more."""

    serial: int


class Ping(msgspec.Struct, frozen=True, tag=True):
    """Show that you are alive: answer with a `Pong`."""


class Leave(msgspec.Struct, frozen=True, tag=True):
    """End, with everything committed, and leave the rest to a successor.

    `last` says that it may be a while until there is one: clients are to have what there is.
    """

    last: bool = False


#: What the frontend did, one at a time: the next comes once this one's `serial` is committed.
FrontendEvent = FrontendCame | FrontendSaid | FrontendGone

Order = Resize | AddPort | RemovePort | LogFile | ClientCame | FrontendEvent | Ping | Leave

# What the worker tells


class Commit(msgspec.Struct, frozen=True, tag=True):
    """What a successor begins with: `snapshot` and the descriptors that it names by their `keys`.

    All others are of no use any more, but those after `newest`, the last key that was handed out
    and has arrived. `made` are keys, all negative, of descriptors of the worker's own which come
    along to be kept. `serial` is that of the last event of the
    frontend's that is dealt with: `answer`, if there is one, goes to the frontend, with the last
    descriptor that came along where `answer_fd` says so. `dismiss` lets the frontend go.
    """

    serial: int
    newest: int
    snapshot: bytes
    keys: list[int]
    made: list[int] = []
    answer: bytes | None = None
    answer_fd: bool = False
    dismiss: bool = False


class Pong(msgspec.Struct, frozen=True, tag=True):
    """The answer to a `Ping`."""


Word = Commit | Pong

_Message = TypeVar("_Message")

_encoder = msgspec.msgpack.Encoder()
_orders: msgspec.msgpack.Decoder[Order] = msgspec.msgpack.Decoder(Order)
_words: msgspec.msgpack.Decoder[Word] = msgspec.msgpack.Decoder(Word)


def pair() -> tuple[socket.socket, socket.socket]:
    """Return the master's end, non-blocking, and the worker's, both close-on-exec."""
    kind = socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    ours.setblocking(False)
    return ours, theirs


def send(sock: socket.socket, message: Order | Word, fds: Sequence[int] = ()) -> None:
    """Send `message` and copies of `fds`, whole or not at all.

    Waits for room at the worker's end; raises BlockingIOError at the master's when there is none,
    another OSError when the other side is gone.
    """
    data = _encoder.encode(message)
    if len(data) <= _LARGEST:
        socket.send_fds(sock, [data], fds, socket.MSG_NOSIGNAL)
        return
    fd = os.memfd_create("custody", os.MFD_CLOEXEC)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(data)
        socket.send_fds(sock, [_IN_A_FILE], [*fds, fd], socket.MSG_NOSIGNAL)
    finally:
        os.close(fd)


def receive_order(sock: socket.socket) -> tuple[Order, list[int]] | None:
    """Return the master's next order and its descriptors, the caller's from now on.

    None when there is none. Without the descriptors when they had no room here: then none is left.
    Raises ConnectionError when there will be no more orders.
    """
    return _message(sock, _orders)


def receive_word(sock: socket.socket) -> tuple[Word, list[int]] | None:
    """Return the worker's next word, as `receive_order` does.

    Raises ValueError, too, for what is no word: nothing that came is left then.
    """
    return _message(sock, _words)


def _message(
    sock: socket.socket, decoder: msgspec.msgpack.Decoder[_Message]
) -> tuple[_Message, list[int]] | None:
    received = _receive(sock)
    if received is None:
        return None
    data, fds = received
    try:
        return decoder.decode(data), fds
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        close(fds)
        raise ValueError(f"what was said makes no sense: {error}") from None


def receive_fds(sock: socket.socket, size: int) -> tuple[bytes, list[int], bool]:
    """Return up to `size` bytes, the descriptors that came along, and whether some had no room.

    Raises BlockingIOError when there is nothing.
    """
    # Python's recv_fds forgets its flags (3.11), and these must not be inherited for a moment.
    data, ancillary, flags, _ = sock.recvmsg(
        size,
        socket.CMSG_SPACE((MOST_FDS + 1) * array("i").itemsize),
        socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT,
    )
    fds = array("i")
    for level, kind, body in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(body[: len(body) // fds.itemsize * fds.itemsize])
    return data, fds.tolist(), bool(flags & socket.MSG_CTRUNC)


def _receive(sock: socket.socket) -> tuple[bytes, list[int]] | None:
    try:
        data, fds, truncated = receive_fds(sock, _LARGEST)
    except BlockingIOError:
        return None
    if not data:
        raise ConnectionResetError("the other side is gone")
    if truncated:
        close(fds)
        if data == _IN_A_FILE:
            raise ConnectionAbortedError("no descriptor is left for its message")
        return data, []
    if data == _IN_A_FILE:
        try:
            data = _contents(fds)
        except (OSError, ValueError):
            close(fds)
            raise
    return data, fds


def _contents(fds: list[int]) -> bytes:
    """Take the last of these descriptors, and return what is in its file."""
    if not fds:
        raise ValueError("what was said is in a file that did not come")
    fd = fds.pop()
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST_FILE:
            raise ValueError(f"what was said is in no file of at most {_LARGEST_FILE} bytes")
        return os.pread(fd, status.st_size, 0)
    finally:
        os.close(fd)


def close(fds: Iterable[int]) -> None:
    """Close them all."""
    for fd in fds:
        os.close(fd)


class Vault:
    """The descriptors that the master keeps for one guest, by their keys."""

    def __init__(self) -> None:
        self.fds: dict[int, int] = {}
        self.newest = 0

    def put(self, fd: int) -> int:
        """Take `fd` over and return its key."""
        self.newest += 1
        self.fds[self.newest] = fd
        return self.newest

    def replace(self, key: int, fd: int) -> None:
        """Keep `fd` as `key`, in place of what was."""
        before = self.fds.pop(key, None)
        if before is not None:
            os.close(before)
        self.fds[key] = fd

    def keep(self, keys: Iterable[int], newest: int) -> None:
        """Close all others up to `newest`."""
        kept = {*keys}
        for key in [key for key in self.fds if key <= newest and key not in kept]:
            os.close(self.fds.pop(key))
