"""Commands that keep and play what consoles showed."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import click

from .. import finding
from ..errors import ConsoleError
from ..words import clean
from .options import (
    COUNT,
    MOST_SECONDS,
    SECONDS,
    Number,
    Size,
    json_option,
    place_names,
    replay,
    socket_option,
)

_idle_option = click.option(
    "-i",
    "--idle-limit",
    type=Number(float, 0.001, MOST_SECONDS),
    metavar="SECONDS",
    help="Have no pause be longer when it is played.",
)


def _recording_options(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command what `record` and `export` have in common."""
    for option in (
        socket_option,
        json_option,
        click.option("--overwrite", is_flag=True, help="Replace a file that is there."),
        _idle_option,
        click.option("--until", type=COUNT, metavar="OFFSET", help="End there in the journal."),
        click.option("--since", type=COUNT, metavar="OFFSET", help="Begin there in the journal."),
        click.option(
            "--replay",
            default="all",
            show_default=True,
            callback=replay,
            metavar="BYTES|all|none",
            help="How much of what came before to begin with.",
        ),
    ):
        function = option(function)
    return function


def _say(file: str, count: int, as_json: bool, more: str = "") -> None:
    if as_json:
        click.echo(json.dumps({"file": file, "bytes": count}), err=file == "-")
    else:
        click.echo(f"{count} bytes of output are in {clean(file)}{more}", err=True)


@click.command()
@click.argument("place", metavar="[GUEST[:PORT]]", required=False, shell_complete=place_names)
@click.option(
    "-o",
    "--output",
    type=click.Path(),
    metavar="FILE",
    help="The recording, - for standard output.  [default: GUEST-TIME.cast]",
)
@click.option("--duration", type=SECONDS, metavar="SECONDS", help="End after that.")
@click.option("--no-reconnect", is_flag=True, help="End when the daemon is gone.")
@_recording_options
@click.pass_context
def record(ctx: click.Context, /, place: str | None, path: str | None, **options: Any) -> None:
    """Record GUEST's console as asciicast v3, until Ctrl-C.

    \b
    vhost-device-console record vm3
    vhost-device-console record vm3 -o boot.cast --duration 60
    vhost-device-console record vm3 --replay none -o - | asciinema play -

    What came before is in it, with its times where the port has a log that knows them. It goes on
    over the death of workers and daemons; what is missing is a marker. Exit status 0, or 1 with
    --no-reconnect when the daemon is gone.
    """
    name, _, _ = finding.console(path, place)
    file = options.pop("output") or f"{name}-{time.strftime('%Y%m%d-%H%M%S')}.cast"
    stay = not options.pop("no_reconnect")
    ctx.exit(_record(place, path, file, follow=True, stay=stay, **options))


def _record(
    place: str | None,
    path: str | None,
    file_name: str,
    *,
    overwrite: bool,
    as_json: bool,
    size: tuple[int, int] | None = None,
    idle_limit: float | None,
    **span: Any,
) -> int:
    """Record what is in that span; return the exit status."""
    from ..people import recording
    from ..people.cast import Writer

    name, port, _ = finding.console(path, place)
    with recording.target(file_name, overwrite) as file:
        recorder = recording.Recorder(
            name,
            port,
            lambda: finding.find(path, name)[1],
            lambda known: Writer(file, size or known, name, idle_limit),
            **span,
        )
        status = recorder.run()
    _say(file_name, recorder.bytes, as_json, f": {clean(recorder.why)}" if status else "")
    return status


@click.command()
@click.argument("place", metavar="LOG|GUEST[:PORT]", shell_complete=place_names)
@click.option(
    "-o",
    "--output",
    type=click.Path(),
    metavar="FILE",
    default="-",
    help="The recording.  [default: standard output]",
)
@click.option("--from", "begin", metavar="TIME", help="Of a log: begin there.")
@click.option("--to", "end", metavar="TIME", help="Of a log: end there.")
@click.option("--size", type=Size(), metavar="COLUMNSxROWS", help="Of the terminal.")
@_recording_options
@click.pass_context
def export(ctx: click.Context, /, place: str, path: str | None, **options: Any) -> None:
    """Make a recording of what was kept: of a LOG's files, or of GUEST's journal.

    \b
    vhost-device-console export /var/log/vm3.log0 -o vm3.cast
    vhost-device-console export ./vm3.log --from 2026-11-23T12:00:00Z --to 2026-11-23T13:00:00Z
    vhost-device-console export vm3 --replay 65536 -o vm3.cast

    What has a / in it, or is a file, is a log: all its files count, compressed or not, in any
    format. Its times are those in it, or in the index beside it.
    """
    begin, end = options.pop("begin"), options.pop("end")
    if "/" not in place and not os.path.isfile(place):  # a socket is not meant
        if begin is not None or end is not None:
            raise ConsoleError("--from and --to are a log's; of a journal give --since and --until")
        ctx.exit(_record(place, path, options.pop("output"), follow=False, **options))
    from ..people import recording
    from ..people.cast import Writer

    given = [key for key in ("replay", "since", "until") if options[key] is not None]
    if given:
        raise ConsoleError(f"--{given[0]} is a journal's; of a log give --from and --to")
    file_name = options["output"]
    with recording.target(file_name, options["overwrite"]) as file:
        writer = Writer(
            file, options["size"] or (0, 0), os.path.basename(place), options["idle_limit"]
        )
        count, known = recording.export_log(
            place,
            writer,
            None if begin is None else recording.parse_time(begin),
            None if end is None else recording.parse_time(end),
        )
    more = "" if known else "; when some of it came is not known: it comes at once"
    _say(file_name, count, options["as_json"], more)


@click.command()
@click.argument("file", type=click.Path())
@click.option(
    "-s",
    "--speed",
    type=Number(float, 0.001, 1_000_000),
    default=1.0,
    show_default=True,
    metavar="FACTOR",
    help="How much faster.",
)
@_idle_option
@click.option("--paused", is_flag=True, help="Begin with a pause.")
@click.option("--cat", is_flag=True, help="Print all of it at once.")
@click.option("--json", "as_json", is_flag=True, help="Print its events at once, as JSON lines.")
@click.option("-q", "--quiet", is_flag=True, help="Say nothing but what was recorded.")
@click.pass_context
def play(ctx: click.Context, /, file: str, cat: bool, as_json: bool, **options: Any) -> None:
    """Play a recording, asciicast v2 or v3, - for standard input, in this terminal.

    \b
    vhost-device-console play boot.cast --speed 4 --idle-limit 1
    vhost-device-console play boot.cast --cat | grep panic

    Keys: space pauses and goes on, . goes on by one event in a pause, ] goes to the next marker,
    + and - change the speed, q leaves. Exit status 0 at the end, 130 when it was left.
    """
    from ..people import cast, play

    try:
        lines = sys.stdin.buffer if file == "-" else open(file, "rb")  # noqa: SIM115
    except OSError as error:
        raise ConsoleError(f"cannot read {file}: {(error.strerror or '').lower()}") from error
    with lines:
        header, events = cast.read(lines, file)
        if as_json:
            play.print_objects(header, events)
        elif cat:
            play.print_all(events)
        else:
            ctx.exit(play.play(header, events, **options))
