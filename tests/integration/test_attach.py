"""The `attach` command: in a terminal, in pipes, and over the death of what it is attached to."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from scene import boot, wait_port
from test_attached import HASTY

from conftest import StartDaemon
from launch import COMMAND, WITHIN, Daemon, command, environment, wait_readable
from terminal import Terminal

ESCAPE = b"\x1d"


@contextmanager
def terminal(daemon: Daemon, *arguments: str) -> Iterator[Terminal]:
    command = [*COMMAND, "attach", *arguments]
    with Terminal(command, env=environment(daemon.folder)) as attached:
        attached.expect(rb"\[attached to .*\]\r\n")
        yield attached


def piped(
    daemon: Daemon, typed: bytes | None, *arguments: str
) -> subprocess.CompletedProcess[bytes]:
    """Run `attach` between pipes; without `typed` its input is empty."""
    return subprocess.run(
        [*COMMAND, "attach", *arguments],
        **({"stdin": subprocess.DEVNULL} if typed is None else {"input": typed}),  # type: ignore[arg-type]
        capture_output=True,
        env=environment(daemon.folder),
        timeout=WITHIN,
        check=False,
    )


@pytest.fixture
def served(daemon: StartDaemon) -> Daemon:
    return daemon("unix", 1, program=HASTY)


def test_history_first_then_live_and_keys_go_to_the_guest(served: Daemon) -> None:
    with boot(served) as console:
        console.write(b"before\n")
        with terminal(served) as person:
            person.expect(rb"before")
            person.type(b"typed")
            assert console.read(5) == b"typed"
            console.write(b"live")
            person.expect(rb"live")


def test_the_menu_leaves_and_the_guest_goes_on(served: Daemon) -> None:
    with boot(served) as console, terminal(served) as person:
        person.type(ESCAPE + b"?")
        person.expect(rb"\[q  leave; the guest goes on\]")
        person.type(ESCAPE + b"q")
        assert person.process.wait(WITHIN) == 0
        wait_port(served, readers=0)
        console.write(b"on")


def test_the_escape_key_twice_is_typed(served: Daemon) -> None:
    with boot(served) as console, terminal(served) as person:
        person.type(ESCAPE + ESCAPE + b"x")
        assert console.read(2) == ESCAPE + b"x"


def test_another_escape_key(served: Daemon) -> None:
    with boot(served) as console, terminal(served, "-e", "^a") as person:
        person.type(ESCAPE + b"\x01q")
        assert person.process.wait(WITHIN) == 0
        assert console.read(1) == ESCAPE


def test_sysrq_is_the_hvc_console_s_prefix_and_the_key(served: Daemon) -> None:
    with boot(served) as console, terminal(served) as person:
        person.type(ESCAPE + b"bh")
        assert console.read(2) == b"\x0fh"


def test_who_force_and_read_only(served: Daemon) -> None:
    with boot(served) as console, terminal(served) as first, terminal(served) as second:
        second.expect(rb"\[you watch: ")
        second.type(b"ignored" + ESCAPE + b"f")
        second.expect(rb"\[you type now\]")
        first.expect(rb"\[you watch: ")
        second.type(b"heard" + ESCAPE + b"w")
        assert console.read(5) == b"heard"
        second.expect(rb"\(you\): types")
        second.type(ESCAPE + b"r")
        first.expect(rb"\[you type now\]")


def test_a_killed_worker_is_not_seen(served: Daemon) -> None:
    with boot(served) as console, terminal(served) as person:
        for number in range(3):
            console.write(b"line %d\r\n" % number)
            served.kill_worker()
            person.type(b"%d" % number)
            assert console.read(1) == b"%d" % number
        assert person.expect(rb"((?s:.*)line 2)")[1] == b"line 0\r\nline 1\r\nline 2"


def test_it_waits_for_a_daemon_that_went_and_says_what_is_missing(daemon: StartDaemon) -> None:
    served = daemon("unix", 1)
    with boot(served) as console:
        console.write(b"one")
        with terminal(served) as person:
            person.expect(rb"one")
            served.close()
            person.expect(rb"\[the daemon is gone; waiting for it\]")
            served = daemon("unix", 1)
            with boot(served) as again:
                again.write(b"two")
                person.expect(rb"\[another daemon: what came meanwhile is not known\]")
                person.expect(rb"two")


def test_a_pipe_is_typed_and_answered(served: Daemon) -> None:
    with boot(served) as console:
        console.write(b"history ")
        told = piped(served, b"poweroff\n")
        assert (told.returncode, told.stdout) == (0, b"history ")
        assert console.read(9) == b"poweroff\n"


def test_what_is_expected_ends_it(served: Daemon) -> None:
    with boot(served) as console:
        console.write(b"vm3 login: ")
        told = piped(served, None, "--expect", "login: $", "--timeout", str(WITHIN), "-q")
        assert (told.returncode, told.stdout, told.stderr) == (0, b"vm3 login: ", b"")


def test_what_does_not_come_in_time_is_status_3(served: Daemon) -> None:
    with boot(served):
        told = piped(served, None, "--expect", "login:", "--timeout", "0.1")
        assert told.returncode == 3
        assert b"nothing like it came within 0.1 s" in told.stderr


def test_a_pipe_that_may_not_type_says_so(served: Daemon) -> None:
    with boot(served), terminal(served):
        told = piped(served, b"poweroff\n")
        assert told.returncode == 4
        assert b"take the role with --force" in told.stderr


def test_a_pipe_takes_the_role_by_force(served: Daemon) -> None:
    with boot(served) as console, terminal(served):
        assert piped(served, b"reboot\n", "--force").returncode == 0
        assert console.read(7) == b"reboot\n"


def test_a_resized_terminal_is_the_guest_s_size(served: Daemon) -> None:

    with boot(served), terminal(served) as person:
        person.resize(132, 50)
        wait_port(served, columns=132, rows=50)


def test_no_such_guest(served: Daemon) -> None:
    told = piped(served, None, "nobody")
    assert told.returncode == 1
    assert told.stderr.startswith(b"vhost-device-console: error: there is no guest nobody, only ")


def test_a_log_that_cannot_be_written_ends_and_nothing_else_does(daemon: StartDaemon) -> None:
    served = daemon("unix", 1)
    with boot(served) as console, terminal(served, "--log", "/dev/full") as person:
        console.write(b"one")
        person.expect(rb"\[the log /dev/full ends here: no space left on device\]\r\n")
        console.write(b"two")
        person.expect(b"two")


def test_a_signal_ends_it_though_nobody_reads(daemon: StartDaemon) -> None:
    served = daemon("unix", 1)
    with boot(served) as console:
        process = subprocess.Popen(
            [*COMMAND, "attach", "--quiet"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(served.folder),
        )
        with process:
            console.write(b"x" * (1 << 18), depth=16)
            assert process.stdout is not None
            wait_readable(process.stdout.fileno(), time.monotonic() + WITHIN, "nothing comes")
            process.terminate()
            assert process.wait(WITHIN) == 128 + signal.SIGTERM


def test_it_ends_quietly_with_its_terminal(served: Daemon) -> None:
    command = [*COMMAND, "attach", "--quiet"]
    with (
        boot(served) as console,
        Terminal(command, env=environment(served.folder), stderr=subprocess.PIPE) as person,
    ):
        console.write(b"before")
        person.expect(b"before")
        person.hang_up()
        assert person.process.communicate(timeout=WITHIN)[1] == b""


def test_the_menu_works_though_nobody_takes_what_was_pasted(served: Daemon) -> None:
    with terminal(served) as person:
        person.type(b"x" * (3 << 19))
        person.expect(rb"\[there is no room for more keys: they are dropped\]")
        person.type(ESCAPE + b"q")
        assert person.process.wait(WITHIN) == 0
        person.expect(rb"\[\d+ bytes that were typed did not reach the guest\]")


@pytest.mark.parametrize("stdin", [subprocess.DEVNULL, subprocess.PIPE])
def test_who_types_nothing_watches(served: Daemon, stdin: int) -> None:
    with (
        boot(served) as console,
        subprocess.Popen(
            [*COMMAND, "attach", "--linger", "0"],
            stdin=stdin,
            stdout=subprocess.PIPE,
            env=environment(served.folder),
        ) as process,
    ):
        try:
            if process.stdin is not None:
                process.stdin.close()
            assert process.stdout is not None
            for line in (b"one\n", b"two\n", b"three\n"):
                console.write(line)
                assert process.stdout.readline() == line
        finally:
            process.kill()


def test_a_port_that_is_removed_ends_it(daemon: StartDaemon, folder: Path) -> None:
    served = daemon("unix", 1, "--max-ports", "2")
    described = f"name=agent,backend=unix,path={folder}/agent"
    assert command(folder, "port", "add", "c.sock0", described).returncode == 0
    with terminal(served, "c.sock0:agent") as person:
        assert command(folder, "port", "remove", "c.sock0", "agent").returncode == 0
        person.expect(rb"\[the console is gone\]\r\n\r\n\[c.sock0 has no port agent\]\r\n")
        assert person.process.wait(WITHIN) == 1


def objects(told: subprocess.CompletedProcess[bytes]) -> list[dict[str, object]]:
    """Return the lines of output, as JSON."""
    lines = [json.loads(line) for line in told.stdout.splitlines()]
    return [line for line in lines if "text" in line]


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"ok \xe2\x98", [{"offset": 0, "text": "ok "}, {"offset": 3, "text": "\ufffd"}]),
        (b"\xe2\x98", [{"offset": 0, "text": "\ufffd"}]),
    ],
)
def test_an_unfinished_character_is_in_the_json(
    served: Daemon, data: bytes, lines: list[dict[str, object]]
) -> None:
    with boot(served) as console:
        console.write(data)
        told = piped(served, None, "--json", "--expect", r"\x98", "--timeout", str(WITHIN))
        assert told.returncode == 0
        assert objects(told) == lines


def test_all_from_an_offset_is_shown(served: Daemon) -> None:
    with boot(served) as console:
        console.write(b"0123456789")
        wait_port(served, output=10)
        told = piped(served, None, "--since", "4", "--expect", "9", "--timeout", str(WITHIN))
        assert (told.returncode, told.stdout) == (0, b"456789")
        assert [line[:12] for line in told.stderr.splitlines()] == [b"[attached to"]
