"""Consoles that are recorded by real commands, and recordings that are played."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from scene import boot, numbered, wait_port

from conftest import StartDaemon
from launch import COMMAND, WITHIN, Daemon, command, environment, until, wait_readable
from terminal import Terminal


@contextmanager
def recording(served: Daemon, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Have a command record until the end of the block, and end it by Ctrl-C if it is not over."""
    words = [*COMMAND, "record", "c.sock0", "-o", f"{served.folder}/x.cast", *arguments]
    with subprocess.Popen(
        words, env=environment(served.folder), stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            until((served.folder / "x.cast").exists, "it never begins")
            yield process
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            process.wait(WITHIN)
        finally:
            process.kill()


def cast(folder: Path) -> list[Any]:
    """Return the whole lines of a recording."""
    text = (folder / "x.cast").read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def output(folder: Path) -> str:
    return "".join(line[2] for line in cast(folder)[1:] if line[1] == "o")


@pytest.fixture
def served(daemon: StartDaemon) -> Daemon:
    return daemon("unix", 1)


def test_what_comes_is_recorded_after_what_came(served: Daemon) -> None:
    with boot(served) as console:
        console.write(b"before ")
        with recording(served) as process:
            until(lambda: output(served.folder) == "before ", "the history is not there")
            console.write("après\r\n".encode())
            until(lambda: "après" in output(served.folder), "what is new is not there")
    assert process.returncode == 0
    lines = cast(served.folder)
    assert lines[0]["version"] == 3
    assert lines[0]["title"] == "c.sock0"
    assert abs(lines[0]["timestamp"] - time.time()) < 2 * WITHIN
    assert [line[1:] for line in lines[1:]] == [
        ["o", "before "],
        ["o", "après\r\n"],
        ["x", "0"],
    ]


def test_new_sizes_are_recorded(served: Daemon) -> None:
    with boot(served) as console:
        assert command(served.folder, "resize", "c.sock0", "90x30").returncode == 0
        wait_port(served, columns=90)
        with recording(served):
            console.write(b"x")
            until(lambda: output(served.folder) == "x", "it is not there")
            assert command(served.folder, "resize", "c.sock0", "132x50").returncode == 0
            until(lambda: cast(served.folder)[-1][1] == "r", "the size is not there")
    assert cast(served.folder)[0]["term"] == {"cols": 90, "rows": 30}
    assert [line[2] for line in cast(served.folder)[1:]] == ["x", "132x50", "0"]


def test_the_death_of_workers_is_not_recorded(served: Daemon) -> None:
    data = numbered(1 << 18)
    with boot(served) as console, recording(served):
        for start in range(0, len(data), 1 << 16):
            console.write(data[start : start + (1 << 16)])
            served.kill_worker()
        until(lambda: len(output(served.folder)) >= len(data), "it is not all there")
    assert output(served.folder) == data.decode()


def test_another_daemon_is_a_marker(daemon: StartDaemon) -> None:
    served = daemon("unix", 1)
    with recording(served, "--json") as process:
        with boot(served) as console:
            console.write(b"one")
            until(lambda: output(served.folder) == "one", "it is not there")
        served.close()
        served = daemon("unix", 1)
        with boot(served) as console:
            console.write(b"two")
            until(lambda: output(served.folder) == "onetwo", "it is not there")
    assert process.returncode == 0
    assert [line[1:] for line in cast(served.folder)[1:]] == [
        ["o", "one"],
        ["m", "another daemon: what came meanwhile is not known"],
        ["o", "two"],
        ["x", "0"],
    ]


def test_a_recording_ends_with_its_daemon_on_demand(daemon: StartDaemon) -> None:
    served = daemon("unix", 1)
    with recording(served, "--no-reconnect") as process:
        with boot(served) as console:
            console.write(b"one")
            until(lambda: output(served.folder) == "one", "it is not there")
        served.close()
        assert process.wait(WITHIN) == 1
        assert process.stderr is not None
        assert process.stderr.read() == (
            f"3 bytes of output are in {served.folder}/x.cast: the console is gone\n"
        )
    assert cast(served.folder)[-1][1:] == ["x", "1"]


def test_a_recording_ends_after_its_duration(served: Daemon) -> None:
    with boot(served), recording(served, "--duration", "0.1") as process:
        assert process.wait(WITHIN) == 0
    assert cast(served.folder)[-1][1:] == ["x", "0"]


def test_a_span_of_the_journal_is_exported(served: Daemon) -> None:
    with boot(served) as console:
        console.write(b"0123456789")
        wait_port(served, output=10)
        said = command(served.folder, "export", "c.sock0", "--since", "2", "--until", "5")
        assert said.returncode == 0, said.stderr
        lines = [json.loads(line) for line in said.stdout.splitlines()]
        assert [line[1:] for line in lines[1:]] == [["o", "234"], ["x", "0"]]
        said = command(served.folder, "export", "c.sock0", "--replay", "3", "--json")
        assert '"789"' in said.stdout
        assert json.loads(said.stderr) == {"file": "-", "bytes": 3}


def test_a_journal_has_the_times_that_its_log_knows(daemon: StartDaemon, folder: Path) -> None:
    """They are those at which the guest wrote, not that of the export."""
    served = daemon("unix", 1, "--log-file", f"{folder}/log")
    index = folder / "log0.times"
    with boot(served) as console:
        begun = time.time()
        console.write(b"one")
        until(lambda: index.exists() and index.stat().st_size == 32, "no entry for one")
        between = time.time()
        console.write(b"two")
        until(lambda: index.stat().st_size == 64, "no entry for two")
        for place in ("c.sock0", f"{folder}/log0"):
            said = command(folder, "export", place)
            assert said.returncode == 0, said.stderr
            lines = [json.loads(line) for line in said.stdout.splitlines()]
            assert [line[2] for line in lines[1:]] == ["one", "two", "0"]
            assert int(begun) <= lines[0]["timestamp"] <= between
            assert between - begun - 0.1 <= lines[2][0] + 0.1
            assert lines[3][0] == 0


@pytest.mark.parametrize("form", ["timestamps", "json"])
def test_a_log_is_exported_whatever_it_is(daemon: StartDaemon, folder: Path, form: str) -> None:
    served = daemon("unix", 1, "--log-file", f"{folder}/log", "--log-format", form)
    with boot(served) as console:
        console.write(b"one\ntwo\n")
        until(lambda: (folder / "log0").read_bytes().count(b"\n") == 2, "it is not logged")
        said = command(folder, "export", f"{folder}/log0", "-o", f"{folder}/x.cast")
    assert said.returncode == 0, said.stderr
    assert said.stderr == f"8 bytes of output are in {folder}/x.cast\n"
    assert output(folder) == "one\ntwo\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("export", "nobody"), "there is no guest nobody, only c.sock0"),
        (("export", "./no/log"), "cannot read ./no/log: no such file or directory"),
        (("export", "c.sock0"), "c.sock0: there is no output in that span"),
        (("export", "c.sock0", "--from", "2026-01-01"), "--from and --to are a log's"),
        (("export", "./x", "--since", "1"), "--since is a journal's"),
        (("record", "c.sock0", "-o", "no/x"), "cannot write no/x: no such file or directory"),
        (("play", "no.cast"), "cannot read no.cast: no such file or directory"),
        (("play", "/dev/null"), "/dev/null is no recording: its first line is no header"),
    ],
)
def test_what_cannot_be_is_one_line(served: Daemon, arguments: tuple[str, ...], said: str) -> None:
    answer = command(served.folder, *arguments, cwd=served.folder)
    assert answer.returncode == 1
    assert answer.stderr.startswith(f"vhost-device-console: error: {said}")
    assert answer.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("attach --timeout inf", "inf is no number from 0 to 2073600"),
        ("attach --timeout 1e10", "1e10 is no number from 0 to 2073600"),
        ("attach --linger nan", "nan is no number from 0 to 2073600"),
        ("record --duration inf", "inf is no number from 0 to 2073600"),
        ("play x --speed nan", "nan is no number from 0.001 to 1000000"),
        ("play x --speed 1e-300", "1e-300 is no number from 0.001 to 1000000"),
        ("export v --idle-limit nan", "nan is no number from 0.001 to 2073600"),
        ("top --interval nan", "nan is no number from 0.1 to 3600"),
        *(
            (f"{words} {1 << 63}", f"{1 << 63} is no whole number from 0 to {(1 << 63) - 1}")
            for words in ("attach --since", "attach --replay", "history v --tail", "record --until")
        ),
    ],
)
def test_numbers_that_make_no_sense_are_one_line(folder: Path, words: str, said: str) -> None:
    answer = command(folder, *words.split())
    assert answer.returncode == 2
    assert answer.stderr.endswith(f": {said}\n")
    assert answer.stderr.count("\n") == 1


