"""The guest's console driver against the tiny backend."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import pytest
from vhost_device_console.testing import (
    ConsoleDriver,
    Control,
    DeviceError,
    Event,
    Frontend,
    GuestMemory,
    SplitDriver,
    connect_like_qemu,
    connect_like_uml,
)

Serve = Callable[..., tuple[Any, socket.socket]]


class Boot(Protocol):
    """The `boot` fixture."""

    def __call__(
        self, *, connect: Any = ..., timeout: float = ..., device: dict[str, Any] = ..., **more: Any
    ) -> tuple[ConsoleDriver, Any]: ...


@pytest.fixture
def boot(serve: Serve) -> Iterator[Boot]:
    """Give a function that starts a device and a console driver, and returns both."""
    with contextlib.ExitStack() as ends:

        def start(
            *,
            connect: Any = connect_like_qemu,
            timeout: float = 10.0,
            device: dict[str, Any] | None = None,
            **more: Any,
        ) -> tuple[ConsoleDriver, Any]:
            backend, connection = serve(**(device or {}))
            memory = ends.enter_context(GuestMemory())
            frontend = ends.enter_context(connect(connection, memory, timeout=timeout))
            return ConsoleDriver(frontend, **more), backend

        yield start


TWO_QUEUES = {"virtio": 1 << 30 | 1 << 32}


def test_dialogue(boot: Boot) -> None:
    """The guest says DEVICE_READY, PORT_READY to PORT_ADD, PORT_OPEN to CONSOLE_PORT."""
    console, device = boot()
    console.wait_open()
    assert device.controls == [(0, 0, 1), (0, 3, 1), (0, 6, 1)]


def test_control_log(boot: Boot) -> None:
    """What the device said is kept in order."""
    console, _ = boot()
    console.wait_until(lambda: console.port.host_open, "PORT_OPEN")
    assert console.control == [
        Control(0, Event.PORT_ADD, 1),
        Control(0, Event.CONSOLE_PORT, 1),
        Control(0, Event.PORT_NAME, 1, b"console0"),
        Control(0, Event.PORT_OPEN, 1),
    ]


def test_port_name(boot: Boot) -> None:
    """The port's name is what the device said."""
    console, _ = boot()
    console.wait_control(Event.PORT_OPEN)
    assert console.port.name == b"console0"


def test_wait_control_takes_the_message(boot: Boot) -> None:
    """A message waited for leaves the log, so that the next one can be waited for."""
    console, _ = boot()
    assert console.wait_control(Event.PORT_NAME).data == b"console0"
    assert Event.PORT_NAME not in [message.event for message in console.control]


def test_wait_control_in_vain(boot: Boot) -> None:
    """A message that does not come is named."""
    console, _ = boot()
    with pytest.raises(TimeoutError, match="control event 5 for port 0, value None"):
        console.wait_control(Event.RESIZE, timeout=0.01)


def test_no_automatic_open(boot: Boot) -> None:
    """The guest's answer to CONSOLE_PORT can be left to the test."""
    console, device = boot(auto_open=False)
    console.wait_open()
    console.open()
    console.close_port()
    assert device.controls[2:] == [(0, 6, 1), (0, 6, 0)]


def test_control_for_a_port_never_added(boot: Boot) -> None:
    """The device must not speak of ports it did not add."""
    console, _ = boot(device={"replies": [struct.pack("<IHH", 9, 6, 1)]})
    with pytest.raises(DeviceError, match="port 9, never added"):
        console.wait_open()


def test_port_without_queues(boot: Boot) -> None:
    """The device must not add a port that there are no queues for."""
    console, _ = boot(device={"replies": [struct.pack("<IHH", 1, 1, 1)]})
    with pytest.raises(DeviceError, match="port 1 was added, but has no queues"):
        console.wait_open()


def test_raw_control(boot: Boot) -> None:
    """Any bytes can be sent as a control message."""
    console, device = boot()
    console.wait_open()
    console.send_control_raw(b"\x01\x02\x03")
    console.send_control(7, 99, 5)
    assert device.controls[-1] == (7, 99, 5)


def test_more_controls_than_the_ring_holds(boot: Boot) -> None:
    """Control messages wait for room."""
    console, device = boot()
    console.wait_open()
    for value in range(200):
        console.submit_control(Control(0, 99, value).encode())
    console.wait_until(lambda: console.control_idle, "the flood's end")
    assert device.controls[3:] == [(0, 99, value) for value in range(200)]


def test_two_queue_mode(boot: Boot) -> None:
    """Without MULTIPORT two queues are enough, and no control message is sent."""
    console, device = boot(
        connect=lambda *args, **more: connect_like_qemu(*args, queue_count=2, **more),
        device={**TWO_QUEUES, "echo": True},
    )
    console.wait_open()
    console.write(b"hello")
    assert console.read(5) == b"hello"
    assert device.controls == []


DATA = bytes(range(256)) * 80  # 5 buffers of 4096 bytes


