"""The master: makes every door, forks one worker a guest, and keeps them running.

One thread over one selector. Signal handlers only enqueue; what happens to a worker goes through
`supervision`; an idle master has no timer and no wakeups. It never touches guest memory and does
not know the vhost-user protocol.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import logging
import os
import resource
import selectors
import signal
import socket
import subprocess
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import count, pairwise
from types import FrameType
from typing import TYPE_CHECKING

import msgspec

from . import (
    __version__,
    custody,
    journal,
    ledger,
    monitor,
    porter,
    privileges,
    store,
    succession,
    systemd,
    tls,
    worker,
)
from .admission import look_up
from .alarms import Alarms
from .config import Daemon, Guest, Nested, Network, Port, PortTable, Pty, with_port, without_port
from .endpoints import Endpoint, Endpoints, Inherited, Kept, KeptEndpoints, listen_unix
from .errors import ConfigError, ConsoleError
from .health import Decoder, Health, PortHealth
from .logs import LogFiles
from .porter import Line, Porter
from .supervision import WELL_AFTER, Action, Event, State, Supervisor

if TYPE_CHECKING:
    import psutil

_log = logging.getLogger(__name__)

Run = Callable[[Guest, worker.Inheritance], int]

#: What one worker may say before everybody else has a turn.
_WORDS_AT_ONCE = 64

#: Seconds that a worker has to leave its guest to a successor.
_LEAVE_WITHIN = 5.0

#: So many workers may fall in a row before their guest's frontend is let go.
_MOST_CRASHES = 3

#: Exit status of a worker that fell over a mistake of ours (sysexits.h: EX_SOFTWARE).
_FAULT = 70

_ALWAYS = (signal.SIGTERM, signal.SIGCHLD, signal.SIGUSR1)
_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)

#: Descriptors this many guests need are asked for; each takes four and a few in its worker.
_WANTED_FILES = 1 << 16

_PIPE_READ = 1 << 16

_PR_SET_MEMORY_MERGE = 67  # linux/prctl.h


class _Terminal:
    """Standard input's settings as the user left them."""

    def __init__(self, saved: list[int | list[bytes | int]] | None = None) -> None:
        self.saved = saved
        if saved is None:
            with suppress(termios.error):
                self.saved = termios.tcgetattr(0)

    def restore(self) -> None:
        """Put them back, without waiting for output that nobody may read."""
        if self.saved is None:
            return
        # Setting them from the background would stop this process.
        before = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        try:
            with suppress(termios.error):
                if termios.tcgetattr(0) != self.saved:
                    termios.tcsetattr(0, termios.TCSANOW, self.saved)
        finally:
            signal.signal(signal.SIGTTOU, before)


class _SavedGuest(msgspec.Struct, array_like=True, kw_only=True):
    """One guest and its worker, for the next program; names as in `_Guest`."""

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

    def fds(self) -> set[int]:
        """Return all descriptors."""
        fds = {*self.journals.values(), self.ledger, *self.porter.held.values()}
        fds.update(fd for files in self.logs.values() for fd in files.values())
        fds.update(kept.fd for kept in (self.endpoints.frontend, *self.endpoints.ports.values()))
        if self.porter.channel is not None:
            fds.update((self.porter.channel.fd, *self.porter.channel.fds))
        return fds | {fd for fd in (self.pipe, self.line) if fd is not None}


class _State(msgspec.Struct, array_like=True, kw_only=True):
    """All that the next program goes on with."""

    guests: list[_SavedGuest]
    modes: list[int | list[bytes | int]] | None
    status_at: Kept | None
    visitors: list[monitor.Visitor]
    gateways: list[tuple[int, int]]
    store: store.Saved | None

    def fds(self) -> set[int]:
        """Return all descriptors."""
        fds = {fd for guest in self.guests for fd in guest.fds()}
        fds.update(fd for _, fd in self.gateways)
        fds.update(visitor.fd for visitor in self.visitors)
        if self.store is not None:
            fds.update((*self.store.files.values(), *self.store.states.values()))
        return fds if self.status_at is None else fds | {self.status_at.fd}


