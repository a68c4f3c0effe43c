"""The hall: one guest's session, queues, console and backends, wired together.

Nothing is decided here that one of them could decide: the session says what a message means, the
ring what a buffer is, the port where bytes go. This file says what each queue carries, and gives
the loop its three kinds of work.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
from functools import partial
from typing import Any

from .. import config
from ..health import Health, PortHealth
from ..journal import Journal
from .audience import Audience
from .backends import pty, tcp, unix
from .backends.base import Endpoint
from .backends.terminal import Terminal
from .console.device import FEATURES, MULTIPORT, Console, Role
from .console.port import Port
from .frontend import Frontend
from .inheritance import Inheritance
from .poller import Poller
from .queues import BUDGET, IDLE, Queues, Work
from .report import Report
from .vhost_user import session as fx
from .virtqueue.split import EVENT_IDX, INDIRECT_DESC, SplitQueue

#: The longest chain where the journal sets no limit of its own.
_LONGEST_CHAIN = 1 << 20

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

        self._ports = []
        for port, files in zip(guest.ports, inheritance.ports, strict=True):
            journal = Journal(files.journal)
            os.close(files.journal)
            self._ports.append(
                Port(port.id, port.name, port.console, journal.output, journal.input)
            )
        self._console = Console(self._ports)
        self._counters = Health()
        self._last_timer = self._poller.timer(self._poller.stop)
        self._ending = False

        self._poller.on_signal(signal.SIGTERM, self._end)
        self._audiences = [
            Audience(
                port,
                self._endpoint(described.backend, port, files.endpoint),
                self._poller,
                described.stall_ms,
                self._log,
                self._report.send,
            )
            for port, described, files in zip(
                self._ports, guest.ports, inheritance.ports, strict=True
            )
        ]
        self._queues = Queues(self, self._poller, self._counters, self._log, self._report.send)
        self._frontend = Frontend(
            inheritance.frontend,
            self._poller,
            self._counters,
            self._log,
            begin=self._new_session,
            apply=self._apply,
            gone=self._queues.release,
            changed=self._report.send,
        )

    def _endpoint(self, backend: config.Backend, port: Port, fd: int | None) -> Endpoint:
        if fd is None:
            terminal = Terminal(self._poller.stop)
            port.size = terminal.size()

            def resized() -> None:
                port.size = terminal.size()
                self._report.send()

            self._poller.on_signal(signal.SIGWINCH, resized)
            return terminal
        match backend:
            case config.Pty():
                return pty.endpoint(fd)
            case config.Unix():
                return unix.endpoint(fd)
            case _:
                return tcp.endpoint(fd)

    def run(self) -> None:
        """Serve until told to end, left by the user, or without master or `--fd` frontend."""
        self._report.send()
        self._poller.run(self._drain, self._flush, self._queues.arm)

    def close(self) -> None:
        """Give back everything: the frontend, the clients, the terminal's modes."""
        self._frontend.close()
        for audience in self._audiences:
            audience.close()
        self._orders.close()
        self._report.close()
        self._poller.close()

    def _end(self) -> None:
        self._ending = True
        self._last_timer.start(_LAST_S)

    # The loop's three kinds of work

    def _drain(self) -> bool:
        worked = self._queues.drain()
        if worked:
            self._report.changed()
        return worked

    def _flush(self) -> bool:
        progress = False
        for audience in self._audiences:
            progress |= audience.flush()
        if progress:
            self._report.changed()  # a gap is found when its reader reads
        if self._ending and not progress and all(a.served for a in self._audiences):
            self._poller.stop()
        return progress

    # What the session wants of the console

    def _new_session(self) -> fx.Session:
        return fx.Session(
            FEATURES | INDIRECT_DESC | EVENT_IDX,
            self._console.queues,
            self._config.max_queue_size,
        )

    def _apply(self, effect: fx.Effect) -> Any:
        match effect:
            case fx.SetFeatures(features):
                self._console.multiport = bool(features & MULTIPORT)
                return self._queues.apply(effect)
            case fx.ReadConfig(offset, size):
                return self._console.read_config(offset, size)
            case fx.WriteConfig(offset, data):
                return self._console.write_config(offset, data)
            case _:
                return self._queues.apply(effect)

    # What the queues carry; see `queues.Carrier`

    def kind(self, index: int) -> tuple[bool, int]:
        """Return whether the device writes into the queue's buffers, and a chain's most bytes."""
        role, port = self._console.role(index)
        return role.writable, port.output.size if role is Role.OUTPUT else _LONGEST_CHAIN

    def started(self, index: int, ring: SplitQueue) -> None:
        """Begin the control dialogue anew with a driver that has used nothing yet."""
        if self._console.role(index)[0] is Role.CONTROL_FROM_GUEST and ring.index == 0:
            self._console.control.reset()

    def stopped(self, index: int) -> None:
        """Let nobody wait for room for a buffer that cannot come any more."""
        role, port = self._console.role(index)
        if role is Role.OUTPUT:
            port.holding = False

    def work(self, index: int, ring: SplitQueue, enabled: bool) -> Work:
        """Return what serving the queue means now that it is `enabled` or not."""
        console = self._console
        role, port = console.role(index)
        match role:
            case Role.OUTPUT if not enabled:
                return Work(ring.ready, partial(port.discard_output, ring, BUDGET), _always)
            case _ if not enabled:
                return IDLE
            case Role.OUTPUT:
                return Work(
                    ring.ready, partial(port.take_output, ring, BUDGET), lambda: not port.holding
                )
            case Role.INPUT:
                audience = self._audiences[self._ports.index(port)]

                def give() -> int:
                    given = port.give_input(ring, BUDGET)
                    if given:
                        audience.resume()
                    return given

                def waiting() -> bool:
                    return len(port.input) > 0 and console.takes_input(port)

                return Work(waiting, give, waiting)
            case Role.CONTROL_TO_GUEST:

                def speaking() -> bool:
                    return bool(console.control.replies)

                return Work(speaking, partial(console.speak, ring, BUDGET), speaking)
            case Role.CONTROL_FROM_GUEST:
                return Work(ring.ready, partial(console.hear, ring, BUDGET), _always)

    # Health

    def _health(self) -> Health:
        counters = self._counters
        counters.ignored = self._console.control.ignored
        counters.ports = [
            PortHealth(
                id=port.id,
                name=port.name,
                open=counters.frontend is not None and self._console.takes_input(port),
                readers=len(port.watchers),
                output=port.output.head,
                input=port.input.tail,
                missed=port.missed,
                discarded=port.discarded,
                stalls=port.stalls,
                columns=port.size[0],
                rows=port.size[1],
            )
            for port in self._ports
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
