"""Which daemon has which guest."""

from __future__ import annotations

import os

from . import monitor
from .errors import ConsoleError


def monitors(path: str | None) -> list[str]:
    """Return the monitor sockets of the daemons that run, or `path`, if one is given."""
    return monitor.find(os.environ) if path is None else [path]


def ask_all(path: str | None) -> tuple[list[tuple[str, monitor.Status]], list[ConsoleError]]:
    """Return what each daemon answered, by its monitor socket, and why others did not.

    Raises ConsoleError when no daemon runs.
    """
    paths = monitors(path)
    if not paths:
        raise ConsoleError("no daemon is running")
    answers = []
    failures = []
    for each in paths:
        try:
            answers.append((each, monitor.ask(each)))
        except ConsoleError as error:
            failures.append(error)
    return answers, failures


def find(path: str | None, *names: str) -> tuple[str, str]:
    """Return the first of `names` that is a guest's, and the monitor socket of its daemon.

    Raises ConsoleError when there is none, or more than one.
    """
    answers, failures = ask_all(path)
    for name in names:
        found = [at for at, status in answers if any(g.name == name for g in status.guests)]
        if len(found) > 1:
            raise ConsoleError(
                f"{len(found)} daemons have a guest {name}: choose one with --socket {found[0]}"
                + "".join(f" or {other}" for other in found[1:])
            )
        if found:
            return name, found[0]
    if failures:
        raise failures[0]
    known = sorted(guest.name for _, status in answers for guest in status.guests)
    raise ConsoleError(f"there is no guest {names[0]}, only {', '.join(known) or 'none at all'}")


def console(path: str | None, place: str | None) -> tuple[str, str | None, str]:
    """Return the guest and the port that GUEST[:PORT] means, and its daemon's monitor socket.

    Without one, the only guest that there is. Raises ConsoleError.
    """
    if place is None:
        answers, failures = ask_all(path)
        found = [(at, each.name) for at, status in answers for each in status.guests]
        if failures:
            raise failures[0]
        if len(found) != 1:
            names = ", ".join(sorted(name for _, name in found))
            raise ConsoleError(f"there are {len(found)} guests, name one: {names}")
        return found[0][1], None, found[0][0]
    front, _, which = place.rpartition(":")
    # A guest's name may have a colon in it.
    name, at = find(path, place, *([front] if front else []))
    return name, None if name == place else which, at