class _Guest:
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
        self.gateway = gateway
        self.endpoints = endpoints
        self.ledger = ledger_fd
        self.porter = porter
        self.journals: dict[int, int] = {}
        self.logs: dict[int, LogFiles] = {}
        self._kept_logs: dict[int, dict[int, int]] = {}  # of another program
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
                    columns=now.columns,
                    rows=now.rows,
                    size_by=monitor.text(now.size_by),
                    log=None if port.log is None else monitor.text(port.log.path),
                    log_failing=port.log is not None
                    and (port.id not in self.logs or (now.log is not None and now.log.failing)),
                )
            )
        return statuses

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

    def port(self, which: str) -> Port:
        """Return the port with this name or, else, this id; raises ConsoleError."""
        for port in self.guest.ports:
            if monitor.text(port.name) == which:
                return port
        for port in self.guest.ports:
            if str(port.id) == which:
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
            journal_fd = _create_journal(self.guest, port)
            undo.callback(os.close, journal_fd)
            undo.callback(self.close_port, port)
            self.open_port(port, endpoint)
            theirs = _theirs(port, endpoint)
            files = [journal_fd] if theirs is None else [journal_fd, theirs]
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

    def repeat_sizes(self) -> None:
        """Tell a new worker what its predecessors were told."""
        for order in self.sizes.values():
            with suppress(ConsoleError):  # it has just begun and cannot be behind
                self.tell(order)

    def save(self) -> _SavedGuest | None:
        """Return what the next program needs; None when it is over with this guest."""
        endpoints = self.endpoints.kept
        if endpoints is None:
            return None
        return _SavedGuest(
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
        )

    def resume(self, saved: _SavedGuest) -> None:
        """Go on with what another program had."""
        kept = {port.id for port in self.guest.ports if _same(port, saved.guest)}
        for port_id, fd in saved.journals.items():
            if port_id in kept:
                self.journals[port_id] = fd
            else:
                os.close(fd)
        self.added = {*saved.added} & kept
        self.sizes = {size.port: size for size in saved.sizes if size.port in kept}
        self.past.update({port.id: port for port in saved.past if port.id in kept})
        self.before, self.health = saved.before, saved.health
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
                with _going_on(before):
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
            log.settled(now.generation)
            most = log.described.max_bytes
            if most and now.size >= most and now.generation == log.newest:
                log.rotate()
            if now.generation < log.newest:
                self._tell_log(port_id, log)

    def _tell_log(self, port_id: int, log: LogFiles) -> None:
        # One that cannot be told is told after its next report; a successor inherits all of them.
        with suppress(ConsoleError):
            self.tell(custody.LogFile(port_id, log.newest), [log.files[log.newest]])

    def open_port(self, port: Port, endpoint: Endpoint) -> None:
        """Let clients in, unless the worker does; raises ConfigError when there is no TLS."""
        if endpoint.tls_listener is not None:
            self.gateway.serve(self.guest.name, port, endpoint.tls_listener)
        elif endpoint.fd is not None and _theirs(port, endpoint) is None:
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


def _theirs(port: Port, endpoint: Endpoint) -> int | None:
    """Return the endpoint's descriptor if it is the worker who looks for clients there."""
    return endpoint.fd if isinstance(port.backend, Pty) else None


class _Birth:
    """A worker to be forked, and its ways to the master: `heard` and `line` are our ends.

    Raises OSError, with nothing left, when there are no descriptors for them.
    """

    def __init__(self, guest: _Guest) -> None:
        self.guest = guest
        self.pid = 0
        self.error: OSError | None = None
        self.heard, self.health = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            self.line, self.custody = custody.pair()
        except OSError:
            os.close(self.heard)
            os.close(self.health)
            raise

    def close_theirs(self) -> None:
        """Close the worker's ends, which only it holds then."""
        os.close(self.health)
        self.custody.close()

    def close_ours(self) -> None:
        """Close the ends of a worker that there is not."""
        os.close(self.heard)
        self.line.close()


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


def serve(daemon: Daemon, *, run: Run = worker.run) -> int:
    """Serve `daemon` until a signal ends it or every guest is done, and return the exit status.

    0: stopped or done. 1: a guest was lost for good. Raises ConfigError, with nothing left behind,
    when a socket or another endpoint cannot be had.
    """
    tried = succession.on_trial()
    if tried is not None:
        _decode(tried)
        if daemon.user is not None:
            privileges.confine_master(look_up(daemon.user))
        _check_certificates(daemon)
        return 0
    _allow_merging()
    _raise_file_limit()
    passed = systemd.listen_fds()
    handed = succession.take_over()
    before: _State | None = None
    if handed is None:
        passed, before = _stored(passed)
    else:
        before = _decode(handed)
        for fd in before.fds():
            os.set_inheritable(fd, False)
    with ExitStack() as undo:
        return _Master(daemon, run, undo, passed, before).serve()


def _decode(handed: bytes) -> _State:
    """Return the state of an earlier program; raises ConfigError when it is another program's."""
    try:
        return msgspec.msgpack.decode(handed, type=_State)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"this program cannot go on from the one that runs: {error}") from error


