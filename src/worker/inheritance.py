"""What a worker is forked with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PortFiles:
    """One port's file descriptors.

    `endpoint` is a listening socket, a pty's controlling side, or None for the terminal.
    """

    journal: int
    endpoint: int | None


@dataclass(frozen=True, slots=True)
class Inheritance:
    """The file descriptors that are the worker's own from the fork on.

    `frontend` is the vhost-user socket, listening, or connected when it came by `--fd`. `ports`
    has the same order as the guest's. `health` is the pipe's non-blocking write end, `orders` the
    socket on which `orders.receive` has what the master wants.
    """

    frontend: int
    ports: tuple[PortFiles, ...]
    health: int
    orders: int
