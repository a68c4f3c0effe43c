"""`contrib/demo`: the first thing anybody runs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from console import Console

from launch import WITHIN, environment

pytestmark = pytest.mark.guest

CONTRIB = Path(__file__).parents[2] / "contrib"


def start(folder: Path, contrib: Path = CONTRIB, **popen: Any) -> subprocess.Popen[bytes]:
    more = popen.pop("env", {})
    return subprocess.Popen(
        [sys.executable, contrib / "demo"], env=environment(folder, **more), **popen
    )


def piped(folder: Path, typed: bytes, **more: Any) -> tuple[bytes, bytes, int]:
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with start(folder, **pipes, **more) as demo:
        out, log = demo.communicate(typed, timeout=WITHIN * 2)
    return out, log, demo.returncode


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """Give a terminal's two sides: ours, the demo's."""
    sides = os.openpty()
    yield sides
    for side in sides:
        os.close(side)


@pytest.mark.usefixtures("a_kernel")
def test_what_a_pipe_holds_is_typed_and_poweroff_ends_it(folder: Path) -> None:
    out, log, status = piped(folder, b"uname -s -n -m\npoweroff -f\n")
    assert status == 0, log
    assert b"\nLinux version " in b"\n" + out
    assert b"\nLinux (none) x86_64\r\n" in out


@pytest.mark.usefixtures("a_kernel")
@pytest.mark.parametrize("typed", [b"", b"echo $((6 * 7))\n", b"echo $((6 * 7))"])
def test_the_end_of_a_pipe_ends_it(typed: bytes, folder: Path) -> None:
    out, log, status = piped(folder, typed)
    assert status == 0, log
    assert b"guest# " in out
    assert (b"\n42\r\n" in out) is bool(typed)


@pytest.mark.usefixtures("a_kernel")
def test_the_escape_leaves_and_nothing_stays(folder: Path, terminal: tuple[int, int]) -> None:
    ours, theirs = terminal
    before = termios.tcgetattr(theirs)
    with start(folder, stdin=theirs, stdout=theirs, stderr=theirs) as demo:
        console = Console(ours)
        console.until(rb"guest# ")
        family = psutil.Process(demo.pid).children(recursive=True)
        console.send(b"\x1dq")
        assert demo.wait(WITHIN) == 0
    assert not psutil.wait_procs(family, timeout=WITHIN)[1]
    assert termios.tcgetattr(theirs) == before


@pytest.mark.usefixtures("a_kernel")
def test_a_signal_ends_it_and_nothing_stays(folder: Path, terminal: tuple[int, int]) -> None:
    ours, theirs = terminal
    before = termios.tcgetattr(theirs)
    with start(folder, stdin=theirs, stdout=theirs, stderr=theirs) as demo:
        Console(ours).until(rb"guest# ")
        family = psutil.Process(demo.pid).children(recursive=True)
        demo.send_signal(signal.SIGTERM)
        assert demo.wait(WITHIN) == 128 + signal.SIGTERM
    assert not psutil.wait_procs(family, timeout=WITHIN)[1]
    assert termios.tcgetattr(theirs) == before


def test_without_a_guest_to_fetch_it_runs_the_mock_guest(folder: Path) -> None:
    contrib = shutil.copytree(CONTRIB, folder / "contrib")
    out, log, status = piped(
        folder, b"echo $((6 * 7))\npoweroff -f\n", contrib=contrib, env={"VDC_APT": "/bin/false"}
    )
    assert status == 0, log
    assert b"42\r\n" in out
    assert b"no Linux guest: /bin/false failed\n" in log
    assert b"running the built-in mock guest instead\n" in log
