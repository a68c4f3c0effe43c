"""A worker's birth: its ways to the master, and what the child gives up of its parent."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from itertools import pairwise

from . import custody, logbook, worker
from .config import Guest, Nested
from .hosted import Hosted, theirs

Run = Callable[[Guest, worker.Inheritance], int]

#: Exit status of a worker that fell over a mistake of ours (sysexits.h: EX_SOFTWARE).
_FAULT = 70

#: What tells a daemon to end.
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class Birth:
    """A worker to be forked, and its ways to the master: `heard` and `line` are our ends.

    Raises OSError, with nothing left, when there are no descriptors for them.
    """

    def __init__(self, guest: Hosted) -> None:
        self.guest = guest
        self.pid = 0
        self.error: OSError | None = None
        self.heard, self.health = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            self.line, self.custody = custody.pair()
        except OSError:
            os.close(self.heard)
            os.close(self.health)
            raise

    def close_theirs(self) -> None:
        """Close the worker's ends, which only it holds then."""
        os.close(self.health)
        self.custody.close()

    def close_ours(self) -> None:
        """Close the ends of a worker that there is not."""
        os.close(self.heard)
        self.line.close()


def become_worker(run: Run, birth: Birth, blocked: set[int | signal.Signals]) -> None:
    """Turn this forked child into its guest's worker; never returns."""
    guest = birth.guest
    status = _FAULT
    try:
        signal.set_wakeup_fd(-1)
        for number in (*STOPS, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)  # only the master decides
        for number in (signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        porter = guest.porter
        ports = tuple(
            worker.PortFiles(
                guest.journals[port.id],
                theirs(port, guest.endpoints.ports[port.id]),
                guest.logs[port.id].files if port.id in guest.logs else {},
            )
            for port in guest.guest.ports
        )
        heirlooms = worker.Inheritance(
            ports=ports,
            ledger=guest.ledger,
            health=birth.health,
            custody=birth.custody.detach(),
            snapshot=porter.snapshot,
            held=porter.held(),
            newest=porter.newest,
            serial=porter.serial,
            lost=porter.lost,
            listening=porter.listening,
        )
        kept = {0, 1, 2, guest.ledger, birth.health, heirlooms.custody, *heirlooms.held.values()}
        kept.update(fd for port in ports for fd in (port.journal, port.endpoint) if fd is not None)
        kept.update(fd for port in ports for fd in port.logs.values())
        _close_others(kept | logbook.fds())
        if not any(isinstance(port.backend, Nested) for port in guest.guest.ports):
            _leave_terminal()
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        _settle(guest)
        status = run(guest.guest, heirlooms)
    except BaseException as error:  # a worker that falls must not become a second master
        guest.log.error("%s: %s", type(error).__name__, error)
        guest.log.debug("where it happened", exc_info=True)
    finally:
        os._exit(status & 0xFF)


def _leave_terminal() -> None:
    """Have nothing of the terminal's but what the log is written to."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1):
        os.dup2(null, fd)
    os.close(null)


def _settle(guest: Hosted) -> None:
    """Have this worker run where it shall; CPUs may have been taken away since that was checked."""
    if guest.guest.cpus:
        try:
            os.sched_setaffinity(0, guest.guest.cpus)
        except OSError as error:
            guest.log.warning("cannot be kept to its CPUs: %s", error.strerror)


def _close_others(kept: set[int]) -> None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    for fd, following in pairwise([*sorted(kept), max(limit, max(kept) + 1)]):
        os.closerange(fd + 1, following)
