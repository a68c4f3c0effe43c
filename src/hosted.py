"""A guest as the master has it: everything here outlives its workers."""

from __future__ import annotations

import hashlib
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import zip_longest
from typing import TYPE_CHECKING

import msgspec

from . import custody, journal, ledger, monitor, porter, tls
from .config import Guest, Port, PortTable, Pty, with_port, without_port
from .endpoints import Endpoint, Endpoints, Inherited, KeptEndpoints
from .errors import ConfigError, ConsoleError
from .events import About
from .health import SERVICE_NS, Decoder, Health, PortHealth
from .logs import LogFiles
from .porter import Line, Porter
from .supervision import State, Supervisor
from .worker import can_resume

if TYPE_CHECKING:
    import psutil

_log = logging.getLogger(__name__)


class SavedGuest(msgspec.Struct, array_like=True, kw_only=True):
    """One guest and its worker, for the next program; names as in `Hosted`."""

    guest: Guest
    added: list[int]
    endpoints: KeptEndpoints
    journals: dict[int, int]
    ledger: int
    logs: dict[int, dict[int, int]]
    sizes: list[custody.Resize]
    past: list[PortHealth]
    before: Health
    health: Health
    supervisor: tuple[str, float | None, float, int, int]
    crashes: int
    porter: porter.Saved
    pid: int | None
    pipe: int | None
    heard: bool
    decoder: bytes
    line: int | None
    behind: bool
    cpu_before: float = 0.0

    def fds(self) -> set[int]:
        """Return all descriptors."""
        fds = {*self.journals.values(), self.ledger, *self.porter.held.values()}
        fds.update(fd for files in self.logs.values() for fd in files.values())
        fds.update(kept.fd for kept in (self.endpoints.frontend, *self.endpoints.ports.values()))
        if self.porter.channel is not None:
            fds.update((self.porter.channel.fd, *self.porter.channel.fds))
        return fds | {fd for fd in (self.pipe, self.line) if fd is not None}


