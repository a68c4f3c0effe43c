"""What every test of the worker's rooms must hold: it leaves no descriptor behind."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest


def _open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def _no_descriptor_is_left() -> Iterator[None]:
    before = _open_fds()
    yield
    if _open_fds() != before:
        gc.collect()  # a mapping keeps its file's descriptor until its last slice is gone
    assert _open_fds() == before, "file descriptors were left open, or closed twice"
