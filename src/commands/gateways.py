"""Commands that serve consoles, or what is known of them, to other programs."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from .. import finding, logbook
from .options import escape_option, extra, log_level_option, socket_option

_json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print where it listens as JSON, for programs."
)


@click.command()
@click.option(
    "--listen",
    multiple=True,
    default=["127.0.0.1:2222"],
    show_default=True,
    metavar="HOST:PORT|unix:PATH",
    help="Where to listen. Repeatable.",
)
@click.option(
    "--authorized-keys",
    type=click.Path(),
    metavar="FILE",
    required=True,
    help="Who comes in: public keys and certificates' authorities, as OpenSSH writes them.",
)
@click.option(
    "--access",
    type=click.Path(),
    metavar="FILE",
    help="Which guests each of them reaches, as TOML; without it, all.",
)
@click.option(
    "--host-key",
    "host_keys",
    multiple=True,
    type=click.Path(),
    metavar="FILE",
    help="The server's own key, made when it is missing. Repeatable.",
)
@escape_option
@log_level_option
@_json_option
@socket_option
def ssh(path: str | None, log_level: str, **options: Any) -> None:
    """Serve consoles over ssh: a user name is a guest's, or GUEST:PORT or GUEST+PORT.

    \b
    vhost-device-console ssh --authorized-keys ~/.ssh/authorized_keys
    ssh vm3@localhost -p 2222
    echo poweroff | ssh vm3@localhost -p 2222
    ssh localhost -p 2222 status

    It runs as any user whose commands the daemons obey, and needs no more. A key's line may have
    guests="vm*,db:log" and role="watch" before it.
    """
    people = extra("ssh", "ssh")
    logbook.start(log_level)
    options["listen"] = list(options["listen"])
    options["host_keys"] = list(options["host_keys"]) or [people.default_host_key()]
    sys.exit(people.serve(people.Options(monitor=path, **options)))


@click.command()
@click.option(
    "--listen",
    default="127.0.0.1:9417",
    show_default=True,
    metavar="HOST:PORT|unix:PATH",
    help="Where Prometheus finds them, at any path.",
)
@click.option("--allow-remote", is_flag=True, help="Listen where other machines can reach it.")
@click.option("--once", is_flag=True, help="Print them and end, for a textfile collector.")
@click.option("--json", "as_json", is_flag=True, help="Print them, or where it listens, as JSON.")
@socket_option
def metrics(listen: str, allow_remote: bool, once: bool, as_json: bool, path: str | None) -> None:
    """Serve the metrics of all daemons that run to Prometheus.

    \b
    vhost-device-console metrics
    vhost-device-console metrics --listen unix:/run/console-metrics.sock
    vhost-device-console metrics --once
    """
    people = extra("metrics", "metrics")
    logbook.start("info")

    def say(where: str) -> None:
        click.echo(json.dumps({"url": where}) if as_json else where)

    if once:
        click.echo(people.once(lambda: finding.monitors(path), as_json=as_json), nl=False)
    else:
        people.serve(lambda: finding.monitors(path), listen, say, remote=allow_remote)


@click.command()
@click.option(
    "--listen",
    default="127.0.0.1:8080",
    show_default=True,
    metavar="HOST:PORT|unix:PATH",
    help="Where. Port 0 is any free one.",
)
@click.option("--tls-cert", type=click.Path(), metavar="FILE", help="Speak TLS: the certificates.")
@click.option("--tls-key", type=click.Path(), metavar="FILE", help="Its key, if it lies elsewhere.")
@click.option(
    "--tls-client-ca", type=click.Path(), metavar="FILE", help="Let those in whom this CA knows."
)
@click.option("--token-file", type=click.Path(), metavar="FILE", help="Take the token from here.")
@click.option("--pam", metavar="SERVICE", help="Take users' passwords, as that PAM service does.")
@click.option(
    "--allow-user", "allow_users", multiple=True, metavar="USER", help="Only theirs. Repeatable."
)
@click.option(
    "--login/--no-login",
    default=True,
    help="No token: for a unix socket behind a proxy, or with --tls-client-ca.",
)
@click.option(
    "--origin",
    "origins",
    multiple=True,
    metavar="URL",
    help="Where a proxy shows the page, such as https://consoles.example.org.",
)
@_json_option
@socket_option
def web(path: str | None, **options: Any) -> None:
    """Show all guests' consoles on a page, for browsers.

    \b
    vhost-device-console web
    vhost-device-console web --listen 0.0.0.0:8443 --tls-cert page.crt --tls-key page.key
    vhost-device-console web --listen unix:/run/console-web.sock --no-login

    It prints the page's address, with the token to log in with. It needs the extra: pip install
    'vhost-device-console[web]'.
    """
    server = extra("web.server", "web")
    logbook.start("warning")
    server.serve(server.Options(daemon=path, **options))
