"""Ports' log files as the master has them: opened, kept for every worker, begun anew.

A worker opens nothing, it inherits. Each file has a generation, which counts up. When one is full
it is renamed, PATH to PATH.1, PATH.1 to PATH.2 and so on, and another one takes its place, so that
`tail -F` goes on. Its worker still writes to the old one, whatever it is called, until it is told.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
import time
from collections.abc import Mapping
from contextlib import suppress

from .config import Log
from .errors import ConfigError

_log = logging.getLogger(__name__)

#: Seconds to wait for another daemon that lets go of a file.
_FREE_WITHIN = 1.0

_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY

#: What a file is called until it takes the place of the one before.
_NEW = ".new"


class LogFiles:
    """One port's log: `files` has the descriptors by generation.

    The last one is the file at the path; those before it a worker may still be writing. `files`
    given are another program's, whose place this one takes; else the file is opened, and made if it
    is not there. Raises ConfigError when it cannot be.
    """

    def __init__(self, described: Log, files: Mapping[int, int] | None = None) -> None:
        self.described = described
        # The place of a link's target, not that of the link, is where files change their names.
        self._path = os.path.realpath(described.path)
        self._said = ""
        self.files = dict(files or {})
        if not self.files:
            try:
                # No worker's record knows this generation, not even from a log of earlier.
                self.files[time.time_ns()] = _open(self._path, _FREE_WITHIN)
            except OSError as error:
                raise ConfigError(
                    f"cannot write log {described.path}: {_reason(self._path, error)}"
                ) from error

    @property
    def newest(self) -> int:
        """The generation of the file that all that follows goes to."""
        return max(self.files)

    def settled(self, generation: int) -> None:
        """Close the files before `generation`, which the port's worker writes now."""
        for older in [number for number in self.files if number < min(generation, self.newest)]:
            os.close(self.files.pop(older))

    def rotate(self) -> bool:
        """Begin a new file; return whether there is one, which the worker has to be told.

        There is none while the worker still writes an older one. Why it cannot be made is logged
        once, and the file at the path grows on.
        """
        if len(self.files) > 1:
            return False
        if not self._is_in_place():  # somebody else did it
            return self.reopen()
        new = self._path + _NEW
        try:
            fd = _open(new, 0)
            try:
                self._resemble(fd)
                self._shift()
                os.rename(new, self._path)
            except OSError:
                os.close(fd)
                with suppress(OSError):
                    os.unlink(new)
                raise
        except OSError as error:
            return self._fail("rotated", error)
        return self._add(fd)

    def reopen(self) -> bool:
        """Open what is at the path now; return whether that is another file, as in `rotate`."""
        if self._is_in_place():
            return False
        try:
            return self._add(_open(self._path, 0))
        except OSError as error:
            return self._fail("opened anew", error)

    def close(self) -> None:
        """Close everything."""
        while self.files:
            os.close(self.files.popitem()[1])

    def _add(self, fd: int) -> bool:
        self.files[self.newest + 1] = fd
        self._said = ""
        return True

    def _fail(self, what: str, error: OSError) -> bool:
        said = f"log {self.described.path} cannot be {what}: {_reason(self._path, error)}"
        if said != self._said:
            _log.warning("%s", said)
            self._said = said
        return False

    def _is_in_place(self) -> bool:
        """Tell whether the newest file is the one at the path."""
        try:
            there = os.stat(self._path)
        except OSError:
            return False
        return os.path.samestat(there, os.fstat(self.files[self.newest]))

    def _resemble(self, fd: int) -> None:
        """Give a new file the group and permissions of the one before: its readers stay."""
        before = os.fstat(self.files[self.newest])
        with suppress(PermissionError):
            os.fchown(fd, -1, before.st_gid)
        os.fchmod(fd, stat.S_IMODE(before.st_mode))

    def _shift(self) -> None:
        """Call each file by the next number; the last one gives way."""
        names = [self._path, *(f"{self._path}.{n}" for n in range(1, self.described.keep + 1))]
        free = next(
            (n for n, name in enumerate(names) if not os.path.lexists(name)), len(names) - 1
        )
        for number in range(free, 0, -1):
            os.rename(names[number - 1], names[number])


def _open(path: str, wait: float) -> int:
    """Return a descriptor that appends to the file `path`, and is alone in doing so.

    Whoever else has it is waited for, some seconds. Raises OSError.
    """
    # A pipe without a reader is not waited for: it is no file.
    fd = os.open(path, _FLAGS | os.O_NONBLOCK, 0o600)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
        deadline = time.monotonic() + wait
        while not _locked(fd):
            if time.monotonic() >= deadline:
                raise OSError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK))
            time.sleep(0.01)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _reason(path: str, error: OSError) -> str:
    match error.errno:
        case errno.ENOENT:
            return f"folder {os.path.dirname(path)} does not exist"
        case errno.EWOULDBLOCK:
            return "another port or daemon writes it"
        case errno.ENXIO:
            return "it is not a file"
        case _:
            return (error.strerror or str(error)).lower()
