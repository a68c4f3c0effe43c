"""What a daemon serves: frozen descriptions of guests, ports and backends, checked once.

Nothing here touches a file or a socket, so every mistake that the options alone show is found
before anything is created.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from ipaddress import ip_address
from typing import TypeVar, get_args

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

#: The most ports a guest can have: kick and call descriptors name one of 256 queues (vhost-user,
#: VHOST_USER_SET_VRING_KICK: "bits 0-7"), two a port and two for control messages.
MOST_PORTS = 127

#: A name's bytes at most, so that a folder, a log line and a health record have room for it.
LONGEST_NAME = 200

#: Bounds of a journal's rings, in bytes.
SMALLEST_OUTPUT, SMALLEST_INPUT, LARGEST_RING = 1 << 16, 1 << 12, 1 << 30

#: No reader may keep its guest waiting longer than an hour.
LONGEST_STALL_MS = 3_600_000

#: The first guest's TCP port when none is given, as the Rust vhost-device-console has it.
TCP_PORT = 12345

LOCALHOST = "127.0.0.1"

#: Clients of a port at once, unless `max-clients` says fewer: a ledger has room for so many.
MOST_CLIENTS = 256

#: The mode of every socket's file unless `socket-mode` says otherwise: its owner's alone.
SOCKET_MODE = 0o600

#: Old files of a log that are kept unless `log-keep` says otherwise, the most that can be, and the
#: least bytes after which another one is begun.
LOG_KEEP, MOST_LOGS_KEPT, SMALLEST_LOG = 5, 99, 4096

#: The least and the most seconds after which `log-max-age` can have another file begun.
SHORTEST_AGE, LONGEST_AGE = 1, 366 * 86400

#: No Linux has more (NR_CPUS on x86-64).
_MOST_CPUS = 8192

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


class Typing(StrEnum):
    """Whose typing counts among a port's plain connections; who attaches takes turns anyway.

    With `FIRST` they take turns, too: the first, and the next one when that has left.
    """

    ALL = "all"
    FIRST = "first"
    NONE = "none"


class LogFormat(StrEnum):
    """What a log's file has of the output.

    The very bytes; the same with an RFC 3339 time before each line; or a JSON object a line.
    """

    RAW = "raw"
    TIMESTAMPS = "timestamps"
    JSON = "json"


class ResizeOrder(StrEnum):
    """The order of the two numbers in a RESIZE message.

    The specification has columns first (VIRTIO 1.2, section 5.3.6.2); Linux read rows first before
    6.15, and its stable releases before those of January 2026.
    """

    SPEC = "spec"
    LINUX_LEGACY = "linux-legacy"


class Nested(msgspec.Struct, frozen=True, tag=True):
    """The terminal the daemon was started from."""


class Access(msgspec.Struct, frozen=True):
    """Whom a unix socket lets in: by its file's mode, owner and group, and by name.

    `owner`, `group` and those in `allow` are names or numbers; "" leaves the daemon's. When there
    is anybody in `allow`, only processes of these users are served.
    """

    mode: int = SOCKET_MODE
    owner: str = ""
    group: str = ""
    allow: tuple[str, ...] = ()


class Tls(msgspec.Struct, frozen=True):
    """Paths of PEM files: the certificate with its chain, its key, and who signs clients' ones.

    Without `client_ca` clients need no certificate.
    """

    cert: str
    key: str
    client_ca: str | None = None


class Network(msgspec.Struct, frozen=True, tag=True):
    """A TCP listener; what comes in is plain without `tls`."""

    host: str
    port: int
    tls: Tls | None = None


class Unix(msgspec.Struct, frozen=True, tag=True):
    """A unix stream listener."""

    path: str


class Pty(msgspec.Struct, frozen=True, tag=True):
    """A pseudo-terminal; `link`, if any, is a symlink to its slave."""

    link: str | None


Backend = Nested | Network | Unix | Pty


class Log(msgspec.Struct, frozen=True):
    """A file for all that a port puts out.

    At about `max_bytes`, and at each multiple of `max_age` seconds since 1970, UTC, (0: never)
    another one is begun. `keep` old ones stay, less when all of them would have more than
    `total_bytes` (0: any number), with `compress` as gzip files. With `times` an index beside a raw
    file says when its bytes came.
    """

    path: str
    max_bytes: int = 0
    keep: int = LOG_KEEP
    format: LogFormat = LogFormat.RAW
    max_age: int = 0
    compress: bool = False
    total_bytes: int = 0
    times: bool = True

    @property
    def indexed(self) -> bool:
        """Whether there is an index of times: the other formats have them in the file."""
        return self.times and self.format is LogFormat.RAW


class Port(msgspec.Struct, frozen=True, kw_only=True):
    """One port of a guest's virtio console; sizes in bytes, powers of two.

    `access` is its unix socket's, if that is its backend.
    """

    id: int
    name: str
    backend: Backend
    console: bool = True
    overflow: Overflow = Overflow.DROP
    typing: Typing = Typing.ALL
    output_bytes: int = OUTPUT_BYTES
    input_bytes: int = INPUT_BYTES
    stall_ms: int = STALL_MS
    max_clients: int = MOST_CLIENTS
    access: Access = Access()
    log: Log | None = None


class Guest(msgspec.Struct, frozen=True, kw_only=True):
    """One vhost-user socket and the console behind it.

    The socket is either `socket_path`, to be created, or `fd`, inherited. `max_ports` is what the
    guest is told as max_nr_ports: every port's id is below it. `inband` offers notifications as
    messages of the session, `packed` virtqueues of that format. `cpus` are those its worker may run
    on, none for all of the daemon's. `access` is the vhost-user socket's; that and `tls` are a
    port's too that says nothing of them. With `sandbox` its worker can open no file or socket.
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
    packed: bool = False
    cpus: tuple[int, ...] = ()
    access: Access = Access()
    tls: Tls | None = None
    sandbox: bool = True


