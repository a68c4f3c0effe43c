"""One guest: `run` is all that the master knows of a worker."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import Guest


@dataclass(frozen=True, slots=True)
class Inheritance:
    """The file descriptors a worker is forked with; it owns them from then on.

    `frontend` is the vhost-user socket, listening, or connected when it came by `--fd`.
    `endpoints` holds one descriptor a port: a listening socket, a pty's master side, or None for
    the terminal. `health` is the pipe's non-blocking write end.
    """

    frontend: int
    journal: int
    health: int
    endpoints: tuple[int | None, ...]


def run(guest: Guest, inheritance: Inheritance) -> int:
    """Serve `guest` until it is told to stop (SIGTERM), and return the exit status.

    0: done, do not start again (stopped, left by the user, or an `--fd` frontend hung up).
    Anything else: start a successor. Ends by itself when the master is gone. Raises nothing.
    """
    from .guest import serve  # the parent never needs the worker's rooms

    return serve(guest, inheritance)
