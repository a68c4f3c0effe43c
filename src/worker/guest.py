"""The hall: one guest's session, queues, console and backends, wired together.

Nothing is decided here that one of them could decide: the session says what a message means, the
ring what a buffer is, the port where bytes go. This file says what each queue carries, and gives
the loop its three kinds of work.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import msgspec

from .. import config, custody, privileges
from ..errors import FrontendError, GuestError, RefusedError
from ..events import About
from ..health import SERVICE_NS, Health, LogHealth, PortHealth, service_bucket
from ..journal import Input, Journal, Output
from ..ledger import LOG_INDEX, Ledger
from . import audience, queues, state
from .audience import Audience
from .backends import pty, tcp, unix
from .backends.base import Endpoint
from .backends.log import Log
from .backends.terminal import Terminal
from .console import device
from .console.device import FEATURES, Console, Role
from .console.port import Inlet, Port, discard
from .frontend import Frontend
from .inheritance import Held, Inheritance, PortFiles
from .poller import Poller
from .queues import BUDGET, IDLE, Queues, Work
from .report import Report
from .vhost_user import session as fx
from .virtqueue.features import RING_PACKED
from .virtqueue.ring import RING_FEATURES, Ring

#: The longest chain that is read where the journal sets no limit of its own.
_LONGEST_CHAIN = 1 << 20

_ANY_SIZE = (1 << 63) - 1

#: VHOST_USER_CONFIG's flag: the frontend writes on its own, for a guest that moved.
_MIGRATION = 1

#: What a saved state has besides the bytes of rings: 127 ports' names, numbers and messages.
_STATE_BESIDES = 1 << 20

#: How long readers may take what is left when the daemon ends.
_LAST_S = 1.0

#: Exit status of a worker that leaves its guest to a successor (sysexits.h: EX_TEMPFAIL).
HANDOVER = 75

#: Of a snapshot: one of another version is not gone on with.
VERSION = 2

#: The key of a state that came for a guest which has not begun here.
_LOADED = -1


class _SavedPort(msgspec.Struct, array_like=True, kw_only=True):
    """`head` and `tail` count where no ring runs that has a later word in the ledger."""

    id: int
    name: str
    opened: bool
    size: tuple[int, int]
    head: int
    tail: int
    left: int
    audience: audience.Saved


class _Snapshot(msgspec.Struct, array_like=True, kw_only=True):
    """All that a successor begins with, beside what lies in the journals and the ledger."""

    version: int
    frontend: int | None
    session: fx.Saved | None
    queues: queues.Saved
    console: device.Saved
    new_driver: bool
    loaded: bool
    ports: list[_SavedPort]


class _Version(msgspec.Struct, array_like=True):
    version: int


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Snapshot)
_version = msgspec.msgpack.Decoder(_Version)


class _OrphanedError(Exception):
    """The master is gone: nothing can be committed any more, so nothing may be done."""


#: Where clients come from by themselves, or what is made of one who is sent.
_End = tuple[Endpoint | None, audience.Connect]


def _always() -> bool:
    return True


class Guest:
    """One guest; `run` serves it."""

    def __init__(self, guest: config.Guest, inheritance: Inheritance) -> None:
        self._log = About(logging.getLogger(__name__), guest.name)
        self._config = guest
        self._poller = Poller(guest.poll_us)
        self._report = Report(inheritance.health, self._poller, self._health)
        self._poller.watch(inheritance.health, lambda _: self._orphaned(), 0)

        self._line = socket.socket(fileno=inheritance.custody)
        self._poller.watch(inheritance.custody, self._on_order)
        self._poller.on_signal(signal.SIGTERM, self._end)
        self._last_timer = self._poller.timer(self._poller.stop)
        self._ending = False
        self._leaving = False
        self._counters = Health(services=[0] * (len(SERVICE_NS) + 1))
        self._chains_before = 0  # the worker slept
        self._ledger = Ledger(inheritance.ledger)
        os.close(inheritance.ledger)

        self._newest = inheritance.newest
        self._listening = inheritance.listening
        self._uncommitted = False
        self._audiences: dict[int, Audience] = {}
        self._journals: dict[int, int] = {}  # their numbers
        self._parting: list[Audience] = []  # of ports that were removed
        self._logs: dict[int, Log] = {}
        self._fresh = 0  # bytes of output that nobody was given yet
        self._frozen = False
        self._loaded: state.Loaded | None = None
        self._loaded_file: Held | None = None
        self._made: list[Held] = []  # the master has no copy yet
        self._saved: list[Port] = []
        self._new_driver = True
        self._session: fx.Session
        self._console = Console(
            [],
            guest.max_ports,
            rows_first=guest.resize_order is config.ResizeOrder.LINUX_LEGACY,
        )
        self._queues = Queues(
            self, self._poller, self._counters, self._log, self._report.changed, self._ledger
        )
        self._frontend = Frontend(
            inheritance.serial,
            self._counters,
            self._log,
            begin=self._new_session,
            apply=self._apply,
            gone=self._gone,
            commit=self._commit,
        )
        ends = [
            self._end_of(port, files.endpoint)
            for port, files in zip(guest.ports, inheritance.ports, strict=True)
        ]
        doors = [*zip(guest.ports, inheritance.ports, ends, strict=True)]
        self._counters.privileges = privileges.confine_worker(
            guest.sandbox, sum(port.output_bytes + port.input_bytes for port in guest.ports)
        )
        if inheritance.snapshot:
            self._resume(_decode(inheritance.snapshot), doors, inheritance)
        else:
            for port, files, end in doors:
                self._begin_port(port, files, end)
        for people in self._audiences.values():
            people.adopt()

    # Where a predecessor was

    def _resume(
        self,
        snapshot: _Snapshot,
        doors: list[tuple[config.Port, PortFiles, _End]],
        inheritance: Inheritance,
    ) -> None:
        """Go on from there; a port that was not known then is a new one."""
        held = {**inheritance.held}
        known = {(port.id, port.name): port for port in snapshot.ports}
        same = {port.id for port, _, _ in doors if (port.id, port.name) in known}
        ports = {}
        for described, files, _ in doors:
            if described.id in same:
                saved = known[described.id, described.name]
                ports[described.id] = port = self._make_port(described, files)
                port.opened, port.size, port.left = saved.opened, saved.size, saved.left
                self._console.ports[port.id] = port
        self._new_driver = snapshot.new_driver
        self._console.resume(snapshot.console)
        for saved in snapshot.ports:
            if saved.id in same:
                self._rewind(ports[saved.id], saved, snapshot.queues)
            else:
                self._console.control.remove(saved.id)
        for described, _, end in doors:
            if described.id in same:
                saved = known[described.id, described.name]
                self._open(described, ports[described.id], end, saved.audience, held)
        try:
            self._resume_session(snapshot, held, lost=inheritance.lost)
        finally:
            custody.close(held.values())
        for described, files, end in doors:
            if described.id not in same:
                self._add_port(described, files, end)

    def _rewind(self, port: Port, saved: _SavedPort, rings: queues.Saved) -> None:
        """Let count what was committed of a port's bytes, and no more."""
        head, tail = saved.head, saved.tail
        for index in rings.running:
            if (role := self._console.role(index))[1] is not port:
                continue
            page = self._ledger.page(index)
            if role[0] is Role.OUTPUT:
                head = max(head, page.offset(port.output.head))
            else:
                tail = max(tail, page.offset(port.input.tail))
        port.output.go_back(head)
        port.input.go_back(tail)

    def _resume_session(self, snapshot: _Snapshot, held: dict[int, int], *, lost: bool) -> None:
        if snapshot.session is None:
            return
        if lost:
            self._gone()
            self._uncommitted = True
            return
        session = self._new_session()
        session.resume(snapshot.session)
        self._frontend.resume(session, snapshot.frontend)
        try:
            if snapshot.loaded:
                self._loaded_file = Held(held.pop(_LOADED), _LOADED)
                size = os.fstat(self._loaded_file).st_size
                self._take_state(os.pread(self._loaded_file, size, 0))
            self._queues.resume(snapshot.queues, held)
        except FrontendError as error:
            self._frontend.fail(error)
        if snapshot.queues.saved:
            self._freeze()
            self._saved = [*self._console.ports.values()]

    def _save(self) -> tuple[bytes, list[int]]:
        """Return a snapshot and the keys of the descriptors that it names."""
        connected = self._frontend.connected
        rings = self._queues.save()
        ports = [
            _SavedPort(
                id=port.id,
                name=port.name,
                opened=port.opened,
                size=port.size,
                head=port.output.head,
                tail=port.input.tail,
                left=port.left,
                audience=self._audiences[port.id].save(),
            )
            for port in self._console.ports.values()
        ]
        snapshot = _Snapshot(
            version=VERSION,
            frontend=self._counters.frontend,
            session=self._session.save() if connected else None,
            queues=rings,
            console=self._console.save(),
            new_driver=self._new_driver,
            loaded=self._loaded is not None,
            ports=ports,
        )
        keys = rings.keys()
        for people in (*self._audiences.values(), *self._parting):
            keys += people.keys()
        if self._loaded is not None:
            keys.append(_LOADED)
        return _encoder.encode(snapshot), keys

    def _commit(
        self, answer: bytes | None = None, answer_fd: int | None = None, *, dismiss: bool = False
    ) -> None:
        """Let a successor begin here; see `frontend.Commit`."""
        snapshot, keys = self._save()
        commit = custody.Commit(
            serial=self._frontend.serial,
            newest=max(self._newest, self._frontend.newest),
            snapshot=snapshot,
            keys=keys,
            made=[held.key for held in self._made],
            answer=answer,
            answer_fd=answer_fd is not None,
            dismiss=dismiss,
        )
        fds: list[int] = [*self._made]
        if answer_fd is not None:
            fds.append(answer_fd)
        self._tell(commit, fds)
        self._made.clear()
        self._uncommitted = False
        self._report.changed()

    def commit(self) -> None:
        """Commit, before a guest sees what the device has understood or said."""
        self._commit()

    def _tell(self, word: custody.Word, fds: Sequence[int] = ()) -> None:
        try:
            custody.send(self._line, word, fds)
        except ConnectionError:
            raise _OrphanedError from None

    def _touched(self) -> None:
        """Commit at the end of the turn."""
        self._uncommitted = True
        self._report.changed()

    def _orphaned(self) -> None:
        raise _OrphanedError

    # Ports

    def _end_of(self, described: config.Port, fd: int | None) -> _End:
        """Return where clients of a port come from, and what one is who is sent by the master.

        Owns `fd`, also when it raises OSError.
        """
        match described.backend:
            case config.Pty() if fd is not None:
                try:
                    return pty.endpoint(fd), audience.nobody
                except OSError:
                    os.close(fd)
                    raise
            case config.Unix():
                return None, unix.client
            case config.Nested():
                modes = self._ledger.records(described.id)[-128:]
                return Terminal(self._leave, kept=modes), audience.nobody
            case _:
                return None, tcp.client

    def _leave(self) -> None:
        self._poller.stop()

    def _make_port(self, described: config.Port, files: PortFiles) -> Port:
        try:
            journal = Journal(files.journal)
        finally:
            os.close(files.journal)
        self._journals[described.id] = journal.number
        port = Port(
            described.id,
            described.name,
            journal.output,
            journal.input,
            console=described.console,
            blocking=described.overflow is config.Overflow.BLOCK,
            spare=journal.spare,
        )
        if described.log is not None and files.logs:
            port.log = self._logs[port.id] = Log(
                described.log.path,
                journal.output,
                self._log_record(port.id),
                files.logs,
                described.log.max_bytes,
                self._poller,
                self._log,
                self._report.send,
                form=described.log.format,
                times=described.log.indexed,
            )
        return port

    def _log_record(self, port_id: int) -> memoryview:
        return self._ledger.log(port_id)

    def _open(
        self,
        described: config.Port,
        port: Port,
        end: _End,
        saved: audience.Saved | None = None,
        held: dict[int, int] | None = None,
    ) -> None:
        """Let clients come to a port, beside those of a predecessor's."""

        def changed() -> None:
            self._console.control.host_changed(port)
            self._touched()

        def resized() -> None:
            self._console.control.resized(port)
            if port.id == 0 and not self._console.multiport:
                self._queues.config_changed()
            self._touched()

        fds = {}
        if saved is not None and held is not None:
            fds = {seat.key: held.pop(seat.key) for seat in saved.seats if seat.key is not None}
        endpoint, connect = end
        people = Audience(
            port,
            endpoint,
            self._poller,
            described.stall_ms,
            self._log,
            changed,
            resized,
            connect=connect,
            records=self._ledger.records(port.id),
            saved=saved,
            fds=fds,
            most=described.max_clients,
            guest=self._config.name,
            journal=self._journals[port.id],
            typing=described.typing,
        )
        if self._frozen:
            people.freeze()
        self._audiences[port.id] = people
        if isinstance(endpoint, Terminal):
            self._poller.on_signal(signal.SIGWINCH, people.decide_size)

    def _add_port(self, described: config.Port, files: PortFiles, end: _End) -> None:
        stale = self._log_record(described.id)[: LOG_INDEX.stop]  # it may be another port's
        if any(stale):
            stale[:] = bytes(len(stale))
        self._begin_port(described, files, end)

    def _begin_port(self, described: config.Port, files: PortFiles, end: _End) -> None:
        port = self._make_port(described, files)
        self._open(described, port, end)
        self._console.add(port)
        self._queues.reconnect()
        self._touched()

    def _remove_port(self, port: Port) -> None:
        self._queues.drain_all()  # what the guest wrote while there was a reader
        log = self._logs.pop(port.id, None)
        if log is not None:
            while port.holding and log.urge():
                self._queues.drain_all()
            port.log = None
            log.end()
        if port.holding:
            self._log.warning("port %d: what its guest wrote last is not taken", port.id)
        port.inlet = None
        self._console.remove(port)
        self._queues.reconnect()
        self._parting.append(self._audiences.pop(port.id))
        self._touched()

    # What the master says

    def _on_order(self, _: int) -> None:
        try:
            received = custody.receive_order(self._line)
        except ConnectionError:
            raise _OrphanedError from None
        if received is None:
            return
        order, fds = received
        try:
            self._obey(order, fds)
        except OSError as error:
            self._log.error("what the master wanted was not done: %s", error)
        self._report.send()

    def _obey(self, order: custody.Order, fds: list[int]) -> None:
        ports = self._console.ports
        match order:
            case custody.FrontendSaid(keys=keys):
                self._frontend.said(order, [*map(Held, fds, keys)])
            case custody.FrontendCame():
                self._frontend.came(order)
            case custody.FrontendGone():
                self._frontend.gone(order)
            case custody.ClientCame(number, key, attach):
                self._newest = max(self._newest, key)
                self._uncommitted = True
                if fds and number in self._audiences:
                    self._audiences[number].arrive(fds[0], key, attach)
                else:
                    custody.close(fds)
            case custody.AddPort(port, generations) if fds:
                first = len(fds) - len(generations)
                files = PortFiles(
                    fds[0],
                    fds[1] if first > 1 else None,
                    dict(zip(generations, fds[first:], strict=True)),
                )
                self._add_port(port, files, self._end_of(port, files.endpoint))
            case custody.LogFile(number, generation) if fds and number in self._logs:
                self._logs[number].switch(generation, fds[0])
            case custody.LogFile():
                custody.close(fds)
            case custody.RemovePort(number) if number in ports:
                self._remove_port(ports[number])
            case custody.Resize(number, columns, rows) if number in ports:
                self._audiences[number].fix_size(columns, rows)
            case custody.Ping():
                self._tell(custody.Pong())
            case custody.Leave(last):
                self._leaving = True
                if last:
                    self._end()
                else:
                    self._poller.stop()

    def run(self) -> int:
        """Serve until told to end, left by the user, or without master or `--fd` frontend."""
        try:
            self._report.send()
            self._poller.run(self._drain, self._flush, self._look, self._arm, self._woken)
            if self._leaving:
                self._commit()
                return HANDOVER
        except _OrphanedError:
            for people in self._audiences.values():
                people.abandon()
            return HANDOVER
        self._close()
        return 0

    def _close(self) -> None:
        """Give back everything: the frontend, the clients, the terminal's modes."""
        if self._frontend.connected:
            self._gone()
        for people in (*self._audiences.values(), *self._parting):
            people.close()
        for log in self._logs.values():
            log.end()
        self._report.close()

    def _end(self) -> None:
        self._ending = True
        self._last_timer.start(_LAST_S)

    # The loop's three kinds of work

    def _drain(self, linger_ns: int) -> int:
        return self._work(partial(self._queues.drain, linger_ns))

    def _look(self, until_ns: int, linger_ns: int) -> int:
        return self._work(partial(self._queues.look, until_ns, linger_ns))

    def _arm(self) -> bool:
        self._chains_before = self._counters.chains
        return self._queues.arm()

    def _woken(self, took_ns: int) -> None:
        """Count how long it took to serve what woke the worker, if that was guest or people."""
        counters = self._counters
        if counters.chains != self._chains_before:
            counters.services[service_bucket(took_ns)] += 1
            counters.service_ns += took_ns

    def _work(self, work: Callable[[], bool]) -> int:
        try:
            worked = work()
        except FrontendError as error:
            self._frontend.fail(error)
            return 1
        if not worked:
            return 0
        self._report.changed()
        return 1 + self._fresh

    def _flush(self) -> bool:
        progress = False
        self._fresh = 0
        if self._uncommitted or any(people.unsettled for people in self._audiences.values()):
            self._commit()
            for people in self._audiences.values():
                people.settle()
        for people in self._audiences.values():
            progress |= people.flush()
        for log in self._logs.values():
            progress |= log.flush()
        if self._parting:
            progress |= self._part()
        if progress:
            self._report.changed()  # a gap is found when its reader reads
        if self._ending and not progress:
            everyone = (*self._audiences.values(), *self._parting)
            if all(people.served for people in everyone) and all(
                log.served for log in self._logs.values()
            ):
                self._poller.stop()
        return progress

    def _part(self) -> bool:
        progress = sum(people.flush() for people in self._parting) > 0
        count = len(self._parting)
        self._parting = [people for people in self._parting if not people.dismiss()]
        if len(self._parting) < count:
            self._uncommitted = True
            gc.collect()  # a port's parts refer to one another, and to its journal's memory
        return progress

    # What the session wants of the console

    def _new_session(self) -> fx.Session:
        self._session = fx.Session(
            FEATURES | RING_FEATURES | (RING_PACKED if self._config.packed else 0),
            2 * self._console.max_ports + 2,
            self._config.max_queue_size,
            inband=self._config.inband,
        )
        return self._session

    def _apply(self, effect: fx.Effect) -> Any:
        match effect:
            case fx.SetFeatures(features):
                self._console.negotiated(features)
                return self._queues.apply(effect)
            case fx.ReadConfig(offset, size):
                return self._console.read_config(offset, size, self._session.named)
            case fx.WriteConfig(offset, data, flags):
                if not flags & _MIGRATION:
                    self._console.write_config(offset, data)
                    self._report.changed()
                return None
            case _:
                return self._queues.apply(effect)

    # What the queues carry; see `queues.Carrier`

    def stream(self, index: int) -> Output | Input | None:
        """Return the bytes that a port's queue carries, None for control messages."""
        role, port = self._console.role(index)
        if port is None:
            return None
        return port.output if role is Role.OUTPUT else port.input

    def kind(self, index: int) -> tuple[bool, int]:
        """Return whether the device writes into the queue's buffers, and a chain's most bytes.

        A buffer to be filled may have any size: nothing more than there is to say goes in.
        """
        role, port = self._console.role(index)
        if role.writable:
            return True, _ANY_SIZE
        return False, port.output.size if port else _LONGEST_CHAIN

    def started(self, index: int, ring: Ring) -> None:
        """Begin the control dialogue anew with a driver that has used nothing yet.

        Either control queue alone may have come round to its beginning.
        """
        if self._loaded is not None:
            self._loaded.apply()
        self._forget_state()
        self._thaw()
        control = self._console.control
        role, port = self._console.role(index)
        match role:
            case Role.OUTPUT if port and ring.fresh:
                self._log.info("port %d: a driver begins at byte %d", port.id, port.output.head)
            case Role.CONTROL_TO_GUEST:
                self._new_driver = ring.fresh
            case Role.CONTROL_FROM_GUEST if ring.fresh and self._new_driver:
                control.reset()
            case Role.CONTROL_FROM_GUEST:
                control.presume(told=not self._new_driver)

    def disabled(self, index: int) -> None:
        """Keep what is held, as in `stopped`."""
        role, port = self._console.role(index)
        if port and role is Role.INPUT:
            port.inlet = None
        elif port and port.holding and role is Role.OUTPUT:
            self.stopped(index, self._queues.probe(index))

    def leaving(self, index: int, ring: Ring) -> None:
        """Take what is held: the guest's last words must not go with it."""
        role, port = self._console.role(index)
        if port and role is Role.OUTPUT:
            with suppress(GuestError):
                port.take_rest(ring)

    def stopped(self, index: int, ring: Ring) -> None:
        """Keep what is held, in case that those were the guest's last words."""
        role, port = self._console.role(index)
        if port and role is Role.INPUT:
            port.inlet = None
        elif port and role is Role.OUTPUT:
            with suppress(GuestError):
                port.remember(ring)
            port.holding = False

    def work(self, index: int, ring: Ring, enabled: bool) -> Work:
        """Return what serving the queue means now that it is `enabled` or not."""
        console = self._console
        role, port = console.role(index)
        match role:
            case Role.OUTPUT if port and not enabled and port.blocking:
                return IDLE  # every byte counts; it can wait
            case Role.OUTPUT if port is None or not enabled:
                return Work(ring.ready, lambda _: discard(ring, BUDGET, port), _always)
            case _ if not enabled:
                return IDLE
            case Role.OUTPUT if port:
                return self._output_work(port, ring)
            case Role.INPUT if port:
                return self._input_work(index, port, ring)
            case Role.CONTROL_TO_GUEST:

                def speaking() -> bool:
                    return bool(console.control)

                return Work(speaking, lambda _: console.speak(ring, BUDGET), speaking)
            case Role.CONTROL_FROM_GUEST:
                return Work(ring.ready, lambda _: console.hear(ring, BUDGET), _always)
        return IDLE

    def _output_work(self, port: Port, ring: Ring) -> Work:
        port.come_back()

        def take(linger_ns: int) -> int:
            before = port.output.head
            taken = port.take_output(ring, BUDGET, linger_ns)
            self._fresh += port.output.head - before
            return taken

        return Work(ring.ready, take, lambda: not port.holding)

    def _input_work(self, index: int, port: Port, ring: Ring) -> Work:
        console, people = self._console, self._audiences[port.id]

        def serve(give: Callable[[], int]) -> None:
            if self._queues.serve(index, give):
                self._poller.expect()
                self._report.changed()

        port.inlet = Inlet(ring, partial(console.takes_input, port), serve)

        def waiting() -> bool:
            return len(port.input) > 0 and console.takes_input(port)

        def give(_: int) -> int:
            given = port.give_input(ring, BUDGET)
            if given:
                self._poller.expect()
                people.resume()
                console.control.host_changed(port)
            return given

        return Work(waiting, give, waiting)

    # The guest moves; see `queues.Carrier`

    def reset(self) -> None:
        """Begin the control dialogue anew."""
        self._console.control.reset()

    def save(self) -> bytes:
        """Return the console's state; until the guest goes on nothing here changes it."""
        self._freeze()
        self._saved = [*self._console.ports.values()]
        return state.save(self._console)

    def largest_state(self) -> int:
        """Return how many bytes a state that fits these ports can have."""
        rings = (port.output.size + port.input.size for port in self._console.ports.values())
        return sum(rings) + _STATE_BESIDES

    def load(self, data: bytes) -> None:
        """Become the console of that state once a queue starts. Raises RefusedError."""
        self._forget_state()
        self._take_state(data)
        try:
            file = Held(os.memfd_create("state", os.MFD_CLOEXEC), _LOADED)
        except OSError as error:
            self._loaded = None
            raise RefusedError(f"no room for a device state: {error}") from None
        self._loaded_file = file
        self._made.append(file)
        with open(file, "wb", closefd=False) as whole:
            whole.write(data)

    def _take_state(self, data: bytes) -> None:
        self._loaded = state.load(self._console, data)
        self._freeze()

    def _forget_state(self) -> None:
        self._loaded = None
        self._made.clear()
        if self._loaded_file is not None:
            os.close(self._loaded_file)
            self._loaded_file = None

    def moved(self) -> None:
        """Give up what went with the guest."""
        for port in self._saved:
            port.forget()
            port.come_back()

    def _gone(self) -> None:
        self._queues.release()
        for port in self._console.ports.values():
            port.stay_away()
        self._forget_state()
        self._thaw()
        if not self._listening:
            self._poller.stop()

    def _freeze(self) -> None:
        self._frozen = True
        for people in self._audiences.values():
            people.freeze()

    def _thaw(self) -> None:
        if self._frozen:
            self._frozen = False
            for people in self._audiences.values():
                people.thaw()

    # Health

    def _log_health(self, port: Port) -> LogHealth | None:
        log = self._logs.get(port.id)
        if log is None:
            return None
        return LogHealth(generation=log.generation, size=log.size, failing=log.failing)

    def _health(self) -> Health:
        counters = self._counters
        counters.ignored = self._console.control.ignored
        connected = counters.frontend is not None
        counters.ports = [
            PortHealth(
                id=port.id,
                name=port.name,
                open=connected and self._console.takes_input(port),
                readers=len(port.watchers),
                output=port.output.head,
                input=port.input.tail,
                missed=port.missed,
                discarded=port.discarded,
                stalls=port.stalls,
                columns=port.size[0],
                rows=port.size[1],
                state=self._console.control.state(port.id).value if connected else "absent",
                host_open=port.host_open,
                held=port.holding,
                size_by=port.size_by,
                log=self._log_health(port),
                lag=max((watcher.pending for watcher in port.watchers), default=0),
            )
            for port in self._console.ports.values()
        ]
        return counters


def run(guest: config.Guest, inheritance: Inheritance) -> int:
    """Serve `guest` until it is told to stop (SIGTERM), and return the exit status.

    0: done, do not start again (stopped, left by the user, or an `--fd` frontend hung up).
    Anything else: start a successor, after HANDOVER as soon as possible. Ends by itself, touching
    nothing, when the master is gone.
    """
    return Guest(guest, inheritance).run()


def can_resume(snapshot: bytes) -> bool:
    """Say whether `run` can go on from a snapshot, be it another version's."""
    try:
        return not snapshot or _version.decode(snapshot).version == VERSION
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False


def _decode(snapshot: bytes) -> _Snapshot:
    """Return a snapshot's parts. Raises ValueError for one of another version."""
    if not can_resume(snapshot):
        raise ValueError(f"a snapshot of a version that is not {VERSION}")
    return _decoder.decode(snapshot)
