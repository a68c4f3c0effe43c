"""Ports' log files as the master has them: opened, kept for every worker, begun anew.

A worker opens nothing, it inherits. Each file has a generation, which counts up. When one is full
or its time is over it is renamed, PATH to PATH.1, PATH.1 to PATH.2 and so on, and another one takes
its place, so that `tail -F` goes on. Its worker still writes to the old one, whatever it is called,
until it is told. What becomes of the old ones stands in `archive`.

Beside a raw log is an index, PATH.times, of what its worker notes in shared memory: entries of four
u64, little endian: the file's size, the journal's number, the offset in that, and when the byte
there came, nanoseconds since 1970. It is nobody's promise: entries may be missing, or come twice.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
import struct
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress

from .archive import Archive
from .config import Log
from .errors import ConfigError
from .ledger import LogEntry

_log = logging.getLogger(__name__)

#: Seconds to wait for another daemon that lets go of a file.
_FREE_WITHIN = 1.0

_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY

#: An entry of the index, and what an index may have at least; beyond that, no more than its log.
ENTRY = struct.Struct("<4Q")
_SMALL_INDEX = 1 << 20

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
        self._indices: dict[int, int] = {}
        self.files = dict(files or {})
        if not self.files:
            try:
                # No worker's record knows this generation, not even from a log of earlier.
                self.files[time.time_ns()] = _open(self._path, _FREE_WITHIN)
            except OSError as error:
                raise ConfigError(
                    f"cannot write log {described.path}: {_reason(self._path, error)}"
                ) from error
        self._archive = Archive(self._path, described)
        self._unminded = True  # something about old files changed
        self._period = self._begun()

    @property
    def newest(self) -> int:
        """The generation of the file that all that follows goes to."""
        return max(self.files)

    def settled(self, generation: int) -> None:
        """Close the files before `generation`, which the port's worker writes now."""
        for older in [number for number in self.files if number < min(generation, self.newest)]:
            self._unminded = True
            os.close(self.files.pop(older))
            if (index := self._indices.pop(older, None)) is not None:
                os.close(index)

    def mind(self) -> None:
        """See to the old files, those that no worker writes any more."""
        if self._unminded:
            size = os.fstat(self.files[self.newest]).st_size
            done = self._archive.mind(size, [*map(os.fstat, self.files.values())])
            self._unminded = not done

    def reap(self) -> None:
        """See whether a child of this log has ended, after SIGCHLD."""
        self._unminded |= self._archive.reap()

    def stop(self) -> None:
        """Leave nobody at work on old files, for now."""
        self._archive.stop()
        self._unminded = True

    @property
    def left(self) -> float | None:
        """The seconds until the file's time is over, None for never."""
        age = self.described.max_age
        return (self._period + 1) * age - time.time() if age else None

    def grow_old(self) -> bool:
        """Begin a new file if the time of this one is over; return as `rotate` does."""
        if self.left is None or self.left > 0:
            return False
        if os.fstat(self.files[self.newest]).st_size:
            return self.rotate()
        self._period = self._begun()
        return False

    def note(self, entries: Iterable[LogEntry], journal: int) -> None:
        """Put these in the index, of a port whose journal has that number."""
        texts: dict[int, bytes] = {}
        for entry in entries:
            text = ENTRY.pack(entry.size, journal, entry.offset, entry.time)
            texts[entry.generation] = texts.get(entry.generation, b"") + text
        for generation, text in texts.items():
            index = self._index(generation)
            if index is None:
                continue
            size = os.fstat(index).st_size
            if size < max(_SMALL_INDEX, os.fstat(self.files[generation]).st_size):
                with suppress(OSError):  # without room for it there is none
                    os.write(index, bytes(-size % ENTRY.size) + text)

    def _index(self, generation: int) -> int | None:
        """Return the index of the file of that generation, None when there is none."""
        if generation == self.newest and generation not in self._indices and self._is_in_place():
            with suppress(OSError):  # it goes without
                self._indices[generation] = index = _open(self._path + ".times", None)
                self._resemble(index)
        return self._indices.get(generation)

    def _begun(self) -> int:
        """Return when the newest file was begun: in which of the spans that it may be used."""
        now = os.fstat(self.files[self.newest])
        # What was written last was written in the same span.
        return int(now.st_mtime if now.st_size else time.time()) // (self.described.max_age or 1)

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
                self._archive.shift()
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
        self.stop()
        for fds in (self._indices, self.files):
            while fds:
                os.close(fds.popitem()[1])

    def _add(self, fd: int) -> bool:
        self.files[self.newest + 1] = fd
        self._said = ""
        self._period = self._begun()
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
        """Give a new file the group and permissions of the newest: its readers stay."""
        before = os.fstat(self.files[self.newest])
        with suppress(PermissionError):
            os.fchown(fd, -1, before.st_gid)
        os.fchmod(fd, stat.S_IMODE(before.st_mode))


def _open(path: str, wait: float | None) -> int:
    """Return a descriptor that appends to the file `path`, and is alone in doing so.

    Whoever else has it is waited for, some seconds; None lets there be others. Raises OSError.
    """
    # A pipe without a reader is not waited for: it is no file.
    fd = os.open(path, _FLAGS | os.O_NONBLOCK, 0o600)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
        deadline = time.monotonic() + (wait or 0)
        while wait is not None and not _locked(fd):
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
