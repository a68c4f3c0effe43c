"""A whole daemon under one guest and one reader, in both ring formats, at both kinds of port.

The guest writes buffers of any layout, on rings that are stopped and started again and connections
that break; the reader types and pauses, at a blocking port so long that buffers are held. At the
end each has every byte of the other, once and in order. One daemon goes on through all examples of
a test. VDC_EXAMPLES=n tries more: see `budget`.
"""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest
from budget import Machine, run
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule
from vhost_device_console.testing import (
    DRIVER_FEATURES,
    ConsoleDriver,
    Feature,
    GuestMemory,
    RingFullError,
    connect_like_qemu,
    pause_like_qemu,
    resume_like_qemu,
)

import launch
from conftest import StartDaemon

#: What may be on its way, in bytes: a console's journal has room for it, a blocking port's has not.
MOST_OUTPUT = {False: 1 << 19, True: 3 << 20}
MOST_INPUT = 1 << 15

PIECES = [1, 0, 2, 15, 16, 100, 4095, 4096, 30000]
SEED = st.integers(0, 1 << 16)
FEATURES = [Feature.EVENT_IDX, Feature.INDIRECT_DESC, Feature.IN_ORDER]


class Daemons(Machine):
    def __init__(self, daemon: launch.Daemon, data: str, packed: bool, blocking: bool) -> None:
        super().__init__()
        self.daemon = daemon
        self.data = data
        self.number = int(blocking)
        self.most = MOST_OUTPUT[blocking]
        self.features = int(DRIVER_FEATURES) | Feature.RING_PACKED * packed
        self.ends = ExitStack()
        self.written = bytearray()  # by the guest, and not yet read
        self.typed = bytearray()  # to the guest, and not yet read

    def close(self) -> None:
        self.ends.close()

    @initialize(
        without=st.sets(st.sampled_from(FEATURES)),
        queue_size=st.sampled_from([4, 16, 64, 256]),
        seed=SEED,
    )
    def boot(self, without: set[Feature], queue_size: int, seed: int) -> None:
        for feature in FEATURES:
            self.features |= feature
        for feature in without:
            self.features &= ~feature
        self.memory = self.ends.enter_context(GuestMemory(8 << 20))
        self.frontend = self.ends.enter_context(
            connect_like_qemu(
                self.daemon.sockets[0],
                self.memory,
                features=self.features,
                queue_size=queue_size,
                queue_count=4 + 2 * self.number,
                timeout=launch.WITHIN,
            )
        )
        assert self.frontend.features == self.features
        self.console = ConsoleDriver(self.frontend, buffers=16)
        self.console.wait_until(lambda: self.number in self.console.ports, "the port")
        self.port = self.console.ports[self.number]
        self.attach()
        self.console.wait_until(lambda: self.port.host_open, "the reader")
        self.port.open()
        self.pass_over_what_a_failed_example_left()
        self.write(20, seed)

    def attach(self) -> None:
        self.peer = self.ends.enter_context(socket.socket(socket.AF_UNIX))
        self.peer.settimeout(launch.WITHIN)
        self.peer.connect(self.data)

    def pass_over_what_a_failed_example_left(self) -> None:
        mark = b"mark %x" % random.getrandbits(64)
        self.port.submit(mark)
        launch.receive_until(self.peer, mark)
        self.peer.sendall(mark)
        self.port.read_until(mark)

    @rule(count=st.integers(1, 20), seed=SEED)
    def write(self, count: int, seed: int) -> None:
        """Offer so many buffers, and wait only where there is no room for the next."""
        rng = random.Random(seed)
        for _ in range(count):
            parts = [rng.randbytes(rng.choice(PIECES)) for _ in range(rng.randint(1, 4))]
            if len(self.written) + sum(map(len, parts)) > self.most:
                self.read(rng.randint(200000, self.most))
            self.offer(
                parts, indirect=bool(self.features & Feature.INDIRECT_DESC) and rng.random() < 0.5
            )
            self.written += b"".join(parts)

    @rule(seed=SEED)
    def flood(self, seed: int) -> None:
        """Write as much as may be on its way, which a blocking port's journal has no room for."""
        self.write(self.most // 40000, seed)

    def offer(self, parts: list[bytes], *, indirect: bool) -> None:
        """Offer a buffer; while there is no room, read what may hold up those before."""
        while True:
            try:
                self.port.submit(*parts, indirect=indirect)
                return
            except RingFullError:
                if self.written and self.peer.fileno() >= 0:
                    self.read(1 << 16)
                    self.console.pump()
                else:
                    self.port.flush()

    @rule(most=st.integers(1, 1 << 20))
    def read(self, most: int) -> None:
        """Let the reader go on for so many bytes, which must be the next ones."""
        while self.written and most:
            data = self.peer.recv(min(most, len(self.written)))
            assert data == self.written[: len(data)]
            assert data, "the daemon hung up"
            del self.written[: len(data)]
            most -= len(data)

    @rule(size=st.sampled_from([1, 2, 100, 4096, 20000]), seed=SEED)
    def type(self, size: int, seed: int) -> None:
        data = random.Random(seed).randbytes(size)
        if len(self.typed) + size > MOST_INPUT:
            self.take()
        self.peer.sendall(data)
        self.typed += data

    @rule()
    def take(self) -> None:
        """Let the guest take what was typed."""
        assert self.port.read(len(self.typed)) == self.typed
        self.typed.clear()
        assert not self.port.received

    @rule(is_open=st.booleans())
    def open(self, is_open: bool) -> None:
        """Close the port for a while; what is typed meanwhile waits."""
        self.take()
        if not is_open:
            self.port.close()
            self.type(100, 0)
            self.write(3, 0)
            assert not self.port.received
        self.port.open()
        self.take()

    @rule(buffers=st.integers(0, 3), typed=st.sampled_from([0, 1, 5000]))
    def stop_and_start(self, buffers: int, typed: int) -> None:
        """Stop the rings; what is offered and typed while they are is served when they start."""
        self.take()
        pause_like_qemu(self.frontend)
        driver = self.port.tx.driver
        for number in range(buffers):
            if driver.free:
                driver.add([b"stopped %d" % number])
                self.written += b"stopped %d" % number
        driver.publish()
        if typed:
            self.type(typed, 0)
        resume_like_qemu(self.frontend, self.memory)

    @rule()
    def reconnect(self) -> None:
        """Lose the connection, and go on with the same rings on another one."""
        self.frontend.reconnect()

    @rule()
    def leave_and_come_back(self) -> None:
        """Let the reader be another one; what was not read waits for it."""
        self.read(len(self.written))
        self.take()
        self.peer.close()
        self.write(3, 1)
        self.attach()

    @rule()
    def finish(self) -> None:
        """Let everyone have what is theirs."""
        self.read(len(self.written))
        self.port.flush()
        self.take()
        assert set(self.port.output_lengths) <= {0}


@pytest.mark.parametrize("blocking", [False, True], ids=["console", "blocking"])
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_every_byte_arrives_once_and_in_order(
    daemon: StartDaemon, folder: Path, packed: bool, blocking: bool
) -> None:
    path = str(folder / "generic")
    served = daemon("unix", 1, "--packed", "--port", f"name=generic,backend=unix,path={path}")
    data = f"{path}0" if blocking else served.data[0]
    run(Daemons, served, data, packed, blocking, examples=6, steps=15)
