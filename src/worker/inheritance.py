"""What a worker is forked with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class PortFiles:
    """One port's file descriptors.

    `endpoint` is a pty's controlling side, None where clients are sent by the master or are the
    terminal. `logs` are the files of its log by their generations, none without a log.
    """

    journal: int
    endpoint: int | None
    logs: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class Inheritance:
    """What is the worker's own from the fork on.

    `ports` has the same order as the guest's. `ledger` is the file of `ledger.Ledger`, `health` the
    pipe's non-blocking write end, `custody` the socket of `custody.receive_order` and
    `custody.send`.

    `snapshot` is what a predecessor committed last, empty if none did, with the descriptors that it
    names in `held`, by their keys; `newest` and `serial` are those of that commit. `lost` says that
    the frontend of then is gone, and its memory not to be touched. `listening` says that another
    frontend can come when one has gone.
    """

    ports: tuple[PortFiles, ...]
    ledger: int
    health: int
    custody: int
    snapshot: bytes
    held: Mapping[int, int]
    newest: int
    serial: int
    lost: bool
    listening: bool


class Held(int):
    """A descriptor of this worker's that the master has, too, as `key`."""

    key: int

    def __new__(cls, fd: int, key: int) -> Self:
        """Return `fd` with its key."""
        held = super().__new__(cls, fd)
        held.key = key
        return held
