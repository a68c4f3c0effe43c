"""TLS at TCP ports, as the master sees it: a process of its own that speaks it, started and kept.

The gateway (`gateway.py`) accepts, shakes hands, and hands over one end of a TCP connection on the
loopback for each client; it relays between that and TLS. So a worker's client is an ordinary TCP
client, which stays when the worker dies. The gateway has no descriptor of a guest's and opens no
file: the master does that for it. Both sides speak records of a SOCK_SEQPACKET pair, MessagePack.
"""

from __future__ import annotations

import logging
import os
import resource
import select
import selectors
import signal
import socket
import time
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise

import msgspec

from . import logbook
from .config import Network, Port, Tls
from .errors import ConfigError
from .supervision import Action, Event, State, Supervisor

#: Seconds for the gateway to say that it serves a port; its first answer takes its start, too.
ANSWER_WITHIN = 10.0

#: Seconds for the gateway to end once the workers have.
END_WITHIN = 5.0

#: Exit status of a gateway that fell over a mistake of ours (sysexits.h: EX_SOFTWARE).
_FAULT = 70

#: A record's bytes: two names and a few numbers.
_LARGEST = 1 << 14

#: Records taken before everybody else has a turn.
_AT_ONCE = 16

#: A listener, a certificate, its key, and who signs the clients' ones.
_MOST_FDS = 4

_log = logging.getLogger(__name__)


class Serve(msgspec.Struct, frozen=True, tag=True):
    """Serve a port, `most` clients at once; `name` is for the log.

    With it come the listener, the certificate, its key and, with `client_ca`, those who sign
    clients' certificates.
    """

    guest: str
    port: int
    name: str
    most: int
    client_ca: bool


class Check(msgspec.Struct, frozen=True, tag=True):
    """Say whether the certificates that come with it, as with `Serve`, can be used."""

    client_ca: bool


class Forget(msgspec.Struct, frozen=True, tag=True):
    """Do not serve a port any more; its clients end with it."""

    guest: str
    port: int


class Retire(msgspec.Struct, frozen=True, tag=True):
    """Let nobody else in, and end after the last one left."""


class Served(msgspec.Struct, frozen=True, tag=True):
    """A port is served now, or `error` says why not; also the answer to `Check`, of no port."""

    guest: str = ""
    port: int = 0
    error: str | None = None


class Came(msgspec.Struct, frozen=True, tag=True):
    """Somebody came to a port; with it comes the connection."""

    guest: str
    port: int


Order = Serve | Check | Forget | Retire
Notice = Served | Came

_encoder = msgspec.msgpack.Encoder()
orders: msgspec.msgpack.Decoder[Order] = msgspec.msgpack.Decoder(Order)
_notices: msgspec.msgpack.Decoder[Notice] = msgspec.msgpack.Decoder(Notice)


def send(sock: socket.socket, message: Order | Notice, fds: Sequence[int] = ()) -> None:
    """Send a record and copies of `fds`; raises OSError, and nothing is sent then."""
    socket.send_fds(sock, [_encoder.encode(message)], fds)


