"""How commands end whose files are closed, whose reader leaves or whose daemon is newer."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from scene import boot, noise, wait_port

from conftest import StartDaemon
from launch import COMMAND, WITHIN, Daemon, command, environment

#: A daemon whose workers tell something that no command knows.
NEWER = [
    sys.executable,
    "-c",
    "from vhost_device_console import attachment, cli; encode = attachment.encode; "
    "attachment.encode = lambda told: encode(told).replace(b'\"size\"', b'\"shape\"'); cli.main()",
]

ATTACH = ("attach", "c.sock0", "--quiet", "--read-only", "--expect", "man")
LOOKS = (ATTACH, ("history", "c.sock0"), ("screen", "c.sock0"))


@pytest.fixture
def served(daemon: StartDaemon) -> Daemon:
    return daemon("unix", 1)


def named(words: tuple[str, ...]) -> str:
    return words[0]


# Files that are closed


@pytest.mark.parametrize("fd", [0, 1, 2])
@pytest.mark.parametrize("words", LOOKS, ids=named)
def test_a_closed_file_is_as_dev_null(served: Daemon, words: tuple[str, ...], fd: int) -> None:
    with boot(served) as console:
        console.write(b"snowman")
        wait_port(served, output=7)
        done = command(served.folder, *words, preexec_fn=lambda: os.close(fd))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == ("" if fd == 1 else "snowman")


@pytest.mark.parametrize("fd", [0, 1, 2])
def test_a_mistake_is_one_line_if_it_can_be_said(folder: Path, fd: int) -> None:
    done = command(folder, "status", preexec_fn=lambda: os.close(fd))
    said = "" if fd == 2 else "vhost-device-console: error: no daemon is running\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", said)


# Readers that leave


def test_who_follows_into_a_socket_ends_when_nobody_reads(served: Daemon) -> None:
    ours, theirs = socket.socketpair()
    with ours, boot(served) as console:
        with theirs:
            process = subprocess.Popen(
                [*COMMAND, "history", "c.sock0", "--follow"],
                stdin=subprocess.DEVNULL,
                stdout=theirs,
                env=environment(served.folder),
            )
        try:
            ours.settimeout(WITHIN)
            console.write(b"one")
            assert ours.recv(3) == b"one"
            ours.close()
            assert process.wait(WITHIN) == 1
        finally:
            process.kill()
            process.wait()


def test_a_reader_that_leaves_is_noticed_though_nothing_is_buffered(served: Daemon) -> None:
    data = noise(1 << 18)
    with boot(served) as console:
        console.write(data)
        wait_port(served, output=len(data))
        with subprocess.Popen(
            [*COMMAND, "history", "c.sock0"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=environment(served.folder, PYTHONUNBUFFERED="1"),
        ) as process:
            assert process.stdout is not None
            assert process.stdout.read(20)
            process.stdout.close()
            assert process.wait(WITHIN) == 1


# Daemons that are newer


@pytest.mark.parametrize(
    "words",
    [*LOOKS, ("who", "c.sock0"), ("record", "c.sock0", "-o", "-"), ("export", "c.sock0")],
    ids=named,
)
def test_what_only_a_newer_daemon_says_is_one_line(
    daemon: StartDaemon, words: tuple[str, ...]
) -> None:
    with boot(served := daemon("unix", 1, program=NEWER)):
        done = command(served.folder, *words)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "vhost-device-console: error: the daemon of c.sock0 says what this command does not know: "
        "use one of the daemon's version\n"
    )


# A command that is missing


def test_a_group_without_a_command_is_its_help(folder: Path) -> None:
    done = command(folder, "port")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Usage: vhost-device-console port [OPTIONS] COMMAND")
    assert "\n  add " in done.stderr
