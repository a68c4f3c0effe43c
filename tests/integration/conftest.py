"""Fixtures for whole daemons, of which several tests may share one."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

sys.path.append(str(Path(__file__).parent))  # behind the folder of launch.py

import scene

import launch


def _held() -> dict[str, str]:
    held = {str(child.pid): "a child" for child in psutil.Process().children()}
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            held[f"fd {fd}"] = os.readlink(f"/proc/self/fd/{fd}")
    return held


@pytest.fixture(autouse=True)
def nothing_stays_open() -> Iterator[None]:
    """Fail a test that leaves a descriptor or child behind; shared daemons were there before."""
    before = _held()
    yield
    left = {what: where for what, where in _held().items() if before.get(what) != where}
    assert not left, f"left behind: {left}"


@pytest.fixture(scope="module")
def shared() -> Iterator[scene.Pair]:
    """Give two guests of one daemon, which offers packed rings, that a module's tests share."""
    folder = Path(tempfile.mkdtemp(prefix="vdc", dir="/tmp"))
    try:
        with launch.Daemon(folder, "unix", 2, "--packed") as daemon, scene.pair_of(daemon) as pair:
            yield pair
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def pair(shared: scene.Pair) -> Iterator[scene.Pair]:
    """Give the two shared guests; the test fails unless it leaves the daemon unharmed."""
    yield shared
    shared.check_unharmed()
