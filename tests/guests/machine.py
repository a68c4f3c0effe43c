"""A guest as a process: its kernel's messages, and its end."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from launch import WITHIN, wait_readable

#: What bounds everything a guest sends that a test does not look for.
_MOST_LOG = 1 << 20


class Machine:
    """A running guest; a context manager that always ends it.

    The kernel's messages are its standard output: they are read by `expect_log`, and shown when a
    test fails.
    """

    def __init__(self, command: Sequence[str | Path], **popen: Any) -> None:
        self._seen = b""
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            **popen,
        )
        assert self.process.stdout is not None
        self._log = self.process.stdout.fileno()
        # Nobody reads while the test does something else, and the kernel must not wait for it.
        fcntl.fcntl(self._log, fcntl.F_SETPIPE_SZ, _MOST_LOG)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        assert self.process.stdout is not None
        print((self._seen + self.process.stdout.read()).decode(errors="backslashreplace"))
        self.process.stdout.close()

    def expect_log(self, pattern: bytes) -> re.Match[bytes]:
        """Wait until the kernel's messages, from the first one, have `pattern`."""
        deadline = time.monotonic() + WITHIN
        while not (match := re.search(pattern, self._seen)):
            wait_readable(self._log, deadline, f"{pattern!r} not in {self._seen!r}")
            data = os.read(self._log, 1 << 16)
            if not data:
                raise EOFError(f"{pattern!r} not in {self._seen!r}")
            self._seen += data
        return match

    def kill(self) -> None:
        """End it, as a crash does: each of its processes by SIGKILL."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def wait(self) -> int:
        """Wait until it has powered off and return its exit status."""
        return self.process.wait(WITHIN)
