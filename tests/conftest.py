"""Fixtures for every test; what they are made of is in launch.py, which tests may import."""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import launch

# nohup and a shell's `&` have these ignored, and a daemon leaves them so: tests send them.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


class StartDaemon(Protocol):
    """The `daemon` fixture."""

    def __call__(
        self, backend: str | None = ..., count: int = ..., *options: str, **more: Any
    ) -> launch.Daemon: ...


@pytest.fixture
def folder() -> Iterator[Path]:
    """Give an empty folder with a path short enough for sockets."""
    path = Path(tempfile.mkdtemp(prefix="vdc", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def ports() -> Iterator[launch.Ports]:
    """Give a function from a count to the first of so many free TCP ports in a row."""
    made = launch.Ports()
    yield made
    made.close()


@pytest.fixture
def daemon(folder: Path, ports: launch.Ports) -> Iterator[StartDaemon]:
    """Give a function that starts daemons in `folder`: see launch.Daemon.

    The network backend gets free ports. All daemons are ended after the test, which fails if one
    does not end as it should or leaves something behind.
    """
    with ExitStack() as ends:

        def start(
            backend: str | None = "network", count: int = 1, *options: str, **more: Any
        ) -> launch.Daemon:
            if backend == "network":
                more.setdefault("tcp", ports(count))
            return ends.enter_context(launch.Daemon(folder, backend, count, *options, **more))

        yield start


@pytest.fixture(autouse=True)
def nothing_stays_open() -> Iterator[None]:
    """Fail a test that leaves something behind; what a module's tests share was there before."""
    before = launch.held()
    yield
    assert not (left := launch.held() - before), f"left: {left}"
