"""What a worker has committed, in one memory file."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator

import pytest
from vhost_device_console import ledger
from vhost_device_console.ledger import MOST_PUSHES, Ledger, Page, Pending


@pytest.fixture
def fd() -> Iterator[int]:
    made = ledger.create("test")
    yield made
    os.close(made)


def test_its_file_cannot_change_size(fd: int) -> None:
    seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    assert seals == fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def test_its_file_is_closed_on_exec(fd: int) -> None:
    assert not os.get_inheritable(fd)


def test_it_takes_memory_only_for_what_is_used(fd: int) -> None:
    Ledger(fd).page(255).word[0] = 1
    assert os.fstat(fd).st_blocks * 512 == 4096


@pytest.mark.parametrize("size", [0, 4096, 1 << 24])
def test_another_file_is_refused(size: int) -> None:
    other = os.memfd_create("other")
    try:
        os.ftruncate(other, size)
        with pytest.raises(ValueError, match=r"not a ledger|empty file"):
            Ledger(other)
    finally:
        os.close(other)


def test_queues_and_ports_have_memory_of_their_own(fd: int) -> None:
    """Every queue's page and every port's records, filled to their ends, keep what they have."""
    book = Ledger(fd)
    for queue in range(256):
        page = book.page(queue)
        page.word[0] = queue
        page.heads[MOST_PUSHES - 1] = page.lengths[MOST_PUSHES - 1] = queue
    for port in range(128):
        records = book.records(port)
        assert len(records) == 32768
        records[0] = records[-1] = port
    for queue in range(256):
        page = book.page(queue)
        assert (page.word[0], page.heads[-1], page.lengths[-1]) == (queue, queue, queue)
    for port in range(128):
        assert (book.records(port)[0], book.records(port)[-1]) == (port, port)


@pytest.mark.parametrize("index", [-1, 256])
def test_no_other_queue_has_a_page(fd: int, index: int) -> None:
    with pytest.raises(IndexError, match=f"queue {index}"):
        Ledger(fd).page(index)


@pytest.mark.parametrize("index", [-1, 128])
def test_no_other_port_has_records(fd: int, index: int) -> None:
    with pytest.raises(IndexError, match=f"port {index}"):
        Ledger(fd).records(index)


def test_a_successor_finds_what_was_committed() -> None:
    made = ledger.create("test")
    page = Ledger(made).page(5)
    page.heads[0], page.lengths[0] = 7 | 2 << 16, 100
    page.heads[1], page.lengths[1] = 3 | 1 << 16, 0
    page.word[0] = 0x89ABCDEF << 32 | 0x8004 << 16 | 2
    book = Ledger(made)
    os.close(made)
    assert book.page(5).pending() == Pending(0x8004, 2, [(7 | 2 << 16, 100), (3 | 1 << 16, 0)])


@pytest.mark.parametrize(
    ("kept", "near", "offset"),
    [
        (5, 5, 5),
        (5, 9, 5),
        (0xFFFF_FFFF, 1 << 32, 0xFFFF_FFFF),
        (3, (7 << 32) + 3, (7 << 32) + 3),
        (0xFFFF_FFF0, (7 << 32) + 3, (7 << 32) - 16),
    ],
)
def test_an_offset_is_the_last_one_with_those_bits(kept: int, near: int, offset: int) -> None:
    page = Page()
    page.word[0] = kept << 32
    assert page.offset(near) == offset
