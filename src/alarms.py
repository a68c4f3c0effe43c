"""Deadlines of a loop that waits in a selector."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic


class Alarm:
    """One deadline at a time; `due` is on the monotonic clock, None when unset."""

    def __init__(self, callback: Callable[[], None], running: set[Alarm]) -> None:
        self.due: float | None = None
        self._callback = callback
        self._running = running

    def start(self, seconds: float) -> None:
        """Ring once, that long from now, instead of at any time set before."""
        self.due = monotonic() + seconds
        self._running.add(self)

    def stop(self) -> None:
        """Do not ring."""
        self.due = None
        self._running.discard(self)

    def ring(self) -> None:
        """Unset the alarm and call back."""
        self.stop()
        self._callback()


class Alarms:
    """All alarms of one loop, which calls `ring` no later than `due`."""

    def __init__(self) -> None:
        self._running: set[Alarm] = set()

    def new(self, callback: Callable[[], None]) -> Alarm:
        """Return an alarm that is not set."""
        return Alarm(callback, self._running)

    @property
    def due(self) -> float | None:
        """The next deadline, None when there is none."""
        return min((alarm.due for alarm in self._running if alarm.due is not None), default=None)

    def ring(self) -> None:
        """Ring those whose time has come."""
        now = monotonic()
        for alarm in [*self._running]:
            if alarm.due is not None and alarm.due <= now:
                alarm.ring()
