"""A worker that is killed at every line that it ever executes: its session goes on nevertheless.

The daemon's workers are plain Python and count how often each line of theirs was executed, by all
of them together, in a file that outlives them. Whoever executes a line for the first time kills
itself there; its successor goes on. So the session is carried on by hundreds of workers, until it
has been through all of it and nobody has died. VDC_EXAMPLES=1 has them die again, later.
"""

from __future__ import annotations

import mmap
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import vhost_device_console
from scene import assert_same, call, noise
from vhost_device_console import core, monitor
from vhost_device_console.errors import ConsoleError
from vhost_device_console.testing import (
    DRIVER_FEATURES,
    ConsoleDriver,
    GuestMemory,
    connect_like_qemu,
)
from vhost_device_console.testing.features import Feature

from launch import Daemon, until

#: Seconds for one step of a session, with all the deaths in it.
STEP = 200.0

#: Sessions, at most, until there is one without a death.
SESSIONS = 8 if os.environ.get("VDC_EXAMPLES") else 3

#: Whoever executes a line for the so manieth time dies there.
TIMES = (1, 5, 50) if os.environ.get("VDC_EXAMPLES") else (1,)

LINES = 2048  # more than any file has
SOURCES = Path(vhost_device_console.__file__).parent

STORES = pytest.mark.skipif(core() != "plain Python", reason="a compiled ring has no lines")

PROGRAM = """
import functools, mmap, os, signal, sys
from vhost_device_console import cli, master, supervision, worker

supervision.delay = lambda _: 0.0
files = {files!r}
with open({counts!r}, "r+b") as file:
    counts = mmap.mmap(file.fileno(), 0)

def trace(frame, event, _):
    first = files.get(frame.f_code.co_filename)
    if first is None or not counts[0]:
        return None
    at = first + frame.f_lineno
    if counts[at] < 255:
        counts[at] += 1
        if counts[at] in {times}:
            os.kill(os.getpid(), signal.SIGKILL)
    return trace

def run(guest, inheritance):
    sys.settrace(trace)
    return worker.run(guest, inheritance)

master.serve = functools.partial(master.serve, run=run)
cli.main()
"""


def sources(*patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns for path in SOURCES.glob(pattern))


WHERE = {
    "rings": ["journal.py", "ledger.py", "worker/virtqueue/*.py"],
    "session": [
        "custody.py",
        "worker/frontend.py",
        "worker/guest.py",
        "worker/inheritance.py",
        "worker/queues.py",
        "worker/vhost_user/*.py",
    ],
    "people": [
        "worker/audience.py",
        "worker/poller.py",
        "worker/report.py",
        "worker/backends/*.py",
        "worker/console/*.py",
    ],
}


class Sweep:
    """A daemon whose workers die in the files `where`, and somebody who is at its port all along.

    Its log begins another file all the time.
    """

    def __init__(self, start: Callable[..., Daemon], folder: Path, where: str) -> None:
        self.files = sources(*WHERE[where])
        path = folder / "counts"
        path.write_bytes(bytes(LINES * (len(self.files) + 1)))
        with open(path, "r+b") as file:
            self.counts = mmap.mmap(file.fileno(), 0)
        program = PROGRAM.format(
            files={str(path): LINES * at for at, path in enumerate(self.files, 1)},
            counts=str(path),
            times=TIMES,
        )
        self.sessions = 0
        self.log = folder / "log"
        with open(self.log, "wb") as log:
            self.daemon = start(
                "network",
                1,
                "--packed",
                "--no-sandbox",
                *("--log-file", str(folder / "out"), "--log-max-bytes", "16384"),
                *("--log-keep", "99"),
                program=[sys.executable, "-c", program],
                stderr=log,
            )

    def logged(self) -> bytes:
        """Return what is in the log's files, oldest first."""
        names = [f"out0.{number}" for number in range(99, 0, -1)]
        paths = [self.log.with_name(name) for name in [*names, "out0"]]
        return b"".join(path.read_bytes() for path in paths if path.exists())

    def deaths(self) -> int:
        return sum(count >= time for count in self.counts[LINES:] for time in TIMES)

    def reload(self) -> None:
        """Have the daemon begin anew, once it has all its workers."""
        self.daemon.signal(signal.SIGHUP)
        until(
            lambda: self.log.read_bytes().count(b"begins anew") == self.sessions,
            "it did not begin anew",
            STEP,
        )

    def kill(self, on: bool) -> None:
        self.counts[0] = on


