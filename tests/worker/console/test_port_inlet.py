"""A port's input straight into the guest's buffers, past the journal where that is exact."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from vhost_device_console.errors import GuestError
from vhost_device_console.journal import Input
from vhost_device_console.worker.console.port import TO_GUEST, TO_RING, Inlet, Port, UnderWay

from .conftest import SIZE, Queue

SPANS_AT_ONCE = 1024
BUFFERS_AT_ONCE = 64


class Typist:
    """A client: `data` waits to be read, `asked` has how much room there was each time."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.asked: list[int] = []
        self.spans = 0

    def read(self, into: list[memoryview]) -> int | None:
        self.asked.append(sum(map(len, into)))
        self.spans = len(into)
        if not self.data:
            return None
        before = len(self.data)
        for span in into:
            piece, self.data = self.data[: len(span)], self.data[len(span) :]
            span[: len(piece)] = piece
        return before - len(self.data)


def direct(port: Port, queue: Queue) -> list[int]:
    """Let input go straight into the queue's buffers; return where each turn's count will be."""
    served: list[int] = []

    def serve(move: Callable[[], int]) -> None:
        served.append(move())

    port.inlet = Inlet(queue, lambda: True, serve)
    return served


def pattern(size: int) -> bytes:
    return bytes(at % 251 for at in range(size))


def test_input_goes_straight_into_a_buffer(port: Port, queue: Queue) -> None:
    served = direct(port, queue)
    (room,) = queue.room(16)
    assert port.receive(Typist(b"typed").read) == 5
    assert (bytes(room[:5]), queue.used, served) == (b"typed", [(0, 5)], [1])


def test_bytes_that_went_straight_count_in_the_offsets(port: Port, queue: Queue) -> None:
    direct(port, queue)
    queue.room(16)
    port.receive(Typist(b"typed").read)
    assert (port.input.tail, port.input.head) == (5, 5)


def test_a_worker_killed_while_it_counts_leaves_no_bytes_that_never_were() -> None:
    """The tail is stored before the head, and a tail ahead is the head too."""
    ring, words = memoryview(bytearray(SIZE)), memoryview(bytearray(64)).cast("Q")
    Input(ring, words).consume(5)
    again = Input(ring, words)
    assert (again.tail, again.head, len(again)) == (5, 5, 0)


def test_any_chunks_arrive_in_any_buffers_exactly(port: Port, queue: Queue) -> None:
    direct(port, queue)
    sent = pattern(100_000)
    typist = Typist(b"")
    rooms: list[list[memoryview]] = []
    at = straight = 0
    for turn in range(2000):
        chunk = 1 + turn * 37 % 90
        typist.data += sent[at : at + chunk]
        at += chunk
        for size in (1, 1 + turn % 90, 256)[: turn % 4]:
            rooms.append(queue.room(size))
        if len(port.input) < SIZE:
            done = len(queue.used)
            port.receive(typist.read)
            straight += len(queue.used) - done
        if turn % 5 == 0:
            port.give_input(queue, BUFFERS_AT_ONCE)
    assert 100 < straight < len(queue.used) - 100
    used = b"".join(bytes(rooms[head][0][:written]) for head, written in queue.used)
    assert used + port.input.copy() + typist.data == sent[:at]


@pytest.mark.parametrize("nothing", [None, 0])
def test_a_read_that_finds_nothing_uses_no_buffer(
    port: Port, queue: Queue, nothing: int | None
) -> None:
    direct(port, queue)
    for _ in range(8):  # until several buffers are offered at a time
        queue.room(4)
        port.receive(Typist(pattern(4)).read)
    for _ in range(8):
        queue.room(4)
    used = len(queue.used)
    assert port.receive(lambda _: nothing) == nothing
    assert (len(queue.used), len(queue.given)) == (used, 8)


def test_nothing_overtakes_what_waits_in_the_ring(port: Port, queue: Queue) -> None:
    port.input.feed(b"first ")
    direct(port, queue)
    (room,) = queue.room(16)
    port.receive(Typist(b"second").read)
    port.give_input(queue, BUFFERS_AT_ONCE)
    assert bytes(room[:12]) == b"first second"


def test_several_typists_come_in_the_order_they_are_read(port: Port, queue: Queue) -> None:
    direct(port, queue)
    rooms = [queue.room(8)[0] for _ in range(3)]
    for data in (b"one", b"two", b"three"):
        port.receive(Typist(data).read)
    assert [bytes(room).rstrip(b"\0") for room in rooms] == [b"one", b"two", b"three"]


def test_a_port_that_is_not_open_keeps_input_in_the_ring(port: Port, queue: Queue) -> None:
    port.inlet = Inlet(queue, lambda: False, lambda move: pytest.fail(f"{move} was served"))
    queue.room(16)
    assert port.receive(Typist(b"typed").read) == 5
    assert (port.input.copy(), queue.used) == (b"typed", [])


