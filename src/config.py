"""What a daemon serves: frozen descriptions of guests, ports and backends, checked once.

Nothing here touches a file or a socket, so every mistake that the options alone show is found
before anything is created.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from .errors import ConfigError

#: The largest split ring there is (VIRTIO 1.2, section 2.7: "maximum of 32768").
LARGEST_QUEUE = 32768

#: Bytes of output kept for a port that nobody watches.
OUTPUT_BYTES = 1 << 20

#: Bytes of input held for a guest that does not take it.
INPUT_BYTES = 1 << 16

#: How long a reader may take nothing, with output waiting, before it counts as stuck.
STALL_MS = 200

#: Upper bound of the adaptive window in which a worker watches its rings before it sleeps.
POLL_US = 50

LOCALHOST = "127.0.0.1"

#: sun_path holds 108 bytes with its terminating zero (unix(7)).
_LONGEST_SOCKET_PATH = 107


class BackendKind(StrEnum):
    """The values of `--backend`."""

    NESTED = "nested"
    NETWORK = "network"
    UNIX = "unix"
    PTY = "pty"


class Overflow(StrEnum):
    """What happens when a port's journal is full of what its reader has not taken."""

    DROP = "drop"
    BLOCK = "block"


class ResizeOrder(StrEnum):
    """The order of the two numbers in a RESIZE message.

    The specification has columns first (VIRTIO 1.2, section 5.3.6.2), Linux before 6.15 read rows
    first.
    """

    SPEC = "spec"
    LINUX_LEGACY = "linux-legacy"


class Nested(msgspec.Struct, frozen=True, tag=True):
    """The terminal the daemon was started from."""


class Network(msgspec.Struct, frozen=True, tag=True):
    """A TCP listener."""

    host: str
    port: int


class Unix(msgspec.Struct, frozen=True, tag=True):
    """A unix stream listener."""

    path: str


class Pty(msgspec.Struct, frozen=True, tag=True):
    """A pseudo-terminal; `link`, if any, is a symlink to its slave."""

    link: str | None


Backend = Nested | Network | Unix | Pty


class Port(msgspec.Struct, frozen=True, kw_only=True):
    """One port of a guest's virtio console; sizes in bytes, powers of two."""

    id: int
    name: str
    backend: Backend
    console: bool = True
    overflow: Overflow = Overflow.DROP
    output_bytes: int = OUTPUT_BYTES
    input_bytes: int = INPUT_BYTES
    stall_ms: int = STALL_MS


class Guest(msgspec.Struct, frozen=True, kw_only=True):
    """One vhost-user socket and the console behind it.

    The socket is either `socket_path`, to be created, or `fd`, inherited. `max_ports` is what the
    guest is told as max_nr_ports: every port's id is below it. `inband` offers notifications as
    messages of the session.
    """

    name: str
    ports: tuple[Port, ...]
    max_ports: int
    socket_path: str | None = None
    fd: int | None = None
    max_queue_size: int = LARGEST_QUEUE
    poll_us: int = POLL_US
    resize_order: ResizeOrder = ResizeOrder.SPEC
    inband: bool = False


class Daemon(msgspec.Struct, frozen=True, kw_only=True):
    """Everything one master serves."""

    guests: tuple[Guest, ...]


def _backend(
    kind: BackendKind, index: int, socket_path: str | None, tcp_port: int, pty_link: str | None
) -> Backend:
    match kind:
        case BackendKind.NESTED:
            return Nested()
        case BackendKind.NETWORK:
            return Network(LOCALHOST, tcp_port + index)
        case BackendKind.UNIX:
            if socket_path is None:
                raise ConfigError("the unix backend needs --socket-path: its socket goes beside it")
            return Unix(f"{socket_path}{index}.data")
        case BackendKind.PTY:
            return Pty(None if pty_link is None else f"{pty_link}{index}")


def _base_name(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def _check_path(path: str) -> None:
    size = len(path.encode(errors="surrogateescape"))
    if size > _LONGEST_SOCKET_PATH:
        raise ConfigError(
            f"socket path is {size} bytes long, the system's limit is "
            f"{_LONGEST_SOCKET_PATH}: {path}"
        )
    if "\0" in path or not _base_name(path):
        raise ConfigError(f"socket path names no file: {path!r}")


def from_options(
    *,
    socket_path: str | None,
    fd: int | None,
    socket_count: int,
    backend: BackendKind,
    tcp_port: int,
    max_queue_size: int,
    poll_us: int = POLL_US,
    pty_link: str | None = None,
) -> Daemon:
    """Return the daemon that the command line's options describe.

    Sockets are `socket_path` + index and TCP ports `tcp_port` + index, also for a single guest,
    as the Rust vhost-device-console names them.

    Raises ConfigError, with a line that says what to change.
    """
    if (socket_path is None) == (fd is None):
        raise ConfigError("give either --socket-path or --fd")
    if socket_path == "":
        raise ConfigError("--socket-path is empty")
    if socket_count < 1:
        raise ConfigError(f"--socket-count must be at least 1, not {socket_count}")
    if fd is not None and socket_count != 1:
        raise ConfigError("--fd is one socket: --socket-count must be 1")
    if backend is BackendKind.NESTED and socket_count != 1:
        raise ConfigError(
            "the nested backend is one terminal: use --socket-count 1 or another --backend"
        )
    if backend is BackendKind.NESTED and fd is not None and fd <= 2:
        raise ConfigError(f"--fd {fd} is the terminal's place: the nested backend needs it")
    if pty_link is not None and backend is not BackendKind.PTY:
        raise ConfigError("--pty-link goes with --backend pty")
    if not 1 <= max_queue_size <= LARGEST_QUEUE or max_queue_size & (max_queue_size - 1):
        raise ConfigError(
            f"--max-queue-size must be a power of two from 1 to {LARGEST_QUEUE}, "
            f"not {max_queue_size}"
        )
    if poll_us < 0:
        raise ConfigError(f"--poll-us must not be negative, not {poll_us}")
    if backend is BackendKind.NETWORK:
        last = tcp_port + socket_count - 1
        if tcp_port < 1 or last > 65535:
            raise ConfigError(f"TCP ports {tcp_port} to {last} do not fit in 1 to 65535")

    guests = []
    for index in range(socket_count):
        path = None if socket_path is None else f"{socket_path}{index}"
        chosen = _backend(backend, index, socket_path, tcp_port, pty_link)
        for made in (path, chosen.path if isinstance(chosen, Unix) else None):
            if made is not None:
                _check_path(made)
        name = f"fd{fd}" if path is None else _base_name(path)
        guests.append(
            Guest(
                name=name,
                ports=(Port(id=0, name="console0", backend=chosen),),
                max_ports=1,
                socket_path=path,
                fd=fd,
                max_queue_size=max_queue_size,
                poll_us=poll_us,
            )
        )
    return Daemon(guests=tuple(guests))
