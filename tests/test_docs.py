"""What the documents say is true of the code."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path
from pkgutil import resolve_name

import pytest
from click import Command, Group
from vhost_device_console import config
from vhost_device_console.commands.daemon import daemon
from vhost_device_console.testing.conformance import STATEMENTS
from vhost_device_console.worker.console.device import FEATURES
from vhost_device_console.worker.vhost_user.session import Session
from vhost_device_console.worker.virtqueue.features import RING_PACKED
from vhost_device_console.worker.virtqueue.ring import RING_FEATURES

ROOT = Path(__file__).parents[1]
DOCS = sorted(ROOT.glob("docs/*.md"))

#: A row of docs/limits.md: what, the number with its unit, the constant.
_LIMIT = re.compile(r"^\|[^|]+\| ([\d.]+) ?(\S*) \| `([\w.]+)` \|$", re.MULTILINE)

_BYTES = {"": 1, "bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_NANOSECONDS = {"µs": 10**3, "ms": 10**6, "s": 10**9, "h": 3600 * 10**9}

#: What a constant counts in, by the end of its name; seconds when there is none of these.
_COUNTED_IN = {"_NS": 1, "_US": 10**3, "_MS": 10**6}


def limits() -> list[tuple[str, str, str]]:
    return _LIMIT.findall((ROOT / "docs/limits.md").read_text())


@pytest.mark.parametrize(("number", "unit", "name"), limits(), ids=lambda value: value or "-")
def test_a_limit_is_what_the_document_says(number: str, unit: str, name: str) -> None:
    value = resolve_name(f"vhost_device_console.{name}")
    if unit in _BYTES:
        assert value == float(number) * _BYTES[unit]
    else:
        counted_in = _COUNTED_IN.get(name[-3:], 10**9)
        assert value * counted_in == float(number) * _NANOSECONDS[unit]


def test_every_row_of_the_limits_is_compared() -> None:
    text = (ROOT / "docs/limits.md").read_text()
    rows = [line for line in text.splitlines() if re.match(r"\| (?!what \|)", line)]
    assert len(limits()) == len(rows)


@pytest.mark.parametrize("document", DOCS, ids=lambda path: path.name)
def test_a_document_leads_to_what_is_there(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text())
    assert [target for target in targets if not (document.parent / target).exists()] == []


def _anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCS, ids=lambda path: path.name)
def test_a_document_leads_to_its_own_headings(document: Path) -> None:
    text = document.read_text()
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) - _anchors(text) == set()


def test_every_source_that_is_named_is_listed_and_every_listed_one_named() -> None:
    body, _, sources = (ROOT / "docs/features.md").read_text().partition("## Sources")
    mark = re.compile(r"\[([A-Z]\d+)\]")
    assert set(mark.findall(body)) == set(mark.findall(sources))


def commands() -> list[list[str]]:
    """Return the commands of ours in the documents' examples, without the program's name."""
    examples = [
        example.replace("\\\n", " ")
        for document in DOCS
        for example in re.findall(r"```sh\n(.*?)```", document.read_text(), re.DOTALL)
    ]
    lines = [shlex.split(line, comments=True) for text in examples for line in text.splitlines()]
    return [line[1:] for line in lines if line[:1] == ["vhost-device-console"]]


@pytest.mark.parametrize("arguments", commands(), ids=" ".join)
def test_a_command_of_the_documents_is_one_that_there_is(arguments: list[str]) -> None:
    for option, value in pairwise(arguments):
        if option == "--port":
            config.parse_port(value, option)
    command: Command = daemon
    while isinstance(command, Group) and arguments[0] in command.commands:
        command, arguments = command.commands[arguments[0]], arguments[1:]
    command.make_context("vhost-device-console", arguments)


def test_the_document_counts_the_statements_that_there_are() -> None:
    text = (ROOT / "docs/conformance.md").read_text()
    assert set(re.findall(r"(\d+)\sstatements", text)) == {str(len(STATEMENTS))}


def bits(heading: str, option: str = "") -> int:
    """Return the bits in the table under the one heading of docs/offered.md that begins so.

    Those are meant that are offered always, or with `option` only.
    """
    text = (ROOT / "docs/offered.md").read_text()
    (section,) = re.findall(rf"^## {heading}.*\n([^#]*)", text, re.MULTILINE)
    always, _, optional = section.partition("With the option")
    assert not option or optional.startswith(f" `{option}` also:")
    table = optional if option else always
    return sum(1 << int(bit) for bit in re.findall(r"^\| (\d+) \|", table, re.MULTILINE))


def test_what_the_document_says_is_offered_is_offered() -> None:
    session = Session(FEATURES | RING_FEATURES, queues=4, largest=256)
    guest, frontend = bits("To the guest: virtio"), bits("To the frontend: the bits")
    assert session.features == guest | frontend
    assert session.protocol_features == bits("To the frontend: protocol")


def test_only_inband_notifications_and_packed_rings_are_options() -> None:
    plain, inband = (Session(0, queues=4, largest=256, inband=way) for way in (False, True))
    assert inband.protocol_features ^ plain.protocol_features == 1 << 14
    assert bits("To the frontend: protocol", "--inband") == 1 << 14
    assert bits("To the guest: virtio", "--packed") == RING_PACKED
