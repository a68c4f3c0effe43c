"""What a worker is forked with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Inheritance:
    """The file descriptors that are the worker's own from the fork on.

    `frontend` is the vhost-user socket, listening, or connected when it came by `--fd`.
    `endpoints` holds one descriptor a port: a listening socket, a pty's controlling side, or None
    for the terminal. `health` is the pipe's non-blocking write end.
    """

    frontend: int
    journal: int
    health: int
    endpoints: tuple[int | None, ...]
