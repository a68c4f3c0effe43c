"""Messages of ours to the frontend, over a real socket pair."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress

import pytest
from vhost_device_console.worker.vhost_user.backend_channel import BackendChannel

CHANGED = struct.pack("=III", 2, 1, 0)


def asked(request: int, ring: int) -> bytes:
    return struct.pack("=IIIII", request, 1 | 8, 8, ring, 0)


def answer(request: int, status: int = 0, *, flags: int = 1 | 4) -> bytes:
    return struct.pack("=IIIQ", request, flags, 8, status)


class Ends:
    """A channel and the frontend's end of it."""

    def __init__(self) -> None:
        self.frontend, ours = socket.socketpair()
        self.frontend.setblocking(False)
        self.channel = BackendChannel(ours.detach())

    def heard(self) -> bytes:
        """Return what the frontend has received."""
        with suppress(BlockingIOError):
            return self.frontend.recv(1 << 20)
        return b""

    def say(self, data: bytes) -> None:
        """Let the frontend say something, and the channel look."""
        self.frontend.sendall(data)
        self.channel.work()


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.frontend.close()
    made.channel.close()


def test_a_change_of_configuration_asks_for_no_answer(ends: Ends) -> None:
    ends.channel.config_changed()
    ends.channel.config_changed()
    assert ends.heard() == CHANGED * 2
    assert not ends.channel.blocked


def test_calls_and_errors_ask_for_an_answer(ends: Ends) -> None:
    ends.channel.call(3)
    ends.channel.error(1)
    assert ends.heard() == asked(4, 3) + asked(5, 1)


def test_a_call_waits_for_the_answer_to_the_one_before(ends: Ends) -> None:
    ends.channel.call(3)
    for _ in range(3):
        ends.channel.call(3)
    assert ends.heard() == asked(4, 3)
    ends.say(answer(4))
    assert ends.heard() == asked(4, 3)
    ends.say(answer(4))
    assert ends.heard() == b""


def test_a_call_after_an_answer_that_nobody_looked_at_is_sent(ends: Ends) -> None:
    ends.channel.call(3)
    ends.heard()
    ends.frontend.sendall(answer(4))
    ends.channel.call(3)
    assert ends.heard() == asked(4, 3)


def test_other_rings_do_not_wait(ends: Ends) -> None:
    ends.channel.call(3)
    ends.channel.call(1)
    ends.channel.error(3)
    assert ends.heard() == asked(4, 3) + asked(4, 1) + asked(5, 3)


def test_answers_come_in_order(ends: Ends) -> None:
    for ring in (3, 1):
        ends.channel.call(ring)
    ends.heard()
    ends.say(answer(4))  # to the first
    ends.channel.call(1)
    ends.channel.call(3)
    assert ends.heard() == asked(4, 3)


def test_what_the_frontend_thinks_of_a_call_changes_nothing(ends: Ends) -> None:
    ends.channel.call(3)
    ends.say(answer(4, status=1))
    ends.heard()
    ends.channel.call(3)
    assert (ends.heard(), ends.channel.broken) == (asked(4, 3), None)


def test_an_answer_may_come_in_pieces(ends: Ends) -> None:
    ends.channel.call(3)
    ends.heard()
    ends.channel.call(3)
    for byte in answer(4)[:-1]:
        ends.say(bytes([byte]))
    assert ends.heard() == b""
    ends.say(answer(4)[-1:])
    assert ends.heard() == asked(4, 3)


def test_a_full_socket_is_waited_for(ends: Ends) -> None:
    while not ends.channel.blocked:
        ends.channel.config_changed()
    ends.channel.call(3)
    assert ends.channel.broken is None
    heard = ends.heard()
    assert {heard[at : at + 12] for at in range(0, len(heard), 12)} == {CHANGED}
    ends.channel.work()
    assert ends.heard() == CHANGED + asked(4, 3)
    assert not ends.channel.blocked


def test_a_call_that_waits_for_an_answer_is_not_blocked(ends: Ends) -> None:
    ends.channel.call(3)
    ends.channel.call(3)
    assert not ends.channel.blocked


@pytest.mark.parametrize(
    "said",
    [
        answer(4),
        answer(2),
        CHANGED,
        struct.pack("=III", 4, 2, 0),
        struct.pack("=III", 4, 1, 1 << 20),
    ],
    ids=["of another", "of what has none", "a request", "another version", "oversize"],
)
def test_nonsense_breaks_the_channel(ends: Ends, said: bytes) -> None:
    ends.channel.error(1)
    ends.say(said)
    assert ends.channel.broken


def test_an_answer_without_status_breaks_the_channel(ends: Ends) -> None:
    ends.channel.call(1)
    ends.say(struct.pack("=III", 4, 5, 0))
    assert ends.channel.broken


def test_a_request_of_the_same_number_is_no_answer(ends: Ends) -> None:
    ends.channel.call(1)
    ends.say(answer(4, flags=1))
    assert ends.channel.broken


def test_a_frontend_that_closes_its_end_breaks_the_channel(ends: Ends) -> None:
    ends.frontend.close()
    ends.channel.work()
    assert ends.channel.broken


@pytest.mark.parametrize("path", ["/dev/null", "/"])
def test_what_is_no_socket_breaks_the_channel(path: str) -> None:
    channel = BackendChannel(os.open(path, os.O_RDONLY))
    channel.call(1)
    assert channel.broken
    channel.close()
