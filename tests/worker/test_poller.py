"""The loop, with real descriptors; time is real only where it is waited for."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from vhost_device_console.worker import poller as module
from vhost_device_console.worker.poller import HUP, IN, OUT, Poller, drain_fd

GUARD_S = 20.0


@pytest.fixture
def poller() -> Iterator[Poller]:
    made = Poller(0)
    yield made
    made.close()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        one.setblocking(False)
        yield one, other


def no(*_: int) -> bool:
    return False


def run(
    poller: Poller,
    drain: Callable[[int], int] = no,
    flush: Callable[[], bool] = no,
    look: Callable[[int, int], int] = no,
    arm: Callable[[], bool] = no,
) -> None:
    """Run until something stops the loop; fail if nothing does."""

    def never_stopped() -> None:
        raise AssertionError("nothing stopped the loop")

    guard = poller.timer(never_stopped)
    guard.start(GUARD_S)
    poller.run(drain, flush, look, arm)
    guard.stop()


def rounds(poller: Poller, count: int) -> None:
    """Let the loop look at its descriptors `count` times, never sleeping."""
    left = iter(range(count))

    def flush() -> bool:
        if next(left, None) is None:
            poller.stop()
        return True

    run(poller, flush=flush)


# File descriptors


def test_a_readable_descriptor_is_told(poller: Poller, pair: tuple[socket.socket, ...]) -> None:
    one, other = pair
    seen: list[int] = []

    def readable(events: int) -> None:
        seen.append(events)
        poller.stop()

    poller.watch(one.fileno(), readable)
    other.send(b"x")
    run(poller)
    assert seen == [IN]


def test_only_wanted_events_are_told(poller: Poller, pair: tuple[socket.socket, ...]) -> None:
    one, other = pair
    seen: list[int] = []
    poller.watch(one.fileno(), seen.append, 0)
    other.send(b"x")
    rounds(poller, 3)
    assert seen == []


@pytest.mark.parametrize("events", [OUT, IN, IN | OUT])
def test_what_is_wanted_can_change(
    poller: Poller, pair: tuple[socket.socket, ...], events: int
) -> None:
    one, other = pair
    seen: list[int] = []
    poller.watch(one.fileno(), seen.append, 0)
    poller.want(one.fileno(), events)
    other.send(b"x")
    rounds(poller, 1)
    assert set(seen) == {events}


def test_a_hangup_is_told_whatever_is_wanted(
    poller: Poller, pair: tuple[socket.socket, ...]
) -> None:
    one, other = pair
    seen: list[int] = []

    def broken(events: int) -> None:
        seen.append(events)
        poller.forget(one.fileno())
        poller.stop()

    poller.watch(one.fileno(), broken, 0)
    other.close()
    run(poller)
    assert seen[0] & HUP


def test_a_forgotten_descriptor_is_silent(poller: Poller, pair: tuple[socket.socket, ...]) -> None:
    one, other = pair
    seen: list[int] = []
    poller.watch(one.fileno(), seen.append)
    poller.forget(one.fileno())
    other.send(b"x")
    rounds(poller, 3)
    assert seen == []


def test_forgetting_twice_is_forgetting_once(
    poller: Poller, pair: tuple[socket.socket, ...]
) -> None:
    poller.watch(pair[0].fileno(), lambda _: None)
    poller.forget(pair[0].fileno())
    poller.forget(pair[0].fileno())


def test_a_descriptor_forgotten_in_the_same_round_is_silent(poller: Poller) -> None:
    with contextlib.ExitStack() as ends:
        ready = []
        for _ in range(4):
            one, other = socket.socketpair()
            ends.enter_context(one)
            ends.enter_context(other).send(b"x")
            ready.append(one.fileno())
        called = []

        def readable(fd: int, _: int) -> None:
            called.append(fd)
            for each in ready:
                poller.forget(each)

        for fd in ready:
            poller.watch(fd, partial(readable, fd))
        rounds(poller, 2)
        assert len(called) == 1


def test_an_event_is_not_told_to_who_got_the_number_since(poller: Poller) -> None:
    """Two are ready; the one called first replaces the other by a descriptor of its number."""
    with contextlib.ExitStack() as ends:
        seen: list[int] = []
        fds = []
        for _ in range(2):
            read, write = os.pipe()
            ends.callback(os.close, read)
            os.close(write)
            fds.append(read)
        quiet, end = os.pipe()
        ends.callback(os.close, quiet)
        ends.callback(os.close, end)

        def replace(fd: int, other: int) -> None:
            for each in (fd, other):
                poller.forget(each)
            os.dup2(quiet, other)
            poller.watch(other, seen.append)

        poller.watch(fds[0], lambda _: replace(fds[0], fds[1]))
        poller.watch(fds[1], lambda _: replace(fds[1], fds[0]))
        rounds(poller, 3)
        assert seen == []


# Files


@pytest.mark.parametrize("path", ["/dev/null", __file__])
def test_what_cannot_be_waited_for_is_refused(poller: Poller, path: str) -> None:
    with open(path, "rb") as file, pytest.raises(PermissionError):
        poller.watch(file.fileno(), lambda _: None)


def test_a_refused_descriptor_is_not_watched(poller: Poller) -> None:
    with open("/dev/null", "rb") as file:
        with pytest.raises(PermissionError):
            poller.watch(file.fileno(), lambda _: None)
        poller.want(file.fileno(), IN)
        poller.forget(file.fileno())


@pytest.mark.parametrize("path", ["/dev/null", __file__])
def test_a_file_is_ready_whenever_it_is_wanted(poller: Poller, path: str) -> None:
    with open(path, "rb") as file:
        seen: list[int] = []

        def ready(events: int) -> None:
            seen.append(events)
            if len(seen) == 3:
                poller.want(file.fileno(), 0)
                end.start(0.01)

        end = poller.timer(poller.stop)
        poller.watch(file.fileno(), ready, IN, file_too=True)
        run(poller)
        assert seen == [IN] * 3


def test_a_forgotten_file_is_silent(poller: Poller) -> None:
    with open("/dev/null", "rb") as file:
        seen: list[int] = []
        poller.watch(file.fileno(), seen.append, IN, file_too=True)
        poller.forget(file.fileno())
        rounds(poller, 2)
        assert seen == []


# Timers


def test_timers_fire_when_they_are_due(poller: Poller) -> None:
    fired: list[str] = []

    def last() -> None:
        fired.append("late")
        poller.stop()

    late, early = poller.timer(last), poller.timer(lambda: fired.append("early"))
    late.start(0.02)
    early.start(0.005)
    run(poller)
    assert fired == ["early", "late"]
    assert late.due is early.due is None


def test_a_stopped_timer_does_not_fire(poller: Poller) -> None:
    fired: list[str] = []
    timer, end = poller.timer(lambda: fired.append("fired")), poller.timer(poller.stop)
    timer.start(0)
    timer.stop()
    end.start(0.005)
    run(poller)
    assert fired == []


def test_starting_again_replaces_the_deadline(poller: Poller) -> None:
    fired: list[str] = []
    timer, end = poller.timer(lambda: fired.append("fired")), poller.timer(poller.stop)
    timer.start(0)
    timer.start(GUARD_S / 2)
    end.start(0.005)
    run(poller)
    assert fired == []


def test_a_timer_can_start_itself_again(poller: Poller) -> None:
    fired: list[None] = []

    def again() -> None:
        fired.append(None)
        if len(fired) == 3:
            poller.stop()
        else:
            timer.start(0.001)

    timer = poller.timer(again)
    timer.start(0)
    run(poller)
    assert len(fired) == 3


def test_timers_and_descriptors_have_their_turn_while_there_is_work(
    poller: Poller, pair: tuple[socket.socket, ...]
) -> None:
    one, other = pair
    left = {"timer", "descriptor"}

    def happened(what: str) -> None:
        left.discard(what)
        if not left:
            poller.stop()

    poller.watch(one.fileno(), lambda _: happened("descriptor"))
    poller.timer(lambda: happened("timer")).start(0)
    other.send(b"x")
    run(poller, drain=lambda _: 1)
    assert not left


# Signals


@pytest.fixture
def signals() -> Iterator[None]:
    numbers = (signal.SIGUSR1, signal.SIGUSR2)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals")
def test_a_signal_wakes_the_loop(poller: Poller) -> None:
    heard: list[str] = []

    def heard_one() -> None:
        heard.append("one")
        poller.stop()

    poller.on_signal(signal.SIGUSR1, heard_one)
    sender = poller.timer(lambda: os.kill(os.getpid(), signal.SIGUSR1))
    sender.start(0.002)
    run(poller)
    assert heard == ["one"]


@pytest.mark.usefixtures("signals")
def test_a_signal_that_came_before_the_loop_is_heard(poller: Poller) -> None:
    poller.on_signal(signal.SIGUSR1, poller.stop)
    os.kill(os.getpid(), signal.SIGUSR1)
    run(poller)


@pytest.mark.usefixtures("signals")
def test_each_signal_has_its_callback(poller: Poller) -> None:
    heard: list[str] = []
    poller.on_signal(signal.SIGUSR1, lambda: heard.append("one"))
    poller.on_signal(signal.SIGUSR2, lambda: heard.append("two"))
    os.kill(os.getpid(), signal.SIGUSR2)
    rounds(poller, 2)
    assert heard == ["two"]


@pytest.mark.usefixtures("signals")
def test_a_flood_of_signals_is_one(poller: Poller) -> None:
    heard: list[None] = []
    poller.on_signal(signal.SIGUSR1, lambda: heard.append(None))
    for _ in range(1000):
        os.kill(os.getpid(), signal.SIGUSR1)
    rounds(poller, 2)
    assert len(heard) == 1


# Work


def test_a_stopped_loop_does_not_run(poller: Poller) -> None:
    poller.stop()
    run(poller, drain=lambda _: pytest.fail("it ran"))


def test_work_is_passed_on_before_descriptors_are_looked_at(
    poller: Poller, pair: tuple[socket.socket, ...]
) -> None:
    one, other = pair
    order: list[str] = []

    def drain(_: int) -> int:
        order.append("drain")
        return len(order) == 1

    def readable(_: int) -> None:
        order.append("descriptor")
        poller.stop()

    def flush() -> bool:
        order.append("flush")
        return False

    poller.watch(one.fileno(), readable)
    other.send(b"x")
    run(poller, drain=drain, flush=flush)
    assert order[0] == "drain"
    assert order[-2:] == ["flush", "descriptor"]


def test_work_that_does_not_end_is_passed_on_all_the_same(poller: Poller) -> None:
    def flush() -> bool:
        poller.stop()
        return True

    run(poller, drain=lambda _: 1, flush=flush)


def test_how_long_it_took_to_do_what_woke_it_is_told_once_it_is_done(
    poller: Poller, pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(0, 10**9, 1000))
    monkeypatch.setattr(module, "monotonic_ns", lambda: next(now))
    seen: list[object] = []
    near, far = pair

    def drain(_: int) -> int:
        seen.append("drained")
        return 0

    def ready(_: int) -> None:
        seen.append("came")
        near.recv(1)

    def woken(took_ns: int) -> None:
        seen.append(took_ns)
        poller.stop()

    poller.watch(near.fileno(), ready)
    far.send(b"x")
    poller.run(drain, no, no, no, woken)
    assert seen[:3] == ["drained", "came", "drained"]
    assert 0 < seen[3] < 10_000  # type: ignore[operator]


def test_nothing_is_timed_that_did_not_end_a_sleep(poller: Poller) -> None:
    work = iter([1, 1, 1])

    def arm() -> bool:
        poller.stop()
        return True

    def woken(_: int) -> None:
        pytest.fail("it did not sleep")

    poller.run(lambda _: next(work, 0), no, no, arm, woken)


def test_what_came_while_arming_is_worked_on_before_sleep(poller: Poller) -> None:
    order: list[str] = []

    def drain(_: int) -> int:
        order.append("drain")
        return False

    def arm() -> bool:
        order.append("arm")
        if len(order) == 4:
            poller.stop()
        return True

    run(poller, drain=drain, arm=arm)
    assert order == ["drain", "arm"] * 2


def test_an_idle_loop_does_nothing(poller: Poller) -> None:
    looks = 0

    def drain(_: int) -> int:
        nonlocal looks
        looks += 1
        return False

    poller.timer(poller.stop).start(0.05)
    run(poller, drain=drain)
    assert looks <= 3


# The window, by a clock that only the test moves


class Clock:
    """Nanoseconds that pass by one microsecond a look at them."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        self.now += 1000
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "monotonic_ns", made)
    return made


