"""What lines of the log are about: a guest, and happenings that programs look for."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from enum import StrEnum
from typing import Any


class Happening(StrEnum):
    """A happening that has a name of its own in structured logs."""

    FRONTEND_CONNECTED = "frontend-connected"
    FRONTEND_DISCONNECTED = "frontend-disconnected"
    FRONTEND_DROPPED = "frontend-dropped"
    WORKER_DIED = "worker-died"
    BEGINS_ANEW = "begins-anew"

    @property
    def extra(self) -> dict[str, Happening]:
        """The `extra` of a call of `logging`'s."""
        return {"event": self}


class About(logging.LoggerAdapter[logging.Logger]):
    """A log of lines about `guest`: every log here is one for all guests."""

    def __init__(self, log: logging.Logger, guest: str) -> None:
        super().__init__(log, {"guest": guest})

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, Any]:
        """Add the guest to what a line has besides its text."""
        return msg, {**kwargs, "extra": {**(self.extra or {}), **kwargs.get("extra", {})}}
