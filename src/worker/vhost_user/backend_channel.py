"""The frontend's other socket, on which this side asks and the frontend answers.

Nothing here waits. What the socket has no room for is due until it has; of a notification whose
answer is still to come no second one is sent until it came, so what is under way is bounded by the
number of queues.
"""

from __future__ import annotations

import os
from collections import deque

from ...errors import FrontendError
from . import message as wire
from .message import BackendRequest

_READ = 4096


class BackendChannel:
    """The descriptor that came with SET_BACKEND_REQ_FD, which this owns.

    `broken` says why it is of no use any more, None while it is.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._due: dict[tuple[BackendRequest, int], None] = {}
        self._asked: deque[tuple[BackendRequest, int]] = deque()
        self._received = bytearray()
        self.broken: str | None = None

    def fileno(self) -> int:
        """Return the descriptor, to wait on."""
        return self._fd

    @property
    def blocked(self) -> bool:
        """Whether there is something to send that the socket has no room for."""
        return any(each not in self._asked for each in self._due)

    def config_changed(self) -> None:
        """Say that the configuration space has changed; no answer is asked for."""
        self._send(BackendRequest.CONFIG_CHANGE_MSG, 0)

    def call(self, ring: int) -> None:
        """Say that buffers of `ring` were used (in-band notifications)."""
        self._send(BackendRequest.VRING_CALL, ring)

    def error(self, ring: int) -> None:
        """Say that `ring` is broken (in-band notifications)."""
        self._send(BackendRequest.VRING_ERR, ring)

    def _send(self, request: BackendRequest, ring: int) -> None:
        self._due[request, ring] = None
        self.work()

    def work(self) -> None:
        """Take the answers that have come and send what is due."""
        try:
            os.set_blocking(self._fd, False)  # the frontend has the same description
            self._receive()
            for request, ring in [*self._due]:
                self._try(request, ring)
        except BlockingIOError:
            return
        except OSError as error:
            self.broken = str(error)
        except FrontendError as error:
            self.broken = str(error)

    def _try(self, request: BackendRequest, ring: int) -> None:
        """Send it, unless the one before has no answer yet. Raises OSError."""
        if (request, ring) in self._asked:
            return
        notification = request is not BackendRequest.CONFIG_CHANGE_MSG
        payload = wire.VringState(ring, 0).encode() if notification else b""
        # A stream socket takes so short a message whole or not at all.
        os.write(self._fd, wire.encode(request, payload, need_reply=notification))
        del self._due[request, ring]
        if notification:
            self._asked.append((request, ring))

    def _receive(self) -> None:
        """Take what has come. Raises FrontendError when it is no answer, OSError."""
        while True:
            try:
                data = os.read(self._fd, _READ)
            except BlockingIOError:
                return
            if not data:
                raise FrontendError("the frontend closed it")
            self._received += data
            while self._answered():
                pass

    def _answered(self) -> bool:
        """Take one answer, if it is there. Raises FrontendError."""
        received = self._received
        if len(received) < wire.HEADER_SIZE:
            return False
        header = wire.decode_header(received)
        if not self._asked or not header.reply or header.request != self._asked[0][0]:
            raise FrontendError(f"message {header.request} answers nothing")
        size = wire.HEADER_SIZE + header.size
        if len(received) < size:
            return False
        # Whether the frontend liked it changes nothing here.
        wire.decode_u64(bytes(received[wire.HEADER_SIZE : size]))
        self._asked.popleft()
        del received[:size]
        return True

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._fd)
