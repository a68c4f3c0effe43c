"""TCP clients, over the loopback."""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Callable, Iterator

import pytest
from vhost_device_console.worker.backends import tcp
from vhost_device_console.worker.backends.stream import StreamClient
from vhost_device_console.worker.backends.tcp import TcpClient

Wait = Callable[..., int]
RESET = struct.pack("ii", 1, 0)


@pytest.fixture
def both() -> Iterator[tuple[TcpClient, socket.socket]]:
    """Give an accepted client and its user's socket, of which the receive buffer is small."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as user:
        user.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        user.connect(listener.getsockname())
        client = tcp.client(listener.accept()[0].detach())
        yield client, user
        client.close()


Both = tuple[TcpClient, socket.socket]


def option(client: StreamClient, level: int, number: int) -> int:
    with socket.socket(fileno=socket.dup(client.reads)) as sock:
        return sock.getsockopt(level, number)


def reset(user: socket.socket) -> None:
    user.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    user.close()


def fill(client: StreamClient) -> int:
    """Write until no more fits; return how much did."""
    total = 0
    while count := client.write(bytes(1 << 16)):
        total += count
    return total


def test_a_client_is_named_by_its_address(both: Both) -> None:
    client, user = both
    host, port = user.getsockname()
    assert client.name == f"{host}:{port}"


def test_keys_are_sent_at_once(both: Both) -> None:
    assert option(both[0], socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_client_that_vanished_is_asked_for(both: Both) -> None:
    client, _ = both
    assert option(client, socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
    idle, interval, count = (option(client, socket.IPPROTO_TCP, each) for each in options)
    assert idle + interval * count <= 90


def test_a_client_that_is_there_but_does_not_read_is_not_cut_off(both: Both) -> None:
    assert option(both[0], socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0


def test_a_half_closed_client_gets_its_answer(both: Both, wait: Wait) -> None:
    client, user = both
    user.send(b"question")
    user.shutdown(socket.SHUT_WR)
    room = memoryview(bytearray(16))
    wait(client.reads)
    assert client.read([room]) == 8
    wait(client.reads)
    assert client.read([room]) == 0
    client.write(b"answer")
    assert user.recv(16) == b"answer"


def test_a_reset_client_is_gone(both: Both, wait: Wait) -> None:
    client, user = both
    reset(user)
    wait(client.reads)
    with pytest.raises(ConnectionError):
        client.read([memoryview(bytearray(16))])


def test_writing_to_a_reset_client_is_a_connection_error(both: Both, wait: Wait) -> None:
    client, user = both
    reset(user)
    wait(client.writes, 0)
    with pytest.raises(ConnectionError):
        client.write(b"anybody?")


def test_a_client_whose_output_timed_out_is_gone(both: Both, wait: Wait) -> None:
    client, _ = both
    with socket.socket(fileno=socket.dup(client.reads)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1)
    fill(client)
    assert wait(client.reads, 0) & select.POLLHUP
    with pytest.raises(ConnectionError):
        client.read([memoryview(bytearray(16))])


def test_what_was_acknowledged_is_delivered(both: Both) -> None:
    client, user = both
    client.write(b"arrived")
    assert user.recv(16) == b"arrived"
    assert client.end_output() == 0


def test_what_a_healthy_connection_has_not_delivered_yet_is_not_undelivered(both: Both) -> None:
    """The system goes on delivering it, also once the client is closed."""
    client, user = both
    written = fill(client)
    assert client.end_output() == 0
    client.close()
    assert len(user.recv(written, socket.MSG_WAITALL)) == written


def test_what_is_on_its_way_becomes_less_as_the_user_reads(both: Both, wait: Wait) -> None:
    client, user = both
    fill(client)
    before = client.on_its_way()
    while not user.recv(1 << 20) or client.on_its_way() == before:
        wait(user.fileno())
    assert client.on_its_way() < before


def test_what_a_client_did_not_take_is_undelivered_even_after_its_reset(
    both: Both, wait: Wait
) -> None:
    client, user = both
    written = fill(client)
    reset(user)
    wait(client.writes, 0)
    assert written // 2 < client.end_output() < written


def test_the_bytes_of_a_reset_client_add_up(both: Both, wait: Wait) -> None:
    """What its machine acknowledged and what is undelivered are all that was written."""
    client, user = both
    written = fill(client)
    reset(user)
    wait(client.writes, 0)
    with socket.socket(fileno=socket.dup(client.reads)) as sock:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 128)
    (acknowledged,) = struct.unpack_from("=Q", info, 120)
    assert acknowledged + client.end_output() == written


# What the system counts

ROOM = memoryview(bytearray(1 << 16))


def test_a_new_client_was_written_and_read_nothing(both: Both) -> None:
    assert (both[0].total_written(), both[0].total_read()) == (0, 0)


def test_what_was_written_counts_before_it_arrives_and_after(both: Both) -> None:
    client, user = both
    written = fill(client)
    assert client.total_written() == written
    assert len(user.recv(written, socket.MSG_WAITALL)) == written
    assert client.total_written() == written


def test_what_was_read_counts_and_what_waits_does_not(both: Both, wait: Wait) -> None:
    client, user = both
    user.send(bytes(100))
    wait(client.reads)
    assert client.total_read() == 0
    client.read([ROOM[:30]])
    assert client.total_read() == 30


@pytest.mark.parametrize("read", [20, 100])
def test_the_end_of_input_is_no_byte(both: Both, wait: Wait, read: int) -> None:
    client, user = both
    user.send(bytes(100))
    user.shutdown(socket.SHUT_WR)
    wait(client.reads, select.POLLRDHUP)
    client.read([ROOM[:read]])
    assert client.total_read() == read
    client.read([ROOM])
    client.read([ROOM])
    assert client.total_read() == 100


@pytest.mark.parametrize("ended", [False, True])
def test_a_reset_connection_still_has_its_totals(both: Both, wait: Wait, *, ended: bool) -> None:
    client, user = both
    client.write(bytes(70))
    user.send(bytes(100))
    wait(client.reads)
    if ended:
        user.recv(70, socket.MSG_WAITALL)  # else the end alone would be a reset
        user.shutdown(socket.SHUT_WR)
        wait(client.reads, select.POLLRDHUP)
    client.read([ROOM[:30]])
    reset(user)
    wait(client.reads, 0)
    assert (client.total_written(), client.total_read()) == (70, 30)


def test_urgent_bytes_are_bytes(both: Both, wait: Wait) -> None:
    client, user = both
    user.send(b"on")
    user.send(b"e", socket.MSG_OOB)
    user.send(b" two")
    got = 0
    while got < 7:
        wait(client.reads)
        got += client.read([ROOM[got:]]) or 0
    assert bytes(ROOM[:7]) == b"one two"
    assert client.total_read() == 7


def test_totals_are_taken_again_when_something_came_meanwhile(
    both: Both, wait: Wait, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, user = both
    unread = client.unread
    sent = iter([b"meanwhile"])

    def while_more_comes() -> int:
        waiting = unread()
        for data in sent:
            user.send(data)
            wait(client.reads)
        return waiting

    monkeypatch.setattr(client, "unread", while_more_comes)
    assert client.total_read() == 0


# Over by the time it is taken over


def test_one_that_is_gone_already_is_nobody(wait: Wait) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        user = socket.create_connection(listener.getsockname())
        ours = listener.accept()[0]
        reset(user)
        wait(ours.fileno(), 0)
        with pytest.raises(OSError, match="not connected"):
            tcp.client(ours.detach())


def test_one_that_has_a_name_is_taken_over_to_be_let_go(wait: Wait) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        user = socket.create_connection(listener.getsockname())
        ours = listener.accept()[0]
        user.send(b"last words")
        reset(user)
        wait(ours.fileno(), 0)
        client = tcp.client(ours.detach(), "name")
        assert (client.name, client.read([ROOM])) == ("name", 10)
        client.close()


def test_what_is_on_its_way_arrives_though_input_was_never_read(both: Both, wait: Wait) -> None:
    """Closed without a shutdown and a look, the connection would be reset."""
    client, user = both
    written = fill(client)
    user.send(b"never read")
    wait(client.reads)
    client.close()
    assert len(user.recv(written, socket.MSG_WAITALL)) == written
    assert user.recv(16) == b""


def test_what_is_on_its_way_arrives_though_the_master_closes_later(both: Both, wait: Wait) -> None:
    client, user = both
    held = socket.socket(fileno=socket.dup(client.reads))
    written = fill(client)
    user.send(b"never read")
    wait(client.reads)
    client.close()
    held.close()
    assert len(user.recv(written, socket.MSG_WAITALL)) == written
    assert user.recv(16) == b""
