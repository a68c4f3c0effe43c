"""Streams to try the backends with."""

from __future__ import annotations

import select
from collections.abc import Callable

import pytest

Wait = Callable[..., int]


@pytest.fixture
def wait() -> Wait:
    """Give a function that waits for a descriptor's event and returns what came."""

    def wait_for(fd: int, events: int = select.POLLIN, seconds: float = 20) -> int:
        poll = select.poll()
        poll.register(fd, events)
        found = poll.poll(seconds * 1000)
        assert found, f"nothing happened on descriptor {fd}"
        return found[0][1]

    return wait_for
