"""Paths of unix sockets: which are in use, which are stale, and how one is claimed."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from .errors import ConfigError

#: Seconds to wait for another daemon that claims a path in the same folder.
_CLAIM_WITHIN = 1.0


@contextmanager
def claiming(folder: str) -> Iterator[None]:
    """Keep other daemons from claiming a path in `folder` meanwhile.

    Between bind and listen a live socket looks stale. The lock leaves no file behind; who cannot
    have it (a stranger may hold it in /tmp) goes on without.
    """
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        yield
        return
    try:
        deadline = time.monotonic() + _CLAIM_WITHIN
        while time.monotonic() < deadline:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                time.sleep(0.01)
        yield
    finally:
        os.close(fd)


_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISREG, "a file"),
)


def clear_stale(path: str) -> None:
    """Make room for a socket at `path`; raises ConfigError when something else has it."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        kind = next((name for test, name in _KINDS if test(mode)), "something else")
        raise ConfigError(f"{path} is {kind}, not a socket: remove it or choose another path")
    try:
        if not _is_stale(path):
            raise ConfigError(
                f"{path} is in use by another process: stop it or choose another path"
            )
    except PermissionError:
        raise ConfigError(f"{path} is a socket of another user: choose another path") from None
    with suppress(FileNotFoundError):
        os.unlink(path)


def _is_stale(path: str) -> bool:
    """Tell whether nobody listens at the socket `path`; raises PermissionError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return True
        except PermissionError:
            raise
        except OSError:
            return False  # a full backlog or another socket type: somebody is there
        return False


def remove_if_stale(path: str) -> bool:
    """Remove the socket `path`, if that can be, when nobody listens; tell whether nobody does."""
    stale = False
    with suppress(OSError):
        if _is_stale(path):
            with claiming(os.path.dirname(path) or "."):
                if stale := _is_stale(path):
                    os.unlink(path)
    return stale or not os.path.lexists(path)
