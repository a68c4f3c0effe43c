"""The command line; the only place that knows click."""

from __future__ import annotations

import json
import logging
import os
import re
import select
import shutil
import sys
from contextlib import suppress
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import click

from . import __version__, config, core, tables
from .errors import ConfigError, ConsoleError
from .tables import clean

if TYPE_CHECKING:
    from . import monitor

_NAME = "vhost-device-console"
_CAPABILITIES = "--print-capabilities"


class _Stderr(logging.Handler):
    """Log lines for people: one write each, no control characters, and never in the way.

    A line that stderr cannot take at once is lost, and the next one says so.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lost = 0
        self._poll = select.poll()
        self._poll.register(2, select.POLLOUT)
        # With the terminal raw, a line feed alone does not return to the first column.
        self._end = "\r\n" if os.isatty(2) else "\n"

    def emit(self, record: logging.LogRecord) -> None:
        lines = [clean(record.getMessage())]
        if record.exc_info:
            lines += self.format(record).splitlines()[1:]
        if self._lost:
            lines.insert(0, f"{self._lost} log lines lost: stderr was not read")
        text = "".join(f"{_NAME}: {line}{self._end}" for line in lines)
        try:
            if not self._poll.poll(0):
                raise BlockingIOError
            os.write(2, text.encode(errors="backslashreplace"))
            self._lost = 0
        except OSError:
            self._lost += 1


def _start_logging(level: str) -> None:
    logging.raiseExceptions = False
    logging.basicConfig(level=level.upper(), handlers=[_Stderr()], force=True)


def _fill_standard_files() -> None:
    """Open what the caller closed, or a socket of ours would be taken for stderr."""
    while True:
        fd = os.open(os.devnull, os.O_RDWR)
        if fd > 2:
            os.close(fd)
            return


class _Words(click.Choice):  # type: ignore[type-arg,unused-ignore]  # generic since click 8.2
    """The values, not the names, of an enumeration."""

    def __init__(self, kind: type[StrEnum]) -> None:
        super().__init__([word.value for word in kind])
        self._kind = kind

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> StrEnum:
        """Return the enumeration's member; raises click.BadParameter."""
        return self._kind(super().convert(value, param, ctx))


