"""Completion in real shells: commands, options, guests of running daemons, and their ports."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from conftest import StartDaemon
from launch import Daemon, environment, need, run
from terminal import Terminal

PROGRAM = "vhost-device-console"
PORT = "name=agent,backend=unix,path={}/agent"

#: How a shell starts without anybody's own settings, and what has it complete for us.
SHELLS = {
    "bash": (
        ["bash", "--norc", "--noprofile", "-i"],
        f'PS1=ready; eval "$({PROGRAM} completion bash)"',
    ),
    "zsh": (
        ["zsh", "-f", "-i"],
        "PS1=ready; unsetopt zle_bracketed_paste prompt_sp; autoload -U compinit; compinit -u -D;"
        f' eval "$({PROGRAM} completion zsh)"',
    ),
}


@pytest.fixture
def served(daemon: StartDaemon, folder: Path) -> Daemon:
    """Give a daemon of one guest that has two ports."""
    return daemon("unix", 1, "--port", PORT.format(folder))


def surroundings(folder: Path) -> dict[str, str]:
    """Return an environment in which the program is found by its name."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return environment(folder, PATH=path, HOME=str(folder), TERM="dumb", XDG_CONFIG_HOME="/none")


@contextmanager
def sitting_at(shell: str, folder: Path) -> Iterator[Terminal]:
    """Give a shell that completes."""
    need(shutil.which(shell), shell, f"apt install {shell}")
    command, ready = SHELLS[shell]
    # One line, whatever the length of paths.
    with Terminal(command, 1000, env=surroundings(folder), start_new_session=True) as terminal:
        terminal.type(f"{ready}; echo set''up\n".encode())
        terminal.expect(rb"^setup\r\n")
        terminal.expect(b"ready")
        yield terminal


def asked_of_fish(line: str, folder: Path) -> list[str]:
    """Return what fish would offer at the end of `line`."""
    need(shutil.which("fish"), "fish", "apt install fish")
    ask = f"{PROGRAM} completion fish | source; complete -C $argv[1]"
    told = run(["fish", "--no-config", "-c", ask, "--", line], folder, env=surroundings(folder))
    return [offer.split("\t")[0] for offer in told.stdout.splitlines()]


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("att", "attach"),
        ("attach --rea", "attach --read-only"),
        ("attach {:.3}", "attach {}"),
        ("history {}:a", "history {}:agent"),
        ("screen --format sv", "screen --format svg"),
        ("--backend net", "--backend network"),
    ],
)
def test_a_tab_completes(
    served: Daemon, folder: Path, shell: str, typed: str, completed: str
) -> None:
    guest = served.status()[0]["name"]
    with sitting_at(shell, folder) as terminal:
        terminal.type(f"{PROGRAM} {typed.format(guest)}\t".encode())
        # zsh shows a colon that it quotes as it has to be typed.
        line = completed.format(guest).replace(":", r"\\?:")
        terminal.expect(f"{PROGRAM} {line}".encode())


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("att", ["attach"]),
        ("attach --rea", ["--read-only"]),
        ("attach {:.3}", ["{}"]),
        ("history {}:a", ["{}:agent"]),
        ("screen --format sv", ["svg"]),
        ("--backend net", ["network"]),
    ],
)
def test_fish_offers(served: Daemon, folder: Path, typed: str, offered: list[str]) -> None:
    guest = served.status()[0]["name"]
    found = asked_of_fish(f"{PROGRAM} {typed.format(guest)}", folder)
    assert found == [each.format(guest) for each in offered]
