"""A command in a terminal of its own, and who sits at it."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import termios
import time
from collections.abc import Sequence
from typing import Any, Self

from launch import WITHIN, wait_readable


class Terminal:
    """A command in a terminal, on whose other end is `outer`; a context manager that ends it.

    `seen` is what it has printed since the last `expect`. `popen` may have its stderr elsewhere.
    """

    def __init__(
        self, command: Sequence[str], columns: int = 80, rows: int = 24, **popen: Any
    ) -> None:
        self.outer, inner = os.openpty()
        os.set_blocking(self.outer, False)
        termios.tcsetwinsize(inner, (rows, columns))
        self._modes = termios.tcgetattr(inner)
        files = {"stdin": inner, "stdout": inner, "stderr": inner}
        self.process = subprocess.Popen(command, **(files | popen))
        os.close(inner)
        self.seen = b""
        self._gone = False

    def expect(self, pattern: bytes) -> re.Match[bytes]:
        """Read until `pattern` was printed, which counts as seen then."""
        deadline = time.monotonic() + WITHIN
        while not (match := re.search(pattern, self.seen, re.MULTILINE)):
            wait_readable(self.outer, deadline, f"no {pattern!r} in {self.seen!r}")
            self.seen += os.read(self.outer, 1 << 16)
        self.seen = self.seen[match.end() :]
        return match

    def type(self, keys: bytes) -> None:
        """Press keys, or paste many."""
        deadline = time.monotonic() + WITHIN
        while keys:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([], [self.outer], [], left)[1]:
                raise TimeoutError(f"{len(keys)} keys are not read")
            keys = keys[os.write(self.outer, keys) :]

    def resize(self, columns: int, rows: int) -> None:
        """Give the terminal another size, and tell the command."""
        termios.tcsetwinsize(self.outer, (rows, columns))
        self.process.send_signal(signal.SIGWINCH)  # it is not its controlling terminal

    def is_as_it_was(self) -> bool:
        """Tell whether the terminal has the modes that it had before the command."""
        return termios.tcgetattr(self.outer) == self._modes

    def hang_up(self) -> None:
        """Take the terminal away."""
        os.close(self.outer)
        self._gone = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        if not self._gone:
            self.hang_up()
