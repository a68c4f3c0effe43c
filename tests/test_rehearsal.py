"""The master's rehearsal of a worker: it happens, and leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

from launch import Daemon

#: What a rehearsal could leave: descriptors, children, handlers, blocked signals, references.
LEFT = """
import gc, os, signal
def left():
    try:
        children = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        children = None
    handlers = {n: signal.getsignal(n) for n in signal.valid_signals()}
    wakeup = signal.set_wakeup_fd(-1)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    return sorted(os.listdir("/proc/self/fd")), children, handlers, wakeup, blocked
"""


def rehearsed(code: str) -> str:
    """Return what `code` prints about a rehearsal in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", "from vhost_device_console import rehearsal\n" + code],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stderr == ""
    return done.stdout


def test_a_rehearsal_leaves_nothing_behind() -> None:
    said = rehearsed(LEFT + "before = left(); rehearsal.rehearse(); print(before == left())")
    assert said == "True\n"


def test_a_guest_is_served_to_its_end() -> None:
    # The person at the console got the guest's byte, and the guest the person's, in every round.
    said = rehearsed(
        "from vhost_device_console import worker\n"
        "from vhost_device_console.worker import guest\n"
        "halls = []\n"
        "def run(described, heirlooms):\n"
        "    halls.append(guest.Guest(described, heirlooms))\n"
        "    halls[0].run()\n"
        "    health = halls[0]._health()\n"
        "    print(health.sessions, health.ports[0].output, health.ports[0].input)\n"
        "    halls[0].close()\n"
        "    return 0\n"
        "worker.run = run\n"
        "rehearsal.rehearse()\n"
        "print(rehearsal._ROUNDS)"
    )
    counts, rounds = said.splitlines()
    assert counts.split() == [rounds] * 3


def test_a_guest_that_never_comes_does_not_keep_the_daemon() -> None:
    said = rehearsed(
        "import signal\n"
        "from vhost_device_console import testing\n"
        "rehearsal._WITHIN_S = 1\n"
        "testing.connect_like_qemu = lambda *_: signal.pause()\n"
        "rehearsal.rehearse(); print('goes on')"
    )
    assert said == "goes on\n"


def test_nothing_is_said_of_it() -> None:
    # `rehearsed` checks that nothing is on stderr.
    rehearsed("import logging; logging.basicConfig(level=10); rehearsal.rehearse()")


def test_the_daemon_starts_whatever_happens_in_it() -> None:
    said = rehearsed(
        LEFT + "from vhost_device_console import worker\n"
        "def run(*_): raise RuntimeError('a mistake of ours')\n"
        "worker.run = run\n"
        "rehearsal._WITHIN_S = 1\n"
        "rehearsal.rehearse(); print(left()[1])"
    )
    assert said == "None\n"


def test_why_there_was_none_is_said_for_whoever_looks_for_it() -> None:
    said = rehearsed(
        "import logging, sys\n"
        "def none(*_): raise OSError('no sockets left')\n"
        "rehearsal.orders.pair = none\n"
        "logging.basicConfig(level=10, stream=sys.stdout)\n"
        "rehearsal.rehearse()"
    )
    assert "a worker could not be rehearsed: no sockets left" in said


def test_many_guests_are_served_after_it(daemon: Callable[..., Daemon]) -> None:
    served = daemon("unix", 8)
    assert [guest["restarts"] for guest in served.status()] == [0] * 8
