"""What `status` prints for people: guests or ports one a line, in columns, nothing that steers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

from .words import clean

if TYPE_CHECKING:
    from .attachment import Person
    from .monitor import GuestStatus, PortStatus

#: No column is cut shorter than this many characters.
_SHORTEST = 12

_GUESTS = (
    "NAME",
    "STATE",
    "FRONTEND",
    "PORTS",
    "READERS",
    "IN",
    "OUT",
    "DROPPED",
    "RSS",
    "CPU",
    "NOTES",
)
_PEOPLE = ("NAME", "ROLE", "HOW", "SIZE", "BEHIND")
_PORTS = (
    "PORT",
    "NAME",
    "ENDPOINT",
    "STATE",
    "OPEN",
    "READERS",
    "SIZE",
    "BY",
    "IN",
    "OUT",
    "NOTES",
)


def guests(guests: Sequence[GuestStatus], width: int | None) -> list[str]:
    """Return a line for each guest, under a head; in `width` columns unless that is None.

    Names and addresses are cut for that, and only notes may still go beyond.
    """
    rows = [
        (
            clean(guest.name),
            guest.state,
            {None: "-", 0: "?"}.get(guest.frontend, str(guest.frontend)),
            _places(guest.ports),
            str(sum(port.readers for port in guest.ports)),
            size(sum(port.input for port in guest.ports)),
            size(sum(port.output for port in guest.ports)),
            size(sum(port.missed + port.discarded for port in guest.ports)),
            "-" if guest.rss is None else size(guest.rss),
            "-" if guest.cpu is None else f"{guest.cpu:.1f}%",
            ", ".join(_notes(guest)),
        )
        for guest in guests
    ]
    return _table(_GUESTS, rows, width, cut=("PORTS", "NAME"))


def _places(ports: Sequence[PortStatus]) -> str:
    more = f" +{len(ports) - 1}" if len(ports) > 1 else ""
    return clean(ports[0].endpoint) + more


def _notes(guest: GuestStatus) -> list[str]:
    """Return what is not as it should be."""
    counts = (
        (guest.broken, "broken queue"),
        (sum(port.state == "failed" for port in guest.ports), "failed port"),
        (sum(port.held for port in guest.ports), "held buffer"),
        (guest.refused, "refused message"),
        (guest.ignored, "ignored control message"),
        (guest.restarts, "restart"),
    )
    notes = [f"{count} {what}{'s' * (count != 1)}" for count, what in counts if count]
    if guest.died is not None:
        notes.append(f"last one died: {clean(guest.died)}")
    if (has := guest.privileges) is not None:
        notes += ["no Landlock"] * (not has.landlock) + ["no seccomp"] * (not has.seccomp)
    return notes


def ports(guests: Sequence[GuestStatus], width: int | None) -> list[str]:
    """Return a line for each port of `guests`, under a head; `width` is as for guests."""
    rows = [
        (
            f"{clean(guest.name)}:{port.id}",
            clean(port.name),
            clean(port.endpoint),
            port.state,
            _SIDES[port.open, port.host_open],
            str(port.readers),
            f"{port.columns}x{port.rows}" if port.columns else "-",
            clean(port.size_by) or "-",
            size(port.input),
            size(port.output),
            ", ".join(_port_notes(port)),
        )
        for guest in guests
        for port in guest.ports
    ]
    return _table(_PORTS, rows, width, cut=("BY", "NAME", "ENDPOINT", "PORT"))


def privileges(guest: GuestStatus) -> list[str]:
    """Return the line that says what the guest's worker may do, if it has one."""
    if guest.privileges is None:
        return []
    return [f"{clean(guest.name)} is served with: {clean(str(guest.privileges))}"]


_SIDES = {
    (False, False): "-",
    (True, False): "guest",
    (False, True): "host",
    (True, True): "both",
}


def _port_notes(port: PortStatus) -> list[str]:
    notes = [
        "a buffer is held" if port.held else "",
        f"{size(port.lag)} behind" if port.lag else "",
        f"{size(port.missed)} missed" if port.missed else "",
        f"{size(port.discarded)} discarded" if port.discarded else "",
        f"{port.stalls} stall{'s' * (port.stalls != 1)}" if port.stalls else "",
    ]
    return [note for note in notes if note]


def people(people: Sequence[Person]) -> list[str]:
    """Return a line for each of those at a port, under a head."""
    rows = [
        (
            clean(person.name),
            "types" if person.writer else "watches",
            "attached" if person.attached else "plain",
            f"{person.columns}x{person.rows}" if person.columns else "-",
            size(person.lag),
        )
        for person in people
    ]
    return _table(_PEOPLE, rows, None, cut=())


def _table(
    head: Sequence[str], rows: Sequence[Sequence[str]], width: int | None, cut: Sequence[str]
) -> list[str]:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    if width is not None:
        excess = sum(widths[:-1]) + 2 * (len(widths) - 2) - width
        for name in cut:
            at = head.index(name)
            less = min(max(0, excess), max(0, widths[at] - _SHORTEST))
            widths[at] -= less
            excess -= less
    return ["  ".join(map(_cell, row, widths)).rstrip() for row in chain([head], rows)]


def _cell(text: str, width: int) -> str:
    # The end of a path or an address says most.
    return text.ljust(width) if len(text) <= width else "…" + text[len(text) - width + 1 :]


def size(count: float) -> str:
    """Return bytes as people say them: 0, 512, 1.5K, 20M."""
    for unit in ("", "K", "M", "G", "T"):
        if count < 1000 or unit == "T":
            break
        count /= 1024
    return f"{count:.1f}{unit}" if unit and count < 10 else f"{count:.0f}{unit}"
