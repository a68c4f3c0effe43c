"""The command line: what is asked for, and how it may end."""

from __future__ import annotations

import io
import os
import sys
from typing import Any

import click

from .commands import CAPABILITIES, NAME, SETTINGS, load
from .errors import ConfigError, ConsoleError
from .words import clean

#: What shells ask for completions with, as click calls it.
_COMPLETE = "_VHOST_DEVICE_CONSOLE_COMPLETE"

#: A group without a command, which click before 8.2 does not take for an error.
_NoCommand: Any = getattr(click.exceptions, "NoArgsIsHelpError", ())


def _prepare_standard_files() -> None:
    """Open what the caller closed, or a socket of ours would be taken for it."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
        file = open(fd, "w" if fd else "r", errors="backslashreplace", closefd=False)  # noqa: SIM115
        setattr(sys, ("stdin", "stdout", "stderr")[fd], file)
    os.close(fd)
    out = sys.stdout
    if isinstance(out.buffer, io.RawIOBase):  # PYTHONUNBUFFERED: what a write leaves over is lost
        sys.stdout = open(1, "w", encoding=out.encoding, errors=out.errors, closefd=False)  # noqa: SIM115


def _run() -> Any:
    """Run what the command line says; return the exit status, None for 0."""
    name, *arguments = sys.argv[1:] or [""]
    if _COMPLETE not in os.environ and (command := load(name)) is not None:
        # At once, as people wait: the daemon's options take longer to make than most commands run.
        return command.main(arguments, f"{NAME} {name}", standalone_mode=False, **SETTINGS)
    from .commands.daemon import daemon

    return daemon.main(prog_name=NAME, standalone_mode=False)


def _fail(message: str, code: int) -> None:
    import logging  # which takes longer than what most commands need

    from . import logbook

    if logbook.is_structured():
        logging.getLogger(__name__).error("%s", message)
        sys.exit(code)
    click.echo(f"{NAME}: error: {clean(message)}", err=True)
    sys.exit(code)


def main() -> None:
    """Run the command line and exit."""
    _prepare_standard_files()
    if CAPABILITIES in sys.argv[1:]:
        # The vhost-user convention: whatever else the command line says does not matter.
        click.echo('{"type": "console"}')
        sys.exit(0)
    if _COMPLETE in os.environ:
        from .commands import completion  # noqa: F401 - it knows bash better than click does
    try:
        sys.exit(_run())
    except _NoCommand as error:
        error.show()
        sys.exit(2)
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