@click.group(
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Without a command, the daemon runs in the foreground until SIGTERM or Ctrl-C.",
)
@click.option(
    "-s",
    "--socket-path",
    type=click.Path(),
    metavar="PATH",
    help="vhost-user sockets: PATH0, PATH1, ... one for each guest.",
)
@click.option(
    "-c",
    "--socket-count",
    type=int,
    metavar="N",
    default=1,
    show_default=True,
    help="How many guests.",
)
@click.option(
    "-b",
    "--backend",
    type=_Words(config.BackendKind),
    help="Where people attach to port 0: this terminal (the default), TCP ports, sockets"
    " PATH<i>.data, or ptys.",
)
@click.option(
    "-p",
    "--tcp-port",
    type=int,
    metavar="PORT",
    help="network: 127.0.0.1:PORT is the first guest's, the next is PORT+1."
    f"  [default: {config.TCP_PORT}]",
)
@click.option(
    "-q",
    "--max-queue-size",
    type=int,
    metavar="SIZE",
    default=config.LARGEST_QUEUE,
    show_default=True,
    help="Largest virtqueue a guest may use, a power of two.",
)
@click.option(
    "--fd",
    type=int,
    metavar="N",
    help="Use the inherited vhost-user socket N, listening or connected, instead of a path.",
)
@click.option(
    "--pty-link",
    type=click.Path(),
    metavar="PATH",
    help="pty: make symlinks PATH0, PATH1, ... to the ptys.",
)
@click.option(
    "--port",
    multiple=True,
    metavar="KEY=VALUE,...",
    help="Another port, such as name=agent,backend=unix,path=P or"
    " name=log,console,backend=network,tcp-port=N; P and N are counted up for each guest. Other"
    " keys: link, overflow, id, host, output-bytes, input-bytes, stall-ms, max-clients, log and"
    " those of access, see the manual page. Repeatable.",
)
@click.option(
    "--max-ports",
    type=int,
    metavar="N",
    help="How many ports a guest may have, with those that are added while it runs; by default"
    " no more than it has from the start.",
)
@click.option(
    "--max-clients",
    type=int,
    metavar="N",
    default=config.MOST_CLIENTS,
    show_default=True,
    help="How many clients a port may have at once.",
)
@click.option(
    "--socket-mode",
    metavar="MODE",
    help="Permissions of vhost-user and data sockets, such as 0660.  [default: 0600]",
)
@click.option("--socket-owner", metavar="USER", help="Who owns them, by name or number.")
@click.option("--socket-group", metavar="GROUP", help="Their group, by name or number.")
@click.option(
    "--allow-uid",
    multiple=True,
    metavar="USER",
    help="Serve only processes of this user at them, by name or number. Repeatable.",
)
@click.option(
    "--tcp-host",
    metavar="ADDRESS",
    help=f"network: listen at this address.  [default: {config.LOCALHOST}]",
)
@click.option(
    "--tls-cert",
    type=click.Path(),
    metavar="FILE",
    help="Speak TLS on TCP ports: the certificate and its chain, PEM.",
)
@click.option(
    "--tls-key",
    type=click.Path(),
    metavar="FILE",
    help="Its key, if that is not in the same file.",
)
@click.option(
    "--tls-client-ca",
    type=click.Path(),
    metavar="FILE",
    help="Serve only clients with a certificate that one of these signed.",
)
@click.option(
    "--tcp-insecure",
    is_flag=True,
    help="Listen without TLS at addresses that other machines reach, too.",
)
@click.option(
    "--config",
    type=click.Path(),
    metavar="FILE",
    help="Take guests and ports from a TOML file instead of the options above and below.",
)
@click.option(
    "--resize-order",
    type=_Words(config.ResizeOrder),
    default=config.ResizeOrder.SPEC.value,
    show_default=True,
    help="How a new size is sent: columns first, or rows first, as older Linux reads it.",
)
@click.option(
    "--inband",
    is_flag=True,
    help="Offer notifications as messages, for time-travel simulations: slow, but exact.",
)
@click.option(
    "--packed",
    is_flag=True,
    help="Offer packed virtqueues too; Linux' console driver wants a call a buffer of them.",
)
@click.option(
    "--poll-us",
    type=int,
    metavar="N",
    default=config.POLL_US,
    show_default=True,
    help="Watch the rings for at most N microseconds before sleeping; 0 never does.",
)
@click.option(
    "--cpus",
    metavar="LIST",
    help="The CPUs to serve guests on, such as 2-5,8; by default all that the daemon may use.",
)
@click.option(
    "--user",
    metavar="NAME[:GROUP]",
    help="Become this user, started as root, as soon as all sockets are there.",
)
@click.option(
    "--no-sandbox",
    is_flag=True,
    help="Let workers open files and sockets, which they never need: for debuggers.",
)
@click.option(
    "--log-file",
    type=click.Path(),
    metavar="PATH",
    help="Write all output of port 0 to files PATH0, PATH1, ... too.",
)
@click.option(
    "--log-max-bytes",
    type=int,
    metavar="N",
    help="Begin another file once one has N bytes; the old ones are PATH0.1, PATH0.2, ...",
)
@click.option(
    "--log-keep",
    type=int,
    metavar="N",
    help=f"How many old ones stay.  [default: {config.LOG_KEEP}]",
)
@click.option(
    "--log-level",
    type=click.Choice(["error", "warning", "info", "debug"]),
    default="info",
    show_default=True,
    help="What to say on stderr.",
)
@click.option(_CAPABILITIES, is_flag=True, help="Print what this program is, as JSON, and exit.")
@click.version_option(
    __version__, "-V", "--version", prog_name=_NAME, message=f"%(prog)s %(version)s ({core()})"
)
@click.pass_context
def cli(ctx: click.Context, /, **options: Any) -> None:
    """Give virtual machines a console: a vhost-user backend for the virtio console."""
    given = {
        name
        for name in options
        if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    }
    if ctx.invoked_subcommand is not None:
        if given:
            option = "--" + min(given).replace("_", "-")
            raise ConfigError(f"{option} is the daemon's, not {ctx.invoked_subcommand}'s")
        return
    level = options.pop("log_level")
    daemon = _described(options, given)
    _fill_standard_files()
    _start_logging(level)
    from . import master  # --help need not wait for it

    ctx.exit(master.serve(daemon))


