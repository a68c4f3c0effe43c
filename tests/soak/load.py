"""One process of guests and their clients for soak.py: traffic both ways, all of it checked.

It is told what to do by lines of JSON on its standard input, and says what happened in lines of
JSON on its standard output. Each guest has a thread, a mock frontend, and the clients of its ports.
"""

from __future__ import annotations

import json
import os
import random
import re
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vhost_device_console.testing import (
    DRIVER_FEATURES,
    ConsoleDriver,
    Feature,
    Frontend,
    GuestMemory,
    GuestPort,
    connect_like_cloud_hypervisor,
    connect_like_qemu,
    connect_like_uml,
    make_driver,
)

#: Seconds anything may take, on a machine that is busy with other things too.
WITHIN = 60.0

#: All streams are parts of this noise, again and again: where a byte is tells its offset.
PERIOD = 1048573
NOISE = random.Random(0).randbytes(PERIOD)
NOISE += NOISE

#: So many bytes of it are found in one place only.
_UNIQUE = 32

_MARKER = re.compile(rb"\r\n\[vhost-device-console: (\d+) bytes missed\]\r\n")
_MARKER_BEGINS = b"\r\n[vhost-device-console: "

#: How the guests differ; each is the next kind's.
KINDS = ("split", "packed", "tracked split", "tracked packed", "UML", "flags")


class Violation(Exception):  # noqa: N818
    """A promise that was not kept."""


def say(**what: Any) -> None:
    """Tell soak.py."""
    with _saying:
        print(json.dumps(what), flush=True)


_saying = threading.Lock()
stopping = threading.Event()


def piece(phase: int, offset: int, count: int) -> bytes:
    """Return `count` bytes, at most a period, of the stream with that phase."""
    at = (offset + phase) % PERIOD
    return NOISE[at : at + count]