def _stored(passed: list[tuple[str, int]]) -> tuple[list[tuple[str, int]], _State | None]:
    """Return what systemd passed beside its store, and the state that was there."""
    names = [name for name, _ in passed]
    try:
        found = store.Found(passed)
        guests = [
            msgspec.msgpack.decode(state, type=_SavedGuest) for state in found.states.values()
        ]
        if not guests:
            return passed, None
        fds = succession.settle([fd for _, fd in passed], found.numbers)
        passed = [*zip(names, fds, strict=True)]
        saved = store.Found(passed).saved()
    except ValueError as error:
        _log.error("what systemd kept cannot be gone on with: %s", error)
        return store.forget(passed), None
    others = [(name, fd) for name, fd in passed if not store.is_ours(name)]
    return others, _State(
        guests=guests,
        modes=None,
        status_at=None,
        visitors=[],
        gateways=[],
        store=saved,
    )


class _Master:
    def __init__(
        self,
        daemon: Daemon,
        run: Run,
        undo: ExitStack,
        passed: list[tuple[str, int]],
        before: _State | None,
    ) -> None:
        self._run = run
        self._status = 0
        self._stopping = False
        self._trial: subprocess.Popen[bytes] | None = None
        self._over = False  # another program is to take this one's place
        self._due: list[_Guest] = []  # whose workers are an earlier program's
        self._starting: list[_Guest] = []
        self._store: store.Store | None = None
        self._complete = False  # every guest is as it is to be kept
        if store.in_force():
            self._store = store.Store(None if before is None else before.store)
            undo.callback(self._store.close)
        inherited = Inherited(passed)
        undo.callback(inherited.close)
        self._signals = _enqueue_signals(undo)
        self._selector = selectors.DefaultSelector()
        undo.callback(self._selector.close)
        self._alarms = Alarms()
        self._selector.register(self._signals, selectors.EVENT_READ, self._take_signals)
        self._watchdog_s = systemd.watchdog_s()
        self._watchdog = self._alarms.new(self._watch)
        self._trial_over = self._alarms.new(self._end_trial)
        self._left = self._alarms.new(self._left_too_long)
        confine = partial(privileges.confine_gateway, all(g.sandbox for g in daemon.guests))
        gateways = [] if before is None else before.gateways
        self._gateway = tls.Gateway(self._selector, self._take_in, confine, gateways)
        undo.callback(self._gateway.close)
        known = {} if before is None else {_identity(saved.guest): saved for saved in before.guests}
        self._guests: list[_Guest] = []
        for described in daemon.guests:
            with _going_on(before), ExitStack() as mine:
                saved = known.pop(_identity(described), None)
                self._guests.append(self._prepare(described, inherited, mine, saved))
                undo.enter_context(mine.pop_all())
        for saved in known.values():
            self._guests.append(gone := self._prepare(saved.guest, inherited, undo, saved))
            self._step(gone, Event.STOP)
        inherited.close()
        self._terminal: _Terminal | None = None
        if any(isinstance(port.backend, Nested) for g in daemon.guests for port in g.ports):
            self._terminal = _Terminal(None if before is None else before.modes)
            undo.callback(self._terminal.restore)
        privileges.confine_master(None if daemon.user is None else look_up(daemon.user))
        for guest in self._guests:
            guest.open_logs(before)  # as the user who will have to open the next ones
        with _going_on(before):
            self._gateway.start()  # as whoever this is now
        self._status_at: Kept | None = None
        self._monitor = self._listen(before)
        self._complete = True
        for guest in self._guests:
            self._put(guest)
        undo.callback(self._listen_no_more)

    def _prepare(
        self, guest: Guest, inherited: Inherited, undo: ExitStack, saved: _SavedGuest | None
    ) -> _Guest:
        """Make all that a guest needs, or go on with what another program had of it."""
        if saved is None:
            _check_cpus(guest)
            endpoints = Endpoints(guest, inherited)
        else:
            guest, endpoints = _adopt(guest, inherited, saved)
        undo.callback(endpoints.close)
        try:
            ledger_fd = ledger.create(guest.name) if saved is None else saved.ledger
        except OSError as error:
            raise ConfigError(f"{guest.name}: cannot make its ledger: {error.strerror}") from error
        held = None if saved is None else saved.porter

        def changed() -> None:
            if self._complete:
                self._put(prepared)

        porter = Porter(guest.name, endpoints, self._selector, self._alarms, changed, held)
        prepared = _Guest(guest, endpoints, ledger_fd, porter, self._gateway, time.monotonic())
        undo.callback(prepared.close)
        if saved is not None:
            prepared.resume(saved)
        for port in guest.ports:
            if port.id not in prepared.journals:
                prepared.journals[port.id] = _create_journal(guest, port)
            with _going_on(saved):
                prepared.open_port(port, endpoints.ports[port.id])
        if saved is not None:
            self._go_on(prepared, saved)
        return prepared

    def _put(self, guest: _Guest) -> None:
        """Have systemd keep a guest as it is now, if it keeps anything."""
        if self._store is None or guest.kept:
            return
        saved = guest.save()
        if saved is None:
            self._store.drop(_part(guest.guest))
            return
        pipe, pid = saved.pipe, saved.pid
        saved.pid = saved.pipe = None  # no worker outlives this process
        self._store.put(_part(guest.guest), saved, saved.fds())
        saved.pipe, saved.pid = pipe, pid

    def _go_on(self, guest: _Guest, saved: _SavedGuest) -> None:
        """Have the worker that another program has forked, until it can be replaced."""
        if guest.pipe is not None and saved.heard:
            guest.heard = True
            self._selector.register(guest.pipe, selectors.EVENT_READ, lambda: self._hear(guest))
        if saved.line is not None:
            sock = socket.socket(fileno=saved.line)
            guest.line = Line(self._selector, sock, lambda: self._listen_to(guest))
            guest.porter.go_on(guest.line)
        if saved.pid is None:
            self._deafen(guest)  # after what its last worker has committed
        elif saved.behind:
            self._signal(guest, signal.SIGKILL)  # its successor is told all of it
        else:
            self._due.append(guest)

    def _listen(self, before: _State | None) -> monitor.Server | None:
        kept, visitors = (None, []) if before is None else (before.status_at, before.visitors)
        try:
            self._status_at = kept or listen_unix(monitor.own_path(os.environ))
        except (OSError, ConfigError) as error:
            _log.warning("no status can be asked for: %s", error)
            return None
        return monitor.Server(self._selector, self._status_at.fd, self._answer, visitors)

    def _listen_no_more(self) -> None:
        if self._monitor is not None:
            self._monitor.close()
        if self._status_at is not None:
            self._status_at.release()

    # The loop

    def serve(self) -> int:
        self._announce()
        self._tick()
        self._ready()
        self._watch()
        for guest in self._guests:
            self._reap(guest)  # one of another program's may have ended meanwhile
        self._replace_next()
        try:
            while any(g.supervisor.state is not State.FINISHED for g in self._guests):
                # Whoever has asked something is answered before another program begins.
                events = self._selector.select(0 if self._over else self._timeout())
                if self._over and not events:
                    self._hand_over()
                for key, _ in events:
                    key.data()
                self._tick()
        finally:
            systemd.notify("STOPPING=1")
            self._kill_all()
        return self._status

    def _ready(self) -> None:
        systemd.notify(f"READY=1\nSTATUS=guests: {len(self._guests)}")

    def _announce(self) -> None:
        """Say on stdout what nobody could guess: the names of ptys."""
        lines = [
            f"{guest.guest.name}: {name}\n"
            for guest in self._guests
            for endpoint in guest.endpoints.ports.values()
            if (name := endpoint.name).startswith("/dev/pts/")
        ]
        if lines:
            with suppress(OSError):
                os.write(1, os.fsencode("".join(lines)))

    def _timeout(self) -> float | None:
        deadlines = [
            g.supervisor.deadline for g in self._guests if g.supervisor.deadline is not None
        ]
        deadlines += [due for due in (self._alarms.due, self._gateway.deadline) if due is not None]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _tick(self) -> None:
        self._alarms.ring()
        self._gateway.tick()
        now = time.monotonic()
        for guest in self._guests:
            deadline = guest.supervisor.deadline
            if deadline is not None and deadline <= now:
                self._step(guest, Event.TIMER)
        if self._starting:
            starting, self._starting = self._starting, []
            self._start(starting)

    def _step(self, guest: _Guest, event: Event) -> None:
        before = guest.supervisor.state
        match guest.supervisor.handle(event, time.monotonic()):
            case Action.START:
                self._starting.append(guest)
            case Action.TERMINATE if self._store is not None and self._stopping:
                if guest.line is not None:
                    guest.line.send(custody.Leave(last=True))
            case Action.TERMINATE:
                self._signal(guest, signal.SIGTERM)
            case Action.KILL:
                _log.warning("%s: its worker does not end: killed", guest.guest.name)
                self._signal(guest, signal.SIGKILL)
            case Action.NOTHING:
                pass
        if guest.supervisor.state is State.FINISHED and before is not State.FINISHED:
            if self._store is not None and self._stopping:
                guest.keep()  # for the next process, to which systemd gives all of it
            else:
                guest.close_doors()
                self._put(guest)

    def _take_signals(self) -> None:
        numbers = set(os.read(self._signals, _PIPE_READ))
        if signal.SIGHUP in numbers and not os.isatty(0):
            numbers.remove(signal.SIGHUP)
            self._reload()
        if numbers.intersection(_STOPS) and not self._stopping:
            self._stopping = True
            systemd.notify("STOPPING=1")
            for guest in self._guests:
                self._step(guest, Event.STOP)
        if signal.SIGUSR1 in numbers:
            for guest in self._guests:
                guest.reopen_logs()
        if signal.SIGCHLD in numbers:
            self._gateway.reap()
            for guest in self._guests:
                self._reap(guest)
            self._judge()

    # Another program

    def _reload(self) -> None:
        """Try the command line anew; if that goes well, it takes this program's place."""
        if self._stopping or self._trial is not None:
            return
        systemd.notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            self._trial = succession.trial(self._state([]))
        except OSError as error:
            _log.error("nothing is reloaded: %s", error)
            self._ready()
            return
        self._trial_over.start(succession.TRIAL_WITHIN)

    def _end_trial(self) -> None:
        if self._trial is not None:
            self._trial.kill()

    def _judge(self) -> None:
        """See how a trial went, once it is over."""
        if self._trial is None or (status := self._trial.poll()) is None:
            return
        self._trial = None
        self._trial_over.stop()
        if status == 0:
            self._over = True
            return
        _log.error("nothing is reloaded: the command line would fail (%s)", _cause(status))
        self._ready()

    def _state(self, visitors: list[monitor.Visitor]) -> _State:
        """Return all that the next program goes on with."""
        return _State(
            guests=[each for guest in self._guests if (each := guest.save()) is not None],
            modes=None if self._terminal is None else self._terminal.saved,
            status_at=self._status_at,
            visitors=visitors,
            gateways=self._gateway.kept,
            store=None if self._store is None else self._store.save(),
        )

    def _hand_over(self) -> None:
        """Have this program begin anew in its place; return only if that cannot be."""
        self._over = False
        if self._stopping:
            return
        visitors = [] if self._monitor is None else self._monitor.hand_over()
        state = self._state(visitors)
        # What comes until the next program has handlers waits for them.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        _log.info("begins anew")
        try:
            succession.hand_over(state, state.fds())
        except OSError as error:
            _log.error("nothing is reloaded: %s", error)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        self._monitor = self._listen(state)
        self._ready()

    def _replace_next(self) -> None:
        """Have one more worker of an earlier program's replaced, when the last one was."""
        self._left.stop()
        while self._due and not any(guest.leaving for guest in self._guests):
            guest = self._due.pop(0)
            if guest.pid is None or guest.line is None:
                continue
            if not worker.can_resume(guest.porter.snapshot):
                _log.warning(
                    "%s keeps its worker: this program cannot go on from what that one has saved",
                    guest.guest.name,
                )
                continue
            with suppress(ConsoleError):
                guest.tell(custody.Leave())
            guest.leaving = True
            self._left.start(_LEAVE_WITHIN)

    def _left_too_long(self) -> None:
        for guest in self._guests:
            if guest.leaving:
                self._signal(guest, signal.SIGKILL)

    # Life

    def _watch(self) -> None:
        """Ask every worker whether it is alive, end one that is not, and tell systemd."""
        if self._watchdog_s is None:
            return
        now = time.monotonic()
        alive = True
        for guest in self._guests:
            if guest.line is None or guest.supervisor.state is not State.RUNNING:
                continue
            if guest.asked is None:
                guest.asked = now
                guest.line.send(custody.Ping())
            elif now - guest.asked >= self._watchdog_s / 2:
                _log.error("%s: its worker does not answer: killed", guest.guest.name)
                guest.hung = True
                self._signal(guest, signal.SIGKILL)
                alive = False
        if alive:
            systemd.notify("WATCHDOG=1")
        self._watchdog.start(self._watchdog_s / 4)

    def _take_in(self, name: str, port: int, client: socket.socket) -> None:
        """Hand a client that came by TLS to its guest's worker."""
        for guest in self._guests:
            over = guest.supervisor.state is State.FINISHED
            if guest.guest.name == name and port in guest.endpoints.ports and not over:
                if not guest.porter.crowded:
                    guest.porter.take_in(port, client)
                    return
                _log.warning("%s: port %d: a client was lost: too many come at once", name, port)
        client.close()

    # Workers

    def _start(self, guests: list[_Guest]) -> None:
        """Fork a worker for each of `guests`.

        All are made ready first and then forked in a row: a page that this process writes between
        two forks is one that those workers do not share.
        """
        births = []
        for guest in guests:
            try:
                births.append(_Birth(guest))
            except OSError as error:
                self._stillborn(guest, error)
        # No handler of ours may run in the child before it has its own.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            gc.collect()
            gc.freeze()  # or a collection in a worker would write to every object
            for birth in births:
                try:
                    birth.pid = os.fork()
                except OSError as error:
                    birth.error = error
                    continue
                if birth.pid == 0:
                    _become_worker(self._run, birth, blocked)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for birth in births:
            self._born(birth)

    def _stillborn(self, guest: _Guest, error: OSError) -> None:
        _log.error("%s: cannot start a worker: %s", guest.guest.name, error.strerror)
        self._step(guest, Event.DIED)

    def _born(self, birth: _Birth) -> None:
        guest = birth.guest
        birth.close_theirs()
        if birth.error is not None:
            birth.close_ours()
            self._stillborn(guest, birth.error)
            return
        guest.decoder = Decoder()
        guest.pid = birth.pid
        guest.pipe = birth.heard
        guest.line = Line(self._selector, birth.line, lambda: self._listen_to(guest))
        self._put(guest)
        guest.porter.begin(guest.line)
        guest.repeat_sizes()
        guest.heard = True
        guest.process = None
        guest.sampled = (guest.supervisor.started, 0.0)
        guest.cpu = 0.0
        self._selector.register(guest.pipe, selectors.EVENT_READ, lambda: self._hear(guest))

    def _hear(self, guest: _Guest) -> None:
        """Take what a worker reports, until its pipe runs dry."""
        if guest.pipe is None or not guest.heard:
            return
        try:
            while data := os.read(guest.pipe, _PIPE_READ):
                for record in guest.decoder.feed(data):
                    guest.health = record
                    begun = guest.supervisor.state is State.STARTING
                    guest.mind_logs()
                    self._step(guest, Event.HEALTHY)
                    if begun:
                        self._replace_next()
        except BlockingIOError:
            return
        except ValueError as error:
            _log.error("%s: its worker's reports are ignored from now: %s", guest.guest.name, error)
        # The pipe stays open: its end would tell the worker that the master is gone.
        self._selector.unregister(guest.pipe)
        guest.heard = False

    def _listen_to(self, guest: _Guest) -> None:
        """Take what a worker commits; of a dead one all that it has sent: that counts."""
        line = guest.line
        try:
            for _ in range(_WORDS_AT_ONCE) if guest.pid is not None else count():
                if line is None or (received := custody.receive_word(line.sock)) is None:
                    return
                word, fds = received
                if isinstance(word, custody.Commit):
                    guest.porter.committed(word, fds)
                else:
                    guest.asked = None
                    custody.close(fds)
        except (OSError, ValueError) as error:
            if guest.line is not None:
                guest.line.close()
                guest.line = None
                guest.porter.end()
            if not isinstance(error, ConnectionResetError):
                _log.error("%s: its worker cannot be followed: %s", guest.guest.name, error)
                self._signal(guest, signal.SIGKILL)

    def _deafen(self, guest: _Guest) -> None:
        if guest.pipe is not None:
            if guest.heard:
                self._selector.unregister(guest.pipe)
            os.close(guest.pipe)
            guest.pipe = None
        if guest.line is not None:
            self._listen_to(guest)
        if guest.line is not None:
            guest.line.close()
            guest.line = None
        guest.porter.end()

    def _reap(self, guest: _Guest) -> None:
        if guest.pid is None:
            return
        pid, status = os.waitpid(guest.pid, os.WNOHANG)
        if pid == 0:
            return
        guest.pid = None
        guest.process = None
        self._hear(guest)
        self._deafen(guest)
        guest.retire_counters()
        if self._terminal is not None:
            self._terminal.restore()
        code = os.waitstatus_to_exitcode(status)
        left, guest.leaving = guest.leaving, False
        guest.asked = None
        if left and code in (worker.HANDOVER, -signal.SIGKILL):
            self._step(guest, Event.LEFT)
            return
        if code == 0 or guest.supervisor.state is State.STOPPING:
            self._step(guest, Event.DONE)
            return
        guest.died = _cause(code)
        _log.error("%s: its worker died: %s", guest.guest.name, guest.died)
        self._look_into(guest, code)
        self._step(guest, Event.DIED)

    def _look_into(self, guest: _Guest, code: int) -> None:
        """Let the frontend go that a worker cannot serve."""
        if time.monotonic() - guest.supervisor.started > WELL_AFTER:
            guest.crashes = 0
        if code != -signal.SIGKILL or guest.hung:  # else somebody wanted it
            guest.crashes += 1
        guest.hung = False
        if code == -signal.SIGBUS:
            self._lose(guest, "it shrank its memory")
        elif guest.crashes >= _MOST_CRASHES:
            self._lose(guest, f"{guest.crashes} workers fell in a row")

    def _lose(self, guest: _Guest, why: str) -> None:
        guest.crashes = 0
        if guest.porter.frontend is None and not guest.porter.snapshot:
            return
        _log.error("%s: frontend dropped: %s", guest.guest.name, why)
        if not guest.porter.listening:
            self._status = 1
        guest.porter.lose()

    def _signal(self, guest: _Guest, number: signal.Signals) -> None:
        # A process id stays ours until we reap it.
        if guest.pid is not None:
            os.kill(guest.pid, number)

    def _kill_all(self) -> None:
        """Leave no worker behind, whatever ended the loop."""
        for guest in self._guests:
            self._signal(guest, signal.SIGKILL)
            if guest.pid is not None:
                os.waitpid(guest.pid, 0)
                guest.pid = None
            self._deafen(guest)

    # Commands

    def _answer(self, request: monitor.Request) -> monitor.Status | monitor.Done:
        if isinstance(request, monitor.StatusRequest):
            return self._status_now()
        guest = self._find(request.guest)
        name = guest.guest.name
        match request:
            case monitor.PortAdd():
                port = guest.add_port(request.port)
                endpoint = guest.endpoints.ports[port.id].name
                said = f"port {port.id} of {name}, {port.name}, is at {endpoint}"
            case monitor.PortRemove():
                port = guest.port(request.port)
                guest.remove_port(port)
                said = f"port {port.id} of {name}, {port.name}, is gone"
            case monitor.Resize(columns=columns, rows=rows):
                port = guest.port(request.port)
                guest.resize(port, columns, rows)
                size = f"is {columns}x{rows}" if columns else "has its clients' size"
                said = f"port {port.id} of {name}, {port.name}, {size}"
        self._put(guest)
        _log.info("%s", said)
        return monitor.Done(monitor.text(said))

    def _find(self, name: str) -> _Guest:
        for guest in self._guests:
            if monitor.text(guest.guest.name) == name:
                return guest
        raise ConsoleError(f"there is no guest {name} here")

    def _status_now(self) -> monitor.Status:
        now = time.monotonic()
        return monitor.Status(
            version=__version__, guests=[self._describe(guest, now) for guest in self._guests]
        )

    def _describe(self, guest: _Guest, now: float) -> monitor.GuestStatus:
        alive = guest.pid is not None
        rss, cpu = _sample(guest, now)
        total = guest.total()
        return monitor.GuestStatus(
            name=monitor.text(guest.guest.name),
            socket=monitor.text(guest.guest.socket_path or f"fd {guest.guest.fd}"),
            state=guest.supervisor.state,
            daemon=os.getpid(),
            worker=guest.pid,
            frontend=total.frontend,
            uptime=round(now - guest.supervisor.started, 3) if alive else None,
            restarts=max(0, guest.supervisor.restarts),
            died=guest.died or None,
            rss=rss,
            cpu=cpu,
            sessions=total.sessions,
            kicks=total.kicks,
            calls=total.calls,
            chains=total.chains,
            refused=total.refused,
            broken=total.broken,
            ignored=total.ignored,
            max_ports=guest.guest.max_ports,
            privileges=guest.health.privileges if alive else None,
            ports=guest.ports(),
        )