class Hosted:
    """One guest as the master sees it; everything here outlives its workers.

    `journals`, `logs`, `past` (counters of workers that are gone) and `sizes` (given by command)
    are by the port's id. `added` are the ids of ports that commands added. `crashes` counts workers
    in a row that fell by themselves soon after they began. `leaving` says that the worker was told
    to leave its guest to a successor, `asked` when it was asked whether it is alive, None once it
    said so, `hung` that it never did.
    """

    def __init__(
        self,
        guest: Guest,
        endpoints: Endpoints,
        ledger_fd: int,
        porter: Porter,
        gateway: tls.Gateway,
        now: float,
    ) -> None:
        self.guest = guest
        self.log = About(_log, guest.name)
        self.gateway = gateway
        self.endpoints = endpoints
        self.ledger = ledger_fd
        self.porter = porter
        self.journals: dict[int, int] = {}
        self.logs: dict[int, LogFiles] = {}
        self._kept_logs: dict[int, dict[int, int]] = {}  # of another program
        self._taken_over: set[int] = set()  # ports that another program had
        self._noted: dict[int, int] = {}  # how many entries of each log's index are known
        self.sizes: dict[int, custody.Resize] = {}
        self.supervisor = Supervisor(now)
        self.crashes = 0
        self.died = ""  # why the last worker did that fell
        self.added: set[int] = set()
        self.leaving = False
        self.kept = False
        self.hung = False
        self.asked: float | None = None
        self.pid: int | None = None
        self.pipe: int | None = None
        self.line: Line | None = None
        self.heard = False  # the pipe's reports are read
        self.decoder = Decoder()
        self.health = Health()
        self.before = Health()
        self.past = {port.id: _no_health(port) for port in guest.ports}
        self.process: psutil.Process | None = None
        self.sampled = (now, 0.0)  # when, and the processor seconds used until then
        self.cpu = 0.0
        self.cpu_before = 0.0  # seconds that workers used which are gone

    def retire_counters(self) -> None:
        """Add a dead worker's counters to those before it: a successor counts from 0."""
        for port in self.guest.ports:
            _add(self.past[port.id], self._now(port))
        _add_guest(self.before, self.health)
        self.health = Health()

    def _now(self, port: Port) -> PortHealth:
        """Return what the worker said of `port`, not of one that had its id before."""
        for now in self.health.ports:
            if (now.id, now.name) == (port.id, port.name):
                return now
        return _no_health(port)

    def total(self) -> Health:
        """Return the counters over all workers."""
        total = Health(frontend=self.porter.frontend, refused=self.porter.refused)
        _add_guest(total, self.before)
        _add_guest(total, self.health)
        return total

    def ports(self) -> list[monitor.PortStatus]:
        """Return every port's state and its counters over all workers."""
        statuses = []
        for port in self.guest.ports:
            now = self._now(port)
            total = _no_health(port)
            _add(total, now)
            _add(total, self.past[port.id])
            statuses.append(
                monitor.PortStatus(
                    id=port.id,
                    name=monitor.text(port.name),
                    endpoint=monitor.text(self.endpoints.ports[port.id].name),
                    console=port.console,
                    overflow=port.overflow,
                    state=now.state,
                    open=now.open,
                    host_open=now.host_open,
                    held=now.held,
                    readers=now.readers,
                    output=total.output,
                    input=total.input,
                    missed=total.missed,
                    discarded=total.discarded,
                    stalls=total.stalls,
                    lag=now.lag,
                    columns=now.columns,
                    rows=now.rows,
                    size_by=monitor.text(now.size_by),
                    log=None if port.log is None else monitor.text(port.log.path),
                    log_failing=port.log is not None
                    and (port.id not in self.logs or (now.log is not None and now.log.failing)),
                )
            )
        return statuses

    def describe(self, now: float) -> monitor.GuestStatus:
        """Return what `status` says of it."""
        alive = self.pid is not None
        rss, cpu, cpu_seconds = self._sample(now)
        total = self.total()
        return monitor.GuestStatus(
            name=monitor.text(self.guest.name),
            socket=monitor.text(self.guest.socket_path or f"fd {self.guest.fd}"),
            state=self.supervisor.state,
            daemon=os.getpid(),
            worker=self.pid,
            frontend=total.frontend,
            uptime=round(now - self.supervisor.started, 3) if alive else None,
            restarts=max(0, self.supervisor.restarts),
            died=self.died or None,
            rss=rss,
            cpu=cpu,
            sessions=total.sessions,
            kicks=total.kicks,
            calls=total.calls,
            chains=total.chains,
            refused=total.refused,
            broken=total.broken,
            ignored=total.ignored,
            max_ports=self.guest.max_ports,
            privileges=self.health.privileges if alive else None,
            ports=self.ports(),
            cpu_seconds=cpu_seconds,
            services=monitor.Services(
                bounds=[bound / 1e9 for bound in SERVICE_NS],
                counts=_whole(total.services),
                seconds=total.service_ns / 1e9,
            ),
        )

    def _sample(self, now: float) -> tuple[int | None, float | None, float | None]:
        """Return how much the worker uses, None each where that cannot be known.

        Its resident bytes, its processor share since the last sample, and all workers' seconds.
        """
        if self.pid is None:
            return None, None, round(self.cpu_before, 6)
        try:
            import psutil  # only who asks for a status pays for it
        except (ImportError, OSError):  # no descriptor left to load it with
            return None, None, None
        try:
            if self.process is None:
                self.process = psutil.Process(self.pid)
            with self.process.oneshot():
                rss = self.process.memory_info().rss
                times = self.process.cpu_times()
        except (psutil.Error, OSError):
            return None, None, None
        then, used = self.sampled
        total = times.user + times.system
        # The kernel counts in ticks of 10 ms: a shorter span would say 0 or 100 %.
        if now - then >= 0.1:
            self.cpu = round(100 * (total - used) / (now - then), 1)
            self.sampled = (now, total)
        return rss, self.cpu, round(self.cpu_before + total, 6)

    def tell(self, order: custody.Order, fds: Sequence[int] = ()) -> None:
        """Send an order to the worker; raises ConsoleError when there is none or it is stuck."""
        alive = self.supervisor.state in (State.STARTING, State.RUNNING)
        if self.line is None or not alive:
            raise ConsoleError(f"{self.guest.name}: its worker is down, see status")
        if self.line.behind:
            raise ConsoleError(f"{self.guest.name}: its worker takes no orders")
        try:
            self.line.send(order, fds)
        except OSError as error:  # such as too many descriptors on their way (unix(7))
            reason = (error.strerror or str(error)).lower()
            raise ConsoleError(f"{self.guest.name}: its worker cannot be told: {reason}") from error

    def port(self, which: str | int) -> Port:
        """Return the port with this name or, else, this id; raises ConsoleError."""
        for port in self.guest.ports:
            if monitor.text(port.name) == which:
                return port
        for port in self.guest.ports:
            if which in (port.id, str(port.id)):
                return port
        raise ConsoleError(f"{self.guest.name} has no port {which}")

    def add_port(self, table: PortTable) -> Port:
        """Make the endpoint and the journal of another port and hand them to the worker.

        Raises ConsoleError; nothing is left then.
        """
        more, port = with_port(self.guest, table)
        with ExitStack() as undo:
            endpoint = Endpoint(port)
            undo.callback(endpoint.close)
            journal_fd = create_journal(self.guest, port)
            undo.callback(os.close, journal_fd)
            undo.callback(self.close_port, port)
            self.open_port(port, endpoint)
            given = theirs(port, endpoint)
            files = [journal_fd] if given is None else [journal_fd, given]
            log = None if port.log is None else LogFiles(port.log)
            if log is not None:
                undo.callback(log.close)
                files += log.files.values()
            self.tell(custody.AddPort(port, [] if log is None else [*log.files]), files)
            undo.pop_all()
        self.guest = more
        self.added.add(port.id)
        self.endpoints.ports[port.id] = endpoint
        self.journals[port.id] = journal_fd
        if log is not None:
            self.logs[port.id] = log
        self.past[port.id] = _no_health(port)
        return port

    def remove_port(self, port: Port) -> None:
        """Take a port away for good, with its endpoint and its journal; raises ConsoleError."""
        less = without_port(self.guest, port.id)
        self.tell(custody.RemovePort(port.id))
        self.guest = less
        self.added.discard(port.id)
        self.close_port(port)
        self.endpoints.ports.pop(port.id).close()
        os.close(self.journals.pop(port.id))
        if (log := self.logs.pop(port.id, None)) is not None:
            log.close()
        self._taken_over.discard(port.id)
        self._noted.pop(port.id, None)
        del self.past[port.id]
        self.sizes.pop(port.id, None)

    def resize(self, port: Port, columns: int, rows: int) -> None:
        """Have a console port be of this size, also by a successor; raises ConsoleError."""
        if not port.console:
            raise ConsoleError(
                f"port {port.name} of {self.guest.name} is no console: it has no size"
            )
        if bool(columns) != bool(rows):
            raise ConsoleError(f"{columns}x{rows} is no size: nothing fits in it")
        order = custody.Resize(port.id, columns, rows)
        self.tell(order)
        self.sizes[port.id] = order

    def attach(self, request: monitor.Attach, fds: list[int]) -> monitor.Done:
        """Hand the connection that came with a request to the worker; raises ConsoleError."""
        port = self._console() if request.port is None else self.port(request.port)
        if len(fds) != 1 or not _is_pair(fds[0]):
            raise ConsoleError("to attach, one end of a SOCK_SEQPACKET pair has to come along")
        if not self.resumable:
            raise ConsoleError(
                f"{self.guest.name} is still served by an older program, which knows no attaching:"
                f" after `kill -9 {self.pid}` a new one serves, and the frontend has to come again"
            )
        if self.supervisor.state is State.FINISHED or self.porter.crowded:
            raise ConsoleError(f"{self.guest.name}: nobody can attach now")
        told = custody.Attach(
            name="".join(char if char.isprintable() else "?" for char in request.name),
            write=request.write,
            replay=request.replay,
            since=request.since,
            journal=request.journal,
            columns=request.columns,
            rows=request.rows,
            look=request.look,
        )
        self.porter.take_in(port.id, socket.socket(fileno=fds.pop()), told)
        return monitor.Done(f"attached to {self.guest.name}, port {port.id}")

    @property
    def resumable(self) -> bool:
        """Whether a worker of this program can go on with what the last one has left."""
        return ledger.is_known(self.ledger) and can_resume(self.porter.snapshot)

    def begin_anew(self) -> None:
        """Forget what the last worker has left, but for where the logs are; raises OSError."""
        made = ledger.create(self.guest.name)
        try:
            ledger.copy_logs(self.ledger, made, self._taken_over & self.logs.keys())
        except OSError:
            os.close(made)
            raise
        os.close(self.ledger)
        self.ledger = made
        self.porter.forget()

    def _console(self) -> Port:
        """Return the port that people mean who name none."""
        consoles = [port for port in self.guest.ports if port.console]
        for port in consoles or self.guest.ports:
            return port
        raise ConsoleError(f"{self.guest.name} has no port")

    def repeat_sizes(self) -> None:
        """Tell a new worker what its predecessors were told."""
        for order in self.sizes.values():
            with suppress(ConsoleError):  # it has just begun and cannot be behind
                self.tell(order)

    def save(self) -> SavedGuest | None:
        """Return what the next program needs; None when it is over with this guest."""
        endpoints = self.endpoints.kept
        if endpoints is None:
            return None
        return SavedGuest(
            guest=self.guest,
            added=[*self.added],
            endpoints=endpoints,
            journals=self.journals,
            ledger=self.ledger,
            logs={port_id: log.files for port_id, log in self.logs.items()},
            sizes=[*self.sizes.values()],
            past=[*self.past.values()],
            before=self.before,
            health=self.health,
            supervisor=self.supervisor.save(),
            crashes=self.crashes,
            porter=self.porter.save(),
            pid=self.pid,
            pipe=self.pipe,
            heard=self.heard,
            decoder=self.decoder.rest,
            line=None if self.line is None else self.line.sock.fileno(),
            behind=self.line is not None and self.line.behind,
            cpu_before=self.cpu_before,
        )

    def resume(self, saved: SavedGuest) -> None:
        """Go on with what another program had."""
        kept = {port.id for port in self.guest.ports if _same(port, saved.guest)}
        for port_id, fd in saved.journals.items():
            if port_id in kept:
                self.journals[port_id] = fd
            else:
                os.close(fd)
        self._taken_over = kept
        self.added = {*saved.added} & kept
        self.sizes = {size.port: size for size in saved.sizes if size.port in kept}
        self.past.update({port.id: port for port in saved.past if port.id in kept})
        self.before, self.health = saved.before, saved.health
        self.cpu_before = saved.cpu_before
        if saved.pid is not None:
            self.supervisor = Supervisor.resume(saved.supervisor)
        self.crashes = saved.crashes
        for port_id, files in saved.logs.items():
            if port_id in kept:
                self._kept_logs[port_id] = files
            else:
                custody.close(files.values())
        self.pid, self.pipe = saved.pid, saved.pipe
        self.decoder = Decoder(saved.decoder)

    def open_logs(self, before: object | None) -> None:
        """Open every port's log; raises ConfigError unless there was something `before`."""
        for port in self.guest.ports:
            files = self._kept_logs.pop(port.id, None)
            if port.log is not None:
                with going_on(before):
                    self.logs[port.id] = log = LogFiles(port.log, files)
                    if files is not None and log.reopen():
                        self._tell_log(port.id, log)
            elif files is not None:
                custody.close(files.values())

    def reopen_logs(self) -> None:
        """Have what lies at the logs' paths now be written."""
        for port_id, log in self.logs.items():
            if log.reopen():
                self._tell_log(port_id, log)

    def mind_logs(self) -> None:
        """Begin another file where one is full; see to it that the worker writes the newest."""
        for port_id, log in self.logs.items():
            now = next((port.log for port in self.health.ports if port.id == port_id), None)
            if now is None:
                continue
            self._collect_times(port_id, log)
            log.settled(now.generation)
            most = log.described.max_bytes
            if most and now.size >= most and now.generation == log.newest:
                log.rotate()
            if now.generation < log.newest:
                self._tell_log(port_id, log)
            log.mind()

    def age_logs(self) -> float | None:
        """Begin another file where one's time is over; return when the next one's is, in seconds.

        None for never.
        """
        for port_id, log in self.logs.items():
            if log.grow_old():
                self._tell_log(port_id, log)
        return min(
            (left for log in self.logs.values() if (left := log.left) is not None), default=None
        )

    def reap_logs(self) -> None:
        """See which old files are compressed, after SIGCHLD, and go on with others."""
        for log in self.logs.values():
            log.reap()
            log.mind()

    def stop_logs(self) -> None:
        """Leave nobody at work on old files, for now."""
        for log in self.logs.values():
            log.stop()

    def collect_times(self) -> None:
        """Have all indices know what the worker has noted."""
        for port_id, log in self.logs.items():
            self._collect_times(port_id, log)

    def _collect_times(self, port_id: int, log: LogFiles) -> None:
        if log.described.indexed:
            known = self._noted.get(port_id, 0)
            self._noted[port_id], entries = ledger.log_entries(self.ledger, port_id, known)
            if entries:
                log.note(entries, journal.number(self.journals[port_id]))

    def _tell_log(self, port_id: int, log: LogFiles) -> None:
        # One that cannot be told is told after its next report; a successor inherits all of them.
        with suppress(ConsoleError):
            self.tell(custody.LogFile(port_id, log.newest), [log.files[log.newest]])

    def open_port(self, port: Port, endpoint: Endpoint) -> None:
        """Let clients in, unless the worker does; raises ConfigError when there is no TLS."""
        if endpoint.tls_listener is not None:
            self.gateway.serve(self.guest.name, port, endpoint.tls_listener)
        elif endpoint.fd is not None and theirs(port, endpoint) is None:
            self.porter.open_port(port.id, endpoint.fd, endpoint.door)

    def close_port(self, port: Port) -> None:
        """Let nobody else in."""
        self.gateway.forget(self.guest.name, port.id)
        self.porter.close_port(port.id)

    def keep(self) -> None:
        """Leave all as it is: nothing is closed before this process ends."""
        self.endpoints.keep()
        self.kept = True

    def close_doors(self) -> None:
        """Let nobody in any more: the guest is over."""
        for port in self.guest.ports:
            self.gateway.forget(self.guest.name, port.id)
        self.porter.close()
        self.endpoints.close()

    def close(self) -> None:
        """Close the doors and give up what was kept for a worker."""
        if self.kept:
            return
        self.porter.close()
        for fd in self.journals.values():
            os.close(fd)
        self.journals.clear()
        for log in self.logs.values():
            log.close()
        os.close(self.ledger)


