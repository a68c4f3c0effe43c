"""What is fuzzed: each module has `run`, which raises only for a mistake of ours, and `seeds`.

`run` takes any bytes. `seeds` are inputs that get somewhere, to begin with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Protocol, cast


class Target(Protocol):
    run: Callable[[bytes], None]
    seeds: Callable[[], Iterable[bytes]]


NAMES = (
    *("messages", "framing", "session", "memory", "rings", "inflight", "console", "state"),
    *("records", "worker", "custody", "attached", "shown"),
)


def load(name: str) -> Target:
    """Return a target by its name."""
    return cast(Target, import_module(f"{__name__}.{name}"))
