"""Guests move between two daemons, as QEMU moves them, and lose and double nothing.

The destination's memory is what a migration copies: all of it once, then only the pages that the
source's log names or that the guest itself wrote.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from scene import boot, exactly, noise, nothing_to_read, port_of, wait_port
from vhost_device_console import config, monitor
from vhost_device_console.testing import (
    ConsoleDriver,
    Feature,
    Frontend,
    GuestMemory,
    NackError,
    PackedDriver,
    SplitDriver,
    connect_like_qemu,
)
from vhost_device_console.testing.conversation import pause_like_qemu, resume_like_qemu
from vhost_device_console.testing.features import DRIVER_FEATURES
from vhost_device_console.testing.frontend import FRONTEND_FEATURES
from vhost_device_console.worker.vhost_user.message import LogArea

from conftest import StartDaemon
from launch import WITHIN, Daemon

PAGE = 4096
FORMATS = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])


class Tracked(GuestMemory):
    """Guest memory that knows which pages the guest itself wrote data to."""

    written: set[int]

    def write(self, addr: int, data: bytes | bytearray | memoryview) -> None:
        self.touch(addr, len(data))
        super().write(addr, data)

    def touch(self, addr: int, size: int) -> None:
        self.written |= {*range(addr // PAGE, (addr + max(size, 1) - 1) // PAGE + 1)}


class Move:
    """A guest that moves: its memory, and the copy that a migration makes of it."""

    def __init__(self, ends: ExitStack, source: Daemon, *, packed: bool, queues: int = 4) -> None:
        memory = Tracked()
        memory.written = set()
        ends.enter_context(memory)
        self.memory = memory
        self.features = DRIVER_FEATURES
        drivers: list[SplitDriver | PackedDriver] = []
        for _ in range(queues):
            if packed:
                driver: SplitDriver | PackedDriver = PackedDriver(memory, 64)
                memory.touch(driver.desc_addr, 64 * 16)
            else:
                # The device's own part of the ring has a page for itself: only the log knows it.
                driver = SplitDriver(memory, 64, used=memory.alloc(PAGE, PAGE))
                memory.touch(driver.desc_addr, 64 * 16)
            memory.touch(driver.avail_addr, 6 + 2 * 64)
            drivers.append(driver)
        if packed:
            self.features |= Feature.RING_PACKED
        self.frontend = ends.enter_context(
            connect_like_qemu(
                source.sockets[0], memory, drivers, features=self.features, timeout=WITHIN
            )
        )
        self.console = ConsoleDriver(self.frontend)
        self.console.wait_open()
        ((self.region, self.fd),) = memory.regions()
        self.log = os.memfd_create("log", os.MFD_CLOEXEC)
        ends.callback(os.close, self.log)
        self.copy = bytearray()

    def begin(self) -> None:
        """Start the log, and copy everything once."""
        top = self.region.guest_addr + self.region.size
        size = -(-top // PAGE // 8 // PAGE) * PAGE
        os.ftruncate(self.log, size)
        self.frontend.start_log(LogArea(size, 0), self.log)
        self.copy[:] = os.pread(self.fd, self.region.size, self.region.mmap_offset)
        self.memory.written = {p for p in self.memory.written if self._is_rings(p)}

    def _is_rings(self, page: int) -> bool:
        return any(
            start // PAGE <= page <= (start + 64 * 16) // PAGE
            for queue in self.frontend.queues.values()
            for start in (queue.driver.desc_addr, queue.driver.avail_addr)
        )

    def dirty(self) -> set[int]:
        """Return the guest's pages that the log names."""
        bits = os.pread(self.log, 1 << 24, 0)
        return {
            8 * at + bit
            for at, byte in enumerate(bits)
            if byte
            for bit in range(8)
            if byte >> bit & 1
        }

    def finish(self) -> bytes:
        """Stop the device, copy the rest, and return the device's state."""
        pause_like_qemu(self.frontend)
        first = self.region.guest_addr // PAGE
        for page in self.dirty() | self.memory.written:
            at = (page - first) * PAGE
            data = os.pread(self.fd, PAGE, self.region.mmap_offset + at)
            self.copy[at : at + PAGE] = data
        return self.frontend.save_state()

    def arrive(self, destination: Daemon, state: bytes) -> None:
        """Go on at another daemon, in the memory that was copied."""
        os.pwrite(self.fd, self.copy, self.region.mmap_offset)

        features = self.frontend.features

        def talk(frontend: Frontend) -> None:
            # The guest's features are not told before the device is started, after the state.
            frontend.get_features()
            frontend.set_protocol_features(frontend.get_protocol_features() & FRONTEND_FEATURES)
            frontend.set_owner()
            frontend.set_backend_req_fd()
            frontend.add_memory(self.memory)
            frontend.load_state(state)
            frontend.features = features
            resume_like_qemu(frontend, self.memory)

        self.frontend.conversation = talk
        self.frontend.reconnect(destination.sockets[0])

    def stay(self) -> None:
        """Go on where it was: the migration failed, or was a snapshot."""
        resume_like_qemu(self.frontend, self.memory)