def _described(options: dict[str, Any], given: set[str]) -> config.Daemon:
    """Return what the options, or the file that they name, describe."""
    options.pop(_CAPABILITIES.strip("-").replace("-", "_"))
    path = options.pop("config")
    if path is None:
        return config.from_options(ports=options.pop("port"), **options)
    if replaced := given & options.keys():
        option = "--" + min(replaced).replace("_", "-")
        raise ConfigError(f"{option} does not go with --config: say it in {path}")
    try:
        with open(path, "rb") as file:
            text = file.read()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(f"cannot read {path}: {reason}") from error
    return config.from_toml(text, path)


def _guest_names(ctx: click.Context, _param: click.Parameter, begun: str) -> list[str]:
    """Return the guests that can be completed to, for the shell; silently none if in doubt."""
    from . import monitor

    names: set[str] = set()
    for path in _monitors(ctx.params.get("path")):
        with suppress(ConsoleError):
            names.update(guest.name for guest in monitor.ask(path).guests)
    return sorted(name for name in names if name.startswith(begun))


_guest_argument = click.argument("guest", shell_complete=_guest_names)
_socket_option = click.option(
    "--socket",
    "path",
    type=click.Path(),
    metavar="PATH",
    help="Ask only the daemon with this monitor socket.",
)


def _monitors(path: str | None) -> list[str]:
    from . import monitor

    return monitor.find(os.environ) if path is None else [path]


def _ask_all(path: str | None) -> tuple[list[tuple[str, monitor.Status]], list[ConsoleError]]:
    """Return what each daemon answered, by its monitor socket, and why others did not."""
    from . import monitor

    paths = _monitors(path)
    if not paths:
        raise ConsoleError("no daemon is running")
    answers = []
    failures = []
    for each in paths:
        try:
            answers.append((each, monitor.ask(each)))
        except ConsoleError as error:
            failures.append(error)
    return answers, failures


def _find(path: str | None, *names: str) -> tuple[str, str]:
    """Return the first of `names` that is a guest's, and the monitor socket of its daemon."""
    answers, failures = _ask_all(path)
    for name in names:
        found = [at for at, status in answers if any(g.name == name for g in status.guests)]
        if len(found) > 1:
            raise ConsoleError(
                f"{len(found)} daemons have a guest {name}: choose one with --socket {found[0]}"
                + "".join(f" or {other}" for other in found[1:])
            )
        if found:
            return name, found[0]
    if failures:
        raise failures[0]
    known = sorted(guest.name for _, status in answers for guest in status.guests)
    raise ConsoleError(f"there is no guest {names[0]}, only {', '.join(known) or 'none at all'}")


@cli.command()
@click.argument("guest", required=False, shell_complete=_guest_names)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@click.option("--ports", "by_port", is_flag=True, help="Print a line for each port.")
@_socket_option
def status(guest: str | None, as_json: bool, by_port: bool, path: str | None) -> None:
    """Show every guest of the daemons that run, or the ports of GUEST."""
    from . import monitor

    answers, failures = _ask_all(path)
    guests = [each for _, status in answers for each in status.guests]
    if guest is not None:
        guests = [each for each in guests if each.name == guest]
        if not guests and not failures:
            _find(path, guest)
    if as_json:
        click.echo(json.dumps({"guests": monitor.plain(guests)}, indent=2))
    elif guests:
        width = max(80, shutil.get_terminal_size().columns) if os.isatty(1) else None
        table = tables.ports if by_port or guest is not None else tables.guests
        lines = table(guests, width)
        if guest is not None:
            lines += [line for each in guests for line in tables.privileges(each)]
        click.echo("\n".join(lines))
    if failures:
        raise ConsoleError("; ".join(map(str, failures)))


