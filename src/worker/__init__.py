"""One guest: `run` is all that the master knows of a worker.

Everything a worker needs is imported here, before the fork, so that all workers share it.
"""

from .guest import HANDOVER, can_resume, run
from .inheritance import Inheritance, PortFiles

__all__ = ["HANDOVER", "Inheritance", "PortFiles", "can_resume", "run"]
