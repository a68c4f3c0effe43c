"""The commands, each in a module that is loaded for it alone."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import click

NAME = "vhost-device-console"

#: The option that the vhost-user convention wants of every program.
CAPABILITIES = "--print-capabilities"

#: What holds for every command line here, as click names it.
SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

#: In which module each is.
COMMANDS = {
    "attach": "console",
    "check": "check",
    "completion": "completion",
    "export": "recordings",
    "history": "console",
    "metrics": "gateways",
    "play": "recordings",
    "port": "guests",
    "record": "recordings",
    "resize": "guests",
    "screen": "console",
    "ssh": "gateways",
    "status": "guests",
    "top": "console",
    "web": "gateways",
    "who": "console",
}


def load(name: str) -> click.Command | None:
    """Return a command, None if there is none so called."""
    if name not in COMMANDS:
        return None
    module = import_module(f".{COMMANDS[name]}", __name__)
    command: click.Command = getattr(module, name)
    return command
