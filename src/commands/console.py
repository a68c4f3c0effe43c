"""Commands for people at a console: attach, who, history, screen, top."""

from __future__ import annotations

import os
import re
import shutil
import sys
from typing import Any

import click

from .. import finding, monitor, tables
from ..errors import ConsoleError
from .options import (
    COUNT,
    SECONDS,
    Number,
    Size,
    escape_option,
    extra,
    json_option,
    place_argument,
    place_names,
    replay,
    socket_option,
)


def _look(place: str, path: str | None) -> tuple[str, monitor.Attach]:
    """Return where GUEST[:PORT] is and how to look at it: all that is kept, and no hand on it."""
    from ..people.attach import own_name

    name, which, at = finding.console(path, place)
    return at, monitor.Attach(guest=name, port=which, name=own_name(), write=False, look=True)


@click.command()
@place_argument
@click.option("--since", type=COUNT, metavar="OFFSET", help="All from there.")
@click.option("--tail", type=COUNT, metavar="LINES", help="The last so many lines.")
@click.option("--bytes", "most", type=COUNT, metavar="N", help="The last so many bytes.")
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes, until Ctrl-C.")
@click.option("--strip", is_flag=True, help="Without escape sequences and control characters.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object for each line.")
@socket_option
def history(place: str, path: str | None, **options: Any) -> None:
    """Print what GUEST's console has put out, as far as it is kept.

    \b
    vhost-device-console history vm3 --tail 100 --strip
    vhost-device-console history vm3 --follow --strip | grep -i oops
    vhost-device-console history vm3 --since 1048576 >vm3.raw

    An offset counts bytes since the console began. What the journal does not keep any more is taken
    from the port's log, where that is raw, can be read and has it. Nobody else is disturbed. On
    stderr stands where bytes are missing. Exit status 0: all is printed; 1: there is no such
    console, it is gone, or whoever reads had enough; 130: Ctrl-C.
    """
    from ..people import history as people

    given = {name: options[name] for name in ("since", "tail", "most")}
    if sum(value is not None for value in given.values()) > 1:
        raise click.UsageError("--since, --tail and --bytes do not go together")
    _, request = _look(place, path)
    people.show(people.Options(request, **options), lambda: finding.find(path, request.guest)[1])


@click.command()
@place_argument
@click.option(
    "--size",
    type=Size(most=(1000, 500)),
    metavar="COLSxROWS",
    help="Not the port's size, or 80x24.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "ansi", "svg", "png", "json"]),
    help="How to write it: by the end of FILE's name, or as text.",
)
@click.option("-o", "--output", type=click.Path(), metavar="FILE", help="Write it there.")
@click.option("--json", "as_json", is_flag=True, help="The same as --format json.")
@socket_option
def screen(
    place: str,
    size: tuple[int, int] | None,
    form: str | None,
    output: str | None,
    as_json: bool,
    path: str | None,
) -> None:
    """Print what a terminal at GUEST's console would show now.

    \b
    vhost-device-console screen vm3
    vhost-device-console screen vm3 --format json | jq .cursor
    vhost-device-console screen vm3 -o vm3.svg

    A terminal is emulated for that, which reads the last of the console's history. Needs the
    package's extra [people].
    """
    people = extra("screen", "people")
    if as_json and form not in (None, "json"):
        raise click.UsageError(f"--json and --format {form} do not go together")
    end = os.path.splitext(output or "")[1][1:]
    form = "json" if as_json else form or (end if end in people.FORMATS else "text")
    if form == "png" and output is None and os.isatty(1):
        raise click.UsageError("a PNG is nothing for a terminal: name a file with -o")
    from ..people.looking import looking

    at, request = _look(place, path)
    request.replay = people.MOST_HISTORY
    with looking(at, request) as link:
        picture = people.show(link, size, form)
    if output is None:
        sys.stdout.buffer.write(picture)
        sys.stdout.flush()
        return
    try:
        with open(output, "wb") as file:
            file.write(picture)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConsoleError(f"cannot write {output}: {reason}") from error