class Daemon(msgspec.Struct, frozen=True, kw_only=True):
    """Everything one master serves, and as whom: NAME[:GROUP], or None for whoever started it."""

    guests: tuple[Guest, ...]
    user: str | None = None


class PortTable(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """A port as a person writes it: with `--port`, `port add`, or in a [[guest.port]] table.

    "" and None stand for what was not given.
    """

    name: str
    backend: BackendKind
    id: int | None = None
    console: bool = False
    host: str = ""
    tcp_port: int | None = None
    path: str = ""
    link: str = ""
    overflow: Overflow | None = None
    typing: Typing = Typing.ALL
    output_bytes: int = OUTPUT_BYTES
    input_bytes: int = INPUT_BYTES
    stall_ms: int = STALL_MS
    max_clients: int | None = None
    insecure: bool = False
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_client_ca: str | None = None
    socket_mode: str | None = None
    socket_owner: str | None = None
    socket_group: str | None = None
    allow_uids: str | None = None
    log: str = ""
    log_max_bytes: int | None = None
    log_keep: int | None = None
    log_format: LogFormat | None = None
    log_max_age: str | None = None
    log_compress: bool | None = None
    log_total_bytes: int | None = None
    log_times: bool | None = None


class _GuestTable(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """A [[guest]] table without its ports."""

    socket: str
    name: str = ""
    max_queue_size: int = LARGEST_QUEUE
    max_ports: int | None = None
    poll_us: int = POLL_US
    resize_order: ResizeOrder = ResizeOrder.SPEC
    inband: bool = False
    packed: bool = False
    cpus: str = ""
    socket_mode: str | None = None
    socket_owner: str | None = None
    socket_group: str | None = None
    allow_uids: str | None = None


_Table = TypeVar("_Table", PortTable, _GuestTable)

#: A table and what its mistakes are said to be in.
_Port = tuple[str, PortTable]


def _filled(kind: type[_Table], table: Mapping[str, object], where: str, *, strict: bool) -> _Table:
    """Return `table` as a `kind`, numbers from texts unless `strict`."""
    types = {field.encode_name: field.type for field in msgspec.structs.fields(kind)}
    for key in table:
        if key not in types:
            raise ConfigError(f"{where}: unknown key {key!r}: there are {', '.join(types)}")
    try:
        return msgspec.convert(table, kind, strict=strict)
    except msgspec.ValidationError as error:
        # "Object missing required field `name`", "Expected `int`, got `str` - at `$.tcp-port`"
        reason, _, at = str(error).partition(" - at `$.")
        if not at:
            raise ConfigError(f"{where}: {reason.split('`')[1]} is missing") from None
        key = at.rstrip("`")
        raise ConfigError(f"{where}: {key} is {table[key]!r}, not {_wanted(types[key])}") from None


def _wanted(annotation: object) -> str:
    kind = (get_args(annotation) or (annotation,))[0]
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return "one of " + ", ".join(kind)
    return {str: "a text", bool: "true or false", int: "a whole number"}[kind]


def parse_port(text: str, where: str) -> PortTable:
    """Return the port that `text` describes: key=value pairs between commas, or just a flag's key.

    Raises ConfigError with a line that begins with `where`.
    """
    table: dict[str, object] = {}
    for item in text.split(","):
        key, _, value = item.partition("=")
        if item in ("console", "insecure", "log-compress"):
            value = "true"
        elif not (key and value):
            raise ConfigError(f"{where}: {item!r} is not key=value")
        if key in table:
            raise ConfigError(f"{where}: {key} is given twice")
        table[key] = value
    return _filled(PortTable, table, where, strict=False)


def _cpus(text: str, where: str) -> tuple[int, ...]:
    """Return the numbers in a list such as 2-5,8; none in "". Raises ConfigError."""
    numbers: set[int] = set()
    for item in text.split(",") if text else ():
        first, dash, last = item.partition("-")
        ends = [first, last if dash else first]
        if not all(end.isascii() and end.isdigit() and len(end) <= 4 for end in ends):
            raise ConfigError(f"{where} is {text!r}, not a list of CPUs such as 2-5,8")
        low, high = map(int, ends)
        if not low <= high < _MOST_CPUS:
            raise ConfigError(f"{where}: {item} is no range of CPUs from 0 to {_MOST_CPUS - 1}")
        numbers.update(range(low, high + 1))
    return tuple(sorted(numbers))


def _check_name(name: str, where: str) -> None:
    """Refuse a name that could not be a file's, or could steer a terminal."""
    if not name.isprintable() or "/" in name or name in ("", ".", ".."):
        raise ConfigError(f"{where}: {name!r} is no name: it must be printable, without '/'")
    size = len(name.encode())
    if size > LONGEST_NAME:
        raise ConfigError(f"{where}: its name is {size} bytes long, the limit is {LONGEST_NAME}")


def _base_name(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def _check_path(path: str, what: str) -> None:
    size = len(path.encode(errors="surrogateescape"))
    if size > _LONGEST_SOCKET_PATH:
        raise ConfigError(
            f"{what} is {size} bytes long, the system's limit is {_LONGEST_SOCKET_PATH}: {path}"
        )
    if "\0" in path or not _base_name(path):
        raise ConfigError(f"{what} names no file: {path!r}")


def _check_size(what: str, size: int, least: int, most: int) -> None:
    if not least <= size <= most or size & (size - 1):
        raise ConfigError(f"{what} must be a power of two from {least} to {most}, not {size}")


#: The keys of each backend, and whether it has to have them.
_KEYS: dict[BackendKind, dict[str, bool]] = {
    BackendKind.NESTED: {},
    BackendKind.NETWORK: {
        "host": False,
        "tcp-port": True,
        "insecure": False,
        "tls-cert": False,
        "tls-key": False,
        "tls-client-ca": False,
    },
    BackendKind.UNIX: {
        "path": True,
        "socket-mode": False,
        "socket-owner": False,
        "socket-group": False,
        "allow-uids": False,
    },
    BackendKind.PTY: {"link": False},
}


def _names(text: str | None) -> list[str] | None:
    return None if text is None else text.split()


def _users_access(user: str | None) -> Access:
    """Return the access to sockets of a daemon that becomes `user`: they are that one's."""
    owner, _, group = (user or "").partition(":")
    return Access(owner=owner, group=group)


def _access(
    mode: str | None,
    owner: str | None,
    group: str | None,
    allow: Sequence[str] | None,
    where: str,
    default: Access,
) -> Access:
    """Return the access that these texts describe, `default`'s where one is None.

    Raises ConfigError with a line that begins with `where`.
    """
    names = "allow-uid" if where == "--" else "allow-uids"
    texts = {
        "socket-owner": owner,
        "socket-group": group,
        names: None if allow is None else "".join(allow),
    }
    for key, text in texts.items():
        if text is not None and not text:
            raise ConfigError(f"{where}{key} is empty: name somebody, or leave it out")
    if mode is not None and not (re.fullmatch("[0-7]{1,4}", mode) and int(mode, 8) <= 0o777):
        raise ConfigError(f"{where}socket-mode is {mode!r}, not an octal number such as 0660")
    return Access(
        mode=default.mode if mode is None else int(mode, 8),
        owner=owner or default.owner,
        group=group or default.group,
        allow=tuple(allow or default.allow),
    )


def _tls(cert: str | None, key: str | None, client_ca: str | None, where: str) -> Tls | None:
    """Return the TLS files, None without any; a key may be in its certificate's file.

    Raises ConfigError with a line that begins with `where`.
    """
    for name, path in (("cert", cert), ("key", key), ("client-ca", client_ca)):
        if path == "":
            raise ConfigError(f"{where}tls-{name} is empty: give a file, or leave it out")
        if path is not None and cert is None:
            raise ConfigError(f"{where}tls-{name} needs tls-cert")
    return None if cert is None else Tls(cert, key or cert, client_ca)


def _network(table: PortTable, where: str, default: Tls | None) -> Network:
    """Return a TCP listener, which other machines reach only by TLS or if that is asked for."""
    number = table.tcp_port or 0
    if not 1 <= number <= 65535:
        raise ConfigError(f"{where}: tcp-port must be from 1 to 65535, not {number}")
    try:
        address = ip_address(host := table.host or LOCALHOST)
    except ValueError:
        raise ConfigError(f"{where}: host is {table.host!r}, not an IP address") from None
    tls = _tls(table.tls_cert, table.tls_key, table.tls_client_ca, f"{where}: ")
    if table.insecure:
        if tls:
            raise ConfigError(f"{where}: insecure means without TLS: leave out one of the two")
        return Network(host, number)
    tls = tls or default
    if tls is None and not address.is_loopback:
        raise ConfigError(
            f"{where}: at {host} other machines could read and type: "
            "give tls-cert and tls-key, or say insecure if that is wanted"
        )
    return Network(host, number, tls)


def _backend(table: PortTable, where: str, tls: Tls | None) -> Backend:
    given = {
        key: None if value == "" or value is False else value
        for keys in _KEYS.values()
        for key in keys
        for value in [getattr(table, key.replace("-", "_"))]
    }
    keys = _KEYS[table.backend]
    for key, value in given.items():
        if value is not None and key not in keys:
            raise ConfigError(f"{where}: {key} does not go with backend {table.backend}")
        if value is None and keys.get(key):
            raise ConfigError(f"{where}: backend {table.backend} needs {key}")
        if "\0" in str(value):
            raise ConfigError(f"{where}: {key} is {value!r}, which nothing is called")
    match table.backend:
        case BackendKind.NESTED:
            return Nested()
        case BackendKind.NETWORK:
            return _network(table, where, tls)
        case BackendKind.UNIX:
            _check_path(table.path, f"{where}: path")
            return Unix(table.path)
        case BackendKind.PTY:
            return Pty(table.link or None)


#: The keys that say how a log is kept, as a PortTable has them.
_LOG_KEYS = tuple(name for name in PortTable.__struct_fields__ if name.startswith("log_"))

_AGE_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _age(text: str | None, where: str) -> int:
    """Return the seconds in an age such as 12h; 0 for none. Raises ConfigError."""
    if text is None or text == "0":
        return 0
    match = re.fullmatch("([0-9]{1,9})([smhd])", text)
    if match is None:
        raise ConfigError(f"{where}: log-max-age is {text!r}, not a time such as 30m, 12h or 1d")
    seconds = int(match[1]) * _AGE_UNITS[match[2]]
    if not SHORTEST_AGE <= seconds <= LONGEST_AGE:
        raise ConfigError(f"{where}: log-max-age must be from 1s to 366d, not {text}")
    return seconds


def _log(table: PortTable, where: str) -> Log | None:
    """Return the log that `table` describes, if any."""
    if not table.log:
        given = [key for key in _LOG_KEYS if getattr(table, key) is not None]
        if given:
            raise ConfigError(f"{where}: {given[0].replace('_', '-')} goes with log")
        return None
    if "\0" in table.log or _base_name(table.log) in ("", ".", ".."):
        raise ConfigError(f"{where}: log names no file: {table.log!r}")
    size = table.log_max_bytes or 0
    if 0 != size < SMALLEST_LOG:
        raise ConfigError(
            f"{where}: log-max-bytes must be 0 or at least {SMALLEST_LOG}, not {size}"
        )
    total = table.log_total_bytes or 0
    if total and not 0 < 2 * size <= total:
        raise ConfigError(
            f"{where}: log-total-bytes needs log-max-bytes of at most half as much: "
            "what is written is not cut off"
        )
    # Within a total it is that which says how many.
    keep = (MOST_LOGS_KEPT if total else LOG_KEEP) if table.log_keep is None else table.log_keep
    if not 0 <= keep <= MOST_LOGS_KEPT:
        raise ConfigError(f"{where}: log-keep must be from 0 to {MOST_LOGS_KEPT}, not {keep}")
    return Log(
        table.log,
        size,
        keep,
        table.log_format or LogFormat.RAW,
        _age(table.log_max_age, where),
        bool(table.log_compress),
        total,
        table.log_times is not False,
    )


def _port(table: PortTable, port_id: int, where: str, access: Access, tls: Tls | None) -> Port:
    """Return the port of `table`, checked as far as it stands alone.

    `access` and `tls` are its guest's.
    """
    _check_name(table.name, where)
    _check_size(f"{where}: output-bytes", table.output_bytes, SMALLEST_OUTPUT, LARGEST_RING)
    _check_size(f"{where}: input-bytes", table.input_bytes, SMALLEST_INPUT, LARGEST_RING)
    if not 0 <= table.stall_ms <= LONGEST_STALL_MS:
        raise ConfigError(
            f"{where}: stall-ms must be from 0 to {LONGEST_STALL_MS}, not {table.stall_ms}"
        )
    clients = MOST_CLIENTS if table.max_clients is None else table.max_clients
    if not 1 <= clients <= MOST_CLIENTS:
        raise ConfigError(f"{where}: max-clients must be from 1 to {MOST_CLIENTS}, not {clients}")
    return Port(
        id=port_id,
        name=table.name,
        backend=_backend(table, where, tls),
        console=table.console,
        overflow=table.overflow or (Overflow.DROP if table.console else Overflow.BLOCK),
        typing=table.typing,
        output_bytes=table.output_bytes,
        input_bytes=table.input_bytes,
        stall_ms=table.stall_ms,
        max_clients=clients,
        log=_log(table, where),
        access=_access(
            table.socket_mode,
            table.socket_owner,
            table.socket_group,
            _names(table.allow_uids),
            f"{where}: ",
            access,
        ),
    )


def _added(
    ports: Sequence[Port],
    tables: Sequence[_Port],
    first: int = 0,
    *,
    access: Access,
    tls: Tls | None,
) -> tuple[Port, ...]:
    """Return `ports` and those of `tables`, by id; `access` and `tls` are their guest's.

    A table without an id gets the lowest from `first` that no other has or wants. Raises
    ConfigError for two of the same id or name.
    """
    done = list(ports)
    wanted = {table.id for _, table in tables}
    for where, table in tables:
        taken = {port.id for port in done}
        port_id = table.id
        if port_id is None:
            free = (n for n in range(first, MOST_PORTS) if n not in taken | wanted)
            if (port_id := next(free, None)) is None:
                raise ConfigError(f"{where}: a guest has at most {MOST_PORTS} ports")
        if not 0 <= port_id < MOST_PORTS:
            raise ConfigError(f"{where}: id must be from 0 to {MOST_PORTS - 1}, not {port_id}")
        if port_id in taken:
            raise ConfigError(f"{where}: another port has id {port_id}")
        if any(port.name == table.name for port in done):
            raise ConfigError(f"{where}: another port has the name {table.name}")
        done.append(_port(table, port_id, where, access, tls))
    return tuple(sorted(done, key=lambda port: port.id))


def with_port(guest: Guest, table: PortTable) -> tuple[Guest, Port]:
    """Return a running `guest` with one port more, and that port.

    Raises ConfigError when it cannot have it.
    """
    where = f"port {table.name}"
    if table.backend is BackendKind.NESTED:
        raise ConfigError(f"{where}: the terminal cannot become a port's while the daemon runs")
    ports = _added(guest.ports, [(where, table)], 1, access=guest.access, tls=guest.tls)
    port = next(port for port in ports if port not in guest.ports)
    if port.id >= guest.max_ports:
        raise ConfigError(
            f"{where}: {guest.name} may have ports 0 to {guest.max_ports - 1}: "
            "start its daemon with a larger --max-ports"
        )
    return msgspec.structs.replace(guest, ports=ports), port


def without_port(guest: Guest, port_id: int) -> Guest:
    """Return a running `guest` without the port `port_id`, which it has.

    Raises ConfigError for port 0, whose queues are there whatever the driver knows (VIRTIO 1.2,
    section 5.3.2: "The port 0 receive and transmit queues always exist"), and for the terminal's,
    with which the guest ends.
    """
    ports = tuple(port for port in guest.ports if port.id != port_id)
    if port_id == 0 or any(isinstance(port.backend, Nested) for port in {*guest.ports} - {*ports}):
        raise ConfigError(f"port {port_id} stays as long as its guest")
    return msgspec.structs.replace(guest, ports=ports)


def _guest(
    tables: Sequence[_Port],
    where: str,
    *,
    name: str,
    socket_path: str | None,
    fd: int | None = None,
    max_ports: int | None,
    max_queue_size: int,
    poll_us: int,
    resize_order: ResizeOrder,
    inband: bool,
    packed: bool,
    cpus: str,
    access: Access,
    tls: Tls | None,
    sandbox: bool,
    first: int = 0,
) -> Guest:
    """Return the guest that these describe; errors in its own numbers begin with `where`."""
    if socket_path is not None:
        _check_path(socket_path, "socket path" if where == "--" else f"{where}socket")
    _check_size(f"{where}max-queue-size", max_queue_size, 1, LARGEST_QUEUE)
    if poll_us < 0:
        raise ConfigError(f"{where}poll-us must not be negative, not {poll_us}")
    ports = _added((), tables, first, access=access, tls=tls)
    if not ports or ports[0].id != 0:
        raise ConfigError(f"{where}port 0 is missing: every guest has it")
    least = ports[-1].id + 1
    if max_ports is not None and not least <= max_ports <= MOST_PORTS:
        raise ConfigError(
            f"{where}max-ports must be from {least}, for port {least - 1}, to {MOST_PORTS}, "
            f"not {max_ports}"
        )
    return Guest(
        name=name,
        ports=ports,
        max_ports=max_ports or least,
        socket_path=socket_path,
        fd=fd,
        max_queue_size=max_queue_size,
        poll_us=poll_us,
        resize_order=resize_order,
        inband=inband,
        packed=packed,
        cpus=_cpus(cpus, f"{where}cpus"),
        access=access,
        tls=tls,
        sandbox=sandbox,
    )


def _other_files(log: Log) -> Iterator[str]:
    """Yield what the names of a log's other files end with."""
    if log.indexed:
        yield "times"
    if not (log.max_bytes or log.max_age):
        return
    yield "new"
    if log.compress:
        yield "gz.new"
    for number in range(1, log.keep + 1):
        yield f"{number}"
        if log.compress:
            yield f"{number}.gz"
        if log.indexed:
            yield f"{number}.times"


def _addresses(guest: Guest) -> Iterator[tuple[str, str]]:
    """Yield every address that `guest` takes, and what for."""
    if guest.socket_path is not None:
        yield guest.socket_path, f"the vhost-user socket of {guest.name}"
    for port in guest.ports:
        owner = f"port {port.id} of {guest.name}"
        match port.backend:
            case Network():
                yield f"{port.backend.host} port {port.backend.port}", owner
            case Unix():
                yield port.backend.path, owner
            case Pty(link=str(link)):
                yield link, owner
        if port.log is not None:
            yield port.log.path, f"the log of {owner}"
            for suffix in _other_files(port.log):
                yield f"{port.log.path}.{suffix}", f"another log of {owner}"


def _daemon(guests: Sequence[Guest], user: str | None) -> Daemon:
    """Return the daemon of `guests`, which may not want the same things."""
    nested = [port for guest in guests for port in guest.ports if isinstance(port.backend, Nested)]
    if nested and (len(nested) > 1 or len(guests) > 1):
        raise ConfigError(
            "the nested backend is one terminal: one port of one guest can have it, "
            "the others need another backend"
        )
    owners: dict[str, str] = {}
    for guest in guests:
        for address, owner in _addresses(guest):
            if address in owners:
                raise ConfigError(f"{address} is given twice: to {owners[address]} and to {owner}")
            owners[address] = owner
    return Daemon(guests=tuple(guests), user=user)


def from_options(
    *,
    socket_path: str | None,
    fd: int | None,
    socket_count: int = 1,
    backend: BackendKind | None = None,
    tcp_port: int | None = None,
    max_queue_size: int = LARGEST_QUEUE,
    poll_us: int = POLL_US,
    pty_link: str | None = None,
    ports: Sequence[str] = (),
    max_ports: int | None = None,
    resize_order: ResizeOrder = ResizeOrder.SPEC,
    inband: bool = False,
    packed: bool = False,
    cpus: str | None = None,
    max_clients: int = MOST_CLIENTS,
    typing: Typing | None = None,
    socket_mode: str | None = None,
    socket_owner: str | None = None,
    socket_group: str | None = None,
    allow_uid: Sequence[str] = (),
    tcp_host: str | None = None,
    tcp_insecure: bool = False,
    tls_cert: str | None = None,
    tls_key: str | None = None,
    tls_client_ca: str | None = None,
    user: str | None = None,
    no_sandbox: bool = False,
    log_file: str | None = None,
    log_max_bytes: int | None = None,
    log_keep: int | None = None,
    log_format: LogFormat | None = None,
    log_max_age: str | None = None,
    log_compress: bool | None = None,
    log_total_bytes: int | None = None,
    log_times: bool | None = None,
) -> Daemon:
    """Return the daemon that the command line's options describe; `ports` are those of `--port`.

    Sockets are `socket_path` + index and TCP ports `tcp_port` + index, also for a single guest,
    as the Rust vhost-device-console names them, and logs of port 0 are `log_file` + index.

    Raises ConfigError, with a line that says what to change.
    """
    if (socket_path is None) == (fd is None):
        raise ConfigError("give either --socket-path or --fd")
    if socket_path == "":
        raise ConfigError("--socket-path is empty")
    if cpus == "":
        raise ConfigError("--cpus is empty: give a list of CPUs such as 2-5,8")
    if user == "":
        raise ConfigError("--user is empty: name one, or leave it out")
    if socket_count < 1:
        raise ConfigError(f"--socket-count must be at least 1, not {socket_count}")
    if fd is not None and socket_count != 1:
        raise ConfigError("--fd is one socket: --socket-count must be 1")
    for option, given in (("port", tcp_port), ("host", tcp_host)):
        if given is not None and backend is not BackendKind.NETWORK:
            raise ConfigError(f"--tcp-{option} goes with --backend network")
    if pty_link is not None and backend is not BackendKind.PTY:
        raise ConfigError("--pty-link goes with --backend pty")
    if backend is BackendKind.UNIX and socket_path is None:
        raise ConfigError("the unix backend needs --socket-path: its socket goes beside it")
    default = _users_access(user)
    access = _access(socket_mode, socket_owner, socket_group, allow_uid or None, "--", default)
    tls = _tls(tls_cert, tls_key, tls_client_ca, "--")
    if tls and tcp_insecure:
        raise ConfigError("--tcp-insecure means without TLS: leave out one of the two")
    tables = [(where := f"--port {text!r}", parse_port(text, where)) for text in ports]
    given_0 = any(table.id == 0 for _, table in tables)
    if given_0 and backend is not None:
        raise ConfigError("--backend describes port 0, and so does --port with id=0: give one")
    if given_0 and typing is not None:
        raise ConfigError(
            "--typing is port 0's, which --port with id=0 describes: say typing= there"
        )
    if log_file == "":
        raise ConfigError("--log-file is empty")
    if given_0 and log_file is not None:
        raise ConfigError(
            "--log-file is port 0's, which --port with id=0 describes: say log= there"
        )
    kept = {
        "log_max_bytes": log_max_bytes,
        "log_keep": log_keep,
        "log_format": log_format,
        "log_max_age": log_max_age,
        "log_compress": log_compress,
        "log_total_bytes": log_total_bytes,
        "log_times": log_times,
    }
    if log_file is None and any(value is not None for value in kept.values()):
        option = next(key for key, value in kept.items() if value is not None)
        raise ConfigError(f"--{option.replace('_', '-')} goes with --log-file")
    kind = backend or BackendKind.NESTED

    def everyones(table: PortTable) -> PortTable:
        plain = tcp_insecure and table.backend is BackendKind.NETWORK and not table.tls_cert
        clients = max_clients if table.max_clients is None else table.max_clients
        return msgspec.structs.replace(table, insecure=table.insecure or plain, max_clients=clients)

    guests = []
    for index in range(socket_count):
        path = None if socket_path is None else f"{socket_path}{index}"
        own = [(where, _numbered(table, index)) for where, table in tables]
        if not given_0:
            port_0 = PortTable(
                name="console0",
                backend=kind,
                id=0,
                console=True,
                tcp_port=(tcp_port if tcp_port is not None else TCP_PORT) + index
                if kind is BackendKind.NETWORK
                else None,
                host=tcp_host or "",
                path=f"{path}.data" if kind is BackendKind.UNIX else "",
                link=f"{pty_link}{index}" if pty_link else "",
                log=f"{log_file}{index}" if log_file else "",
                typing=typing or Typing.ALL,
            )
            port_0 = msgspec.structs.replace(port_0, **kept)
            own.insert(0, (f"--backend {kind}", port_0))
        guests.append(
            _guest(
                [(where, everyones(table)) for where, table in own],
                "--",
                name=f"fd{fd}" if path is None else _base_name(path),
                socket_path=path,
                fd=fd,
                max_ports=max_ports,
                max_queue_size=max_queue_size,
                poll_us=poll_us,
                resize_order=resize_order,
                inband=inband,
                packed=packed,
                cpus=cpus or "",
                access=access,
                tls=tls,
                sandbox=not no_sandbox,
                first=1,
            )
        )
    nested = any(isinstance(port.backend, Nested) for port in guests[0].ports)
    if nested and fd is not None and fd <= 2:
        raise ConfigError(f"--fd {fd} is the terminal's place: the nested backend needs it")
    return _daemon(guests, user)


def _numbered(table: PortTable, index: int) -> PortTable:
    """Return `table` with the guest's index added to the addresses in it."""
    return msgspec.structs.replace(
        table,
        tcp_port=None if table.tcp_port is None else table.tcp_port + index,
        path=table.path and f"{table.path}{index}",
        link=table.link and f"{table.link}{index}",
        log=table.log and f"{table.log}{index}",
    )


def from_toml(text: bytes, source: str) -> Daemon:
    """Return the daemon that a file's [[guest]] tables describe; `source` is what it is called.

    Raises ConfigError, with a line that says where and what.
    """
    try:
        document = msgspec.toml.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{source} is not TOML: {error}") from None
    shared: dict[str, str | None] = {}
    for key in ("cpus", "tls-cert", "tls-key", "tls-client-ca", "user"):
        given = document.pop(key, None)
        if given is not None and not isinstance(given, str):
            raise ConfigError(f"{source}: {key} is {given!r}, not a text")
        shared[key] = given
    sandbox = document.pop("sandbox", True)
    if not isinstance(sandbox, bool):
        raise ConfigError(f"{source}: sandbox is {sandbox!r}, not true or false")
    if unknown := document.keys() - {"guest"}:
        raise ConfigError(
            f"{source}: unknown key {min(unknown)!r}: "
            f"there are [[guest]], {', '.join(shared)}, sandbox"
        )
    if shared["user"] == "":
        raise ConfigError(f"{source}: user is empty: name one, or leave it out")
    everyones_cpus = shared["cpus"] or ""
    _cpus(everyones_cpus, f"{source}: cpus")
    tls = _tls(shared["tls-cert"], shared["tls-key"], shared["tls-client-ca"], f"{source}: ")
    guests: list[Guest] = []
    for where, table in _tables(document, "guest", source):
        ports = _tables(table, "guest.port", where)
        own = _filled(
            _GuestTable, {k: v for k, v in table.items() if k != "port"}, where, strict=True
        )
        if own.name:
            _check_name(own.name, where)
        guest = _guest(
            [(inner, _filled(PortTable, port, inner, strict=True)) for inner, port in ports],
            f"{where}: ",
            name=own.name or _base_name(own.socket),
            socket_path=own.socket,
            max_ports=own.max_ports,
            max_queue_size=own.max_queue_size,
            poll_us=own.poll_us,
            resize_order=own.resize_order,
            inband=own.inband,
            packed=own.packed,
            cpus=own.cpus or everyones_cpus,
            access=_access(
                own.socket_mode,
                own.socket_owner,
                own.socket_group,
                _names(own.allow_uids),
                f"{where}: ",
                _users_access(shared["user"]),
            ),
            tls=tls,
            sandbox=sandbox,
        )
        if any(guest.name == other.name for other in guests):
            raise ConfigError(f"{where}: another guest has the name {guest.name}")
        guests.append(guest)
    return _daemon(guests, shared["user"])


def _tables(
    parent: Mapping[str, object], header: str, where: str
) -> list[tuple[str, dict[str, object]]]:
    """Return the tables [[header]] of `parent`, each behind the words for its place."""
    key = header.rpartition(".")[2]
    found = parent.get(key)
    if not isinstance(found, list) or not found or not all(isinstance(t, dict) for t in found):
        raise ConfigError(f"{where}: one [[{header}]] at least is needed")
    return [(f"{where}: {key} {number}", table) for number, table in enumerate(found, 1)]
