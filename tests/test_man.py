"""The manual page has every option and every command, and no others."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
from msgspec.structs import fields
from vhost_device_console.cli import cli
from vhost_device_console.config import PortTable

PAGE = (Path(__file__).parents[1] / "contrib/man/vhost-device-console.1").read_text()


def commands(command: click.Command, words: str = "") -> Iterator[tuple[str, click.Command]]:
    """Yield a command and all below it that do something, by their words."""
    if words:
        yield words, command
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from commands(inner, f"{words} {name}".strip())


def test_every_option_is_in_it_and_none_that_is_not_there() -> None:
    there = {
        option.lstrip("-")
        for _, command in [("", cli), *commands(cli)]
        for param in command.params
        for option in param.opts
        if option.startswith("--")
    }
    described = set(re.findall(r"Fl -([a-z][a-z-]+)", PAGE))
    assert described == there | {"help"}


def test_every_short_option_is_in_it() -> None:
    short = {option[1] for param in cli.params for option in param.opts if option[1] != "-"}
    assert set(re.findall(r"Fl ([a-zA-Z])\b", PAGE)) == short | {"h"}


def test_every_command_is_in_its_synopsis_and_described() -> None:
    synopsis = PAGE.partition(".Sh DESCRIPTION")[0]
    for words, command in commands(cli):
        if not isinstance(command, click.Group):
            assert f"\n.Cm {words}\n" in synopsis
            assert re.search(rf"^\.It Cm {words}( Ar .*)?$", PAGE, re.MULTILINE)


def test_every_key_of_a_port_is_in_it() -> None:
    described = re.findall(r"\bCm ([a-z-]+)(?: Ns = Ns|$)", PAGE, re.MULTILINE)
    assert {field.encode_name for field in fields(PortTable)} <= set(described)
