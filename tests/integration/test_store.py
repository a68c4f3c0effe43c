"""A restart is invisible where systemd keeps the daemon's descriptors; here a stand-in does."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from scene import boot, converse

from launch import WITHIN, environment, until


class Keeper:
    """What systemd is to the daemon: it is notified, keeps descriptors, and passes them on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kept: dict[str, int] = {}
        self.path = str(folder / "notify")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.path)
        self.process: subprocess.Popen[bytes] | None = None
        self.ready, self.heard = threading.Event(), threading.Event()
        self.listener = threading.Thread(target=self._listen)
        self.listener.start()
        self.sockets = [str(folder / "c.sock0")]
        self.data = [str(folder / "c.sock0.data")]

    def start(self, count: int = 1) -> None:
        """Start the daemon with all that is kept, and wait until it is ready."""
        names = [*self.kept]
        self.ready.clear()
        command = [sys.executable, "-m", "vhost_device_console", "-b", "unix"]
        options = ["-s", str(self.folder / "c.sock"), "-c", str(count)]
        script = (
            "import os, sys; fds = eval(sys.argv[1])\n"
            "import fcntl\n"
            "high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 900) for fd in fds]\n"
            "[os.close(fd) for fd in fds]\n"
            "[os.dup2(fd, 3 + at) for at, fd in enumerate(high)]\n"
            "[os.close(fd) for fd in high]\n"
            "os.environ['LISTEN_PID'] = str(os.getpid())\n"
            "os.execv(sys.argv[2], sys.argv[2:])\n"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, repr([*self.kept.values()]), *command, *options],
            env={
                **environment(self.folder),
                "NOTIFY_SOCKET": self.path,
                "FDSTORE": "4096",
                "LISTEN_FDS": str(len(names)),
                "LISTEN_FDNAMES": ":".join(names),
            },
            stdin=subprocess.DEVNULL,
            pass_fds=[*self.kept.values()],
        )
        assert self.ready.wait(WITHIN), "never ready"

    def _listen(self) -> None:
        """Do what the daemon says, until there is nobody to say anything."""
        while True:
            data, fds, _, _ = socket.recv_fds(self.socket, 1 << 16, 253)
            said = dict(line.partition("=")[::2] for line in data.decode().splitlines())
            if said.get("FDSTOREREMOVE"):
                os.close(self.kept.pop(said["FDNAME"]))
            if said.get("FDSTORE"):
                (self.kept[said["FDNAME"]],) = fds
            if said.get("READY"):
                self.ready.set()
            if said.get("ASKED"):
                self.heard.set()
            if said.get("END"):
                return

    def _say(self, what: str) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(what.encode(), self.path)

    def end(self, number: int) -> int:
        """End the daemon with a signal; return its exit status."""
        assert self.process is not None
        self.process.send_signal(number)
        status = self.process.wait(WITHIN)
        self.heard.clear()
        self._say("ASKED=1")
        assert self.heard.wait(WITHIN)
        return status

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.end(signal.SIGKILL)
        self._say("END=1")
        self.listener.join()
        for fd in self.kept.values():
            os.close(fd)
        self.socket.close()


@pytest.fixture
def keeper(folder: Path) -> Iterator[Keeper]:
    made = Keeper(folder)
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_session_goes_on(keeper: Keeper, number: int) -> None:
    keeper.start()
    with boot(keeper) as console, socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(WITHIN)
        peer.connect(keeper.data[0])
        converse(console, peer)
        for _ in range(3):
            keeper.end(number)
            keeper.start()
            converse(console, peer)


def test_a_guest_that_is_over_is_kept_no_more(keeper: Keeper) -> None:
    keeper.start()
    one = len(keeper.kept)
    keeper.end(signal.SIGTERM)
    keeper.start(count=2)
    assert len(keeper.kept) > one
    keeper.end(signal.SIGTERM)
    keeper.start(count=1)
    until(lambda: len(keeper.kept) == one, "all of the other guest is still kept")


def test_what_does_not_make_sense_is_forgotten_and_the_daemon_starts(keeper: Keeper) -> None:
    keeper.start()
    keeper.end(signal.SIGTERM)
    for name, fd in keeper.kept.items():
        if "state" in name:
            os.pwrite(fd, b"\xc1" * 64, (1 << 26) + 8)
            os.pwrite(fd, b"\xc1" * 64, (1 << 27) + 8)
    keeper.start()
    with boot(keeper) as console:
        console.write(b"served")