# Playing

CAST = (
    '{"version": 3, "term": {"cols": 80, "rows": 24}}\n'
    '[0, "o", "one "]\n[3600, "o", "two\\u00e9"]\n[0, "x", "0"]\n'
)


def test_a_recording_is_printed_at_once(folder: Path) -> None:
    (folder / "x.cast").write_text(CAST)
    said = command(folder, "play", "--cat", f"{folder}/x.cast")
    assert (said.returncode, said.stdout) == (0, "one twoé")
    said = command(folder, "play", "--cat", "-", input=CAST, stdin=None)
    assert said.stdout == "one twoé"


def test_a_recording_is_played_without_a_terminal(folder: Path) -> None:
    (folder / "x.cast").write_text(CAST)
    said = command(folder, "play", "-s", "1000000", f"{folder}/x.cast")
    assert (said.returncode, said.stdout, said.stderr) == (0, "one twoé", "")


def test_a_recording_is_played_in_a_terminal_until_it_is_left(folder: Path) -> None:
    """Keys are heard while it waits for an hour; the terminal is as it was then."""
    (folder / "x.cast").write_text(CAST)
    ours, theirs = pty.openpty()
    try:
        with subprocess.Popen(
            [sys.executable, *COMMAND[1:], "play", f"{folder}/x.cast"]
            if COMMAND[0] == sys.executable
            else [*COMMAND, "play", f"{folder}/x.cast"],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment(folder),
            start_new_session=True,
        ) as process:
            try:
                seen = b""
                while b"one " not in seen:
                    wait_readable(ours, time.monotonic() + WITHIN, "nothing is played")
                    seen += os.read(ours, 4096)
                os.write(ours, b"  q")
                assert process.wait(WITHIN) == 130
            finally:
                process.kill()
        while b"\x1b[!p" not in seen:
            wait_readable(ours, time.monotonic() + WITHIN, "the modes are not given back")
            seen += os.read(ours, 4096)
        assert b"two" not in seen
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_play_gives_the_terminal_back_at_a_signal(folder: Path, number: int) -> None:
    (folder / "x.cast").write_text(CAST)
    words = [*COMMAND, "play", f"{folder}/x.cast"]
    with Terminal(words, env=environment(folder)) as person:
        person.expect(b"one ")
        assert not person.is_as_it_was()
        person.process.send_signal(number)
        assert person.process.wait(WITHIN) == 128 + number
        person.expect(rb"\x1b\[!p")
        assert person.is_as_it_was()


def test_play_ends_quietly_with_its_terminal(folder: Path) -> None:
    (folder / "x.cast").write_text(CAST)
    words = [*COMMAND, "play", f"{folder}/x.cast"]
    with Terminal(words, env=environment(folder), stderr=subprocess.PIPE) as person:
        person.expect(b"one ")
        person.hang_up()
        assert person.process.communicate(timeout=WITHIN)[1] == b""
