"""Statements about the console device (VIRTIO 1.2, section 5.3)."""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import suppress

from ...worker.vhost_user.message import ProtocolFeature
from ..console import ConsoleDriver, Control, Event
from ..features import Feature
from ..frontend import Frontend
from ..queue import Queue
from .bench import CONTROL_RX, CONTROL_TX, RX, SIZE, TX, Bench, marker
from .rings import write
from .statement import BrokenError, Level, NotApplicableError, expect, statement

MUST, SHOULD = Level.MUST, Level.SHOULD
F, P = Feature, ProtocolFeature

_MULTIPORT = "VIRTIO 5.3.6.2"
_OPERATION = "VIRTIO 5.3.6"

#: What the device may say, and how many bytes come with it; None: any number.
_FROM_DEVICE: dict[int, int | None] = {
    Event.PORT_ADD: 0,
    Event.PORT_REMOVE: 0,
    Event.CONSOLE_PORT: 0,
    Event.RESIZE: 4,
    Event.PORT_OPEN: 0,
    Event.PORT_NAME: None,
}


# Queues, configuration


@statement("console.two-queues", MUST, "VIRTIO 5.3.2")
def two_queues(bench: Bench) -> None:
    """Without MULTIPORT queues 0 and 1 are all there is, and port 0 works with no dialogue."""
    bench.console(without=F.MULTIPORT).write(b"two queues\r\n")


@statement("console.four-queues", SHOULD, "VIRTIO 5.3.2", F.MULTIPORT)
def four_queues(bench: Bench) -> None:
    """Without MULTIPORT a frontend that starts the control queues too does no harm."""
    frontend = bench.start(without=F.MULTIPORT, queues=4)
    write(bench, frontend.queues[TX])


@statement("console.max-ports", MUST, "VIRTIO 5.3.4", F.MULTIPORT, P.CONFIG)
def max_ports(bench: Bench) -> None:
    """With MULTIPORT max_nr_ports is valid: there is at least one port."""
    expect(bench.backend.ports >= 1, f"max_nr_ports {bench.backend.ports}", "at least 1")


@statement("console.size", SHOULD, "VIRTIO 5.3.4", F.SIZE, P.CONFIG)
def size(bench: Bench) -> None:
    """With SIZE the columns and rows in the configuration are the same at each look."""
    frontend = bench.negotiate()
    first = frontend.get_config(0, 4)
    second = frontend.get_config(0, 12)[:4]
    expect(first == second, f"{first.hex()}, then {second.hex()}", "one size")


@statement("console.emergency", MUST, "VIRTIO 5.3.5.1", F.EMERG_WRITE, P.CONFIG)
def emergency(bench: Bench) -> None:
    """A write to emerg_wr is allowed on a device that nobody has configured."""
    frontend = bench.connect()
    bench.agree(frontend)
    frontend.set_config(8, b"\n\0\0\0")
    frontend.barrier()


@statement(
    "console.emergency-output", SHOULD, "VIRTIO 5.3.5.1", F.EMERG_WRITE, P.CONFIG, client=True
)
def emergency_output(bench: Bench) -> None:
    """The lower byte written to emerg_wr comes out, and the other three do not."""
    console = bench.console()
    client = bench.meet(console)
    text = b"help"
    for byte in text:
        console.frontend.set_config(8, bytes([byte]) + b"xyz")
    console.frontend.barrier()
    end = marker()
    console.write(end)
    got = client.read_until(end)
    expect(got == text, f"{got[:40]!r}", f"{text!r}")


# The control dialogue


