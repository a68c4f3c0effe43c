"""What tests of whole daemons share: people at a port, guests, and what a worker holds."""

from __future__ import annotations

import fcntl
import os
import random
import re
import socket
import struct
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vhost_device_console.testing import (
    DRIVER_FEATURES,
    ConsoleDriver,
    Frontend,
    GuestMemory,
    connect_like_qemu,
)

from launch import WITHIN, Daemon, receive_until, until, wait_readable

#: What a reader finds where bytes were lost.
MARKER = re.compile(rb"\r\n\[vhost-device-console: (\d+) bytes missed\]\r\n")


def numbered(count: int, start: int = 0) -> bytes:
    """Return `count` bytes (a multiple of 8) of which every eight say where they are."""
    return b"".join(b"%07x\n" % at for at in range(start, start + count, 8))


def noise(count: int) -> bytes:
    """Return `count` bytes that repeat nowhere."""
    return random.Random(count).randbytes(count)


def assert_same(got: bytes, wanted: bytes) -> None:
    """Check that long `got` is `wanted`; say where it is not, and no more."""
    if got != wanted:
        at = next(
            (at for at, pair in enumerate(zip(got, wanted, strict=False)) if len({*pair}) > 1), -1
        )
        raise AssertionError(
            f"{len(got)} of {len(wanted)}, at {at} {got[at:][:40]!r}, not {wanted[at:][:40]!r}"
        )


# People


def exactly(peer: socket.socket, count: int) -> bytes:
    """Return the next `count` bytes that `peer` receives."""
    deadline = time.monotonic() + WITHIN
    data = bytearray()
    while len(data) < count:
        wait_readable(peer.fileno(), deadline, f"{len(data)} of {count} bytes came")
        more = peer.recv(min(count - len(data), 1 << 20))
        if not more:
            raise EOFError(f"{len(data)} of {count} bytes came: {bytes(data[-100:])!r}")
        data += more
    return bytes(data)


def nothing_to_read(peer: socket.socket) -> bool:
    """Say whether `peer` has received nothing that was not read."""
    peer.setblocking(False)
    try:
        peer.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    finally:
        peer.setblocking(True)
    return False


def unread(peer: socket.socket) -> int:
    """Return how many bytes the system holds for `peer`."""
    count: int = struct.unpack("=i", fcntl.ioctl(peer, termios.FIONREAD, bytes(4)))[0]
    return count


def untaken(peer: socket.socket) -> int:
    """Return whether the other side of a unix socket has not read all: 0 when it has."""
    count: int = struct.unpack("=i", fcntl.ioctl(peer, termios.TIOCOUTQ, bytes(4)))[0]
    return count


def port_of(daemon: Daemon, guest: int = 0) -> dict[str, Any]:
    """Return the status of a guest's port 0."""
    port: dict[str, Any] = daemon.status()[guest]["ports"][0]
    return port


def wait_port(daemon: Daemon, guest: int = 0, **wanted: object) -> dict[str, Any]:
    """Wait until the status of a guest's port 0 has these values, and return it."""
    status = daemon.until(
        lambda guests: wanted.items() <= guests[guest]["ports"][0].items(), f"never {wanted}"
    )
    port: dict[str, Any] = status[guest]["ports"][0]
    return port


def call(daemon: Daemon, guest: int = 0, *, receive_buffer: int | None = None) -> socket.socket:
    """Return a connection to a guest's console, which the worker may not know of yet."""
    unix = bool(daemon.data)
    peer = socket.socket(socket.AF_UNIX if unix else socket.AF_INET)
    try:
        peer.settimeout(WITHIN)
        if receive_buffer is not None:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        if unix:
            peer.connect(daemon.data[guest])
        else:
            assert daemon.tcp is not None
            peer.connect(("127.0.0.1", daemon.tcp + guest))
    except BaseException:
        peer.close()
        raise
    return peer


def attach(
    daemon: Daemon, guest: int = 0, *, readers: int = 1, receive_buffer: int | None = None
) -> socket.socket:
    """Return a connection to a guest's console, with which its port has so many readers."""
    peer = call(daemon, guest, receive_buffer=receive_buffer)
    try:
        wait_port(daemon, guest, readers=readers)
    except BaseException:
        peer.close()
        raise
    return peer


