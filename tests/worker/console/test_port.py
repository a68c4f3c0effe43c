"""A port: output into the journal, readers and who of them is waited for, input out of it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import pytest
from vhost_device_console.errors import GuestError
from vhost_device_console.worker.console.port import Port, Watcher, discard

from .conftest import SIZE, Queue

MANY = 64


def write(port: Port, queue: Queue, *data: bytes) -> int:
    """Let the guest write; return how many buffers were taken."""
    for piece in data:
        queue.write(piece)
    return port.take_output(queue, MANY)


def read(port: Port, watcher: Watcher) -> bytes:
    """Let a reader take all it can."""
    watcher.skip_lost()
    got = b""
    while span := bytes(watcher.span()):
        got += span
        port.took(watcher, len(span))
    return got


# Output


def test_output_is_in_the_journal_and_its_buffer_returned_at_once(port: Port, queue: Queue) -> None:
    assert write(port, queue, b"hello") == 1
    assert queue.used == [(0, 0)]
    assert bytes(port.output.span(0)) == b"hello"


def test_nobody_watching_holds_nothing(port: Port, queue: Queue) -> None:
    for _ in range(100):
        assert write(port, queue, bytes(SIZE // 2)) == 1
    assert not port.holding
    assert port.output.head == 50 * SIZE


def test_the_oldest_output_gives_way(port: Port, queue: Queue) -> None:
    write(port, queue, b"old", bytes(SIZE - 3), b"new")
    watcher = port.attach()
    assert watcher.skip_lost() == 3
    assert read(port, watcher)[-3:] == b"new"


def test_scattered_output_is_one_stream(port: Port, queue: Queue) -> None:
    queue.write(b"a", b"", b"bc", b"def")
    queue.write(b"ghi")
    assert port.take_output(queue, MANY) == 2
    assert bytes(port.output.span(0)) == b"abcdefghi"


@pytest.mark.parametrize("data", [(), (b"",), (b"", b"")])
def test_zero_length_output_is_returned(port: Port, queue: Queue, data: tuple[bytes, ...]) -> None:
    queue.write(*data)
    assert port.take_output(queue, MANY) == 1
    assert (queue.used, port.output.head) == ([(0, 0)], 0)


def test_a_buffer_as_large_as_the_journal_is_taken(port: Port, queue: Queue) -> None:
    port.attach()
    data = os.urandom(SIZE)
    assert write(port, queue, data) == 1
    assert port.output.span(0) == data


@pytest.mark.parametrize("most", [1, 3])
def test_no_more_is_taken_than_the_budget(port: Port, queue: Queue, most: int) -> None:
    for _ in range(5):
        queue.write(b"x")
    assert port.take_output(queue, most) == most
    assert len(queue.given) == 5 - most


def test_no_buffer_is_looked_at_past_the_budget(port: Port, queue: Queue) -> None:
    queue.write(b"x")
    queue.mistake()
    assert port.take_output(queue, 1) == 1


def test_output_before_a_mistake_counts(port: Port, queue: Queue) -> None:
    queue.write(b"good")
    queue.mistake()
    with pytest.raises(GuestError):
        port.take_output(queue, MANY)
    assert queue.used == [(0, 0)]
    assert bytes(port.output.span(0)) == b"good"
    assert not port.holding


def test_a_disabled_queues_output_is_counted_and_returned(port: Port, queue: Queue) -> None:
    queue.write(b"abc", b"de")
    queue.write(b"f")
    assert discard(queue, 1, port) == 1
    assert discard(queue, MANY, port) == 1
    assert (port.discarded, port.output.head) == (6, 0)
    assert queue.used == [(0, 0), (1, 0)]


# Readers


def test_the_first_reader_gets_what_nobody_has_seen(port: Port, queue: Queue) -> None:
    write(port, queue, b"boot")
    assert read(port, port.attach()) == b"boot"


def test_others_join_live(port: Port, queue: Queue) -> None:
    write(port, queue, b"boot")
    port.attach()
    second = port.attach()
    write(port, queue, b"live")
    assert read(port, second) == b"live"


def test_what_was_seen_is_not_replayed(port: Port, queue: Queue) -> None:
    write(port, queue, b"seen")
    watcher = port.attach()
    read(port, watcher)
    port.detach(watcher, 0)
    write(port, queue, b"unseen")
    assert read(port, port.attach()) == b"unseen"


def test_what_a_reader_left_untaken_is_the_next_ones(port: Port, queue: Queue) -> None:
    write(port, queue, b"taken, left")
    watcher = port.attach()
    port.took(watcher, 7)
    port.detach(watcher, 0)
    assert read(port, port.attach()) == b"left"


def test_what_did_not_arrive_is_the_next_ones(port: Port, queue: Queue) -> None:
    write(port, queue, b"arrived, lost")
    watcher = port.attach()
    read(port, watcher)
    port.detach(watcher, 4)
    assert read(port, port.attach()) == b"lost"


def test_what_did_not_arrive_but_another_saw_is_not_replayed(port: Port, queue: Queue) -> None:
    first, second = port.attach(), port.attach()
    write(port, queue, b"data")
    assert read(port, first) == read(port, second) == b"data"
    port.detach(first, 4)
    port.detach(second, 0)
    assert port.output.seen == 4


def test_what_another_saw_in_part_is_replayed_from_there(port: Port, queue: Queue) -> None:
    first, second = port.attach(), port.attach()
    write(port, queue, b"123456")
    read(port, first)
    port.took(second, 2)
    port.detach(first, 6)
    assert port.output.seen == 2


def test_a_slower_readers_loss_replays_nothing(port: Port, queue: Queue) -> None:
    first, second = port.attach(), port.attach()
    write(port, queue, b"123456")
    read(port, first)
    port.took(second, 2)
    port.detach(second, 2)
    assert port.output.seen == 6


def test_no_more_than_everything_is_replayed(port: Port, queue: Queue) -> None:
    write(port, queue, b"data")
    watcher = port.attach()
    read(port, watcher)
    port.detach(watcher, 1000)
    assert read(port, port.attach()) == b"data"


def test_each_gap_is_counted_for_everyone_whether_met_yet_or_not(port: Port, queue: Queue) -> None:
    first, second = port.attach(), port.attach()
    port.stall()
    port.stall()
    write(port, queue, bytes(SIZE), bytes(10))
    assert port.missed == 20
    first.skip_lost()
    second.skip_lost()
    assert port.missed == 20
    port.detach(first, 0)
    assert port.missed == 20


def test_a_stuck_readers_gap_still_counts_when_it_has_left_without_meeting_it(
    port: Port, queue: Queue
) -> None:
    first, second = port.attach(), port.attach()
    port.stall()
    write(port, queue, bytes(SIZE))
    read(port, second)
    write(port, queue, bytes(10))
    assert port.missed == 10
    port.detach(first, 0)
    assert port.missed == 10


def test_the_last_readers_gap_is_the_next_ones_and_counts_once(port: Port, queue: Queue) -> None:
    first = port.attach()
    port.stall()
    write(port, queue, bytes(SIZE), bytes(10))
    port.detach(first, 0)
    second = port.attach()
    assert port.missed == 10
    assert second.skip_lost() == 10
    assert port.missed == 10


# Who is waited for


def fill(port: Port, queue: Queue) -> None:
    """Fill the journal and let the guest write a bit more."""
    write(port, queue, bytes(SIZE))
    write(port, queue, b"more")


def test_a_full_journal_holds_the_guest_for_a_reader(port: Port, queue: Queue) -> None:
    port.attach()
    fill(port, queue)
    assert port.holding
    assert len(queue.used) == 1


def test_what_is_held_goes_on_when_the_reader_does(port: Port, queue: Queue) -> None:
    watcher = port.attach()
    fill(port, queue)
    port.took(watcher, 3)
    assert port.take_output(queue, MANY) == 0
    assert port.holding
    port.took(watcher, 1)
    assert port.take_output(queue, MANY) == 1
    assert not port.holding
    assert read(port, watcher)[-4:] == b"more"
    assert watcher.missed == 0


def test_what_is_held_keeps_its_order(port: Port, queue: Queue) -> None:
    watcher = port.attach()
    fill(port, queue)
    queue.write(b"after")
    port.take_output(queue, MANY)
    got = read(port, watcher)
    port.take_output(queue, MANY)
    assert (got + read(port, watcher))[SIZE:] == b"moreafter"
    assert queue.used == [(0, 0), (1, 0), (2, 0)]


def test_a_stuck_reader_holds_nothing(port: Port, queue: Queue) -> None:
    watcher = port.attach()
    fill(port, queue)
    port.stall()
    assert (watcher.stuck, port.stalls) == (True, 1)
    assert port.take_output(queue, MANY) == 1
    for _ in range(5):
        assert write(port, queue, bytes(SIZE)) == 1
    assert watcher.skip_lost() == 4 * SIZE + SIZE + 4


def test_a_stuck_reader_that_takes_a_little_is_still_stuck(port: Port, queue: Queue) -> None:
    watcher = port.attach()
    fill(port, queue)
    port.stall()
    port.took(watcher, SIZE - 1)
    assert watcher.stuck


def test_a_stuck_reader_that_has_caught_up_is_waited_for_again(port: Port, queue: Queue) -> None:
    watcher = port.attach()
    fill(port, queue)
    port.stall()
    port.take_output(queue, MANY)
    read(port, watcher)
    assert not watcher.stuck
    fill(port, queue)
    assert port.holding


def test_only_the_oldest_reader_is_waited_for(port: Port, queue: Queue) -> None:
    first, _second = port.attach(), port.attach()
    for _ in range(5):
        assert write(port, queue, bytes(SIZE)) == 1
        read(port, first)
    assert not port.holding


def test_after_a_stuck_one_the_next_oldest_is_waited_for(port: Port, queue: Queue) -> None:
    first, second = port.attach(), port.attach()
    assert port.holder is first
    port.stall()
    assert port.holder is second
    fill(port, queue)
    assert port.holding
    read(port, second)
    assert port.take_output(queue, MANY) == 1


def test_after_one_that_left_the_next_oldest_is_waited_for(port: Port) -> None:
    first, second = port.attach(), port.attach()
    port.detach(first, 0)
    assert port.holder is second


def test_when_the_last_reader_leaves_the_guest_goes_on(port: Port, queue: Queue) -> None:
    watcher = port.attach()
    fill(port, queue)
    port.detach(watcher, 0)
    assert port.take_output(queue, MANY) == 1
    assert not port.holding


def test_nobody_can_be_stuck_where_nobody_is(port: Port) -> None:
    port.stall()
    assert port.stalls == 0


# Input


def feed(port: Port, data: bytes) -> None:
    room = port.input.room()
    assert len(data) <= len(room)
    room[: len(data)] = data
    port.input.fed(len(data))


def test_input_fills_the_guests_buffer(port: Port, queue: Queue) -> None:
    feed(port, b"typed")
    (room,) = queue.room(16)
    assert port.give_input(queue, MANY) == 1
    assert (queue.used, bytes(room)) == ([(0, 5)], b"typed" + bytes(11))
    assert len(port.input) == 0


def test_input_fills_scattered_buffers_exactly(port: Port, queue: Queue) -> None:
    feed(port, b"0123456789")
    rooms = [*queue.room(3, 1), *queue.room(0, 2, 0), *queue.room(100)]
    assert port.give_input(queue, MANY) == 3
    assert queue.used == [(0, 4), (1, 2), (2, 4)]
    assert b"".join(rooms)[:10] == b"0123456789"


def test_input_around_the_rings_end_is_whole(port: Port, queue: Queue) -> None:
    feed(port, bytes(SIZE - 3))
    port.input.consume(SIZE - 3)
    feed(port, b"012")
    feed(port, b"3456")
    (room,) = queue.room(7)
    port.give_input(queue, MANY)
    assert (queue.used, bytes(room)) == ([(0, 7)], b"0123456")


def test_input_waits_for_buffers(port: Port, queue: Queue) -> None:
    feed(port, b"waiting")
    queue.room(3)
    assert port.give_input(queue, MANY) == 1
    assert bytes(port.input.span()) == b"ting"


def test_without_input_no_buffer_is_taken(port: Port, queue: Queue) -> None:
    queue.room(16)
    assert port.give_input(queue, MANY) == 0
    assert len(queue.given) == 1


def test_zero_length_buffers_are_returned_and_take_nothing(port: Port, queue: Queue) -> None:
    feed(port, b"x")
    queue.room(0)
    queue.room()
    (room,) = queue.room(1)
    assert port.give_input(queue, MANY) == 3
    assert (queue.used, bytes(room)) == ([(0, 0), (1, 0), (2, 1)], b"x")


def test_no_more_is_given_than_the_budget(port: Port, queue: Queue) -> None:
    feed(port, b"abc")
    for _ in range(3):
        queue.room(1)
    assert port.give_input(queue, 2) == 2
    assert len(port.input) == 1


def test_input_before_a_mistake_counts(port: Port, queue: Queue) -> None:
    feed(port, b"abc")
    (room,) = queue.room(2)
    queue.mistake()
    with pytest.raises(GuestError):
        port.give_input(queue, MANY)
    assert (queue.used, bytes(room)) == ([(0, 2)], b"ab")
    assert bytes(port.input.span()) == b"c"


# A blocking port


@pytest.fixture
def pipe(port: Port) -> Port:
    """A generic port whose every byte counts."""
    port.console, port.blocking = False, True
    return port


def test_a_blocking_port_holds_for_a_stuck_reader(pipe: Port, queue: Queue) -> None:
    pipe.attach()
    queue.write(bytes(SIZE))
    queue.write(b"x")
    pipe.take_output(queue, MANY)
    pipe.stall()
    assert pipe.take_output(queue, MANY) == 0
    assert (pipe.holding, pipe.missed, pipe.stalls) == (True, 0, 1)


def test_a_blocking_port_goes_on_when_its_reader_does(pipe: Port, queue: Queue) -> None:
    reader = pipe.attach()
    queue.write(bytes(SIZE))
    queue.write(b"x")
    pipe.take_output(queue, MANY)
    pipe.took(reader, 1)
    assert pipe.take_output(queue, MANY) == 1
    assert not pipe.holding


def test_a_stuck_reader_is_counted_once(pipe: Port) -> None:
    pipe.attach()
    pipe.stall()
    pipe.stall()
    assert pipe.stalls == 1


def test_a_blocking_port_keeps_what_nobody_has_seen_until_somebody_comes(
    pipe: Port, queue: Queue
) -> None:
    queue.write(bytes(SIZE))
    queue.write(b"x")
    assert pipe.take_output(queue, MANY) == 1
    assert pipe.holding
    pipe.took(pipe.attach(), SIZE)
    assert pipe.take_output(queue, MANY) == 1


def test_a_blocking_console_does_not_wait_for_an_absent_reader(pipe: Port, queue: Queue) -> None:
    pipe.console = True
    queue.write(bytes(SIZE))
    queue.write(b"x")
    assert pipe.take_output(queue, MANY) == 2
    assert not pipe.holding


# The guest has moved


def test_what_moved_with_the_guest_is_forgotten_in_both_directions(
    port: Port, queue: Queue
) -> None:
    reader = port.attach()
    queue.write(b"output")
    port.take_output(queue, MANY)
    port.input.fed(5)
    port.forget()
    assert (reader.pending, port.output.seen, len(port.input), port.missed) == (0, 6, 0, 0)


# A guest that moved here


def test_output_nobody_has_seen_is_the_first_reader_s_here_too(port: Port) -> None:
    port.adopt_output(95, 100, b"moved")
    reader = port.attach()
    assert (reader.offset, bytes(reader.span())) == (95, b"moved")
    assert (port.output.tail, port.output.head) == (95, 100)


def test_a_reader_that_waits_goes_on_at_the_guest_s_offset(port: Port) -> None:
    reader = port.attach()
    port.adopt_output(95, 100, b"moved")
    assert bytes(reader.span()) == b"moved"


def test_what_was_lost_before_the_move_is_a_gap_here(port: Port) -> None:
    port.adopt_output(80, 100, b"moved")
    reader = port.attach()
    assert (reader.skip_lost(), bytes(reader.span())) == (15, b"moved")


def test_a_port_with_a_past_of_its_own_keeps_its_offsets(port: Port, queue: Queue) -> None:
    queue.write(b"past")
    port.take_output(queue, MANY)
    port.adopt_output(80, 100, b"moved")
    assert bytes(port.output.span(0)) == b"pastmoved"
    assert port.missed == 15


def test_input_that_moved_comes_before_what_was_typed_here(port: Port, queue: Queue) -> None:
    port.input.feed(b" here")
    port.adopt_input(1000, b"there")
    (room,) = queue.room(16)
    port.give_input(queue, MANY)
    assert bytes(room[:10]) == b"there here"


def test_input_goes_on_at_the_guest_s_offset(port: Port) -> None:
    port.adopt_input(SIZE - 3, b"around")
    assert (port.input.tail, port.input.head) == (SIZE - 3, SIZE + 3)
    assert port.input.copy() == b"around"


# The guest's last words


@pytest.fixture
def held(port: Port, queue: Queue) -> Port:
    """A port that holds 10 bytes in the ring for a reader that has a full journal before it."""
    port.attach()
    queue.write(bytes(SIZE))
    queue.write(b"last ")
    queue.write(b"words")
    port.take_output(queue, MANY)
    assert port.holding
    return port


def test_what_is_held_is_taken_when_the_guest_goes_and_the_oldest_give_way(
    held: Port, queue: Queue
) -> None:
    held.take_rest(queue)
    assert (held.output.copy(SIZE), queue.used[1:]) == (b"last words", [(1, 0), (2, 0)])
    assert held.watchers[0].skip_lost() == 10
    assert not held.holding


def test_a_blocking_port_counts_what_it_cannot_take(held: Port, queue: Queue) -> None:
    held.blocking = True
    held.take_rest(queue)
    assert (held.output.head, held.discarded, held.missed) == (SIZE, 10, 0)


def test_a_port_that_holds_nothing_takes_nothing_more(port: Port, queue: Queue) -> None:
    queue.write(b"not seen yet")
    port.take_rest(queue)
    assert port.output.head == 0


def test_what_was_held_in_a_ring_that_stopped_counts_if_the_guest_stays_away(
    held: Port, queue: Queue
) -> None:
    held.remember(queue)
    assert held.output.head == SIZE
    held.stay_away()
    assert held.output.copy(SIZE) == b"last words"
    assert held.discarded == 0


def test_what_was_held_in_a_ring_that_goes_on_is_its_own(held: Port, queue: Queue) -> None:
    held.remember(queue)
    held.come_back()
    held.stay_away()
    assert (held.output.head, held.discarded) == (SIZE, 0)


def test_a_blocking_port_counts_what_a_stopped_ring_held(held: Port, queue: Queue) -> None:
    held.blocking = True
    held.remember(queue)
    held.stay_away()
    assert (held.output.head, held.discarded) == (SIZE, 10)


def test_no_more_is_remembered_than_the_journal_holds(held: Port, queue: Queue) -> None:
    queue.write(b"x" * SIZE)
    held.remember(queue)
    held.stay_away()
    assert (held.output.head, held.discarded) == (2 * SIZE, 10)
    assert held.output.copy(SIZE) == b"x" * SIZE


# Two readers


def test_what_the_first_reader_left_and_the_others_came_too_late_for_is_counted(
    port: Port, queue: Queue
) -> None:
    queue.write(b"taken by nobody")
    port.take_output(queue, MANY)
    first = port.attach()
    port.attach()
    port.detach(first, 0)
    assert port.missed == 15


def test_what_another_reader_will_take_is_not_counted(port: Port, queue: Queue) -> None:
    first, _ = port.attach(), port.attach()
    queue.write(b"for both")
    port.take_output(queue, MANY)
    port.detach(first, 0)
    assert port.missed == 0


def test_at_a_blocking_port_the_second_reader_loses_nothing_to_the_first(
    pipe: Port, queue: Queue
) -> None:
    queue.write(b"taken by nobody")
    pipe.take_output(queue, MANY)
    first, second = pipe.attach(), pipe.attach()
    pipe.detach(first, 0)
    assert bytes(second.span()) == b"taken by nobody"


# A log


@dataclass
class Log:
    """A log that has written up to `offset` and has room for so much more."""

    port: Port
    offset: int = 0
    missed: int = 0
    begun: list[int] = field(default_factory=list)

    @property
    def limit(self) -> int:
        return self.offset + SIZE

    def begin_at(self, offset: int) -> None:
        assert self.port.output.head == 0
        self.begun.append(offset)

    def urge(self) -> bool:
        self.missed += max(0, self.port.output.tail - self.offset)
        self.offset = self.port.output.head
        return True


@pytest.fixture
def logged(port: Port) -> tuple[Port, Log]:
    log = Log(port)
    port.log = log
    return port, log


def test_no_more_is_taken_than_a_log_has_room_for(logged: tuple[Port, Log], queue: Queue) -> None:
    port, log = logged
    queue.write(b"a" * SIZE)
    queue.write(b"b")
    assert [port.take_output(queue, MANY), port.holding] == [1, True]
    log.urge()
    assert [port.take_output(queue, MANY), port.holding] == [1, False]


def test_a_reader_behind_the_log_is_still_waited_for(
    logged: tuple[Port, Log], queue: Queue
) -> None:
    port, log = logged
    port.attach()
    queue.write(b"a" * SIZE)
    queue.write(b"b")
    port.take_output(queue, MANY)
    log.urge()
    assert port.take_output(queue, MANY) == 0


def test_what_a_log_missed_is_missed(logged: tuple[Port, Log]) -> None:
    port, log = logged
    log.missed = 5
    assert port.missed == 5


def test_a_log_has_what_gives_way_for_last_words(logged: tuple[Port, Log], queue: Queue) -> None:
    port, log = logged
    for size in (SIZE, SIZE):
        queue.write(bytes(size))
        port.take_output(queue, MANY)
    port.take_rest(queue)
    log.urge()
    assert (port.output.head, log.missed) == (2 * SIZE, 0)
    queue.write(bytes(SIZE))
    port.attach()
    port.holding = True
    port.remember(queue)
    port.output.append(b"since")
    port.output.commit()
    port.stay_away()
    log.urge()
    assert (port.output.head, log.missed) == (3 * SIZE + 5, 0)


def test_a_log_hears_where_a_moved_guest_s_output_begins_before_it_does(
    logged: tuple[Port, Log],
) -> None:
    port, log = logged
    port.adopt_output(100, 110, b"0123456789")
    assert log.begun == [100]
    port.adopt_output(200, 210, b"0123456789")
    assert log.begun == [100]


# A successor


def again(port: Port, spare: memoryview | None = None) -> Port:
    """Return the port as a successor has it."""
    made = Port(0, "port0", port.output, port.input, console=True, spare=spare)
    made.under_way = port.under_way
    made.left = port.left
    return made


@pytest.mark.parametrize("before", [0, 100, SIZE - 100])
def test_last_words_are_a_successor_s_too(port: Port, queue: Queue, before: int) -> None:
    spare = memoryview(bytearray(SIZE))
    port = again(port, spare)
    queue.write(b"x" * before)
    for _ in range(3):
        queue.write(bytes(range(200)))
    port.holding = True
    port.remember(queue)
    successor = again(port, spare)
    successor.stay_away()
    words = b"x" * before + 3 * bytes(range(200))
    assert successor.output.copy(0) == words[-SIZE:]
    assert successor.discarded == max(0, len(words) - SIZE)
    assert successor.left == 0


def test_words_remembered_again_after_a_death_are_there_once(port: Port, queue: Queue) -> None:
    spare = memoryview(bytearray(SIZE))
    queue.write(b"last words")
    for _ in range(2):  # the second time in the place of the first
        dead = again(port, spare)
        queue.given.extendleft([*queue.popped])
        queue.popped.clear()
        dead.holding = True
        dead.remember(queue)
    dead.stay_away()
    assert dead.output.copy(0) == b"last words"


def test_readers_go_on_in_their_order_where_they_were(port: Port, queue: Queue) -> None:
    queue.write(b"0123456789")
    port.take_output(queue, MANY)
    successor = again(port)
    first, second = successor.go_on(7, 0), successor.go_on(9, 4)
    successor.resumed()
    assert [bytes(reader.span()) for reader in (first, second)] == [b"789", b"9"]
    assert successor.holder is first
    assert successor.output.seen == 9


def test_no_reader_goes_on_behind_what_counts(port: Port) -> None:
    places: list[int] = []
    reader = port.go_on(7, 0)
    reader.jumped = lambda: places.append(reader.offset)
    port.resumed()
    assert (reader.offset, places, port.output.seen) == (0, [0], 0)


def test_a_gap_from_before_is_not_counted_again(port: Port, queue: Queue) -> None:
    for _ in range(3):
        queue.write(bytes(SIZE))
        port.take_output(queue, MANY)
    successor = again(port)
    reader = successor.go_on(5, 0)
    successor.resumed()
    assert successor.missed == 0
    assert reader.skip_lost() == 2 * SIZE - 5
    assert successor.missed == 0


def test_a_reader_that_is_put_elsewhere_tells(port: Port) -> None:
    reader = port.attach()
    places: list[int] = []
    reader.jumped = lambda: places.append(reader.offset)
    port.adopt_output(100, 110, b"0123456789")
    port.forget()
    assert places == [100, 110]
