"""A whole worker: its frontend, its guest's rings and its clients say anything, and it is killed.

It runs in this process, one turn at a time, with everything real but the master, whose part is
played here: whatever is committed is kept, and after a kill a successor begins with that alone.
Nothing may be raised, every message must be dealt with in its turn, a successor must be what was
committed, and in the end no descriptor may be left.
"""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import signal
import socket
import struct
import warnings
from collections.abc import Callable, Iterable, Sequence
from unittest import mock

import msgspec
from source import Source
from vhost_device_console import config, custody, journal, ledger, privileges
from vhost_device_console.worker.guest import Guest, can_resume
from vhost_device_console.worker.inheritance import Inheritance, PortFiles
from vhost_device_console.worker.vhost_user import message as wire
from vhost_device_console.worker.vhost_user import session as fx
from vhost_device_console.worker.vhost_user.message import Request

from targets.session import NUMBERS, REQUESTS, make_payload

_GUEST = config.from_toml(
    b"""
    [[guest]]
    socket = "/nowhere/frontend"
    name = "fuzzed"
    poll-us = 0
    inband = true
    packed = true
    max-ports = 3
    [[guest.port]]
    name = "console"
    console = true
    backend = "unix"
    path = "/nowhere/console"
    [[guest.port]]
    name = "generic"
    backend = "unix"
    path = "/nowhere/generic"
    """,
    "fuzz.toml",
).guests[0]
_ADDED = msgspec.structs.replace(_GUEST.ports[1], id=2, name="added")

PAGE = 4096
QUEUES = 8
MEMORY = (QUEUES + 2) * PAGE
GUEST_AT, USER_AT = 0x10_0000, 0x7F00_0000_0000
_BUFFERS = QUEUES * PAGE  # where buffers lie in memory
SIZE = 8  # of a ring
_AVAIL, _USED = 0x400, 0x800  # in each queue's page
_ELSEWHERE = [0, 0x3FF, 0x7F8, 0xFF0, 0x1000, 0xF000, 1 << 40]
_MOST_STEPS = 120
_MOST_KILLS = 4

_AVAILABLE, _IN_USE = 1 << 7, 1 << 15

#: A step after which nothing comes.
POISON = 0xFB

ALL = int(fx.PROTOCOL_FEATURES)
INBAND = int(wire.ProtocolFeature.INBAND_NOTIFICATIONS)
FEATURES = 1 << 32 | 1 << 30 | 0b111


class _KilledError(BaseException):
    """The worker is killed here."""


class Fuse:
    """Kills the worker just before or after a commit to come; `left` counts those until then."""

    def __init__(self) -> None:
        self.left = 0
        self.after = False
        self._send = custody.send

    def send(
        self, sock: socket.socket, message: custody.Order | custody.Word, fds: Sequence[int] = ()
    ) -> None:
        """Stand in for `custody.send`."""
        burns = isinstance(message, custody.Commit) and self.left > 0
        self.left -= burns
        if burns and not self.left and not self.after:
            raise _KilledError
        self._send(sock, message, fds)
        if burns and not self.left:
            raise _KilledError


