"""The whole run: what it prints and writes, and its exit status."""

from __future__ import annotations

import json
import pty
import re
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import fake
import pytest
from vhost_device_console.errors import ConfigError
from vhost_device_console.testing.conformance import STATEMENTS, report
from vhost_device_console.testing.conformance.bench import Backend
from vhost_device_console.testing.conformance.command import address, check
from vhost_device_console.testing.conformance.runner import Result
from vhost_device_console.testing.conformance.statement import Outcome
from vhost_device_console.testing.features import Feature

from conftest import StartDaemon
from launch import COMMAND, command, environment

#: A statement for each outcome that a fake backend makes of it.
PASSES, WARNS, FAILS = "feature.version-1", "frontend.uml-channel", "config.read-only"
NOT_OFFERED, SKIPPED = "status.kept", "output.deep"
EACH = [PASSES, WARNS, FAILS, NOT_OFFERED, SKIPPED]


def try_each(folder: Path, only: list[str], **options: object) -> int:
    with fake.Fake(folder / "s", fake.ConfigCanBeWritten) as backend:
        return check(backend.path, version="9", only=only, timeout=1.0, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("only", "strict", "status"),
    [
        (PASSES, True, 0),
        (WARNS, False, 0),
        (WARNS, True, 1),
        (FAILS, False, 1),
        (NOT_OFFERED, True, 0),
        (SKIPPED, True, 0),
    ],
)
@pytest.mark.usefixtures("capsys")
def test_exit_status(folder: Path, only: str, strict: bool, status: int) -> None:
    """A MUST that does not hold is status 1; a SHOULD is, if that is asked for."""
    assert try_each(folder, [only], strict=strict) == status