def check(got: bytes, phase: int, offset: int, what: str) -> None:
    """Raise Violation unless `got` is what the stream has at `offset`."""
    wanted = piece(phase, offset, len(got))
    if got == wanted:
        return
    at = next(at for at, pair in enumerate(zip(got, wanted, strict=True)) if pair[0] != pair[1])
    found = NOISE.find(got[at : at + _UNIQUE])
    if found < 0:
        raise Violation(f"{what}: at {offset + at} is what was never sent: {got[at:][:60]!r}")
    off = (found - phase - offset - at + PERIOD // 2) % PERIOD - PERIOD // 2
    kind = f"{off} bytes are lost" if off > 0 else f"{-off} bytes came twice"
    raise Violation(f"{what}: {kind} at {offset + at}")


class Client:
    """Somebody at a port; `position` is the offset of what comes next, None until it is known.

    A lazy one does not read until it `wakes`, and may find gaps then, which have to be exact.
    """

    def __init__(self, stream: Stream, position: int | None, lazy: bool) -> None:
        self.stream = stream
        self.position = position
        self.lazy = self.asleep = lazy
        self.ended = False
        self.outgoing = b""
        self._unchecked = b""
        self.sock = socket.create_connection(("127.0.0.1", stream.tcp), timeout=WITHIN)
        self.sock.setblocking(False)

    def take(self) -> None:
        """Check what came, and send what there is room for."""
        if self.outgoing:
            try:
                sent = self.sock.send(self.outgoing)
            except BlockingIOError:
                sent = 0
            self.outgoing = self.outgoing[sent:]
        while not self.asleep and not self.ended:
            try:
                data = self.sock.recv(1 << 16)
            except BlockingIOError:
                return
            if data:
                self._check(self._unchecked + data)
            else:
                self.ended = True

    def _check(self, data: bytes) -> None:
        stream = self.stream
        self._unchecked = b""
        if self.position is None:
            if len(data) < _UNIQUE:
                self._unchecked = data
                return
            found = NOISE.find(data[:_UNIQUE])
            if found < 0:
                raise Violation(f"{stream.name}: who joined got what was never sent: {data[:60]!r}")
            back = (stream.written - (found - stream.phase)) % PERIOD
            self.position = stream.written - back
        if self.lazy:
            data = self._pass_gap(data)
        if data:
            check(data, stream.phase, self.position, f"{stream.name}, at a client")
            self.position += len(data)
            stream.counts["received"] += len(data)

    def _pass_gap(self, data: bytes) -> bytes:
        assert self.position is not None
        at = data.find(_MARKER_BEGINS)
        if at < 0:
            return data
        self._check_now(data[:at])
        marker = _MARKER.match(data, at)
        if marker is None:
            if len(data) - at > 64:
                raise Violation(f"{self.stream.name}: a notice that is none: {data[at:][:60]!r}")
            self._unchecked = data[at:]
            return b""
        self.position += int(marker[1])
        self.stream.counts["missed by lazy clients, as told"] += int(marker[1])
        return self._pass_gap(data[marker.end() :])

    def _check_now(self, data: bytes) -> None:
        assert self.position is not None
        check(data, self.stream.phase, self.position, f"{self.stream.name}, at a client")
        self.position += len(data)

    def hang_up(self, rudely: bool = False) -> None:
        """Leave, whatever was not read."""
        if rudely:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
        self.sock.close()


class Stream:
    """What one port of a guest carries, and its clients; `seen` is how far the last one got."""

    def __init__(self, name: str, number: int, tcp: int, phase: int, counts: Counter[str]) -> None:
        self.name = name
        self.number = number
        self.tcp = tcp
        self.phase = phase
        self.counts = counts
        self.clients: list[Client] = []
        self.written = 0
        self.to_write: list[int] = []  # sizes of buffers
        self.depth = 1
        self.typed = 0
        self.arrived = 0
        self.seen = 0

    def attach(self, lazy: bool = False) -> Client:
        """Have one more client; the first one has to begin where the last one was."""
        client = Client(self, None if self.clients else self.seen, lazy)
        self.clients.append(client)
        self.counts["clients"] += 1
        return client

    def write(self, port: GuestPort, most: int) -> None:
        """Give the device up to `most` of the buffers that are due."""
        while self.to_write and most and port.in_flight < self.depth and port.tx.driver.free > 2:
            count = self.to_write.pop()
            port.submit(piece(self.phase, self.written, count))
            self.written += count
            self.counts["written"] += count
            most -= 1

    def type(self, count: int) -> None:
        """Have the first client type."""
        data = piece(self.phase + PERIOD // 2, self.typed, count)
        self.clients[0].outgoing += data
        self.typed += count
        self.counts["typed"] += count

    def take(self, port: GuestPort) -> None:
        """Check what the guest and the clients got."""
        if port.received:
            data = bytes(port.received)
            port.received.clear()
            check(data, self.phase + PERIOD // 2, self.arrived, f"{self.name}, in the guest")
            self.arrived += len(data)
        for client in self.clients:
            client.take()

    def settled(self, port: GuestPort) -> bool:
        """Say whether everything has arrived everywhere."""
        return (
            not self.to_write
            and not port.in_flight
            and self.arrived == self.typed
            and all(self.up_to_date(client) for client in self.clients)
        )

    def up_to_date(self, client: Client) -> bool:
        """Say whether a client has all there is, or has found none yet."""
        return client.asleep or client.position in (self.written, None)

    def state(self, port: GuestPort) -> str:
        """Say what there is of it, for whom it does not go on."""
        return (
            f"written {self.written}, {len(self.to_write)} buffers to come, {port.in_flight} under "
            f"way, clients at {[client.position for client in self.clients]}, "
            f"typed {self.typed}, arrived {self.arrived}"
        )


def connect_tracked(path: str, memory: GuestMemory, queue_count: int, timeout: float) -> Frontend:
    """Connect with packed rings and an area for what is in flight."""
    frontend = Frontend(path, timeout=timeout)
    features = DRIVER_FEATURES | Feature.RING_PACKED
    drivers = [make_driver(memory, 64, features) for _ in range(queue_count)]

    def talk(frontend: Frontend) -> None:
        frontend.negotiate(features)
        frontend.set_memory(memory)
        if frontend.inflight is None:
            frontend.get_inflight_fd(queue_count, 64)
        assert frontend.inflight is not None
        frontend.set_inflight_fd(*frontend.inflight)
        for index, driver in enumerate(drivers):
            frontend.start_queue(index, driver)

    frontend.conversation = talk
    talk(frontend)
    return frontend


@dataclass
class Kill:
    """A worker to be killed, and when it was; `served` is the first byte's time after that."""

    pid: int
    daemon: int
    at: float | None = None
    written: int = 0


class Guest:
    """A guest and everybody at it."""

    def __init__(self, number: int, socket_path: str, tcp: list[int], seed: int) -> None:
        self.number = number
        self.kind = KINDS[number % len(KINDS)]
        self.random = random.Random(seed * 1000 + number)
        self.counts: Counter[str] = Counter()
        self.streams = [
            Stream(
                f"guest {number} ({self.kind}), port {port}",
                port,
                at,
                number * 20011 + port,
                self.counts,
            )
            for port, at in enumerate(tcp)
        ]
        self.path = socket_path
        self.kill: Kill | None = None
        self._memory: GuestMemory | None = None
        self._console: ConsoleDriver
        self.idle = threading.Event()

    # Its frontend

    def boot(self) -> None:
        """Begin with new memory and a new frontend."""
        self._memory = memory = GuestMemory(4 << 20)
        count = 2 + 2 * len(self.streams)
        more: dict[str, Any] = {"timeout": WITHIN}
        match self.kind:
            case "tracked split":
                frontend = connect_like_cloud_hypervisor(self.path, memory, queue_size=64, **more)
            case "tracked packed":
                frontend = connect_tracked(self.path, memory, count, **more)
            case "UML":
                frontend = connect_like_uml(self.path, memory, queue_count=count, **more)
            case kind:
                features = {
                    "split": DRIVER_FEATURES,
                    "packed": DRIVER_FEATURES | Feature.RING_PACKED,
                    "flags": DRIVER_FEATURES & ~Feature.EVENT_IDX,
                }[kind]
                frontend = connect_like_qemu(
                    self.path, memory, features=features, queue_count=count, **more
                )
        self._console = ConsoleDriver(frontend, buffers=16)
        self._wait(
            lambda: all(stream.number in self._console.ports for stream in self.streams),
            "its ports",
        )
        for stream in self.streams[1:]:
            self._console.ports[stream.number].open()
        self._wait(lambda: self._console.port.is_console and self._console.control_idle, "port 0")

    def shut_down(self) -> None:
        """Be gone at once."""
        self._console.frontend.close()
        self._console.frontend.forget_inflight()
        if self._memory is not None:
            self._memory.close()

    # The loop

    def _step(self) -> None:
        console = self._console
        console.pump()
        for stream in self.streams:
            port = console.ports.get(stream.number)
            if port is None:
                continue
            stream.take(port)
            most = 1 << 30 if self.kill is None else self.random.randrange(4)
            stream.write(port, most)
        if self.kill is not None:
            self._see_to_kill(self.kill)

    def _see_to_kill(self, kill: Kill) -> None:
        stream = self.streams[0]
        now = time.monotonic()
        if kill.at is None:
            if (
                stream.to_write
                and stream.written > kill.written
                and stream.clients
                and self.random.random() < 0.3
            ):
                self._strike(kill)
        elif any(
            client.position is not None and client.position > kill.written
            for client in stream.clients
        ):
            say(killed=self.number, at=kill.at, served=now - kill.at, kind=self.kind)
            self.kill = None

    def _strike(self, kill: Kill) -> None:
        """Kill its worker, if that is what this process still is."""
        try:
            pidfd = os.pidfd_open(kill.pid)
        except ProcessLookupError:
            self.kill = None
            return
        try:
            with open(f"/proc/{kill.pid}/stat") as file:
                parent = int(file.read().rpartition(")")[2].split()[1])
            if parent != kill.daemon:
                self.kill = None
                return
            kill.written = self.streams[0].written
            kill.at = time.monotonic()
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            say(struck=self.number, at=kill.at, pid=kill.pid)
        except (FileNotFoundError, ProcessLookupError):
            self.kill = None
        finally:
            os.close(pidfd)

    def _sleep(self, deadline: float) -> bool:
        """Wait until something happens, and say whether it did."""
        poll = select.poll()
        frontend = self._console.frontend
        poll.register(frontend.socket.fileno(), select.POLLRDHUP)
        queues = self._console.queues
        for queue in queues:
            if queue.call_fd is not None:
                poll.register(queue.call_fd, select.POLLIN)
        for stream in self.streams:
            for client in stream.clients:
                reads = 0 if client.asleep or client.ended else select.POLLIN
                writes = select.POLLOUT if client.outgoing else 0
                if reads or writes:
                    poll.register(client.sock.fileno(), reads | writes)
        ready = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
        for queue in queues:
            queue.take_calls()
        if any(fd == frontend.socket.fileno() for fd, _ in ready):
            raise Violation(f"guest {self.number} ({self.kind}): its frontend was hung up on")
        return bool(ready)

    def _wait(self, condition: Callable[[], bool], what: str, within: float = WITHIN) -> bool:
        deadline = time.monotonic() + within
        while True:
            self._step()
            if condition():
                return True
            more = any(
                stream.to_write
                and stream.number in self._console.ports
                and self._console.ports[stream.number].in_flight < stream.depth
                for stream in self.streams
            )
            if more or self._console.arm():
                continue
            if not self._sleep(deadline):
                if not what:
                    return False
                states = "; ".join(
                    f"port {stream.number}: {stream.state(self._console.ports[stream.number])}"
                    for stream in self.streams
                    if stream.number in self._console.ports
                )
                raise Violation(
                    f"guest {self.number} ({self.kind}): {what} did not come within "
                    f"{within:g} s: {states}"
                )

    def _settled(self) -> bool:
        return all(stream.settled(self._console.ports[stream.number]) for stream in self.streams)

    def _settle(self) -> None:
        self._wait(self._settled, "all that was sent")

    # What happens to it

    def run(self) -> None:
        """Live until told to stop; then everything that was sent has arrived."""
        self.boot()
        for stream in self.streams:
            stream.attach()
        while not stopping.is_set():
            self._wait(stopping.is_set, "", self.random.uniform(0.3, 1.5))
            for stream in self.streams:
                self._order(stream)
            happening = self.random.random()
            if happening < 0.02:
                self._reconnect()  # in the middle of it
            elif happening < 0.10:
                self._come_and_go(self.random.choice(self.streams))
            self._settle()
            if happening > 0.99:
                self._reboot()
            elif happening > 0.96:
                self._leave_alone(self.random.choice(self.streams))
        self.finish()

    def finish(self) -> None:
        """Have everybody get everything."""
        for stream in self.streams:
            for client in stream.clients:
                client.asleep = False
        self._settle()
        self.idle.set()

    def leave(self) -> None:
        """Go, and everybody at it."""
        for stream in self.streams:
            for client in stream.clients:
                client.hang_up()
        self.shut_down()

    def _order(self, stream: Stream) -> None:
        """Have bytes sent both ways."""
        rng = self.random
        share = rng.random()
        if self.kill is not None or share > 0.97:
            total, chunk = rng.randrange(32 << 10, 64 << 10), rng.choice((1024, 4096, 32768))
        elif share > 0.75:
            total, chunk = rng.randrange(2 << 10, 16 << 10), rng.choice((256, 4096))
        else:
            total, chunk = rng.randrange(1, 2 << 10), rng.choice((16, 64, 256))
        stream.to_write = [chunk] * (total // chunk) + [total % chunk or 1]
        stream.depth = rng.choice((1, 4, 16, 32))
        share = rng.random()
        stream.type(rng.randrange(1, 64 << 10 if share > 0.97 else 4096 if share > 0.75 else 64))

    def _reconnect(self) -> None:
        """Have the frontend go and come again with the same rings."""
        self._step()
        self._console.frontend.reconnect()
        self.counts["reconnections"] += 1

    def _reboot(self) -> None:
        self.shut_down()
        self.boot()
        self.counts["reboots"] += 1

    def _come_and_go(self, stream: Stream) -> None:
        """Have another client come in the middle of the traffic, or the first one go."""
        if len(stream.clients) == 1:
            stream.attach(lazy=self.random.random() < 0.3)
            return
        other = stream.clients[1]
        if other.asleep:
            other.asleep = False
            return
        self._wait(lambda: stream.arrived == stream.typed, "what was typed")
        if other.position is None:  # it has got nothing yet and may not be a reader
            return
        stream.clients.pop(0).hang_up(rudely=self.random.random() < 0.5)

    def _leave_alone(self, stream: Stream) -> None:
        """Have everybody leave a port; who comes then begins where the last one was."""
        for client in stream.clients:
            client.asleep = False
        self._settle()
        for client in stream.clients:
            client.sock.shutdown(socket.SHUT_WR)
        self._wait(lambda: all(client.ended for client in stream.clients), "the end of its clients")
        ends = {client.position for client in stream.clients}
        for client in stream.clients:
            client.hang_up()
        stream.clients.clear()
        stream.seen = stream.written
        if ends - {stream.written, None}:
            raise Violation(f"{stream.name}: its clients ended at {ends}, not {stream.written}")
        stream.to_write = [4096] * self.random.randrange(1, 16)
        self._settle()
        stream.attach()
        self._settle()
        self.counts["absences"] += 1


def live(guest: Guest) -> None:
    """Run a guest, and say what went wrong."""
    try:
        guest.run()
    except (Violation, OSError, TimeoutError) as error:
        say(
            violation=str(error)
            if isinstance(error, Violation)
            else f"guest {guest.number} ({guest.kind}): {error!r}"
        )
        guest.idle.set()
    except BaseException as error:
        say(violation=f"guest {guest.number} ({guest.kind}): {error!r}")
        guest.idle.set()
        raise


def total(guests: list[Guest]) -> dict[str, int]:
    """Return what was counted so far."""
    return dict(sum((guest.counts for guest in guests), Counter()))


def main() -> None:
    """Be the guests that the first line describes."""
    described = json.loads(sys.stdin.readline())
    guests = [
        Guest(each["number"], each["socket"], each["tcp"], described["seed"])
        for each in described["guests"]
    ]
    threads = [threading.Thread(target=live, args=[guest], daemon=True) for guest in guests]
    for thread in threads:
        thread.start()
    numbered = {guest.number: guest for guest in guests}
    for line in sys.stdin:
        match json.loads(line):
            case {"kill": number, "pid": pid, "daemon": daemon}:
                guest = numbered[number]
                if guest.kill is None:
                    guest.kill = Kill(pid, daemon)
            case "count":
                say(total=total(guests))
            case "stop":
                stopping.set()
                for guest in guests:
                    guest.idle.wait()
                say(
                    settled={
                        f"{guest.number}/{stream.number}": stream.written
                        for guest in guests
                        for stream in guest.streams
                    },
                    total=total(guests),
                )
            case "leave":
                for guest in guests:
                    guest.leave()
                say(left=True)
    os._exit(0)  # whatever the threads wait for


if __name__ == "__main__":
    main()
