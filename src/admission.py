"""Who is let in: users by name or number, and the look at who is at the other end of a socket."""

from __future__ import annotations

import grp
import logging
import os
import pwd
import socket
import struct
import time
from collections.abc import Callable, Collection

from .config import Access
from .errors import ConfigError
from .privileges import User

#: Log lines about peers that were refused, from one place in one minute; the rest are counted.
LOGGED_A_MINUTE = 10

#: The last number, (uid_t)-1, means "as it is" to chown(2).
_LARGEST_ID = (1 << 32) - 2

_UCRED = struct.Struct("=iII")  # unix(7): pid, uid, gid

_log = logging.getLogger(__name__)


def user_id(user: str) -> int:
    """Return the number of the user so called or numbered; raises ConfigError."""
    return _id(user, "user", lambda name: pwd.getpwnam(name).pw_uid)


def group_id(group: str) -> int:
    """Return the number of the group so called or numbered; raises ConfigError."""
    return _id(group, "group", lambda name: grp.getgrnam(name).gr_gid)


def _id(text: str, kind: str, look_up: Callable[[str], int]) -> int:
    if text.isascii() and text.isdigit():
        if len(text) <= 10 and int(text) <= _LARGEST_ID:
            return int(text)
        raise ConfigError(f"{text} is no {kind}'s number: they end at {_LARGEST_ID}")
    try:
        return look_up(text)
    except (KeyError, ValueError):
        raise ConfigError(f"there is no {kind} {text!r} on this machine") from None


def look_up(user: str) -> User:
    """Return whom NAME[:GROUP] means, by names or numbers, on this machine.

    Without a group it is in its own ones, with one in that alone. Raises ConfigError.
    """
    name, _, group = user.partition(":")
    try:
        found = pwd.getpwuid(user_id(name))
    except KeyError:
        raise ConfigError(f"there is no user {name!r} on this machine") from None
    if group:
        gid = group_id(group)
        return User(found.pw_name, found.pw_uid, gid, [gid])
    groups = os.getgrouplist(found.pw_name, found.pw_gid)
    return User(found.pw_name, found.pw_uid, found.pw_gid, groups)


def refusal(sock: socket.socket, allowed: Collection[int]) -> str | None:
    """Return why the peer of `sock` is not let in; None if it is.

    `allowed` are user numbers, none for everybody. A TCP peer's user is not known, nor asked for.
    """
    if not allowed or sock.family != socket.AF_UNIX:
        return None
    pid, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return None if uid in allowed else f"process {pid} of user {uid} may not connect"


class Sparing:
    """A log that peers cannot flood: so many warnings a minute, the rest as a number."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since = clock()
        self._said = 0
        self._kept_back = 0

    def warn(self, line: str) -> None:
        """Log `line`, or count it for the first line of another minute."""
        now = self._clock()
        if now - self._since >= 60:
            self._since, self._said = now, 0
        if self._said == LOGGED_A_MINUTE:
            self._kept_back += 1
            return
        self._said += 1
        if self._kept_back:
            line += f" ({self._kept_back} more such lines were left out)"
            self._kept_back = 0
        _log.warning("%s", line)


class Door:
    """Who comes in at the listener called `name`.

    Raises ConfigError when one of `access.allow` is nobody.
    """

    def __init__(self, name: str, access: Access) -> None:
        self._name = name
        self._allowed = frozenset(user_id(user) for user in access.allow)
        self._log = Sparing()

    def admit(self, sock: socket.socket) -> bool:
        """Tell whether the peer of `sock`, just accepted, is let in; it is closed when not."""
        why = refusal(sock, self._allowed)
        if why is None:
            return True
        sock.close()
        self._log.warn(f"{self._name}: {why}")
        return False