class Master:
    """The guest's memory and files, everyone who connects, and what the worker has committed."""

    def __init__(self, fuse: Fuse) -> None:
        self.fuse = fuse
        self.mine: list[int] = []
        self.memory_fd = self.memfd(MEMORY)
        self.memory = mmap.mmap(self.memory_fd, MEMORY)
        self.area_fd = self.memfd(4 * PAGE)
        self.journals = [self.own(journal.create("fuzz", PAGE, PAGE)) for _ in range(3)]
        self.ledger_fd = self.own(ledger.create("fuzz"))
        self.event_fd = self.own(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        self.folder_fd = self.own(os.open("/", os.O_RDONLY | os.O_CLOEXEC))
        self.null_fd = self.own(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC))
        self.health, health = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.health_fd = self.own(health)
        self.own(self.health)
        self.backend, theirs = socket.socketpair()
        self.backend.setblocking(False)
        self.backend_fd = self.own(theirs.detach())
        self.ports = [*_GUEST.ports]
        self.vault = custody.Vault()
        self.commit = custody.Commit(serial=0, newest=0, snapshot=b"", keys=[])
        self.event: custody.FrontendEvent | None = None
        self.serial = 0
        self.connected = False
        self.arrivals: dict[int, custody.ClientCame] = {}
        self.clients: list[socket.socket] = []
        self.dead: list[Guest] = []
        self.state = b""  # as the worker saved it
        self.packed = False
        self.next = [0] * QUEUES  # the entry that the guest makes available next
        self.wrap = [1] * QUEUES
        self.begin()

    def own(self, fd: int) -> int:
        self.mine.append(fd)
        return fd

    def memfd(self, size: int) -> int:
        fd = os.memfd_create("fuzz", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, size)
        return self.own(fd)

    # The worker

    def begin(self) -> None:
        """Fork a worker, as it were."""
        self.line, theirs = custody.pair()
        held = {key: os.dup(fd) for key, fd in self.vault.fds.items() if key <= self.commit.newest}
        journals = self.journals[: len(self.ports)]
        ports = tuple(PortFiles(os.dup(fd), None, {}) for fd in journals)
        guest = msgspec.structs.replace(_GUEST, ports=tuple(self.ports))
        self.guest = Guest(
            guest,
            Inheritance(
                ports=ports,
                ledger=os.dup(self.ledger_fd),
                health=os.dup(self.health_fd),
                custody=theirs.detach(),
                snapshot=self.commit.snapshot,
                held=held,
                newest=self.commit.newest,
                serial=self.commit.serial,
                lost=False,
                listening=True,
            ),
        )
        for came in [*self.arrivals.values()]:
            self.tell(came, [self.vault.fds[came.key]])
        if self.event is not None:
            keys = self.event.keys if isinstance(self.event, custody.FrontendSaid) else []
            self.tell(self.event, [self.vault.fds[key] for key in keys])

    def kill(self) -> None:
        """Let nothing of the worker count but what it has committed."""
        self.fuse.left = 0
        self.hear()
        self.dead.append(self.guest)
        self.line.close()
        before = self.commit.snapshot
        told = self.event is not None or self.arrivals
        self.begin()
        if before and not told:
            again, _ = self.guest._save()  # noqa: SLF001
            _compare(before, again)

    def poison(self, source: Source) -> None:
        """Give a successor a snapshot that is none; it may die, and nobody goes on after it."""
        snapshot = bytearray(self.commit.snapshot)
        for _ in range(1 + source.byte() % 8):
            if snapshot:
                snapshot[source.number(2) % len(snapshot)] = source.byte()
        self.commit = msgspec.structs.replace(self.commit, snapshot=bytes(snapshot))
        self.event = None
        self.arrivals.clear()
        assert can_resume(bytes(snapshot)) in (True, False)
        with contextlib.suppress(Exception):
            self.begin()
            self.guest._drain(0)  # noqa: SLF001
            self.guest._flush()  # noqa: SLF001
        self.dead.append(self.guest)

    def tell(self, order: custody.Order, fds: Iterable[int] = ()) -> None:
        """Give the worker an order, which it obeys at once."""
        custody.send(self.line, order, [*fds])
        self.mortal(lambda: self.guest._on_order(0))  # noqa: SLF001

    def mortal(self, work: Callable[[], object]) -> None:
        """Have the worker do something, and a successor go on if it is killed by that."""
        try:
            work()
        except _KilledError:
            self.kill()
        self.hear()

    def hear(self) -> None:
        """Take what the worker says, as the master's porter does."""
        with contextlib.suppress(ConnectionError):
            while (received := custody.receive_word(self.line)) is not None:
                word, fds = received
                if isinstance(word, custody.Commit):
                    self.committed(word, fds)
                assert not fds

    def committed(self, commit: custody.Commit, fds: list[int]) -> None:
        if commit.answer_fd:
            # What was made for the frontend it may give back.
            os.close(fds.pop())
        assert len(commit.made) == len(fds)
        for key in commit.made:
            self.vault.replace(key, fds.pop(0))
        assert {*commit.keys} <= self.vault.fds.keys()
        self.vault.keep(commit.keys, commit.newest)
        self.commit = commit
        self.arrivals = {key: came for key, came in self.arrivals.items() if key > commit.newest}
        if self.event is not None and self.event.serial <= commit.serial:
            self.event = None
        if commit.dismiss:
            self.connected = False
            self.event = None
        if commit.answer is not None:
            size = wire.decode_header(commit.answer).size
            assert len(commit.answer) == wire.HEADER_SIZE + size

    def turn(self) -> None:
        """Let the worker's loop go round once."""
        guest = self.guest

        def work() -> None:
            guest._poller._dispatch(0)  # noqa: SLF001
            guest._drain(0)  # noqa: SLF001
            guest._flush()  # noqa: SLF001
            guest._queues.arm()  # noqa: SLF001

        self.mortal(work)
        with contextlib.suppress(BlockingIOError):
            os.read(self.health, 1 << 16)

    def raised(self, event: custody.FrontendEvent, fds: list[int]) -> None:
        """Tell of something the frontend does, and see that it is dealt with."""
        self.event = event
        self.tell(event, fds)
        assert self.event is None, f"{event} was not committed"

    # The frontend

    def come(self) -> None:
        if not self.connected:
            self.connected = True
            self.serial += 1
            self.raised(custody.FrontendCame(self.serial, 1), [])

    def leave(self) -> None:
        if self.connected:
            self.connected = False
            self.serial += 1
            self.raised(custody.FrontendGone(self.serial), [])

    def say(self, request: int, payload: bytes, fds: list[int], how: int = 8) -> None:
        """Have the frontend say something, with copies of these descriptors."""
        if not self.connected:
            return
        self.serial += 1
        keys = [self.vault.put(os.dup(fd)) for fd in fds]
        said = custody.FrontendSaid(
            self.serial,
            request,
            how & 0xF0 == 0x10,
            bool(how & 8),
            payload,
            how & 0xF0 == 0x20,
            keys,
        )
        self.raised(said, [self.vault.fds[key] for key in keys])

    def negotiate(self, features: int, protocol: int) -> None:
        self.come()
        self.say(Request.SET_PROTOCOL_FEATURES, wire.encode_u64(protocol), [])
        self.say(Request.SET_FEATURES, wire.encode_u64(features), [])
        self.packed = bool(features >> 34 & 1)
        region = wire.Region(GUEST_AT, MEMORY, USER_AT, 0)
        self.say(Request.SET_MEM_TABLE, wire.encode_regions([region]), [self.memory_fd])

    def start(self, queue: int, how: int) -> None:
        """Describe a ring as it should be and start it; `how` has what is left out."""
        place = queue * PAGE
        if not how & 1:
            self.memory[place : place + PAGE] = bytes(PAGE)
            self.next[queue], self.wrap[queue] = 0, 1
        base = 0x8000_8000 if self.packed else 0
        addr = USER_AT + place
        parts = (addr, addr + _USED, addr + _AVAIL, GUEST_AT + place + _USED)
        self.say(Request.SET_VRING_NUM, wire.VringState(queue, SIZE).encode(), [])
        self.say(Request.SET_VRING_BASE, wire.VringState(queue, base).encode(), [])
        self.say(Request.SET_VRING_ADDR, wire.VringAddr(queue, how >> 1 & 1, *parts).encode(), [])
        self.say(Request.SET_VRING_CALL, wire.VringFd(queue, True).encode(), [self.event_fd])
        self.say(Request.SET_VRING_KICK, wire.VringFd(queue, True).encode(), [self.event_fd])
        if not how & 4:
            self.say(Request.SET_VRING_ENABLE, wire.VringState(queue, 1).encode(), [])

    def save_state(self) -> None:
        """Have the worker's state saved; it may not be whole if it is large, or killed."""
        ours, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        transfer = wire.StateTransfer(wire.Direction.SAVE, 0)
        self.say(Request.SET_DEVICE_STATE_FD, transfer.encode(), [theirs])
        os.close(theirs)
        self.turn()
        with open(ours, "rb") as file:
            self.state = file.read() or b""
        self.say(Request.CHECK_DEVICE_STATE, b"", [])

    def load_state(self, state: bytes) -> None:
        """Have a state loaded."""
        theirs, ours = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        transfer = wire.StateTransfer(wire.Direction.LOAD, 0)
        os.write(ours, state)
        self.say(Request.SET_DEVICE_STATE_FD, transfer.encode(), [theirs])
        os.close(theirs)
        self.turn()
        os.close(ours)
        self.turn()
        self.say(Request.CHECK_DEVICE_STATE, b"", [])

    # The guest

    def offer(self, queue: int, size: int, flags: int, data: bytes = b"") -> None:
        """Make a descriptor available, whose buffer may hold something."""
        place = queue * PAGE
        at = self.next[queue]
        entry = place + 16 * (at % SIZE)
        buffer = _BUFFERS + 128 * (at % SIZE + 8 * (queue & 1))
        self.memory[buffer : buffer + len(data)] = data
        words = flags & 7
        number = at % SIZE
        if self.packed:
            at = self.next[queue] % SIZE
            words |= _AVAILABLE if self.wrap[queue] else _IN_USE
            self.next[queue] = (at + 1) % SIZE
            self.wrap[queue] ^= at + 1 == SIZE
            struct.pack_into("<QIHH", self.memory, entry, GUEST_AT + buffer, size, number, words)
            return
        struct.pack_into("<QIHH", self.memory, entry, GUEST_AT + buffer, size, words, number + 1)
        struct.pack_into("<H", self.memory, place + _AVAIL + 4 + 2 * number, number)
        self.next[queue] = at + 1 & 0xFFFF
        struct.pack_into("<H", self.memory, place + _AVAIL + 2, self.next[queue])

    # People

    def arrive(self, port: int) -> None:
        if len(self.clients) < 8:
            ours, theirs = socket.socketpair()
            ours.setblocking(False)
            self.clients.append(ours)
            came = custody.ClientCame(port, self.vault.put(theirs.detach()))
            self.arrivals[came.key] = came
            self.tell(came, [self.vault.fds[came.key]])

    def close(self) -> None:
        """Have the last worker give everything back, and do that here."""
        self.fuse.left = 0
        guest = self.guest
        if guest not in self.dead:
            guest._close()  # noqa: SLF001
            guest._poller.close()  # noqa: SLF001
            guest._line.close()  # noqa: SLF001
        del self.guest, guest
        self.dead.clear()
        self.line.close()
        self.backend.close()
        for client in self.clients:
            client.close()
        self.vault.keep([], self.vault.newest)
        self.memory.close()
        for fd in self.mine:
            os.close(fd)


