"""One started virtqueue: a ring driver and the two descriptors that notify."""

from __future__ import annotations

import os
import select
import socket
import time
from typing import Literal, Protocol

from .driver import RingDriver, Used

#: How the device calls; "inband" is by messages, and kicks are messages then too.
CallAs = Literal["eventfd", "socketpair", "inband"]

_ONE = (1).to_bytes(8, "little")


class Inband(Protocol):
    """Notifications as messages; the frontend's part."""

    def kick_inband(self, ring: int) -> None:
        """Kick a ring; it has been served when this returns."""

    def calls_fd(self) -> int | None:
        """Return what is readable once there may be calls, None when none will come."""

    def take_backend(self) -> None:
        """Add what came to each queue's `called`."""


class Queue:
    """A ring and its notifications; `Frontend.start_queue` makes it.

    Kicks go out through an eventfd. Calls come in through an eventfd, as QEMU and most others
    have it, or a unix stream socket on which a call is 8 bytes, as User Mode Linux has it. With
    `inband` both are messages instead. `kicks` and `calls` count notifications; `called` are calls
    by message that nobody has taken yet.
    """

    def __init__(self, index: int, driver: RingDriver) -> None:
        self.index = index
        self.driver = driver
        self.inband: Inband | None = None
        self.kicks = 0
        self.calls = 0
        self.called = 0
        self._kick_fd: int | None = None
        self._call_fd: int | None = None
        self._call_kind: CallAs = "eventfd"

    @property
    def call_fd(self) -> int | None:
        """The descriptor that is readable once the device called; None when there is none."""
        return self._call_fd if self.inband is None else self.inband.calls_fd()

    def new_kick_fd(self, *, blocking: bool = False) -> int:
        """Return a fresh kick descriptor, to be sent; it stays this queue's."""
        _close(self._kick_fd)
        flags = os.EFD_CLOEXEC | (0 if blocking else os.EFD_NONBLOCK)
        self._kick_fd = os.eventfd(0, flags)
        return self._kick_fd

    def new_call_fd(self, call_as: CallAs) -> int:
        """Return the device's end of a fresh call channel; the caller sends it, then closes it."""
        _close(self._call_fd)
        self._call_kind = call_as
        if call_as == "eventfd":
            self._call_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            return os.dup(self._call_fd)
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self._call_fd = ours.detach()
        return theirs.detach()

    def close(self) -> None:
        """Close both descriptors; the ring stays as it is."""
        _close(self._kick_fd)
        _close(self._call_fd)
        self._kick_fd = self._call_fd = self.inband = None
        self.called = 0

    def kick(self) -> None:
        """Notify the device, wanted or not."""
        if self.inband is not None:
            self.kicks += 1
            self.inband.kick_inband(self.index)
            return
        if self._kick_fd is None:
            raise ValueError(f"queue {self.index} is not started")
        self.kicks += 1
        os.write(self._kick_fd, _ONE)

    def notify(self) -> bool:
        """Publish what was offered, kick if the device wants that, and tell whether it did."""
        self.driver.publish()
        needed = self.driver.kick_needed()
        if needed:
            self.kick()
        return needed

    def take_calls(self) -> int:
        """Return how many calls came since the last time, and forget them."""
        if self.inband is not None:
            self.inband.take_backend()
            count, self.called = self.called, 0
            self.calls += count
            return count
        if self._call_fd is None:
            return 0
        try:
            data = os.read(self._call_fd, 8 if self._call_kind == "eventfd" else 1 << 16)
        except BlockingIOError:
            return 0
        except ConnectionResetError:
            data = b""
        if not data:  # the device closed its end: no call will come
            os.close(self._call_fd)
            self._call_fd = None
            return 0
        eventfd = self._call_kind == "eventfd"
        count = int.from_bytes(data, "little") if eventfd else len(data) // 8
        self.calls += count
        return count

    def wait(self, timeout: float = 10.0) -> list[Used]:
        """Return the chains used since the last time, at least one.

        Raises TimeoutError when the device uses none, or does not call, within `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while True:
            used = self.driver.reap()
            if used:
                return used
            if not self.driver.enable_calls():
                wait_readable([self.call_fd], deadline, f"a used chain on queue {self.index}")
                self.take_calls()


def wait_readable(fds: list[int | None], deadline: float, what: str) -> list[int]:
    """Return those of `fds` that are readable or hung up; wait until `deadline` (monotonic).

    Raises TimeoutError that names `what` was awaited.
    """
    poll = select.poll()
    for fd in fds:
        if fd is not None:
            poll.register(fd, select.POLLIN)
    ready = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
    if not ready:
        raise TimeoutError(f"{what} did not come in time")
    return [fd for fd, _ in ready]


def _close(fd: int | None) -> None:
    if fd is not None:
        os.close(fd)
