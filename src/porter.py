"""The porter: who comes to one guest, and what must outlive the worker that serves them.

Frontends and clients are let in here and handed to the worker, so a worker that dies takes no
connection with it. A frontend's messages are read whole, kept, and told to the worker one at a
time; what it has not committed when it dies its successor is told again. What a message means is
the worker's business.
"""

from __future__ import annotations

import logging
import os
import selectors
import socket
from collections.abc import Callable, Sequence

import msgspec

from . import channel, custody
from .admission import Door
from .alarms import Alarms
from .channel import Channel
from .custody import Commit, FrontendCame, FrontendEvent, FrontendGone, FrontendSaid, Order, Vault
from .endpoints import Endpoints
from .errors import FrontendError
from .events import About, Happening

_log = logging.getLogger(__name__)

#: How long a message may take from its first byte to its last, in seconds.
MESSAGE_WITHIN = 5.0

#: How long somebody who arrives waits when the system has no room for them, in seconds.
_NO_ROOM = 1.0

#: Clients that a worker was told of and has not seated yet; more stay in the listener's queue.
MOST_ARRIVALS = 64

#: Arrivals taken before everybody else has a turn.
_AT_ONCE = 16


class Saved(msgspec.Struct, array_like=True, kw_only=True):
    """All that a porter knows, and its descriptors; the names are those of `Porter`."""

    held: dict[int, int]
    last_key: int
    snapshot: bytes
    newest: int
    serial: int
    lost: bool
    refused: int
    frontend: int | None
    event: FrontendEvent | None
    last: int
    channel: channel.Saved | None
    arrivals: list[custody.ClientCame]


class Line:
    """The master's end of custody: orders to one worker, which wait where it is behind."""

    def __init__(
        self, selector: selectors.BaseSelector, sock: socket.socket, hear: Callable[[], None]
    ) -> None:
        """Own `sock`; `hear` is called when it has a word of the worker's."""
        self._selector = selector
        self.sock = sock
        self._hear = hear
        self._due: list[tuple[Order, Sequence[int]]] = []
        selector.register(sock, selectors.EVENT_READ, self._ready)

    def _ready(self) -> None:
        due, self._due = self._due, []
        for order, fds in due:
            self.send(order, fds)
        if due and not self._due:
            self._selector.modify(self.sock, selectors.EVENT_READ, self._ready)
        self._hear()

    @property
    def behind(self) -> bool:
        """Whether orders wait that the worker had no room for."""
        return bool(self._due)

    def send(self, order: Order, fds: Sequence[int] = ()) -> None:
        """Send an order and copies of `fds` now or, while these stay open, later.

        Raises OSError when the descriptors cannot be sent. A worker that is gone is not told, which
        its end will show.
        """
        if not self._due:
            try:
                custody.send(self.sock, order, fds)
            except BlockingIOError:
                both = selectors.EVENT_READ | selectors.EVENT_WRITE
                self._selector.modify(self.sock, both, self._ready)
            except ConnectionError:
                return
            else:
                return
        self._due.append((order, fds))

    def close(self) -> None:
        """Close the line."""
        self._selector.unregister(self.sock)
        self.sock.close()