class Dialogue:
    """The control queues of a fresh guest, spoken by hand; `heard` is what the device said.

    It may say something in each of so many buffers; what it has used it gets again, with `again`.
    """

    def __init__(self, bench: Bench, *, buffers: int = 60, again: bool = True) -> None:
        self.bench = bench
        self.frontend: Frontend = bench.start()
        self.heard: list[Control] = []
        self._again = again
        self.offer(buffers)

    def offer(self, count: int) -> None:
        """Give the device so many more buffers for what it has to say."""
        queue = self.frontend.queues[CONTROL_RX]
        for _ in range(count):
            queue.driver.add(writable=[256])
        queue.notify()

    def say(self, event: int, value: int = 1, port: int = 0) -> None:
        """Say something to the device."""
        self.bench.say(self.frontend, event, value, port)

    def listen(self) -> None:
        """Take what the device has said so far."""
        taken = self.frontend.queues[CONTROL_RX].driver.reap()
        self.heard += [Control.decode(used.data) for used in taken]
        if taken and self._again:
            self.offer(len(taken))

    def hear(self, event: int, port: int = 0) -> Control:
        """Wait until the device has said that, now or earlier, and return the first."""

        def found() -> list[Control]:
            self.listen()
            return [said for said in self.heard if (said.event, said.port) == (event, port)]

        self.bench.until(found, f"{Event(event).name} of port {port}")
        return found()[0]

    def silence(self) -> bool:
        """Tell whether the device says nothing for a moment."""
        before = len(self.heard)

        def more() -> bool:
            self.listen()
            return len(self.heard) > before

        return self.bench.quiet(more)

    def settle(self) -> None:
        """Wait until the device has nothing more to say."""
        while not self.silence():
            pass

    def introduce(self) -> list[int]:
        """Have the whole dialogue, each port added; return their ids."""
        self.say(Event.DEVICE_READY)
        self.hear(Event.PORT_ADD)
        self.settle()
        ports = [said.port for said in self.heard if said.event == Event.PORT_ADD]
        for port in ports:
            self.say(Event.PORT_READY, port=port)
        self.settle()
        return ports


@statement("control.silent-first", MUST, "VIRTIO 5.3.5", F.MULTIPORT)
def silent_first(bench: Bench) -> None:
    """Nothing is said to a driver that has not said DEVICE_READY."""
    dialogue = Dialogue(bench)
    expect(dialogue.silence(), f"{dialogue.heard}", "nothing before DEVICE_READY")


@statement("control.announced", MUST, _OPERATION, F.MULTIPORT)
def announced(bench: Bench) -> None:
    """After DEVICE_READY the active ports are announced by PORT_ADD."""
    dialogue = Dialogue(bench)
    dialogue.say(Event.DEVICE_READY)
    dialogue.settle()
    expect(
        any(said.event == Event.PORT_ADD for said in dialogue.heard),
        f"{dialogue.heard}",
        "at least one PORT_ADD",
    )


@statement("control.not-ready", SHOULD, _MULTIPORT, F.MULTIPORT)
def not_ready(bench: Bench) -> None:
    """A driver that says DEVICE_READY with 0, which is failure, is told of no port."""
    dialogue = Dialogue(bench)
    dialogue.say(Event.DEVICE_READY, 0)
    expect(dialogue.silence(), f"{dialogue.heard}", "nothing")


@statement("control.no-port-twice", MUST, "VIRTIO 5.3.6.2.1", F.MULTIPORT)
def no_port_twice(bench: Bench) -> None:
    """No port is added that exists."""
    ports = Dialogue(bench).introduce()
    expect(len(set(ports)) == len(ports), f"ports {ports} were added", "each of them once")


@statement("control.ports-below-max", MUST, "VIRTIO 5.3.6.2.1", F.MULTIPORT, P.CONFIG)
def ports_below_max(bench: Bench) -> None:
    """No port is added whose number is max_nr_ports or more."""
    ports = Dialogue(bench).introduce()
    most = bench.backend.ports
    expect(max(ports) < most, f"port {max(ports)} of {most}", f"numbers below {most}")


@statement("control.removed-were-added", MUST, "VIRTIO 5.3.6.2.1", F.MULTIPORT)
def removed_were_added(bench: Bench) -> None:
    """No port is removed, or spoken of, that was not added before."""
    dialogue = Dialogue(bench)
    dialogue.introduce()
    added: set[int] = set()
    for said in dialogue.heard:
        if said.event == Event.PORT_ADD:
            added.add(said.port)
        expect(said.port in added, f"{said} with ports {sorted(added)}", "only ports there are")
        if said.event == Event.PORT_REMOVE:
            added.remove(said.port)


