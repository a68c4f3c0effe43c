"""A log's old files: numbered from the newest, compressed, and no more than they may be.

PATH.1 is the newest; compressed it is PATH.1.gz, and PATH.1.times its index. A file is compressed
by a child that runs when nothing else wants to, to a name of its own. Only once all of it is there
it takes the place of the other, which goes then: where both are, the one that is not compressed was
on its way out.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import signal
import stat
from collections.abc import Collection, Iterator
from contextlib import suppress
from typing import NoReturn

from .config import MOST_LOGS_KEPT, Log

_log = logging.getLogger(__name__)

#: Files that are compressed at a time, of all logs.
_MOST_CHILDREN = 2

#: Bytes compressed at a time; zlib's default level; a gzip header and trailer (zlib(3)).
_CHUNK, _LEVEL, _GZIP = 1 << 18, 6, 31

#: Exit status of a child that could not.
_FAILED = 1

_children: set[int] = set()


class Archive:
    """The old files of the log at `path`, a path without links, as `described`."""

    def __init__(self, path: str, described: Log) -> None:
        self._path = path
        self._described = described
        self._made = path + ".gz.new"
        self._pid: int | None = None
        # The file that is compressed, open until it is: no other file can be taken for it.
        self._source: int | None = None
        self._given_up: set[tuple[int, int]] = set()  # files that could not be compressed
        with suppress(OSError):  # of a master that died
            os.unlink(self._made)

    def shift(self) -> None:
        """Call each file by the next number; the last one gives way. Raises OSError."""
        keep = self._described.keep
        self._tidy()
        self._given_up.clear()
        free = next((n for n in range(1, keep + 1) if not any(self._exist(n))), keep)
        if not keep:
            _remove(_times(self._path))
        elif any(self._exist(free)):
            _remove(self._name(free) + ".gz")
        for number in range(free, 0, -1):
            old, new = self._name(number - 1), self._name(number)
            # The index goes first: one without its file is nothing, one beside another would lie.
            _remove(_times(new))
            with suppress(FileNotFoundError):
                os.rename(_times(old), _times(new))
            if os.path.lexists(old) or number == 1:
                os.rename(old, new)
            else:
                _remove(new)
                os.rename(old + ".gz", new + ".gz")

    def mind(self, current: int, busy: Collection[os.stat_result]) -> bool:
        """Remove what is too much beside a file of `current` bytes; begin to compress one.

        Not one of those `busy`. Returns whether that is all for now; else too many children of
        other logs are at work.
        """
        self._fit(current)
        if not self._described.compress or self._pid is not None:
            return True
        for number in range(1, MOST_LOGS_KEPT + 1):
            plain, compressed = self._exist(number)
            if plain and not compressed:
                if len(_children) >= _MOST_CHILDREN:
                    return False
                if self._begin(self._name(number), busy):
                    return True
        return True

    def reap(self) -> bool:
        """See whether the child has ended, after SIGCHLD."""
        if self._pid is None:
            return False
        pid, status = os.waitpid(self._pid, os.WNOHANG)
        if pid:
            _children.discard(self._pid)
            self._pid = None
            self._ended(os.waitstatus_to_exitcode(status))
            self._let_go()
        return pid != 0

    def stop(self) -> None:
        """End the child; what it had begun is begun again some day."""
        if self._pid is not None:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            _children.discard(self._pid)
            self._pid = None
            _remove(self._made)
            self._let_go()

    def _let_go(self) -> None:
        source, self._source = self._source, None
        if source is not None:
            os.close(source)

    def _name(self, number: int) -> str:
        return f"{self._path}.{number}" if number else self._path

    def _exist(self, number: int) -> tuple[bool, bool]:
        """Say whether there is a file of that number, and one that is compressed."""
        name = self._name(number)
        return os.path.lexists(name), os.path.lexists(name + ".gz")

    def _tidy(self) -> None:
        """Remove each file that is there compressed, too."""
        for number in range(1, MOST_LOGS_KEPT + 1):
            if all(self._exist(number)):
                _remove(self._name(number))

    def _fit(self, current: int) -> None:
        described = self._described
        if not described.total_bytes:
            return
        self._tidy()
        left = described.total_bytes - max(current, described.max_bytes) - _size(_times(self._path))
        for number in range(1, MOST_LOGS_KEPT + 1):
            name = self._name(number)
            names = (name, name + ".gz", _times(name))
            left -= sum(map(_size, names))
            if left < 0:
                for each in names:
                    _remove(each)

    def _begin(self, name: str, busy: Collection[os.stat_result]) -> bool:
        """Compress a file; say whether that has begun."""
        try:
            # A pipe in its place is not waited for, and no link is followed.
            source = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return False
        self._source = source
        now = os.fstat(source)
        if (
            stat.S_ISREG(now.st_mode)
            and (now.st_dev, now.st_ino) not in self._given_up
            and not any(os.path.samestat(now, other) for other in busy)
        ):
            try:
                self._pid = self._fork(source, now)
            except OSError as error:
                self._fail(error)
        if self._pid is None:
            self._let_go()
            return False
        _children.add(self._pid)
        return True

    def _fork(self, source: int, now: os.stat_result) -> int:
        _remove(self._made)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        target = os.open(self._made, flags, 0o600)
        # No handler of ours may run in the child.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            with suppress(PermissionError):
                os.fchown(target, -1, now.st_gid)
            os.fchmod(target, stat.S_IMODE(now.st_mode))
            pid = os.fork()
            if pid == 0:
                _compress(source, target, now)
            return pid
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            os.close(target)

    def _ended(self, code: int) -> None:
        try:
            if code:
                why = (
                    os.strerror(code) if code > 0 else signal.strsignal(-code) or f"signal {-code}"
                )
                raise OSError(code, why)
            if self._take_place():
                return
        except OSError as error:
            self._fail(error)
        _remove(self._made)

    def _take_place(self) -> bool:
        """Have what was made replace the file, whatever number that has now."""
        assert self._source is not None  # noqa: S101
        source = os.fstat(self._source)
        for number in range(1, MOST_LOGS_KEPT + 1):
            name = self._name(number)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.lstat(name), source):
                    os.rename(self._made, name + ".gz")
                    os.unlink(name)
                    return True
        return False

    def _fail(self, error: OSError) -> None:
        reason = (error.strerror or str(error)).lower()
        if self._source is not None:
            source = os.fstat(self._source)
            self._given_up.add((source.st_dev, source.st_ino))
        _log.warning("an old file of log %s cannot be compressed: %s", self._path, reason)


def files(path: str) -> Iterator[tuple[str, str]]:
    """Yield the files of the log at `path`, oldest first, each with what its index is called."""
    for number in range(MOST_LOGS_KEPT, 0, -1):
        name = f"{path}.{number}"
        for each in (name + ".gz", name):
            if os.path.exists(each):
                yield each, _times(name)
                break
    if os.path.exists(path):
        yield path, _times(path.removesuffix(".gz"))


def _times(name: str) -> str:
    return name + ".times"


def _remove(name: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(name)


def _size(name: str) -> int:
    try:
        return os.lstat(name).st_size
    except OSError:
        return 0


def _compress(source: int, target: int, now: os.stat_result) -> NoReturn:
    """Have this forked child compress `source` to `target`; ends with an errno."""
    status = _FAILED
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        os.dup2(source, 0)
        os.dup2(target, 1)
        os.closerange(3, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        with suppress(OSError):  # a service may not be let
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        import zlib  # only here

        gzip = zlib.compressobj(_LEVEL, zlib.DEFLATED, _GZIP)
        while data := os.read(0, _CHUNK):
            _write(gzip.compress(data))
        _write(gzip.flush())
        os.utime(1, ns=(now.st_atime_ns, now.st_mtime_ns))
        os.fsync(1)
        status = 0
    except OSError as error:
        status = error.errno or errno.EIO
    except BaseException:  # it must not become a second master
        status = errno.EIO
    finally:
        os._exit(status)


def _write(data: bytes) -> None:
    while data:
        data = data[os.write(1, data) :]