def reset(peer: socket.socket) -> None:
    """Close a TCP connection without a farewell: the other side is reset."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
    peer.close()


# Guests


@contextmanager
def boot(
    daemon: Daemon, guest: int = 0, connect: Any = connect_like_qemu, **options: Any
) -> Iterator[ConsoleDriver]:
    """Give a guest's console, open, on a frontend of its own that hangs up at the end."""
    with (
        GuestMemory() as memory,
        connect(daemon.sockets[guest], memory, timeout=WITHIN, **options) as frontend,
    ):
        console = ConsoleDriver(frontend)
        console.wait_open()
        yield console


@contextmanager
def quiet_guest(pair: Pair, features: int = DRIVER_FEATURES) -> Iterator[ConsoleDriver]:
    """Give an open console whose receive queues are empty, so that every ring is the test's."""
    with (
        GuestMemory() as memory,
        connect_like_qemu(pair.daemon.sockets[0], memory, features=features, timeout=WITHIN) as f,
    ):
        console = ConsoleDriver(f, buffers=0)
        console.wait_open()
        yield console


def converse(console: ConsoleDriver, peer: socket.socket) -> None:
    """Check that a line goes each way; whatever came before it is passed over."""
    console.write(b"to people\n")
    receive_until(peer, b"to people\n")
    peer.sendall(b"to the guest\n")
    console.read_until(b"to the guest\n")


def status_of(frontend: Frontend, request: int) -> int:
    """Return the acknowledgement's value."""
    status: int = struct.unpack("=Q", frontend.reply_to(request).payload)[0]
    return status


# Workers


def footprint(worker: int) -> tuple[int, int]:
    """Return how many descriptors a worker has open, and how many memory files mapped."""
    with open(f"/proc/{worker}/maps") as maps:
        mapped = sum("memfd:" in line for line in maps)
    return len(os.listdir(f"/proc/{worker}/fd")), mapped


def wait_footprint(worker: int, wanted: tuple[int, int]) -> None:
    """Wait until a worker holds just that again."""
    until(
        lambda: footprint(worker) == wanted,
        f"(descriptors, memory files) not {wanted} again",
    )


def footprints(daemon: Daemon) -> list[tuple[int, int]]:
    """Return the footprints of a master that answers nobody, and of its workers."""
    workers = daemon.workers()

    def unasked() -> bool:
        with open("/proc/net/unix") as sockets:
            rows = [line.split() for line in sockets]
        return not any(row[5] == "03" and row[-1] == daemon.monitor for row in rows)  # connected

    until(unasked, "the master still talks to somebody")
    return [footprint(pid) for pid in (daemon.pid, *workers)]


def assert_no_fault(daemon: Daemon) -> None:
    """Check that no worker has said that something in it went wrong."""
    try:
        found = daemon.expect_log("Traceback|worker died|[A-Z][a-z]+Error:", within=0)
    except TimeoutError:
        return
    raise AssertionError(found.string)


@dataclass
class Pair:
    """A daemon of two guests: the first is each test's own, the second goes on beside it.

    `held` is what the first one's worker holds when it has no frontend and no clients.
    """

    daemon: Daemon
    worker: int
    held: tuple[int, int]
    bystander: ConsoleDriver
    peer: socket.socket

    def check_unharmed(self) -> None:
        """Check that whatever was done to the first guest's worker has left no trace."""
        assert self.daemon.workers()[0] == self.worker
        wait_footprint(self.worker, self.held)
        wait_port(self.daemon, readers=0)
        with boot(self.daemon) as console, attach(self.daemon) as peer:
            converse(console, peer)
        wait_footprint(self.worker, self.held)
        wait_port(self.daemon, readers=0)
        converse(self.bystander, self.peer)
        assert_no_fault(self.daemon)


@contextmanager
def pair_of(daemon: Daemon) -> Iterator[Pair]:
    """Give the two guests of `daemon`, none of which was used yet."""
    worker = daemon.workers()[0]
    held = footprint(worker)
    with boot(daemon, 1) as bystander, attach(daemon, 1) as peer:
        yield Pair(daemon, worker, held, bystander, peer)
