"""The loop: file descriptors, timers, signals, and a short adaptive look before sleep.

Work has three parts that the caller gives: `drain` moves what is there and says whether there was
any, `flush` passes it on, `arm` asks to be woken and says whether something came meanwhile. While
`drain` finds work it is asked again before anything slower is done; when it finds none the rings
are looked at for a window of some microseconds. The window grows when looking pays (work came
within it, or soon after) and shrinks to nothing when it does not, as kernels do for halted vCPUs.
"""

from __future__ import annotations

import contextlib
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

# While drain keeps finding work, how long flushing and file descriptors may wait, and how long a
# pause ends it: a guest that writes small pieces has the next one ready in less, and a flush costs
# a system call.
_LONGEST_DRAIN_NS = 200_000
_PAUSE_NS = 4_000


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

    def run(
        self, drain: Callable[[], bool], flush: Callable[[], bool], arm: Callable[[], bool]
    ) -> None:
        """Work until `stop`: see the module's head for the three callables."""
        while not self._stopped:
            if drain():
                self._drain_on(drain)
                flush()
                self._dispatch(0)
                continue
            if flush():
                self._dispatch(0)
                continue
            if self._look(drain) or arm():
                continue
            self._sleep()

    @staticmethod
    def _drain_on(drain: Callable[[], bool]) -> None:
        now = monotonic_ns()
        limit = now + _LONGEST_DRAIN_NS
        pause = now + _PAUSE_NS
        while now < limit and now < pause:
            worked = drain()
            now = monotonic_ns()
            if worked:
                pause = now + _PAUSE_NS

    def _look(self, drain: Callable[[], bool]) -> bool:
        if not self._window:
            return False
        limit = monotonic_ns() + self._window
        while monotonic_ns() < limit:
            if drain():
                self._window = min(2 * self._window, self._most_window)
                return True
        return False

    def _sleep(self) -> None:
        before = monotonic_ns()
        self._dispatch(self._timeout_ms(before))
        slept = monotonic_ns() - before
        if slept <= self._most_window:
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
        for fd, what, callback in [(fd, what, self._watched.get(fd)) for fd, what in events]:
            # An earlier callback of this round may have let go of it, and given its number away.
            if callback is not None and self._watched.get(fd) is callback:
                callback(what)
        for fd, wanted in [*self._files.items()]:
            if wanted and (callback := self._watched.get(fd)):
                callback(wanted)
        if self._timers:
            now = monotonic_ns()
            for timer in [*self._timers]:
                if timer.due is not None and timer.due <= now:
                    timer.fire()

    def close(self) -> None:
        """Give back the loop's own descriptors; the watched ones are their owners'."""
        if self._signals:
            signal.set_wakeup_fd(-1)
        self._wakeup.close()
        self._signalled.close()
        self._epoll.close()


def drain_fd(fd: int) -> int | None:
    """Take what makes a notification fd readable: an eventfd's count, a socket's or pipe's bytes.

    One read is enough for an eventfd; whatever else is in a socket wakes the loop once more. Return
    how many bytes came, None when somebody else took them, 0 when the fd is at its end or cannot be
    read: it would be ready for ever.
    """
    try:
        return len(os.read(fd, 4096))
    except BlockingIOError:
        return None
    except OSError:
        return 0