@click.command()
@click.option(
    "--interval",
    type=Number(float, 0.1, 3600),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="How often to ask.",
)
@click.option("--once", is_flag=True, help="Print one table, and exit.")
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON each time.")
@socket_option
def top(interval: float, once: bool, as_json: bool, path: str | None) -> None:
    """Watch all guests: rates, how many read, how far behind, restarts, memory.

    \b
    vhost-device-console top
    vhost-device-console top --once
    vhost-device-console top --json --interval 10 >>guests.jsonl

    q leaves, s sorts by the next column, r turns the order round, Enter attaches to the guest that
    the arrow keys have chosen, ? lists the keys. Needs the package's extra [people].
    """
    people = extra("top", "people")

    def ask() -> list[tuple[str, monitor.Status]]:
        answers, failures = finding.ask_all(path)
        if failures and not answers:
            raise failures[0]
        return answers

    if not once and not as_json and not (os.isatty(0) and os.isatty(1)):
        raise click.UsageError("a live view needs a terminal: give --once or --json")
    if once and as_json:
        click.echo(next(people.lines(ask, interval)))
    elif as_json:
        for line in people.lines(ask, interval):
            click.echo(line)
    elif once:
        width = max(80, shutil.get_terminal_size().columns) if os.isatty(1) else None
        click.echo(people.once(ask, interval, width=width), nl=False)
    else:
        ask()
        people.Top(ask, interval).run()


@click.command()
@place_argument
@json_option
@socket_option
def who(place: str, as_json: bool, path: str | None) -> None:
    """Show who is attached to GUEST's console, and who of them types.

    \b
    vhost-device-console who vm3
    vhost-device-console who vm3:agent --json
    """
    from ..people import looking

    at, request = _look(place, path)
    request.replay = 0
    with looking.looking(at, request) as link:
        people = looking.who(link)
    if as_json:
        import json  # nobody should wait for it who attaches

        told = [
            {
                "name": person.name,
                "attached": person.attached,
                "writer": person.writer,
                "columns": person.columns,
                "rows": person.rows,
                "lag": person.lag,
            }
            for person in people
        ]
        click.echo(json.dumps({"people": told}, indent=2))
    elif people:
        click.echo("\n".join(tables.people(people)))


def _pattern(_ctx: click.Context, _param: click.Parameter, given: str | None) -> Any:
    try:
        return None if given is None else re.compile(os.fsencode(given), re.MULTILINE)
    except re.error as error:
        raise click.BadParameter(f"{given} is no regular expression: {error}") from None


@click.command()
@click.argument("place", metavar="[GUEST[:PORT]]", required=False, shell_complete=place_names)
@click.option(
    "--replay",
    default="all",
    show_default=True,
    callback=replay,
    metavar="BYTES|all|none",
    help="How much of what came before to show first.",
)
@click.option("--since", type=COUNT, metavar="OFFSET", help="Show all from there.")
@click.option("--read-only", is_flag=True, help="Only watch.")
@click.option("--force", is_flag=True, help="Become the writer, whoever is now.")
@escape_option
@click.option("--expect", callback=_pattern, metavar="REGEX", help="End when this has come.")
@click.option("--timeout", type=SECONDS, metavar="SECONDS", help="End with status 3 after that.")
@click.option(
    "--linger",
    type=SECONDS,
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="After the end of input from a pipe, end when the guest has been quiet for so long.",
)
@click.option("--timestamps", is_flag=True, help="Begin each line with the time.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print output with its offset as JSON lines, and news."
)
@click.option("--log", type=click.Path(), metavar="FILE", help="Append what comes to FILE, too.")
@click.option("--no-reconnect", is_flag=True, help="End when the daemon is gone.")
@click.option("-q", "--quiet", is_flag=True, help="Say nothing but the guest's bytes.")
@socket_option
@click.pass_context
def attach(ctx: click.Context, /, place: str | None, path: str | None, **options: Any) -> None:
    """Attach this terminal, or a script's pipes, to GUEST's console.

    \b
    vhost-device-console attach vm3
    echo poweroff | vhost-device-console attach vm3
    vhost-device-console attach vm3 --read-only --expect 'login:' --timeout 60 </dev/null

    What came before is shown first. Who is first types, others watch. Exit status 0: left, or what
    was expected came; 1: no such console, or it is gone; 3: what was expected did not come in time;
    4: what came from a pipe could not be typed, since another is the writer.
    """
    from ..people import attach as people

    if options["as_json"] and options["timestamps"]:
        raise click.UsageError("--json and --timestamps do not go together")
    name, port, _ = finding.console(path, place)
    columns, rows = people.terminal_size() if os.isatty(0) else (0, 0)
    request = monitor.Attach(
        guest=name,
        port=port,
        name=people.own_name(),
        write=not options.pop("read_only"),
        replay=options.pop("replay"),
        since=options.pop("since"),
        columns=columns,
        rows=rows,
    )
    stay = not options.pop("no_reconnect")
    described = people.Options(request, stay=stay, **options)
    ctx.exit(people.Attached(described, lambda: finding.find(path, name)[1]).run())
