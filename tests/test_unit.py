"""The unit in contrib/systemd starts a daemon that exists."""

from __future__ import annotations

import shlex
from configparser import RawConfigParser
from pathlib import Path

from vhost_device_console import config
from vhost_device_console.cli import cli

UNIT = Path(__file__).parent.parent / "contrib/systemd/vhost-device-console@.service"


def test_the_unit_starts_the_daemon_with_options_that_it_has() -> None:
    unit = RawConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(UNIT)
    service = unit["Service"]
    options = service["Environment"].removeprefix("OPTIONS=")
    line = service["ExecStart"].replace("$OPTIONS", options)
    program, *arguments = shlex.split(line.replace("%t", "/run").replace("%i", "web1"))
    assert program == "vhost-device-console"
    context = cli.make_context(program, arguments)
    assert context.params["socket_path"] == "/run/vhost-device-console/web1/console.sock"
    assert config.BackendKind(context.params["backend"]) is config.BackendKind.UNIX
