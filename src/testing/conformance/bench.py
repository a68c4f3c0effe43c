"""What a statement is tried with: connections, rings, a guest, and somebody at the other end."""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from types import TracebackType
from typing import Self

from ...errors import ConfigError, ConsoleError
from ...worker.vhost_user.message import ProtocolFeature, Region
from ..console import ConsoleDriver, Control, Event
from ..driver import RingDriver, Used
from ..errors import DeviceError, NackError
from ..features import DRIVER_FEATURES, Feature
from ..frontend import Frontend
from ..memory import GuestMemory
from ..packed import PackedDriver, make_driver
from ..queue import CallAs, Queue
from ..split import SplitDriver
from .statement import BrokenError, SkippedError, Statement

RX, TX, CONTROL_RX, CONTROL_TX = range(4)

#: What every frontend asks for where it is offered; the rest is for the statements about it.
_USUAL = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
)

#: Seconds in which what must not happen would have happened.
QUIET = 0.2

#: Ring entries, unless a statement is about that.
SIZE = 64

_CREDENTIALS = struct.Struct("=iII")
_MEMORY = 32 << 20
_BUFFERS = 16
_PAUSE = 0.0005


class GoneError(ConsoleError):
    """The backend does not answer on a new connection."""


class CannotRunError(ConfigError):
    """There is nothing to check: no socket, or no vhost-user backend behind it."""