def _compare(before: bytes, after: bytes) -> None:
    """A successor that has done nothing yet is what was committed, but for what rings did since."""
    one, other = (msgspec.msgpack.decode(data) for data in (before, after))
    for part in (0, 1, 2, 5, 6):  # version, frontend, session, new_driver, loaded
        assert one[part] == other[part], f"part {part}: {one[part]} became {other[part]}"


def _step(master: Master, source: Source) -> None:
    what = source.byte()
    number = what >> 4
    queue = number % QUEUES
    match what & 15:
        case 0:
            features = source.byte()
            master.negotiate(
                FEATURES
                | (features & 1) << 34
                | (features >> 1 & 1) << 29
                | (features >> 2 & 1) << 28,
                ALL | (INBAND if features & 8 else 0),
            )
        case 1:
            master.start(queue, source.byte())
        case 2:
            master.come()
        case 3:
            master.leave()
        case 4 | 5:
            _message(master, source)
        case 6:
            write = 0 if queue & 1 else 2
            size = source.byte()
            master.offer(queue, size, write, source.take(number & 8 and min(size, 128)))
        case 7:
            flags, size = source.byte(), source.number(2)
            master.offer(queue, size << (flags >> 4), flags)
        case 8:
            at = queue * PAGE + source.number(2) % (PAGE - 8)
            data = source.take(1 + number % 8)
            master.memory[at : at + len(data)] = data
        case 9 | 10:
            master.turn()
        case 11 if number < 4:
            if len(master.dead) < _MOST_KILLS:
                master.kill()
        case 11:
            if len(master.dead) < _MOST_KILLS:
                master.fuse.left, master.fuse.after = number >> 1 & 3, bool(number & 1)
        case 12:
            master.arrive(number % 4)
        case 13:
            _person(master, number, source)
        case 14:
            _control(master, source)
        case 15:
            _order(master, number, source)


