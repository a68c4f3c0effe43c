"""What a statement is: a rule of a specification, and a function that tries it on a backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from ...errors import ConsoleError
from ...worker.vhost_user.message import ProtocolFeature
from ..features import Feature

if TYPE_CHECKING:
    from .bench import Bench

Check = Callable[["Bench"], None]


class Level(Enum):
    """How strongly the specification says it."""

    MUST = "MUST"
    SHOULD = "SHOULD"


class Outcome(Enum):
    """What became of a statement."""

    PASS = "pass"  # noqa: S105
    FAIL = "fail"
    WARN = "warn"  #: a SHOULD that does not hold
    NOT_OFFERED = "not offered"  #: the backend does not offer a feature that it is about
    SKIPPED = "skipped"  #: it could not be tried, for a reason that is not the backend's


class BrokenError(ConsoleError):
    """A statement does not hold: what was seen, and what it says instead."""

    def __init__(self, seen: str, expected: str) -> None:
        super().__init__(f"{seen}; expected {expected}")
        self.seen = seen
        self.expected = expected


class NotApplicableError(ConsoleError):
    """A statement is about something that this backend turned out not to have."""


class SkippedError(ConsoleError):
    """A statement cannot be tried here."""


@dataclass(frozen=True, slots=True)
class Statement:
    """One rule: `section` of its specification, `text` in one line, and how to try it.

    It is tried only where `features` and `protocol` are offered. With `client` it needs somebody
    at the console's other end. After a `hostile` one the whole console is tried anew.
    """

    id: str
    level: Level
    section: str
    text: str
    check: Check
    features: Feature
    protocol: ProtocolFeature
    client: bool
    hostile: bool

    @property
    def group(self) -> str:
        """The part of the id before the dot."""
        return self.id.partition(".")[0]

    def missing(self, features: int, protocol: int) -> list[str]:
        """Return the names of the features it needs that are not among these."""
        virtio = [str(bit.name) for bit in self.features if not bit & features]
        return virtio + [str(bit.name) for bit in self.protocol if not bit & protocol]


#: What ids begin with, in the order in which statements are tried.
GROUPS = (
    "message",
    "ack",
    "feature",
    "config",
    "channel",
    "fd",
    "ring",
    "memory",
    "split",
    "packed",
    "console",
    "control",
    "output",
    "input",
    "slots",
    "log",
    "inflight",
    "status",
    "reset",
    "state",
    "inband",
    "hostile",
    "frontend",
)

#: Every statement.
STATEMENTS: list[Statement] = []


def statement(
    id_: str,
    level: Level,
    section: str,
    *needs: Feature | ProtocolFeature,
    client: bool = False,
    hostile: bool = False,
) -> Callable[[Check], Check]:
    """Make a function a statement; its docstring, one line, is the text.

    The function raises BrokenError when the statement does not hold. What the driver side raises
    (DeviceError, TimeoutError, ConnectionError) counts as that too.
    """

    def register(check: Check) -> Check:
        features, protocol = Feature(0), ProtocolFeature(0)
        for need in needs:
            if isinstance(need, Feature):
                features |= need
            else:
                protocol |= need
        text = (check.__doc__ or "").strip().rstrip(".")
        if not text or "\n" in text or any(other.id == id_ for other in STATEMENTS):
            raise ValueError(f"statement {id_} is not new, or has no text of one line")
        STATEMENTS.append(
            Statement(id_, level, section, text, check, features, protocol, client, hostile)
        )
        return check

    return register


def expect(holds: object, seen: str, expected: str) -> None:
    """Raise BrokenError unless `holds`."""
    if not holds:
        raise BrokenError(seen, expected)
