"""Memory files, mapped, count as open descriptors until the last slice of them is gone."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import suppress

import pytest


def _mapped_files() -> bool:
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            if os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:"):
                return True
    return False


@pytest.fixture(autouse=True)
def _mappings_are_collected(nothing_stays_open: None) -> Iterator[None]:  # noqa: ARG001
    """Leave nothing mapped by garbage alone, before it is looked at what stays open."""
    yield
    if _mapped_files():
        gc.collect()
