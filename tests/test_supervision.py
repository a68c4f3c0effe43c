"""The table: when a worker is started, stopped and started again."""

from __future__ import annotations

import itertools

import pytest
from vhost_device_console.supervision import (
    BACKOFF_MOST,
    STOP_WITHIN,
    TABLE,
    WELL_AFTER,
    Action,
    Event,
    State,
    Supervisor,
    delay,
)


def started(now: float = 0.0) -> Supervisor:
    made = Supervisor(now)
    assert made.handle(Event.TIMER, now) is Action.START
    return made


def test_every_state_has_an_answer_to_every_event() -> None:
    assert set(TABLE) == set(itertools.product(State, Event))


def test_the_first_worker_is_due_at_once() -> None:
    assert Supervisor(7.0).deadline == 7.0


def test_the_first_start_is_no_restart() -> None:
    assert started().restarts == 0


def test_a_started_worker_needs_no_timer() -> None:
    assert started().deadline is None


def test_a_report_makes_a_worker_running() -> None:
    worker = started()
    assert worker.handle(Event.HEALTHY, 1.0) is Action.NOTHING
    assert worker.state is State.RUNNING


@pytest.mark.parametrize("heard", [False, True])
def test_the_first_death_is_followed_by_a_restart_at_once(heard: bool) -> None:
    worker = started()
    if heard:
        worker.handle(Event.HEALTHY, 1.0)
    worker.handle(Event.DIED, 2.0)
    assert (worker.state, worker.deadline) == (State.BACKOFF, 2.0)
    assert worker.handle(Event.TIMER, 2.0) is Action.START
    assert worker.restarts == 1


def test_deaths_in_a_row_wait_twice_as_long_each_time_up_to_the_most() -> None:
    worker = started()
    waits = []
    now = 0.0
    for _ in range(12):
        worker.handle(Event.DIED, now)
        assert worker.deadline is not None
        waits.append(round(worker.deadline - now, 6))
        now = worker.deadline
        worker.handle(Event.TIMER, now)
    assert waits == [0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30, 30]


def test_a_worker_may_fail_for_years() -> None:
    assert delay(10**9) == BACKOFF_MOST


@pytest.mark.parametrize(("age", "wait"), [(WELL_AFTER, 0.0), (WELL_AFTER - 1, 0.1)])
def test_only_a_worker_that_ran_long_enough_starts_the_count_anew(age: float, wait: float) -> None:
    worker = started()
    worker.handle(Event.DIED, 0.0)
    worker.handle(Event.TIMER, 0.0)
    worker.handle(Event.DIED, age)
    assert worker.deadline == age + wait


def test_a_worker_that_is_done_has_no_successor() -> None:
    worker = started()
    worker.handle(Event.DONE, 1.0)
    assert (worker.state, worker.deadline) == (State.FINISHED, None)


def test_a_running_worker_is_told_to_stop_and_given_time() -> None:
    worker = started()
    assert worker.handle(Event.STOP, 10.0) is Action.TERMINATE
    assert worker.deadline == 10.0 + STOP_WITHIN


def test_a_worker_that_does_not_stop_is_killed_once() -> None:
    worker = started()
    worker.handle(Event.STOP, 0.0)
    assert worker.handle(Event.TIMER, STOP_WITHIN) is Action.KILL
    assert worker.deadline is None


@pytest.mark.parametrize("end", [Event.DIED, Event.DONE])
def test_a_stopped_worker_is_not_restarted_however_it_ended(end: Event) -> None:
    worker = started()
    worker.handle(Event.STOP, 0.0)
    assert worker.handle(end, 0.1) is Action.NOTHING
    assert (worker.state, worker.deadline) == (State.FINISHED, None)


def test_a_second_stop_does_not_extend_the_time() -> None:
    worker = started()
    worker.handle(Event.STOP, 0.0)
    worker.handle(Event.STOP, 4.0)
    assert worker.deadline == STOP_WITHIN


def test_a_stop_while_waiting_to_restart_ends_at_once() -> None:
    worker = started()
    worker.handle(Event.DIED, 0.0)
    assert worker.handle(Event.STOP, 0.0) is Action.NOTHING
    assert (worker.state, worker.deadline) == (State.FINISHED, None)


def test_a_late_report_of_the_dead_does_not_put_off_the_restart() -> None:
    worker = started()
    worker.handle(Event.DIED, 5.0)
    worker.handle(Event.HEALTHY, 5.1)
    assert (worker.state, worker.deadline) == (State.BACKOFF, 5.0)


@pytest.mark.parametrize("event", Event)
def test_nothing_wakes_the_finished(event: Event) -> None:
    worker = started()
    worker.handle(Event.DONE, 0.0)
    assert worker.handle(event, 1.0) is Action.NOTHING
    assert worker.state is State.FINISHED
