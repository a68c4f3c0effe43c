"""What the master tells a running worker, and the descriptors that come with it.

An order is one record of a non-blocking SOCK_SEQPACKET socket pair: MessagePack, and its
descriptors as SCM_RIGHTS. Nothing is answered; what came of it is in the worker's health. Whatever
an order changes is also in the description that a successor is forked with.
"""

from __future__ import annotations

import os
import socket
from array import array
from collections.abc import Sequence

import msgspec

from .config import Port
from .errors import ConsoleError

#: An order is a port's description at most: two names and a few numbers.
_LARGEST = 1 << 14

_MOST_FDS = 2


class Resize(msgspec.Struct, frozen=True, tag=True):
    """Give port number `port` a size in characters; 0 x 0 leaves it to the clients again."""

    port: int
    columns: int
    rows: int


class AddPort(msgspec.Struct, frozen=True, tag=True):
    """Add a port; with it come its journal and, unless it is the terminal, its endpoint."""

    port: Port


class RemovePort(msgspec.Struct, frozen=True, tag=True):
    """Remove port number `port`, its clients and its endpoint."""

    port: int


Order = Resize | AddPort | RemovePort

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Order] = msgspec.msgpack.Decoder(Order)


def pair() -> tuple[socket.socket, socket.socket]:
    """Return the master's and the worker's end, both non-blocking and close-on-exec."""
    kind = socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    return socket.socketpair(socket.AF_UNIX, kind)


def send(sock: socket.socket, order: Order, fds: Sequence[int] = ()) -> None:
    """Send `order` and copies of `fds` whole, at once.

    Raises BlockingIOError when earlier orders have not been taken yet, another OSError when the
    worker is gone.
    """
    socket.send_fds(sock, [_encoder.encode(order)], fds)


def receive(sock: socket.socket) -> tuple[Order, list[int]] | None:
    """Return the next order and its descriptors, the caller's from now on (close-on-exec).

    None when there is no order, or will be none, as the master is gone. Raises ConsoleError when
    the descriptors had no room here: then none is left and the order is lost.
    """
    try:
        # Python's recv_fds forgets its flags (3.11), and these must not be inherited for a moment.
        data, ancillary, flags, _ = sock.recvmsg(
            _LARGEST, socket.CMSG_SPACE(_MOST_FDS * array("i").itemsize), socket.MSG_CMSG_CLOEXEC
        )
    except (BlockingIOError, ConnectionError):
        return None
    if not data:
        return None
    fds = array("i")
    for level, kind, body in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(body[: len(body) // fds.itemsize * fds.itemsize])
    if flags & socket.MSG_CTRUNC:
        for fd in fds:
            os.close(fd)
        raise ConsoleError("an order of the master's is lost: too many open files")
    return _decoder.decode(data), fds.tolist()
