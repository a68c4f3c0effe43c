"""Commands that show guests, and change them."""

from __future__ import annotations

import json
import os
import shutil

import click

from .. import config, finding, monitor, tables
from ..errors import ConsoleError
from ..words import clean
from .options import (
    Size,
    guest_argument,
    guest_names,
    json_option,
    place_names,
    socket_option,
)


@click.command()
@click.argument("guest", required=False, shell_complete=guest_names)
@json_option
@click.option("--ports", "by_port", is_flag=True, help="Print a line for each port.")
@socket_option
def status(guest: str | None, as_json: bool, by_port: bool, path: str | None) -> None:
    """Show every guest of the daemons that run, or the ports of GUEST.

    \b
    vhost-device-console status
    vhost-device-console status vm3
    vhost-device-console status --json | jq '.guests[].state'

    For each guest: its worker's state, the frontend's process id, where to attach to its first port
    and how many more there are, how many are attached, bytes to and from the guest, bytes that some
    reader missed or that the guest wrote to a disabled queue, its worker's memory and processor
    share, and in notes what is not as it should be: broken queues, ports that the guest could not
    add, buffers that wait for a reader, refused messages, restarts.

    For each port: where to attach, how far the guest is with it (absent, added, ready or failed),
    who has it open, how many are attached, its size and who decided that, and bytes to and from the
    guest. With GUEST a last line says what its worker may do: its user and capabilities, and
    whether Landlock and seccomp confine it.
    """
    answers, failures = finding.ask_all(path)
    guests = [each for _, status in answers for each in status.guests]
    if guest is not None:
        guests = [each for each in guests if each.name == guest]
        if not guests and not failures:
            finding.find(path, guest)
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


def _change(path: str, change: monitor.Change, *, as_json: bool) -> None:
    done = monitor.change(path, change)
    click.echo(json.dumps({"guest": change.guest, "done": done}) if as_json else clean(done))


@click.group()
def port() -> None:
    """Add ports to guests that run, or remove them."""


@port.command("add")
@guest_argument
@click.argument("description", metavar="name=...,backend=...[,KEY=VALUE...]")
@json_option
@socket_option
def port_add(guest: str, description: str, as_json: bool, path: str | None) -> None:
    """Give GUEST another port.

    \b
    vhost-device-console port add vm3 name=org.qemu.guest_agent.0,backend=unix,path=/tmp/agent

    There has to be room for it: see --max-ports. It is described as with --port, but its addresses
    are taken as they are.
    """
    table = config.parse_port(description, "port add")
    name, at = finding.find(path, guest)
    _change(at, monitor.PortAdd(name, table), as_json=as_json)


@port.command("remove")
@guest_argument
@click.argument("which", metavar="PORT")
@json_option
@socket_option
def port_remove(guest: str, which: str, as_json: bool, path: str | None) -> None:
    """Take a port, its name or its id, from GUEST, and let its clients go.

    \b
    vhost-device-console port remove vm3 org.qemu.guest_agent.0

    Port 0 stays.
    """
    name, at = finding.find(path, guest)
    _change(at, monitor.PortRemove(name, which), as_json=as_json)


@click.command()
@click.argument("guest", metavar="GUEST[:PORT]", shell_complete=place_names)
@click.argument("size", metavar="COLUMNSxROWS", type=Size(0))
@json_option
@socket_option
def resize(guest: str, size: tuple[int, int], as_json: bool, path: str | None) -> None:
    """Set the size of GUEST's console.

    \b
    vhost-device-console resize vm3 132x50

    It is port 0's unless another PORT is named, by name or id; 0x0 leaves it to who is attached.
    """
    name, which, at = finding.console(path, guest)
    number = "0" if which is None else which
    _change(at, monitor.Resize(name, number, *size), as_json=as_json)
