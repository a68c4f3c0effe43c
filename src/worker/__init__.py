"""One guest: `run` is all that the master knows of a worker.

Everything a worker needs is imported here, before the fork, so that all workers share it.
"""

from .guest import run
from .inheritance import Inheritance, PortFiles

__all__ = ["Inheritance", "PortFiles", "run"]
