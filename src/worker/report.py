"""Counters to the master: the latest record, soon after something changed, never blocking."""

from __future__ import annotations

import os
from collections.abc import Callable
from time import monotonic

from ..health import Health, encode
from .poller import Poller

#: How long after a change the master knows of it.
_DELAY_S = 0.25

#: The same while changes go on and on: of a hundred busy guests the master hears that much less.
_BUSY_DELAY_S = 1.0


class Report:
    """The worker's end of the health pipe; `collect` makes a record of the counters."""

    def __init__(self, fd: int, poller: Poller, collect: Callable[[], Health]) -> None:
        self._fd = fd
        self._collect = collect
        self._rest = b""  # of a record that the pipe had no room for
        self._timer = poller.timer(self._due)
        self._reported = 0.0  # when changes were last reported, on the monotonic clock
        os.set_blocking(fd, False)

    def changed(self) -> None:
        """Send a record soon; cheap enough for every piece of work."""
        if self._timer.due is None:
            busy = monotonic() - self._reported < _BUSY_DELAY_S
            self._timer.start(_BUSY_DELAY_S if busy else _DELAY_S)

    def _due(self) -> None:
        self._reported = monotonic()
        self.send()

    def send(self) -> None:
        """Send a record now; if the master is behind, later."""
        self._timer.stop()
        begun = bool(self._rest)
        frame = self._rest or encode(self._collect())
        try:
            sent = os.write(self._fd, frame)
        except BlockingIOError:
            sent = 0
        except BrokenPipeError:
            return  # the master is gone; the loop notices by itself
        # A record that was begun must be finished before a newer one makes sense.
        self._rest = frame[sent:] if sent or begun else b""
        if sent < len(frame) or begun:
            self._timer.start(_DELAY_S)

    def close(self) -> None:
        """Send what changed last, and close the pipe."""
        self.send()
        os.close(self._fd)
