"""Lines of the log as text, JSON and journal entries, where they can be taken and where not."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from vhost_device_console import logbook
from vhost_device_console.errors import ConfigError
from vhost_device_console.events import About, Happening
from vhost_device_console.logbook import MESSAGE_IDS, Format

Capture = pytest.CaptureFixture[str]


def read(fd: int) -> bytes:
    """Return what there is to read."""
    data = b""
    try:
        while more := os.read(fd, 1 << 16):
            data += more
    except BlockingIOError:
        pass
    return data


def objects(capfd: Capture) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capfd.readouterr().err.splitlines()]


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    before = root.handlers[:], root.level, logging.raiseExceptions
    yield
    root.handlers, root.level, logging.raiseExceptions = before[0], before[1], before[2]


@pytest.fixture
def journal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Give a journal's socket, at which `journald` logs."""
    monkeypatch.setattr(logbook, "JOURNAL", str(folder / "journal"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(logbook.JOURNAL)
        sock.setblocking(False)
        yield sock
        for each in logbook.fds() - {2}:
            os.close(each)


log = logging.getLogger("vhost_device_console.worker.test")
shop = About(log, "shop")


def entry(datagram: bytes) -> dict[str, str]:
    """Return a journal entry's fields, as systemd's JOURNAL_NATIVE_PROTOCOL says."""
    fields = {}
    while datagram:
        line, _, datagram = datagram.partition(b"\n")
        name, given, value = line.partition(b"=")
        if not given:
            size = int.from_bytes(datagram[:8], "little")
            value, end, datagram = (
                datagram[8:][:size],
                datagram[8 + size :][:1],
                datagram[9 + size :],
            )
            assert end == b"\n"
        assert re.fullmatch(rb"[A-Z][A-Z0-9_]*", name)
        fields[name.decode()] = value.decode()
    return fields


# Text


def test_a_line_for_people_begins_with_the_program_and_the_guest(capfd: Capture) -> None:
    logbook.start("info")
    shop.warning("port %d: %s left", 0, "ann")
    log.info("begins anew")
    assert capfd.readouterr().err == (
        "vhost-device-console: shop: port 0: ann left\nvhost-device-console: begins anew\n"
    )


def test_nothing_in_a_line_for_people_steers_their_terminal(capfd: Capture) -> None:
    logbook.start("info")
    About(log, "a\x1bb\n").info("c\x07%s", "\udc80")
    assert capfd.readouterr().err == "vhost-device-console: a\\x1bb\\n: c\\x07\\udc80\n"


def test_less_than_the_level_is_not_said(capfd: Capture) -> None:
    logbook.start("warning")
    shop.info("nothing")
    shop.warning("something")
    assert capfd.readouterr().err == "vhost-device-console: shop: something\n"


# JSON


def test_a_line_of_json_says_what_when_and_of_whom(capfd: Capture) -> None:
    logbook.start("info", Format.JSON)
    shop.error("its worker died: %s", "SIGKILL", extra=Happening.WORKER_DIED.extra)
    (found,) = objects(capfd)
    when = datetime.fromisoformat(found.pop("time"))
    assert when.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - when) < timedelta(minutes=1)
    assert found == {
        "level": "error",
        "guest": "shop",
        "event": "worker-died",
        "logger": "worker.test",
        "message": "its worker died: SIGKILL",
        "process": os.getpid(),
    }


def test_a_line_of_json_about_a_port_says_which(capfd: Capture) -> None:
    logbook.start("info", Format.JSON)
    shop.warning("port %d: %s left", 3, "ann")
    (found,) = objects(capfd)
    assert (found["port"], found["message"]) == (3, "port 3: ann left")


def test_a_line_of_json_about_no_guest_has_none(capfd: Capture) -> None:
    logbook.start("info", Format.JSON)
    log.info("begins anew")
    (found,) = objects(capfd)
    assert not {"guest", "port", "event", "exception"} & found.keys()


def test_whatever_is_said_is_one_line_of_ascii(capfd: Capture) -> None:
    logbook.start("info", Format.JSON)
    About(log, "ü\udc80\n").info("a\x1b\n%s", "\U0001f4bb\ud800")
    written = capfd.readouterr().err
    assert written.count("\n") == 1
    assert all(" " <= char <= "~" for char in written[:-1])
    found = json.loads(written)
    assert (found["guest"], found["message"]) == ("ü\\udc80\n", "a\x1b\n\U0001f4bb\\ud800")


def test_where_an_error_happened_is_a_field(capfd: Capture) -> None:
    logbook.start("debug", Format.JSON)
    try:
        raise ValueError("here")
    except ValueError:
        shop.debug("where it happened", exc_info=True)
    (found,) = objects(capfd)
    assert found["message"] == "where it happened"
    assert found["exception"].endswith("ValueError: here")


@pytest.mark.parametrize("form", [Format.TEXT, Format.JSON])
def test_lines_that_stderr_cannot_take_are_counted_in_the_next(form: Format) -> None:
    kept = os.dup(2)
    end, write = os.pipe2(os.O_NONBLOCK)
    try:
        os.dup2(write, 2)
        logbook.start("info", form)
        try:
            while True:
                os.write(write, bytes(4096))
        except BlockingIOError:
            pass
        shop.info("one")
        shop.info("two")
        read(end)
        shop.info("three")
        written = read(end).decode()
    finally:
        os.dup2(kept, 2)
        for each in (kept, end, write):
            os.close(each)
    first, second = written.splitlines()
    assert "2 log lines lost: stderr was not read" in first
    assert "three" in second
    if form is Format.JSON:
        assert json.loads(first)["level"] == "warning"


# The journal


def test_an_entry_of_the_journal_has_all_fields(journal: socket.socket) -> None:
    logbook.start("info", Format.JOURNALD)
    shop.error("its worker died: %s", "SIGKILL", extra=Happening.WORKER_DIED.extra)
    assert entry(journal.recv(1 << 16)) == {
        "MESSAGE": "shop: its worker died: SIGKILL",
        "PRIORITY": "3",
        "SYSLOG_IDENTIFIER": "vhost-device-console",
        "GUEST": "shop",
        "EVENT": "worker-died",
        "LOGGER": "worker.test",
        "MESSAGE_ID": MESSAGE_IDS[Happening.WORKER_DIED],
    }


@pytest.mark.parametrize(
    ("level", "priority"), [("error", "3"), ("warning", "4"), ("info", "6"), ("debug", "7")]
)
def test_a_level_is_one_of_syslog_s(journal: socket.socket, level: str, priority: str) -> None:
    logbook.start("debug", Format.JOURNALD)
    getattr(shop, level)("something")
    assert entry(journal.recv(1 << 16))["PRIORITY"] == priority


def test_no_value_can_pretend_to_be_another_field(journal: socket.socket) -> None:
    logbook.start("info", Format.JOURNALD)
    About(log, "a\nPRIORITY=0").info("b\nPRIORITY=0")
    found = entry(journal.recv(1 << 16))
    assert (found["GUEST"], found["PRIORITY"]) == ("a\nPRIORITY=0", "6")
    assert found["MESSAGE"] == "a\\nPRIORITY=0: b\\nPRIORITY=0"


def test_where_an_error_happened_is_a_field_of_several_lines(journal: socket.socket) -> None:
    logbook.start("debug", Format.JOURNALD)
    try:
        raise ValueError("here")
    except ValueError:
        shop.debug("where it happened", exc_info=True)
    assert entry(journal.recv(1 << 16))["EXCEPTION"].endswith("\nValueError: here")


def test_entries_that_the_journal_cannot_take_are_counted_in_the_next(
    journal: socket.socket,
) -> None:
    logbook.start("info", Format.JOURNALD)
    for count in range(10_000):  # net.unix.max_dgram_qlen says how many it takes unread
        shop.info("%d", count)
    taken = []
    try:
        while True:
            taken.append(entry(journal.recv(1 << 16))["MESSAGE"])
    except BlockingIOError:
        pass
    assert taken == [f"shop: {count}" for count in range(len(taken))]
    shop.info("at last")
    lost, last = (entry(journal.recv(1 << 16)) for _ in range(2))
    assert lost["MESSAGE"] == (
        f"{10_000 - len(taken)} log lines lost: the journal did not take them"
    )
    assert last["MESSAGE"] == "shop: at last"


def test_a_journal_that_is_not_there_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logbook, "JOURNAL", str(folder / "none"))
    with pytest.raises(ConfigError, match=r"cannot log to the journal at .*: no such file"):
        logbook.start("info", Format.JOURNALD)


def test_every_happening_has_a_message_id_of_its_own() -> None:
    assert MESSAGE_IDS.keys() == {*Happening}
    assert len({*MESSAGE_IDS.values()}) == len(Happening)
    assert all(re.fullmatch("[0-9a-f]{32}", each) for each in MESSAGE_IDS.values())


def test_the_document_has_every_message_id() -> None:
    text = (Path(__file__).parents[1] / "docs/metrics.md").read_text()
    rows = re.findall(r"^\| `([a-z-]+)` \| `([0-9a-f]{32})` \|$", text, re.MULTILINE)
    assert dict(rows) == {str(each): number for each, number in MESSAGE_IDS.items()}


def test_every_happening_is_one_that_is_logged() -> None:
    folder = Path(sys.modules[logbook.__name__].__file__ or "").parent
    text = "".join(path.read_text() for path in folder.rglob("*.py"))
    assert {f"Happening.{each.name}.extra" in text for each in Happening} == {True}
