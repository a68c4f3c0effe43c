"""A worker that is killed at any line of its clients' way, and the successors that go on.

What the guest wrote is a stream that tells its own offsets, so that a byte too many or too few
shows in what a client got. The clients' other ends, the guest's buffers and what the master would
keep are this test's: each worker is a forked child that may be killed, and everything else it does
lies in lines at which it is not.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import re
import select
import signal
import socket
import struct
import sys
import termios
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import msgspec
import pytest
from vhost_device_console import journal as journals
from vhost_device_console import ledger as ledgers
from vhost_device_console.journal import Journal
from vhost_device_console.ledger import Ledger
from vhost_device_console.testing import GuestMemory
from vhost_device_console.worker import audience as audiences
from vhost_device_console.worker import roles
from vhost_device_console.worker.audience import Audience, Saved
from vhost_device_console.worker.backends import attached, base, stream, tcp, unix
from vhost_device_console.worker.backends.base import Client
from vhost_device_console.worker.console import port as ports
from vhost_device_console.worker.console.port import Inlet, Port
from vhost_device_console.worker.poller import Poller
from vhost_device_console.worker.virtqueue.features import RING_PACKED

sys.path.append(str(Path(__file__).parent / "virtqueue"))

from rings import Sides

SIZE = 4096
RING = 128

#: Where workers are killed.
TRACED = {
    module.__file__: Path(str(module.__file__)).name
    for module in (attached, audiences, ports, roles, stream, tcp, unix)
}

#: What a user typed has its number in the two highest bits.
TYPED = [bytes(who << 6 | at % 61 for at in range(4000)) for who in range(3)]

#: The guest's output: four bytes tell where they are, none of them is in a notice.
WRITTEN = b"".join(
    bytes(0x80 | at >> shift & 0x7F for shift in (21, 14, 7, 0)) for at in range(16384)
)


UNFINISHED = re.compile(rb"\r(\n(\[[^\]]*(\]\r?)?)?)?\Z")
GAP = re.compile(re.escape(base.gap(0)).replace(b"0", rb"(\d+)"))

#: How much of it there is in the end.
HEAD = 26000


class Point(NamedTuple):
    """A line, at the so-manieth time."""

    file: str
    line: int
    time: int


class Kept(msgspec.Struct):
    """What outlives a worker, besides the journal, the ledger and the sockets."""

    step: int = 0
    ran: bool = False
    saved: Saved | None = None
    arrived: list[int] = msgspec.field(default_factory=list)
    typed: list[int] = msgspec.field(default_factory=lambda: [0, 0, 0])
    got: list[bytes] = msgspec.field(default_factory=lambda: [b"", b"", b""])
    links: list[bytes] = []


class Scene:
    """A port's memory and its users; `kind` makes a connection and says how a worker has it."""

    def __init__(self, ends: ExitStack, kind: str, features: int) -> None:
        guest = ends.enter_context(GuestMemory(1 << 20))
        self.sides = Sides(guest, features, size=RING, writable=True, indirect=False)
        for at in range(RING):
            self.sides.driver.add([], [1 + at * 7 % 40])
        self.sides.driver.publish()
        self.journal = journals.create("journal", SIZE, SIZE)
        self.ledger = ledgers.create("ledger")
        self._notes = mmap.mmap(-1, 1 << 18)
        ends.callback(self._notes.close)
        self.connect = {"tcp": slow_tcp}.get(kind, slow_unix)
        pairs = [connected() if kind == "tcp" else self.pair() for _ in range(3)]
        self.held = [ours for ours, _ in pairs]
        self.users = [user for _, user in pairs]
        for sock in (*self.held, *self.users):
            ends.enter_context(sock)
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
        for fd in (self.journal, self.ledger):
            ends.callback(os.close, fd)
        self.kept = Kept()
        self.keep()

    def pair(self) -> tuple[socket.socket, socket.socket]:
        return socket.socketpair()

    def worker(self) -> Worker:
        return Worker(self)

    def keep(self) -> None:
        data = msgspec.msgpack.encode(self.kept)
        self._notes[:4] = struct.pack("=I", len(data))
        self._notes[4 : 4 + len(data)] = data

    def remember(self) -> None:
        (size,) = struct.unpack("=I", self._notes[:4])
        self.kept = msgspec.msgpack.decode(self._notes[4 : 4 + size], type=Kept)

    def drain(self, who: int, wanted: int = 1 << 20) -> None:
        """Let a user read until it has that much, or all there is."""
        with suppress(BlockingIOError, ConnectionError):
            while missing := max(0, wanted - len(self.kept.got[who])):
                data = self.users[who].recv(missing)
                if not data:
                    break
                self.kept.got[who] += data
        self.keep()

    def quiet(self, who: int) -> bool:
        """Say whether nothing is on its way between a user and a worker."""
        ours, user = self.held[who], self.users[who]
        asked = [(ours, termios.FIONREAD), (ours, termios.TIOCOUTQ), (user, termios.TIOCOUTQ)]
        return not any(any(fcntl.ioctl(sock, request, bytes(4))) for sock, request in asked)

    def finish(self) -> None:
        """Let the master close what is left, and everybody read to the end."""
        self.remember()
        for ours, user in zip(self.held, self.users, strict=True):
            ours.close()
            user.setblocking(True)
            user.settimeout(20)
        for who, user in enumerate(self.users):
            with suppress(ConnectionError):
                while data := user.recv(1 << 16):
                    self.kept.got[who] += data
        journal = Journal(self.journal)
        self.taken = b"".join(used.data for used in self.sides.driver.reap())
        self.waiting = journal.input.copy()
        self.written = journal.output.head

    def got(self, who: int) -> bytes:
        """Return what a user got."""
        return self.kept.got[who]

    def typed(self) -> list[tuple[int, int]]:
        """Return how much each user typed."""
        return [*enumerate(self.kept.typed)]

    def given(self, who: int) -> bytes:
        """Return what the guest got of a user."""
        return bytes(byte for byte in self.taken + self.waiting if byte >> 6 == who)


