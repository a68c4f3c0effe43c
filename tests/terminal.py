"""A command in a terminal of its own, and who sits at it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import termios
import time
from collections.abc import Sequence
from typing import Any, Self

from launch import WITHIN, wait_readable


class Terminal:
    """A command in a terminal, on whose other end is `outer`; a context manager that ends it.

    `seen` is what it has printed since the last `expect`.
    """

    def __init__(
        self, command: Sequence[str], columns: int = 80, rows: int = 24, **popen: Any
    ) -> None:
        self.outer, inner = os.openpty()
        os.set_blocking(self.outer, False)
        termios.tcsetwinsize(inner, (rows, columns))
        self.process = subprocess.Popen(command, stdin=inner, stdout=inner, stderr=inner, **popen)
        os.close(inner)
        self.seen = b""

    def expect(self, pattern: bytes) -> re.Match[bytes]:
        """Read until `pattern` was printed, which counts as seen then."""
        deadline = time.monotonic() + WITHIN
        while not (match := re.search(pattern, self.seen, re.MULTILINE)):
            wait_readable(self.outer, deadline, f"no {pattern!r} in {self.seen!r}")
            self.seen += os.read(self.outer, 1 << 16)
        self.seen = self.seen[match.end() :]
        return match

    def type(self, keys: bytes) -> None:
        """Press keys."""
        os.write(self.outer, keys)

    def resize(self, columns: int, rows: int) -> None:
        """Give the terminal another size, and tell the command."""
        termios.tcsetwinsize(self.outer, (rows, columns))
        self.process.send_signal(signal.SIGWINCH)  # it is not its controlling terminal

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.outer)
