"""How one program takes another's place as the master, with everything that it held.

On SIGHUP the master executes itself anew, in the same process: its workers stay its children, and
every descriptor keeps its number. A program that was ended and is started again by systemd gets the
same descriptors from the fd store, and gives them the numbers that they had.

Before that, the same command line is tried in a process of its own: a configuration that cannot be
read, or a program that does not start or understand what it would be handed, changes nothing.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterable

import msgspec

_TRIAL = "VHOST_DEVICE_CONSOLE_TRIAL"
_HANDED_OVER = "VHOST_DEVICE_CONSOLE_STATE"

#: How long a trial may take, in seconds.
TRIAL_WITHIN = 30.0


def on_trial() -> bytes | None:
    """Return what this process would be handed if it took over, as it is only to find out.

    None when it is no trial.
    """
    number = os.environ.get(_TRIAL)
    if number is None:
        return None
    with open(int(number), "rb", closefd=False) as file:
        file.seek(0)
        return file.read()


def _command() -> list[str]:
    return [sys.executable, *sys.orig_argv[1:]]


def trial(state: msgspec.Struct) -> subprocess.Popen[bytes]:
    """Start a trial of this program, its configuration and `state`; its exit status tells.

    Raises OSError when it cannot be started.
    """
    file = _file_of(state)
    try:
        return subprocess.Popen(
            _command(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={**os.environ, _TRIAL: str(file)},
            pass_fds=[file],
        )
    finally:
        os.close(file)


def _file_of(state: msgspec.Struct) -> int:
    file = os.memfd_create("state", 0)
    with open(file, "wb", closefd=False) as whole:
        whole.write(msgspec.msgpack.encode(state))
    os.lseek(file, 0, os.SEEK_SET)
    return file


def hand_over(state: msgspec.Struct, fds: Iterable[int]) -> None:
    """Replace this program by itself, with `state` and `fds`; does not return.

    Raises OSError when that cannot be done, with everything as it was.
    """
    kept = [*fds]
    file = _file_of(state)
    try:
        for fd in kept:
            os.set_inheritable(fd, True)
        command = _command()
        os.execve(command[0], command, {**os.environ, _HANDED_OVER: str(file)})  # noqa: S606
    finally:
        os.close(file)
        for fd in kept:
            os.set_inheritable(fd, False)


def take_over() -> bytes | None:
    """Return the state that this program was handed, once; None when it starts anew."""
    number = os.environ.pop(_HANDED_OVER, None)
    if number is None:
        return None
    with open(int(number), "rb") as file:
        return file.read()


def settle(found: list[int], numbers: Iterable[tuple[int, int]]) -> list[int]:
    """Give descriptors the numbers that they had; return those in `found`, as they are then.

    `numbers` are pairs of a descriptor in `found` and the number that the same file had. What is
    in `found` is moved out of the way, and whatever else has such a number gives way: this program
    has just begun, so it is somebody's who started it.
    """
    pairs = [*numbers]
    above = max([*found, *(number for _, number in pairs)], default=0) + 1
    moved = {fd: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above) for fd in found}
    for fd in found:
        os.close(fd)
    for fd, number in pairs:
        os.dup2(moved[fd], number, inheritable=False)
    return [moved[fd] for fd in found]
