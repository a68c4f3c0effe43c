"""The master: makes every door, forks one worker a guest, and keeps them running.

One thread over one selector. Signal handlers only enqueue; what happens to a worker goes through
`supervision`; an idle master has no timer and no wakeups. It never touches guest memory and does
not know the vhost-user protocol.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import resource
import selectors
import signal
import socket
import subprocess
import termios
import time
from contextlib import ExitStack, suppress
from functools import partial
from itertools import count
from types import FrameType

import msgspec

from . import (
    __version__,
    custody,
    ledger,
    monitor,
    privileges,
    reception,
    store,
    succession,
    systemd,
    tls,
    worker,
)
from .admission import look_up
from .alarms import Alarms
from .birth import STOPS, Birth, Run, become_worker
from .config import Daemon, Guest, Nested, Network
from .endpoints import Endpoints, Inherited, Kept, listen_unix
from .errors import ConfigError, ConsoleError
from .events import Happening
from .health import Decoder
from .hosted import (
    Hosted,
    SavedGuest,
    adopt,
    check_cpus,
    create_journal,
    going_on,
    identity,
    part,
)
from .porter import Line, Porter
from .supervision import WELL_AFTER, Action, Event, State

_log = logging.getLogger(__name__)

#: What one worker may say before everybody else has a turn.
_WORDS_AT_ONCE = 64

#: The ages of logs are looked at so often at least: somebody may set the clock.
_AGES_S = 60.0

#: Seconds until a log that could not be begun anew is tried again.
_AGAIN_S = 1.0

#: Seconds that a worker has to leave its guest to a successor.
_LEAVE_WITHIN = 5.0

#: So many workers may fall in a row before their guest's frontend is let go.
_MOST_CRASHES = 3

_ALWAYS = (signal.SIGTERM, signal.SIGCHLD, signal.SIGUSR1)

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


class _State(msgspec.Struct, array_like=True, kw_only=True):
    """All that the next program goes on with."""

    guests: list[SavedGuest]
    modes: list[int | list[bytes | int]] | None
    status_at: Kept | None
    visitors: list[reception.Visitor]
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
        guests = [msgspec.msgpack.decode(state, type=SavedGuest) for state in found.states.values()]
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
        self._due: list[Hosted] = []  # whose workers are an earlier program's
        self._starting: list[Hosted] = []
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
        self._ages = self._alarms.new(self._mind_ages)
        confine = partial(privileges.confine_gateway, all(g.sandbox for g in daemon.guests))
        gateways = [] if before is None else before.gateways
        self._gateway = tls.Gateway(self._selector, self._take_in, confine, gateways)
        undo.callback(self._gateway.close)
        known = {} if before is None else {identity(saved.guest): saved for saved in before.guests}
        self._guests: list[Hosted] = []
        for described in daemon.guests:
            with going_on(before), ExitStack() as mine:
                saved = known.pop(identity(described), None)
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
        with going_on(before):
            self._gateway.start()  # as whoever this is now
        self._status_at: Kept | None = None
        self._monitor = self._listen(before)
        self._complete = True
        for guest in self._guests:
            self._put(guest)
        undo.callback(self._listen_no_more)

    def _prepare(
        self, guest: Guest, inherited: Inherited, undo: ExitStack, saved: SavedGuest | None
    ) -> Hosted:
        """Make all that a guest needs, or go on with what another program had of it."""
        if saved is None:
            check_cpus(guest)
            endpoints = Endpoints(guest, inherited)
        else:
            guest, endpoints = adopt(guest, inherited, saved)
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
        prepared = Hosted(guest, endpoints, ledger_fd, porter, self._gateway, time.monotonic())
        undo.callback(prepared.close)
        if saved is not None:
            prepared.resume(saved)
        for port in guest.ports:
            if port.id not in prepared.journals:
                prepared.journals[port.id] = create_journal(guest, port)
            with going_on(saved):
                prepared.open_port(port, endpoints.ports[port.id])
        if saved is not None:
            self._go_on(prepared, saved)
        return prepared

    def _put(self, guest: Hosted) -> None:
        """Have systemd keep a guest as it is now, if it keeps anything."""
        if self._store is None or guest.kept:
            return
        saved = guest.save()
        if saved is None:
            self._store.drop(part(guest.guest))
            return
        saved.pid = saved.pipe = None  # no worker outlives this process
        self._store.put(part(guest.guest), saved, saved.fds())

    def _go_on(self, guest: Hosted, saved: SavedGuest) -> None:
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

    def _listen(self, before: _State | None) -> reception.Server | None:
        kept, visitors = (None, []) if before is None else (before.status_at, before.visitors)
        try:
            self._status_at = kept or listen_unix(monitor.own_path(os.environ))
        except (OSError, ConfigError) as error:
            _log.warning("no status can be asked for: %s", error)
            return None
        return reception.Server(self._selector, self._status_at.fd, self._answer, visitors)

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
        self._mind_ages()
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

    def _step(self, guest: Hosted, event: Event) -> None:
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
                guest.log.warning("its worker does not end: killed")
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
        if numbers.intersection(STOPS) and not self._stopping:
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
                guest.reap_logs()
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

    def _state(self, visitors: list[reception.Visitor]) -> _State:
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
        for guest in self._guests:
            guest.stop_logs()
        # What comes until the next program has handlers waits for them.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        _log.info("begins anew", extra=Happening.BEGINS_ANEW.extra)
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
            if not guest.resumable:
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
                guest.log.error("its worker does not answer: killed")
                guest.hung = True
                self._signal(guest, signal.SIGKILL)
                alive = False
        if alive:
            systemd.notify("WATCHDOG=1")
        self._watchdog.start(self._watchdog_s / 4)

    def _mind_ages(self) -> None:
        """Begin other logs where it is time, now and from now on."""
        left = [each for guest in self._guests if (each := guest.age_logs()) is not None]
        if left:
            soonest = min(_AGES_S, *left)
            # One whose time is over cannot be begun anew now: its folder is full, say.
            self._ages.start(soonest if soonest > 0 else _AGAIN_S)

    def _take_in(self, name: str, port: int, client: socket.socket) -> None:
        """Hand a client that came by TLS to its guest's worker."""
        for guest in self._guests:
            over = guest.supervisor.state is State.FINISHED
            if guest.guest.name == name and port in guest.endpoints.ports and not over:
                if not guest.porter.crowded:
                    guest.porter.take_in(port, client)
                    return
                guest.log.warning("port %d: a client was lost: too many come at once", port)
        client.close()

    # Workers

    def _start(self, guests: list[Hosted]) -> None:
        """Fork a worker for each of `guests`.

        All are made ready first and then forked in a row: a page that this process writes between
        two forks is one that those workers do not share.
        """
        births = []
        for guest in guests:
            try:
                if not guest.resumable:
                    self._lose(guest, "no worker can go on from what the last one has saved")
                    guest.begin_anew()
                births.append(Birth(guest))
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
                    become_worker(self._run, birth, blocked)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for birth in births:
            self._born(birth)

    def _stillborn(self, guest: Hosted, error: OSError) -> None:
        guest.log.error("cannot start a worker: %s", error.strerror)
        self._step(guest, Event.DIED)

    def _born(self, birth: Birth) -> None:
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

    def _hear(self, guest: Hosted) -> None:
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
            guest.log.error("its worker's reports are ignored from now: %s", error)
        # The pipe stays open: its end would tell the worker that the master is gone.
        self._selector.unregister(guest.pipe)
        guest.heard = False

    def _listen_to(self, guest: Hosted) -> None:
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
                guest.log.error("its worker cannot be followed: %s", error)
                self._signal(guest, signal.SIGKILL)

    def _deafen(self, guest: Hosted) -> None:
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

    def _reap(self, guest: Hosted) -> None:
        if guest.pid is None:
            return
        pid, status, used = os.wait4(guest.pid, os.WNOHANG)
        if pid == 0:
            return
        guest.cpu_before += used.ru_utime + used.ru_stime
        guest.pid = None
        guest.process = None
        self._hear(guest)
        guest.collect_times()
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
        guest.log.error("its worker died: %s", guest.died, extra=Happening.WORKER_DIED.extra)
        self._look_into(guest, code)
        self._step(guest, Event.DIED)

    def _look_into(self, guest: Hosted, code: int) -> None:
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

    def _lose(self, guest: Hosted, why: str) -> None:
        guest.crashes = 0
        if guest.porter.frontend is None and not guest.porter.snapshot:
            return
        guest.log.error("frontend dropped: %s", why, extra=Happening.FRONTEND_DROPPED.extra)
        if not guest.porter.listening:
            self._status = 1
        guest.porter.lose()

    def _signal(self, guest: Hosted, number: signal.Signals) -> None:
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

    def _answer(self, request: monitor.Request, fds: list[int]) -> monitor.Status | monitor.Done:
        if isinstance(request, monitor.StatusRequest):
            return self._status_now()
        guest = self._find(request.guest)
        if isinstance(request, monitor.Attach):
            return guest.attach(request, fds)
        name = guest.guest.name
        match request:
            case monitor.PortAdd():
                port = guest.add_port(request.port)
                self._mind_ages()
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

    def _find(self, name: str) -> Hosted:
        for guest in self._guests:
            if monitor.text(guest.guest.name) == name:
                return guest
        raise ConsoleError(f"there is no guest {name} here")

    def _status_now(self) -> monitor.Status:
        now = time.monotonic()
        return monitor.Status(
            version=__version__, guests=[guest.describe(now) for guest in self._guests]
        )


def _check_certificates(daemon: Daemon) -> None:
    backends = [port.backend for guest in daemon.guests for port in guest.ports]
    for files in {each.tls for each in backends if isinstance(each, Network) and each.tls}:
        tls.check(files)


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
    wanted = {*STOPS, *_ALWAYS}
    for number in wanted:
        # nohup and a shell's `&` have some of them ignored: they stay so.
        if signal.getsignal(number) is not signal.SIG_IGN or number in _ALWAYS:
            signal.signal(number, _ignore)
            # Told to end once more while it ends, the daemon still ends as it was going to.
            undo.callback(signal.signal, number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, wanted)
    return read
