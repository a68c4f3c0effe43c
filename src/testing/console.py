"""A guest's virtio console driver (VIRTIO 1.2, section 5.3), as Linux behaves."""

from __future__ import annotations

import select
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import NamedTuple

from .errors import DeviceError
from .features import Feature
from .frontend import Frontend
from .queue import Queue
from .split import Buffer, Chain

_CONTROL = struct.Struct("<IHH")
_SIZE = struct.Struct("<HH")
_PAGE = 4096

#: How many used lengths are remembered.
_LENGTHS = 1 << 16


class Event(IntEnum):
    """Events of control messages (section 5.3.6.2)."""

    DEVICE_READY = 0
    PORT_ADD = 1
    PORT_REMOVE = 2
    PORT_READY = 3
    CONSOLE_PORT = 4
    RESIZE = 5
    PORT_OPEN = 6
    PORT_NAME = 7


class Control(NamedTuple):
    """A control message; `data` is what follows its eight bytes: a name, or a size."""

    port: int
    event: int
    value: int
    data: bytes = b""

    def encode(self) -> bytes:
        """Return the message as it lies in a buffer."""
        return _CONTROL.pack(*self[:3]) + self.data

    @classmethod
    def decode(cls, data: bytes) -> Control:
        """Return a message's meaning. Raises DeviceError when it is too short to be one."""
        if len(data) < _CONTROL.size:
            raise DeviceError(f"a control message has only {len(data)} bytes")
        port, event, value = _CONTROL.unpack_from(data)
        return cls(port, event, value, data[_CONTROL.size :])


class _Receiver:
    """A receive queue that is kept full of buffers."""

    def __init__(self, queue: Queue, count: int, size: int) -> None:
        self.queue = queue
        self.held: list[Buffer] | None = None
        memory = queue.driver.memory
        for _ in range(min(count, queue.driver.free)):
            self.post(Buffer(memory.alloc(size), size, True))

    def post(self, buffer: Buffer) -> None:
        if self.held is not None:
            self.held.append(buffer)
        else:
            self.queue.driver.add_buffers([buffer])

    def take(self) -> list[tuple[int, bytes]]:
        """Return (used.len, bytes) of each filled buffer, and post the buffers again."""
        taken = []
        for used in self.queue.driver.reap():
            taken.append((used.length, used.data))
            for buffer in used.chain.buffers:
                self.post(buffer)
        if taken:
            self.queue.notify()
        return taken


class GuestPort:
    """One port of the guest's console; `ConsoleDriver` makes it.

    `received` holds the bytes that came in and were not read. `host_open` is the last PORT_OPEN
    the device sent, `is_console`, `name` and `size` (the two numbers of RESIZE, in their order on
    the wire) are what it said of the port. `input_lengths` and
    `output_lengths` are used.len of the last 65536 buffers of each direction: input says exactly
    how much was written, output must be 0.
    """

    def __init__(self, console: ConsoleDriver, number: int, count: int, size: int) -> None:
        self.number = number
        self.received = bytearray()
        self.host_open = self.is_console = not console.multiport
        self.name: bytes | None = None
        self.size: tuple[int, int] | None = None
        self.input_lengths: deque[int] = deque(maxlen=_LENGTHS)
        self.output_lengths: deque[int] = deque(maxlen=_LENGTHS)
        self._console = console
        first = 0 if number == 0 else 2 + 2 * number
        self._input = _Receiver(console.frontend.queues[first], count, size)
        self._output = console.frontend.queues[first + 1]
        self._input.queue.notify()

    @property
    def rx(self) -> Queue:
        """The port's receive queue."""
        return self._input.queue

    @property
    def tx(self) -> Queue:
        """The port's transmit queue."""
        return self._output

    def open(self) -> None:
        """Tell the device that the port is open in the guest."""
        self._console.send_control(self.number, Event.PORT_OPEN, 1)

    def close(self) -> None:
        """Tell the device that nobody in the guest has the port open any more."""
        self._console.send_control(self.number, Event.PORT_OPEN, 0)

    def throttle(self) -> None:
        """Stop returning receive buffers, as a throttled tty does."""
        if self._input.held is None:
            self._input.held = []

    def unthrottle(self) -> None:
        """Return the buffers held since `throttle`, and every later one at once."""
        held, self._input.held = self._input.held or [], None
        for buffer in held:
            self._input.post(buffer)
        self._input.queue.notify()

    # Output.

    def submit(self, *parts: bytes | bytearray | memoryview, indirect: bool = False) -> Chain:
        """Offer one buffer of output, a descriptor for each part, and do not wait.

        Raises RingFullError.
        """
        chain = self._output.driver.add(parts, indirect=indirect)
        self._output.notify()
        return chain

    @property
    def in_flight(self) -> int:
        """How many buffers of output the device has not completed."""
        return self._output.driver.in_flight

    def flush(self, timeout: float | None = None) -> None:
        """Wait until the device has completed all output."""
        self._console.wait_until(
            lambda: not self.in_flight, f"completion of port {self.number}'s output", timeout
        )

    def write(
        self,
        data: bytes | bytearray | memoryview,
        *,
        chunk: int = _PAGE,
        depth: int = 1,
        indirect: bool = False,
        timeout: float | None = None,
    ) -> None:
        """Write all of `data` in buffers of `chunk` bytes, and wait until they are completed.

        At most `depth` buffers are out at a time: 1 is what Linux' hvc does. `timeout` counts for
        each wait.
        """
        view = memoryview(data)
        for start in range(0, len(view), chunk):
            self._console.wait_until(
                lambda: self.in_flight < depth,
                f"completion of port {self.number}'s output",
                timeout,
            )
            self.submit(view[start : start + chunk], indirect=indirect)
        self.flush(timeout)

    # Input.

    def read(self, count: int, timeout: float | None = None) -> bytes:
        """Return exactly `count` bytes of input."""
        self._console.wait_until(
            lambda: len(self.received) >= count,
            lambda: f"{count} bytes of input (so far {len(self.received)})",
            timeout,
        )
        return self._take(count)

    def read_until(self, pattern: bytes, timeout: float | None = None) -> bytes:
        """Return the input up to and with `pattern`."""
        self._console.wait_until(
            lambda: pattern in self.received,
            lambda: f"{pattern!r} in the input (so far {bytes(self.received[-200:])!r})",
            timeout,
        )
        return self._take(self.received.index(pattern) + len(pattern))

    def read_some(self, timeout: float | None = None) -> bytes:
        """Return all input there is, at least one byte."""
        self._console.wait_until(lambda: bool(self.received), "any input", timeout)
        return self._take(len(self.received))

    def _take(self, count: int) -> bytes:
        data = bytes(self.received[:count])
        del self.received[:count]
        return data

    def pump(self) -> None:
        """Take what the device filled and completed."""
        for length, data in self._input.take():
            self.input_lengths.append(length)
            self.received += data
        for used in self._output.driver.reap():
            self.output_lengths.append(used.length)