def connected() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        user = socket.socket()
        user.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        user.connect(listener.getsockname())
        return listener.accept()[0], user


LARGEST_WRITE = 700


def some(data: memoryview | bytes) -> memoryview | bytes:
    """Return what a slow client takes in one write: a part of any notice."""
    return data[: 9 if isinstance(data, bytes) else LARGEST_WRITE]


class SlowTcp(tcp.TcpClient):
    def write(self, data: memoryview | bytes) -> int:
        return super().write(some(data))


class SlowUnix(stream.StreamClient):
    def write(self, data: memoryview | bytes) -> int:
        return super().write(some(data))


def slow_tcp(fd: int, name: str) -> Client:
    return stream.adopt(fd, lambda sock: SlowTcp(sock, name))


def slow_unix(fd: int, _: str) -> Client:
    return stream.adopt(fd, lambda sock: SlowUnix(sock, "test"))


class Turning(Poller):
    """A poller that turns once when it is told to."""

    def turn(self) -> None:
        self._dispatch(0)


class Worker:
    """One life: takes over what `scene` has, and goes on with the story."""

    def __init__(self, scene: Scene) -> None:
        scene.remember()
        self.scene = scene
        kept = scene.kept
        journal = Journal(scene.journal)
        ledger = Ledger(scene.ledger)
        page = ledger.page(0)
        pending = None
        if kept.ran:
            pending = page.pending()
            journal.input.go_back(page.offset(journal.input.tail))
        self.queue = scene.sides.serve(0, ledger=page, stream=journal.input, resume=pending)
        kept.ran = True
        scene.keep()
        self.port = Port(
            0, "console0", journal.output, journal.input, console=True, spare=journal.spare
        )
        self.poller = Turning(0)
        logger = logging.Logger("test")
        logger.addHandler(logging.NullHandler())
        self.audience = Audience(
            self.port,
            None,
            self.poller,
            200,
            logging.LoggerAdapter(logger, {}),
            lambda: None,
            lambda: None,
            connect=scene.connect,
            records=ledger.records(0),
            saved=kept.saved,
            fds={
                seat.key: os.dup(scene.held[seat.key].fileno())
                for seat in (kept.saved.seats if kept.saved else ())
                if seat.key is not None
            },
        )
        self.port.inlet = Inlet(self.queue, lambda: self.open, self.serve)
        self.open = True
        self.audience.adopt()
        here = self.audience.keys()
        for key in kept.arrived:
            if key not in here and (kept.saved is None or key not in self.told):
                self.arrive(key)
        self.commit()

    @property
    def told(self) -> list[int | None]:
        """Who a commit ever named; who of these is not here has left."""
        saved = self.scene.kept.saved
        return [seat.key for seat in saved.seats] if saved else []

    def serve(self, move: Callable[[], int]) -> None:
        if move():
            self.queue.publish()

    def arrive(self, key: int) -> None:
        self.audience.arrive(os.dup(self.scene.held[key].fileno()), key)

    def commit(self) -> None:
        """End a turn as a worker does."""
        if self.audience.unsettled:
            saved = self.audience.save()
            kept = self.scene.kept
            kept.saved = saved
            named = {seat.key for seat in saved.seats}
            kept.arrived = [key for key in kept.arrived if key in named]
            self.scene.keep()
            self.audience.settle()

    def turn(self, times: int = 1) -> None:
        for _ in range(times):
            self.audience.flush()
            self.poller.turn()
            self.commit()

    # The steps of the story: each may begin anew where a worker was killed in it

    def come(self, *keys: int) -> None:
        for key in keys:
            if key not in self.scene.kept.arrived:
                self.scene.kept.arrived.append(key)
                self.scene.keep()
                self.arrive(key)
        self.turn()

    def write(self, head: int, turns: int = 1) -> None:
        output = self.port.output
        while output.head < head:
            output.append(WRITTEN[output.head : min(head, output.head + SIZE // 2)])
            output.commit()
        self.turn(turns)

    def type(self, who: int, count: int, turns: int = 1) -> None:
        kept = self.scene.kept
        if kept.typed[who] < count:
            self.scene.users[who].send(TYPED[who][kept.typed[who] : count])
            kept.typed[who] = count
            self.scene.keep()
        self.turn(turns)

    def closed(self, who: int, count: int) -> None:
        """Type while the guest has the port closed; then it takes some of that."""
        self.open = False
        self.type(who, count, 2)
        self.open = True
        if self.port.give_input(self.queue, 3):
            self.queue.publish()
            self.audience.resume()
        self.turn()

    def rest(self) -> None:
        while self.port.give_input(self.queue, 3):
            self.queue.publish()
        self.audience.resume()
        self.turn()

    def read(self, who: int, count: int, turns: int = 1) -> None:
        self.scene.drain(who, count)
        self.turn(turns)

    def leave(self, who: int, successor: int) -> None:
        """One leaves, and another comes at the same moment."""
        with suppress(OSError):  # it has left already
            self.scene.users[who].shutdown(socket.SHUT_RDWR)
        self.come(successor)

    def all(self) -> None:
        """Serve everybody with all there is."""
        scene = self.scene
        while not self.audience.served or not all(map(scene.quiet, (0, 2))):
            for who in range(3):
                scene.drain(who)
            self.rest()
            there = [sock for sock in (*scene.users, *scene.held) if sock.fileno() >= 0]
            select.select(there, [], [], 0.01)  # TCP has its own times

    def end(self) -> None:
        self.audience.close()


STORY: list[Callable[[Worker], None]] = [
    lambda worker: worker.write(1000),
    lambda worker: worker.come(0, 1),
    lambda worker: worker.write(1300, 4),
    lambda worker: worker.type(0, 5),
    lambda worker: worker.type(0, 80, 4),
    lambda worker: worker.type(1, 30, 2),
    lambda worker: worker.read(0, 500),
    lambda worker: worker.write(12000, 12),
    lambda worker: worker.read(0, 5000, 3),
    lambda worker: worker.write(17001, 3),
    lambda worker: worker.type(1, 200, 3),
    lambda worker: worker.read(0, 5200, 2),
    lambda worker: worker.write(22000, 2),
    lambda worker: worker.read(1, 6000, 6),
    lambda worker: worker.closed(0, 300),
    lambda worker: worker.closed(1, 330),
    lambda worker: worker.type(0, 310),
    lambda worker: worker.rest(),
    lambda worker: worker.type(0, 900, 4),
    lambda worker: worker.leave(1, 2),
    lambda worker: worker.write(HEAD, 8),
    lambda worker: worker.type(2, 100, 3),
    lambda worker: worker.rest(),
    lambda worker: worker.all(),
    lambda worker: worker.end(),
]


def live(scene: Scene, steps: list[Callable[[Worker], None]]) -> None:
    worker = scene.worker()
    while scene.kept.step < len(steps):
        steps[scene.kept.step](worker)
        scene.kept.step += 1
        scene.keep()


def lives(scene: Scene, point: Point | None = None, *, begins: bool = False) -> bool:
    """Have a worker go on with the story, only take over if it `begins`; say whether it lived."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            if point is not None:
                sys.settrace(dying_at(point))
            live(scene, [] if begins else STORY)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status == 0


def dying_at(point: Point) -> Callable[[FrameType, str, Any], Any]:
    left = point.time

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if TRACED.get(frame.f_code.co_filename) != point.file:
            return None
        if event == "line" and frame.f_lineno == point.line:
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    return trace


def lines(scene: Scene, *, begins: bool = False) -> Counter[tuple[str, int]]:
    """Have a worker go on to the end; return how often it came by each line."""
    seen: Counter[tuple[str, int]] = Counter()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        file = TRACED.get(frame.f_code.co_filename)
        if file is None:
            return None
        if event == "line":
            seen[file, frame.f_lineno] += 1
        return trace

    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            sys.settrace(trace)
            live(scene, [] if begins else STORY)
            sys.settrace(None)
            with os.fdopen(theirs, "wb") as pipe:
                pipe.write(msgspec.msgpack.encode([(*where, n) for where, n in seen.items()]))
            status = 0
        finally:
            os._exit(status)
    os.close(theirs)
    with os.fdopen(ours, "rb") as pipe:
        found = msgspec.msgpack.decode(pipe.read() or b"\x90", type=list[Point])
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return Counter({(file, line): time for file, line, time in found})


def points(seen: Counter[tuple[str, int]]) -> list[Point]:
    """Return each line at the first time and at the last."""
    return [
        Point(*where, time) for where, count in sorted(seen.items()) for time in sorted({1, count})
    ]


# What everyone got


def wrong_at(data: bytes, start: int, end: int) -> int | None:
    """Say where `data` is not the stream from `start` to `end` with gaps that are told, if so."""
    at, done = start, 0
    while done < len(data):
        told = GAP.search(data, done)
        until = told.start() if told else len(data)
        piece, wanted = data[done:until], WRITTEN[at : at + until - done]
        if piece != wanted:
            pairs = zip(piece, wanted, strict=False)
            return done + next((at for at, (a, b) in enumerate(pairs) if a != b), len(wanted))
        at += len(piece)
        done = until
        if told:
            at += int(told[1])
            done = told.end()
    return None if at == end else done


def begins_at(data: bytes) -> int:
    """Return where in the stream a client's first bytes are."""
    at = WRITTEN.find(data[:12])
    assert at >= 0
    return at


def check(scene: Scene) -> None:
    """Check that everyone got everything once."""
    scene.finish()
    assert scene.written == HEAD
    assert wrong_at(scene.got(0), 0, HEAD) is None
    left = UNFINISHED.sub(b"", scene.got(1))
    assert wrong_at(left, 1000, -1) == len(left)
    assert wrong_at(scene.got(2), begins_at(scene.got(2)), HEAD) is None
    for who, typed in scene.typed():
        assert scene.given(who) == TYPED[who][:typed]


def repeated(data: bytes, start: int, end: int) -> int:
    """Return how many bytes are in it twice in one place, as for `wrong_at`; -1 if that is not all.

    A gap that was told twice is one of its bytes too many.
    """
    wrong = wrong_at(data, start, end)
    if wrong is None:
        return 0
    for at in range(max(0, wrong - 64), wrong + 64):
        for count in range(1, LARGEST_WRITE + 1):
            twice = data[at - count : at] == data[at : at + count]
            if twice and wrong_at(data[:at] + data[at + count :], start, end) is None:
                return count
    return -1


def lost(given: bytes, typed: bytes) -> int:
    """Return how many bytes are missing in one place, -1 if that is not all."""
    missing = len(typed) - len(given)
    before = next((at for at, byte in enumerate(given) if byte != typed[at]), len(given))
    return missing if given[before:] == typed[before + missing :] else -1


#: For those kinds of connection that need one of their own.
SCENES: dict[str, type[Scene]] = {}


def made(kind: str, features: int, what: Callable[[Scene], Any]) -> Any:
    """Return `what` makes of a new scene."""
    with ExitStack() as ends:
        return what(SCENES.get(kind, Scene)(ends, kind, features))


def dies(scene: Scene, point: Point, *then: Point) -> bool:
    """Have a worker die there, its successor die as it takes over, and another one end the story.

    Return whether the first one did.
    """
    if lives(scene, point):
        return False
    for later in then:
        lives(scene, later, begins=True)
    assert lives(scene)
    return True


def all_once(point: Point, *then: Point) -> Callable[[Scene], bool]:
    """Return a function that checks that nobody loses or gets twice a byte by those deaths."""

    def run(scene: Scene) -> bool:
        died = dies(scene, point, *then)
        try:
            check(scene)
        except AssertionError as error:
            raise AssertionError(f"died at {point}, {then}") from error
        return died

    return run


# Once


@pytest.mark.parametrize("part", range(16))
def test_over_tcp_every_byte_arrives_once_at_whatever_line_a_worker_dies(part: int) -> None:
    every = points(made("tcp", 0, lines))[part::16]
    died = sum(made("tcp", 0, all_once(point)) for point in every)
    assert died > len(every) / 2  # the rest, such as a full socket, is not there every time


@pytest.mark.parametrize("part", range(2))
def test_into_a_packed_ring_every_byte_goes_once_at_whatever_line_a_worker_dies(part: int) -> None:
    every = [point for point in points(made("tcp", RING_PACKED, lines)) if point.file == "port.py"]
    died = sum(made("tcp", RING_PACKED, all_once(point)) for point in every[part::2])
    assert died > len(every) / 4


#: Where a worker has done something that only the system, or a word, knows of.
UNTOLD = {
    "read into buffers": ("port.py", "left = count or 0", 3),
    "read into the ring": ("port.py", "self.under_way[1] = (count or 0) + 1", 2),
    "given to the guest": ("audience.py", "seat.record[_READ] = seat.read = seat.read + count", 2),
    "written": (
        "audience.py",
        "seat.record[_WRITTEN] = seat.written = seat.written + count",
        5,
    ),
    "a part of a notice": ("audience.py", "seat.notice = seat.notice[count:]", 2),
}


@pytest.mark.parametrize("what", UNTOLD)
def test_over_tcp_every_byte_arrives_once_though_the_successor_dies_as_it_takes_over(
    what: str,
) -> None:
    file, text, time = UNTOLD[what]
    source = next(Path(str(path)) for path, name in TRACED.items() if name == file)
    texts = [line.strip() for line in source.read_text().splitlines()]
    first = Point(file, 1 + texts.index(text), time)

    def takes_over(scene: Scene) -> list[Point]:
        assert not lives(scene, first)
        return [Point(*where, 1) for where in sorted(lines(scene, begins=True))[::2]]

    every = made("tcp", 0, takes_over)
    assert len(every) > 40
    died = sum(made("tcp", 0, all_once(first, later)) for later in every)
    assert died > len(every) / 2


# As well as can be


@pytest.mark.parametrize("part", range(8))
def test_over_unix_sockets_at_most_the_last_write_is_repeated_and_the_last_read_lost(
    part: int,
) -> None:
    inexact = 0

    def at_most_the_last(scene: Scene, point: Point) -> tuple[int, int]:
        assert dies(scene, point)
        scene.finish()
        got = scene.got(2)
        twice = [repeated(scene.got(0), 0, HEAD), repeated(got, begins_at(got), HEAD)]
        missing = [lost(scene.given(who), TYPED[who][:typed]) for who, typed in scene.typed()]
        assert min(*twice, *missing) >= 0, f"died at {point}"
        return sum(twice), sum(missing)

    every = [point for point in points(made("unix", 0, lines)) if point.time == 1][part::8]
    for point in every:
        inexact += any(made("unix", 0, partial(at_most_the_last, point=point)))
    assert inexact <= 2  # the line after each system call, in eight parts together
