"""The log of real daemons as programs read it: masters' and workers' lines, whatever happens."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from scene import attach, boot, converse
from vhost_device_console.events import Happening
from vhost_device_console.logbook import MESSAGE_IDS

from conftest import StartDaemon
from launch import WITHIN, Daemon, command, run


def said(daemon: Daemon, event: Happening) -> dict[str, Any]:
    """Wait for the JSON line about that happening; fail if any line is none."""
    daemon.expect_log(f'"event": "{event}".*\n')
    lines = [json.loads(line) for line in daemon.expect_log(r"(?s)\A.*\n")[0].splitlines()]
    return next(line for line in lines if line.get("event") == event)


def test_every_line_is_an_object_the_master_s_and_the_workers(daemon: StartDaemon) -> None:
    served = daemon("unix", 1, "--log-style", "json")
    with boot(served) as console, attach(served) as peer:
        converse(console, peer)
        connected = said(served, Happening.FRONTEND_CONNECTED)
        (worker,) = served.workers()
        served.kill_worker()
        converse(console, peer)
    assert (connected["guest"], connected["level"]) == ("c.sock0", "info")
    assert connected["message"] == f"frontend {os.getpid()} connected"
    assert connected["process"] == worker
    died = said(served, Happening.WORKER_DIED)
    assert (died["guest"], died["level"], died["process"]) == ("c.sock0", "error", served.pid)
    assert died["message"] == "its worker died: SIGKILL"
    assert said(served, Happening.FRONTEND_DISCONNECTED)["guest"] == "c.sock0"


def test_what_cannot_be_had_is_an_object_too(folder: Path) -> None:
    done = command(folder, "--log-style", "json", "-b", "unix", "-s", str(folder / "no" / "s"))
    assert done.returncode == 2
    found = json.loads(done.stderr)
    assert found["level"] == "error"
    assert "folder" in found["message"]


def test_a_journal_that_is_not_there_is_said_in_a_line(folder: Path) -> None:
    program = (
        "from vhost_device_console import cli, logbook\n"
        f"logbook.JOURNAL = {str(folder / 'none')!r}\ncli.main()"
    )
    options = ("--log-style", "journald", "-b", "unix", "-s", str(folder / "s"))
    done = run([sys.executable, "-c", program, *options], folder)
    assert (done.returncode, done.stderr) == (
        2,
        f"vhost-device-console: error: cannot log to the journal at {folder}/none: "
        "no such file or directory\n",
    )


class Journal:
    """systemd's journal, as far as it takes entries; `take` waits for one and returns it."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "journal")
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(self.path)
        self.seen: list[dict[str, str]] = []

    def program(self) -> list[str]:
        """Return a daemon that logs here."""
        code = (
            "from vhost_device_console import cli, logbook\n"
            f"logbook.JOURNAL = {self.path!r}\ncli.main()"
        )
        return [sys.executable, "-c", code]

    def expect(self, wanted: Callable[[dict[str, str]], bool]) -> dict[str, str]:
        """Return the next entry that is `wanted`."""
        deadline = time.monotonic() + WITHIN
        while True:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self.sock], [], [], left)[0]:
                raise TimeoutError(f"no such entry: {self.seen}")
            lines = self.sock.recv(1 << 16).decode().splitlines()
            entry = dict(line.split("=", 1) for line in lines)
            self.seen.append(entry)
            if wanted(entry):
                return entry

    def event(self, event: Happening) -> dict[str, str]:
        return self.expect(lambda entry: entry.get("MESSAGE_ID") == MESSAGE_IDS[event])


@pytest.fixture
def journal(folder: Path) -> Iterator[Journal]:
    made = Journal(folder)
    yield made
    made.sock.close()


def test_confined_workers_and_their_master_log_to_the_journal(
    daemon: StartDaemon, journal: Journal
) -> None:
    """A worker can open no socket any more; what it logs arrives all the same."""
    served = daemon("unix", 1, "--log-style", "journald", program=journal.program())
    with boot(served) as console, attach(served) as peer:
        connected = journal.event(Happening.FRONTEND_CONNECTED)
        converse(console, peer)
        served.kill_worker()
        died = journal.event(Happening.WORKER_DIED)
        converse(console, peer)
    left = journal.event(Happening.FRONTEND_DISCONNECTED)
    assert {entry["GUEST"] for entry in (connected, died, left)} == {"c.sock0"}
    assert (connected["PRIORITY"], died["PRIORITY"]) == ("6", "3")
    assert died["MESSAGE"] == "c.sock0: its worker died: SIGKILL"
    assert {entry["SYSLOG_IDENTIFIER"] for entry in journal.seen} == {"vhost-device-console"}


def test_a_line_about_a_port_says_which(daemon: StartDaemon, journal: Journal) -> None:
    served = daemon("unix", 1, "--log-style", "journald", program=journal.program())
    with attach(served):
        entry = journal.expect(lambda entry: entry["MESSAGE"].endswith(" attached"))
    assert (entry["GUEST"], entry["PORT"]) == ("c.sock0", "0")


def test_a_reload_logs_to_the_journal_on(daemon: StartDaemon, journal: Journal) -> None:
    served = daemon("unix", 1, "--log-style", "journald", program=journal.program())
    served.workers()
    served.signal(signal.SIGHUP)
    journal.event(Happening.BEGINS_ANEW)
    with boot(served):
        assert journal.event(Happening.FRONTEND_CONNECTED)["GUEST"] == "c.sock0"


def test_a_journal_that_takes_nothing_holds_nobody_up(
    daemon: StartDaemon, journal: Journal
) -> None:
    """With nobody reading the journal guests and people are served; what was lost is said."""
    served = daemon("unix", 1, "--log-style", "journald", program=journal.program())
    with boot(served) as console:
        with open("/proc/sys/net/unix/max_dgram_qlen") as file:
            enough = int(file.read()) + 5
        for _ in range(enough):
            with attach(served):
                pass
            served.until(lambda guests: guests[0]["ports"][0]["readers"] == 0, "it stays")
        with attach(served) as peer:
            converse(console, peer)
        while select.select([journal.sock], [], [], 0)[0]:
            journal.sock.recv(1 << 16)
        with attach(served):
            lost = journal.expect(lambda entry: "log lines lost" in entry["MESSAGE"])
        assert lost["MESSAGE"].endswith("log lines lost: the journal did not take them")
