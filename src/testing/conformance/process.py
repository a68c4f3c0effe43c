"""A backend that the check itself starts, and starts again whenever it is gone."""

from __future__ import annotations

import os
import shlex
import socket
import stat
import subprocess
import time
from types import TracebackType
from typing import Self

from .bench import CannotRunError

_READY_S = 10.0
_END_S = 5.0
_PAUSE_S = 0.01


class Process:
    """A command whose vhost-user socket is at `path`; it runs within a `with` block.

    What it says on stdout and stderr is not kept.
    """

    def __init__(self, command: str, path: str) -> None:
        self._command = shlex.split(command)
        self._path = path
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """End what is left of it, start it and wait for its socket. Raises CannotRunError."""
        self.stop()
        if os.path.exists(self._path) and stat.S_ISSOCK(os.stat(self._path).st_mode):
            os.unlink(self._path)  # of one that was killed
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        except (OSError, IndexError) as error:
            reason = getattr(error, "strerror", None) or "nothing to start"
            raise CannotRunError(f"cannot start {' '.join(self._command)}: {reason}") from None
        deadline = time.monotonic() + _READY_S
        while not self._listens():
            ended = self.ended()
            if ended:
                self.stop()
                raise CannotRunError(f"{self._command[0]}: {ended} at once")
            if time.monotonic() > deadline:
                self.stop()
                raise CannotRunError(f"{self._command[0]} did not make {self._path}")
            time.sleep(_PAUSE_S)

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(self._path)
            except OSError:
                return False
        return True

    def ended(self) -> str:
        """Say how it has ended by itself, "" when it has not."""
        status = None if self._process is None else self._process.poll()
        if status is None:
            return ""
        if status < 0:
            return f"the backend was ended by signal {-status}"
        return f"the backend ended with exit status {status}"

    def stop(self) -> None:
        """End it: asked to, then made to."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