def receive(sock: socket.socket) -> tuple[bytes, list[int]] | None:
    """Return a record and its descriptors, the caller's (close-on-exec); b"" when it is over.

    None when there is none now.
    """
    fds = array("i")
    try:
        data, ancillary, flags, _ = sock.recvmsg(
            _LARGEST, socket.CMSG_SPACE(_MOST_FDS * fds.itemsize), socket.MSG_CMSG_CLOEXEC
        )
    except BlockingIOError:
        return None
    except ConnectionError:
        return b"", []
    for level, kind, body in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(body[: len(body) // fds.itemsize * fds.itemsize])
    if flags & socket.MSG_CTRUNC:  # no descriptors left here
        for fd in fds:
            os.close(fd)
        fds = array("i")
    return data, fds.tolist()


class _Process:
    """A gateway that runs, and the way to it."""

    def __init__(self, pid: int, channel: socket.socket) -> None:
        self.pid = pid
        self.channel = channel


class _Port:
    """A port with TLS: its listener is its endpoint's, `error` what there is against serving it.

    Its files are open as long as it is there: a gateway that died may leave the daemon as a user
    who cannot open them any more.
    """

    def __init__(self, name: str, listener: int, port: Port, tls: Tls) -> None:
        self.name = name
        self.listener = listener
        self.most = port.max_clients
        self.client_ca = tls.client_ca is not None
        self.files = _open_files(tls)
        self.served = False
        self.error: str | None = None

    def close(self) -> None:
        for fd in self.files:
            os.close(fd)


class Gateway:
    """The gateway's process: there once `start` was called and a port wants it, again if it dies.

    `came` is given each client: the guest's name, the port's id and the connection, which is its
    own then. `settle` is called in the new process once it needs no more files. The channel is
    read from `selector`, whose keys carry a callable as data. `kept` are processes of the program
    that this one replaced: they serve whom they have.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        came: Callable[[str, int, socket.socket], None],
        settle: Callable[[], object] = lambda: None,
        kept: Sequence[tuple[int, int]] = (),
    ) -> None:
        self._selector = selector
        self._came = came
        self._settle = settle
        self._ports: dict[tuple[str, int], _Port] = {}
        self._supervisor = Supervisor(time.monotonic())
        self._now: _Process | None = None
        self._retired: list[_Process] = []
        self._awaited: _Port | None = None
        self._started = False
        for pid, fd in kept:
            os.set_inheritable(fd, False)
            self._retire(_Process(pid, socket.socket(fileno=fd)))

    @property
    def kept(self) -> list[tuple[int, int]]:
        """Process ids and descriptors of all that run, for the program that replaces this one."""
        running = [*self._retired, self._now] if self._now else self._retired
        return [(process.pid, process.channel.fileno()) for process in running]

    def keep(self) -> list[tuple[int, int]]:
        """Give all that run up as they are, for the program that replaces this one."""
        kept = self.kept
        for process in [*self._retired, *([self._now] if self._now else [])]:
            self._deafen(process)
            process.channel.detach()
        self._retired, self._now = [], None
        return kept

    @property
    def deadline(self) -> float | None:
        """When `tick` is due, in seconds of time.monotonic; None when nothing is waited for."""
        return self._supervisor.deadline if self._started and self._ports else None

    def tick(self) -> None:
        """Start a gateway that died and is due."""
        deadline = self.deadline
        if deadline is not None and deadline <= time.monotonic():
            self._step(Event.TIMER)

    # Ports

    def serve(self, guest: str, port: Port, listener: int) -> None:
        """Have a port's clients come in by TLS at `listener`, which stays the caller's.

        After `start` it waits until that is so. Raises ConfigError when its certificates cannot be
        used.
        """
        backend = port.backend
        if not isinstance(backend, Network) or backend.tls is None:
            raise ValueError(f"port {port.id} of {guest} has no TLS")
        key = guest, port.id
        entry = _Port(f"{guest}: port {port.id}", listener, port, backend.tls)
        self._drop(key)
        self._ports[key] = self._awaited = entry
        try:
            if self._started:
                if self._now is not None:
                    self._tell(key, entry)
                else:
                    self._begin()
                self._await(key, entry)
        finally:
            self._awaited = None

    def start(self) -> None:
        """Serve the ports that there are, and those that come.

        Raises ConfigError with what is said of the first that cannot be; the others are served.
        """
        self._started = True
        if self._ports:
            self._begin()
        errors = []
        for key, entry in [*self._ports.items()]:
            try:
                self._await(key, entry)
            except ConfigError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _begin(self) -> None:
        """Do not wait for the time at which one that died was to be started again."""
        if self._supervisor.state is State.BACKOFF:
            self._step(Event.TIMER)

    def _await(self, key: tuple[str, int], entry: _Port) -> None:
        """Return once a port is served."""
        deadline = time.monotonic() + ANSWER_WITHIN
        while not entry.served and entry.error is None:
            process = self._now
            left = deadline - time.monotonic()
            if process is None or not select.select([process.channel], [], [], max(0.0, left))[0]:
                entry.error = "the TLS gateway does not answer"
            elif not self._hear(process) and not entry.served:
                entry.error = entry.error or "the TLS gateway ended"
        if entry.error is not None:
            self._drop(key)
            raise ConfigError(f"{entry.name}: {entry.error}")

    def forget(self, guest: str, port_id: int) -> None:
        """Serve a port no more."""
        if self._drop((guest, port_id)) and self._now is not None:
            with suppress(OSError):
                send(self._now.channel, Forget(guest, port_id))

    def _drop(self, key: tuple[str, int]) -> bool:
        entry = self._ports.pop(key, None)
        if entry is not None:
            entry.close()
        return entry is not None

    def _tell(self, key: tuple[str, int], entry: _Port) -> None:
        assert self._now is not None  # noqa: S101 (for the type checker)
        entry.served, entry.error = False, None
        order = Serve(*key, entry.name, entry.most, entry.client_ca)
        try:
            send(self._now.channel, order, [entry.listener, *entry.files])
        except OSError as error:
            entry.error = f"the TLS gateway cannot be told: {error.strerror}"

    # Processes

    def _step(self, event: Event) -> None:
        if self._supervisor.handle(event, time.monotonic()) is Action.START:
            self._start()

    def _start(self) -> None:
        try:
            process = _fork(self._settle)
        except OSError as error:
            _log.error("cannot start the TLS gateway: %s", error.strerror)
            self._step(Event.DIED)
            return
        self._now = process
        self._listen(process)
        for key, entry in self._ports.items():
            self._tell(key, entry)
            if entry.error is not None and entry is not self._awaited:
                _log.error("%s is not served: %s", entry.name, entry.error)

    def _listen(self, process: _Process) -> None:
        self._selector.register(process.channel, selectors.EVENT_READ, lambda: self._hear(process))

    def _retire(self, process: _Process) -> None:
        self._retired.append(process)
        self._listen(process)
        with suppress(OSError):
            send(process.channel, Retire())

    def _hear(self, process: _Process) -> bool:
        """Take some of what a gateway says; tell whether it may say more.

        It has been talking to strangers: nothing that it says is taken on trust.
        """
        if process.channel.fileno() < 0:
            return False  # found ready and reaped in the same turn
        for _ in range(_AT_ONCE):
            if (record := receive(process.channel)) is None:
                return True
            data, fds = record
            try:
                if not data:
                    self._deafen(process)
                    return False
                self._take(process, _notices.decode(data), fds)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                _log.error("the TLS gateway is killed: it makes no sense: %s", error)
                os.kill(process.pid, signal.SIGKILL)
                self._deafen(process)
                return False
            finally:
                for fd in fds:
                    os.close(fd)
        return True

    def _take(self, process: _Process, notice: Notice, fds: list[int]) -> None:
        entry = self._ports.get((notice.guest, notice.port))
        if entry is None:
            return  # it is gone by now
        if isinstance(notice, Came):
            client = _client(fds.pop()) if fds else None
            if client is None:
                _log.warning("%s: a client was lost on its way from the TLS gateway", entry.name)
            else:
                self._came(notice.guest, notice.port, client)
        elif process is self._now:
            entry.served, entry.error = notice.error is None, notice.error
            if notice.error is None:
                self._step(Event.HEALTHY)
            elif entry is not self._awaited:
                _log.error("%s is not served: %s", entry.name, notice.error)

    def _deafen(self, process: _Process) -> None:
        with suppress(KeyError, ValueError):
            self._selector.unregister(process.channel)

    def reap(self) -> None:
        """See whether a gateway has ended, after SIGCHLD."""
        for process in [*self._retired]:
            if os.waitpid(process.pid, os.WNOHANG)[0]:
                self._retired.remove(process)
                self._gone(process)
        process_now = self._now
        if process_now is None:
            return
        pid, status = os.waitpid(process_now.pid, os.WNOHANG)
        if pid:
            self._now = None
            self._gone(process_now)
            _log.error("the TLS gateway died: %s", _cause(os.waitstatus_to_exitcode(status)))
            self._step(Event.DIED)

    def _gone(self, process: _Process) -> None:
        self._deafen(process)
        process.channel.close()

    def close(self) -> None:
        """End the gateways, after the workers: what these wrote last is delivered first."""
        self._step(Event.STOP)
        running = [*self._retired, *([self._now] if self._now else [])]
        self._retired, self._now = [], None
        for process in running:
            self._gone(process)
        deadline = time.monotonic() + END_WITHIN
        for process in running:
            _await_end(process.pid, deadline)
        for key in [*self._ports]:
            self._drop(key)


def check(tls: Tls) -> None:
    """Try the files of `tls` in a process of its own; raises ConfigError when they are no use."""
    files = _open_files(tls)
    try:
        process = _fork(lambda: None)
        with process.channel:
            send(process.channel, Check(tls.client_ca is not None), files)
            answered = select.select([process.channel], [], [], ANSWER_WITHIN)[0]
            record = receive(process.channel) if answered else None
        _await_end(process.pid, time.monotonic() + END_WITHIN)
    except OSError as error:
        raise ConfigError(f"cannot try {tls.cert}: {error.strerror}") from error
    finally:
        for fd in files:
            os.close(fd)
    data = record[0] if record else b""
    try:
        answer = _notices.decode(data) if data else None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        answer = None
    why = answer.error if isinstance(answer, Served) else "nothing came of it"
    if why is not None:
        raise ConfigError(f"cannot use {tls.cert}: {why}")


def _client(fd: int) -> socket.socket | None:
    """Return the TCP connection on the loopback that `fd` should be, None when it is not."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError:
        os.close(fd)
        return None
    with suppress(OSError):
        kind = sock.family, sock.type
        if kind == (socket.AF_INET, socket.SOCK_STREAM) and sock.getpeername()[0] == "127.0.0.1":
            return sock
    sock.close()
    return None


def _await_end(pid: int, deadline: float) -> None:
    """Wait for a child's end, which comes by force after `deadline`."""
    pidfd = os.pidfd_open(pid)
    try:
        if not select.select([pidfd], [], [], max(0.0, deadline - time.monotonic()))[0]:
            _log.warning("the TLS gateway does not end: killed")
            os.kill(pid, signal.SIGKILL)
    finally:
        os.close(pidfd)
    os.waitpid(pid, 0)


def _cause(code: int) -> str:
    if code >= 0:
        return f"exit status {code}"
    with suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"


def _open_files(tls: Tls) -> list[int]:
    """Return the certificate, the key and the client CA, open; raises ConfigError."""
    fds: list[int] = []
    path = tls.cert
    try:
        for path in (tls.cert, tls.key, *([tls.client_ca] if tls.client_ca else [])):
            # Not to be held up by a pipe in its place.
            fds.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as error:
        for fd in fds:
            os.close(fd)
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(f"cannot read {path}: {reason}") from error
    return fds


def _fork(settle: Callable[[], object]) -> _Process:
    """Return a new gateway; raises OSError."""
    kind = socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    # No handler of ours may run in the child.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = os.fork()
        if pid == 0:
            _become_gateway(theirs, settle, blocked)
    except OSError:
        ours.close()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        theirs.close()
    return _Process(pid, ours)


def _become_gateway(
    channel: socket.socket, settle: Callable[[], object], blocked: set[int | signal.Signals]
) -> None:
    """Turn this forked child into the gateway; never returns."""
    status = _FAULT
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_IGN)  # only the master decides
        for number in (signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        _close_others({2, channel.fileno(), *logbook.fds()})
        for _ in ("stdin", "stdout"):
            os.open(os.devnull, os.O_RDWR)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        from . import gateway  # asyncio and ssl are only there

        settle()
        status = gateway.serve(channel)
    except ImportError as error:
        _log.error("the TLS gateway: %s: can user %d read Python's files?", error, os.geteuid())
    except BaseException as error:  # a gateway that falls must not become a second master
        _log.error("the TLS gateway: %s: %s", type(error).__name__, error)
        _log.debug("where it happened", exc_info=True)
    finally:
        os._exit(status & 0xFF)


def _close_others(kept: set[int]) -> None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    for fd, following in pairwise([-1, *sorted(kept), max(limit, max(kept) + 1)]):
        os.closerange(fd + 1, following)
