"""Real guests go on when their worker is killed and their daemon is reloaded: checksums agree."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from console import PROMPT, Console, Place
from qemu import StartQemu
from test_traffic import digest
from uml import StartGuest

from launch import Daemon, until

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

#: Seconds between two deaths: more than a worker needs to be well again.
PAUSE = 2.5


@contextmanager
def beset(daemon: Daemon) -> Iterator[Callable[[], int]]:
    """Kill the guest's worker again and again, and reload the daemon every third time.

    Gives a function that says how many workers have ended so far.
    """
    over = threading.Event()
    ended = 0

    def is_new(worker: int) -> bool:
        guest = daemon.status()[0]
        return guest["state"] == "running" and guest["worker"] != worker

    def strike() -> None:
        nonlocal ended
        while not over.is_set():
            (worker,) = daemon.workers()
            if ended % 3 == 2:
                daemon.signal(signal.SIGHUP)
            else:
                os.kill(worker, signal.SIGKILL)
            until(partial(is_new, worker), "no successor")
            ended += 1
            over.wait(PAUSE)

    striker = threading.Thread(target=strike)
    striker.start()
    try:
        yield lambda: ended
    finally:
        over.set()
        striker.join()


def survive(daemon: Daemon, console: Console) -> None:
    """Check what goes either way while one worker after the other ends."""
    pid = console.run(b"echo $$").strip()
    typed = 0
    with beset(daemon) as ended:
        while ended() < 4:
            # What the guest sends, as it says itself,
            console.run(b"dd if=/dev/urandom of=f bs=65536 count=4 2> /dev/null")
            expected = console.run(b"sha256sum < f").split()[0]
            console.send(b"stty raw -echo; echo 'be''gin'; cat f\n")
            console.until(rb"begin\r?\n")
            assert digest(console.take(4 << 16)) == expected
            console.until(PROMPT)
            # and what it is sent.
            text = b"".join(b"%063d\n" % number for number in range(typed, typed + 512))
            console.send(b"stty raw -echo; echo 'be''gin'; head -c %d | sha256sum\n" % len(text))
            console.until(rb"begin\r?\n")
            console.send(text)
            assert console.until(rb"  -\r?\n") == digest(text)
            console.until(PROMPT)
            typed += 512
    assert console.run(b"echo $$").strip() == pid, "it is another shell"


def test_every_kernel_goes_on(kernel: Path, place: Place, boot: StartGuest) -> None:
    daemon, console = place("network")
    boot(kernel, daemon.sockets[0])
    console.until(PROMPT)
    survive(daemon, console)


def test_a_guest_of_qemu_goes_on(place: Place, boot_qemu: StartQemu) -> None:
    daemon, console = place("network")
    boot_qemu(daemon.sockets[0])
    console.until(PROMPT)
    survive(daemon, console)
