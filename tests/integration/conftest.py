"""Fixtures for whole daemons, of which several tests may share one."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # behind the folder of launch.py

import scene

import launch


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