def _identity(guest: Guest) -> str:
    """Return by what a guest is known to the next program: where its frontend connects."""
    return f"fd {guest.fd}" if guest.socket_path is None else guest.socket_path


def _part(guest: Guest) -> str:
    """Return the name of a guest's part in the store."""
    return hashlib.sha256(_identity(guest).encode(errors="surrogateescape")).hexdigest()


def _same(port: Port, guest: Guest) -> bool:
    """Say whether `guest` has that port, too: a journal is its number's and its name's."""
    return any((port.id, port.name) == (other.id, other.name) for other in guest.ports)


def _adopt(guest: Guest, inherited: Inherited, saved: _SavedGuest) -> tuple[Guest, Endpoints]:
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
        _check_cpus(guest)
        return guest, Endpoints(guest, inherited, saved.endpoints)
    except ConfigError as error:
        _log.error("%s goes on as it was: %s", guest.name, error)
        return saved.guest, Endpoints(saved.guest, inherited, saved.endpoints)


@contextmanager
def _going_on(before: object | None) -> Iterator[None]:
    """Only say what cannot be had when there is something `before` that has to go on."""
    try:
        yield
    except ConfigError as error:
        if before is None:
            raise
        _log.error("%s", error)


def _check_certificates(daemon: Daemon) -> None:
    backends = [port.backend for guest in daemon.guests for port in guest.ports]
    for files in {each.tls for each in backends if isinstance(each, Network) and each.tls}:
        tls.check(files)


