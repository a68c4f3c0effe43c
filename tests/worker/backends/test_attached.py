"""A client who speaks the attachment protocol, and has kept the worker's end of the pair, too."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from vhost_device_console import attachment
from vhost_device_console.attachment import AskWho, Person, Who
from vhost_device_console.worker.backends.attached import Attached

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


def client(sock: socket.socket) -> Attached:
    return Attached(sock.dup(), "x", (0, 0))


def test_nothing_waits_though_the_socket_would(pair: Pair) -> None:
    ours, theirs = pair
    made = client(theirs)
    theirs.setblocking(True)
    assert made.waiting() is None
    while made.write(bytes(1 << 16)):
        pass
    made.tell(Who([]))
    assert not made.say()
    made.close()
    assert len(ours.recv(attachment.LARGEST)) > 1 << 16


def test_who_takes_back_what_was_sent_has_left(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair
    made = client(theirs)
    said = attachment.said

    def taken_back(record: memoryview) -> object:
        theirs.recv(1)
        return said(record)

    monkeypatch.setattr(attachment, "said", taken_back)
    ours.send(attachment.encode(AskWho()))
    with pytest.raises(ConnectionError):
        made.waiting()
    made.close()


def test_a_socket_with_no_other_end_is_one_that_has_left() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as alone:
        made = client(alone)
        with pytest.raises(ConnectionError):
            made.waiting()
        made.close()


def test_a_record_has_room_for_as_many_people_as_there_can_be(pair: Pair) -> None:
    ours, theirs = pair
    person = Person(
        name="\U0001f469" * 64,
        attached=True,
        writer=False,
        you=False,
        columns=65535,
        rows=65535,
        lag=1 << 62,
    )
    made = client(theirs)
    made.tell(who := Who([person] * 256))
    assert made.say()
    record = memoryview(bytearray(attachment.LARGEST))
    assert attachment.told(record[: ours.recv_into(record)]) == who
    made.close()