@pytest.mark.parametrize("connect", [connect_like_uml, connect_like_qemu], ids=["uml", "qemu"])
@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("indirect", [False, True])
def test_output(boot: Boot, connect: Any, event_idx: bool, indirect: bool) -> None:
    """What is written arrives once and in order, with every way to notify and to lay out."""
    features = 1 << 1 | 1 << 28 | 1 << 30 | 1 << 32 | event_idx << 29
    console, device = boot(connect=connect, device={"virtio": features})
    console.wait_open()
    console.write(DATA, depth=3, indirect=indirect)
    assert bytes(device.output) == DATA


def test_output_over_the_wrap_around(boot: Boot) -> None:
    """Output, input and control go on where every ring's index wraps around."""

    def connect(connection: socket.socket, memory: GuestMemory, **more: Any) -> Frontend:
        drivers = [SplitDriver(memory, 64, start=65535) for _ in range(4)]
        return connect_like_qemu(connection, memory, drivers, **more)

    console, device = boot(connect=connect, device={"echo": True})
    console.wait_open()
    console.write(DATA, chunk=100, depth=60)
    assert console.read(len(DATA)) == bytes(device.output) == DATA


def test_output_in_parts(boot: Boot) -> None:
    """One buffer may have any number of descriptors."""
    console, device = boot()
    console.wait_open()
    console.port.submit(b"a", b"bc", b"def")
    console.port.flush()
    assert bytes(device.output) == b"abcdef"
    assert console.port.tx.driver.used_idx == 1


def test_output_lengths(boot: Boot) -> None:
    """used.len of each output buffer is recorded."""
    console, _ = boot()
    console.wait_open()
    console.write(bytes(100), chunk=10)
    assert list(console.port.output_lengths) == [0] * 10


def test_output_in_vain(boot: Boot) -> None:
    """A device that completes nothing is a TimeoutError that says so."""
    console, _ = boot()
    console.wait_open()
    console.frontend.disable(1)
    with pytest.raises(TimeoutError, match="completion of port 0's output did not come within"):
        console.write(b"x", timeout=0.01)


def test_input(boot: Boot) -> None:
    """More input than all buffers hold arrives once and in order."""
    console, device = boot()
    console.wait_open()
    data = DATA * 30
    device.type(data)
    assert console.read(len(data)) == data


def test_small_buffers(boot: Boot) -> None:
    """Receive buffers can be few and small, and each one's used.len is recorded."""
    console, device = boot(buffers=2, buffer_size=3)
    console.wait_open()
    device.type(b"abcdefgh")
    assert console.read(8) == b"abcdefgh"
    assert list(console.port.input_lengths) == [3, 3, 2]


def test_read_until(boot: Boot) -> None:
    """Reading ends with the pattern; what follows stays."""
    console, device = boot()
    console.wait_open()
    device.type(b"login: rest")
    assert console.read_until(b": ") == b"login: "
    assert console.read(4) == b"rest"


def test_read_some(boot: Boot) -> None:
    """All there is can be read."""
    console, device = boot()
    console.wait_open()
    device.type(b"ab")
    assert console.port.read_some() == b"ab"


def test_read_in_vain(boot: Boot) -> None:
    """A TimeoutError says what was awaited and what came."""
    console, device = boot()
    console.wait_open()
    device.type(b"pass")
    console.wait_until(lambda: len(console.port.received) == 4, "input")
    with pytest.raises(TimeoutError, match=r"b'word' in the input \(so far b'pass'\)"):
        console.read_until(b"word", timeout=0.01)


def test_throttled_guest(boot: Boot) -> None:
    """A throttled guest takes what its buffers hold and no more, until it is unthrottled."""
    console, device = boot(buffers=2, buffer_size=4)
    console.wait_open()
    console.port.throttle()
    device.type(b"abcdefghijkl")
    assert console.read(8) == b"abcdefgh"
    with pytest.raises(TimeoutError):
        console.read(1, timeout=0.01)
    console.port.unthrottle()
    assert console.read(4) == b"ijkl"


def test_hang_up_while_waiting(boot: Boot) -> None:
    """A backend that hangs up ends the wait at once."""
    console, _ = boot(device={"hang_up_after": 19})
    console.wait_open()
    console.frontend.send(19)
    with pytest.raises(ConnectionError, match="hung up"):
        console.read(1)


def test_reconnect(boot: Boot, serve: Serve) -> None:
    """After a reconnect the driver goes on, with the input buffers it had posted."""
    console, _ = boot()
    console.wait_open()
    console.write(b"before")
    device, another = serve(echo=True)
    console.frontend.reconnect(another)
    console.write(b"after")
    assert console.read(5) == b"after"
    assert bytes(device.output) == b"after"


def test_reboot(boot: Boot, serve: Serve) -> None:
    """With its rings reset a guest boots again on the same memory."""
    console, _ = boot()
    console.wait_open()
    device, another = serve()
    for queue in console.queues:
        queue.driver.reset()
    console.frontend.reconnect(another)
    ConsoleDriver(console.frontend).wait_open()
    assert device.controls == [(0, 0, 1), (0, 3, 1), (0, 6, 1)]


def test_short_control_message() -> None:
    """A control message shorter than its eight bytes is the device's fault."""
    with pytest.raises(DeviceError, match="only 7 bytes"):
        Control.decode(bytes(7))