@statement("control.layout", MUST, _MULTIPORT, F.MULTIPORT)
def layout(bench: Bench) -> None:
    """Each message is 8 bytes, a size or a name after them where the event has one, and known."""
    dialogue = Dialogue(bench)
    dialogue.introduce()
    for said in dialogue.heard:
        expect(said.event in _FROM_DEVICE, f"event {said.event}", "one that devices send")
        more = _FROM_DEVICE[said.event]
        expect(
            more is None or len(said.data) == more,
            f"{Event(said.event).name} with {len(said.data)} bytes more",
            f"{more} bytes more",
        )


@statement("control.open-value", MUST, _MULTIPORT, F.MULTIPORT)
def open_value(bench: Bench) -> None:
    """PORT_OPEN says 0 or 1."""
    dialogue = Dialogue(bench)
    dialogue.introduce()
    values = {said.value for said in dialogue.heard if said.event == Event.PORT_OPEN}
    expect(values <= {0, 1}, f"values {sorted(values)}", "0 or 1")


@statement("control.name", MUST, _MULTIPORT, F.MULTIPORT)
def name(bench: Bench) -> None:
    """A port's name is UTF-8 and has no NUL."""
    dialogue = Dialogue(bench)
    dialogue.introduce()
    names = [said.data for said in dialogue.heard if said.event == Event.PORT_NAME]
    if not names:
        raise NotApplicableError("no port has a name")
    for raw in names:
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            raise BrokenError(f"the name {raw!r}", "UTF-8") from None
        expect(text and "\0" not in text, f"the name {raw!r}", "text without NUL")


@statement("control.console-port", SHOULD, _MULTIPORT, F.MULTIPORT)
def console_port(bench: Bench) -> None:
    """Some port is nominated as a console, without which Linux has no hvc."""
    dialogue = Dialogue(bench)
    ports = dialogue.introduce()

    def nominated() -> bool:
        dialogue.listen()
        return any(said.event == Event.CONSOLE_PORT for said in dialogue.heard)

    bench.until(nominated, f"CONSOLE_PORT for any of the ports {ports}")


@statement("control.answered-when-ready", MUST, "VIRTIO 5.3.5", F.MULTIPORT)
def answered_when_ready(bench: Bench) -> None:
    """What a port is, is said only once the driver has said PORT_READY for it."""
    dialogue = Dialogue(bench)
    dialogue.say(Event.DEVICE_READY)
    dialogue.hear(Event.PORT_ADD)
    dialogue.settle()
    early = [said for said in dialogue.heard if said.event != Event.PORT_ADD]
    expect(not early, f"{early} before PORT_READY", "PORT_ADD alone")


@statement("control.port-failed", SHOULD, _MULTIPORT, F.MULTIPORT)
def port_failed(bench: Bench) -> None:
    """Of a port that the driver could not add (PORT_READY with 0) nothing more is said."""
    dialogue = Dialogue(bench)
    dialogue.say(Event.DEVICE_READY)
    dialogue.hear(Event.PORT_ADD)
    dialogue.settle()
    before = len(dialogue.heard)
    dialogue.say(Event.PORT_READY, 0)
    dialogue.settle()
    later = [said for said in dialogue.heard[before:] if said.event != Event.PORT_REMOVE]
    expect(not later, f"{later}", "nothing, or PORT_REMOVE")


@statement("control.one-buffer", MUST, _MULTIPORT, F.MULTIPORT)
def one_buffer(bench: Bench) -> None:
    """What the device has to say waits for buffers, given one at a time, and none of it is lost."""
    whole = Dialogue(bench)
    whole.introduce()
    slow = Dialogue(bench, buffers=0, again=False)
    slow.say(Event.DEVICE_READY)
    for number, said in enumerate(whole.heard):
        if said.event != Event.PORT_ADD:
            break
        slow.offer(1)
        _wait_heard(bench, slow, number + 1)
    for said in list(slow.heard):
        slow.say(Event.PORT_READY, port=said.port)
    for number in range(len(slow.heard), len(whole.heard)):
        slow.offer(1)
        _wait_heard(bench, slow, number + 1)
    expect(
        slow.heard == whole.heard,
        f"{[Event(said.event).name for said in slow.heard]}",
        f"{[Event(said.event).name for said in whole.heard]}, as with room for all",
    )