class Porter:
    """The doors of guest `name`: its vhost-user socket, and its ports' as they are opened.

    `snapshot` is what the last worker committed, with the descriptors in `vault`, `newest` the last
    of their keys that it knew, and `serial` the last event of a frontend's that it dealt with.
    `frontend` is the process id of the connected frontend, None when there is none, `refused`
    counts those that were turned away, `lost` says that a session is not to be gone on with.
    """

    def __init__(
        self,
        name: str,
        endpoints: Endpoints,
        selector: selectors.BaseSelector,
        alarms: Alarms,
        changed: Callable[[], None],
        saved: Saved | None = None,
    ) -> None:
        """Be there for who comes; with `saved`, go on in place of another porter.

        `changed` is called when `save` has become another, before anybody is told.
        """
        self._log = About(_log, name)
        self._changed = changed
        self._selector = selector
        self.vault = Vault()
        self.snapshot = b""
        self.newest = 0
        self.serial = 0
        self.lost = False
        self.refused = 0
        self.frontend: int | None = None
        self._line: Line | None = None
        self._event: FrontendEvent | None = None  # told, and not committed
        self._last = 0  # its serial, or that of the last one
        self._channel: Channel | None = None
        self._hearing = False  # the channel is watched
        self._too_slow = alarms.new(self._on_too_slow)
        self._arrivals: dict[int, custody.ClientCame] = {}  # told, and not committed
        self._doors: dict[int, tuple[int, Callable[[], None]]] = {}  # by port, -1: the frontend's
        self._open: set[int] = set()
        self._no_room = alarms.new(self._open_all)
        self.listening = endpoints.listening()
        if saved is not None:
            self._resume(saved)
        if self.listening:
            self._add_door(-1, endpoints.frontend, lambda: self._on_frontend(endpoints.door))
        elif saved is None:
            self._connected(socket.socket(fileno=os.dup(endpoints.frontend)))

    def save(self) -> Saved:
        """Return what another porter needs, in another program."""
        return Saved(
            held=self.vault.fds,
            last_key=self.vault.newest,
            snapshot=self.snapshot,
            newest=self.newest,
            serial=self.serial,
            lost=self.lost,
            refused=self.refused,
            frontend=self.frontend,
            event=self._event,
            last=self._last,
            channel=None if self._channel is None else self._channel.save(),
            arrivals=[*self._arrivals.values()],
        )

    def _resume(self, saved: Saved) -> None:
        self.vault.fds, self.vault.newest = saved.held, saved.last_key
        self.snapshot, self.newest, self.serial = saved.snapshot, saved.newest, saved.serial
        self.lost, self.refused, self.frontend = saved.lost, saved.refused, saved.frontend
        self._event, self._last = saved.event, saved.last
        self._arrivals = {came.key: came for came in saved.arrivals}
        if saved.channel is not None:
            self._channel = channel.Channel.resume(saved.channel)
            if self._event is None:
                self._listen_to(self._channel)

    # Doors

    def _add_door(self, port: int, fd: int, arrive: Callable[[], None]) -> None:
        self._doors[port] = (fd, arrive)
        self._open_all()

    def open_port(self, port: int, fd: int, door: Door) -> None:
        """Take in clients of port number `port` at the listener `fd`, from now on."""
        self._add_door(port, fd, lambda: self._on_client(port, fd, door))

    def close_port(self, port: int) -> None:
        """Take in no more; the listener is its owner's."""
        self._close_door(port)
        self._doors.pop(port, None)

    def _open_all(self) -> None:
        """Open every door behind which there is room."""
        for port, (fd, arrive) in self._doors.items():
            waits = self._event is not None if port < 0 else self.crowded
            if not waits and port not in self._open:
                self._open.add(port)
                self._selector.register(fd, selectors.EVENT_READ, arrive)

    def _close_door(self, port: int) -> None:
        if port in self._open:
            self._open.remove(port)
            self._selector.unregister(self._doors[port][0])

    def _accept(self, listener: int) -> socket.socket | None:
        """Return who arrived, if anybody is still there."""
        borrowed = socket.socket(fileno=listener)
        try:
            return borrowed.accept()[0]
        except (BlockingIOError, ConnectionAbortedError):
            return None
        except OSError as error:
            self._log.warning("cannot take in whoever comes, next try in a second: %s", error)
            for port in [*self._open]:
                self._close_door(port)
            self._no_room.start(_NO_ROOM)
            return None
        finally:
            borrowed.detach()

    # Clients

    def _on_client(self, port: int, listener: int, door: Door) -> None:
        for _ in range(_AT_ONCE):
            if self.crowded:
                self._close_door(port)
                return
            sock = self._accept(listener)
            if sock is None:
                return
            if door.admit(sock):
                self.take_in(port, sock)
            else:
                self.refused += 1

    @property
    def crowded(self) -> bool:
        """Whether as many clients as may be are on their way to the worker."""
        return len(self._arrivals) >= MOST_ARRIVALS

    def take_in(self, port: int, sock: socket.socket, attach: custody.Attach | None = None) -> None:
        """Hand a client of port number `port` to the worker."""
        came = custody.ClientCame(port, self.vault.put(sock.detach()), attach)
        self._arrivals[came.key] = came
        self._changed()
        self._tell(came, [self.vault.fds[came.key]])

    # The worker

    def go_on(self, line: Line) -> None:
        """Have a worker that knows all it was told."""
        self._line = line

    def begin(self, line: Line) -> None:
        """Tell a new worker what none before it has committed."""
        self._line = line
        due: list[tuple[int, Order, list[int]]] = [
            (came.key, came, [self.vault.fds[came.key]]) for came in self._arrivals.values()
        ]
        if self._event is not None:
            keys = self._event.keys if isinstance(self._event, FrontendSaid) else []
            fds = [self.vault.fds[key] for key in keys]
            due.append((min(keys, default=0), self._event, fds))
        for _, order, fds in sorted(due, key=lambda each: each[0]):
            self._tell(order, fds)

    def held(self) -> dict[int, int]:
        """Return the descriptors that the snapshot names, by their keys."""
        return {key: fd for key, fd in self.vault.fds.items() if key <= self.newest}

    def end(self) -> None:
        """Hear that there is no worker any more."""
        self._line = None

    def _tell(self, order: Order, fds: Sequence[int] = ()) -> None:
        if self._line is None:
            return
        try:
            self._line.send(order, fds)
        except OSError as error:
            self._log.error("its worker cannot be told: %s", error)
            if isinstance(order, FrontendSaid):
                self.lose()

    def committed(self, commit: Commit, fds: list[int]) -> None:
        """Keep what a worker committed, and let the frontend know and go on; owns `fds`.

        Raises ValueError for what no worker commits: somebody has taken it over.
        """
        answer_fd = fds.pop() if commit.answer_fd and fds else None
        try:
            if not self._can_be(commit) or len(commit.made) != len(fds):
                custody.close(fds)
                raise ValueError("a commit of what never was")
            for key, fd in zip(commit.made, fds, strict=True):
                self.vault.replace(key, fd)
            self.snapshot, self.newest, self.serial = commit.snapshot, commit.newest, commit.serial
            self.lost = False
            for key in [key for key in self._arrivals if key <= commit.newest]:
                del self._arrivals[key]
            if self._event is not None and self._event.serial <= commit.serial:
                self._event = None
            again = self._event.keys if isinstance(self._event, FrontendSaid) else []
            self.vault.keep([*commit.keys, *again], commit.newest)
            if commit.dismiss:
                self._hang_up()
                self._event = None
            self._changed()
            if commit.answer is not None and not commit.dismiss:
                self._answer(commit.answer, answer_fd)
        finally:
            if answer_fd is not None:
                os.close(answer_fd)
        if self._event is None:
            self._on_channel()
        self._open_all()

    def _can_be(self, commit: Commit) -> bool:
        """Say whether the numbers in a commit are some that this guest's worker can have."""
        return (
            self.newest <= commit.newest <= self.vault.newest
            and self.serial <= commit.serial <= self._last
            and all(key < 0 for key in commit.made)
        )

    def _answer(self, answer: bytes, fd: int | None) -> None:
        if self._channel is None:
            return
        try:
            self._channel.send(answer, fd)
        except FrontendError as error:
            self._fail(str(error))

    # The frontend

    def _on_frontend(self, door: Door) -> None:
        if self._event is None:
            self._on_channel()  # it may have hung up in the same moment
        if self._event is not None:  # what comes after that is not known yet
            self._close_door(-1)
            return
        sock = self._accept(self._doors[-1][0])
        if sock is None:
            return
        if not door.admit(sock):
            self.refused += 1
            return
        if self._channel is not None:
            self._log.warning("another frontend was refused: one is connected already")
            self.refused += 1
            sock.close()
            return
        self._connected(sock)

    def _connected(self, sock: socket.socket) -> None:
        self._channel = Channel(sock)
        self.frontend = self._channel.peer()
        self._raise(FrontendCame(self._next(), self.frontend))

    def _next(self) -> int:
        self._last += 1
        return self._last

    def _raise(self, event: FrontendEvent, fds: Sequence[int] = ()) -> None:
        """Tell the worker of the frontend's next step."""
        self._event = event
        self._changed()
        self._tell(event, fds)

    def _on_channel(self) -> None:
        """Read the frontend's next message, unless the worker is busy with one."""
        frontend = self._channel
        if frontend is None:
            return
        if self._event is not None:
            self._listen_to(None)
            return
        try:
            message = frontend.receive()
        except FrontendError as error:
            self._fail(str(error))
            return
        if message is not None:
            self._too_slow.stop()
            keys = [self.vault.put(fd) for fd in message.fds]
            message.fds.clear()
            said = FrontendSaid(
                self._next(),
                message.header.request,
                message.header.reply,
                message.header.need_reply,
                message.payload,
                message.stray_fds,
                keys,
            )
            self._raise(said, [self.vault.fds[key] for key in keys])
        elif frontend.closed:
            self._log.info("frontend disconnected", extra=Happening.FRONTEND_DISCONNECTED.extra)
            self._let_go()
        else:
            self._listen_to(frontend)
            if not frontend.partial:
                self._too_slow.stop()
            elif self._too_slow.due is None:
                self._too_slow.start(MESSAGE_WITHIN)

    def _listen_to(self, frontend: Channel | None) -> None:
        if self._hearing and frontend is None and self._channel is not None:
            self._selector.unregister(self._channel.fileno())
            self._hearing = False
        elif frontend is not None and not self._hearing:
            self._selector.register(frontend.fileno(), selectors.EVENT_READ, self._on_channel)
            self._hearing = True

    def _on_too_slow(self) -> None:
        self._fail(f"a message was not whole after {MESSAGE_WITHIN:g} s")

    def _fail(self, why: str) -> None:
        self._log.error("frontend dropped: %s", why, extra=Happening.FRONTEND_DROPPED.extra)
        self._let_go()

    def _hang_up(self) -> None:
        """Close the frontend's connection, if there is one."""
        self._too_slow.stop()
        self._listen_to(None)
        frontend, self._channel = self._channel, None
        self.frontend = None
        if frontend is not None:
            frontend.close()

    def _let_go(self) -> None:
        """Close the connection, and tell the worker."""
        self._hang_up()
        self._raise(FrontendGone(self._next()))

    def lose(self) -> None:
        """Let the frontend go without a word to the worker: the next one begins without."""
        self._hang_up()
        self._event = None
        self.lost = True
        self._changed()

    def forget(self) -> None:
        """Let everybody go: nobody can go on with what the last worker has left."""
        self.snapshot = b""
        self.vault.keep([], self.vault.newest)
        self.lose()

    def close(self) -> None:
        """Close every door and connection; the listeners are their owner's."""
        for port in [*self._doors]:
            self.close_port(port)
        self._hang_up()
        self._no_room.stop()
        self.vault.keep([], self.vault.newest)
