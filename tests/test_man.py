"""The manual pages have every option and every command, and no others."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from msgspec.structs import fields
from vhost_device_console.commands.daemon import daemon
from vhost_device_console.config import PortTable

PLACE = Path(__file__).parents[1] / "contrib" / "man"
PAGE = (PLACE / "vhost-device-console.1").read_text()


def commands(command: click.Command, words: str = "") -> Iterator[tuple[str, click.Command]]:
    """Yield all below a command that do something, by their words."""
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from commands(inner, f"{words} {name}".strip())
    else:
        yield words, command


COMMANDS = [*commands(daemon)]


def test_every_option_of_the_daemon_is_in_it_and_none_that_is_not_there() -> None:
    there = {
        option.lstrip("-")
        for param in daemon.params
        for option in param.opts + param.secondary_opts
        if option.startswith("--")
    }
    described = set(re.findall(r"Fl -([a-z][a-z-]+)", PAGE))
    assert described == there | {"help", "socket"}


def test_every_short_option_is_in_it() -> None:
    short = {option[1] for param in daemon.params for option in param.opts if option[1] != "-"}
    assert set(re.findall(r"Fl ([a-zA-Z])\b", PAGE)) == short | {"h"}


def test_every_command_is_named_in_it() -> None:
    named = re.findall(r"^\.It Xr vhost-device-console-([a-z-]+) 1$", PAGE, re.MULTILINE)
    assert sorted(named) == sorted(words.replace(" ", "-") for words, _ in COMMANDS)


@pytest.mark.parametrize(("words", "command"), COMMANDS, ids=[words for words, _ in COMMANDS])
def test_every_command_has_a_page_with_an_example(
    words: str, command: click.Command, pages: Path
) -> None:
    page = (pages / f"vhost-device-console-{words.replace(' ', '-')}.1").read_text()
    assert f"\n.EX\nvhost-device-console {words}" in page or (
        f"vhost-device-console {words}" in page.partition(".EX\n")[2].partition("\n.EE")[0]
    )
    for param in command.params:
        for option in param.opts:
            if option.startswith("--"):
                assert option.replace("-", "\\-") in page


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the folder of the pages that are made of --help."""
    folder = tmp_path_factory.mktemp("man")
    subprocess.run([sys.executable, PLACE / "generate", folder], check=True)
    return folder


def test_every_key_of_a_port_is_in_it() -> None:
    described = re.findall(r"\bCm ([a-z-]+)(?: Ns = Ns|$)", PAGE, re.MULTILINE)
    assert {field.encode_name for field in fields(PortTable)} <= set(described)
