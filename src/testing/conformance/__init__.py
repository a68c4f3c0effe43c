"""A conformance run against any vhost-user console backend.

`Backend.find` looks what a backend offers, `run` tries every statement of `select` on it, each
over a connection of its own, and `report` says how it went. The statements are functions in the
other modules, each with the section it is from.
"""

from . import buffers, device, extensions, frontends, hostile, rings, session
from .bench import Backend, CannotRunError
from .runner import Result, run, select
from .statement import STATEMENTS, Level, Outcome, Statement

__all__ = [
    "STATEMENTS",
    "Backend",
    "CannotRunError",
    "Level",
    "Outcome",
    "Result",
    "Statement",
    "buffers",
    "device",
    "extensions",
    "frontends",
    "hostile",
    "rings",
    "run",
    "select",
    "session",
]