def test_lines(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """People get an aligned line each, why a statement does not hold, and a summary."""
    try_each(folder, EACH)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("/s offers")
    assert lines[1] == (
        "  features:          MULTIPORT INDIRECT_DESC EVENT_IDX PROTOCOL_FEATURES VERSION_1"
    )
    assert lines[2:4] == [
        "  protocol features: MQ REPLY_ACK CONFIG",
        "  queues: 4, ports: 1",
    ]
    results = [line for line in lines[4:-1] if line.strip()]
    assert [line[:13].strip() for line in results] == [
        "pass",
        "fail",
        "",
        "",
        "skipped",
        "",
        "not offered",
        "",
        "warn",
        "",
        "",
    ]
    assert results[2].split(maxsplit=1) == ["seen:", "5000190001000000 became af00190001000000"]
    assert results[3].split(maxsplit=1) == ["expected:", "no change"]
    assert results[5].strip() == "(--data does not say where a client attaches)"
    assert results[7].strip() == "(STATUS)"
    assert len({line.index("VIRTIO") for line in results if "VIRTIO " in line}) == 1
    assert re.fullmatch(
        r"5 statements in \d\.\d s: 1 pass, 1 fail, 1 warn, 1 not offered, 1 skipped", lines[-1]
    )
    assert "\x1b" not in "".join(lines)


def test_colour_is_for_terminals(folder: Path) -> None:
    """On a terminal the outcome has a colour, unless NO_COLOR says otherwise."""
    for more, colours in (({}, True), ({"NO_COLOR": "1"}, False)):
        ours, theirs = pty.openpty()
        with (
            fake.Fake(folder / "s") as backend,
            open(ours, "rb", 0) as terminal,
            open(theirs, "wb", 0) as out,
        ):
            subprocess.run(
                [*COMMAND, "check", backend.path, "--only", PASSES],
                stdout=out,
                env=environment(folder, **more),
                check=True,
            )
            text = terminal.read(1 << 16)
            while b"statements" not in text:
                text += terminal.read(1 << 16)
        assert (b"\x1b[32mpass" in text) == colours
        (folder / "s").unlink()


def test_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Programs get everything as one JSON value."""
    assert try_each(folder, EACH, as_json=True) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["checked_with"] == "9"
    assert said["backend"]["protocol_features"] == ["MQ", "REPLY_ACK", "CONFIG"]
    assert said["backend"]["ports"] == 1
    assert said["summary"] == {"pass": 1, "fail": 1, "warn": 1, "not offered": 1, "skipped": 1}
    outcomes = {each["id"]: each["outcome"] for each in said["statements"]}
    assert outcomes == {
        PASSES: "pass",
        FAILS: "fail",
        SKIPPED: "skipped",
        NOT_OFFERED: "not offered",
        WARNS: "warn",
    }
    failed = next(each for each in said["statements"] if each["id"] == FAILS)
    assert failed["level"] == "MUST"
    assert failed["section"] == "vhost-user SET_CONFIG"
    assert failed["seen"] == "5000190001000000 became af00190001000000"
    assert failed["expected"] == "no change"
    assert failed["seconds"] >= 0


@pytest.mark.parametrize("strict", [False, True])
def test_junit(folder: Path, capsys: pytest.CaptureFixture[str], strict: bool) -> None:
    """CI systems get a file of JUnit XML; what does not fail the run is no failure there."""
    file = folder / "junit.xml"
    try_each(folder, EACH, junit=str(file), strict=strict)
    assert "5 statements" in capsys.readouterr().out
    root = ElementTree.parse(file).getroot()
    assert root.tag == "testsuites"
    (suite,) = root
    for element in (root, suite):
        counts = {name: element.get(name) for name in ("tests", "failures", "errors", "skipped")}
        assert counts == {
            "tests": "5",
            "failures": "2" if strict else "1",
            "errors": "0",
            "skipped": "2",
        }
    cases = {case.get("name"): [child.tag for child in case] for case in suite}
    assert cases == {
        PASSES: [],
        FAILS: ["failure"],
        SKIPPED: ["skipped"],
        NOT_OFFERED: ["skipped"],
        WARNS: ["failure" if strict else "system-out"],
    }
    (failure,) = suite.findall(f"testcase[@name='{FAILS}']/failure")
    assert failure.get("message") == "5000190001000000 became af00190001000000"
    assert "expected: no change" in (failure.text or "")


def test_junit_of_anything() -> None:
    """What XML cannot say is replaced, so that the file is well-formed."""
    backend = Backend("/\x01\udc80/s", None, 1.0)
    result = Result(STATEMENTS[0], Outcome.FAIL, "\x00\x1b[31m<&\ufffe", "]]>")
    root = ElementTree.fromstring(report.as_junit(backend, [result], strict=False))
    (failure,) = root.iter("failure")
    assert failure.get("message") == "\ufffd\ufffd[31m<&\ufffd"


def test_names_of_bits() -> None:
    """A feature without a name is shown by its number."""
    assert report.names(Feature(0), Feature.SIZE | 1 << 62) == "SIZE 62"
    assert report.names(Feature(0), 0) == "nothing"


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("localhost:12345", ("localhost", 12345)),
        ("[::1]:80", ("::1", 80)),
        ("/run/console", "/run/console"),
        ("./console:0", "./console:0"),
    ],
)
def test_address(text: str, means: object) -> None:
    """--data is a host and a port, or a path with a slash in it."""
    assert address(text) == means


@pytest.mark.parametrize(
    ("path", "options", "error"),
    [
        ("/nowhere/s", {}, "cannot check /nowhere/s: there is no such socket"),
        (None, {}, "which backend? Give its vhost-user socket"),
        ("/", {}, "cannot check /: "),
        ("/", {"data": "12345"}, "--data 12345 is neither HOST:PORT nor a path with a / in it"),
        ("/", {"data": "host:0"}, "--data host:0 is neither"),
        ("/", {"timeout": 0.0}, "--timeout must be more than 0 seconds"),
        ("/", {"only": ["a", "b"]}, "no statement is called a or b: --list shows all"),
        ("/", {"junit": "/nowhere/x"}, "cannot write /nowhere/x: No such file or directory"),
    ],
)
def test_nothing_to_check(path: str | None, options: dict[str, object], error: str) -> None:
    """What cannot be run says why, as an error of the user's: exit status 2."""
    options = {"timeout": 0.1, **options}
    with pytest.raises(ConfigError, match=f"^{re.escape(error)}"):
        check(path, version="9", **options)  # type: ignore[arg-type]


# The command line


def test_command_line(folder: Path) -> None:
    """The command takes every option, tries what matches, and ends with its status."""
    with fake.Fake(folder / "s", fake.ConfigCanBeWritten) as backend:
        options = ["--only", "config.read*", "--only", PASSES, "--timeout", "5", "--strict"]
        file = str(folder / "x.xml")
        done = command(folder, "check", backend.path, *options, "--json", "--junit", file)
    assert (done.returncode, done.stderr) == (1, "")
    ids = [each["id"] for each in json.loads(done.stdout)["statements"]]
    assert ids == [
        PASSES,
        "config.read",
        "config.read-part",
        "config.read-early",
        "config.read-only",
    ]
    assert len(list(ElementTree.parse(file).iter("testcase"))) == len(ids)


def test_command_line_cannot_run(folder: Path) -> None:
    """Nothing to check is one line and status 2."""
    done = command(folder, "check", str(folder / "s"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"vhost-device-console: error: cannot check {folder}/s: there is no such socket\n"
    )


def test_list(folder: Path) -> None:
    """--list shows every statement, or those so called, and needs no backend."""
    done = command(folder, "check", "--list")
    lines = done.stdout.splitlines()
    assert done.returncode == 0
    assert len(lines) == len(STATEMENTS) > 200
    assert all(any(line.endswith(s.text) for s in STATEMENTS) for line in lines)
    assert command(folder, "check", "--list", "--only", "split.*").stdout.splitlines() == [
        line for line in lines if " split." in line
    ]


def test_whoever_reads_has_had_enough(folder: Path) -> None:
    """When nobody reads any more the run ends without a word."""
    with subprocess.Popen(
        [*COMMAND, "check", "--list"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(folder),
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(30) == 1
        assert process.stderr is not None
        assert process.stderr.read() == b""


# This daemon


@pytest.mark.timeout(300)
def test_this_daemon(daemon: StartDaemon, folder: Path) -> None:
    """Every statement holds for this daemon."""
    running = daemon("unix", 1, "--inband", "--packed")
    done = command(
        folder, "check", running.sockets[0], "--data", running.data[0], "--json", "--timeout", "20",
        timeout=280,
    )  # fmt: skip
    said = json.loads(done.stdout)
    broken = [
        f"{each['id']}: {each['seen']}, expected {each['expected']}"
        for each in said["statements"]
        if each["outcome"] != "pass"
    ]
    assert broken == []
    assert done.returncode == 0
    assert said["summary"]["pass"] == len(STATEMENTS)


def test_this_daemon_without_packed_rings(daemon: StartDaemon, folder: Path) -> None:
    """Without --packed what is about packed rings is not offered, and nothing fails."""
    running = daemon("unix")
    done = command(
        folder, "check", running.sockets[0], "--data", running.data[0], "--json",
        "--only", "*packed*",
    )  # fmt: skip
    said = json.loads(done.stdout)
    assert {each["outcome"] for each in said["statements"]} == {"not offered"}
    assert done.returncode == 0


def test_this_daemon_by_tcp(daemon: StartDaemon, folder: Path) -> None:
    """A client may attach by TCP."""
    running = daemon("network")
    done = command(
        folder, "check", running.sockets[0], "--data", f"127.0.0.1:{running.tcp}",
        "--only", "output.parts", "--only", "input.in-order", "--timeout", "20",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "2 pass" in done.stdout


def test_many_ports(daemon: StartDaemon, folder: Path) -> None:
    """Consoles of several ports are checked with all their queues."""
    agent = f"name=agent,backend=unix,path={folder}/agent"
    second = f"name=second,backend=unix,path={folder}/second,console"
    running = daemon("unix", 1, "--port", agent, "--port", second)
    done = command(
        folder, "check", running.sockets[0], "--data", running.data[0], "--timeout", "20",
        "--only", "control.[el]*", "--only", "control.*add*", "--only", "output.deep",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "ports: 3" in done.stdout