class ConsoleDriver:
    """The guest's driver on a frontend whose queues are started.

    With MULTIPORT negotiated it sends DEVICE_READY and answers as Linux does: PORT_READY to
    PORT_ADD, PORT_OPEN to CONSOLE_PORT (unless `auto_open` is False); without, port 0 is there and
    open from the start. `ports` holds the ports by number, `control` every control message
    received. Receive queues are kept full: `buffers` of `buffer_size` bytes, as many as fit.

    Whatever is awaited, all queues are served meanwhile. Waiting raises TimeoutError, by default
    after the frontend's timeout, and ConnectionError when the backend hangs up.

    After `Frontend.reconnect` it goes on as it is. For a guest that boots again, `reset` the
    frontend's rings before reconnecting, and make a new driver. One that comes back from
    hibernation knows its ports, `woken`, and says PORT_READY and PORT_OPEN for each of them in
    place of DEVICE_READY.
    """

    def __init__(
        self,
        frontend: Frontend,
        *,
        buffers: int = 1 << 15,
        buffer_size: int = _PAGE,
        auto_open: bool = True,
        woken: Sequence[int] = (),
    ) -> None:
        self.frontend = frontend
        self.multiport = bool(frontend.features & Feature.MULTIPORT)
        self.auto_open = auto_open
        self.ports: dict[int, GuestPort] = {}
        self.control: list[Control] = []
        self._buffers = buffers
        self._buffer_size = buffer_size
        self._unsent: deque[bytes] = deque()
        self._make_port(0)
        if self.multiport:
            self._control_input = _Receiver(frontend.queues[2], 1 << 15, _PAGE)
            self._control_input.queue.notify()
            if not woken:
                self.submit_control(Control(0, Event.DEVICE_READY, 1).encode())
            for number in woken:
                if number:
                    self._make_port(number)
                for event in (Event.PORT_READY, Event.PORT_OPEN):
                    self.submit_control(Control(number, event, 1).encode())

    def _make_port(self, number: int) -> None:
        self.ports[number] = GuestPort(self, number, self._buffers, self._buffer_size)

    # Port 0, by itself.

    @property
    def port(self) -> GuestPort:
        """Port 0."""
        return self.ports[0]

    def wait_open(self, timeout: float | None = None) -> None:
        """Wait until port 0 is a console and the device has taken what was said of it."""
        self.wait_until(
            lambda: self.port.is_console and self.control_idle, "port 0 as a console", timeout
        )

    def write(
        self,
        data: bytes | bytearray | memoryview,
        *,
        chunk: int = _PAGE,
        depth: int = 1,
        indirect: bool = False,
        timeout: float | None = None,
    ) -> None:
        """Write to port 0; see `GuestPort.write`."""
        self.port.write(data, chunk=chunk, depth=depth, indirect=indirect, timeout=timeout)

    def read(self, count: int, timeout: float | None = None) -> bytes:
        """Read from port 0; see `GuestPort.read`."""
        return self.port.read(count, timeout)

    def read_until(self, pattern: bytes, timeout: float | None = None) -> bytes:
        """Read from port 0; see `GuestPort.read_until`."""
        return self.port.read_until(pattern, timeout)

    def open(self) -> None:
        """Open port 0 in the guest."""
        self.port.open()

    def close_port(self) -> None:
        """Close port 0 in the guest."""
        self.port.close()

    # Control messages.

    def send_control(self, port: int, event: int, value: int) -> None:
        """Send a control message and wait until the device has taken it, as Linux does."""
        self.send_control_raw(Control(port, event, value).encode())

    def send_control_raw(self, data: bytes) -> None:
        """Send any bytes on the control queue, and wait until the device has taken them."""
        self.submit_control(data)
        self.wait_until(lambda: self.control_idle, "completion of a control message")

    def submit_control(self, data: bytes) -> None:
        """Send any bytes on the control queue, once there is room, and do not wait."""
        self._unsent.append(data)
        self._send_controls()

    @property
    def control_idle(self) -> bool:
        """Whether the device has taken every control message sent."""
        return not (self.multiport and (self._unsent or self.frontend.queues[3].driver.in_flight))

    def wait_control(
        self, event: int, *, port: int = 0, value: int | None = None, timeout: float | None = None
    ) -> Control:
        """Return the first such message received, now or earlier, and take it out of `control`."""

        def wanted(message: Control) -> bool:
            return (message.port, message.event) == (port, event) and value in (
                None,
                message.value,
            )

        self.wait_until(
            lambda: any(map(wanted, self.control)),
            f"control event {event} for port {port}, value {value}",
            timeout,
        )
        message = next(filter(wanted, self.control))
        self.control.remove(message)
        return message

    def _send_controls(self) -> None:
        queue = self.frontend.queues[3]
        while self._unsent and queue.driver.free:
            queue.driver.add([self._unsent.popleft()])
        queue.notify()

    def _handle(self, message: Control) -> None:
        number = message.port
        if message.event == Event.PORT_ADD:
            if 3 + 2 * number not in self.frontend.queues:
                raise DeviceError(f"port {number} was added, but has no queues")
            if number not in self.ports:
                self._make_port(number)
            self.submit_control(Control(number, Event.PORT_READY, 1).encode())
            return
        port = self.ports.get(number)
        if port is None:
            raise DeviceError(f"control event {message.event} for port {number}, never added")
        match message.event:
            case Event.PORT_REMOVE:
                del self.ports[number]
            case Event.CONSOLE_PORT:
                port.is_console = True
                if self.auto_open:
                    self.submit_control(Control(number, Event.PORT_OPEN, 1).encode())
            case Event.RESIZE:
                if len(message.data) < _SIZE.size:
                    raise DeviceError(f"RESIZE of port {number} has only {message.data!r}")
                port.size = _SIZE.unpack_from(message.data)
            case Event.PORT_OPEN:
                port.host_open = bool(message.value)
            case Event.PORT_NAME:
                port.name = message.data

    # Waiting.

    @property
    def queues(self) -> list[Queue]:
        """Every queue in use."""
        ports = [queue for port in self.ports.values() for queue in (port.rx, port.tx)]
        control = [self.frontend.queues[2], self.frontend.queues[3]] if self.multiport else []
        return ports + control

    def pump(self) -> None:
        """Take everything the device has done so far, and answer its control messages."""
        for port in list(self.ports.values()):
            port.pump()
        if self.multiport:
            self.frontend.queues[3].driver.reap()
            for _, data in self._control_input.take():
                message = Control.decode(data)
                self.control.append(message)
                self._handle(message)
            self._send_controls()

    def arm(self) -> bool:
        """Ask to be called for whatever comes next; True: it is there already, `pump` again."""
        early = [queue for queue in self.queues if queue.driver.enable_calls()]
        return bool(early)

    def wait_until(
        self,
        condition: Callable[[], bool],
        what: str | Callable[[], str],
        timeout: float | None = None,
    ) -> None:
        """Serve the queues until `condition` holds.

        Raises TimeoutError naming `what` after `timeout` seconds, ConnectionError when the backend
        hangs up first.
        """
        timeout = self.frontend.timeout if timeout is None else timeout
        deadline = time.monotonic() + timeout
        while True:
            self.pump()
            if condition():
                return
            if self.arm():
                continue
            if not self.sleep(deadline):
                name = what if isinstance(what, str) else what()
                raise TimeoutError(f"{name} did not come within {timeout:g} s")

    def sleep(self, deadline: float) -> bool:
        """Wait for a call until `deadline` (monotonic), and tell whether one came.

        Raises ConnectionError when the backend hangs up.
        """
        poll = select.poll()
        connection = self.frontend.socket.fileno()
        poll.register(connection, select.POLLRDHUP)
        for queue in self.queues:
            if queue.call_fd is not None:
                poll.register(queue.call_fd, select.POLLIN)
        ready = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
        for queue in self.queues:
            queue.take_calls()
        if any(fd == connection for fd, _ in ready):
            raise ConnectionError("the backend hung up")
        return bool(ready)