def _check_cpus(guest: Guest) -> None:
    allowed = os.sched_getaffinity(0)
    if missing := set(guest.cpus) - allowed:
        raise ConfigError(
            f"{guest.name} cannot be served on CPU {min(missing)}: "
            f"this daemon may use {', '.join(map(str, sorted(allowed)))}"
        )


def _create_journal(guest: Guest, port: Port) -> int:
    try:
        return journal.create(f"{guest.name}:{port.id}", port.output_bytes, port.input_bytes)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{guest.name}: cannot make the journal of port {port.id}: {reason}"
        ) from error


def _sample(guest: _Guest, now: float) -> tuple[int | None, float | None]:
    """Return the worker's resident bytes and its processor share since the last sample."""
    if guest.pid is None:
        return None, None
    try:
        import psutil  # only who asks for a status pays for it
    except (ImportError, OSError):  # no descriptor left to load it with
        return None, None
    try:
        if guest.process is None:
            guest.process = psutil.Process(guest.pid)
        with guest.process.oneshot():
            rss = guest.process.memory_info().rss
            times = guest.process.cpu_times()
    except (psutil.Error, OSError):
        return None, None
    then, used = guest.sampled
    total = times.user + times.system
    # The kernel counts in ticks of 10 ms: a shorter span would say 0 or 100 %.
    if now - then >= 0.1:
        guest.cpu = round(100 * (total - used) / (now - then), 1)
        guest.sampled = (now, total)
    return rss, guest.cpu


