"""Rings with absolute offsets over one memory file."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator

import pytest
from vhost_device_console import journal
from vhost_device_console.journal import Journal, Output, Reader

SIZE = 4096

Create = Callable[..., int]


@pytest.fixture
def create() -> Iterator[Create]:
    """Give journal.create with descriptors that are closed after the test."""
    made: list[int] = []

    def make(output_bytes: int = SIZE, input_bytes: int = SIZE) -> int:
        made.append(journal.create("test", output_bytes, input_bytes))
        return made[-1]

    yield make
    for fd in made:
        os.close(fd)


def write(output: Output, data: bytes) -> None:
    output.append(data)
    output.commit()


def take(reader: Reader) -> bytes:
    """Return everything the reader can have."""
    reader.skip_lost()
    taken = b""
    while span := bytes(reader.span()):
        taken += span
        reader.advance(len(span))
    return taken


# The file


@pytest.mark.parametrize("size", [0, 1, 2048, 4095, 5000, 12288])
@pytest.mark.parametrize("place", [0, 1])
def test_a_ring_is_a_power_of_two_of_at_least_a_page(size: int, place: int) -> None:
    sizes = [SIZE, SIZE]
    sizes[place] = size
    with pytest.raises(ValueError, match=f"a ring of {size} bytes"):
        journal.create("test", *sizes)


def test_its_file_cannot_change_size(create: Create) -> None:
    seals = fcntl.fcntl(create(), fcntl.F_GET_SEALS)
    assert seals == fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def test_its_file_is_closed_on_exec(create: Create) -> None:
    assert not os.get_inheritable(create())


def test_it_takes_memory_only_for_what_is_used(create: Create) -> None:
    status = os.fstat(create(1 << 30, 1 << 20))
    assert status.st_size > 1 << 30
    assert status.st_blocks * 512 <= 1 << 16


def test_a_mapping_does_not_need_the_descriptor() -> None:
    fd = journal.create("test", SIZE, SIZE)
    mapped = Journal(fd)
    os.close(fd)
    write(mapped.output, b"still here")
    assert bytes(mapped.output.span(0)) == b"still here"


@pytest.mark.parametrize("content", [b"\0" * 4096, b"x" * 100])
def test_another_file_is_refused(content: bytes) -> None:
    fd = os.memfd_create("other")
    try:
        os.write(fd, content)
        with pytest.raises(ValueError, match="not a journal"):
            Journal(fd)
    finally:
        os.close(fd)


def test_output_and_input_do_not_share_bytes(create: Create) -> None:
    mapped = Journal(create(SIZE, 2 * SIZE))
    write(mapped.output, b"o" * SIZE)
    room = mapped.input.room()
    room[:] = b"i" * 2 * SIZE
    mapped.input.fed(2 * SIZE)
    assert bytes(mapped.output.span(0)) == b"o" * SIZE
    assert bytes(mapped.input.span()) == b"i" * 2 * SIZE


# Output


def test_what_is_written_is_read_in_order(create: Create) -> None:
    output = Journal(create()).output
    reader = Reader(output, 0)
    write(output, b"one ")
    write(output, b"two")
    assert take(reader) == b"one two"


def test_offsets_never_go_back(create: Create) -> None:
    output = Journal(create()).output
    for _ in range(10):
        write(output, b"x" * 1000)
    assert (output.head, output.tail) == (10000, 10000 - SIZE)


def test_bytes_at_the_end_of_the_ring_go_on_at_its_start(create: Create) -> None:
    output = Journal(create()).output
    write(output, b"a" * (SIZE - 3))
    write(output, b"bcdefg")
    assert take(Reader(output, SIZE - 3)) == b"bcdefg"


def test_a_whole_ring_can_be_written_at_once_anywhere(create: Create) -> None:
    output = Journal(create()).output
    write(output, b"x" * 100)
    data = bytes(range(256)) * 16
    write(output, data)
    assert take(Reader(output, 100)) == data


def test_a_memoryview_is_appended_as_it_is(create: Create) -> None:
    output = Journal(create()).output
    output.append(memoryview(b"..guest..")[2:7])
    output.commit()
    assert take(Reader(output, 0)) == b"guest"


def test_a_successor_finds_what_was_committed(create: Create) -> None:
    fd = create()
    write(Journal(fd).output, b"before the fall")
    successor = Journal(fd).output
    assert (successor.head, take(Reader(successor, 0))) == (15, b"before the fall")


def test_a_successor_does_not_see_what_was_not_committed(create: Create) -> None:
    fd = create()
    first = Journal(fd).output
    write(first, b"sure")
    first.append(b"not yet")
    assert Journal(fd).output.head == 4


def test_a_successor_writes_on_after_several_turns(create: Create) -> None:
    fd = create()
    first = Journal(fd).output
    for _ in range(5):
        write(first, b"x" * 3000)
    second = Journal(fd).output
    write(second, b"on we go")
    assert take(Reader(second, 15000)) == b"on we go"


def test_where_the_absent_go_on_is_kept_for_a_successor(create: Create) -> None:
    fd = create()
    Journal(fd).output.seen = 1 << 40
    assert Journal(fd).output.seen == 1 << 40


# Readers


def test_readers_do_not_disturb_one_another(create: Create) -> None:
    output = Journal(create()).output
    first, second = Reader(output, 0), Reader(output, 0)
    write(output, b"for all")
    assert take(first) == b"for all"
    assert take(second) == b"for all"


def test_a_reader_that_caught_up_has_nothing(create: Create) -> None:
    output = Journal(create()).output
    reader = Reader(output, 0)
    write(output, b"x" * SIZE)
    take(reader)
    assert (len(reader.span()), reader.pending, reader.skip_lost()) == (0, 0, 0)


def test_a_reader_may_take_a_part(create: Create) -> None:
    output = Journal(create()).output
    reader = Reader(output, 0)
    write(output, b"abcdef")
    reader.advance(2)
    assert (bytes(reader.span()), reader.pending) == (b"cdef", 4)


def test_a_slow_reader_finds_a_counted_gap_and_then_the_oldest_bytes(create: Create) -> None:
    output = Journal(create()).output
    reader = Reader(output, 0)
    for number in range(5):
        write(output, bytes([number]) * 1024)
    assert reader.skip_lost() == 1024
    assert (reader.missed, reader.offset) == (1024, 1024)
    assert take(reader) == b"".join(bytes([number]) * 1024 for number in range(1, 5))


def test_gaps_add_up(create: Create) -> None:
    output = Journal(create()).output
    reader = Reader(output, 0)
    for _ in range(2):
        write(output, b"x" * SIZE)
        write(output, b"x" * 10)
        take(reader)
    assert reader.missed == 20


def test_a_reader_exactly_one_ring_behind_lost_nothing(create: Create) -> None:
    output = Journal(create()).output
    reader = Reader(output, 0)
    write(output, b"x" * SIZE)
    assert reader.skip_lost() == 0
    assert len(take(reader)) == SIZE


# Input


def test_what_is_fed_is_what_the_guest_gets(create: Create) -> None:
    held = Journal(create()).input
    held.room()[:5] = b"typed"
    held.fed(5)
    assert (len(held), bytes(held.span())) == (5, b"typed")


def test_a_full_input_has_no_room(create: Create) -> None:
    held = Journal(create()).input
    held.fed(len(held.room()))
    assert (len(held), len(held.room())) == (SIZE, 0)


def test_an_empty_input_has_nothing_and_all_the_room(create: Create) -> None:
    held = Journal(create()).input
    assert (len(held), len(held.span()), len(held.room())) == (0, 0, SIZE)


def test_room_never_covers_what_waits(create: Create) -> None:
    held = Journal(create()).input
    held.fed(3000)
    held.consume(2000)
    assert len(held.room()) == SIZE - 3000
    held.fed(SIZE - 3000)
    assert len(held.room()) == 2000


def test_input_comes_in_order_around_the_end(create: Create) -> None:
    held = Journal(create()).input
    sent = received = b""
    for number in range(40):
        room = held.room()
        count = min(700, len(room))
        room[:count] = bytes([number]) * count
        held.fed(count)
        sent += bytes([number]) * count
        piece = bytes(held.span())[:500]
        held.consume(len(piece))
        received += piece
    while piece := bytes(held.span()):
        held.consume(len(piece))
        received += piece
    assert received == sent


def test_a_successor_gives_the_guest_what_the_dead_did_not(create: Create) -> None:
    fd = create()
    first = Journal(fd).input
    first.room()[:10] = b"0123456789"
    first.fed(10)
    first.consume(4)
    assert bytes(Journal(fd).input.span()) == b"456789"


def test_what_goes_past_the_ring_moves_both_ends(create: Create) -> None:
    held = Journal(create()).input
    held.feed(b"abc")
    held.consume(3)
    held.bypass(100)
    assert (held.tail, held.head) == (103, 103)
    held.feed(b"d")
    assert bytes(held.span()) == b"d"


def test_a_successor_does_not_wait_for_what_went_past_the_ring(create: Create) -> None:
    fd = create()
    Journal(fd).input.bypass(100)
    assert (Journal(fd).input.tail, len(Journal(fd).input)) == (100, 0)


# Going back


def test_output_goes_on_where_it_went_back_to(create: Create) -> None:
    fd = create()
    first = Journal(fd).output
    write(first, b"kept, not kept")
    second = Journal(fd).output
    second.go_back(4)
    write(second, b" again")
    assert take(Reader(Journal(fd).output, 0)) == b"kept again"


@pytest.mark.parametrize("committed", [True, False])
def test_what_was_overwritten_for_nothing_is_a_gap(create: Create, committed: bool) -> None:
    """Bytes that gave way to some that never counted are not shown to who lags behind."""
    fd = create()
    first = Journal(fd).output
    write(first, b"a" * SIZE)
    first.append(b"b" * 100)
    if committed:
        first.commit()
    second = Journal(fd).output
    second.go_back(SIZE)
    reader = Reader(second, 0)
    assert (reader.skip_lost(), take(reader)) == (100, b"a" * (SIZE - 100))


def test_a_gap_remains_through_another_death(create: Create) -> None:
    fd = create()
    first = Journal(fd).output
    write(first, b"a" * SIZE)
    first.append(b"b" * 100)
    second = Journal(fd).output
    second.go_back(SIZE)
    write(second, b"c")
    third = Journal(fd).output
    third.go_back(SIZE + 1)
    assert take(Reader(third, 100)) == b"a" * (SIZE - 100) + b"c"
    assert third.tail == 100


def test_output_that_was_all_overwritten_for_nothing_is_all_a_gap(create: Create) -> None:
    fd = create()
    first = Journal(fd).output
    write(first, b"a" * 100)
    for _ in range(3):
        first.append(b"b" * SIZE)
    second = Journal(fd).output
    second.go_back(100)
    assert second.tail == 100
    write(second, b"on we go")
    third = Journal(fd).output
    third.go_back(108)
    assert (third.tail, take(Reader(third, 100))) == (100, b"on we go")


def test_input_that_was_consumed_can_wait_again(create: Create) -> None:
    fd = create()
    first = Journal(fd).input
    first.feed(b"0123456789")
    first.consume(8)
    second = Journal(fd).input
    second.go_back(4)
    assert (bytes(second.span()), len(second.room())) == (b"456789", SIZE - 10)
    assert bytes(Journal(fd).input.span()) == b"456789"


def test_what_went_past_the_ring_does_not_wait_after_going_back(create: Create) -> None:
    """Such bytes never were in the ring: they can be had again from where they came only."""
    fd = create()
    first = Journal(fd).input
    first.feed(b"0123")
    first.consume(4)
    first.bypass(100)
    second = Journal(fd).input
    second.go_back(4)
    assert (second.tail, len(second)) == (4, 0)
    second.feed(b"next")
    assert bytes(second.span()) == b"next"


# Room beside


def test_there_is_spare_room_as_large_as_the_output(create: Create) -> None:
    fd = create(4 * SIZE, SIZE)
    first = Journal(fd)
    assert len(first.spare) == 4 * SIZE
    write(first.output, b"o" * 4 * SIZE)
    first.input.feed(b"i" * SIZE)
    first.spare[:] = b"s" * 4 * SIZE
    second = Journal(fd)
    assert bytes(second.spare) == b"s" * 4 * SIZE
    assert bytes(second.output.span(0)) == b"o" * 4 * SIZE
    assert bytes(second.input.span()) == b"i" * SIZE
