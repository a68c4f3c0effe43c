"""Results as lines for people, as JSON, and as JUnit XML."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

from ...worker.vhost_user.message import ProtocolFeature
from ..features import Feature
from .bench import Backend
from .runner import Result
from .statement import STATEMENTS, Outcome, Statement

_COLOURS = {
    Outcome.PASS: 32,
    Outcome.FAIL: 31,
    Outcome.WARN: 33,
    Outcome.NOT_OFFERED: 90,
    Outcome.SKIPPED: 90,
}
_OUTCOME_WIDTH = max(len(outcome.value) for outcome in Outcome)

#: What XML 1.0 has no way to say.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def names(bits: Feature | ProtocolFeature, value: int) -> str:
    """Return the names of the bits set in `value`, a number for each that has none."""
    known = [str(bit.name) for bit in type(bits) if bit & value]
    rest = value & ~sum(bit.value for bit in type(bits))
    return " ".join(known + [str(at) for at in range(64) if rest >> at & 1]) or "nothing"


def heading(backend: Backend) -> list[str]:
    """Return what is checked, and what it offers."""
    return [
        f"{backend.path} offers",
        f"  features:          {names(Feature(0), backend.features)}",
        f"  protocol features: {names(ProtocolFeature(0), backend.protocol)}",
        f"  queues: {backend.queues or 'not said'}, ports: {backend.ports or 'not said'}",
        "",
    ]


def listing(statements: Sequence[Statement]) -> list[str]:
    """Return a line for each statement, untried."""
    return [_columns(statement) for statement in statements]


def line(result: Result, *, colour: bool) -> list[str]:
    """Return the line of a result, and those that say why."""
    word = result.outcome.value.ljust(_OUTCOME_WIDTH)
    if colour:
        word = f"\x1b[{_COLOURS[result.outcome]}m{word}\x1b[m"
    lines = [f"{word}  {_columns(result.statement)}"]
    indent = " " * (_OUTCOME_WIDTH + 2)
    if result.expected:
        lines += [f"{indent}seen:     {result.seen}", f"{indent}expected: {result.expected}"]
    elif result.seen:
        lines.append(f"{indent}({result.seen})")
    return lines


def _columns(statement: Statement) -> str:
    widths = [max(len(each.id) for each in STATEMENTS), max(len(s.section) for s in STATEMENTS)]
    return (
        f"{statement.level.value:6}  {statement.section:{widths[1]}}  "
        f"{statement.id:{widths[0]}}  {statement.text}"
    )


def counts(results: Sequence[Result]) -> dict[str, int]:
    """Return how many results there are of each outcome."""
    found = Counter(result.outcome for result in results)
    return {outcome.value: found[outcome] for outcome in Outcome}


def summary(results: Sequence[Result]) -> str:
    """Return one line about all of them."""
    parts = [f"{number} {word}" for word, number in counts(results).items() if number]
    seconds = sum(result.seconds for result in results)
    return f"{len(results)} statements in {seconds:.1f} s: {', '.join(parts) or 'none'}"


def as_json(backend: Backend, version: str, results: Sequence[Result]) -> dict[str, Any]:
    """Return everything as what JSON can say."""
    return {
        "checked_with": version,
        "backend": {
            "socket": backend.path,
            "features": names(Feature(0), backend.features).split(),
            "protocol_features": names(ProtocolFeature(0), backend.protocol).split(),
            "queues": backend.queues,
            "ports": backend.ports,
        },
        "summary": counts(results),
        "statements": [
            {
                "id": result.statement.id,
                "level": result.statement.level.value,
                "section": result.statement.section,
                "text": result.statement.text,
                "outcome": result.outcome.value,
                "seen": result.seen,
                "expected": result.expected,
                "seconds": round(result.seconds, 3),
            }
            for result in results
        ],
    }


def as_junit(backend: Backend, results: Sequence[Result], *, strict: bool) -> bytes:
    """Return a JUnit XML file: a case for each statement, failures where the run fails.

    A SHOULD that does not hold is a failure only if `strict`, else a case with a note.
    """
    failed = {Outcome.FAIL, Outcome.WARN} if strict else {Outcome.FAIL}
    passed_over = {Outcome.NOT_OFFERED, Outcome.SKIPPED}
    totals = {
        "tests": str(len(results)),
        "failures": str(sum(result.outcome in failed for result in results)),
        "errors": "0",
        "skipped": str(sum(result.outcome in passed_over for result in results)),
        "time": f"{sum(result.seconds for result in results):.3f}",
    }
    root = ElementTree.Element("testsuites", {"name": "vhost-device-console check", **totals})
    suite = ElementTree.SubElement(root, "testsuite", {"name": _xml(backend.path), **totals})
    for result in results:
        case = ElementTree.SubElement(
            suite,
            "testcase",
            {
                "classname": result.statement.group,
                "name": result.statement.id,
                "time": f"{result.seconds:.3f}",
            },
        )
        rule = f"{result.statement.level.value}, {result.statement.section}"
        reason = f"{rule}: {result.statement.text}"
        if result.outcome in failed:
            message = {"message": _xml(result.seen), "type": result.statement.level.value}
            ElementTree.SubElement(case, "failure", message).text = _xml(
                f"{reason}\nseen: {result.seen}\nexpected: {result.expected}"
            )
        elif result.outcome in passed_over:
            message = {"message": _xml(f"{result.outcome.value}: {result.seen}")}
            ElementTree.SubElement(case, "skipped", message)
        elif result.outcome is Outcome.WARN:
            ElementTree.SubElement(case, "system-out").text = _xml(
                f"warning: {reason}\nseen: {result.seen}\nexpected: {result.expected}"
            )
    ElementTree.indent(root)
    data: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return data + b"\n"


def _xml(text: str) -> str:
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)
