"""Options and arguments that several commands have, and how what is given is understood."""

from __future__ import annotations

import re
from contextlib import suppress
from importlib import import_module
from typing import Any

import click

from .. import finding, monitor
from ..errors import ConsoleError


def guest_names(ctx: click.Context, _param: click.Parameter, begun: str) -> list[str]:
    """Return the guests that can be completed to, for the shell; silently none if in doubt."""
    names: set[str] = set()
    for path in finding.monitors(ctx.params.get("path")):
        with suppress(ConsoleError):
            names.update(guest.name for guest in monitor.ask(path).guests)
    return sorted(name for name in names if name.startswith(begun))


def place_names(ctx: click.Context, _param: click.Parameter, begun: str) -> list[str]:
    """Return what GUEST[:PORT] can be completed to: guests, and with a colon a guest's ports."""
    places: set[str] = set()
    for path in finding.monitors(ctx.params.get("path")):
        with suppress(ConsoleError):
            for guest in monitor.ask(path).guests:
                places.add(guest.name)
                if begun.startswith(guest.name):
                    places.update(f"{guest.name}:{port.name or port.id}" for port in guest.ports)
    return sorted(place for place in places if place.startswith(begun))


guest_argument = click.argument("guest", shell_complete=guest_names)
socket_option = click.option(
    "--socket",
    "path",
    type=click.Path(),
    metavar="PATH",
    help="Ask only the daemon with this monitor socket.",
)


place_argument = click.argument("place", metavar="GUEST[:PORT]", shell_complete=place_names)


class Size(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic since click 8.2
    """COLUMNSxROWS, each of them at least `least`, and none above `most`."""

    name = "size"

    def __init__(self, least: int = 1, most: tuple[int, int] = (65535, 65535)) -> None:
        self._least = least
        self._most = most

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        """Return columns and rows; raises click.BadParameter."""
        match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", value)
        size = (int(match[1]), int(match[2])) if match else (-1, -1)
        if any(not self._least <= n <= most for n, most in zip(size, self._most, strict=True)):
            most = "x".join(map(str, self._most))
            raise click.BadParameter(
                f"{value} is no size: give COLUMNSxROWS, such as 80x24, {most} at most", ctx, param
            )
        return size


class Number(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic since click 8.2
    """A number of `kind` from `least` to `most`, which are part of it."""

    name = "number"

    def __init__(self, kind: type[int | float], least: float, most: int) -> None:
        self._kind = kind
        self._least = least
        self._most = most

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the number; raises click.BadParameter."""
        try:
            number = self._kind(value)
        except ValueError:
            number = None
        if number is None or not self._least <= number <= self._most:  # what is NaN is neither
            what = "whole number" if self._kind is int else "number"
            raise click.BadParameter(
                f"{value} is no {what} from {self._least} to {self._most}", ctx, param
            )
        return number


#: As many bytes or lines as a daemon takes.
COUNT = Number(int, 0, (1 << 63) - 1)

#: 24 days, since epoll waits for less than 2**31 ms.
MOST_SECONDS = 24 * 24 * 60 * 60
SECONDS = Number(float, 0, MOST_SECONDS)


def escape_key(_ctx: click.Context, _param: click.Parameter, given: str) -> int | None:
    """Return the control character that `^]`, `C-]` or `ctrl-]` means, None for `none`."""
    if given == "none":
        return None
    match = re.fullmatch(r"(?:\^|[Cc]-|[Cc]trl-)([@-_a-z?])", given)
    if match is None:
        raise click.BadParameter(f"{given} is no control character: give one such as ^] or none")
    return ord(match[1].upper()) ^ 0x40


escape_option = click.option(
    "-e",
    "--escape",
    default="^]",
    show_default=True,
    callback=escape_key,
    metavar="KEY|none",
    help="The key that begins a command.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
log_level_option = click.option(
    "--log-level",
    type=click.Choice(["error", "warning", "info", "debug"]),
    default="info",
    show_default=True,
    help="What to say on stderr.",
)


def replay(ctx: click.Context, param: click.Parameter, given: str) -> int | None:
    """Return how many bytes to begin with, None for all that there are."""
    if given in ("all", "none"):
        return None if given == "all" else 0
    if not given.isdecimal():
        raise click.BadParameter(f"{given} is no number of bytes, nor all or none")
    return int(COUNT.convert(given, param, ctx))


def extra(module: str, extra: str) -> Any:
    """Return a module of `people` that needs the libraries of `extra`."""
    try:
        return import_module(f"..people.{module}", __package__)
    except ModuleNotFoundError as error:
        raise ConsoleError(
            f"{error.name} is not installed: pip install 'vhost-device-console[{extra}]'"
        ) from None
