"""What is in contrib/systemd and contrib/qemu goes together, and starts a daemon that exists."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from vhost_device_console import config
from vhost_device_console.commands.daemon import daemon as cli

import launch

CONTRIB = Path(__file__).parents[1] / "contrib"
UNITS = CONTRIB / "systemd"

_SPECIFIERS = {"%t": "/run", "%i": "web"}


def unit(kind: str) -> dict[str, dict[str, list[str]]]:
    """Return a unit's values by section and key, its specifiers filled in."""
    text = (UNITS / f"vhost-device-console@.{kind}").read_text()
    for specifier, value in _SPECIFIERS.items():
        text = text.replace(specifier, value)
    found: dict[str, dict[str, list[str]]] = {}
    for line in text.splitlines():
        if heading := re.fullmatch(r"\[(\w+)\]", line):
            section = found.setdefault(heading[1], {})
        elif line and not line.startswith("#"):
            key, _, value = line.partition("=")
            section.setdefault(key, []).append(value)
    return found


def daemon(environment: str = "") -> config.Daemon:
    """Return what the service serves with such an environment file, as systemd starts it."""
    service = unit("service")["Service"]
    lines = [*service["Environment"], *environment.splitlines()]
    # Quotes are as a shell's, around a value or a whole assignment (systemd.exec(5)).
    given = dict(
        "".join(shlex.split(line)).split("=", 1)
        for line in lines
        if line and not line.startswith("#")
    )
    (command,) = service["ExecStart"]
    words = [
        word
        for each in shlex.split(command)
        for word in (shlex.split(given[each[1:]]) if each.startswith("$") else [each])
    ]
    program, *arguments = words
    assert program == "vhost-device-console"
    options = cli.make_context(program, arguments).params
    if path := options["config"]:
        assert path == "/etc/vhost-device-console/NAME.toml"
        return config.from_toml((UNITS / "example.toml").read_bytes(), path)
    return config.from_options(
        **{key: options[key] for key in ("socket_path", "fd", "socket_count", "tcp_port")},
        backend=config.BackendKind(options["backend"]),
    )


def sockets(served: config.Daemon) -> list[str | None]:
    return [guest.socket_path for guest in served.guests]


def test_the_service_serves_one_guest_unless_told_otherwise() -> None:
    assert sockets(daemon()) == ["/run/vhost-device-console/web/console.sock0"]


def test_the_example_environment_serves_four_guests() -> None:
    served = daemon((UNITS / "example.env").read_text())
    assert len(served.guests) == 4
    assert [guest.ports[0].backend for guest in served.guests] == [
        config.Network("127.0.0.1", port) for port in range(12345, 12349)
    ]


def test_what_the_example_environment_says_in_comments_serves_the_example_file() -> None:
    text = (UNITS / "example.env").read_text()
    commented = "\n".join(re.findall(r"^#(\w+=.*)$", text, re.MULTILINE))
    assert [guest.name for guest in daemon(commented).guests] == ["shop", "mail"]


@pytest.mark.parametrize(
    "environment", ["", "GUESTS=--config=/etc/vhost-device-console/NAME.toml\nOPTIONS="]
)
def test_the_socket_unit_makes_a_socket_that_the_service_would(environment: str) -> None:
    (listening,) = unit("socket")["Socket"]["ListenStream"]
    assert listening in sockets(daemon(environment))


def test_the_units_user_is_the_one_that_is_made() -> None:
    (made,) = re.findall(r"^u (\S+)", (UNITS / "sysusers.conf").read_text(), re.MULTILINE)
    service, listener = unit("service")["Service"], unit("socket")["Socket"]
    users = [service["User"], service["Group"], listener["SocketUser"], listener["SocketGroup"]]
    assert users == [[made]] * 4


def test_the_folders_that_the_units_need_are_made() -> None:
    made = re.findall(r"^d (\S+)", (UNITS / "tmpfiles.conf").read_text(), re.MULTILINE)
    folders = unit("service")["Service"]["RuntimeDirectory"]
    assert [str(Path("/run") / folder) for folder in folders] == [f"{made[0]}/web"]
    assert made[1] == str(Path(unit("service")["Service"]["EnvironmentFile"][0].lstrip("-")).parent)


def test_the_descriptor_for_qemu_names_what_the_daemon_says_it_is(folder: Path) -> None:
    found = json.loads((CONTRIB / "qemu/50-vhost-device-console.json").read_text())
    said = json.loads(launch.command(folder, "--print-capabilities").stdout)
    assert found["type"] == said["type"]
    # What else the schema has (QEMU docs/interop/vhost-user.json, VhostUserBackend) is optional.
    assert found.keys() == {"description", "type", "binary"}
    assert Path(found["binary"]).is_absolute()
    assert Path(found["binary"]).name == "vhost-device-console"
