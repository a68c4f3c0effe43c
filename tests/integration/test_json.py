"""What commands print for programs: every command has `--json`."""

from __future__ import annotations

import itertools
import json
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest
from scene import boot
from vhost_device_console.commands.daemon import daemon as command_line

from conftest import StartDaemon
from launch import COMMAND, WITHIN, Daemon, command, environment


def leaves(group: click.Group, *words: str) -> list[tuple[tuple[str, ...], click.Command]]:
    """Return the commands of a group and of those in it."""
    context = click.Context(group)
    found = []
    for name in group.list_commands(context):
        each = group.get_command(context, name)
        assert each is not None
        if isinstance(each, click.Group):
            found += leaves(each, *words, name)
        else:
            found.append(((*words, name), each))
    return found


LEAVES = leaves(command_line)


@pytest.mark.parametrize(
    "found", [each for _, each in LEAVES], ids=[" ".join(words) for words, _ in LEAVES]
)
def test_every_command_has_json_and_examples(found: click.Command) -> None:
    assert any("--json" in param.opts for param in found.params)
    assert "vhost-device-console " in (found.help or "")


def said(folder: Path, *words: str, lines: bool = False, **popen: Any) -> Any:
    """Return the JSON that a command prints, each line by itself with `lines`."""
    done = command(folder, *words, "--json", **popen)
    assert (done.returncode, done.stderr) == (0, "")
    return [*map(json.loads, done.stdout.splitlines())] if lines else json.loads(done.stdout)


@pytest.fixture
def served(daemon: StartDaemon) -> Daemon:
    """Give a daemon of one guest with room for more ports."""
    return daemon("unix", 1, "--max-ports", "3")


def test_a_change_is_told(served: Daemon, folder: Path) -> None:
    name = served.status()[0]["name"]
    described = f"name=agent,backend=unix,path={folder}/agent"
    for words in (
        ("resize", name, "80x24"),
        ("port", "add", name, described),
        ("port", "remove", name, "agent"),
    ):
        told = said(folder, *words)
        assert told["guest"] == name
        assert told["done"]


def test_what_attach_shows_has_its_offset(served: Daemon, folder: Path) -> None:
    name = served.status()[0]["name"]
    with boot(served) as console:
        console.write("snow\u2603man".encode()[:5])
        console.write("snow\u2603man".encode()[5:])
        shown = said(folder, "attach", name, "--read-only", "--expect", "man", lines=True)
    assert "attached to" in shown[0]["said"]
    output = [line for line in shown if "text" in line]
    assert "".join(line["text"] for line in output) == "snow\u2603man"
    assert next(line["offset"] for line in output) == 0
    for before, after in itertools.pairwise(output):
        assert after["offset"] == before["offset"] + len(before["text"].encode())


def test_metrics_are_samples(served: Daemon, folder: Path) -> None:
    name = served.status()[0]["name"]
    samples = said(folder, "metrics", "--once")["samples"]
    assert any(sample["labels"].get("guest") == name for sample in samples)


@pytest.mark.parametrize("gateway", ["ssh", "metrics"])
def test_a_gateway_says_where_it_listens(gateway: str, folder: Path) -> None:
    words = [*COMMAND, gateway, "--listen=127.0.0.1:0", "--json"]
    if gateway == "ssh":
        (folder / "keys").touch(mode=0o600)
        words += [f"--authorized-keys={folder}/keys", f"--host-key={folder}/host"]
    with subprocess.Popen(
        words,
        env=environment(folder),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        process.terminate()
        assert process.wait(WITHIN) == 0
    assert "127.0.0.1:" in (told["listening"] if gateway == "ssh" else told["url"])


def test_a_recording_is_events_from_its_begin(folder: Path) -> None:
    file = folder / "it.cast"
    file.write_text(
        '{"version":3,"term":{"cols":80,"rows":24}}\n[0.5,"o","one"]\n[0.25,"r","90x20"]\n'
    )
    header, *events = said(folder, "play", str(file), lines=True)
    assert (header["version"], header["columns"], header["rows"]) == (3, 80, 24)
    assert events == [
        {"at": 0.5, "code": "o", "data": "one"},
        {"at": 0.75, "code": "r", "data": "90x20"},
    ]


def test_a_completion_is_a_script(folder: Path) -> None:
    told = said(folder, "completion", "bash")
    assert told["shell"] == "bash"
    assert "complete -o nosort" in told["script"]