def _cause(code: int) -> str:
    """Say what an exit code (negative: a signal) means."""
    if code >= 0:
        return f"exit status {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    why: dict[int, str] = {
        signal.SIGBUS: " (the frontend shrank its memory)",
        signal.SIGSYS: " (a system call that no worker makes: somebody may have taken it over)",
    }
    return name + why.get(-code, "")


def _allow_merging() -> None:
    """Let the kernel keep one copy of what is the same in all workers, where the host wants that.

    Most of a worker's memory is: pages it only counted references in. For a host that merges pages
    (KSM, /sys/kernel/mm/ksm/run) every process must still say that it may be looked at, as QEMU
    does for its guests' memory. Linux before 6.4 knows no such word, and nothing changes.
    """
    ctypes.CDLL(None).prctl(_PR_SET_MEMORY_MERGE, 1, 0, 0, 0)


def _raise_file_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _WANTED_FILES if hard == resource.RLIM_INFINITY else min(hard, _WANTED_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _ignore(_number: int, _frame: FrameType | None) -> None:
    """Stand in for a signal that the wakeup descriptor reports."""


def _enqueue_signals(undo: ExitStack) -> int:
    """Return a descriptor that yields the number of each signal the master cares for."""
    read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    undo.callback(os.close, read)
    undo.callback(os.close, write)
    undo.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(write, warn_on_full_buffer=False))
    wanted = {*_STOPS, *_ALWAYS}
    for number in wanted:
        # nohup and a shell's `&` have some of them ignored: they stay so.
        if signal.getsignal(number) is not signal.SIG_IGN or number in _ALWAYS:
            signal.signal(number, _ignore)
            # Told to end once more while it ends, the daemon still ends as it was going to.
            undo.callback(signal.signal, number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, wanted)
    return read