def _message(master: Master, source: Source) -> None:
    """Have the frontend say something of the right form, or not."""
    request: int = source.pick(REQUESTS)
    how = source.byte()
    if request == Request.SET_DEVICE_STATE_FD and how & 4:
        if how & 8:
            master.save_state()
            return
        state = bytearray(master.state)
        for _ in range(how & 3):
            if state:
                state[source.number(2) % len(state)] = source.byte()
        master.load_state(state)
        return
    others = [
        *(master.event_fd, master.memory_fd, master.area_fd, master.backend_fd),
        *(master.folder_fd, master.null_fd, master.health_fd, master.line.fileno()),
    ]
    fds = [others[source.byte() % len(others)] for _ in range(how & 3)]
    match request:
        case Request.SET_VRING_ADDR if how & 4:
            queue = source.byte() % QUEUES
            user = USER_AT + queue * PAGE
            parts = [user + source.pick(_ELSEWHERE) for _ in range(3)]
            payload = wire.VringAddr(queue, source.byte() & 1, *parts, GUEST_AT).encode()
        case Request.SET_VRING_NUM | Request.SET_VRING_BASE | Request.GET_VRING_BASE if how & 4:
            queue = source.byte() % QUEUES
            payload = wire.VringState(queue, source.pick(NUMBERS)).encode()
        case Request.SET_MEM_TABLE | Request.ADD_MEM_REG | Request.REM_MEM_REG if how & 4:
            pages = source.byte() % (MEMORY // PAGE)
            at = pages * PAGE
            region = wire.Region(GUEST_AT + at, MEMORY - at, USER_AT + at, at)
            if request == Request.SET_MEM_TABLE:
                payload = wire.encode_regions([region])
            else:
                payload = wire.encode_region(region)
            fds = [master.memory_fd] * (request != Request.REM_MEM_REG)
        case Request.SET_LOG_BASE if how & 4:
            payload = wire.LogArea(PAGE, source.byte() & 8).encode()
            fds = [master.area_fd]
        case Request.SET_INFLIGHT_FD if how & 4:
            payload = wire.InflightArea(4 * PAGE, 0, QUEUES, SIZE).encode()
            fds = [master.area_fd]
        case _ if how & 0x80:
            request, payload = source.byte(), source.take(source.byte())
        case _:
            payload = make_payload(request, source)
    master.say(request, payload, fds, how & 0x3F)


def _control(master: Master, source: Source) -> None:
    """Have the guest say something to the console, and take an answer."""
    message = struct.pack("<IHH", source.byte() % 4, source.byte() % 9, source.byte() % 3)
    master.offer(3, len(message), 0, message)
    master.offer(2, 64, 2)


def _person(master: Master, number: int, source: Source) -> None:
    if not master.clients:
        return
    client = master.clients[number % len(master.clients)]
    with contextlib.suppress(OSError):
        match source.byte() % 4:
            case 0 | 1:
                client.send(source.take(source.byte()))
            case 2:
                client.recv(1 << 16)
            case 3:
                master.clients.remove(client)
                client.close()


def _order(master: Master, number: int, source: Source) -> None:
    match source.byte() % 3:
        case 0:
            master.tell(custody.Resize(number % 4, source.number(2), source.number(2)))
        case 1 if len(master.ports) == 2:
            master.ports.append(_ADDED)
            master.tell(custody.AddPort(_ADDED, []), [master.journals[2]])
        case 2 if len(master.ports) == 3:
            del master.ports[2]
            master.tell(custody.RemovePort(2))


def _open() -> set[int]:
    return {*map(int, os.listdir("/proc/self/fd"))}


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:  # that of the listing itself
        return False
    return True


def run(data: bytes) -> None:
    """One step after another of whoever has to do with a worker."""
    before = _open()
    handler = signal.getsignal(signal.SIGTERM)
    fuse = Fuse()
    with (
        mock.patch.object(custody, "send", fuse.send),
        mock.patch.object(privileges, "confine_worker", return_value=None),
    ):
        killed = _run(Master(fuse), Source(data))
    signal.signal(signal.SIGTERM, handler)
    left = {fd for fd in _open() - before if _is_open(fd)}
    for fd in left:
        os.close(fd)
    assert killed or not left, "descriptors are left"


def _run(master: Master, source: Source) -> bool:
    """Take all steps, and return whether the worker was ever killed."""
    try:
        for _ in range(_MOST_STEPS):
            if not source:
                master.turn()
                break
            if source.peek() == POISON:
                source.byte()
                master.dead.append(master.guest)
                master.line.close()
                master.poison(source)
                break
            _step(master, source)
    finally:
        killed = len(master.dead) > 0
        with warnings.catch_warnings(action="ignore", category=ResourceWarning):
            master.close()
            del master
            gc.collect()
    return killed


def seeds() -> Iterable[bytes]:
    turn, kill = b"\x09", b"\x0b"
    fuses = [bytes([0x0B | at << 4]) for at in (4, 6, 7, 8, 9)]

    def start(*queues: int, how: int = 0) -> bytes:
        return b"".join(bytes([queue << 4 | 1, how]) for queue in queues)

    def say(request: Request, how: int, *more: int) -> bytes:
        return bytes([4, REQUESTS.index(request), how, *more])

    for features in (0, 1, 6, 9):
        begin = bytes([0, features])
        rings = begin + start(2, 3, 0, 1, 4, 5) + turn
        talk = b"".join(
            bytes([14, port, event, value])
            for port, event, value in ((0, 0, 1), (0, 3, 1), (0, 6, 1), (1, 3, 1), (1, 6, 1))
        )
        people = b"\x0c\x1c" + turn
        data = bytes([0x96, 5]) + b"hello" + bytes([0xD6, 3]) + b"abc" + turn
        typed = bytes([0x06, 100, 0x46, 100]) + b"\x0d\x00\x03abc" + b"\x1d\x00\x02xy" + turn
        yield rings
        yield rings + talk + turn + people + data + typed + kill + turn + b"\x0d\x02"
        yield rings + talk + kill + people + kill + data + kill + typed + kill
        yield (
            rings + say(Request.SET_LOG_BASE, 12, 0) + say(Request.GET_VRING_BASE, 12, 1, 0) + kill
        )
        yield (
            rings + b"\x03" + rings + b"\x0f\x01" + talk + b"\x0f\x02" + turn + b"\x0f\x00\x50\x00"
        )
        yield begin + say(Request.SET_INFLIGHT_FD, 12) + start(1, 3) + data + kill + data
    save, load = (say(Request.SET_DEVICE_STATE_FD, how) for how in (12, 4))
    cut = say(Request.SET_DEVICE_STATE_FD, 5, 3, 0, 9)
    stop = say(Request.RESET_DEVICE, 0)
    for at in (b"", kill, *fuses):
        yield b"\x00\x00" + start(2, 3, 1) + turn + stop + save + at + load + start(2, 3, 1) + turn
        yield b"\x00\x00" + save + cut + at + load + at + start(0, 1, 3) + kill + b"\x03" + turn
    for fuse in fuses:
        begin = bytes([0, 0])
        yield begin + fuse + start(0, 1, 2, 3) + turn
        yield begin + start(2, 3, 1) + fuse + bytes([14, 0, 0, 1]) + turn + bytes([0x96, 5]) + turn
        yield begin + start(1) + b"\x0c" + turn + fuse + b"\x1c\x0d\x03" + turn + b"\x03" + turn
    for at in range(0, 250, 25):
        poison = bytes([POISON, 0, at, 0, at * 37 & 0xFF])
        yield bytes([0, 0]) + start(0, 1, 2, 3) + b"\x0c" + turn + poison
    others = [say(request, 12, *([0] * 9)) for request in REQUESTS]
    for other in others:
        yield bytes([0, 8]) + start(0, 1) + other + turn + kill
