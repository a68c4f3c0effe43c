"""What systemd wants to hear and what it gives: sd_notify(3), sd_listen_fds(3), its fd store.

Each is a few environment variables and one datagram, so no library is needed. Where systemd is not,
or does not listen, nothing happens: that never is a reason to end.
"""

from __future__ import annotations

import os
import select
import socket
import time
from array import array
from collections.abc import Sequence

#: The first descriptor that is passed (sd_listen_fds(3): SD_LISTEN_FDS_START).
_FIRST = 3

#: The most descriptors that the kernel takes in one datagram (linux/net/scm.h: SCM_MAX_FD).
MOST_FDS = 253

#: A name's bytes at most (sd_pid_notify_with_fds(3), FDNAME=).
_LONGEST_NAME = 255


def notify(state: str, fds: Sequence[int] = (), *, within: float = 0.0) -> bool:
    """Send assignments such as "READY=1", with `fds`, to $NOTIFY_SOCKET; say whether it took them.

    Where it has no room it is waited for at most `within` seconds: it may be busy for a moment.
    There are at most MOST_FDS `fds`; they stay the caller's.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
    deadline = time.monotonic() + within
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
        try:
            # Connected, it can be polled for room.
            sender.connect(address)
            room = select.poll()
            room.register(sender, select.POLLOUT)
            while room.poll(max(0.0, 1000 * (deadline - time.monotonic()))):
                try:
                    sender.sendmsg([state.encode()], rights)
                except BlockingIOError:  # somebody else took the room
                    continue
                return True
        except OSError:
            pass
    return False


def store(name: str, fds: Sequence[int], *, within: float = 1.0) -> bool:
    """Have systemd keep `fds` under `name` for the daemon's next start; say whether it was told.

    They come back from `listen_fds`, in any order. An open file that is in the store already is
    not stored again and keeps its name; one whose other end hangs up stays until `remove`. systemd
    silently refuses more than FileDescriptorStoreMax= (systemd.service(5)).

    Raises ValueError for a name that systemd would not take: 1 to 255 printable ASCII characters
    without ":".
    """
    _check(name)
    state = f"FDSTORE=1\nFDPOLL=0\nFDNAME={name}"
    deadline = time.monotonic() + within
    return all(
        notify(state, fds[at : at + MOST_FDS], within=max(0.0, deadline - time.monotonic()))
        for at in range(0, len(fds), MOST_FDS)
    )


def remove(name: str, *, within: float = 1.0) -> bool:
    """Have systemd close everything that it keeps under `name`; say whether it was told.

    Raises ValueError as `store` does.
    """
    _check(name)
    return notify(f"FDSTOREREMOVE=1\nFDNAME={name}", within=within)


def _check(name: str) -> None:
    if not (name.isascii() and name.isprintable() and 0 < len(name) <= _LONGEST_NAME) or (
        ":" in name
    ):
        raise ValueError(f"systemd keeps nothing under the name {name!r}")


def listen_fds() -> list[tuple[str, int]]:
    """Return the (name, descriptor) pairs that systemd passed to this process, once.

    Those are a socket unit's listeners, named by FileDescriptorName=, and what the fd store kept.
    They are close-on-exec from now on, and the environment variables are gone, so that no child
    takes them for its own. A descriptor without a name is called "unknown".
    """
    environment = [os.environ.pop(f"LISTEN_{key}", "") for key in ("PID", "FDS", "FDNAMES")]
    pid, count, names = environment
    if pid != str(os.getpid()) or not (count.isascii() and count.isdigit()):
        return []
    called = names.split(":") if names else []
    found: list[tuple[str, int]] = []
    for at in range(int(count)):
        try:
            os.set_inheritable(_FIRST + at, False)
        except OSError:  # not open: somebody counted wrong
            break
        found.append((called[at] if at < len(called) else "unknown", _FIRST + at))
    return found


def watchdog_s() -> float | None:
    """Return after how many seconds without "WATCHDOG=1" systemd ends this process, or None.

    Send it at least twice as often (sd_watchdog_enabled(3): "every half of the time").
    """
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    if not (microseconds.isascii() and microseconds.isdigit() and int(microseconds)):
        return None
    return int(microseconds) / 1e6