def test_without_a_queue_input_waits_in_the_ring(port: Port) -> None:
    assert port.receive(Typist(b"typed").read) == 5
    assert port.input.copy() == b"typed"


def test_without_buffers_input_waits_in_the_ring(port: Port, queue: Queue) -> None:
    served = direct(port, queue)
    assert port.receive(Typist(b"typed").read) == 5
    assert (port.input.copy(), served) == (b"typed", [0])


def test_more_than_the_ring_has_room_for_is_left_to_the_client(port: Port) -> None:
    typist = Typist(bytes(SIZE + 3))
    assert port.receive(typist.read) == SIZE
    assert len(typist.data) == 3


def test_buffers_that_were_not_needed_are_the_guests_again(port: Port, queue: Queue) -> None:
    direct(port, queue)
    for _ in range(20):
        queue.room(4)
    port.receive(Typist(bytes(4)).read)  # a full buffer asks for more of them
    assert port.receive(Typist(b"typed").read) == 5
    assert queue.used == [(0, 4), (1, 4), (2, 1)]
    assert [buffer.head for buffer in queue.given] == [*range(3, 20)]


def test_a_read_has_more_buffers_the_more_there_is(port: Port, queue: Queue) -> None:
    direct(port, queue)
    for _ in range(200):
        queue.room(1)
    typist = Typist(bytes(200))
    for _ in range(5):
        port.receive(typist.read)
    assert typist.asked == [1, 4, 16, 64, 64]


def test_a_key_after_a_paste_has_one_buffer_again(port: Port, queue: Queue) -> None:
    direct(port, queue)
    for _ in range(30):
        queue.room(1)
    typist = Typist(bytes(21))
    for _ in range(3):
        port.receive(typist.read)
    for _ in range(2):
        typist.data = b"k"
        port.receive(typist.read)
    assert typist.asked == [1, 4, 16, 9, 1]


def test_nothing_to_read_costs_no_buffer(port: Port, queue: Queue) -> None:
    served = direct(port, queue)
    queue.room(16)
    assert port.receive(Typist(b"").read) is None
    assert (len(queue.given), queue.used, served) == (1, [], [0])


def test_the_end_of_input_costs_no_buffer(port: Port, queue: Queue) -> None:
    direct(port, queue)
    queue.room(16)
    assert port.receive(lambda _: 0) == 0
    assert (len(queue.given), queue.used) == (1, [])


def test_a_client_that_is_gone_costs_no_buffer(port: Port, queue: Queue) -> None:
    direct(port, queue)
    queue.room(16)

    def read(_: list[memoryview]) -> int | None:
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        port.receive(read)
    assert (len(queue.given), queue.used) == (1, [])


def test_a_buffer_of_no_size_is_no_end_of_input(port: Port, queue: Queue) -> None:
    direct(port, queue)
    queue.room()
    queue.room(16)
    typist = Typist(b"typed")
    assert port.receive(typist.read) is None
    assert port.receive(typist.read) == 5
    assert queue.used == [(0, 0), (1, 5)]


def test_a_buffer_of_no_size_between_others_is_used_in_its_turn(port: Port, queue: Queue) -> None:
    direct(port, queue)
    for sizes in ((1,), (2,), (), (2,)):
        queue.room(*sizes)
    typist = Typist(b"typed")
    port.receive(typist.read)
    port.receive(typist.read)
    assert queue.used == [(0, 1), (1, 2), (2, 0), (3, 2)]


def test_a_buffer_in_more_pieces_than_one_read_fills_is_filled_as_far(
    port: Port, queue: Queue
) -> None:
    direct(port, queue)
    queue.room(*[1] * (SPANS_AT_ONCE + 5))
    (room,) = queue.room(16)
    typist = Typist(pattern(SPANS_AT_ONCE + 3))
    assert port.receive(typist.read) == SPANS_AT_ONCE
    assert typist.spans == SPANS_AT_ONCE
    assert port.receive(typist.read) == 3
    assert queue.used == [(0, SPANS_AT_ONCE), (1, 3)]
    assert bytes(room[:3]) == pattern(SPANS_AT_ONCE + 3)[-3:]


def test_a_mistake_of_the_guests_is_told_and_costs_no_input(port: Port, queue: Queue) -> None:
    direct(port, queue)
    queue.mistake()
    typist = Typist(b"typed")
    with pytest.raises(GuestError):
        port.receive(typist.read)
    assert typist.data == b"typed"


def test_the_buffers_before_a_mistake_are_good(port: Port, queue: Queue) -> None:
    direct(port, queue)
    queue.room(1)
    queue.room(16)
    queue.mistake()
    typist = Typist(b"typed")
    port.receive(typist.read)
    port.receive(typist.read)
    assert queue.used == [(0, 1), (1, 4)]


# A read that a killed worker did not finish


