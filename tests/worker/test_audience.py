"""Clients at a port, as socket pairs, moved by a real poller whose timers the test fires."""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import NoReturn

import pytest
from vhost_device_console.journal import Input, Output
from vhost_device_console.worker import audience
from vhost_device_console.worker.audience import Audience, Saved
from vhost_device_console.worker.backends.base import Client, Endpoint
from vhost_device_console.worker.backends.stream import StreamClient, adopt
from vhost_device_console.worker.console.port import Inlet, Port
from vhost_device_console.worker.poller import Poller, Timer

SIZE = 4096


class Stepped(Poller):
    """A poller that turns once when it is told to, and whose timers the test fires."""

    def __init__(self) -> None:
        super().__init__(0)
        self.made: list[Timer] = []

    def timer(self, callback: Callable[[], None]) -> Timer:
        self.made.append(super().timer(callback))
        return self.made[-1]

    def step(self) -> None:
        self._dispatch(0)

    def fire(self) -> int:
        """Fire every timer that is set; return how many were."""
        due = [timer for timer in self.made if timer.due is not None]
        for timer in due:
            timer.fire()
        return len(due)


class Door:
    """An endpoint at which the test lets clients in; `error` is raised once."""

    def __init__(self) -> None:
        self.waiting: deque[Client] = deque()
        self.error: OSError | None = None
        self.abandoned = False
        self._event = os.eventfd(0, os.EFD_NONBLOCK)

    def fileno(self) -> int:
        return self._event

    def arrive(self, client: Client) -> None:
        self.waiting.append(client)
        os.eventfd_write(self._event, 1)

    def accept(self) -> Client | None:
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        if self.waiting:
            return self.waiting.popleft()
        with suppress(BlockingIOError):
            os.eventfd_read(self._event)
        return None

    def close(self) -> None:
        os.close(self._event)
        for client in self.waiting:
            client.close()

    def abandon(self) -> None:
        self.abandoned = True


class Odd(StreamClient):
    """A client with a trouble of its own."""

    error: OSError | None = None
    silent = False
    lost = 0
    queued = 0

    def read(self, into: list[memoryview]) -> int | None:
        return None if self.silent else super().read(into)

    def write(self, data: memoryview | bytes) -> int:
        if self.error is not None:
            raise self.error
        return super().write(data)

    def end_output(self) -> int:
        return self.lost

    def on_its_way(self) -> int:
        return self.queued


class Screen(StreamClient):
    """A client with a size, which the test changes without a word."""

    resizes = True
    columns = 0

    def size(self) -> tuple[int, int]:
        return self.columns, 25 if self.columns else 0


@dataclass
class Buffer:
    """A guest's buffer."""

    head: int
    size: int
    spans: list[memoryview]


@dataclass
class Queue:
    """A virtqueue with the guest's buffers in it; `used` has what was written of each."""

    given: deque[Buffer] = field(default_factory=deque)
    popped: deque[Buffer] = field(default_factory=deque)
    used: list[int] = field(default_factory=list)
    held: int = 0

    @property
    def done(self) -> int:
        return len(self.used)

    def give(self, *data: bytes) -> None:
        for piece in data:
            self.given.append(Buffer(0, len(piece), [memoryview(piece)]))

    def room(self, size: int) -> memoryview:
        """Give a buffer to be filled; return it."""
        room = memoryview(bytearray(size))
        self.given.append(Buffer(0, size, [room]))
        return room

    def pop(self) -> Buffer | None:
        if not self.given:
            return None
        self.popped.append(self.given.popleft())
        return self.popped[-1]

    def unpop(self, _head: int) -> None:
        self.given.appendleft(self.popped.pop())

    def push(self, _head: int, written: int) -> None:
        self.popped.popleft()
        self.used.append(written)

    def take(self, output: Output, most: int, limit: int, _linger_ns: int) -> int:
        self.held = taken = 0
        while taken < most and (chain := self.pop()) is not None:
            if output.head + chain.size > limit:
                self.unpop(chain.head)
                self.held = chain.size
                break
            output.append(chain.spans[0])
            self.push(chain.head, 0)
            taken += 1
        output.commit()
        return taken


