"""A real guest's console from a terminal, with every command that people have for it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from console import PROMPT, Console
from uml import StartGuest

from launch import COMMAND, WITHIN, Daemon, command, environment
from terminal import Terminal

pytestmark = pytest.mark.guest

ESCAPE = b"\x1d"

#: Something with colours on a clean screen.
SHOW = b"clear; stty size; uname -a; ls --color=always /"


def test_boot_type_resize_look_and_power_off(
    a_kernel: Path, folder: Path, daemon: Callable[..., Daemon], boot: StartGuest
) -> None:
    """From the boot log's first line on, while a worker is killed, and at last from a pipe."""
    started = daemon("unix")
    name = started.status()[0]["name"]
    guest = boot(a_kernel, started.sockets[0])

    def asked(*words: str, **popen: object) -> str:
        done = command(folder, *words, **popen)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    with Terminal([*COMMAND, "attach", name], env=environment(folder)) as terminal:
        person = Console(terminal.outer)
        person.until(rb"\[attached to ")
        person.until(rb"Linux version")
        person.until(PROMPT)
        person.run(b'until [ "$(stty size)" = "24 80" ]; do :; done')
        os.kill(started.workers()[0], signal.SIGKILL)
        terminal.resize(90, 20)
        person.run(b'until [ "$(stty size)" = "20 90" ]; do :; done')
        person.run(SHOW)
        (who,) = json.loads(asked("who", name, "--json"))["people"]
        assert (who["writer"], who["columns"], who["rows"]) == (True, 90, 20)
        assert "20 90" in asked("history", name, "--tail", "20", "--strip").split("\n")
        lines = asked("screen", name).split("\n")
        assert lines[0] == "20 90"
        assert lines[1].startswith("Linux ")
        pictures = Path(os.environ.get("SCREENSHOTS", folder))
        asked("screen", name, "-o", str(pictures / "screen.svg"))
        assert "Linux " in (pictures / "screen.svg").read_text()
        person.send(ESCAPE + b"q")
        assert terminal.process.wait(WITHIN) == 0
    told = command(folder, "attach", name, stdin=None, input="poweroff -f\n")
    assert told.returncode == 0
    assert "Linux version" in told.stdout  # all of it again
    assert guest.wait() == 0
