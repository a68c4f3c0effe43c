"""A backend with one mistake fails the statement about that, and no other."""

from __future__ import annotations

from pathlib import Path

import fake
import pytest
from vhost_device_console.testing.conformance import STATEMENTS, Backend, Outcome, run, select

#: What each mistake breaks, among the statements so called.
MISTAKES: list[tuple[type[fake.Session], str, set[str]]] = [
    (fake.TakesAnyAddress, "ack.*", {"ack.failure"}),
    (fake.AnswersUnasked, "ack.*", {"ack.unasked"}),
    (fake.AnswersTwice, "ack.*", {"ack.own-reply"}),
    (fake.ConfigCanBeWritten, "config.*", {"config.read-only"}),
    (fake.ConfigWithoutEnd, "config.*", {"config.past-the-end"}),
    (fake.TakesAnyFeature, "feature.*", {"feature.never-offered"}),
    (fake.NeverDisabled, "ring.*", {"ring.disabled-first"}),
    (fake.DrainsNothing, "ring.*", {"ring.disabled-drains"}),
    (fake.ForgetsEnable, "ring.*", {"ring.enabled-before-start"}),
    (fake.StopsAtTheNext, "split.[in]*", {"split.next-index"}),
    (fake.WroteWhatItRead, "split.[wi]*", {"split.written-nothing"}),
    (fake.WroteMore, "split.w*", {"split.written-length"}),
    (fake.NeverCalls, "split.call*", {"split.call-wanted"}),
    (fake.AlwaysCalls, "split.call*", {"split.call-unwanted"}),
    (fake.FlagStopsEvents, "split.[ef]*", {"split.event-alone"}),
    (fake.TableIsForReading, "split.i*", {"split.indirect-write-flag"}),
    (fake.TableComesFirst, "split.i*", {"split.indirect-last"}),
    (fake.AlwaysReady, "control.n[oa]*", {"control.not-ready"}),
    (fake.NameWithNul, "control.[lno]a*", {"control.name"}),
    (fake.PortPastTheLast, "control.ports*", {"control.ports-below-max"}),
    (fake.PortTwice, "control.no-*", {"control.no-port-twice"}),
    (fake.EightBitIndex, "hostile.ring-*", {"hostile.ring-index"}),
]


def broken(backend: fake.Fake, pattern: str, timeout: float = 3.0) -> set[str]:
    found = Backend.find(backend.path, None, timeout)
    results = run(found, select([pattern]))
    return {r.statement.id for r in results if r.outcome in (Outcome.FAIL, Outcome.WARN)}


@pytest.mark.parametrize(
    ("mistake", "pattern", "expected"),
    MISTAKES,
    ids=[f"{mistake.__name__}-{pattern}" for mistake, pattern, _ in MISTAKES],
)
def test_one_mistake(
    folder: Path, mistake: type[fake.Session], pattern: str, expected: set[str]
) -> None:
    """Just the statement about the mistake does not hold."""
    with fake.Fake(folder / "s", mistake) as backend:
        assert broken(backend, pattern) == expected


def test_no_mistake(folder: Path) -> None:
    """A backend that is right holds every MUST, whatever else it lacks."""
    with fake.Fake(folder / "s") as backend:
        found = Backend.find(backend.path, None, 1.0)
        results = list(run(found, select([])))
    assert [r.statement.id for r in results if r.outcome is Outcome.FAIL] == []
    assert {r.statement.id for r in results if r.outcome is Outcome.PASS} >= {
        expected_id for _, _, ids in MISTAKES for expected_id in ids
    }


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"protocol": fake.REPLY_ACK}, {"message.multiple-queues"}),
        ({"protocol": fake.MQ | fake.REPLY_ACK | 1 << 10}, {"feature.needs"}),
        ({"features": fake.MULTIPORT | fake.PROTOCOL}, {"feature.version-1"}),
        ({"features": fake.VERSION_1 | fake.PROTOCOL | 1 << 37}, {"feature.no-sr-iov"}),
    ],
)
def test_wrong_offer(folder: Path, attributes: dict[str, int], expected: set[str]) -> None:
    """An offer that must not be made fails the statement about it."""
    with fake.Fake(folder / "s", **attributes) as backend:
        pattern = "message.m*" if "message.multiple-queues" in expected else "feature.[nv]*"
        assert broken(backend, pattern) == expected


def test_statements_are_distinct() -> None:
    """Each statement has an id and a text of its own, but for the two ring formats."""
    ids = [statement.id for statement in STATEMENTS]
    assert len(set(ids)) == len(ids)
    texts = [(s.text, s.group == "packed") for s in STATEMENTS]
    assert len(set(texts)) == len(texts)


def test_statements_cite() -> None:
    """Each statement names the specification, or the program, that it is from."""
    for statement in STATEMENTS:
        assert statement.section.split()[0] in {
            "VIRTIO",
            "vhost-user",
            "QEMU",
            "Linux",
            "Cloud",
            "crosvm",
        }
        assert len(statement.text) < 100