def looks_a_round(clock: Clock, window_us: int, sleeps_us: int, rounds: int) -> list[int]:
    """Return for how many nanoseconds the rings were looked at before each of so many sleeps."""
    poller = Poller(window_us)
    read, write = os.pipe()
    looks = [0]

    def look(until: int, _: int) -> int:
        looks[-1] += until - clock.now
        clock.now = until
        return 0

    def woken(_: int) -> None:
        clock.now += sleeps_us * 1000
        if len(looks) == rounds:
            poller.stop()
        looks.append(0)

    poller.watch(read, woken)
    os.write(write, b"x")
    poller.run(no, no, look, no)
    poller.close()
    os.close(read)
    os.close(write)
    return looks[:-1]


def test_the_window_shrinks_to_nothing_when_looking_does_not_pay(clock: Clock) -> None:
    looks = looks_a_round(clock, 50, 1_000_000, 8)
    assert looks[0] > 0
    assert looks[-1] == 0


def test_the_window_grows_when_work_comes_soon_after_it(clock: Clock) -> None:
    looks = looks_a_round(clock, 50, 5, 8)
    assert looks[0] < looks[1] < looks[-1] == 50_000


def test_no_window_is_no_look(clock: Clock) -> None:
    assert looks_a_round(clock, 0, 5, 4) == [0] * 4


