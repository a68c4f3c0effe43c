"""The vhost-user socket, over real socket pairs."""

from __future__ import annotations

import array
import gc
import os
import resource
import socket
import struct
from collections.abc import Callable, Iterator, Sequence

import pytest
from vhost_device_console.channel import Channel, Message
from vhost_device_console.errors import FrontendError
from vhost_device_console.worker.vhost_user.message import Request, encode

FEATURES = encode(Request.GET_FEATURES)
SET = encode(Request.SET_FEATURES, b"12345678", need_reply=True)
TABLE = encode(Request.SET_MEM_TABLE, bytes(8))


class Frontend:
    """Both ends: `channel` is the backend's."""

    def __init__(self) -> None:
        self.sock, theirs = socket.socketpair()
        self.channel = Channel(theirs)
        self.ends: list[int] = []

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        assert self.sock.sendmsg([data], ancillary) == len(data)

    def fds(self, count: int) -> list[int]:
        """Return write ends of so many pipes; `closed` tells of their receivers."""
        writes = []
        for _ in range(count):
            read, write = os.pipe2(os.O_NONBLOCK)
            self.ends.append(read)
            writes.append(write)
        return writes

    def closed(self) -> bool:
        """Whether nobody has what `fds` returned any more."""
        try:
            return all(os.read(end, 1) == b"" for end in self.ends)
        except BlockingIOError:
            return False

    def give(self, data: bytes, count: int) -> None:
        """Send `data` with so many fds of which no copy is left here."""
        fds = self.fds(count)
        self.send(data, fds)
        for fd in fds:
            os.close(fd)

    def receive(self) -> Message:
        message = self.channel.receive()
        assert message is not None
        return message

    def close(self) -> None:
        self.sock.close()
        self.channel.close()
        while self.ends:
            os.close(self.ends.pop())


@pytest.fixture
def frontend() -> Iterator[Frontend]:
    made = Frontend()
    yield made
    made.close()


# Whole messages


def test_nothing_is_there_at_first(frontend: Frontend) -> None:
    assert frontend.channel.receive() is None
    assert not frontend.channel.closed
    assert not frontend.channel.partial


def test_a_message_is_its_header_and_payload(frontend: Frontend) -> None:
    frontend.send(SET)
    message = frontend.receive()
    assert message.header == (Request.SET_FEATURES, 8, False, True)
    assert (message.payload, message.fds, message.stray_fds) == (b"12345678", [], False)


def test_a_message_is_assembled_byte_by_byte(frontend: Frontend) -> None:
    for at in range(len(SET)):
        assert frontend.channel.receive() is None
        assert frontend.channel.partial == (at > 0)
        frontend.send(SET[at : at + 1])
    assert frontend.receive().payload == b"12345678"
    assert not frontend.channel.partial


@pytest.mark.parametrize("cut", range(1, len(SET)))
def test_a_message_cut_anywhere_is_assembled(frontend: Frontend, cut: int) -> None:
    frontend.send(SET[:cut])
    assert frontend.channel.receive() is None
    frontend.send(SET[cut:] + FEATURES)
    assert frontend.receive().payload == b"12345678"
    assert frontend.receive().header.request == Request.GET_FEATURES


def test_two_messages_in_one_send_are_two(frontend: Frontend) -> None:
    frontend.send(SET + FEATURES + SET)
    requests = [frontend.receive().header.request for _ in range(3)]
    assert requests == [Request.SET_FEATURES, Request.GET_FEATURES, Request.SET_FEATURES]
    assert frontend.channel.receive() is None


def test_the_largest_payload_comes_whole(frontend: Frontend) -> None:
    payload = os.urandom(4096)
    frontend.send(encode(99, payload))
    assert frontend.receive().payload == payload


@pytest.mark.parametrize("size", [4097, 0xFFFF_FFFF])
def test_a_larger_payload_is_an_error_before_it_is_read(frontend: Frontend, size: int) -> None:
    frontend.send(struct.pack("=III", 2, 1, size) + b"payload")
    with pytest.raises(FrontendError, match=f"{size} bytes"):
        frontend.channel.receive()


@pytest.mark.parametrize("version", [0, 2, 3])
def test_another_version_is_an_error(frontend: Frontend, version: int) -> None:
    frontend.send(struct.pack("=III", 1, version, 0))
    with pytest.raises(FrontendError, match="version"):
        frontend.channel.receive()


# The end


@pytest.mark.parametrize("sent", [b"", SET[:1], SET[:11], SET[:12], SET[:19]])
def test_a_frontend_that_hangs_up_anywhere_is_gone(frontend: Frontend, sent: bytes) -> None:
    frontend.send(sent)
    frontend.sock.close()
    assert frontend.channel.receive() is None
    assert frontend.channel.closed


def test_what_was_sent_before_a_hangup_is_received(frontend: Frontend) -> None:
    frontend.send(SET)
    frontend.sock.close()
    assert frontend.receive().payload == b"12345678"
    assert frontend.channel.receive() is None
    assert frontend.channel.closed


def test_a_reset_connection_is_one_that_is_gone(frontend: Frontend) -> None:
    frontend.channel.send(FEATURES)  # unread bytes turn the close into a reset
    frontend.sock.close()
    assert frontend.channel.receive() is None
    assert frontend.channel.closed


# File descriptors


def test_fds_come_with_the_first_bytes_of_their_message(frontend: Frontend) -> None:
    frontend.send(SET)
    frontend.give(TABLE, 2)
    frontend.send(FEATURES)
    counts = []
    for _ in range(3):
        message = frontend.receive()
        counts.append((message.header.request, len(message.fds), message.stray_fds))
        message.close_fds()
    assert counts == [(2, 0, False), (5, 2, False), (1, 0, False)]


