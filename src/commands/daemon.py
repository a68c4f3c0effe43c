"""The daemon's own command line, beside which the commands stand."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import click

from .. import __version__, config, core, logbook
from ..errors import ConfigError
from . import CAPABILITIES, COMMANDS, NAME, SETTINGS, load
from .options import log_level_option


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


class _Group(click.Group):
    """Loads a command when it is asked for: the daemon needs none of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Return their names."""
        return sorted(COMMANDS)

    def get_command(
        self,
        ctx: click.Context,  # noqa: ARG002
        cmd_name: str,
    ) -> click.Command | None:
        """Return one, None if there is none so called."""
        return load(cmd_name)


@click.group(
    cls=_Group,
    invoke_without_command=True,
    context_settings=SETTINGS,
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
    " keys: link, overflow, id, host, output-bytes, input-bytes, stall-ms, typing, max-clients, log"
    " and those of access, see the manual page. Repeatable.",
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
    "--typing",
    type=_Words(config.Typing),
    help="Whose typing counts at port 0 among plain connections: everybody's, that of the first"
    " until it leaves, or nobody's; those who attach take turns anyway.  [default: all]",
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
    "--log-format",
    type=_Words(config.LogFormat),
    help="The very bytes, the same with a time before each line, or JSON lines.  [default: raw]",
)
@click.option(
    "--log-max-age",
    metavar="AGE",
    help="Begin another file at each multiple of AGE, such as 1d: at midnight UTC.",
)
@click.option("--log-compress", is_flag=True, default=None, help="Keep the old ones as gzip files.")
@click.option(
    "--log-total-bytes",
    type=int,
    metavar="N",
    help="Let all files of one log have at most N bytes: the oldest give way.",
)
@click.option(
    "--log-times/--no-log-times",
    default=None,
    help="Keep, beside a raw log, when its bytes came, for recordings.  [default: log-times]",
)
@log_level_option
@click.option(
    "--log-style",
    type=_Words(logbook.Format),
    default="text",
    show_default=True,
    help="Say it in lines for people, in JSON, or to systemd's journal instead.",
)
@click.option(CAPABILITIES, is_flag=True, help="Print what this program is, as JSON, and exit.")
@click.version_option(
    __version__, "-V", "--version", prog_name=NAME, message=f"%(prog)s %(version)s ({core()})"
)
@click.pass_context
def daemon(ctx: click.Context, /, **options: Any) -> None:
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
    logbook.start(options.pop("log_level"), options.pop("log_style"))
    daemon = _described(options, given)
    from .. import master  # --help need not wait for it

    ctx.exit(master.serve(daemon))


def _described(options: dict[str, Any], given: set[str]) -> config.Daemon:
    """Return what the options, or the file that they name, describe."""
    options.pop(CAPABILITIES.strip("-").replace("-", "_"))
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