def _wait_heard(bench: Bench, dialogue: Dialogue, count: int) -> None:
    def enough() -> bool:
        dialogue.listen()
        return len(dialogue.heard) >= count

    bench.until(enough, f"the device's message {count}")


@statement("control.many-buffers", MUST, _MULTIPORT, F.MULTIPORT)
def many_buffers(bench: Bench) -> None:
    """Of the buffers that were offered together the device uses one after the other."""
    dialogue = Dialogue(bench, again=False)
    dialogue.introduce()
    count = len(dialogue.heard)
    dialogue.say(Event.PORT_READY)
    dialogue.say(Event.DEVICE_READY)
    dialogue.settle()
    expect(len(dialogue.heard) > count, f"nothing after {count} messages", "more in the next ones")


@statement("control.open-and-close", MUST, _MULTIPORT, F.MULTIPORT)
def open_and_close(bench: Bench) -> None:
    """The driver may say PORT_OPEN with 1 and 0 as often as it likes."""
    dialogue = Dialogue(bench)
    for port in dialogue.introduce():
        for value in (1, 0, 1, 1, 0, 0, 1):
            dialogue.say(Event.PORT_OPEN, value, port)


@statement("control.again", SHOULD, _MULTIPORT, F.MULTIPORT)
def again(bench: Bench) -> None:
    """After hibernation Linux says PORT_READY without DEVICE_READY; the port is introduced."""
    dialogue = Dialogue(bench)
    dialogue.introduce()
    dialogue.hear(Event.CONSOLE_PORT)
    dialogue.settle()
    dialogue.heard.clear()
    dialogue.say(Event.PORT_READY)
    dialogue.hear(Event.CONSOLE_PORT)


@statement("control.every-port-works", MUST, "VIRTIO 5.3.2", F.MULTIPORT)
def every_port_works(bench: Bench) -> None:
    """Port n has queues 2n + 2 and 2n + 3 (port 0: 0 and 1), and each takes output."""
    console = bench.console()
    console.wait_until(lambda: console.control_idle, "the dialogue's end")
    for number, port in console.ports.items():
        expect(port.tx.index == (1 if number == 0 else 2 * number + 3), "another queue", "its own")
        console.send_control(number, Event.PORT_OPEN, 1)
        if port.host_open:  # a generic port with nobody at its other end may keep its buffers
            port.write(b"port\r\n")


_NONSENSE: dict[str, tuple[bytes, str]] = {
    "short": (b"\0" * 7, "of 7 bytes"),
    "empty": (b"", "of no bytes"),
    "long": (Control(0, Event.PORT_OPEN, 1).encode() + b"\xff" * 65528, "of 64 KiB"),
    "event": (Control(0, 99, 1).encode(), "with an event that does not exist"),
    "device-event": (Control(0, Event.PORT_ADD, 1).encode(), "that only devices send"),
    "port": (Control(0xFFFF_FFFF, Event.PORT_READY, 1).encode(), "about port 2^32 - 1"),
}


def _nonsense(name: str, data: bytes, what: str) -> None:
    def check(bench: Bench) -> None:
        dialogue = Dialogue(bench)
        dialogue.introduce()
        queue = dialogue.frontend.queues[CONTROL_TX]
        queue.driver.add([data])
        queue.notify()
        bench.used(queue)
        dialogue.heard.clear()
        dialogue.say(Event.PORT_READY)
        dialogue.settle()
        expect(dialogue.heard, "no answer to a PORT_READY after it", "the device to go on")

    check.__doc__ = f"A control message {what} is returned, and the dialogue goes on"
    statement(f"control.nonsense-{name}", SHOULD, _MULTIPORT, F.MULTIPORT, hostile=True)(check)


for _name, (_data, _what) in _NONSENSE.items():
    _nonsense(_name, _data, _what)


@statement("control.flood", SHOULD, _MULTIPORT, F.MULTIPORT, hostile=True)
def flood(bench: Bench) -> None:
    """Questions of a driver that takes no answers are all returned."""
    dialogue = Dialogue(bench, buffers=0)
    for _ in range(500):
        dialogue.say(Event.DEVICE_READY)
        dialogue.say(Event.PORT_READY)