def receive(peer: socket.socket, count: int) -> bytes:
    """Return the next `count` bytes that `peer` receives."""
    peer.settimeout(STEP)
    data = bytearray()
    while len(data) < count:
        more = peer.recv(count - len(data))
        assert more, f"the connection was closed after {len(data)} of {count} bytes"
        data += more
    return bytes(data)


def resized(it: Sweep, size: tuple[int, int]) -> bool:
    """Set the console's size, unless its worker has just died."""
    try:
        monitor.change(it.daemon.monitor, monitor.Resize("c.sock0", "0", *size))
    except ConsoleError:
        return False
    return True


def session(it: Sweep, peer: socket.socket, features: Feature) -> None:
    """Have a guest boot, write, read, see a reload, be resized, stop, go on, and leave."""
    it.sessions += 1
    out, in_ = noise(60_000), noise(40_000)
    with (
        GuestMemory() as memory,
        connect_like_qemu(
            it.daemon.sockets[0], memory, features=features, timeout=STEP
        ) as frontend,
    ):
        console = ConsoleDriver(frontend)
        console.wait_open()
        console.write(out[:3_000], chunk=100)
        assert_same(receive(peer, 3_000), out[:3_000])
        peer.sendall(in_[:300])
        assert_same(console.read(300), in_[:300])

        reader = [b""]
        reading = threading.Thread(
            target=lambda: reader.append(receive(peer, len(out) - 3_000)), daemon=True
        )
        typing = threading.Thread(target=peer.sendall, args=[in_[300:]], daemon=True)
        reading.start()
        typing.start()
        console.write(out[3_000:], chunk=2_000)
        assert_same(console.read(len(in_) - 300), in_[300:])
        typing.join()
        reading.join()
        assert_same(reader[-1], out[3_000:])

        with call(it.daemon) as other:
            other.sendall(b"another")
            assert console.read(7) == b"another"
            console.write(b"for both")
            assert receive(peer, 8) == receive(other, 8) == b"for both"

        it.reload()
        console.write(b"new")
        assert receive(peer, 3) == b"new"

        size = (80 + it.sessions, 24)
        until(lambda: resized(it, size), "there never is a worker to be told")
        console.wait_until(lambda: console.port.size == size, f"a size of {size}")

        frontend.disable(0)
        frontend.disable(1)
        frontend.enable(1)
        frontend.enable(0)
        bases = {index: frontend.stop_queue(index) for index in range(4)}
        for index in (3, 2, 1, 0):
            driver = frontend.queues[index].driver
            frontend.start_queue(index, driver, base=bases[index])
        console.write(b"once more")
        assert receive(peer, 9) == b"once more"
        peer.sendall(b"and back")
        assert console.read(8) == b"and back"
        console.close_port()
        console.open()
        peer.sendall(b"!")
        assert console.read(1) == b"!"


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("where", "format_"),
    [
        pytest.param("rings", 0, id="split rings", marks=STORES),
        pytest.param("rings", Feature.RING_PACKED, id="packed rings", marks=STORES),
        pytest.param("session", 0, id="session"),
        pytest.param("people", 0, id="people"),
    ],
)
def test_a_session_goes_on_wherever_a_worker_dies(
    daemon: Callable[..., Daemon], folder: Path, where: str, format_: Any
) -> None:
    it = Sweep(daemon, folder, where)
    with call(it.daemon) as peer:
        it.kill(True)
        for _ in range(SESSIONS):
            before = it.deaths()
            session(it, peer, DRIVER_FEATURES | format_)
            if it.deaths() == before:
                break
        it.kill(False)
        session(it, peer, DRIVER_FEATURES | format_)
    wrote = it.sessions * (noise(60_000) + b"for bothnewonce more")
    until(lambda: len(it.logged()) >= len(wrote), "not all is logged")
    assert_same(it.logged(), wrote)
    # Those told to leave for a successor have one anyway.
    assert 150 < it.log.read_bytes().count(b"its worker died: SIGKILL") <= it.deaths()
