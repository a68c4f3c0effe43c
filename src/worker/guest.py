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
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from .. import config, orders
from ..errors import ConsoleError, FrontendError, GuestError
from ..health import Health, PortHealth
from ..journal import Journal
from . import state
from .audience import Audience
from .backends import pty, tcp, unix
from .backends.base import Endpoint
from .backends.terminal import Terminal
from .console.device import FEATURES, Console, Role
from .console.port import Inlet, Port, discard
from .frontend import Frontend
from .inheritance import Inheritance
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


class _Log(logging.LoggerAdapter[logging.Logger]):
    """Says whose line it is: the log is one for all guests."""

    def process(self, msg: Any, kwargs: Any) -> tuple[Any, Any]:
        return f"{(self.extra or {})['guest']}: {msg}", kwargs


def _always() -> bool:
    return True


class Guest:
    """One guest; `run` serves it."""

    def __init__(self, guest: config.Guest, inheritance: Inheritance) -> None:
        self._log = _Log(logging.getLogger(__name__), {"guest": guest.name})
        self._config = guest
        self._poller = Poller(guest.poll_us)
        self._report = Report(inheritance.health, self._poller, self._health)
        self._poller.watch(inheritance.health, lambda _: self._poller.stop(), 0)

        self._orders = socket.socket(fileno=inheritance.orders)
        self._poller.watch(inheritance.orders, self._on_order)
        self._poller.on_signal(signal.SIGTERM, self._end)
        self._last_timer = self._poller.timer(self._poller.stop)
        self._ending = False
        self._counters = Health()

        self._audiences: dict[int, Audience] = {}
        self._parting: list[Audience] = []  # of ports that were removed
        self._fresh = 0  # bytes of output that nobody was given yet
        self._frozen = False
        self._loaded: state.Loaded | None = None
        self._saved: list[Port] = []
        self._new_driver = True
        self._session: fx.Session
        self._console = Console(
            [],
            guest.max_ports,
            rows_first=guest.resize_order is config.ResizeOrder.LINUX_LEGACY,
        )
        self._queues = Queues(self, self._poller, self._counters, self._log, self._report.changed)
        for port, files in zip(guest.ports, inheritance.ports, strict=True):
            self._add_port(port, files.journal, files.endpoint)
        self._frontend = Frontend(
            inheritance.frontend,
            self._poller,
            self._counters,
            self._log,
            begin=self._new_session,
            apply=self._apply,
            gone=self._gone,
            changed=self._report.send,
        )

    def _add_port(self, described: config.Port, journal_fd: int, endpoint_fd: int | None) -> None:
        try:
            journal = Journal(journal_fd)
            endpoint = self._endpoint(described.backend, endpoint_fd)
        except OSError:
            if endpoint_fd is not None:
                os.close(endpoint_fd)
            raise
        finally:
            os.close(journal_fd)
        port = Port(
            described.id,
            described.name,
            journal.output,
            journal.input,
            console=described.console,
            blocking=described.overflow is config.Overflow.BLOCK,
        )

        def changed() -> None:
            self._console.control.host_changed(port)
            self._report.send()

        def resized() -> None:
            self._console.control.resized(port)
            if port.id == 0 and not self._console.multiport:
                self._queues.config_changed()

        audience = Audience(
            port, endpoint, self._poller, described.stall_ms, self._log, changed, resized
        )
        if self._frozen:
            audience.freeze()
        self._audiences[port.id] = audience
        if endpoint_fd is None:
            self._poller.on_signal(signal.SIGWINCH, audience.decide_size)
        self._console.add(port)
        self._queues.reconnect()

    def _remove_port(self, port: Port) -> None:
        self._queues.drain_all()  # what the guest wrote while there was a reader
        if port.holding:
            self._log.warning("port %d: what its guest wrote last is not taken", port.id)
        port.inlet = None
        self._console.remove(port)
        self._queues.reconnect()
        self._parting.append(self._audiences.pop(port.id))

    def _endpoint(self, backend: config.Backend, fd: int | None) -> Endpoint:
        if fd is None:
            return Terminal(self._poller.stop)
        match backend:
            case config.Pty():
                return pty.endpoint(fd)
            case config.Unix():
                return unix.endpoint(fd)
            case _:
                return tcp.endpoint(fd)

    def _on_order(self, _: int) -> None:
        """Do what the master wants; it has checked that it can be done."""
        try:
            received = orders.receive(self._orders)
            if received is not None:
                self._obey(*received)
        except (ConsoleError, OSError) as error:
            self._log.error("what the master wanted was not done: %s", error)
        self._report.send()

    def _obey(self, order: orders.Order, fds: list[int]) -> None:
        ports = self._console.ports
        match order:
            case orders.AddPort(port):
                self._add_port(port, *fds)
            case orders.RemovePort(number) if number in ports:
                self._remove_port(ports[number])
            case orders.Resize(number, columns, rows) if number in ports:
                self._audiences[number].fix_size(columns, rows)

    def run(self) -> None:
        """Serve until told to end, left by the user, or without master or `--fd` frontend."""
        self._report.send()
        self._poller.run(self._drain, self._flush, self._look, self._queues.arm)

    def close(self) -> None:
        """Give back everything: the frontend, the clients, the terminal's modes."""
        self._frontend.close()
        for audience in (*self._audiences.values(), *self._parting):
            audience.close()
        self._orders.close()
        self._report.close()
        self._poller.close()

    def _end(self) -> None:
        self._ending = True
        self._last_timer.start(_LAST_S)

    # The loop's three kinds of work

    def _drain(self, linger_ns: int) -> int:
        return self._work(partial(self._queues.drain, linger_ns))

    def _look(self, until_ns: int, linger_ns: int) -> int:
        return self._work(partial(self._queues.look, until_ns, linger_ns))

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
        for audience in self._audiences.values():
            progress |= audience.flush()
        if self._parting:
            progress |= self._part()
        if progress:
            self._report.changed()  # a gap is found when its reader reads
        if self._ending and not progress:
            everyone = (*self._audiences.values(), *self._parting)
            if all(audience.served for audience in everyone):
                self._poller.stop()
        return progress

    def _part(self) -> bool:
        progress = sum(audience.flush() for audience in self._parting) > 0
        count = len(self._parting)
        self._parting = [audience for audience in self._parting if not audience.dismiss()]
        if len(self._parting) < count:
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
            self._loaded = None
        self._thaw()
        control = self._console.control
        match self._console.role(index)[0]:
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
        console, audience = self._console, self._audiences[port.id]

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
                audience.resume()
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
        self._loaded = None
        self._loaded = state.load(self._console, data)
        self._freeze()

    def moved(self) -> None:
        """Give up what went with the guest."""
        for port in self._saved:
            port.forget()
            port.come_back()

    def _gone(self) -> None:
        self._queues.release()
        for port in self._console.ports.values():
            port.stay_away()
        self._loaded = None
        self._thaw()

    def _freeze(self) -> None:
        self._frozen = True
        for audience in self._audiences.values():
            audience.freeze()

    def _thaw(self) -> None:
        if self._frozen:
            self._frozen = False
            for audience in self._audiences.values():
                audience.thaw()

    # Health

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
            )
            for port in self._console.ports.values()
        ]
        return counters


def run(guest: config.Guest, inheritance: Inheritance) -> int:
    """Serve `guest` until it is told to stop (SIGTERM), and return the exit status.

    0: done, do not start again (stopped, left by the user, or an `--fd` frontend hung up).
    Anything else: start a successor. Ends by itself when the master is gone.
    """
    hall = Guest(guest, inheritance)
    try:
        hall.run()
    finally:
        hall.close()
    return 0
