"""A person at a guest's console."""

from __future__ import annotations

import os
import re
import select
import time
from collections.abc import Callable
from contextlib import suppress

from launch import WITHIN, Daemon

PROMPT = rb"guest# "

#: Seconds for which a guest may stand still. One without KVM says nothing while it boots, which
#: takes long where many do.
STILL = 3 * WITHIN

#: Where a person can be, for the `place` fixture.
BACKENDS = ("network", "unix", "pty", "nested on a terminal", "nested on pipes")


class Console:
    """A person at a guest's console, on one descriptor or one for each direction (not owned).

    Nothing may stand still for STILL seconds; how long it all takes is the machine's affair.
    """

    def __init__(self, reads: int, writes: int | None = None) -> None:
        self._reads = reads
        self._writes = reads if writes is None else writes
        self._unread = bytearray()
        self._unsent = bytearray()
        os.set_blocking(self._reads, False)
        os.set_blocking(self._writes, False)

    def _exchange(self, within: float, what: str) -> None:
        """Send and receive what is possible, at least one byte of either."""
        wanted = [self._writes] if self._unsent else []
        readable, writable, _ = select.select([self._reads], wanted, [], max(0.0, within))
        if not readable and not writable:
            raise TimeoutError(f"{what} after {bytes(self._unread[-500:])!r}")
        if writable:
            del self._unsent[: os.write(self._writes, self._unsent[: 1 << 16])]
        if readable:
            data = os.read(self._reads, 1 << 16)
            if not data:
                raise EOFError(f"{what} in {bytes(self._unread[-500:])!r}")
            self._unread += data

    def until(self, pattern: bytes) -> bytes:
        """Read to the end of the first `pattern`, and return what came before it."""
        looked = 0
        while not (match := re.compile(pattern).search(self._unread, looked)):
            looked = max(0, len(self._unread) - 256)  # longer than any pattern's match
            self._exchange(STILL, f"no {pattern!r}")
        before = bytes(self._unread[: match.start()])
        del self._unread[: match.end()]
        return before

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes."""
        while len(self._unread) < count:
            self._exchange(STILL, f"{len(self._unread)} bytes, not {count}")
        taken = bytes(self._unread[:count])
        del self._unread[:count]
        return taken

    def send(self, data: bytes) -> None:
        """Send `data`, reading meanwhile: an echo nobody reads would stop the guest's input."""
        self._unsent += data
        while self._unsent:
            self._exchange(STILL, f"{len(self._unsent)} bytes not taken")

    def type(self, line: bytes, gap: float) -> None:
        """Send `line` like a typist, one character each `gap` seconds."""
        for character in line:
            self.send(bytes([character]))
            pause = time.monotonic() + gap
            with suppress(TimeoutError):
                while True:
                    self._exchange(pause - time.monotonic(), "typing")

    def features(self) -> set[int]:
        """Return the feature bits that the guest's console driver took."""
        bits = self.run(b"cat /sys/bus/virtio/drivers/virtio_console/virtio*/features").split()[0]
        return {bit for bit, taken in enumerate(bits) if taken == ord("1")}

    def run(self, command: bytes) -> bytes:
        """Run a shell command at the prompt and return its output; it must succeed."""
        # The quotes keep the marks out of the command's echo.
        self.send(b"echo 'be''gin'; " + command + b"; echo 'en''d' $?\n")
        self.until(rb"begin\r?\n")
        output = self.until(rb"end 0\r?\n")
        self.until(PROMPT)
        return output


#: What the fixtures of conftest.py give.
Attach = Callable[[int | str], Console]
Place = Callable[[str], tuple[Daemon, Console]]
