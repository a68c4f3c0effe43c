"""The loop: file descriptors, timers, signals, and a short adaptive look before sleep.

Work has four parts that the caller gives: `drain` moves what is there, may look a little for more,
and says whether there was any; `flush` passes it on; `look` watches for work until a moment; `arm`
asks to be woken and says whether something came meanwhile. Small pieces in quick succession are
passed on together, since each flush costs a system call for which the next piece would have to
wait. When there is no more work it is looked for during a window of some microseconds, which grows
when looking pays (work came within it, or soon after) and shrinks to nothing when it does not, as
kernels do for halted vCPUs. Nobody looks while the machine has more to do than CPUs.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
from collections.abc import Callable
from time import monotonic_ns

IN = select.EPOLLIN
OUT = select.EPOLLOUT
HUP = select.EPOLLHUP | select.EPOLLERR

_FIRST_WINDOW_NS = 10_000

#: The window for an answer, in usual ones: a guest that sleeps must wake up for it.
_ANSWERS = 4

# How long flushing may wait while work goes on, and how long a pause ends that.
_LONGEST_WAIT_NS = 200_000
_PAUSE_NS = 20_000

#: More bytes than this are passed on at once.
_LIGHT = 32768

#: How long file descriptors and timers may wait.
_DISPATCH_NS = 50_000

#: The kernel's count for this thread: nanoseconds on a CPU, nanoseconds ready for one, slices.
_SCHEDSTAT = "/proc/thread-self/schedstat"

#: How often the machine is asked how full it is. Where it is, the thread waited one part in so many
#: of the time, and for each slice longer than a CPU takes to wake up.
_CROWD_NS = 20_000_000
_CROWD_SHARE = 20
_CROWD_WAIT_NS = 300_000

#: Where bytes go that mean nothing but a wake-up.
_SCRAP = bytearray(4096)


class Timer:
    """One deadline at a time; `due` is in nanoseconds of the monotonic clock, None when unset.

    The loop knows it by `running`, and only while it is set.
    """

    def __init__(self, callback: Callable[[], None], running: set[Timer]) -> None:
        self.due: int | None = None
        self._callback = callback
        self._running = running

    def start(self, seconds: float) -> None:
        """Fire once, that long from now, instead of at any time set before."""
        self.due = monotonic_ns() + int(seconds * 1e9)
        self._running.add(self)

    def stop(self) -> None:
        """Do not fire."""
        if self.due is not None:
            self.due = None
            self._running.discard(self)

    def fire(self) -> None:
        """Unset the timer and call back."""
        self.stop()
        self._callback()


class _Crowd:
    """Whether more wants to run than there are CPUs, as this thread's own waiting tells."""

    def __init__(self) -> None:
        self._counts = [0, 0]
        self._asked = 0
        self._here = False
        try:
            self._fd = os.open(_SCHEDSTAT, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # a kernel without CONFIG_SCHED_INFO, or no /proc
            self._fd = -1

    def here(self, now: int) -> bool:
        """Say whether the thread waited for a CPU lately; `now` is on the monotonic clock."""
        if now - self._asked > _CROWD_NS and self._fd >= 0:
            _, *counts = map(int, os.pread(self._fd, 128, 0).split())
            waited, slices = (new - old for new, old in zip(counts, self._counts, strict=True))
            self._here = waited > max((now - self._asked) // _CROWD_SHARE, slices * _CROWD_WAIT_NS)
            self._counts, self._asked = counts, now
        return self._here

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


class Poller:
    """An epoll loop for one thread. `window_us` is the longest look before sleep, 0 for none."""

    def __init__(self, window_us: int) -> None:
        self._epoll = select.epoll()
        self._watched: dict[int, Callable[[int], None]] = {}
        # Regular files and /dev/null cannot be polled: they are ready whenever they are wanted.
        self._files: dict[int, int] = {}
        self._timers: set[Timer] = set()
        self._most_window = window_us * 1000
        self._window = min(_FIRST_WINDOW_NS, self._most_window)
        self._pause = min(_PAUSE_NS, self._most_window)
        self._crowd = _Crowd()
        self._expected = False
        self._dispatched = 0  # when descriptors were looked at last
        self._again = False
        self._stopped = False
        self._signals: dict[int, Callable[[], None]] = {}
        self._wakeup, self._signalled = socket.socketpair()
        for end in (self._wakeup, self._signalled):
            end.setblocking(False)
        self.watch(self._wakeup.fileno(), self._take_signals)

    def watch(
        self, fd: int, callback: Callable[[int], None], events: int = IN, *, file_too: bool = False
    ) -> None:
        """Call `callback(events)` when `fd` is ready for one of `events`, or broken (`HUP`).

        Raises PermissionError for a file or folder, which are never waited for, unless `file_too`.
        """
        try:
            self._epoll.register(fd, events)
        except PermissionError:
            if not file_too:
                raise
            self._files[fd] = events
        self._watched[fd] = callback

    def want(self, fd: int, events: int) -> None:
        """Wait for other events of a watched `fd` from now on."""
        if fd in self._files:
            self._files[fd] = events
        elif fd in self._watched:
            self._epoll.modify(fd, events)

    def forget(self, fd: int) -> None:
        """Watch `fd` no more; call it before the fd is closed."""
        if self._watched.pop(fd, None) is None:
            return
        if self._files.pop(fd, None) is None:
            self._epoll.unregister(fd)

    @staticmethod
    def hung(fd: int) -> bool:
        """Say whether `fd` is broken or its other end gone, without waiting for the loop."""
        look = select.poll()
        look.register(fd, 0)
        return bool(look.poll(0))

    def timer(self, callback: Callable[[], None]) -> Timer:
        """Return a new timer, not yet started."""
        return Timer(callback, self._timers)

    def on_signal(self, number: int, callback: Callable[[], None]) -> None:
        """Call `callback` from the loop, never from inside a handler, after that signal."""
        signal.set_wakeup_fd(self._signalled.fileno(), warn_on_full_buffer=False)
        self._signals[number] = callback
        signal.signal(number, lambda *_: None)

    def _take_signals(self, _: int) -> None:
        with contextlib.suppress(BlockingIOError):
            for number in set(self._wakeup.recv(4096)):
                if number in self._signals:
                    self._signals[number]()

    def stop(self) -> None:
        """Let `run` return once the present round is over."""
        self._stopped = True

    def expect(self) -> None:
        """Look longer than ever before the next sleep: an answer is likely.

        More to answer may be there already, so descriptors are looked at before.
        """
        self._again = self._expected = True

    def run(
        self,
        drain: Callable[[int], int],
        flush: Callable[[], bool],
        look: Callable[[int, int], int],
        arm: Callable[[], bool],
        woken: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Work until `stop`: see the module's head for the four callables.

        `woken` hears after each sleep how many nanoseconds all that took which ended it.

        `drain` gets the nanoseconds for which it may look for more and returns how many bytes wait
        to be passed on, at least 1 when it did anything. `look` does the same once there is
        something, and gets before that the time on the monotonic clock until which it may wait.
        """
        flushed = waiting = found = 0
        asleep = False
        while not self._stopped:
            streaming = monotonic_ns() - flushed < _LONGEST_WAIT_NS
            moved = found or drain(self._pause if streaming else 0)
            found = 0
            if asleep:
                asleep = False
                woken(monotonic_ns() - self._dispatched)
            if moved and moved < _LIGHT and streaming:
                waiting = moved
                continue
            if moved or waiting:
                waiting = 0
                flush()
                flushed = monotonic_ns()
                if flushed - self._dispatched > _DISPATCH_NS:
                    self._dispatch(0)
            elif flush() or self._again:
                self._again = False
                self._dispatch(0)
            else:
                found = self._look(look)
                if not found and not arm():
                    self._sleep()
                    asleep = True

    def _look(self, look: Callable[[int, int], int]) -> int:
        window = self._window
        if self._expected and self._pause:
            window = _ANSWERS * self._most_window
        self._expected = False
        if not window:
            return 0
        found = look(monotonic_ns() + window, self._pause)
        if found:
            self._window = min(2 * self._window or _FIRST_WINDOW_NS, self._most_window)
        return found

    def _sleep(self) -> None:
        before = monotonic_ns()
        crowded = self._crowd.here(before)
        self._pause = 0 if crowded else min(_PAUSE_NS, self._most_window)
        self._dispatch(self._timeout_ms(before))
        if crowded:
            self._window = 0
        elif monotonic_ns() - before <= self._most_window:
            self._window = min(2 * self._window or _FIRST_WINDOW_NS, self._most_window)
        else:
            self._window = self._window // 2 if self._window > _FIRST_WINDOW_NS else 0

    def _timeout_ms(self, now: int) -> float | None:
        if self._stopped or any(self._files.values()):
            return 0
        due = min((timer.due for timer in self._timers if timer.due is not None), default=None)
        return None if due is None else max(0.0, (due - now) / 1e6)

    def _dispatch(self, timeout_ms: float | None) -> None:
        events = self._epoll.poll(None if timeout_ms is None else timeout_ms / 1e3)
        self._dispatched = now = monotonic_ns()
        for fd, what, callback in [(fd, what, self._watched.get(fd)) for fd, what in events]:
            # An earlier callback of this round may have let go of it, and given its number away.
            if callback is not None and self._watched.get(fd) is callback:
                callback(what)
        for fd, wanted in [*self._files.items()]:
            if wanted and (callback := self._watched.get(fd)):
                callback(wanted)
        if self._timers:
            for timer in [*self._timers]:
                if timer.due is not None and timer.due <= now:
                    timer.fire()

    def close(self) -> None:
        """Give back the loop's own descriptors; the watched ones are their owners'."""
        if self._signals:
            signal.set_wakeup_fd(-1)
        self._wakeup.close()
        self._signalled.close()
        self._crowd.close()
        self._epoll.close()


def drain_fd(fd: int) -> int | None:
    """Take what makes a notification fd readable: an eventfd's count, a socket's or pipe's bytes.

    One read is enough for an eventfd; whatever else is in a socket wakes the loop once more. Return
    how many bytes came, None when somebody else took them, 0 when the fd is at its end or cannot be
    read: it would be ready for ever.

    Never waits: whoever shares the fd can make it blocking at any moment, and empty it.
    """
    try:
        return os.preadv(fd, [_SCRAP], -1, os.RWF_NOWAIT)
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            return 0
    return _drain_elsewhere(fd)


def _drain_elsewhere(fd: int) -> int | None:
    """Do the same for a file or a kernel that knows no such reads, as well as it can be done."""
    try:
        os.set_blocking(fd, False)
        return len(os.read(fd, len(_SCRAP)))
    except BlockingIOError:
        return None
    except OSError:
        return 0
