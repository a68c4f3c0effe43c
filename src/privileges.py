"""What the daemon and its workers may still do once they have what they need.

A worker holds one guest's memory and reads what guests, frontends and clients send, so it is left
with nothing but its descriptors: `confine_worker`. The TLS gateway, to which anybody may come, is
left with sockets and no file: `confine_gateway`. The master keeps what sockets take to be made
and removed: `confine_master`. Both are for ever.
"""

from __future__ import annotations

import logging
import os
import pwd
import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import NamedTuple

from . import landlock, seccomp
from .errors import ConfigError
from .health import Privileges
from .kernel import capabilities, prctl, set_capabilities

_log = logging.getLogger(__name__)

#: Descriptors of a worker: 3 for each of 256 queues, 509 memory regions, 2 a client, and more.
MOST_FILES = 16384

#: Memory of a worker's own; guest memory and journals are files', and count nowhere.
MOST_MEMORY = 1 << 29

#: Times what its ports' journals hold, for a state that is saved or loaded.
_STATES = 4

# linux/prctl.h
_GET_DUMPABLE, _SET_DUMPABLE = 3, 4
_SET_NO_NEW_PRIVS, _GET_NO_NEW_PRIVS = 38, 39
_BOUNDING_DROP = 24

#: By their numbers (linux/capability.h); others are called by theirs.
_NAMES = {0: "chown", 1: "dac_override", 10: "net_bind_service"}

#: What a master has use for, if it was given it: sockets in folders and with owners of others, and
#: TCP ports below 1024.
_MASTERS = sum(1 << number for number in _NAMES)

#: What it takes to reach a socket of another user's.
_WAY_IN = 1 << 1

#: Kinds of memory that are left out of a core file: what is shared, as guests' memory is (core(5)).
_SHARED = 1 << 1 | 1 << 3 | 1 << 6 | 1 << 8

#: How much rather than the master a worker is ended when memory runs out (oom_score_adj, proc(5)).
_BEFORE_MASTER, _WORST = 250, 1000

_UMASK = 0o077


def _keep_capabilities(wanted: int) -> None:
    """Give up every capability but those of `wanted` that this process has."""
    _, permitted, inheritable = before = capabilities()
    kept = wanted & permitted
    after = kept, kept, kept & inheritable
    if after != before:
        set_capabilities(*after)


def _bound_capabilities(wanted: int) -> None:
    """Have no program that replaces this one be given others than `wanted`."""
    for number in range(64):
        if not wanted >> number & 1:
            try:
                prctl(_BOUNDING_DROP, number)
            except OSError:  # no more are known, or not ours to drop, and then no_new_privs does
                return


class User(NamedTuple):
    """Who to become."""

    name: str
    uid: int
    gid: int
    groups: list[int]


def _become(user: User) -> None:
    """Be `user`, for ever. Raises ConfigError when this process may not."""
    if (os.getresuid(), os.getresgid()) == ((user.uid,) * 3, (user.gid,) * 3):
        return
    try:
        os.setgroups(user.groups)
        os.setresgid(user.gid, user.gid, user.gid)
        os.setresuid(user.uid, user.uid, user.uid)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(
            f"--user: cannot become {user.name}: {reason}; start the daemon as root or as that user"
        ) from None


def confine_master(user: User | None) -> None:
    """Become `user`, if any, and give up what a master has no use for.

    To be called when every socket is made. Raises ConfigError when this process may not become
    that user.
    """
    os.umask(_UMASK)
    if user is not None:
        _become(user)
        prctl(_SET_DUMPABLE, 0)  # as the change of user does, but for a program that replaced it
    elif os.geteuid() == 0:
        _log.warning("it runs as root, where another user would do: name one with --user")
    _bound_capabilities(_MASTERS)
    _keep_capabilities(_MASTERS)
    prctl(_SET_NO_NEW_PRIVS, 1)
    prepare()


def confine_entrance(*, may_gain: bool = False) -> None:
    """Give up what people's gateways have no use for: all but root's way to others' sockets.

    With `may_gain` its children may be programs that gain privileges.
    """
    os.umask(_UMASK)
    _bound_capabilities(_WAY_IN)
    _keep_capabilities(_WAY_IN)
    if not may_gain:
        prctl(_SET_NO_NEW_PRIVS, 1)


