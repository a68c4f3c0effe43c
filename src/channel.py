"""The vhost-user socket: bytes and the file descriptors that ride on them, as whole messages."""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct

import msgspec

from .errors import FrontendError
from .worker.vhost_user import message as wire

#: SO_PEERCRED: pid, uid, gid of the process that connected (unix(7)).
_CREDENTIALS = struct.Struct("=iII")

# Room for as many fds as one message of the system can carry, so that none is lost unseen.
_ANCILLARY = socket.CMSG_SPACE(253 * array.array("i").itemsize)


class Message:
    """One whole message; it owns `fds` until somebody takes them out of the list."""

    def __init__(self, header: wire.Header, payload: bytes, fds: list[int], stray: bool) -> None:
        self.header = header
        self.payload = payload
        self.fds = fds
        self.stray_fds = stray

    def close_fds(self) -> None:
        """Close the fds that nobody took."""
        while self.fds:
            os.close(self.fds.pop())


class Saved(msgspec.Struct, array_like=True):
    """A channel, perhaps in the middle of a message, with its descriptors as they are."""

    fd: int
    begun: bytes
    header: wire.Header | None
    fds: list[int]
    stray: bool


class Channel:
    """A connected, non-blocking vhost-user socket.

    `closed` is true once the frontend has hung up, which may be in the middle of a message.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._buffer = bytearray()
        self._header: wire.Header | None = None
        self._fds: list[int] = []
        self._stray = False
        self.closed = False

    @classmethod
    def resume(cls, saved: Saved) -> Channel:
        """Return the channel that was saved, whose descriptors are its own from now on."""
        channel = cls(socket.socket(fileno=saved.fd))
        channel._buffer += saved.begun
        channel._header, channel._fds, channel._stray = saved.header, saved.fds, saved.stray
        return channel

    def save(self) -> Saved:
        """Return what `resume` takes."""
        return Saved(self.fileno(), bytes(self._buffer), self._header, self._fds, self._stray)

    def fileno(self) -> int:
        """Return the socket's descriptor, to wait on."""
        return self._sock.fileno()

    def peer(self) -> int:
        """Return the frontend's process id, 0 where the system cannot tell."""
        raw = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid: int = _CREDENTIALS.unpack(raw)[0]
        return max(pid, 0)

    @property
    def partial(self) -> bool:
        """Whether a message has begun and is not whole yet."""
        return bool(self._buffer) or self._header is not None

    def receive(self) -> Message | None:
        """Return the next whole message, None when it is not there yet or never will be.

        Never reads past a message's end, so fds are known to belong to it. Raises FrontendError
        when the stream cannot be followed any further.
        """
        while True:
            wanted = wire.HEADER_SIZE if self._header is None else self._header.size
            if len(self._buffer) < wanted and not self._fill(wanted - len(self._buffer)):
                return None
            if len(self._buffer) < wanted:
                continue
            if self._header is None:
                self._header = wire.decode_header(self._buffer)
                self._buffer.clear()
                continue
            message = Message(self._header, bytes(self._buffer), self._fds, self._stray)
            self._buffer.clear()
            self._header, self._fds, self._stray = None, [], False
            return message

    def _fill(self, count: int) -> bool:
        try:
            data, ancillary, flags, _ = self._sock.recvmsg(
                count, _ANCILLARY, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return False
        except ConnectionError:
            self.closed = True
            return False
        except OSError as error:
            raise FrontendError(f"its messages cannot be received: {error}") from None
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                # fds ride on a message's first bytes; anywhere else they are a mistake.
                self._stray |= self.partial
                fds = array.array("i")
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
                self._fds.extend(fds)
        if flags & socket.MSG_CTRUNC:
            raise FrontendError("the system had no room for the file descriptors of a message")
        if not data:
            self.closed = True
            return False
        self._buffer += data
        return True

    def send(self, message: bytes, fd: int | None = None) -> None:
        """Send one reply, with `fd` (still the caller's) if there is one.

        Raises FrontendError when the frontend does not read its replies, or it cannot be sent.
        """
        fds = [] if fd is None else [fd]
        try:
            sent = socket.send_fds(self._sock, [message], fds, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            sent = 0
        except ConnectionError:
            self.closed = True
            return
        except OSError as error:  # of file descriptors, only so many can be under way
            raise FrontendError(f"a reply cannot be sent: {error}") from None
        if sent != len(message):
            raise FrontendError("the frontend does not read the replies it asks for")

    def close(self) -> None:
        """Close the socket and every fd that came with an unfinished message. Idempotent."""
        self.closed = True
        while self._fds:
            os.close(self._fds.pop())
        with contextlib.suppress(OSError):  # a copy of it may be open elsewhere
            self._sock.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            self._sock.close()
