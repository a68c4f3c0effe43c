"""The hall: one guest's session, queues, console and backends, wired together.

Nothing is decided here that one of them could decide: the session says what a message means, the
queue what a buffer is, the port where bytes go. This file applies the session's effects, connects
each queue to what it carries, and gives the loop its three kinds of work.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Callable
from functools import partial
from typing import Any

from .. import config
from ..errors import FrontendError, GuestError, RefusedError
from ..health import Health, PortHealth
from ..journal import Journal
from .audience import Audience
from .backends import pty, tcp, unix
from .backends.base import Endpoint
from .backends.terminal import Terminal
from .console.device import FEATURES, MULTIPORT, Console, Role
from .console.port import Port
from .inheritance import Inheritance
from .poller import HUP, Poller, drain_fd
from .report import Report
from .vhost_user import message as wire
from .vhost_user import session as fx
from .vhost_user.channel import Channel, Message
from .virtqueue.memory import GuestMemory, map_region
from .virtqueue.split import EVENT_IDX, INDIRECT_DESC, SplitQueue

#: Buffers of one queue before the next queue has its turn.
_BUDGET = 64

#: Messages of the frontend before the queues have their turn.
_MESSAGES = 64

#: The longest chain where the journal sets no limit of its own.
_LONGEST_CHAIN = 1 << 20

#: How long a message may take from its first byte to its last.
_MESSAGE_S = 5.0

#: How long a frontend waits when the system has no room for it.
_NO_ROOM_S = 1.0

#: How long readers may take what is left when the daemon ends.
_LAST_S = 1.0

#: Refused messages that are logged one by one; the rest of a session's are only counted.
_LOGGED_REFUSALS = 10

_ONE = wire.encode_u64(1)


class _Log(logging.LoggerAdapter[logging.Logger]):
    """Says whose line it is: the log is one for all guests."""

    def process(self, msg: Any, kwargs: Any) -> tuple[Any, Any]:
        return f"{(self.extra or {})['guest']}: {msg}", kwargs


class _Queue:
    """One virtqueue: descriptors that outlive a stop, and the ring while it runs.

    `wanted` is a cheap look at whether there may be work, `serve` does it and returns how many
    buffers it moved, `starving` says whether another buffer of the guest's would be of use.
    """

    def __init__(self, index: int, role: Role) -> None:
        self.index = index
        self.role = role
        self.ring: SplitQueue | None = None
        self.place: fx.StartRing | None = None
        self.base = 0
        self.enabled = False
        self.kick: int | None = None
        self.call: int | None = None
        self.error: int | None = None
        self.wanted: Callable[[], bool] = _never
        self.serve: Callable[[], int] = _nothing
        self.starving: Callable[[], bool] = _never


def _nothing() -> int:
    return 0


def _never() -> bool:
    return False


def _always() -> bool:
    return True


def _close(fd: int | None) -> None:
    if fd is not None:
        os.close(fd)


def _notify(fd: int | None) -> None:
    """Add one to an eventfd, or write the same bytes to UML's socket.

    Full means that the other side has not looked yet, broken that it never will: both are its own.
    """
    if fd is not None:
        try:
            os.write(fd, _ONE)
        except OSError:
            return


class Guest:
    """One guest; `run` serves it."""

    def __init__(self, guest: config.Guest, inheritance: Inheritance) -> None:
        self._log = _Log(logging.getLogger(__name__), {"guest": guest.name})
        self._config = guest
        self._poller = Poller(guest.poll_us)
        self._report = Report(inheritance.health, self._poller, self._health)
        self._poller.watch(inheritance.health, lambda _: self._poller.stop(), 0)

        journal = Journal(inheritance.journal)
        os.close(inheritance.journal)
        self._ports = [
            Port(port.id, port.name, port.console, output, input_)
            for port, output, input_ in zip(
                guest.ports, journal.outputs, journal.inputs, strict=True
            )
        ]
        self._console = Console(self._ports)
        self._queues = [
            _Queue(index, self._console.role(index)[0]) for index in range(self._console.queues)
        ]
        self._running: list[_Queue] = []
        self._counters = Health()

        self._memory: GuestMemory | None = None
        self._channel: Channel | None = None
        self._session = self._new_session()
        self._backend_channel: int | None = None
        self._message_timer = self._poller.timer(self._too_slow)
        self._no_room = self._poller.timer(self._listen)
        self._last_timer = self._poller.timer(self._poller.stop)
        self._ending = False

        self._poller.on_signal(signal.SIGTERM, self._end)
        self._audiences = [
            Audience(
                port,
                self._endpoint(described.backend, port, fd),
                self._poller,
                described.stall_ms,
                self._log,
                self._report.send,
            )
            for port, described, fd in zip(
                self._ports, guest.ports, inheritance.endpoints, strict=True
            )
        ]
        self._frontend = socket.socket(fileno=inheritance.frontend)
        self._listening = bool(self._frontend.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
        if self._listening:
            self._frontend.setblocking(False)
            self._listen()
        else:
            self._connected(self._frontend)

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
        self._poller.run(self._drain, self._flush, self._arm)

    def close(self) -> None:
        """Give back everything: the frontend, the clients, the terminal's modes."""
        self._drop_frontend()
        for audience in self._audiences:
            audience.close()
        if self._listening:
            self._poller.forget(self._frontend.fileno())
        self._frontend.close()
        self._report.close()
        self._poller.close()

    def _end(self) -> None:
        self._ending = True
        self._last_timer.start(_LAST_S)

    # The loop's three kinds of work

    def _drain(self) -> bool:
        worked = False
        for queue in self._running:
            if not queue.wanted():
                continue
            try:
                count = queue.serve()
            except GuestError as error:
                self._break(queue, error)
                return True
            if count:
                worked = True
                self._counters.chains += count
                self._publish(queue)
        if worked:
            self._report.changed()
        return worked

    def _drain_all(self) -> None:
        """Move what is there now; a guest that goes on writing has had its ring's worth."""
        for _ in range(config.LARGEST_QUEUE // _BUDGET):
            if not self._drain():
                return

    def _publish(self, queue: _Queue) -> None:
        if queue.ring is not None and queue.ring.publish() and queue.call is not None:
            self._counters.calls += 1
            _notify(queue.call)

    def _flush(self) -> bool:
        progress = False
        for audience in self._audiences:
            progress |= audience.flush()
        if progress:
            self._report.changed()  # a gap is found when its reader reads
        if self._ending and not progress and all(a.served for a in self._audiences):
            self._poller.stop()
        return progress

    def _arm(self) -> bool:
        more = False
        for queue in self._running:
            if queue.starving() and queue.ring is not None:
                more |= queue.ring.want_kicks()
        return more

    def _break(self, queue: _Queue, error: GuestError) -> None:
        self._log.error("queue %d is broken and stopped: %s", queue.index, error)
        self._counters.broken += 1
        self._publish(queue)  # what was completed before the mistake
        self._halt(queue)
        _notify(queue.error)
        self._report.send()

    # The frontend comes and goes

    def _new_session(self) -> fx.Session:
        return fx.Session(
            FEATURES | INDIRECT_DESC | EVENT_IDX,
            self._console.queues,
            self._config.max_queue_size,
        )

    def _listen(self) -> None:
        self._poller.watch(self._frontend.fileno(), self._on_arrival)

    def _on_arrival(self, _: int) -> None:
        if self._channel is not None:
            self._on_channel(0)  # it may have hung up in the same moment
        try:
            sock, _addr = self._frontend.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            self._log.warning("cannot take a frontend, next try in a second: %s", error)
            self._poller.forget(self._frontend.fileno())
            self._no_room.start(_NO_ROOM_S)
            return
        if self._channel is not None:
            self._log.warning("another frontend was refused: one is connected already")
            self._counters.refused += 1
            self._report.changed()
            sock.close()
            return
        self._connected(sock)

    def _connected(self, sock: socket.socket) -> None:
        self._channel = Channel(sock)
        self._session = self._new_session()
        self._poller.watch(self._channel.fileno(), self._on_channel)
        self._counters.frontend = self._channel.peer()
        self._counters.sessions += 1
        self._refusals = 0
        self._log.info("frontend %d connected", self._counters.frontend)
        self._report.send()

    def _on_channel(self, _: int) -> None:
        channel = self._channel
        if channel is None:
            return
        try:
            for _turn in range(_MESSAGES):
                message = channel.receive()
                if message is None:
                    break
                self._on_message(channel, message)
        except FrontendError as error:
            self._log.error("frontend dropped: %s", error)
            self._drop_frontend()
            return
        if channel.closed:
            self._log.info("frontend disconnected")
            self._drop_frontend()
        elif not channel.partial:
            self._message_timer.stop()
        elif self._message_timer.due is None:
            self._message_timer.start(_MESSAGE_S)

    def _too_slow(self) -> None:
        self._log.error("frontend dropped: a message was not whole after %g s", _MESSAGE_S)
        self._drop_frontend()

    def _on_message(self, channel: Channel, message: Message) -> None:
        request, _size, reply, need_reply = message.header
        session = self._session
        answer: bytes | None = None
        try:
            if reply:
                raise FrontendError(f"vhost-user message {request} is a reply to nothing")
            if message.stray_fds:
                raise RefusedError(f"file descriptors came inside vhost-user message {request}")
            answer = self._carry_out(session.handle(request, message.payload, message.fds))
            failed = 0
        except RefusedError as error:
            self._refuse(error)
            if not session.acknowledges(request, asked=need_reply):
                raise
            failed = 1
        finally:
            message.close_fds()
        if answer is not None:
            channel.send(wire.encode(request, answer, reply=True))
        elif session.acknowledges(request, asked=need_reply):
            channel.send(wire.encode(request, wire.encode_u64(failed), reply=True))

    def _refuse(self, error: RefusedError) -> None:
        self._counters.refused += 1
        self._refusals += 1
        if self._refusals <= _LOGGED_REFUSALS:
            self._log.warning("refused: %s", error)
        self._report.changed()

    def _carry_out(self, steps: fx.Steps) -> bytes | None:
        try:
            effect = next(steps)
            while True:
                try:
                    result = self._apply(effect)
                except RefusedError as error:
                    effect = steps.throw(error)
                else:
                    effect = steps.send(result)
        except StopIteration as done:
            reply: bytes | None = done.value
            return reply

    def _drop_frontend(self) -> None:
        channel, self._channel = self._channel, None
        if channel is None:
            return
        self._drain_all()  # what the guest wrote before it went is still in its memory
        for queue in self._queues:
            self._halt(queue)
            for fd in (queue.kick, queue.call, queue.error):
                _close(fd)
            queue.kick = queue.call = queue.error = None
            queue.base = 0
        self._memory = None
        _close(self._backend_channel)
        self._backend_channel = None
        self._message_timer.stop()
        self._poller.forget(channel.fileno())
        channel.close()
        self._counters.frontend = None
        if not self._listening:
            self._poller.stop()
        self._report.send()

    # The session's effects

    def _apply(self, effect: fx.Effect) -> Any:
        """Carry out one effect. fds in it are the message's: what is kept is a duplicate."""
        match effect:
            case fx.SetFeatures(features):
                self._console.multiport = bool(features & MULTIPORT)
            case fx.MapMemory(regions, fds):
                self._map(regions, fds)
            case fx.CheckRing(ring, size, addr):
                self._place(self._queues[ring], size, addr)
            case fx.StartRing():
                self._start(effect)
            case fx.EnableRing(ring, enabled):
                self._enable(self._queues[ring], enabled)
            case fx.StopRing(ring):
                return self._stop(self._queues[ring])
            case fx.SetCall(ring, fd):
                queue = self._queues[ring]
                kept = self._keep(fd)
                _close(queue.call)
                queue.call = kept
                if queue.ring is not None:
                    _notify(queue.call)  # the one before may have swallowed a call
            case fx.SetError(ring, fd):
                kept = self._keep(fd)
                _close(self._queues[ring].error)
                self._queues[ring].error = kept
            case fx.SetBackendChannel(fd):
                kept = self._keep(fd)
                _close(self._backend_channel)
                self._backend_channel = kept
            case fx.ReadConfig(offset, size):
                return self._console.read_config(offset, size)
            case fx.WriteConfig(offset, data):
                self._console.write_config(offset, data)
        return None

    @staticmethod
    def _keep(fd: int | None) -> int | None:
        if fd is None:
            return None
        try:
            kept = os.dup(fd)
        except OSError as error:
            raise RefusedError(f"no room for another file descriptor: {error}") from None
        os.set_blocking(kept, False)
        return kept

    def _map(self, regions: list[wire.Region], fds: list[int]) -> None:
        mapped = [map_region(fd, *region) for fd, region in zip(fds, regions, strict=True)]
        memory = GuestMemory(mapped)
        self._drain_all()  # under the old table, as the guest meant it
        self._memory = memory
        lost = []
        for queue in [*self._running]:
            place = queue.place
            if place is None:
                continue
            self._halt(queue)
            try:
                self._begin(queue, place._replace(enabled=queue.enabled))
            except RefusedError:
                lost.append(queue.index)
        if lost:
            raise RefusedError(f"the new memory table has no place for running queues {lost}")

    def _place(self, queue: _Queue, size: int, addr: wire.VringAddr) -> SplitQueue:
        if self._memory is None:
            raise RefusedError(f"queue {queue.index} has addresses but there is no memory table")
        role, port = self._console.role(queue.index)
        return SplitQueue(
            self._memory,
            size,
            addr.desc,
            addr.avail,
            addr.used,
            features=self._session.chosen,
            writable=role.writable,
            most_bytes=port.output.size if role is Role.OUTPUT else _LONGEST_CHAIN,
        )

    def _start(self, effect: fx.StartRing) -> None:
        queue = self._queues[effect.ring]
        if queue.ring is None:
            self._place(queue, effect.size, effect.addr)  # refused before anything is replaced
        self._watch_kick(queue, effect.kick)
        if queue.ring is None:
            self._begin(queue, effect)

    def _begin(self, queue: _Queue, place: fx.StartRing) -> None:
        ring = self._place(queue, place.size, place.addr)
        ring.refuse_kicks()
        queue.place, queue.ring, queue.enabled = place, ring, place.enabled
        if queue.role is Role.CONTROL_FROM_GUEST and ring.index == 0:
            # A driver that has used nothing yet has said nothing yet either.
            self._console.control.reset()
        self._connect(queue, ring)
        self._running.append(queue)

    def _connect(self, queue: _Queue, ring: SplitQueue) -> None:
        """Say what serving `queue` means, now that it is `enabled` or not."""
        console, (_, port) = self._console, self._console.role(queue.index)
        queue.wanted, queue.serve, queue.starving = _never, _nothing, _never
        if not queue.enabled:
            return
        match queue.role:
            case Role.OUTPUT:
                queue.wanted = ring.ready
                queue.serve = partial(port.take_output, ring, _BUDGET)
                queue.starving = lambda: not port.holding
            case Role.INPUT:
                audience = self._audiences[self._ports.index(port)]

                def give() -> int:
                    given = port.give_input(ring, _BUDGET)
                    if given:
                        audience.resume()
                    return given

                queue.wanted = queue.starving = lambda: (
                    len(port.input) > 0 and console.takes_input(port)
                )
                queue.serve = give
            case Role.CONTROL_TO_GUEST:
                queue.wanted = queue.starving = lambda: bool(console.control.replies)
                queue.serve = partial(console.speak, ring, _BUDGET)
            case Role.CONTROL_FROM_GUEST:
                queue.wanted = ring.ready
                queue.serve = partial(console.hear, ring, _BUDGET)
                queue.starving = _always

    def _enable(self, queue: _Queue, enabled: bool) -> None:
        ring = queue.ring
        if ring is None or enabled == queue.enabled:
            return
        if not enabled:
            self._drain_all()  # what was there while it was enabled counts
        queue.enabled = enabled
        self._connect(queue, ring)
        if not enabled and queue.role is Role.OUTPUT:
            _, port = self._console.role(queue.index)
            queue.wanted = ring.ready
            queue.serve = partial(port.discard_output, ring, _BUDGET)
            queue.starving = _always

    def _stop(self, queue: _Queue) -> int:
        self._halt(queue)
        self._watch_kick(queue, None)
        return queue.base

    def _halt(self, queue: _Queue) -> None:
        """Take a ring out of service; its index is kept."""
        if queue.ring is None:
            return
        if queue.role is Role.OUTPUT:
            self._console.role(queue.index)[1].holding = False
        queue.base = queue.ring.index
        queue.ring = None
        queue.wanted, queue.serve, queue.starving = _never, _nothing, _never
        self._running.remove(queue)

    def _watch_kick(self, queue: _Queue, fd: int | None) -> None:
        kick = self._keep(fd)
        if kick is not None:

            def kicked(events: int) -> None:
                self._counters.kicks += 1
                drain_fd(kick)
                if events & HUP:  # reported for ever
                    self._poller.forget(kick)
                if queue.ring is not None:
                    queue.ring.refuse_kicks()

            try:
                self._poller.watch(kick, kicked)
            except PermissionError:
                os.close(kick)
                raise RefusedError(
                    f"queue {queue.index}: its kick fd cannot be waited on"
                ) from None
        if queue.kick is not None:
            self._poller.forget(queue.kick)
            os.close(queue.kick)
        queue.kick = kick

    # Health

    def _health(self) -> Health:
        counters = self._counters
        counters.ignored = self._console.control.ignored
        counters.ports = [
            PortHealth(
                id=port.id,
                name=port.name,
                open=self._channel is not None and self._console.takes_input(port),
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