def test_fds_of_two_messages_in_two_sends_are_not_mixed(frontend: Frontend) -> None:
    frontend.give(TABLE, 1)
    frontend.give(TABLE, 3)
    counts = []
    for _ in range(2):
        message = frontend.receive()
        counts.append(len(message.fds))
        message.close_fds()
    assert counts == [1, 3]


def test_fds_of_a_message_sent_in_pieces_stay_with_it(frontend: Frontend) -> None:
    frontend.give(TABLE[:4], 1)
    assert frontend.channel.receive() is None
    frontend.send(TABLE[4:])
    message = frontend.receive()
    assert (len(message.fds), message.stray_fds) == (1, False)
    message.close_fds()


@pytest.mark.parametrize("cut", [1, 11, 12, 13, len(TABLE) - 1])
def test_fds_later_in_a_message_are_flagged(frontend: Frontend, cut: int) -> None:
    frontend.send(TABLE[:cut])
    assert frontend.channel.receive() is None
    frontend.give(TABLE[cut:], 1)
    message = frontend.receive()
    assert (len(message.fds), message.stray_fds) == (1, True)
    message.close_fds()
    assert frontend.closed()


def test_the_flag_is_not_the_next_messages(frontend: Frontend) -> None:
    frontend.send(TABLE[:12])
    frontend.channel.receive()
    frontend.give(TABLE[12:], 1)
    frontend.receive().close_fds()
    frontend.send(FEATURES)
    assert not frontend.receive().stray_fds


def test_as_many_fds_as_the_system_moves_all_come(frontend: Frontend) -> None:
    (fd,) = frontend.fds(1)
    frontend.send(FEATURES, [fd] * 253)
    os.close(fd)
    message = frontend.receive()
    assert len(message.fds) == 253
    message.close_fds()
    assert frontend.closed()


def test_received_fds_are_closed_on_exec(frontend: Frontend) -> None:
    frontend.give(TABLE, 1)
    message = frontend.receive()
    assert not os.get_inheritable(message.fds[0])
    message.close_fds()


def test_fds_taken_out_of_a_message_are_the_takers(frontend: Frontend) -> None:
    frontend.give(TABLE, 1)
    message = frontend.receive()
    fd = message.fds.pop()
    message.close_fds()
    assert not frontend.closed()
    os.close(fd)
    assert frontend.closed()


@pytest.mark.parametrize("sent", [TABLE[:5], TABLE[:12], TABLE[:15]])
def test_closing_closes_the_fds_of_an_unfinished_message(frontend: Frontend, sent: bytes) -> None:
    frontend.give(sent, 2)
    frontend.channel.receive()
    assert not frontend.closed()
    frontend.channel.close()
    assert frontend.closed()


def test_closing_twice_is_closing_once(frontend: Frontend) -> None:
    frontend.channel.close()
    frontend.channel.close()
    assert frontend.channel.closed


@pytest.mark.parametrize("room", [0, 1])
def test_fds_the_process_has_no_room_for_are_an_error(frontend: Frontend, room: int) -> None:
    gc.collect()
    frontend.give(TABLE, 3)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + room, hard))
    try:
        with pytest.raises(FrontendError, match="no room"):
            frontend.channel.receive()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    frontend.channel.close()
    assert frontend.closed()


# Replies


def test_a_reply_is_sent(frontend: Frontend) -> None:
    frontend.channel.send(SET)
    assert frontend.sock.recv(4096) == SET


def test_a_reply_may_carry_a_fd_that_stays_the_callers(frontend: Frontend) -> None:
    read, write = os.pipe()
    try:
        frontend.channel.send(b"reply", read)
        data, (fd,), _, _ = socket.recv_fds(frontend.sock, 100, 2)
        try:
            os.write(write, b"x")
            assert (data, os.read(fd, 1)) == (b"reply", b"x")
            os.fstat(read)
        finally:
            os.close(fd)
    finally:
        os.close(read)
        os.close(write)


def test_a_frontend_that_reads_no_replies_is_an_error(frontend: Frontend) -> None:
    def answer_on_and_on() -> None:
        for _ in range(1 << 20):
            frontend.channel.send(encode(Request.GET_CONFIG, bytes(268), reply=True))

    with pytest.raises(FrontendError, match="does not read"):
        answer_on_and_on()


def test_a_reply_that_does_not_fit_whole_is_an_error(frontend: Frontend) -> None:
    with pytest.raises(FrontendError, match="does not read"):
        frontend.channel.send(bytes(1 << 24))


def test_a_reply_to_nobody_is_the_end(frontend: Frontend) -> None:
    frontend.sock.close()
    frontend.channel.send(FEATURES)
    assert frontend.channel.closed


@pytest.mark.parametrize("do", [Channel.receive, lambda channel: channel.send(FEATURES)])
def test_a_socket_that_the_system_refuses_to_use_is_an_error(
    do: Callable[[Channel], object],
) -> None:
    """As sending a descriptor is when the user has too many of them under way."""
    channel = Channel(socket.socket(socket.AF_UNIX))  # connected to nobody
    try:
        with pytest.raises(FrontendError, match="cannot be"):
            do(channel)
    finally:
        channel.close()


def test_the_peer_is_the_process_that_connected(frontend: Frontend) -> None:
    assert frontend.channel.peer() == os.getpid()
