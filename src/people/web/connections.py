"""Connections of those who have not logged in: how many there may be, and how long they wait.

A browser asks at once and reads what it is told. Who does not would keep a descriptor for ever.
"""

from __future__ import annotations

import asyncio
import resource
import socket
from contextlib import suppress
from functools import partial
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

#: Seconds in which a first request has to be complete.
FIRST_WITHIN_S = 10.0

#: Descriptors that are counted with, if there may be more.
_MOST_FILES = 1024


class Listener(socket.socket):
    """The listener `made`, with so many connections that each can have a link to a console, too.

    When there is one more, the oldest that was not spared is hung up on.
    """

    def __init__(self, made: socket.socket) -> None:
        super().__init__(fileno=made.detach())
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = min(files, _MOST_FILES) * 2 // 5
        self._open: dict[socket.socket, bool] = {}  # whether to spare it; the oldest first
        self._full = False

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept a connection; raises BlockingIOError when there is none, or no more room now.

        asyncio goes on until then, and only after it closes what was hung up on.
        """
        if self._full:
            self._full = False
            raise BlockingIOError
        made, address = super().accept()
        self._open = {each: spare for each, spare in self._open.items() if each.fileno() >= 0}
        self._open[made] = False
        if len(self._open) > self._most:
            self._full = True
            oldest = next(each for each, spare in self._open.items() if not spare)
            self._open[oldest] = True
            with suppress(OSError):
                oldest.shutdown(socket.SHUT_RDWR)
        return made, address

    def spare(self, transport: asyncio.Transport) -> None:
        """Do not hang up on whoever that is."""
        fd = -1 if transport.is_closing() else transport.get_extra_info("socket").fileno()
        for each in self._open:
            if each.fileno() == fd >= 0:
                self._open[each] = True


class Http(H11Protocol):
    """HTTP with whoever is in time; `state.spare()` of a request spares its connection."""

    def __init__(self, listener: Listener, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._listener = listener

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See `H11Protocol`."""
        super().connection_made(transport)
        self.app_state = {"spare": partial(self._listener.spare, transport)}
        self.loop.call_later(FIRST_WITHIN_S, self._hurry)

    def _hurry(self) -> None:
        waits = self.cycle is None or self.cycle.more_body
        if waits and self in self.connections:
            self.transport.abort()