class Killed(BaseException):
    """Where the worker is killed."""


@pytest.fixture
def dying(port: Port, queue: Queue) -> Callable[[int, bool], UnderWay]:
    """Give a function that kills a worker in a read: so many bytes have come, known or not."""

    def read_and_die(count: int, known: bool) -> UnderWay:
        typist = Typist(pattern(count))

        def read(into: list[memoryview]) -> int | None:
            got = typist.read(into)
            if known:
                port.under_way[1] = (got or 0) + 1
            raise Killed

        popped = len(queue.popped)
        with pytest.raises(Killed):
            port.receive(read, 7)
        while len(queue.popped) > popped:
            queue.unpop(queue.popped[-1].head)
        found = UnderWay.of(port.under_way)
        assert found is not None
        return found

    return read_and_die


def test_nothing_is_under_way_at_first(port: Port) -> None:
    assert UnderWay.of(port.under_way) is None


def test_a_read_into_the_ring_is_under_way_until_it_is_counted(port: Port) -> None:
    port.input.fed(100)
    port.receive(Typist(b"typed").read, 255)
    assert UnderWay.of(port.under_way) == (255, TO_RING, 100, 5)


def test_a_read_into_a_buffer_is_under_way_until_it_is_counted(port: Port, queue: Queue) -> None:
    direct(port, queue)
    queue.room(16)
    port.input.bypass(100)
    port.receive(Typist(b"typed").read, 3)
    assert UnderWay.of(port.under_way) == (3, TO_GUEST, 100, 5)


def test_a_read_that_found_nothing_brought_nothing(port: Port, queue: Queue) -> None:
    direct(port, queue)
    for _ in range(2):
        queue.room(16)
    port.receive(Typist(b"typed").read)
    port.receive(lambda _: None)
    assert UnderWay.of(port.under_way) == (0, TO_GUEST, 5, 0)


@pytest.mark.parametrize("known", [True, False])
def test_what_lies_in_the_ring_is_counted(
    port: Port, dying: Callable[[int, bool], UnderWay], *, known: bool
) -> None:
    port.input.feed(b"before ")
    read = dying(5, known)
    assert read == (7, TO_RING, 7, 5 if known else None)
    assert port.finish(read, 5) == 0
    assert port.input.copy() == b"before " + pattern(5)
    assert port.finish(read, 5) == 0
    assert len(port.input) == 12


def test_what_lies_in_buffers_is_completed(
    port: Port, queue: Queue, dying: Callable[[int, bool], UnderWay]
) -> None:
    served = direct(port, queue)
    for _ in range(2):  # so that the next read has four buffers
        queue.room(1)
        port.receive(Typist(b"k").read)
    rooms = [queue.room(size)[0] for size in (3, 0, 4, 9)]
    queue.used.clear()
    read = dying(5, False)
    served.clear()
    assert port.finish(read, 5) == 0
    assert b"".join(map(bytes, rooms))[:5] == pattern(5)
    assert (queue.used, served) == ([(2, 3), (3, 0), (4, 2)], [3])
    assert (port.input.tail, len(port.input)) == (7, 0)


def test_what_the_guest_has_already_is_not_given_again(
    port: Port, queue: Queue, dying: Callable[[int, bool], UnderWay]
) -> None:
    direct(port, queue)
    queue.room(16)
    read = dying(5, True)
    assert [port.finish(read, 5), port.finish(read, 5)] == [0, 0]
    assert (queue.used, port.input.tail) == ([(0, 5)], 5)


def test_of_bytes_in_buffers_that_are_gone_the_loss_is_told(
    port: Port, queue: Queue, dying: Callable[[int, bool], UnderWay]
) -> None:
    direct(port, queue)
    for size in (3, 9):
        queue.room(size)
    read = dying(3, True)
    queue.given.pop()
    assert port.finish(read, 5) == 2
    assert (queue.used, port.input.tail) == ([(0, 3)], 3)
    port.inlet = None
    assert port.finish(read, 5) == 2


def test_a_mistake_behind_the_bytes_costs_none_of_them(
    port: Port, queue: Queue, dying: Callable[[int, bool], UnderWay]
) -> None:
    direct(port, queue)
    queue.room(3)
    read = dying(3, True)
    queue.mistake()
    assert port.finish(read, 4) == 1
    assert queue.used == [(0, 3)]


def test_a_mistake_where_the_bytes_are_is_the_ring_s(
    port: Port, queue: Queue, dying: Callable[[int, bool], UnderWay]
) -> None:
    broken = []

    def serve(move: Callable[[], int]) -> None:
        try:
            move()
        except GuestError as error:
            broken.append(error)

    port.inlet = Inlet(queue, lambda: True, serve)
    queue.room(3)
    read = dying(3, True)
    queue.given.clear()
    queue.mistake()
    assert port.finish(read, 3) == 3
    assert len(broken) == 1