def test_work_within_the_window_is_found_without_sleep() -> None:
    poller = Poller(50)
    passed_on: list[str] = []

    def look(_until: int, _linger: int) -> int:
        poller.stop()
        return 1

    def flush() -> bool:
        passed_on.append("flush")
        return False

    poller.run(no, flush, look, lambda: pytest.fail("it went to sleep"))
    poller.close()
    assert passed_on


def test_where_an_answer_is_likely_it_is_looked_for_longer(clock: Clock) -> None:
    poller = Poller(50)
    looks: list[int] = []

    def look(until: int, _: int) -> int:
        looks.append(until - clock.now)
        poller.stop()
        return 1

    poller.expect()
    poller.run(no, no, look, no)
    poller.close()
    assert looks == [200_000]


# Passing on


def flushes(clock: Clock, sizes: list[int], every_us: int) -> list[int]:
    """Return when, in us, output was passed on, of which `sizes` bytes come every so often."""
    poller = Poller(50)
    times: list[int] = []
    left = iter(sizes)
    waiting = 0

    def drain(linger_ns: int) -> int:
        nonlocal waiting
        if (size := next(left, None)) is None:
            poller.stop()
            return 0
        if not size:
            clock.now += linger_ns
            return 0
        clock.now += every_us * 1000
        waiting += size
        return waiting

    def flush() -> bool:
        nonlocal waiting
        if waiting:
            times.append(clock.now // 1000)
        waiting = 0
        return False

    clock.now = 1_000_000_000
    poller.run(drain, flush, no, lambda: True)
    poller.close()
    return [time - 1_000_000 for time in times]


def test_output_after_a_pause_is_passed_on_at_once(clock: Clock) -> None:
    assert flushes(clock, [16], 0) == [1]


def test_small_output_in_quick_succession_is_passed_on_together(clock: Clock) -> None:
    times = flushes(clock, [16] * 100, 5)
    assert len(times) == 4  # the last one at the end
    assert all(200 <= b - a <= 220 for a, b in pairwise(times[:-1]))


def test_a_pause_passes_small_output_on(clock: Clock) -> None:
    times = flushes(clock, [16, 16, 16, 0], 5)
    assert len(times) == 2
    assert times[1] - times[0] < 50


def test_much_output_is_passed_on_at_once(clock: Clock) -> None:
    assert len(flushes(clock, [16, *[1 << 16] * 3], 5)) == 4


# Crowds


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Give a function that says how long the thread has waited for a CPU so far, in ns."""
    file = tmp_path / "schedstat"
    monkeypatch.setattr(module, "_SCHEDSTAT", str(file))

    def waited(nanoseconds: int, slices: int = 3) -> None:
        file.write_text(f"1000 {nanoseconds} {slices}\n")

    waited(0)
    return waited


def test_nobody_looks_while_there_is_more_to_do_than_cpus(
    clock: Clock, waits: Callable[..., None]
) -> None:
    waits(1_000_000_000)
    looks = looks_a_round(clock, 50, 21_000, 3)
    assert looks[0] > 0
    assert looks[1:] == [0, 0]


def test_cpus_that_take_long_to_wake_up_are_no_crowd(
    clock: Clock, waits: Callable[..., None]
) -> None:
    clock.now = 1_000_000_000
    waits(200_000_000, slices=1000)
    assert looks_a_round(clock, 50, 5, 4)[-1] == 50_000


def test_without_a_count_of_waiting_the_window_goes_on(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SCHEDSTAT", "/nowhere")
    assert looks_a_round(clock, 50, 5, 4)[-1] == 50_000


# Notifications


@pytest.fixture(params=["as it is", "older"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give this kernel, then one that cannot read without waiting whatever the fd's mode is."""

    def unknown(*_: Any) -> int:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    if request.param == "older":
        monkeypatch.setattr(os, "preadv", unknown)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("flags", [0, os.EFD_NONBLOCK], ids=["blocking", "non-blocking"])
def test_an_eventfd_is_drained_at_once_and_never_waited_for(flags: int) -> None:
    fd = os.eventfd(5, flags)
    try:
        assert drain_fd(fd) == 8
        assert drain_fd(fd) is None
    finally:
        os.close(fd)


@pytest.mark.usefixtures("kernel")
def test_a_socket_is_drained(pair: tuple[socket.socket, ...]) -> None:
    one, other = pair
    other.send(bytes(80))
    assert drain_fd(one.fileno()) == 80
    with pytest.raises(BlockingIOError):
        one.recv(1)


@pytest.mark.usefixtures("kernel")
def test_a_socket_that_was_reset_has_nothing(pair: tuple[socket.socket, ...]) -> None:
    one, other = pair
    one.send(b"unread")
    other.close()
    drain_fd(one.fileno())
    assert one.recv(1) == b""  # the reset was taken


@pytest.mark.usefixtures("kernel")
def test_what_is_at_its_end_is_not_to_be_watched(pair: tuple[socket.socket, ...]) -> None:
    one, other = pair
    other.shutdown(socket.SHUT_WR)
    assert drain_fd(one.fileno()) == 0


def test_what_cannot_be_read_is_not_to_be_watched() -> None:
    read, write = os.pipe()
    os.close(read)
    assert drain_fd(write) == 0
    os.close(write)
