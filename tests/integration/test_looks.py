"""The commands for looking, against daemons with mock guests."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from scene import attach, boot, numbered, wait_port
from test_attached import HASTY, person

from conftest import StartDaemon
from launch import COMMAND, WITHIN, Daemon, environment
from terminal import Terminal


def looked(daemon: Daemon, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[bytes]:
    """Run a command to its end, which must be with this status."""
    done = subprocess.run(
        [*COMMAND, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=environment(daemon.folder),
        timeout=WITHIN,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done


def guest_of(daemon: Daemon) -> str:
    name: str = daemon.status()[0]["name"]
    return name


@pytest.fixture
def served(daemon: StartDaemon) -> Daemon:
    return daemon("unix", 1, program=HASTY)


def wait_output(daemon: Daemon, count: int) -> None:
    wait_port(daemon, output=count)


# history


def test_history_is_all_that_was_put_out_and_nobody_is_attached_for_it(served: Daemon) -> None:
    with boot(served) as console:
        console.write(b"\x1b[31mred\x1b[m\r\n")
        wait_output(served, 13)
        done = looked(served, "history", guest_of(served))
        assert (done.stdout, done.stderr) == (b"\x1b[31mred\x1b[m\r\n", b"")
        with attach(served) as peer:  # it has still seen nothing
            assert peer.recv(100) == b"\x1b[31mred\x1b[m\r\n"


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        (["--tail", "2"], b"two\nthree\n"),
        (["--tail", "0"], b""),
        (["--tail", "9"], b"one\ntwo\nthree\n"),
        (["--bytes", "3"], b"ee\n"),
        (["--since", "4"], b"two\nthree\n"),
        (["--since", "14"], b""),
    ],
)
def test_a_part_of_the_history(served: Daemon, options: list[str], seen: bytes) -> None:
    with boot(served) as console:
        console.write(b"one\ntwo\nthree\n")
        wait_output(served, 14)
        assert looked(served, "history", guest_of(served), *options).stdout == seen


def test_history_of_nothing_is_nothing(served: Daemon) -> None:
    with boot(served):
        assert looked(served, "history", guest_of(served)).stdout == b""


def test_stripped_history_has_no_sequences(served: Daemon) -> None:
    with boot(served) as console:
        data = b"\x1b]0;evil\x07\x1b[31mred\x1b[m\r\n10%\r20%\r\n"
        console.write(data)
        wait_output(served, len(data))
        done = looked(served, "history", guest_of(served), "--strip")
        assert done.stdout == b"red\n10%\n20%\n"


def test_history_as_json_says_where_each_line_is(served: Daemon) -> None:
    with boot(served) as console:
        console.write(b"one\n\xff\nno end")
        wait_output(served, 12)
        done = looked(served, "history", guest_of(served), "--json")
        assert [json.loads(line) for line in done.stdout.splitlines()] == [
            {"offset": 0, "bytes": 4, "text": "one\n"},
            {"offset": 4, "bytes": 2, "text": "\N{REPLACEMENT CHARACTER}\n", "base64": "/wo="},
            {"offset": 6, "bytes": 6, "text": "no end"},
        ]


def test_what_is_not_yet_there_is_an_error(served: Daemon) -> None:
    with boot(served):
        done = looked(served, "history", guest_of(served), "--since", "5", code=1)
        assert b"has put out 0 bytes so far, not 5" in done.stderr


def test_where_the_journal_does_not_go_back_to_is_said(served: Daemon) -> None:
    data = numbered(3 << 19)
    with boot(served) as console:
        console.write(data, depth=16)
        wait_output(served, len(data))
        done = looked(served, "history", guest_of(served), "--since", "0")
        kept = len(done.stdout)
        assert done.stdout == data[-kept:]
        missing = len(data) - kept
        assert f"what came before offset {missing} is not kept: it has no".encode() in done.stderr
        assert f"[{missing} bytes are missing here]".encode() in done.stderr


@pytest.mark.parametrize("options", [(), ("--log-max-bytes", "65536", "--log-keep", "99")])
def test_the_log_has_what_the_journal_has_no_more(
    daemon: StartDaemon, folder: Path, options: tuple[str, ...]
) -> None:
    served = daemon("unix", 1, "--log-file", str(folder / "l"), *options)
    data = numbered(3 << 19)
    with boot(served) as console:
        console.write(data, depth=16)
        wait_output(served, len(data))
        done = looked(served, "history", guest_of(served), "--since", "1000")
        assert done.stdout == data[1000:]
        assert done.stderr == b""


@contextmanager
def following(daemon: Daemon, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [*COMMAND, "history", guest_of(daemon), "--follow", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(daemon.folder),
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_followed_history_goes_on_though_workers_are_killed(served: Daemon) -> None:
    with boot(served) as console, following(served) as process:
        assert process.stdout is not None
        for number in range(3):
            console.write(b"line %d\n" % number)
            assert process.stdout.readline() == b"line %d\n" % number
            served.kill_worker()


def test_who_follows_ends_when_nobody_reads_though_nothing_comes(served: Daemon) -> None:
    with boot(served) as console, following(served) as process:
        assert process.stdout is not None
        console.write(b"one\n")
        assert process.stdout.readline() == b"one\n"
        process.stdout.close()
        process.stdout = None
        assert process.wait(WITHIN) == 1


def test_who_follows_waits_for_the_next_daemon(daemon: StartDaemon) -> None:
    served = daemon("unix", 1)
    with boot(served) as console, following(served) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        console.write(b"one\n")
        assert process.stdout.readline() == b"one\n"
        served.close()
        assert process.stderr.readline() == b"[the daemon is gone; waiting for it]\n"
        served = daemon("unix", 1)
        with boot(served) as console:
            console.write(b"two\n")
            assert process.stdout.readline() == b"two\n"


# screen


def test_the_screen_is_what_a_terminal_of_the_port_s_size_shows(served: Daemon) -> None:
    with boot(served) as console, person(served, columns=10, rows=4):
        data = b"x" * 12 + b"\x1b[4;1Hend\x1b]2;title\x07"
        console.write(data)
        wait_port(served, columns=10, rows=4, output=len(data))
        done = looked(served, "screen", guest_of(served), "--json")
        assert json.loads(done.stdout) == {
            "columns": 10,
            "rows": 4,
            "cursor": [3, 3],
            "title": "title",
            "text": ["x" * 10, "xx", "", "end"],
        }


def test_the_screen_s_size_and_format_may_be_given(served: Daemon, folder: Path) -> None:
    with boot(served) as console:
        console.write(b"abcdef")
        wait_output(served, 6)
        name = guest_of(served)
        assert looked(served, "screen", name, "--size", "3x2").stdout == b"abc\ndef\n"
        looked(served, "screen", name, "-o", str(folder / "s.svg"))
        assert (folder / "s.svg").read_text().startswith("<svg ")
        looked(served, "screen", name, "-o", str(folder / "s.png"))
        assert (folder / "s.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_that_cannot_be_written_is_one_line(served: Daemon) -> None:
    with boot(served):
        done = looked(served, "screen", guest_of(served), "-o", "/nowhere/x.svg", code=1)
        assert done.stderr.endswith(
            b"error: cannot write /nowhere/x.svg: no such file or directory\n"
        )


# top


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_top_gives_the_terminal_back_at_a_signal(served: Daemon, number: int) -> None:
    with Terminal([*COMMAND, "top"], env=environment(served.folder)) as person:
        person.expect(rb"q leave")
        assert not person.is_as_it_was()
        person.process.send_signal(number)
        assert person.process.wait(WITHIN) == 128 + number
        person.expect(rb"\x1b\[\?25h(?s:.*)\x1b\[\?1049l")
        assert person.is_as_it_was()


def test_top_ends_the_attach_that_has_its_terminal(served: Daemon) -> None:
    with Terminal([*COMMAND, "top"], 160, env=environment(served.folder)) as person:
        person.expect(rb"running(?s:.*)q leave")
        person.type(b"\r")
        person.expect(rb"\[attached to .*\]")
        person.process.terminate()
        assert person.process.wait(WITHIN) == 128 + signal.SIGTERM
        assert person.is_as_it_was()
        wait_port(served, readers=0)


def test_top_ends_quietly_with_its_terminal(served: Daemon) -> None:
    with Terminal(
        [*COMMAND, "top"], env=environment(served.folder), stderr=subprocess.PIPE
    ) as person:
        person.expect(rb"q leave")
        person.hang_up()
        assert person.process.communicate(timeout=WITHIN)[1] == b""


# who


def test_who_is_attached(served: Daemon) -> None:
    with (
        boot(served),
        person(served, name="ann", columns=80, rows=24),
        attach(served, readers=2),
        person(served, name="b\x1bob"),
    ):
        done = looked(served, "who", guest_of(served))
        assert done.stdout.decode().splitlines() == [
            "NAME         ROLE     HOW       SIZE   BEHIND",
            "ann          types    attached  80x24  0",
            "unix client  types    plain     -      0",
            "b?ob         watches  attached  -      0",
        ]
        done = looked(served, "who", guest_of(served), "--json")
        assert [each["writer"] for each in json.loads(done.stdout)["people"]] == [
            True,
            True,
            False,
        ]


def test_nobody_is_nothing(served: Daemon) -> None:
    with boot(served):
        assert looked(served, "who", guest_of(served)).stdout == b""