def _is_pair(fd: int) -> bool:
    sock = socket.socket(fileno=fd)
    try:
        sock.getpeername()
        return (sock.family, sock.type) == (socket.AF_UNIX, socket.SOCK_SEQPACKET)
    except OSError:  # it has no other end
        return False
    finally:
        sock.detach()


def theirs(port: Port, endpoint: Endpoint) -> int | None:
    """Return the endpoint's descriptor if it is the worker who looks for clients there."""
    return endpoint.fd if isinstance(port.backend, Pty) else None


def _no_health(port: Port) -> PortHealth:
    return PortHealth(id=port.id, name=port.name)


def _add(total: PortHealth, more: PortHealth) -> None:
    # The journal goes on where a dead worker left it; everything else is counted from 0 again.
    total.output = max(total.output, more.output)
    total.input = max(total.input, more.input)
    total.missed += more.missed
    total.discarded += more.discarded
    total.stalls += more.stalls


def _add_guest(total: Health, more: Health) -> None:
    total.sessions += more.sessions
    total.kicks += more.kicks
    total.calls += more.calls
    total.chains += more.chains
    total.refused += more.refused
    total.broken += more.broken
    total.ignored += more.ignored
    total.services = [*map(sum, zip_longest(total.services, more.services, fillvalue=0))]
    total.service_ns += more.service_ns