@pytest.fixture
def two(daemon: StartDaemon) -> tuple[Daemon, Daemon]:
    """Give the daemon a guest is at, and the one it goes to."""
    return daemon("unix", 1, "--packed"), daemon("unix", 1, "--packed", socket_path="d.sock")


Two = tuple[Daemon, Daemon]


@contextmanager
def moving(source: Daemon, packed: bool, queues: int = 4) -> Iterator[Move]:
    with ExitStack() as ends:
        yield Move(ends, source, packed=packed, queues=queues)


@contextmanager
def client(daemon: Daemon) -> Iterator[socket.socket]:
    """Give a client that the console's port has as its reader."""
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(WITHIN)
        peer.connect(daemon.data[0])
        wait_port(daemon, readers=1)
        yield peer


@FORMATS
def test_a_guest_moves_under_traffic_in_both_directions(two: Two, packed: bool) -> None:
    source, destination = two
    output, typed = noise(600_000), noise(120_000)
    with moving(source, packed) as move:
        console = move.console
        with client(source) as peer:
            peer.sendall(typed[:20_000])
            move.begin()
            console.write(output[:200_000], depth=8)
            assert exactly(peer, 200_000) == output[:200_000]
            peer.sendall(typed[20_000:40_000])
            assert console.read(30_000) == typed[:30_000]
            console.port.throttle()
            peer.sendall(typed[40_000:60_000])
        wait_port(source, readers=0)
        console.write(output[200_000:400_000], depth=8)
        state = move.finish()
        move.arrive(destination, state)
        console.port.unthrottle()
        with client(destination) as peer:
            peer.sendall(typed[60_000:])
            console.write(output[400_000:], depth=8)
            assert exactly(peer, 400_000) == output[200_000:]
            assert console.read(90_000) == typed[30_000:]
            assert nothing_to_read(peer)


@FORMATS
def test_what_the_device_wrote_and_the_guest_has_not_looked_at_moves(
    two: Two, packed: bool
) -> None:
    """Only the log says in which pages it is."""
    source, destination = two
    typed = noise(30_000)
    with moving(source, packed) as move, client(source) as peer:
        move.begin()
        peer.sendall(typed)
        wait_port(source, input=len(typed))
        move.arrive(destination, move.finish())
        assert move.console.read(len(typed)) == typed


@FORMATS
def test_buffers_that_wait_in_the_rings_move_with_them(
    daemon: StartDaemon, folder: Path, packed: bool
) -> None:
    """Nobody reads and the journal is full: the last of the output waits in the ring itself."""
    source, destination = (
        daemon(
            "unix",
            1,
            "--packed",
            "--port",
            f"name=pipe,backend=unix,path={folder}/{name}.",
            socket_path=f"{name}.sock",
        )
        for name in ("a", "b")
    )
    data = noise((1 << 20) + 16 * PAGE)
    with moving(source, packed, 6) as move:
        console = move.console
        console.wait_until(lambda: 1 in console.ports, "the generic port")
        move.begin()
        pipe = console.ports[1]
        for at in range(0, len(data), PAGE):
            pipe.submit(data[at : at + PAGE])
            console.wait_until(lambda: pipe.in_flight <= 16, "room in the ring")
        assert pipe.in_flight == 16
        move.arrive(destination, move.finish())
        assert pipe.in_flight == 16
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(WITHIN)
            peer.connect(f"{folder}/b.0")
            assert exactly(peer, len(data)) == data


def test_offsets_go_on_at_the_destination(two: Two) -> None:
    source, destination = two
    with moving(source, packed=False) as move, client(source) as peer:
        move.console.write(bytes(5000))
        exactly(peer, 5000)
        move.begin()
        move.arrive(destination, move.finish())
        move.console.write(bytes(10))
        wait_port(destination, output=5010, missed=0)


def test_what_moved_is_gone_at_the_source(two: Two) -> None:
    source, destination = two
    with moving(source, packed=False) as move:
        move.console.write(b"unread")
        move.begin()
        move.arrive(destination, move.finish())
        with client(source) as old, client(destination) as new:
            assert exactly(new, 6) == b"unread"
            with boot(source) as next_guest:
                next_guest.write(b"next")
                assert exactly(old, 4) == b"next"


def test_a_guest_whose_move_fails_goes_on_with_everything(two: Two) -> None:
    source, _ = two
    with moving(source, packed=False) as move:
        console = move.console
        console.port.throttle()
        with client(source) as peer:
            peer.sendall(b"typed")
            console.write(b"written")
            exactly(peer, 7)
            move.begin()
            move.finish()
            move.stay()
            console.port.unthrottle()
            assert console.read(5) == b"typed"
            console.write(b" more")
            assert exactly(peer, 5) == b" more"


def test_a_snapshot_is_restored_elsewhere_while_the_guest_goes_on(two: Two) -> None:
    source, destination = two
    with moving(source, packed=False) as move:
        move.console.write(b"before")
        move.begin()
        state = move.finish()
        move.stay()
        with client(source) as peer:
            assert exactly(peer, 6) == b"before"
            move.console.write(b"after")
            assert exactly(peer, 5) == b"after"
        move.arrive(destination, state)
        with client(destination) as peer:
            assert exactly(peer, 6) == b"before"


