"""The runnable mock guest against the tiny backend."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest

Serve = Callable[..., tuple[Any, socket.socket]]
COMMAND = [sys.executable, "-m", "vhost_device_console.testing.guest"]


class Watched:
    """A guest's output, appended to by the device's thread, that can be waited for."""

    def __init__(self) -> None:
        self.data = b""
        self.changed = threading.Condition()

    def __iadd__(self, data: bytes) -> Self:
        with self.changed:
            self.data += data
            self.changed.notify_all()
        return self

    def expect(self, pattern: bytes) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: pattern in self.data, 20), self.data


@pytest.fixture
def guest(serve: Serve, folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], Any, Watched]]:
    """Give a mock guest's process, the device it runs on, and what it writes."""
    output = Watched()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "s"))
        listener.listen()
        process = subprocess.Popen([*COMMAND, str(folder / "s")], stderr=subprocess.PIPE)
        try:
            listener.settimeout(20)
            connection, _ = listener.accept()
            device, _ = serve(connection=connection, output=output)
            yield process, device, output
        finally:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("farewell", [b"exit\r", b"poweroff -f\r"])
def test_shell_from_banner_to_end(
    guest: tuple[subprocess.Popen[bytes], Any, Watched], farewell: bytes
) -> None:
    """The guest says what it is, runs what is typed, and ends with its shell, status 0."""
    process, device, output = guest
    output.expect(b"mock guest")
    output.expect(b"mock-guest# ")
    device.type(b"echo $((6*7)); tty\r")
    output.expect(b"\n42\r\n/dev/")
    device.type(farewell)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (0, b"")


def test_everything_typed_at_once(
    guest: tuple[subprocess.Popen[bytes], Any, Watched],
) -> None:
    """Input that is there before the shell is not lost, and output is complete at the end."""
    process, device, output = guest
    device.type(b"stty -echo\rseq 20000 | tail -n 20000\rpoweroff -f\r")
    process.communicate(timeout=30)
    assert b"".join(b"%d\r\n" % number for number in range(1, 20001)) in output.data


def test_backend_hangs_up(guest: tuple[subprocess.Popen[bytes], Any, Watched]) -> None:
    """A backend that goes away ends the guest with one line and status 1."""
    process, device, output = guest
    output.expect(b"mock-guest# ")
    device.connection.shutdown(socket.SHUT_RDWR)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors.count(b"\n")) == (1, 1)
    assert b"hung up" in errors


def test_terminated_guest_leaves_no_shell(
    guest: tuple[subprocess.Popen[bytes], Any, Watched],
) -> None:
    """The shell does not outlive a guest that is told to end."""
    process, device, output = guest
    output.expect(b"mock-guest# ")
    device.type(b"echo $$:$((6*7))\r")
    output.expect(b":42\r\n")
    shell = int(output.data.partition(b":42\r\n")[0].rpartition(b"\n")[2])
    pidfd = os.pidfd_open(shell)
    try:
        process.send_signal(signal.SIGTERM)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        assert poll.poll(20000)
    finally:
        os.close(pidfd)


def test_no_backend(folder: Path) -> None:
    """Where no backend is, one line says so and the status is 1."""
    done = subprocess.run(
        [*COMMAND, str(folder / "none")], capture_output=True, timeout=20, check=False
    )
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (1, b"", 1)
    assert b"No such file" in done.stderr


def test_usage() -> None:
    """Without a socket the usage is told and the status is 2."""
    done = subprocess.run(COMMAND, capture_output=True, timeout=20, check=False)
    assert (done.returncode, done.stderr[:6]) == (2, b"usage:")
