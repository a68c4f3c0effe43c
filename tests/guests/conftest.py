"""Fixtures that start a daemon, a person's place at it, and real guests on it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import tty
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # behind tests/, which has a conftest too

import qemu
import uml
from console import PROMPT, Attach, Console, Place
from qemu import Qemu, Shared, StartQemu
from uml import StartGuest

from launch import Daemon, need


@pytest.fixture
def a_kernel() -> Path:
    """Give one kernel, for what does not depend on its version."""
    need(uml.KERNELS, "Linux guest")
    return uml.KERNELS[0]


@pytest.fixture(params=uml.KERNELS or [None], ids=lambda kernel: kernel.name if kernel else "none")
def kernel(request: pytest.FixtureRequest, a_kernel: Path) -> Path:
    """Give each kernel that there is."""
    return request.param or a_kernel


@pytest.fixture
def boot() -> Iterator[StartGuest]:
    """Give a function that boots guests: see uml.Guest."""
    with ExitStack() as ends:
        yield lambda *arguments, **more: ends.enter_context(uml.Guest(*arguments, **more))


def need_qemu() -> None:
    """Let only those tests run that have QEMU guests."""
    need((qemu.FOLDER / "version").exists(), "QEMU guest")


@pytest.fixture
def boot_qemu() -> Iterator[StartQemu]:
    """Give a function that boots guests of QEMU: see qemu.Qemu."""
    need_qemu()
    with ExitStack() as ends:
        yield lambda *arguments, **more: ends.enter_context(Qemu(*arguments, **more))


@pytest.fixture(scope="module")
def shared() -> Iterator[Shared]:
    """Give a running guest of QEMU for all of a module's tests: see qemu.Shared."""
    need_qemu()
    with ExitStack() as ends:
        folder = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="vdc", dir="/tmp")))
        yield Shared(folder, ends)


@pytest.fixture
def console(shared: Shared) -> Iterator[Console]:
    """Put someone at the shared guest's prompt."""
    with shared.attach("console0") as peer:
        person = Console(peer.fileno())
        person.send(b"\x03\nstty sane; echo 'rea''dy'\n")
        person.until(rb"ready\r\n")
        person.until(PROMPT)
        yield person


@pytest.fixture
def attach() -> Iterator[Attach]:
    """Give a function that puts someone at a TCP port of this machine, or at a unix socket."""
    with ExitStack() as ends:

        def connect(address: int | str) -> Console:
            family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
            peer = ends.enter_context(socket.socket(family, socket.SOCK_STREAM))
            peer.connect(address if isinstance(address, str) else ("127.0.0.1", address))
            return Console(peer.fileno())

        yield connect


@pytest.fixture
def place(daemon: Callable[..., Daemon], attach: Attach) -> Iterator[Place]:
    """Give a function from one of BACKENDS to a daemon with someone at its console."""
    with ExitStack() as ends:

        def keep(fd: int) -> int:
            ends.callback(os.close, fd)
            return fd

        def start(backend: str) -> tuple[Daemon, Console]:
            kind, _, where = backend.partition(" on ")
            if where == "pipes":
                started = daemon(kind, stdin=subprocess.PIPE)
                assert started.process.stdin is not None
                assert started.process.stdout is not None
                return started, Console(
                    started.process.stdout.fileno(), started.process.stdin.fileno()
                )
            if where:
                ours, theirs = map(keep, os.openpty())
                return daemon(kind, stdin=theirs, stdout=theirs), Console(ours)
            started = daemon(kind)
            if kind == "network":
                return started, attach(started.tcp)
            if kind == "unix":
                return started, attach(started.data[0])
            slave = keep(os.open(started.expect_out(r"/dev/pts/\d+")[0], os.O_RDWR | os.O_NOCTTY))
            tty.setraw(slave)
            return started, Console(slave)

        yield start