# Bytes, one way


@statement("output.nobody", SHOULD, _OPERATION)
def nobody(bench: Bench) -> None:
    """Output is returned while nobody is attached: a Linux console waits for that, spinning."""
    console = bench.console()
    console.write(b"nobody sees this\r\n" * 200, chunk=16, depth=8)


def _all_bytes(count: int) -> bytes:
    """Return bytes of every value, no two stretches of which are the same."""
    return b"".join(struct.pack("<I", at * 0x9E3779B1 & 0xFFFF_FFFF) for at in range(count // 4))


def _text(count: int) -> bytes:
    """Return text of which every eight characters say where they are."""
    return b"".join(b"%07x " % at for at in range(0, count, 8))


def _output(bench: Bench, data: bytes, send: Callable[[ConsoleDriver, Queue], None]) -> None:
    console = bench.console()
    client = bench.meet(console)
    begin, end = marker(), marker()
    console.write(begin)
    send(console, console.port.tx)
    console.write(end)
    before = client.read_until(begin)
    got = client.read_until(end)
    expect(before == b"", f"{before[:40]!r} before what was written", "nothing")
    _same(got, data, "the client")


def _same(got: bytes, wanted: bytes, who: str) -> None:
    if got == wanted:
        return
    pairs = enumerate(zip(got, wanted, strict=False))
    at = next((at for at, (one, other) in pairs if one != other), min(len(got), len(wanted)))
    raise BrokenError(
        f"{who} got {len(got)} bytes, at {at} {got[at : at + 12]!r}",
        f"{len(wanted)}, {wanted[at : at + 12]!r} there",
    )


@statement("output.in-order", MUST, _OPERATION, client=True)
def output_in_order(bench: Bench) -> None:
    """Each byte of any value that the guest writes comes out once, in order, in 16-byte pieces."""
    data = _all_bytes(16384)
    _output(bench, data, lambda console, _: console.write(data, chunk=16))


@statement("output.deep", MUST, _OPERATION, client=True)
def output_deep(bench: Bench) -> None:
    """Output comes out in order when many buffers of 4 KiB are out at once."""
    data = _text(1 << 18)
    _output_while_read(bench, data)


def _output_while_read(bench: Bench, data: bytes) -> None:
    console = bench.console()
    client = bench.meet(console)
    end = marker()
    rest = memoryview(data + end)
    while rest or console.port.in_flight:
        console.pump()
        while rest and console.port.in_flight < 16:
            console.port.submit(rest[:4096])
            rest = rest[4096:]
        if not client.take(0) and not console.arm() and console.port.in_flight:
            console.wait_until(lambda: client.take(0) or not console.port.in_flight, "progress")
    _same(client.read_until(end), data, "the client")


@statement("output.parts", MUST, "VIRTIO 2.7.4.1", client=True)
def output_parts(bench: Bench) -> None:
    """Output in chains of several descriptors comes out as if it were in one."""
    data = _text(4096)

    def send(_: ConsoleDriver, queue: Queue) -> None:
        for at in range(0, len(data), 256):
            piece = data[at : at + 256]
            queue.driver.add([piece[:1], piece[1:100], piece[100:103], piece[103:]])
            queue.notify()
            bench.used(queue)

    _output(bench, data, send)


@statement("output.indirect", MUST, "VIRTIO 2.7.5.3", F.INDIRECT_DESC, client=True)
def output_indirect(bench: Bench) -> None:
    """Output in tables of descriptors comes out as if it were in one buffer."""
    data = _text(4096)

    def send(_: ConsoleDriver, queue: Queue) -> None:
        for at in range(0, len(data), 256):
            piece = data[at : at + 256]
            queue.driver.add([piece[:7], piece[7:]], indirect=True)
            queue.notify()
            bench.used(queue)

    _output(bench, data, send)


@statement("output.packed", MUST, "VIRTIO 2.8", F.RING_PACKED, client=True)
def output_packed(bench: Bench) -> None:
    """Output through packed rings comes out whole and in order."""
    _output_while_read(bench, _text(1 << 16))


# Bytes, the other way


def _input(bench: Bench, data: bytes, *, pieces: int, buffer_size: int = 4096) -> ConsoleDriver:
    console = bench.console(buffers=SIZE, buffer_size=buffer_size)
    client = bench.meet(console)
    begin = marker()
    client.send(begin)
    console.read_until(begin)
    for at in range(0, len(data), pieces):
        client.send(data[at : at + pieces])
    with suppress(TimeoutError):
        console.wait_until(lambda: len(console.port.received) >= len(data), "all of it")
    _same(bytes(console.port.received), data, "the guest")
    return console


def _received(console: ConsoleDriver) -> int:
    console.pump()
    return len(console.port.received)


@statement("input.in-order", MUST, _OPERATION, client=True)
def input_in_order(bench: Bench) -> None:
    """Each byte of any value that is typed reaches the guest once, in order."""
    _input(bench, _all_bytes(1024), pieces=7)


@statement("input.burst", MUST, _OPERATION, client=True)
def input_burst(bench: Bench) -> None:
    """What is pasted at once, 64 KiB, reaches the guest whole and in order."""
    _input(bench, _text(1 << 16), pieces=1 << 16)


@statement("input.small-buffers", MUST, _OPERATION, client=True)
def input_small_buffers(bench: Bench) -> None:
    """Input that does not fit a buffer goes on in the next ones, here of 3 bytes."""
    _input(bench, _text(512), pieces=512, buffer_size=3)


@statement("input.packed", MUST, "VIRTIO 2.8", F.RING_PACKED, client=True)
def input_packed(bench: Bench) -> None:
    """Input through packed rings reaches the guest whole and in order."""
    _input(bench, _text(1 << 14), pieces=1 << 14)


@statement("input.length", MUST, "VIRTIO 2.7.8.2", client=True)
def input_length(bench: Bench) -> None:
    """A receive buffer's used length is the number of bytes of input in it."""
    console = _input(bench, _text(4096), pieces=100)
    lengths = list(console.port.input_lengths)
    expect(0 not in lengths, "a buffer was used with length 0", "at least a byte in each")
    expect(max(lengths) <= 4096, f"length {max(lengths)} of 4096", "no more than there is room for")


@statement("input.one-by-one", SHOULD, _OPERATION, client=True)
def input_one_by_one(bench: Bench) -> None:
    """Input waits while the guest gives no buffer, and none of it is lost."""
    console = bench.console(buffers=2, buffer_size=4)
    client = bench.meet(console)
    begin = marker()
    client.send(begin)
    console.read_until(begin)
    console.port.throttle()
    data = _text(512)
    client.send(data)
    bench.quiet(lambda: _received(console) > 8)
    console.port.unthrottle()
    got = console.read(len(data))
    _same(got, data, "the guest")


@statement("input.closed", SHOULD, _MULTIPORT, F.MULTIPORT, client=True)
def input_closed(bench: Bench) -> None:
    """Input waits while no program in the guest has the port open, where Linux would drop it."""
    console = bench.console(buffers=SIZE)
    client = bench.meet(console)
    begin = marker()
    client.send(begin)
    console.read_until(begin)
    console.close_port()
    late = marker()
    client.send(late)
    expect(
        bench.quiet(lambda: _received(console)),
        "input for a port that is closed in the guest",
        "none until it is open",
    )
    console.open()
    console.read_until(late)


@statement("input.stopped", MUST, "vhost-user Suspended device state", client=True)
def input_stopped(bench: Bench) -> None:
    """Input writes to no guest memory while all rings are stopped, and is there afterwards."""
    console = bench.console(buffers=SIZE)
    client = bench.meet(console)
    frontend = console.frontend
    bases = {index: frontend.get_vring_base(index) for index in frontend.queues}
    rx = frontend.queues[RX]
    rx.driver.reap()
    late = marker()
    client.send(late)
    expect(bench.quiet(rx.driver.has_used), "a buffer of a stopped ring was filled", "none")
    for index, base in bases.items():
        queue = frontend.queues[index]
        frontend.start_queue(index, queue.driver, base=base)
    for queue in frontend.queues.values():
        queue.kick()
    console.read_until(late)