class Lines(logging.Handler):
    """Keeps the text of what is logged, and nothing that it was made of."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += record.getMessage() + "\n"


class Hall:
    """One port with its audience, and the memory that a successor has too."""

    def __init__(self, ends: ExitStack, endpoint: Endpoint | None = None, most: int = 256) -> None:
        self.ends = ends
        self._rings = [memoryview(bytearray(SIZE)) for _ in range(2)]
        self._words = memoryview(bytearray(64)).cast("Q")
        self.records = memoryview(bytearray(32768))
        self.endpoint = endpoint
        self.most = most
        self.kind: type[StreamClient] = StreamClient
        self.client: StreamClient | None = None
        self.held: dict[int, int] = {}  # the master's
        self.keys = count()
        self.pollers: list[Poller] = []
        self.log = Lines()
        self.changes = 0
        self.sizes: list[tuple[int, int]] = []
        self.closed = True
        self.begin()
        ends.callback(self.close)

    def begin(self, saved: Saved | None = None) -> None:
        """Begin with an audience, or go on with one."""
        output, input_ = self._rings
        self.port = Port(
            0, "console0", Output(output, self._words), Input(input_, self._words), console=True
        )
        self.poller = Stepped()
        self.pollers.append(self.poller)
        logger = logging.Logger("test")
        logger.addHandler(self.log)
        seats = saved.seats if saved else []
        fds = {seat.key: os.dup(self.held[seat.key]) for seat in seats if seat.key is not None}
        if not self.closed:
            self._die()
        self.audience = Audience(
            self.port,
            self.endpoint,
            self.poller,
            200,
            logging.LoggerAdapter(logger, {}),
            self.changed,
            self.resized,
            records=self.records,
            connect=self.make,
            saved=saved,
            fds=fds,
            most=self.most,
        )
        self.closed = False

    def succeed(self) -> None:
        """Have a successor go on with what is saved now."""
        self.begin(self.audience.save())
        self.audience.adopt()

    def _die(self) -> None:
        """Close the clients' descriptors as the system does it, without a word."""
        for seat in self.audience._seats:  # noqa: SLF001
            assert isinstance(seat.client, StreamClient)
            os.close(seat.client.writes)
            seat.client._sock.close()  # noqa: SLF001

    def make(self, fd: int, _: str) -> StreamClient:
        self.client = adopt(fd, lambda sock: self.kind(sock, "test"))
        return self.client

    def close(self) -> None:
        """Close the audience, unless the test did."""
        if not self.closed:
            self.closed = True
            self.audience.close()
            while self.held:
                os.close(self.held.popitem()[1])
            while self.pollers:
                self.pollers.pop().close()

    def changed(self) -> None:
        self.changes += 1

    def resized(self) -> None:
        self.sizes.append(self.port.size)

    def connect(
        self, kind: type[StreamClient] = StreamClient
    ) -> tuple[StreamClient, socket.socket]:
        """Let a client arrive; return it and its user's end, both with small buffers."""
        ours, user = socket.socketpair()
        self.ends.enter_context(user)
        for end in (ours, user):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
        self.kind = kind
        self.arrive(ours)
        self.settle()
        assert self.client is not None
        return self.client, user

    def arrive(self, ours: socket.socket) -> int:
        """Have the master send a client; return its key."""
        key = next(self.keys)
        self.held[key] = os.dup(ours.fileno())
        self.audience.arrive(ours.detach(), key)
        return key

    def join(self) -> socket.socket:
        return self.connect()[1]

    def settle(self) -> None:
        """Let happen what can."""
        for _ in range(8):
            if self.audience.unsettled:
                self.commit()
            self.audience.flush()
            self.poller.step()

    def commit(self) -> None:
        """Let the master close what the audience does not name any more."""
        for key in {*self.held} - {*self.audience.keys()}:
            os.close(self.held.pop(key))
        self.audience.settle()

    def write(self, data: bytes) -> None:
        """Put output into the journal, in pieces, with a flush after each."""
        for at in range(0, len(data), SIZE // 2):
            self.port.output.append(data[at : at + SIZE // 2])
            self.port.output.commit()
            self.settle()

    def read(self, user: socket.socket) -> bytes:
        """Return everything that reaches a user."""
        got = b""
        while True:
            self.settle()
            try:
                data = user.recv(1 << 16, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return got
            if not data:
                return got
            got += data

    def take(self, most: int = 1 << 20) -> bytes:
        """Let the guest take input, as much as there is or `most`."""
        got = b""
        while len(got) < most and (span := self.port.input.span()):
            piece = bytes(span[: most - len(got)])
            got += piece
            self.port.input.consume(len(piece))
            self.audience.resume()
            self.settle()
        return got


@pytest.fixture
def hall() -> Iterator[Hall]:
    with ExitStack() as ends:
        yield Hall(ends)


def type_all(user: socket.socket, data: bytes) -> bytes:
    """Send what fits without waiting; return that."""
    user.setblocking(False)
    sent = 0
    while sent < len(data):
        try:
            sent += user.send(data[sent : sent + 512])
        except BlockingIOError:
            break
    user.setblocking(True)
    return data[:sent]


def gone(user: socket.socket) -> bool:
    """Whether the daemon's end of the connection is closed."""
    try:
        return user.recv(1 << 16, socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


# Output


def test_output_made_before_anybody_came_is_replayed(hall: Hall) -> None:
    hall.write(b"boot log")
    user = hall.join()
    hall.write(b", and on")
    assert hall.read(user) == b"boot log, and on"


def test_a_second_client_joins_live(hall: Hall) -> None:
    hall.write(b"before")
    one = hall.join()
    two = hall.join()
    hall.write(b"after")
    assert hall.read(one) == b"beforeafter"
    assert hall.read(two) == b"after"


def test_output_while_nobody_is_there_is_the_next_clients(hall: Hall) -> None:
    user = hall.join()
    hall.write(b"seen")
    assert hall.read(user) == b"seen"
    user.close()
    hall.settle()
    hall.write(b"unseen")
    assert hall.read(hall.join()) == b"unseen"


def test_a_lot_of_output_reaches_who_reads(hall: Hall) -> None:
    user = hall.join()
    sent = os.urandom(20 * SIZE)
    got = b""
    for at in range(0, len(sent), 1000):
        hall.write(sent[at : at + 1000])
        got += hall.read(user)
    assert got == sent
    assert hall.port.missed == 0


def marker(count: int) -> bytes:
    return b"\r\n[vhost-device-console: %d bytes missed]\r\n" % count


def test_who_did_not_read_in_time_is_told_how_much_is_missing(hall: Hall) -> None:
    user = hall.join()
    sent = os.urandom(20 * SIZE)
    hall.write(sent)
    got = hall.read(user)
    missed = hall.port.missed
    at = len(sent) - SIZE - missed
    assert missed > 0
    assert got == sent[:at] + marker(missed) + sent[-SIZE:]


def test_who_came_too_late_is_told_how_much_is_missing(hall: Hall) -> None:
    sent = os.urandom(3 * SIZE)
    hall.write(sent)
    assert hall.read(hall.join()) == marker(2 * SIZE) + sent[-SIZE:]
    assert hall.port.missed == 2 * SIZE


def test_a_gap_is_logged(hall: Hall) -> None:
    hall.write(bytes(SIZE + 5))
    hall.join()
    assert "missed 5 bytes" in hall.log.text


def test_one_who_does_not_read_costs_the_other_nothing(hall: Hall) -> None:
    hall.join()
    reader = hall.join()
    sent = os.urandom(20 * SIZE)
    got = b""
    for at in range(0, len(sent), 1000):
        hall.write(sent[at : at + 1000])
        got += hall.read(reader)
    assert got == sent


def test_everyone_is_served_when_they_have_all_there_is(hall: Hall) -> None:
    assert hall.audience.served
    user = hall.join()
    hall.port.output.append(b"x")
    assert not hall.audience.served
    hall.settle()
    assert hall.audience.served
    hall.write(bytes(5 * SIZE))
    assert not hall.audience.served
    hall.read(user)
    assert hall.audience.served


def test_what_is_known_not_to_have_arrived_is_the_next_clients(hall: Hall) -> None:
    client, user = hall.connect(Odd)
    assert isinstance(client, Odd)
    hall.write(b"arrived, lost")
    client.lost = len(b"lost")
    user.close()
    hall.settle()
    assert hall.read(hall.join()) == b"lost"


def test_what_was_written_to_one_who_left_meanwhile_is_the_next_clients(hall: Hall) -> None:
    """The next one arrives before the loop has heard that the one before is gone."""
    before, user = hall.connect(Odd)
    assert isinstance(before, Odd)
    user.shutdown(socket.SHUT_WR)
    hall.settle()
    hall.port.output.append(b"to nobody")
    hall.port.output.commit()
    hall.audience.flush()
    before.lost = len(b"to nobody")
    user.close()
    ours, after = socket.socketpair()
    hall.ends.enter_context(after)
    hall.arrive(ours)  # the master may say this before the loop says the hangup
    assert hall.read(after) == b"to nobody"


# Input


def test_what_is_typed_reaches_the_guest(hall: Hall) -> None:
    hall.join().send(b"typed")
    hall.settle()
    assert hall.take() == b"typed"


def test_two_clients_both_type(hall: Hall) -> None:
    one, two = hall.join(), hall.join()
    for user, data in ((one, b"a"), (two, b"b"), (one, b"c")):
        user.send(data)
        hall.settle()
    assert hall.take() == b"abc"


def test_input_waits_when_the_guest_does_not_take_it_and_goes_on_when_it_does(hall: Hall) -> None:
    user = hall.join()
    data = os.urandom(10 * SIZE)
    sent = type_all(user, data)
    hall.settle()
    assert len(hall.port.input) == SIZE
    got = b""
    while len(sent) < len(data) or len(hall.port.input):
        got += hall.take(100)
        sent += type_all(user, data[len(sent) :])
        hall.settle()
    assert got == data


def test_a_full_input_ring_costs_no_wakeups(hall: Hall) -> None:
    client, user = hall.connect(Odd)
    type_all(user, bytes(4 * SIZE))
    hall.settle()
    reads = 0

    def read(into: list[memoryview]) -> int | None:
        nonlocal reads
        reads += 1
        return StreamClient.read(client, into)

    client.read = read  # type: ignore[method-assign]
    hall.settle()
    assert reads == 0


def test_input_typed_before_a_hangup_is_the_guests(hall: Hall) -> None:
    user = hall.join()
    user.send(b"last words")
    user.close()
    hall.settle()
    assert hall.take() == b"last words"
    assert not hall.port.watchers


def test_input_typed_before_a_hangup_is_not_lost_when_the_ring_was_full(hall: Hall) -> None:
    hall.port.input.fed(SIZE)
    user = hall.join()
    sent = type_all(user, os.urandom(10 * SIZE))
    assert len(sent) > 1000
    user.close()
    hall.settle()
    hall.port.input.consume(SIZE)
    hall.audience.resume()
    hall.settle()
    assert hall.take() == sent
    assert not hall.port.watchers


def test_a_hangup_with_a_full_ring_costs_no_wakeups(hall: Hall) -> None:
    hall.port.input.fed(SIZE)
    client, user = hall.connect()
    type_all(user, bytes(100))
    user.close()
    hall.settle()
    fds = {client.reads, client.writes}
    assert not {fd for fd, _ in hall.poller._epoll.poll(0)} & fds  # noqa: SLF001


def test_who_hung_up_and_is_there_again_does_not_hold_the_worker(hall: Hall) -> None:
    """As a pty's slave that was closed with the ring full, and opened again since."""
    hall.port.input.fed(SIZE)
    client, user = hall.connect(Odd)
    assert isinstance(client, Odd)
    user.send(b"x")
    hall.settle()
    user.close()
    hall.settle()
    client.silent = True
    hall.port.input.consume(SIZE)
    hall.audience.resume()
    hall.settle()
    assert hall.take() == b""
    client.silent = False
    hall.settle()
    assert hall.take() == b"x"


# Leaving


def test_a_client_that_left_is_let_go(hall: Hall) -> None:
    client, user = hall.connect()
    user.close()
    hall.settle()
    assert (client.writes, hall.port.watchers) == (-1, [])


def test_a_half_closed_client_is_served_on(hall: Hall) -> None:
    user = hall.join()
    user.send(b"question")
    user.shutdown(socket.SHUT_WR)
    hall.settle()
    assert hall.take() == b"question"
    hall.write(b"answer")
    assert hall.read(user) == b"answer"


def test_a_half_closed_client_is_let_go_once_it_takes_nothing(hall: Hall) -> None:
    user = hall.join()
    user.shutdown(socket.SHUT_WR)
    hall.settle()
    assert not gone(user)
    assert hall.poller.fire() == 1
    assert gone(user)
    assert hall.poller.fire() == 0


def test_a_half_closed_client_stays_while_it_takes_something(hall: Hall) -> None:
    user = hall.join()
    user.shutdown(socket.SHUT_WR)
    hall.settle()
    for piece in (b"a", b"b", b"c"):
        hall.write(piece)
        assert hall.poller.fire() == 1
        assert hall.read(user) == piece
        assert hall.poller.fire() == 1
    hall.poller.fire()
    assert gone(user)


def test_a_half_closed_client_stays_while_what_is_on_its_way_arrives(hall: Hall) -> None:
    client, user = hall.connect(Odd)
    assert isinstance(client, Odd)
    client.queued = 3
    user.shutdown(socket.SHUT_WR)
    hall.settle()
    for left in (2, 1, 0):
        client.queued = left
        assert hall.poller.fire() == 1
        assert not gone(user)
    hall.poller.fire()
    assert gone(user)


def test_a_half_closed_client_that_took_something_before_is_let_go_too(hall: Hall) -> None:
    user = hall.join()
    hall.write(b"before")
    assert hall.read(user) == b"before"
    user.shutdown(socket.SHUT_WR)
    hall.settle()
    hall.poller.fire()
    assert gone(user)


def test_every_half_closed_client_has_a_moment_of_its_own(hall: Hall) -> None:
    first, second = hall.join(), hall.join()
    first.shutdown(socket.SHUT_WR)
    hall.settle()
    (timer,) = [timer for timer in hall.poller.made if timer.due is not None]
    second.shutdown(socket.SHUT_WR)
    hall.settle()
    timer.fire()
    assert (gone(first), gone(second)) == (True, False)
    assert hall.poller.fire() == 1
    assert gone(second)


def test_a_half_closed_client_is_not_let_go_while_it_is_given_nothing(hall: Hall) -> None:
    user = hall.join()
    user.shutdown(socket.SHUT_WR)
    hall.settle()
    hall.audience.freeze()
    hall.write(b"answer")
    assert hall.poller.fire() == 1
    assert not gone(user)
    hall.audience.thaw()
    assert hall.read(user) == b"answer"
    assert hall.poller.fire() == 1


def test_a_half_closed_client_that_left_is_waited_for_no_more(hall: Hall) -> None:
    user = hall.join()
    user.shutdown(socket.SHUT_WR)
    hall.settle()
    user.close()
    hall.settle()
    assert not hall.port.watchers
    assert hall.poller.fire() == 0


def test_a_terminal_without_input_stays(hall: Hall) -> None:
    client, user = hall.connect()
    client.stays = True
    user.shutdown(socket.SHUT_WR)
    hall.settle()
    assert hall.poller.fire() == 0
    hall.write(b"still here")
    assert hall.read(user) == b"still here"


def test_a_client_that_reads_no_more_may_still_type(hall: Hall) -> None:
    user = hall.join()
    user.shutdown(socket.SHUT_RD)
    hall.write(b"unread")
    user.send(b"typed")
    hall.settle()
    assert hall.take() == b"typed"
    assert not hall.port.watchers
    user.close()
    hall.settle()


def test_a_sink_that_fails_is_logged_and_hurts_nobody_else(hall: Hall) -> None:
    client, _ = hall.connect(Odd)
    other = hall.join()
    assert isinstance(client, Odd)
    client.error = OSError(errno.ENOSPC, "No space left on device")
    hall.write(b"data")
    assert "No space left on device" in hall.log.text
    assert hall.read(other) == b"data"
    assert len(hall.port.watchers) == 1


def test_every_come_and_go_is_told(hall: Hall) -> None:
    user = hall.join()
    come = hall.changes
    assert come > 0
    user.close()
    hall.settle()
    assert hall.changes > come


def test_closing_lets_everyone_go(hall: Hall) -> None:
    users = [hall.join() for _ in range(3)]
    users[1].shutdown(socket.SHUT_WR)
    users[2].shutdown(socket.SHUT_RD)
    hall.settle()
    hall.close()
    assert [gone(user) for user in users] == [True] * 3
    assert not hall.port.watchers


# Arriving


@pytest.fixture
def door() -> Iterator[tuple[Hall, Door]]:
    """Give a hall to which clients come by themselves, as to a pty."""
    with ExitStack() as ends:
        door = Door()
        yield Hall(ends, door), door


def come(hall: Hall, door: Door) -> socket.socket:
    ours, user = socket.socketpair()
    hall.ends.enter_context(user)
    door.arrive(StreamClient(ours, "by itself"))
    hall.settle()
    return user


def test_who_comes_by_itself_is_served(door: tuple[Hall, Door]) -> None:
    user = come(*door)
    door[0].write(b"welcome")
    assert door[0].read(user) == b"welcome"
    assert door[0].audience.keys() == []


def test_no_room_for_who_comes_by_itself_hurts_nobody_else(door: tuple[Hall, Door]) -> None:
    hall, end = door
    first = come(hall, end)
    end.error = OSError(errno.EMFILE, "Too many open files")
    second = come(hall, end)
    assert "who came cannot be served: [Errno 24] Too many open files" in hall.log.text
    hall.write(b"served")
    assert [hall.read(user) for user in (first, second)] == [b"served"] * 2


def test_no_room_for_who_arrives_is_told_and_ends_the_connection(
    hall: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = hall.join()

    def full(_: int) -> NoReturn:
        raise OSError(errno.EMFILE, "Too many open files")

    ours, user = socket.socketpair()
    with monkeypatch.context() as patch, user, ours:
        fd = os.dup(ours.fileno())
        patch.setattr(os, "dup", full)
        hall.audience.arrive(fd, 99)
        assert gone(user)
    assert hall.audience.keys() == [0]
    assert "a client was turned away: [Errno 24] Too many open files" in hall.log.text
    hall.write(b"served")
    assert hall.read(other) == b"served"


@pytest.fixture
def few() -> Iterator[Hall]:
    """Give a hall for three clients."""
    with ExitStack() as ends:
        yield Hall(ends, most=3)


def test_one_client_too_many_is_turned_away(few: Hall) -> None:
    users = [few.join() for _ in range(4)]
    assert [gone(user) for user in users] == [False, False, False, True]
    assert "turned away: 3 others are here" in few.log.text
    assert few.audience.keys() == [0, 1, 2]


def test_one_client_too_many_takes_the_place_of_the_oldest_that_left(few: Hall) -> None:
    hall = few
    hall.port.input.fed(SIZE)
    clients = []
    for data in (b"stays", b"first", b"second"):
        client, user = hall.connect()
        clients.append(client)
        user.send(data)
        hall.settle()
        if data != b"stays":
            user.close()
            hall.settle()
    newest, user = hall.connect()
    assert [client.writes == -1 for client in [*clients, newest]] == [False, True, False, False]
    assert "makes room for another: 5 bytes that it typed are lost" in hall.log.text
    hall.port.input.consume(SIZE)
    hall.audience.resume()
    hall.settle()
    assert hall.take() == b"stayssecond"


def test_who_is_gone_makes_room_before_who_only_ended_its_input(few: Hall) -> None:
    hall = few
    hall.port.input.fed(SIZE)
    waits, leaves, _ = hall.join(), hall.join(), hall.join()
    for user in (waits, leaves):
        user.send(b"typed")
    hall.settle()
    waits.shutdown(socket.SHUT_WR)
    hall.settle()
    leaves.close()
    hall.settle()
    hall.join()
    assert not gone(waits)
    hall.join()
    assert gone(waits)


@pytest.fixture
def real(folder: Path) -> Iterator[tuple[Hall, Callable[[], socket.socket]]]:
    """Give a hall with a real listener, and a function that connects to it."""
    path = str(folder / "s")
    with ExitStack() as ends:
        listener = ends.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(path)
        listener.listen()
        hall = Hall(ends)

        def call() -> socket.socket:
            user = ends.enter_context(socket.socket(socket.AF_UNIX))
            user.connect(path)
            hall.arrive(listener.accept()[0])
            return user

        yield hall, call


def test_who_comes_as_another_leaves_hears_everything(
    real: tuple[Hall, Callable[[], socket.socket]],
) -> None:
    """The newcomer has the descriptors' numbers of the one who left."""
    hall, call = real
    user = call()
    hall.settle()
    hall.write(b"old")
    for _ in range(3):
        user.close()
        user = call()
        hall.settle()
        hall.write(b"new")
        assert hall.read(user) == b"new"


def test_who_comes_as_another_leaves_is_the_first(
    real: tuple[Hall, Callable[[], socket.socket]],
) -> None:
    hall, call = real
    user = call()
    hall.settle()
    user.close()
    hall.port.output.append(b"unseen")
    user = call()
    hall.settle()
    assert hall.read(user) == b"unseen"


# A successor


def test_nothing_is_read_or_written_before_a_successor_would_know(hall: Hall) -> None:
    hall.write(b"replay")
    ours, user = socket.socketpair()
    hall.ends.enter_context(user)
    user.send(b"typed")
    hall.arrive(ours)
    for _ in range(3):
        hall.audience.flush()
        hall.poller.step()
    assert hall.audience.unsettled
    assert (take(user), len(hall.port.input)) == (b"", 0)
    hall.settle()
    assert (take(user), hall.port.input.copy()) == (b"replay", b"typed")


def test_a_seat_that_nobody_was_told_of_arrives_again_and_hears_everything_once(hall: Hall) -> None:
    hall.write(b"replay")
    before = hall.audience.save()
    ours, user = socket.socketpair()
    hall.ends.enter_context(user)
    again = ours.dup()
    hall.arrive(ours)
    hall.audience.flush()
    hall.begin(before)
    hall.audience.adopt()
    hall.arrive(again)
    assert hall.read(user) == b"replay"


def test_clients_go_on_in_the_order_in_which_they_came(hall: Hall) -> None:
    users = [hall.join() for _ in range(3)]
    users.pop(0).close()
    hall.settle()
    users.append(hall.join())
    hall.write(b"before ")
    hall.succeed()
    hall.write(b"after")
    assert [hall.read(user) for user in users] == [
        b"before after",
        b"before after",
        b"before after",
    ]
    assert hall.audience.keys() == [1, 2, 3]
    assert hall.port.attended


def test_what_is_pending_is_the_successor_s_to_give(hall: Hall) -> None:
    hall.write(b"before ")
    one, two = hall.join(), hall.join()
    append(hall, b"pending")
    hall.succeed()
    assert (hall.read(one), hall.read(two)) == (b"before pending", b"pending")


def test_a_gap_met_before_is_told_once_and_one_met_after_too(hall: Hall) -> None:
    user = hall.join()
    sent = os.urandom(20 * SIZE)
    hall.write(sent)
    missed = hall.port.missed
    assert missed > 0
    hall.succeed()
    assert hall.port.missed == 0
    got = hall.read(user)
    at = len(sent) - SIZE - missed
    assert got == sent[:at] + marker(missed) + sent[-SIZE:]
    assert hall.port.missed == 0


def test_a_gap_after_a_death_is_counted(hall: Hall) -> None:
    hall.join()
    hall.succeed()
    for _ in range(3):
        append(hall, bytes(SIZE))
    assert hall.port.missed == 2 * SIZE


def test_a_successor_does_not_wait_for_one_that_was_stuck_until_it_has_caught_up(
    hall: Hall,
) -> None:
    user = hall.join()
    hold(hall)
    hall.poller.fire()
    hall.succeed()
    assert hall.port.holder is None
    hall.read(user)
    assert hall.port.holder is not None
    hall.succeed()
    assert hall.port.holder is not None


def test_the_fixed_size_stays(hall: Hall) -> None:
    hall.audience.fix_size(200, 50)
    assert hall.audience.unsettled
    hall.succeed()
    assert (hall.port.size, hall.port.size_by) == ((200, 50), "resize")


def test_a_half_closed_client_s_time_begins_anew(hall: Hall) -> None:
    user = hall.join()
    user.send(b"question")
    user.shutdown(socket.SHUT_WR)
    hall.settle()
    hall.succeed()
    hall.write(b"answer")
    assert hall.read(user) == b"answer"
    assert hall.poller.fire() == 1
    assert hall.poller.fire() == 1
    assert gone(user)
    assert hall.port.input.copy() == b"question"


def test_one_whose_input_waits_and_who_takes_no_output_goes_on_so(hall: Hall) -> None:
    hall.port.input.fed(SIZE)
    user = hall.join()
    user.send(b"last words")
    user.close()
    hall.settle()
    assert not hall.port.watchers
    hall.succeed()
    assert not hall.port.watchers
    hall.port.input.consume(SIZE)
    hall.audience.resume()
    hall.settle()
    assert hall.take() == b"last words"
    assert hall.audience.keys() == []


def test_who_was_let_go_before_a_successor_was_told_is_gone(hall: Hall) -> None:
    user, other = hall.join(), hall.join()
    before = hall.audience.save()
    user.close()
    for _ in range(4):
        hall.audience.flush()
        hall.poller.step()
    assert hall.audience.keys() == [1]
    changes = hall.changes
    hall.begin(before)
    hall.audience.adopt()
    assert (hall.audience.keys(), hall.audience.unsettled) == ([1], True)
    assert hall.changes > changes
    hall.write(b"on")
    assert hall.read(other) == b"on"


def test_a_place_that_another_has_taken_is_not_the_first_one_s_any_more(hall: Hall) -> None:
    """The one who left is closed, whoever came then arrives anew; nobody has the other's record."""
    user = hall.join()
    hall.write(b"seen")
    before = hall.audience.save()
    held = os.dup(hall.held[0])
    user.close()
    for _ in range(4):
        hall.audience.flush()
        hall.poller.step()
    hall.write(b"unseen")
    ours, newcomer = socket.socketpair()
    hall.ends.enter_context(newcomer)
    again = ours.dup()
    hall.arrive(ours)
    hall.held[0] = held
    hall.begin(before)
    hall.audience.adopt()
    assert hall.audience.keys() == []
    hall.arrive(again)
    assert hall.read(newcomer) == b"unseen"


def test_who_hung_up_while_nobody_was_there_leaves_as_ever(hall: Hall) -> None:
    user = hall.join()
    hall.write(b"seen")
    user.recv(4)
    user.send(b"last words")
    user.close()
    append(hall, b"unseen")
    hall.succeed()
    hall.settle()
    assert hall.take() == b"last words"
    assert not hall.port.watchers


def test_who_was_put_elsewhere_in_the_output_is_there_for_a_successor(hall: Hall) -> None:
    user = hall.join()
    hall.audience.freeze()
    hall.write(b"gone with the guest")
    hall.port.forget()
    hall.succeed()
    hall.write(b"here")
    assert hall.read(user) == b"here"


def test_output_that_does_not_count_is_given_when_it_does(hall: Hall) -> None:
    """Put elsewhere by what is undone, a reader goes on where the output ends."""
    user = hall.join()
    hall.write(b"counts")
    assert hall.read(user) == b"counts"
    append(hall, b", does not")
    hall.port.forget()
    hall.port.output.go_back(6)
    hall.succeed()
    hall.write(b", does")
    assert hall.read(user) == b", does"


def test_one_who_comes_by_itself_goes_on(door: tuple[Hall, Door]) -> None:
    hall, end = door
    ours, user = socket.socketpair()
    hall.ends.enter_context(user)
    again = ours.dup()
    end.arrive(StreamClient(ours, "by itself"))
    hall.settle()
    hall.write(b"before")
    append(hall, b" after")
    end.arrive(StreamClient(again, "by itself"))
    hall.succeed()
    assert hall.read(user) == b"before after"
    assert [seat.key for seat in hall.audience.save().seats] == [None]


def test_one_who_comes_by_itself_after_another_left_is_a_new_one(door: tuple[Hall, Door]) -> None:
    hall, end = door
    user = come(hall, end)
    hall.write(b"seen")
    before = hall.audience.save()
    user.close()
    hall.settle()
    ours, newcomer = socket.socketpair()
    hall.ends.enter_context(newcomer)
    end.arrive(StreamClient(ours, "another"))
    append(hall, b"unseen")
    hall.begin(before)
    hall.audience.adopt()
    assert hall.read(newcomer) == b"unseen"


def test_one_who_came_by_itself_and_is_not_there_any_more_is_gone(door: tuple[Hall, Door]) -> None:
    hall, end = door
    come(hall, end)
    hall.succeed()
    assert (hall.audience.save().seats, hall.port.attended) == ([], False)
    assert hall.audience.unsettled


def test_one_for_whom_there_is_no_room_any_more_is_told_of(
    hall: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    hall.join()

    def full(fd: int, _: str) -> NoReturn:
        os.close(fd)
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(hall, "make", full)
    hall.succeed()
    assert "cannot stay: [Errno 24] Too many open files" in hall.log.text
    assert (hall.audience.keys(), hall.port.watchers) == ([], [])


def test_leaving_everything_as_it_is_touches_nobody(door: tuple[Hall, Door]) -> None:
    hall, end = door
    user = come(hall, end)
    hall.audience.abandon()
    assert end.abandoned
    assert not gone(user)


def test_who_is_let_go_hears_of_it_though_the_master_has_the_descriptor(hall: Hall) -> None:
    user = hall.join()
    user.shutdown(socket.SHUT_WR)
    hall.settle()
    hall.poller.fire()
    assert hall.held
    assert gone(user)


# The guest waits


def hold(hall: Hall) -> Queue:
    """Let the guest write until the port holds a buffer."""
    queue = Queue()
    for _ in range(20):
        queue.give(bytes(SIZE // 2))
        hall.port.take_output(queue, 1)
        hall.settle()
        if hall.port.holding:
            return queue
    raise AssertionError("the port never holds")


def test_the_guest_waits_for_a_reader_once(hall: Hall) -> None:
    hall.join()
    queue = hold(hall)
    assert hall.poller.fire() == 1
    assert hall.port.stalls == 1
    queue.give(*[bytes(SIZE // 2)] * 50)
    while queue.given:
        hall.port.take_output(queue, 10)
        hall.settle()
        assert not hall.port.holding
    assert hall.port.stalls == 1


def test_a_reader_that_reads_on_is_never_stuck(hall: Hall) -> None:
    user = hall.join()
    queue = hold(hall)
    for _ in range(5):
        before = [timer.due for timer in hall.poller.made]
        hall.read(user)
        hall.port.take_output(queue, 1)
        hall.settle()
        if not hall.port.holding:
            queue = hold(hall)
        assert [timer.due for timer in hall.poller.made] != before
    assert hall.port.stalls == 0


def test_nothing_waits_once_the_buffer_is_taken(hall: Hall) -> None:
    user = hall.join()
    queue = hold(hall)
    hall.read(user)
    hall.port.take_output(queue, 1)
    hall.settle()
    assert hall.poller.fire() == 0


def test_a_reader_that_a_blocking_port_waits_for_is_found_stuck_once(hall: Hall) -> None:
    hall.port.blocking = True
    user = hall.join()
    queue = hold(hall)
    assert hall.poller.fire() == 1
    hall.settle()
    assert hall.poller.fire() == 0
    assert hall.port.holding
    hall.read(user)
    hall.port.take_output(queue, 1)
    hall.settle()
    hold(hall)
    assert hall.poller.fire() == 1
    assert hall.port.stalls == 2


def test_nobody_is_found_stuck_while_nothing_is_given(hall: Hall) -> None:
    hall.join()
    hold(hall)
    hall.audience.freeze()
    hall.settle()
    assert hall.poller.fire() == 0
    hall.audience.thaw()
    hall.settle()
    assert hall.poller.fire() == 1
    assert hall.port.stalls == 1


def test_a_stuck_reader_leaves_and_the_buffer_is_taken(hall: Hall) -> None:
    user = hall.join()
    queue = hold(hall)
    user.close()
    hall.settle()
    assert hall.port.take_output(queue, 1) == 1


@pytest.mark.parametrize(("lost", "left"), [(10, 10), (SIZE, SIZE), (SIZE + 20, SIZE), (0, 0)])
def test_a_notice_that_did_not_arrive_is_none_of_the_guest_s_bytes(
    hall: Hall, lost: int, left: int
) -> None:
    """Of what did not arrive the last SIZE bytes are the guest's, before them is a notice."""
    client, user = hall.connect(Odd)
    hall.audience.freeze()
    hall.write(bytes(2 * SIZE))
    hall.audience.thaw()
    assert len(hall.read(user)) > SIZE
    assert isinstance(client, Odd)
    client.lost = lost
    client.error = ConnectionResetError()
    hall.write(b"x")
    assert hall.port.output.head - hall.port.output.seen == left + 1


# Sizes


@pytest.fixture
def screens(hall: Hall) -> tuple[tuple[Screen, socket.socket], tuple[Screen, socket.socket]]:
    """Two terminals of 80 and 132 columns at one port."""
    made = []
    for columns in (80, 132):
        client, user = hall.connect(Screen)
        assert isinstance(client, Screen)
        client.columns = columns
        client.name = f"screen of {columns}"
        made.append((client, user))
    hall.audience.decide_size()
    return made[0], made[1]


Screens = tuple[tuple[Screen, socket.socket], tuple[Screen, socket.socket]]


@pytest.mark.usefixtures("screens")
def test_the_first_terminal_s_size_is_the_port_s(hall: Hall) -> None:
    assert (hall.port.size, hall.port.size_by) == ((80, 25), "screen of 80")


def test_whoever_typed_last_decides_the_size(hall: Hall, screens: Screens) -> None:
    for (_, user), columns in ((screens[1], 132), (screens[0], 80), (screens[1], 132)):
        user.send(b"x")
        hall.settle()
        assert (hall.port.size, hall.port.size_by) == ((columns, 25), f"screen of {columns}")
    assert hall.sizes == [(80, 25), (132, 25), (80, 25), (132, 25)]


@pytest.mark.usefixtures("screens")
def test_a_client_without_a_size_decides_nothing(hall: Hall) -> None:
    hall.join().send(b"x")
    hall.settle()
    assert hall.port.size == (80, 25)


def test_the_size_of_one_who_leaves_goes_to_who_stays(hall: Hall, screens: Screens) -> None:
    screens[1][1].send(b"x")
    hall.settle()
    screens[1][1].close()
    hall.settle()
    assert hall.port.size == (80, 25)


def test_the_last_size_stays_when_everyone_has_left(hall: Hall, screens: Screens) -> None:
    for _, user in screens:
        user.close()
    hall.settle()
    assert (hall.port.size, hall.port.size_by) == ((132, 25), "")


def test_a_fixed_size_stands_whoever_types(hall: Hall, screens: Screens) -> None:
    hall.audience.fix_size(200, 50)
    screens[1][1].send(b"x")
    hall.settle()
    assert (hall.port.size, hall.port.size_by) == ((200, 50), "resize")


@pytest.mark.usefixtures("screens")
def test_without_a_fixed_size_the_clients_decide_again(hall: Hall) -> None:
    hall.audience.fix_size(200, 50)
    hall.audience.fix_size(0, 0)
    assert (hall.port.size, hall.port.size_by) == ((80, 25), "screen of 80")


def test_a_size_that_changed_without_a_word_is_noticed_at_the_next_output(
    hall: Hall, screens: Screens
) -> None:
    screens[0][0].columns = 100
    hall.settle()
    assert hall.port.size == (80, 25)
    hall.write(b"x")
    assert hall.port.size == (100, 25)


def test_one_who_tells_of_its_size_is_not_asked_at_every_output(hall: Hall) -> None:
    client, _ = hall.connect(Screen)
    assert isinstance(client, Screen)
    client.resizes = False
    client.columns = 100
    hall.write(b"x")
    assert hall.port.size == (0, 0)


def test_a_size_that_stays_the_same_is_no_news(hall: Hall, screens: Screens) -> None:
    for _ in range(3):
        screens[0][1].send(b"x")
        hall.settle()
    assert hall.sizes == [(80, 25)]


# The guest moves


def test_nothing_is_read_or_typed_while_frozen(hall: Hall) -> None:
    user = hall.join()
    hall.audience.freeze()
    hall.write(b"output")
    user.send(b"input")
    hall.settle()
    assert (len(hall.port.input), hall.port.output.seen) == (0, 0)


def test_everything_goes_on_after_a_thaw(hall: Hall) -> None:
    user = hall.join()
    hall.audience.freeze()
    hall.write(b"output")
    user.send(b"input")
    hall.settle()
    hall.audience.thaw()
    assert hall.read(user) == b"output"
    assert bytes(hall.port.input.span()) == b"input"


def test_a_port_is_attended_from_the_first_client_to_the_last(hall: Hall) -> None:
    attended = [hall.port.attended]
    for user in [hall.join(), hall.join()]:
        attended.append(hall.port.attended)
        user.close()
    hall.settle()
    assert [*attended, hall.port.attended] == [False, True, True, False]


# The first in line and the others


def take(user: socket.socket) -> bytes:
    """Return what is there for a user now."""
    try:
        return user.recv(1 << 16, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return b""


def append(hall: Hall, data: bytes) -> None:
    hall.port.output.append(data)
    hall.port.output.commit()


def test_while_the_guest_writes_the_others_share_a_part(
    hall: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audience, "_BURST", 0)
    monkeypatch.setattr(audience, "_PIECE", 100)
    first, *others = (hall.join() for _ in range(3))
    got = 0
    for _ in range(40):
        append(hall, b"x" * 800)
        hall.audience.flush()
        assert len(take(first)) == 800
        got += sum(take(other).count(b"x") for other in others)
    assert 0.8 * 40 * 800 / 8 < got < 1.2 * 40 * 800 / 8


def test_a_burst_is_everybodys_at_once(hall: Hall) -> None:
    users = [hall.join() for _ in range(4)]
    append(hall, b"for everybody")
    hall.audience.flush()
    assert [take(user) for user in users] == [b"for everybody"] * 4


def test_in_a_pause_the_others_get_the_rest_in_turn(
    hall: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audience, "_BURST", 0)
    users = [hall.join() for _ in range(4)]
    append(hall, b"for everybody")
    hall.audience.flush()
    assert hall.port.watchers[0].pending == 0
    assert any(watcher.pending for watcher in hall.port.watchers)
    while hall.audience.flush():
        continue
    assert [take(user) for user in users] == [b"for everybody"] * 4


def test_who_lags_most_is_the_next(hall: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audience, "_BURST", 0)
    monkeypatch.setattr(audience, "_PIECE", 10)
    users = [hall.join() for _ in range(3)]
    append(hall, bytes(20))
    for _ in range(2):
        hall.audience.flush()
    assert [len(take(user)) for user in users] == [20, 10, 10]


def test_many_gaps_in_a_row_are_one_line_in_the_log_until_all_was_read(
    hall: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audience, "_BURST", 0)
    monkeypatch.setattr(audience, "_PIECE", 10)
    first, other = hall.join(), hall.join()
    missed = [0]
    for time in (1, 2):
        for _ in range(3):
            append(hall, bytes(SIZE))
            hall.audience.flush()
            take(first)
            take(other)
            missed.append(hall.port.missed)
        while hall.audience.flush():
            take(other)
        assert missed[-2] > missed[-3]
        assert missed[-1] > missed[-2]
        assert hall.log.text.count("did not read in time") == time


def test_a_stuck_first_one_leaves_its_place_to_the_next(hall: Hall) -> None:
    hall.join()
    second, third = hall.join(), hall.join()
    hall.port.watchers[0].stuck = True
    append(hall, bytes(800))
    hall.audience.flush()
    assert (len(take(second)), len(take(third))) == (800, 800)


# Straight into the guest's buffers


class Desk(Hall):
    """A port whose guest has a queue for input, and takes it while it has the port `open`."""

    def __init__(self, ends: ExitStack) -> None:
        super().__init__(ends)
        self.queue = Queue()
        self.open = True
        self.port.inlet = Inlet(self.queue, lambda: self.open, lambda move: void(move()))


def void(_: int) -> None:
    return


@pytest.fixture
def desk() -> Iterator[Desk]:
    with ExitStack() as ends:
        yield Desk(ends)


def test_a_key_is_in_the_guests_buffer_at_once(desk: Desk) -> None:
    user = desk.join()
    room = desk.queue.room(16)
    user.send(b"k")
    desk.poller.step()
    assert (bytes(room[:1]), desk.queue.used, len(desk.port.input)) == (b"k", [1], 0)


def test_what_finds_no_buffer_waits_and_is_not_overtaken(desk: Desk) -> None:
    user = desk.join()
    user.send(b"first ")
    desk.settle()
    room = desk.queue.room(16)
    user.send(b"second")
    desk.settle()
    desk.port.give_input(desk.queue, 64)
    assert bytes(room[:12]) == b"first second"


def test_a_paste_arrives_exactly_however_the_guest_takes_it(desk: Desk) -> None:
    user = desk.join()
    sent = bytes(at * 7 % 253 for at in range(30 * SIZE))
    rooms = []
    at = 0
    for turn in range(10_000):
        if at == len(sent) and sum(desk.queue.used) == len(sent):
            break
        at += len(type_all(user, sent[at : at + 3000]))
        if turn % 5:
            rooms.append(desk.queue.room(1 + turn * 31 % 700))
        desk.poller.step()
        if turn % 7 == 0:
            desk.port.give_input(desk.queue, 64)
            desk.audience.resume()
    got = b"".join(bytes(room[:size]) for room, size in zip(rooms, desk.queue.used, strict=False))
    assert got == sent


def test_several_typists_at_once_each_arrive_in_order(desk: Desk) -> None:
    users = [desk.join() for _ in range(3)]
    rooms = [desk.queue.room(100) for _ in range(60)]
    for word in range(20):
        for who, user in enumerate(users):
            user.send(b"%d:%02d " % (who, word))
        desk.settle()
    got = b"".join(bytes(room[:size]) for room, size in zip(rooms, desk.queue.used, strict=False))
    words = got.decode().split()
    for who in range(3):
        assert [w for w in words if w[0] == str(who)] == [f"{who}:{word:02}" for word in range(20)]


def test_a_guest_that_closes_its_port_finds_the_rest_when_it_is_back(desk: Desk) -> None:
    user = desk.join()
    room = desk.queue.room(8)
    user.send(b"taken")
    desk.settle()
    desk.open = False
    rest = desk.queue.room(8)
    user.send(b"kept")
    desk.settle()
    assert (bytes(room[:5]), desk.queue.used, desk.port.input.copy()) == (b"taken", [5], b"kept")
    desk.port.give_input(desk.queue, 64)
    assert bytes(rest[:4]) == b"kept"


class Untold:
    """A guest's ring, and a worker that dies once bytes are in its buffer."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk

    def die(self, move: Callable[[], int]) -> None:
        tail, head = self.desk.port.input.tail, self.desk.port.input.head
        move()
        self.desk.queue.used.clear()  # nothing of that was committed
        self.desk.port.input.go_back(tail)
        self.desk.port.input.head = head
        raise InterruptedError


@pytest.mark.parametrize("with_ring", [True, False])
def test_what_was_read_into_a_buffer_is_handed_on_or_its_loss_is_told(
    desk: Desk, with_ring: bool
) -> None:
    user = desk.join()
    room = desk.queue.room(16)
    untold = Untold(desk)
    assert desk.port.inlet is not None
    desk.port.inlet = desk.port.inlet._replace(serve=untold.die)
    user.send(b"typed")
    with pytest.raises(InterruptedError):
        desk.poller.step()
    again = memoryview(room)
    desk.begin(desk.audience.save())
    if with_ring:
        desk.queue.given.append(Buffer(0, 16, [again]))
        desk.port.inlet = Inlet(desk.queue, lambda: True, lambda move: void(move()))
    desk.audience.adopt()
    if with_ring:
        assert (desk.queue.used, bytes(room[:5])) == ([5], b"typed")
        assert (desk.port.input.tail, len(desk.port.input)) == (5, 0)
    else:
        assert "5 bytes that test typed are lost: the guest's buffers are gone" in desk.log.text


def test_a_read_of_which_nothing_is_known_is_told_of(desk: Desk) -> None:
    desk.join()
    port = desk.port
    with pytest.raises(InterruptedError):
        port.receive(interrupted)
    desk.succeed()
    assert "what test typed last may be lost with its worker" in desk.log.text
    desk.log.text = ""
    desk.succeed()
    assert desk.log.text == ""


def interrupted(_: list[memoryview]) -> NoReturn:
    raise InterruptedError


def test_while_the_guest_moves_nothing_goes_into_its_buffers(desk: Desk) -> None:
    user = desk.join()
    room = desk.queue.room(8)
    desk.audience.freeze()
    user.send(b"later")
    desk.settle()
    assert (desk.queue.used, desk.port.input.tail, len(desk.port.input)) == ([], 0, 0)
    desk.audience.thaw()
    desk.settle()
    assert (desk.queue.used, bytes(room[:5])) == ([5], b"later")


def test_last_words_go_straight_in_before_their_client_leaves(desk: Desk) -> None:
    user = desk.join()
    room = desk.queue.room(16)
    user.send(b"last words")
    user.close()
    desk.settle()
    assert (desk.queue.used, bytes(room[:10])) == ([10], b"last words")
    assert not desk.port.watchers


def test_a_client_that_broke_off_leaves_the_guests_buffers_alone(desk: Desk) -> None:
    client, user = desk.connect(Odd)
    desk.queue.room(16)

    def read(into: list[memoryview]) -> int | None:
        raise ConnectionResetError(len(into))

    client.read = read  # type: ignore[method-assign]
    user.shutdown(socket.SHUT_WR)
    desk.settle()
    assert (desk.queue.used, len(desk.queue.given), desk.port.watchers) == ([], 1, [])


def test_who_typed_straight_in_decides_the_size_too(desk: Desk) -> None:
    first, _ = desk.connect(Screen)
    second, user = desk.connect(Screen)
    assert isinstance(first, Screen)
    assert isinstance(second, Screen)
    first.columns, second.columns = 80, 132
    desk.queue.room(16)
    user.send(b"k")
    desk.settle()
    assert desk.port.size == (132, 25)