@dataclass(frozen=True, slots=True)
class Backend:
    """Where a backend is and what it offers.

    `data` is where a client of the console attaches: (host, port), a path, or None. `queues` is
    what it says it has, `ports` its max_nr_ports, each 0 where it cannot say.
    """

    path: str
    data: tuple[str, int] | str | None
    timeout: float
    features: int = 0
    protocol: int = 0
    queues: int = 0
    ports: int = 0

    @classmethod
    def find(cls, path: str, data: tuple[str, int] | str | None, timeout: float) -> Backend:
        """Return the backend at `path`. Raises CannotRunError when there is none."""
        protocol = queues = ports = 0
        try:
            with cls(path, data, timeout).connect() as frontend:
                features = frontend.offered
                if features & Feature.PROTOCOL_FEATURES:
                    protocol = frontend.get_protocol_features()
                    frontend.set_protocol_features(protocol & _USUAL)
                if protocol & ProtocolFeature.MQ:
                    queues = frontend.get_queue_num()
                if protocol & ProtocolFeature.CONFIG and features & Feature.MULTIPORT:
                    ports = int.from_bytes(frontend.get_config(4, 4), "little")
        except (OSError, ConsoleError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CannotRunError(f"cannot check {path}: {reason}") from None
        return cls(path, data, timeout, features, protocol, queues, ports)

    def process(self) -> int:
        """Return the id of the process that listens, on a new connection. Raises GoneError."""
        with self.connect() as frontend:
            size = _CREDENTIALS.size
            raw = frontend.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        process: int = _CREDENTIALS.unpack(raw)[0]
        return process

    def connect(self, *, owner: bool = False) -> Frontend:
        """Return a connection on which the backend has said its features; SET_OWNER may be first.

        A backend may need a moment after the last frontend has gone. Raises GoneError.
        """
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                frontend = Frontend(self.path, timeout=self.timeout)
                try:
                    if owner:
                        frontend.set_owner(ack=False)
                    frontend.offered = frontend.get_features()
                except BaseException:
                    frontend.close()
                    raise
                return frontend
            except TimeoutError:
                raise GoneError("a new connection gets no answer") from None
            except (OSError, DeviceError) as error:
                if time.monotonic() > deadline:
                    reason = getattr(error, "strerror", None) or error
                    raise GoneError(f"no new connection can be had: {reason}") from None
            time.sleep(0.01)


class Client:
    """Somebody at the console's other end."""

    def __init__(self, backend: Backend) -> None:
        if backend.data is None:
            raise SkippedError("--data does not say where a client attaches")
        self.timeout = backend.timeout
        try:
            self._socket = _attach(backend.data, backend.timeout)
        except OSError as error:
            reason = error.strerror or error
            raise BrokenError(f"no client can attach: {reason}", "a connection") from None
        self.received = bytearray()

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def fileno(self) -> int:
        """Return the socket's descriptor, to wait on."""
        return self._socket.fileno()

    def send(self, data: bytes) -> None:
        """Type `data`."""
        self._socket.settimeout(self.timeout)
        self._socket.sendall(data)

    def take(self, within: float) -> bool:
        """Read what there is, waiting for it at most that long; False when nothing came."""
        if not select.select([self._socket], [], [], max(0.0, within))[0]:
            return False
        data = self._socket.recv(1 << 20)
        if not data:
            raise BrokenError("the client was hung up on", "a connection that stays")
        self.received += data
        return True

    def read_until(self, end: bytes) -> bytes:
        """Return what came before `end`, and pass over that."""
        deadline = time.monotonic() + self.timeout
        while (at := self.received.find(end)) < 0:
            if not self.take(deadline - time.monotonic()):
                tail = bytes(self.received[-40:])
                raise BrokenError(
                    f"the client got {len(self.received)} bytes, the last {tail!r}",
                    f"{end!r} within {self.timeout:g} s",
                )
        data = bytes(self.received[:at])
        del self.received[: at + len(end)]
        return data


def _attach(data: tuple[str, int] | str, timeout: float) -> socket.socket:
    if not isinstance(data, str):
        return socket.create_connection(data, timeout)
    peer = socket.socket(socket.AF_UNIX)
    try:
        peer.settimeout(timeout)
        peer.connect(data)
    except BaseException:
        peer.close()
        raise
    return peer


def split_driver(queue: Queue) -> SplitDriver:
    """Return a queue's driver, for what only split rings have."""
    if not isinstance(queue.driver, SplitDriver):
        raise TypeError("this statement is about split rings")
    return queue.driver


def packed_driver(queue: Queue) -> PackedDriver:
    """Return a queue's driver, for what only packed rings have."""
    if not isinstance(queue.driver, PackedDriver):
        raise TypeError("this statement is about packed rings")
    return queue.driver


_markers = count(1)


def marker() -> bytes:
    """Return bytes that were not used before."""
    return f"<check {time.monotonic_ns():x} {next(_markers)}>".encode()


class Bench:
    """One statement's own connections, memory, rings and clients; all are gone at its end."""

    def __init__(self, backend: Backend, statement: Statement) -> None:
        self.backend = backend
        self.timeout = backend.timeout
        usual = DRIVER_FEATURES & ~Feature.RING_PACKED | statement.features
        self.features = Feature(usual & backend.features)
        self.protocol = ProtocolFeature((_USUAL | statement.protocol) & backend.protocol)
        self._stack = ExitStack()
        self._frontend: Frontend | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    # Frontends

    def connect(self, *, owner: bool = False) -> Frontend:
        """Return a connection on which nothing was agreed on yet; SET_OWNER may have come first.

        The one before is closed: backends serve one frontend at a time.
        """
        if self._frontend is not None:
            self._frontend.close()
        self._frontend = self._stack.enter_context(self.backend.connect(owner=owner))
        return self._frontend

    def negotiate(
        self,
        features: int | None = None,
        *,
        without: int = 0,
        protocol: int | None = None,
    ) -> Frontend:
        """Return a connection on which features were agreed on: all usual ones `without` some."""
        frontend = self.connect()
        frontend.negotiate(
            (self.features if features is None else features) & ~without,
            self.protocol if protocol is None else protocol,
        )
        return frontend

    def agree(self, frontend: Frontend, *, ack: bool = False) -> None:
        """Ask for the protocol features and choose the usual ones, as every frontend begins."""
        if frontend.offered & Feature.PROTOCOL_FEATURES:
            frontend.get_protocol_features()
            frontend.set_protocol_features(self.protocol, ack=ack)

    def memory(self, regions: int | Sequence[Region] = _MEMORY) -> GuestMemory:
        """Return guest memory, told to nobody yet."""
        return self._stack.enter_context(GuestMemory(regions))

    def ring(
        self, memory: GuestMemory, size: int = SIZE, *, start: int | None = None
    ) -> RingDriver:
        """Return a ring of the format that the statement is about."""
        return make_driver(memory, size, self.features, start=start)

    def start(
        self,
        frontend: Frontend | None = None,
        *,
        without: int = 0,
        size: int = SIZE,
        start: int | None = None,
        queues: int | None = None,
        enable: bool = True,
        memory: GuestMemory | None = None,
        call_as: CallAs = "eventfd",
    ) -> Frontend:
        """Return a connection with running queues: port 0's and, with MULTIPORT, control's."""
        if frontend is None:
            frontend = self.negotiate(without=without)
        if memory is None:
            memory = self.memory()
        if queues is None:
            queues = 4 if frontend.features & Feature.MULTIPORT else 2
        frontend.set_memory(memory)
        for index in range(queues):
            driver = self.ring(memory, size, start=start)
            frontend.start_queue(index, driver, enable=enable, call_as=call_as)
        return frontend

    # Guests

    def console(
        self,
        frontend: Frontend | None = None,
        *,
        without: int = 0,
        buffers: int = _BUFFERS,
        buffer_size: int = 4096,
        memory: GuestMemory | None = None,
    ) -> ConsoleDriver:
        """Return a guest's console whose port 0 is open."""
        if frontend is None:
            frontend = self.start(without=without, queues=self.all_queues(without), memory=memory)
        console = ConsoleDriver(frontend, buffers=buffers, buffer_size=buffer_size)
        if console.multiport:
            console.wait_until(
                lambda: any(said.event == Event.PORT_ADD for said in console.control),
                "PORT_ADD after DEVICE_READY",
            )
            try:
                console.wait_open(QUIET)
            except TimeoutError:  # a generic port: somebody in the guest opens it
                console.open()
        return console

    def all_queues(self, without: int = 0) -> int:
        """Return how many queues a guest has that uses every port."""
        if not self.features & Feature.MULTIPORT & ~without:
            return 2
        queues = 2 * max(self.backend.ports, 1) + 2
        return min(queues, max(self.backend.queues, 4))

    def client(self) -> Client:
        """Return a client that may not have been noticed yet."""
        client = Client(self.backend)
        self._stack.callback(client.close)
        return client

    def meet(self, console: ConsoleDriver) -> Client:
        """Return a client that reads what the guest writes from now on."""
        client = self.client()
        deadline = time.monotonic() + self.timeout
        while True:
            mark = marker()
            console.write(mark)
            patience = time.monotonic() + QUIET
            while client.take(patience - time.monotonic()):
                at = client.received.find(mark)
                if at >= 0:
                    del client.received[: at + len(mark)]
                    return client
            if time.monotonic() > deadline:
                raise BrokenError(
                    f"a client got {bytes(client.received[-40:])!r}",
                    "what the guest writes while it is attached",
                )

    # Waiting

    def until(self, holds: Callable[[], object], what: str, within: float | None = None) -> None:
        """Wait until something holds that nobody tells of. Raises TimeoutError."""
        within = self.timeout if within is None else within
        deadline = time.monotonic() + within
        while not holds():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what} did not come within {within:g} s")
            time.sleep(_PAUSE)

    def used(self, queue: Queue, count: int = 1) -> list[Used]:
        """Return that many used buffers of a queue, looking for them whether it calls or not."""
        done: list[Used] = []

        def enough() -> bool:
            done.extend(queue.driver.reap())
            return len(done) >= count

        try:
            self.until(enough, "it")
        except TimeoutError:
            raise BrokenError(
                f"queue {queue.index}: {len(done)} of {count} buffers were used",
                f"all within {self.timeout:g} s",
            ) from None
        if len(done) > count:
            raise BrokenError(f"{len(done)} buffers were used", f"{count}, as many as offered")
        return done

    def quiet(self, happened: Callable[[], object]) -> bool:
        """Tell whether something does not happen for a moment."""
        deadline = time.monotonic() + QUIET
        while time.monotonic() < deadline:
            if happened():
                return False
            time.sleep(_PAUSE)
        return True

    def called(self, queue: Queue) -> bool:
        """Wait for a call of this queue, and tell whether it came; it is taken."""
        try:
            self.until(queue.take_calls, "a call")
        except TimeoutError:
            return False
        return True

    # Buffers

    def say(self, frontend: Frontend, event: int, value: int = 1, port: int = 0) -> None:
        """Send a control message from the guest, and wait until its buffer was used."""
        queue = frontend.queues[CONTROL_TX]
        queue.driver.add([Control(port, event, value).encode()])
        queue.notify()
        self.used(queue)

    def refused(self, frontend: Frontend, do: Callable[[], object]) -> bool:
        """Tell whether a message is refused: by its acknowledgement, or by hanging up.

        Without REPLY_ACK nobody is told: then it is enough that the backend has an answer left.
        """
        try:
            do()
            frontend.barrier()
        except (NackError, ConnectionError):
            return True
        return not frontend.protocol_features & ProtocolFeature.REPLY_ACK
