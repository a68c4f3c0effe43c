"""What stream clients have in common, over unix sockets."""

from __future__ import annotations

import errno
import mmap
import os
import socket
from collections.abc import Iterator
from typing import NoReturn

import pytest
from vhost_device_console.errors import FrontendError
from vhost_device_console.worker.backends.stream import StreamClient, adopt


@pytest.fixture
def pair() -> Iterator[tuple[StreamClient, socket.socket]]:
    ours, theirs = socket.socketpair()
    client = StreamClient(ours, "test")
    with theirs:
        yield client, theirs
    client.close()


Pair = tuple[StreamClient, socket.socket]


# Clients


def test_what_is_typed_is_read(pair: Pair) -> None:
    client, user = pair
    user.send(b"typed")
    room = bytearray(16)
    assert client.read([memoryview(room)]) == 5
    assert room[:5] == b"typed"


def test_no_more_is_read_than_there_is_room_for(pair: Pair) -> None:
    client, user = pair
    user.send(b"typed")
    room = bytearray(3)
    assert [client.read([memoryview(room)]), client.read([memoryview(room)])] == [3, 2]


def test_nothing_typed_is_nothing_for_now(pair: Pair) -> None:
    assert pair[0].read([memoryview(bytearray(16))]) is None


def test_the_end_of_input_is_no_bytes(pair: Pair) -> None:
    client, user = pair
    user.send(b"last")
    user.shutdown(socket.SHUT_WR)
    room = memoryview(bytearray(16))
    assert [client.read([room]), client.read([room]), client.read([room])] == [4, 0, 0]


def test_after_the_end_of_input_output_still_arrives(pair: Pair) -> None:
    client, user = pair
    user.shutdown(socket.SHUT_WR)
    assert client.read([memoryview(bytearray(16))]) == 0
    assert client.write(b"answer") == 6
    assert user.recv(16) == b"answer"


@pytest.mark.parametrize(
    "error", [errno.ECONNRESET, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH]
)
def test_a_connection_that_died_of_anything_is_a_client_that_is_gone(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    def readv(*_: object) -> NoReturn:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "readv", readv)
    with pytest.raises(ConnectionError):
        pair[0].read([memoryview(bytearray(16))])


def test_what_is_typed_fills_several_spans_in_turn(pair: Pair) -> None:
    client, user = pair
    user.send(b"typed")
    spans = [memoryview(bytearray(size)) for size in (2, 1, 4)]
    assert client.read(spans) == 5
    assert [bytes(span) for span in spans] == [b"ty", b"p", b"ed\0\0"]


def test_memory_that_was_cut_off_is_the_frontends_fault_and_costs_no_bytes(pair: Pair) -> None:
    client, user = pair
    user.send(b"typed")
    fd = os.memfd_create("memory")
    os.ftruncate(fd, mmap.PAGESIZE)
    memory = mmap.mmap(fd, mmap.PAGESIZE)
    os.ftruncate(fd, 0)
    os.close(fd)
    with pytest.raises(FrontendError, match="memory is gone"):
        client.read([memoryview(memory)])
    room = bytearray(16)
    assert client.read([memoryview(room)]) == 5


def test_writing_to_who_has_gone_is_a_connection_error(pair: Pair) -> None:
    client, user = pair
    user.close()
    with pytest.raises(ConnectionError):
        client.write(b"anybody?")


def test_what_fits_is_written_and_then_nothing(pair: Pair) -> None:
    client, user = pair
    written = 0
    while count := client.write(bytes(100_000)):
        written += count
    assert client.write(b"x") == 0
    assert 0 < len(user.recv(1 << 24, socket.MSG_WAITALL | socket.MSG_DONTWAIT)) <= written


def test_the_two_halves_are_two_descriptors_of_one_socket(pair: Pair) -> None:
    client, _ = pair
    assert client.reads != client.writes
    assert os.fstat(client.reads).st_ino == os.fstat(client.writes).st_ino


def test_a_closed_client_hangs_up(pair: Pair) -> None:
    client, user = pair
    client.close()
    client.close()
    assert user.recv(16) == b""


def test_a_unix_socket_cannot_tell_what_did_not_arrive(pair: Pair) -> None:
    client, _ = pair
    client.write(b"unread")
    assert client.end_output() == 0


def test_what_is_on_its_way_becomes_less_as_the_user_reads(pair: Pair) -> None:
    client, user = pair
    assert client.on_its_way() == 0
    client.write(b"one")
    client.write(b"two")
    before = client.on_its_way()
    assert before > 0
    user.recv(3)
    assert 0 < client.on_its_way() < before


def test_what_was_typed_and_not_read_would_be_lost(pair: Pair) -> None:
    client, user = pair
    user.send(b"typed")
    client.read([memoryview(bytearray(2))])
    user.close()
    assert client.unread() == 3


def test_who_is_let_go_hears_of_it_though_another_has_the_descriptor(pair: Pair) -> None:
    client, user = pair
    with socket.socket(fileno=os.dup(client.reads)):
        client.close()
        assert user.recv(16) == b""


def test_what_was_written_arrives_though_input_was_never_read(pair: Pair) -> None:
    client, user = pair
    user.send(b"typed")
    client.write(b"written")
    client.close()
    assert (user.recv(16), user.recv(16)) == (b"written", b"")


def test_a_unix_socket_has_no_totals(pair: Pair) -> None:
    assert (pair[0].total_written(), pair[0].total_read()) == (None, None)


# Taking over connections


def test_a_connection_is_owned() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        client = adopt(ours.detach(), lambda sock: StreamClient(sock, "test"))
        client.write(b"welcome")
        assert theirs.recv(16) == b"welcome"
        client.close()
        assert theirs.recv(16) == b""


def test_a_connection_that_cannot_be_set_up_is_ended_though_another_has_it() -> None:
    ours, theirs = socket.socketpair()

    def gone(_: socket.socket) -> StreamClient:
        raise OSError(errno.ENOTCONN, "not connected")

    with ours, theirs:
        with pytest.raises(OSError, match="not connected"):
            adopt(os.dup(ours.fileno()), gone)
        assert theirs.recv(16) == b""