def _become_worker(run: Run, birth: _Birth, blocked: set[int | signal.Signals]) -> None:
    """Turn this forked child into its guest's worker; never returns."""
    guest = birth.guest
    status = _FAULT
    try:
        signal.set_wakeup_fd(-1)
        for number in (*_STOPS, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)  # only the master decides
        for number in (signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        porter = guest.porter
        ports = tuple(
            worker.PortFiles(
                guest.journals[port.id],
                _theirs(port, guest.endpoints.ports[port.id]),
                guest.logs[port.id].files if port.id in guest.logs else {},
            )
            for port in guest.guest.ports
        )
        heirlooms = worker.Inheritance(
            ports=ports,
            ledger=guest.ledger,
            health=birth.health,
            custody=birth.custody.detach(),
            snapshot=porter.snapshot,
            held=porter.held(),
            newest=porter.newest,
            serial=porter.serial,
            lost=porter.lost,
            listening=porter.listening,
        )
        kept = {0, 1, 2, guest.ledger, birth.health, heirlooms.custody, *heirlooms.held.values()}
        kept.update(fd for port in ports for fd in (port.journal, port.endpoint) if fd is not None)
        kept.update(fd for port in ports for fd in port.logs.values())
        _close_others(kept)
        if not any(isinstance(port.backend, Nested) for port in guest.guest.ports):
            _leave_terminal()
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        _settle(guest.guest)
        status = run(guest.guest, heirlooms)
    except BaseException as error:  # a worker that falls must not become a second master
        _log.error("%s: %s: %s", guest.guest.name, type(error).__name__, error)
        _log.debug("%s: where it happened", guest.guest.name, exc_info=True)
    finally:
        os._exit(status & 0xFF)


def _leave_terminal() -> None:
    """Have nothing of the terminal's but what the log is written to."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1):
        os.dup2(null, fd)
    os.close(null)


def _settle(guest: Guest) -> None:
    """Have this worker run where it shall; CPUs may have been taken away since that was checked."""
    if guest.cpus:
        try:
            os.sched_setaffinity(0, guest.cpus)
        except OSError as error:
            _log.warning("%s: cannot be kept to its CPUs: %s", guest.name, error.strerror)


def _close_others(kept: set[int]) -> None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    for fd, following in pairwise([*sorted(kept), max(limit, max(kept) + 1)]):
        os.closerange(fd + 1, following)