def _whole(services: list[int]) -> list[int]:
    """Return a count for every bucket, also of workers of a version that had more or fewer."""
    most = len(SERVICE_NS)
    return [*services[:most], *[0] * (most - len(services)), sum(services[most:])]


def identity(guest: Guest) -> str:
    """Return by what a guest is known to the next program: where its frontend connects."""
    return f"fd {guest.fd}" if guest.socket_path is None else guest.socket_path


def part(guest: Guest) -> str:
    """Return the name of a guest's part in the store."""
    return hashlib.sha256(identity(guest).encode(errors="surrogateescape")).hexdigest()


def _same(port: Port, guest: Guest) -> bool:
    """Say whether `guest` has that port, too: a journal is its number's and its name's."""
    return any((port.id, port.name) == (other.id, other.name) for other in guest.ports)


def adopt(guest: Guest, inherited: Inherited, saved: SavedGuest) -> tuple[Guest, Endpoints]:
    """Return a guest as it is to be, with the ports that commands added, and its endpoints.

    As it was, where it cannot be as it is to be.
    """
    for port in saved.guest.ports:
        free = port.id < guest.max_ports and all(
            port.id != other.id and port.name != other.name for other in guest.ports
        )
        if port.id in saved.added and free:
            guest = msgspec.structs.replace(guest, ports=(*guest.ports, port))
    try:
        check_cpus(guest)
        return guest, Endpoints(guest, inherited, saved.endpoints)
    except ConfigError as error:
        _log.error("%s goes on as it was: %s", guest.name, error)
        return saved.guest, Endpoints(saved.guest, inherited, saved.endpoints)


@contextmanager
def going_on(before: object | None) -> Iterator[None]:
    """Only say what cannot be had when there is something `before` that has to go on."""
    try:
        yield
    except ConfigError as error:
        if before is None:
            raise
        _log.error("%s", error)


def check_cpus(guest: Guest) -> None:
    """Raise ConfigError when this process may not use a CPU that the guest is to be served on."""
    allowed = os.sched_getaffinity(0)
    if missing := set(guest.cpus) - allowed:
        raise ConfigError(
            f"{guest.name} cannot be served on CPU {min(missing)}: "
            f"this daemon may use {', '.join(map(str, sorted(allowed)))}"
        )


def create_journal(guest: Guest, port: Port) -> int:
    """Return a new journal's descriptor; raises ConfigError when there is no memory for it."""
    try:
        return journal.create(f"{guest.name}:{port.id}", port.output_bytes, port.input_bytes)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{guest.name}: cannot make the journal of port {port.id}: {reason}"
        ) from error