@cache
def prepare() -> None:
    """Load what a confined process could not, here or for all that are forked from here."""
    _user_name()
    with suppress(OSError):
        seccomp.prepare(False)
    try:
        raise ConfigError("")
    except ConfigError:
        logging.Formatter().formatException(sys.exc_info())


@cache
def _user_name() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def confine_worker(sandbox: bool, journals: int) -> Privileges:
    """Leave this process nothing but its descriptors, and say what is in force.

    Without `sandbox` it keeps files, sockets and system calls, for debuggers, and nothing else.
    `journals` is how many bytes those of its ports hold.
    """
    limits = {
        resource.RLIMIT_NOFILE: MOST_FILES,
        resource.RLIMIT_DATA: MOST_MEMORY + _STATES * journals,
    }
    return _confine(sandbox, limits, network=False)


def confine_gateway(sandbox: bool) -> Privileges:
    """Leave this process what `confine_worker` does, and sockets."""
    return _confine(sandbox, {}, network=True)


def _confine(sandbox: bool, limits: dict[int, int], *, network: bool) -> Privileges:
    prepare()
    missing = []
    dumpable = prctl(_GET_DUMPABLE)
    prctl(_SET_DUMPABLE, 1)  # or, after a change of user, its files in /proc were root's
    _sacrifice()
    _keep_guests_from_cores()
    prctl(_SET_DUMPABLE, dumpable & 1)  # what the system chose as 2 may not be chosen
    limits = {**limits, resource.RLIMIT_CORE: 0, resource.RLIMIT_NPROC: 0}
    if not all(_limit(kind, most) for kind, most in limits.items()):
        missing.append("no limits: it may not set them")
    _keep_capabilities(0)
    prctl(_SET_NO_NEW_PRIVS, 1)
    files, memory = (
        None if most == resource.RLIM_INFINITY else most
        for most, _ in map(resource.getrlimit, (resource.RLIMIT_NOFILE, resource.RLIMIT_DATA))
    )
    no_new_privileges = bool(prctl(_GET_NO_NEW_PRIVS))
    left, *_ = capabilities()
    abi, filtered = 0, False
    if not sandbox:
        missing.append("no sandbox: it was switched off")
    else:
        try:
            abi = landlock.restrict_self(network=network)
        except OSError as error:
            missing.append(f"no Landlock: {error.strerror}")
        try:
            seccomp.restrict_self(network=network)
            filtered = True
        except OSError as error:
            missing.append(f"no seccomp: {error.strerror}")
    return Privileges(
        user=_user_name(),
        capabilities=_names(left),
        no_new_privileges=no_new_privileges,
        landlock=abi,
        seccomp=filtered,
        files=files,
        memory=memory,
        missing=missing,
    )


def _sacrifice() -> None:
    """Have the kernel end this process before the master, which starts another one."""
    _rewrite("oom_score_adj", lambda text: b"%d" % min(_WORST, int(text) + _BEFORE_MASTER))


def _keep_guests_from_cores() -> None:
    """Leave shared memory out of cores: what they are piped to need not heed their limit."""
    _rewrite("coredump_filter", lambda text: b"%#x" % (int(text, 16) & ~_SHARED))


def _rewrite(name: str, change: Callable[[bytes], bytes]) -> None:
    """Change what is in a file of this process's own in /proc, if there is one."""
    with suppress(OSError):
        fd = os.open(f"/proc/self/{name}", os.O_RDWR | os.O_CLOEXEC)
        try:
            os.write(fd, change(os.read(fd, 64)))
        finally:
            os.close(fd)


def _limit(kind: int, most: int) -> bool:
    """Say whether there is that limit now, or was a lower one."""
    _, hard = resource.getrlimit(kind)
    if hard != resource.RLIM_INFINITY:
        most = min(hard, most)
    try:
        resource.setrlimit(kind, (most, most))
    except (OSError, ValueError):  # such as a service's own filter
        return False
    return True


def _names(bits: int) -> list[str]:
    return [_NAMES.get(n, str(n)) for n in range(bits.bit_length()) if bits >> n & 1]
