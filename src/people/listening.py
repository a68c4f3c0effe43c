"""Where gateways listen: `HOST:PORT`, or `unix:PATH` for what runs beside them."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from ipaddress import ip_address
from typing import Any

from ..endpoints import listen_unix
from ..errors import ConfigError

_UNIX = "unix:"

#: The largest TCP port.
_MOST = 65535


def is_unix(where: str) -> bool:
    """Tell whether `where` is a unix socket's place."""
    return where.startswith(_UNIX)


@contextmanager
def listening(
    where: str, *, refusal: str | None = None, mode: int = 0o600
) -> Iterator[tuple[socket.socket, str]]:
    """Give a socket that listens at `where`, and that place with the port that it has.

    No host, or `*`, is every address. A unix socket gets `mode`. With `refusal`, which says why,
    no place will do that other machines reach. Raises ConfigError.
    """
    with ExitStack() as undo:
        try:
            made = _unix(where, mode, undo) if is_unix(where) else _tcp(where, refusal, undo)
        except UnicodeError:
            raise ConfigError(f"cannot listen at {where}: that is no host's name") from None
        except OSError as error:
            # create_server adds to the words; getaddrinfo's numbers are negative.
            number = error.errno or 0
            reason = os.strerror(number) if number > 0 else error.strerror or str(error)
            raise ConfigError(f"cannot listen at {where}: {reason.lower()}") from error
        yield made


def _unix(where: str, mode: int, undo: ExitStack) -> tuple[socket.socket, str]:
    path = where.removeprefix(_UNIX)
    kept = listen_unix(path)
    undo.callback(kept.release)
    os.chmod(path, mode)
    return undo.enter_context(socket.socket(fileno=os.dup(kept.fd))), where


def _tcp(where: str, refusal: str | None, undo: ExitStack) -> tuple[socket.socket, str]:
    host, colon, number = where.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not number.isdecimal() or int(number) > _MOST:
        raise ConfigError(
            f"cannot listen at {where}: give HOST:PORT, such as 127.0.0.1:8080, or unix:PATH"
        )
    every = host in ("", "*")
    family, address, more = socket.AF_INET6, ("", int(number)), {"dualstack_ipv6": True}
    if not every or not socket.has_dualstack_ipv6():
        found: Any = socket.getaddrinfo(
            None if every else host, number, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        (family, _, _, _, address), more = found[0], {}
    if refusal is not None and (every or not ip_address(address[0]).is_loopback):
        raise ConfigError(f"cannot listen at {where}: {refusal}")
    sock = undo.enter_context(socket.create_server(address, family=family, **more))
    # Those that are accepted have it from here; asyncio leaves sockets alone that name no protocol.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    shown = "*" if every else f"[{host}]" if ":" in host else host
    return sock, f"{shown}:{sock.getsockname()[1]}"
