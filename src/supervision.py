"""When a worker is started, stopped and started again: a table, and a clock that is passed in.

Every (state, event) pair is spelled out, the ones that change nothing too. What an action does to
a process is the master's business.
"""

from __future__ import annotations

from enum import StrEnum, auto

#: The first restart is at once, the second after this many seconds, each next after twice that.
BACKOFF_FIRST = 0.1

#: No restart waits longer, in seconds.
BACKOFF_MOST = 30.0

#: A worker that ran this many seconds was well: the next restart is at once again.
WELL_AFTER = 2.0

#: How many seconds a worker has to end after it was told to.
STOP_WITHIN = 5.0


class State(StrEnum):
    """Where a guest's worker is in its life."""

    STARTING = auto()  # forked, nothing heard yet
    RUNNING = auto()  # it has reported
    BACKOFF = auto()  # dead, to be started again at the deadline
    STOPPING = auto()  # told to end, killed at the deadline
    FINISHED = auto()  # ended for good


class Event(StrEnum):
    """What can happen to a worker."""

    HEALTHY = auto()  # a health record came
    DIED = auto()  # it ended, or could not be forked
    DONE = auto()  # it ended and wants no successor
    LEFT = auto()  # it ended as it was told to, and leaves its guest to a successor
    TIMER = auto()  # the deadline passed
    STOP = auto()  # the daemon ends


class Action(StrEnum):
    """What the master then does."""

    NOTHING = auto()
    START = auto()
    TERMINATE = auto()
    KILL = auto()


_S, _E, _A = State, Event, Action

TABLE: dict[tuple[State, Event], tuple[State, Action]] = {
    (_S.STARTING, _E.HEALTHY): (_S.RUNNING, _A.NOTHING),
    (_S.STARTING, _E.DIED): (_S.BACKOFF, _A.NOTHING),
    (_S.STARTING, _E.DONE): (_S.FINISHED, _A.NOTHING),
    (_S.STARTING, _E.LEFT): (_S.STARTING, _A.START),
    (_S.STARTING, _E.TIMER): (_S.STARTING, _A.NOTHING),
    (_S.STARTING, _E.STOP): (_S.STOPPING, _A.TERMINATE),
    (_S.RUNNING, _E.HEALTHY): (_S.RUNNING, _A.NOTHING),
    (_S.RUNNING, _E.DIED): (_S.BACKOFF, _A.NOTHING),
    (_S.RUNNING, _E.DONE): (_S.FINISHED, _A.NOTHING),
    (_S.RUNNING, _E.LEFT): (_S.STARTING, _A.START),
    (_S.RUNNING, _E.TIMER): (_S.RUNNING, _A.NOTHING),
    (_S.RUNNING, _E.STOP): (_S.STOPPING, _A.TERMINATE),
    (_S.BACKOFF, _E.HEALTHY): (_S.BACKOFF, _A.NOTHING),
    (_S.BACKOFF, _E.DIED): (_S.BACKOFF, _A.NOTHING),
    (_S.BACKOFF, _E.DONE): (_S.BACKOFF, _A.NOTHING),
    (_S.BACKOFF, _E.LEFT): (_S.BACKOFF, _A.NOTHING),
    (_S.BACKOFF, _E.TIMER): (_S.STARTING, _A.START),
    (_S.BACKOFF, _E.STOP): (_S.FINISHED, _A.NOTHING),
    (_S.STOPPING, _E.HEALTHY): (_S.STOPPING, _A.NOTHING),
    (_S.STOPPING, _E.DIED): (_S.FINISHED, _A.NOTHING),
    (_S.STOPPING, _E.DONE): (_S.FINISHED, _A.NOTHING),
    (_S.STOPPING, _E.LEFT): (_S.FINISHED, _A.NOTHING),
    (_S.STOPPING, _E.TIMER): (_S.STOPPING, _A.KILL),
    (_S.STOPPING, _E.STOP): (_S.STOPPING, _A.NOTHING),
    (_S.FINISHED, _E.HEALTHY): (_S.FINISHED, _A.NOTHING),
    (_S.FINISHED, _E.DIED): (_S.FINISHED, _A.NOTHING),
    (_S.FINISHED, _E.DONE): (_S.FINISHED, _A.NOTHING),
    (_S.FINISHED, _E.LEFT): (_S.FINISHED, _A.NOTHING),
    (_S.FINISHED, _E.TIMER): (_S.FINISHED, _A.NOTHING),
    (_S.FINISHED, _E.STOP): (_S.FINISHED, _A.NOTHING),
}


def delay(failures: int) -> float:
    """Return the seconds to wait before the restart that follows `failures` deaths in a row."""
    if failures <= 1:
        return 0.0
    # The exponent is bounded: a worker may fail for years.
    return min(BACKOFF_MOST, BACKOFF_FIRST * 2.0 ** min(failures - 2, 32))


class Supervisor:
    """One worker's place in the table. Times are seconds of any clock that never goes back.

    `deadline` is when `Event.TIMER` is due, None when nothing is waited for. `restarts` counts
    successors, `started` is when the latest worker was.
    """

    def __init__(self, now: float) -> None:
        self.state = State.BACKOFF
        self.deadline: float | None = now
        self.started = now
        self.restarts = -1
        self._failures = 0

    def save(self) -> tuple[str, float | None, float, int, int]:
        """Return what `resume` takes."""
        return self.state.value, self.deadline, self.started, self.restarts, self._failures

    @classmethod
    def resume(cls, saved: tuple[str, float | None, float, int, int]) -> Supervisor:
        """Return the supervisor that was saved, on the same clock."""
        state, deadline, started, restarts, failures = saved
        supervisor = cls(started)
        supervisor.state, supervisor.deadline = State(state), deadline
        supervisor.restarts, supervisor._failures = restarts, failures
        return supervisor

    def handle(self, event: Event, now: float) -> Action:
        """Take one step and return what is to be done."""
        before = self.state
        self.state, action = TABLE[before, event]
        if self.state is not before or action is not Action.NOTHING:
            self.deadline = None
        if action is Action.START:
            self.started = now
            self.restarts += 1
        elif action is Action.TERMINATE:
            self.deadline = now + STOP_WITHIN
        elif self.state is State.BACKOFF and before is not State.BACKOFF:
            self._failures = 1 if now - self.started >= WELL_AFTER else self._failures + 1
            self.deadline = now + delay(self._failures)
        return action
