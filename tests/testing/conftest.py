"""A tiny backend that shares no code with what is tested: struct, mmap and a thread."""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

VIRTIO = 1 << 1 | 1 << 28 | 1 << 29 | 1 << 30 | 1 << 32
PROTOCOL = 1 << 0 | 1 << 3 | 1 << 5 | 1 << 9
CONFIG = struct.pack("<HHII", 80, 25, 1, 0)


class Seen(NamedTuple):
    """A message the backend received."""

    request: int
    need_reply: bool
    payload: bytes
    fds: int


class Ring:
    """One ring, as SET_VRING_* described it."""

    def __init__(self) -> None:
        self.size = self.base = 0
        self.desc = self.avail = self.used = 0
        self.kick: int | None = None
        self.call: int | None = None
        self.enabled = False
        self.started = False


class Device:
    """A backend on one connected socket; `serve` in a thread runs until the frontend hangs up.

    It answers control messages as section 5.3 says, keeps what port 0 wrote in `output`, and sends
    it back when `echo` is set. `refuse` lists requests to be answered with status 1, `mute` those
    not to be answered at all.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.virtio = VIRTIO
        self.protocol = PROTOCOL
        self.echo = False
        self.hang_up_after: int | None = None
        self.refuse: set[int] = set()
        self.mute: set[int] = set()
        self.answers: dict[int, bytes] = {}
        self.seen: list[Seen] = []
        self.controls: list[tuple[int, int, int]] = []
        self.output = bytearray()
        self.input = bytearray()
        self.replies: list[bytes] = []
        self.rings = [Ring() for _ in range(4)]
        self.regions: list[tuple[int, int, int, mmap.mmap]] = []
        self.features = 0
        self.status = 0
        self.reply_fd: int | None = None
        self.backend_channel: int | None = None
        self.wake = os.eventfd(0)
        self.done = threading.Event()

    # Bytes.

    def serve(self) -> None:
        try:
            while True:
                poll = select.poll()
                poll.register(self.connection, select.POLLIN)
                poll.register(self.wake, select.POLLIN)
                for ring in self.rings:
                    if ring.kick is not None:
                        poll.register(ring.kick, select.POLLIN)
                ready = {fd for fd, _ in poll.poll()}
                for fd in ready - {self.connection.fileno()}:
                    os.read(fd, 8)
                if self.connection.fileno() in ready and not self.message():
                    return
                self.work()
        except (BrokenPipeError, ConnectionResetError):
            return
        finally:
            self.close()

    def close(self) -> None:
        self.done.set()
        self.connection.close()
        for ring in self.rings:
            for fd in (ring.kick, ring.call):
                if fd is not None:
                    os.close(fd)
        if self.backend_channel is not None:
            os.close(self.backend_channel)
        for _, _, _, mapping in self.regions:
            mapping.close()
        os.close(self.wake)

    def message(self) -> bool:
        header, fds, _, _ = socket.recv_fds(self.connection, 12, 16)
        if len(header) < 12:
            return False
        request, flags, size = struct.unpack("=III", header)
        payload = self.connection.recv(size, socket.MSG_WAITALL) if size else b""
        self.seen.append(Seen(request, bool(flags & 8), payload, len(fds)))
        if request == self.hang_up_after:
            return False
        answer = self.act(request, payload, fds)
        carried = [] if self.reply_fd is None else [self.reply_fd]
        if request == 35:
            self.rings[payload[0]].started = True
            self.work()
        if answer is None and flags & 8:
            answer = struct.pack("=Q", request in self.refuse)
        answer = self.answers.get(request, answer)
        if answer is not None and request not in self.mute:
            data = struct.pack("=III", request, 5, len(answer)) + answer
            assert socket.send_fds(self.connection, [data], carried) == len(data)
        self.reply_fd = None
        for fd in fds:
            os.close(fd)
        return True

    def act(self, request: int, payload: bytes, fds: list[int]) -> bytes | None:
        match request:
            case 1:
                return struct.pack("=Q", self.virtio)
            case 2:
                (self.features,) = struct.unpack("=Q", payload)
            case 5:
                self.regions = []
                for at, fd in enumerate(fds):
                    guest, size, user, offset = struct.unpack_from("=QQQQ", payload, 8 + 32 * at)
                    self.regions.append((guest, user, size, mmap.mmap(fd, size, offset=offset)))
            case 8 | 10 | 18:
                index, number = struct.unpack("=II", payload)
                setattr(self.rings[index], {8: "size", 10: "base", 18: "enabled"}[request], number)
            case 9:
                index, _, desc, used, avail, _ = struct.unpack("=IIQQQQ", payload)
                ring = self.rings[index]
                ring.desc, ring.used, ring.avail = desc, used, avail
            case 11:
                index, _ = struct.unpack("=II", payload)
                ring = self.rings[index]
                if ring.kick is not None:
                    os.close(ring.kick)
                    ring.kick = None
                return struct.pack("=II", index, ring.base)
            case 12 | 13:
                (index,) = struct.unpack("=Q", payload)
                name = "kick" if request == 12 else "call"
                old = getattr(self.rings[index], name)
                if old is not None:
                    os.close(old)
                setattr(self.rings[index], name, fds.pop())
            case 15:
                return struct.pack("=Q", self.protocol)
            case 17:
                return struct.pack("=Q", 4)
            case 21:
                if self.backend_channel is not None:
                    os.close(self.backend_channel)
                self.backend_channel = fds.pop()
            case 31:
                fds.append(os.memfd_create("inflight"))
                os.ftruncate(fds[0], 4096)
                self.reply_fd = fds[0]
                return struct.pack("=QQ", 4096, 0) + payload[16:]
            case 36:
                return struct.pack("=Q", 32)
            case 37:
                guest, size, user, offset = struct.unpack_from("=QQQQ", payload, 8)
                mapping = mmap.mmap(fds[0], size, offset=offset)
                self.regions.append((guest, user, size, mapping))
            case 39:
                (self.status,) = struct.unpack("=Q", payload)
            case 40:
                return struct.pack("=Q", self.status)
            case 24:
                offset, size, _ = struct.unpack_from("=III", payload)
                return payload[:12] + CONFIG[offset : offset + size]
        return None

    # Memory; `user` says which address it is.

    def at(self, addr: int, size: int, *, user: bool = False) -> memoryview:
        for guest, frontend, length, mapping in self.regions:
            start = addr - (frontend if user else guest)
            if start >= 0 and start + size <= length:
                return memoryview(mapping)[start : start + size]
        raise AssertionError(f"{addr:#x} is nowhere")

    # Rings.

    def work(self) -> None:
        if not self.regions:
            return
        while self.transmit() or self.control() or self.receive():
            pass

    def waiting(self, ring: Ring) -> bool:
        if (ring.kick is None and not ring.started) or not ring.enabled:
            return False
        index = self.at(ring.avail + 2, 2, user=True).cast("H")
        if self.features & 1 << 29:  # ask for a kick at the next one, always
            self.at(ring.used + 4 + 8 * ring.size, 2, user=True).cast("H")[0] = ring.base
        return index[0] != ring.base

    def pop(self, ring: Ring) -> tuple[int, list[tuple[int, int, bool]]]:
        slot = ring.avail + 4 + 2 * (ring.base % ring.size)
        head = self.at(slot, 2, user=True).cast("H")[0]
        ring.base = (ring.base + 1) & 0xFFFF
        table = self.at(ring.desc, 16 * ring.size, user=True)
        index, chain = head, []
        while True:
            addr, size, flags, following = struct.unpack_from("<QIHH", table, 16 * index)
            if flags & 4:
                table, index = self.at(addr, size), 0
                continue
            chain.append((addr, size, bool(flags & 2)))
            if not flags & 1:
                return head, chain
            index = following

    def push(self, ring: Ring, head: int, length: int) -> None:
        index = self.at(ring.used + 2, 2, user=True).cast("H")
        element = self.at(ring.used + 4 + 8 * (index[0] % ring.size), 8, user=True).cast("I")
        element[0], element[1] = head, length
        index[0] = (index[0] + 1) & 0xFFFF
        if ring.call is not None:
            os.write(ring.call, struct.pack("=Q", 1))
        elif ring.started and self.backend_channel is not None:
            call = struct.pack("=IIIII", 4, 1, 8, self.rings.index(ring), 0)
            assert os.write(self.backend_channel, call) == len(call)

    def take(self, ring: Ring) -> tuple[int, bytes]:
        head, chain = self.pop(ring)
        assert not any(writable for _, _, writable in chain)
        return head, b"".join(bytes(self.at(addr, size)) for addr, size, _ in chain)

    def give(self, ring: Ring, data: bytes) -> int:
        head, chain = self.pop(ring)
        ((addr, size, writable),) = chain
        assert writable
        count = min(size, len(data))
        self.at(addr, count)[:] = data[:count]
        self.push(ring, head, count)
        return count

    def transmit(self) -> bool:
        if not self.waiting(self.rings[1]):
            return False
        head, data = self.take(self.rings[1])
        self.output += data
        if self.echo:
            self.input += data
        self.push(self.rings[1], head, 0)
        return True

    def receive(self) -> bool:
        if not self.input or not self.waiting(self.rings[0]):
            return False
        del self.input[: self.give(self.rings[0], bytes(self.input))]
        return True

    def control(self) -> bool:
        if self.replies and self.waiting(self.rings[2]):
            self.give(self.rings[2], self.replies.pop(0))
            return True
        if not self.waiting(self.rings[3]):
            return False
        head, data = self.take(self.rings[3])
        port, event, value = struct.unpack("<IHH", data) if len(data) == 8 else (0, -1, 0)
        if event >= 0:
            self.controls.append((port, event, value))
        self.push(self.rings[3], head, 0)
        if event == 0:
            self.replies.append(struct.pack("<IHH", 0, 1, 1))
        elif event == 3:
            self.replies += [
                struct.pack("<IHH", 0, 4, 1),
                struct.pack("<IHH", 0, 7, 1) + b"console0",
                struct.pack("<IHH", 0, 6, 1),
            ]
        return True

    # For the test's thread.

    def type(self, data: bytes) -> None:
        """Send input to the guest, from any thread."""
        self.input += data
        os.eventfd_write(self.wake, 1)


Serve = Callable[..., tuple[Device, socket.socket]]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Give a function that starts a Device, with attributes as told, and connects to it.

    It returns the device and the frontend's socket, unless told which `connection` to serve. The
    frontend must hang up by the test's end.
    """
    threads: list[threading.Thread] = []
    sockets: list[socket.socket] = []

    def start(
        *, connection: socket.socket | None = None, **attributes: object
    ) -> tuple[Device, socket.socket]:
        ours, theirs = socket.socketpair()
        if connection is not None:
            theirs.close()
            theirs = connection
        device = Device(theirs)
        for name, value in attributes.items():
            setattr(device, name, value)
        thread = threading.Thread(target=device.serve)
        thread.start()
        threads.append(thread)
        sockets.append(ours)
        return device, ours

    yield start
    for ours in sockets:
        with contextlib.suppress(OSError):
            ours.shutdown(socket.SHUT_RDWR)
        ours.close()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