@cli.group()
def port() -> None:
    """Add ports to guests that run, or remove them."""


@port.command("add")
@_guest_argument
@click.argument("description", metavar="name=...,backend=...[,KEY=VALUE...]")
@_socket_option
def port_add(guest: str, description: str, path: str | None) -> None:
    """Give GUEST another port.

    It is described as with --port, but its addresses are taken as they are.
    """
    from . import monitor

    table = config.parse_port(description, "port add")
    name, at = _find(path, guest)
    click.echo(clean(monitor.change(at, monitor.PortAdd(name, table))))


@port.command("remove")
@_guest_argument
@click.argument("which", metavar="PORT")
@_socket_option
def port_remove(guest: str, which: str, path: str | None) -> None:
    """Take a port, its name or its id, from GUEST."""
    from . import monitor

    name, at = _find(path, guest)
    click.echo(clean(monitor.change(at, monitor.PortRemove(name, which))))


@cli.command()
@click.argument("guest", metavar="GUEST[:PORT]", shell_complete=_guest_names)
@click.argument("size", metavar="COLUMNSxROWS")
@_socket_option
def resize(guest: str, size: str, path: str | None) -> None:
    """Set the size of GUEST's console.

    It is port 0's unless another PORT is named, by name or id; 0x0 leaves it to who is attached.
    """
    from . import monitor

    numbers = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", size)
    columns, rows = map(int, numbers.groups()) if numbers else (-1, -1)
    if not 0 <= columns <= 65535 or not 0 <= rows <= 65535:
        raise ConfigError(f"{size} is no size: give COLUMNSxROWS, such as 80x24")
    front, _, which = guest.rpartition(":")
    # A guest's name may have a colon in it.
    name, at = _find(path, guest, *([front] if front else []))
    number = "0" if name == guest else which
    click.echo(clean(monitor.change(at, monitor.Resize(name, number, columns, rows))))


@cli.command()
@click.argument("path", metavar="SOCKET", required=False)
@click.option("--data", metavar="HOST:PORT|PATH", help="Where a client of the console attaches.")
@click.option("--start", metavar="COMMAND", help="Start it so, and again when it is gone.")
@click.option("--only", multiple=True, metavar="PATTERN", help="Only statements so called.")
@click.option("--list", "only_list", is_flag=True, help="Show the statements and try none.")
@click.option(
    "--timeout", type=float, default=3.0, show_default=True, help="Seconds each may wait."
)
@click.option("--strict", is_flag=True, help="Fail on a SHOULD that does not hold, too.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@click.option("--junit", type=click.Path(), metavar="FILE", help="Write JUnit XML as well.")
@click.pass_context
def check(ctx: click.Context, /, **options: Any) -> None:
    """Try what the specifications demand on the console backend at SOCKET, whoever made it.

    Exit status 0 when every MUST holds, 1 when one does not, 2 when nothing could be checked.
    """
    from .testing.conformance import command

    ctx.exit(command.check(**options, version=__version__))


def _fail(message: str, code: int) -> None:
    click.echo(f"{_NAME}: error: {clean(message)}", err=True)
    sys.exit(code)


def main() -> None:
    """Run the command line and exit."""
    if _CAPABILITIES in sys.argv[1:]:
        # The vhost-user convention: whatever else the command line says does not matter.
        click.echo(json.dumps({"type": "console"}))
        sys.exit(0)
    try:
        sys.exit(cli.main(prog_name=_NAME, standalone_mode=False))
    except click.ClickException as error:
        _fail(error.format_message(), 2)
    except ConfigError as error:
        _fail(str(error), 2)
    except BrokenPipeError:
        # Whoever read our output had enough. Nothing is left to flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except (ConsoleError, OSError) as error:
        _fail(str(error), 1)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