def test_a_guest_keeps_its_open_ports_when_it_moves(two: Two) -> None:
    """No word of the control dialogue is said again: the guest does not know that it moved."""
    source, destination = two
    with moving(source, packed=False) as move:
        move.begin()
        said = len(move.console.control)
        move.arrive(destination, move.finish())
        wait_port(destination, open=True, state="ready")
        with client(destination) as peer:
            peer.sendall(b"typed")
            assert move.console.read(5) == b"typed"
        assert all(each.event == 6 for each in move.console.control[said:])


@pytest.mark.parametrize("change", ["cut", "version", "garbage", "empty", "other ports"])
def test_a_state_that_makes_no_sense_is_refused_and_changes_nothing(two: Two, change: str) -> None:
    source, destination = two
    with moving(source, packed=False) as move:
        move.console.write(b"unread")
        move.begin()
        state = move.finish()
        match change:
            case "cut":
                state = state[:-1]
            case "version":
                state = state.replace(b"vhost-device-console\x01", b"vhost-device-console\x7f")
            case "garbage":
                state = noise(len(state))
            case "empty":
                state = b""
            case _:
                state = state.replace(b"console0", b"console9")
        with Frontend(destination.sockets[0], timeout=WITHIN) as frontend:
            frontend.negotiate()
            with pytest.raises(NackError):
                frontend.load_state(state)
        with boot(destination) as console, client(destination) as peer:
            console.write(b"fresh")
            assert exactly(peer, 5) == b"fresh"
        move.stay()
        with client(source) as peer:
            assert exactly(peer, 6) == b"unread"


def test_a_state_whose_guest_never_came_is_forgotten(two: Two) -> None:
    """The move failed after the state had arrived; the next attempt doubles nothing."""
    source, destination = two
    with moving(source, packed=False) as move:
        console = move.console
        console.port.throttle()
        with client(source) as peer:
            peer.sendall(b"typed")
            wait_port(source, readers=1)
            console.write(b"seen")
            exactly(peer, 4)
        console.write(b"unseen")
        move.begin()
        state = move.finish()
        for _ in range(2):
            with Frontend(destination.sockets[0], timeout=WITHIN) as frontend:
                frontend.negotiate()
                frontend.load_state(state)
        with client(destination) as peer:
            move.arrive(destination, state)
            assert exactly(peer, 6) == b"unseen"
            console.port.unthrottle()
            assert console.read(5) == b"typed"
            console.write(b"|")
            assert exactly(peer, 1) == b"|"
            assert nothing_to_read(peer)


def test_nothing_of_a_guest_is_shown_before_it_comes(two: Two) -> None:
    source, destination = two
    with moving(source, packed=False) as move:
        move.console.write(b"unseen")
        move.begin()
        state = move.finish()
        with client(destination) as peer:
            with Frontend(destination.sockets[0], timeout=WITHIN) as frontend:
                frontend.negotiate()
                frontend.load_state(state)
                assert port_of(destination)["output"] == 0
            with boot(destination) as other:
                other.write(b"another guest")
                assert exactly(peer, 13) == b"another guest"


def test_the_size_of_the_destination_is_told_to_the_guest(two: Two) -> None:
    source, destination = two
    resize(source, "c.sock0", 80, 25)
    resize(destination, "d.sock0", 132, 50)
    with moving(source, packed=False) as move:
        console = move.console
        console.wait_until(lambda: console.port.size == (80, 25), "the first size")
        move.begin()
        move.arrive(destination, move.finish())
        console.wait_until(lambda: console.port.size == (132, 50), "the second size")


def resize(daemon: Daemon, guest: str, columns: int, rows: int) -> None:
    monitor.change(daemon.monitor, monitor.Resize(guest, "0", columns, rows))


def test_a_guest_is_told_of_no_port_of_the_destination_it_has_no_queues_for(
    daemon: StartDaemon, folder: Path
) -> None:
    source = daemon("unix")
    more = f"name=more,backend=unix,path={folder}/more"
    destination = daemon("unix", 1, "--port", more, socket_path="d.sock")
    with moving(source, packed=False) as move, client(destination) as peer:
        move.begin()
        move.arrive(destination, move.finish())
        move.console.write(b"here")
        assert exactly(peer, 4) == b"here"
        assert [*move.console.ports] == [0]


def test_what_is_typed_to_a_port_that_came_after_the_state_was_saved_stays(
    daemon: StartDaemon, folder: Path
) -> None:
    source = daemon("unix", 1, "--max-ports", "2")
    with moving(source, packed=False, queues=6) as move:
        move.begin()
        move.finish()
        text = f"name=late,backend=unix,path={folder}/late,console"
        monitor.change(
            source.monitor, monitor.PortAdd("c.sock0", config.parse_port(text, "a test"))
        )
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(f"{folder}/late")
            peer.sendall(b"typed")
            move.frontend.close()
            with boot(source, queue_count=6) as guest:
                guest.wait_until(lambda: 1 in guest.ports, "the late port")
                assert guest.ports[1].read(5) == b"typed"
