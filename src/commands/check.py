"""The command that tries the specifications on any console backend."""

from __future__ import annotations

from typing import Any

import click

from .. import __version__
from .options import json_option


@click.command()
@click.argument("path", metavar="SOCKET", required=False)
@click.option("--data", metavar="HOST:PORT|PATH", help="Where a client of the console attaches.")
@click.option("--start", metavar="COMMAND", help="Start it so, and again when it is gone.")
@click.option("--only", multiple=True, metavar="PATTERN", help="Only statements so called.")
@click.option("--list", "only_list", is_flag=True, help="Show the statements and try none.")
@click.option(
    "--timeout", type=float, default=3.0, show_default=True, help="Seconds each may wait."
)
@click.option("--strict", is_flag=True, help="Fail on a SHOULD that does not hold, too.")
@json_option
@click.option("--junit", type=click.Path(), metavar="FILE", help="Write JUnit XML as well.")
@click.pass_context
def check(ctx: click.Context, /, **options: Any) -> None:
    """Try what the specifications demand on the console backend at SOCKET, whoever made it.

    \b
    vhost-device-console check /tmp/console.sock0 --data 127.0.0.1:12345
    vhost-device-console check /tmp/s0 --data /tmp/s0.data --start "my-backend --socket /tmp/s0"

    Exit status 0 when every MUST holds, 1 when one does not, 2 when nothing could be checked.
    """
    from ..testing.conformance import command

    ctx.exit(command.check(**options, version=__version__))
