"""A state's way through pipes, sockets and files, with a real loop."""

from __future__ import annotations

import logging
import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from vhost_device_console.errors import RefusedError
from vhost_device_console.worker.poller import Poller
from vhost_device_console.worker.transfer import Transfer

STATE = os.urandom(3 << 20)  # more than any pipe or socket holds
GUARD_S = 20.0


class Scene:
    """A transfer, the loop it waits in, and what it was given to load."""

    def __init__(self) -> None:
        self.poller = Poller(0)
        self.loaded: list[bytes] = []
        self.state = STATE
        self.most = len(STATE)
        self.refuses = False
        log = logging.LoggerAdapter(logging.getLogger("test"))
        self.transfer = Transfer(
            self.poller, log, lambda: self.state, self._load, lambda: self.most
        )

    def _load(self, data: bytes) -> None:
        if self.refuses:
            raise RefusedError("not this one")
        self.loaded.append(data)

    def until(self, done: Callable[[], bool]) -> None:
        """Let the loop run until `done`."""

        def never() -> None:
            raise AssertionError("it never happened")

        def look(_: int) -> int:
            if done():
                self.poller.stop()
            return False

        guard = self.poller.timer(never)
        guard.start(GUARD_S)
        self.poller.run(look, lambda: False, lambda *_: False, lambda: False)
        guard.stop()


@pytest.fixture
def scene() -> Iterator[Scene]:
    made = Scene()
    yield made
    made.transfer.stop()
    made.poller.close()


def channel(kind: str) -> tuple[int, int]:
    """Return a reading and a writing end; the reading one never blocks."""
    if kind == "pipe":
        ends = os.pipe2(os.O_CLOEXEC)
    else:
        one, other = socket.socketpair()
        ends = one.detach(), other.detach()
    os.set_blocking(ends[0], False)
    return ends


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_a_state_is_written_as_it_is_read(scene: Scene, kind: str) -> None:
    read, write = channel(kind)
    received = bytearray()
    over = False

    def take() -> bool:
        nonlocal over
        try:
            data = os.read(read, 1 << 16)
        except BlockingIOError:
            return over
        received.extend(data)
        over = not data
        return over

    # This end being readable wakes the loop too.
    scene.poller.watch(read, lambda _: None)
    scene.transfer.send(write)
    scene.until(take)
    scene.poller.forget(read)
    os.close(read)
    assert bytes(received) == STATE
    assert scene.transfer.check()


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_a_state_is_loaded_once_its_end_has_come(scene: Scene, kind: str) -> None:
    read, write = channel(kind)
    rest = memoryview(STATE)
    os.set_blocking(write, False)
    scene.transfer.receive(read)

    def give(_: int) -> None:
        nonlocal rest
        rest = rest[os.write(write, rest[: 1 << 16]) :]
        if not rest:
            scene.poller.forget(write)
            os.close(write)

    scene.poller.watch(write, give, 4)
    scene.until(lambda: bool(scene.loaded))
    assert scene.loaded == [STATE]
    assert scene.transfer.check()


def test_what_is_left_is_moved_when_the_outcome_is_asked_for(scene: Scene) -> None:
    read, write = channel("pipe")
    os.write(write, b"state")
    os.close(write)
    scene.transfer.receive(read)
    assert scene.transfer.check()
    assert scene.loaded == [b"state"]


def test_a_state_that_is_not_over_when_the_outcome_is_asked_for_failed(scene: Scene) -> None:
    read, write = channel("pipe")
    os.write(write, b"sta")
    scene.transfer.receive(read)
    assert not scene.transfer.check()
    with pytest.raises(BrokenPipeError):
        os.write(write, b"te")
    os.close(write)
    assert scene.loaded == []


def test_a_state_nobody_reads_failed_and_is_let_go(scene: Scene) -> None:
    read, write = channel("pipe")
    scene.transfer.send(write)
    assert not scene.transfer.check()
    while os.read(read, 1 << 20):  # to its end
        pass
    os.close(read)


def test_a_reader_that_goes_away_fails_a_transfer(scene: Scene) -> None:
    read, write = channel("pipe")
    scene.transfer.send(write)
    os.close(read)
    assert not scene.transfer.check()


def test_a_state_that_is_refused_failed(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    scene.refuses = True
    read, write = channel("pipe")
    os.close(write)
    scene.transfer.receive(read)
    assert not scene.transfer.check()
    assert "not this one" in caplog.text


def test_an_empty_state_is_one(scene: Scene) -> None:
    scene.state = b""
    read, write = channel("pipe")
    scene.transfer.send(write)
    assert scene.transfer.check()
    assert os.read(read, 1) == b""
    os.close(read)


def test_a_state_has_a_largest_size(scene: Scene) -> None:
    scene.most = 10
    read, write = channel("pipe")
    os.write(write, bytes(11))
    os.close(write)
    scene.transfer.receive(read)
    assert not scene.transfer.check()
    assert scene.loaded == []


def test_a_file_will_do(scene: Scene, tmp_path: Path) -> None:
    path = tmp_path / "state"
    scene.transfer.send(os.open(path, os.O_WRONLY | os.O_CREAT))
    scene.until(lambda: path.stat().st_size == len(STATE))
    assert scene.transfer.check()
    scene.transfer.receive(os.open(path, os.O_RDONLY))
    assert scene.transfer.check()
    assert scene.loaded == [STATE]


def test_an_outcome_is_told_as_often_as_it_is_asked_for(scene: Scene) -> None:
    scene.state = b""
    read, write = channel("pipe")
    scene.transfer.send(write)
    os.close(read)
    assert [scene.transfer.check(), scene.transfer.check()] == [True, True]
    assert scene.transfer.saved


def test_a_way_that_is_ready_and_takes_nothing_fails(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    """A count has room, but not for so much: it would be ready for ever."""
    scene.state = struct.pack("=Q", 1 << 63)
    count = os.eventfd(0, os.EFD_NONBLOCK)
    os.eventfd_write(count, 1 << 63)
    scene.transfer.send(os.dup(count))
    scene.until(lambda: "says that it is ready" in caplog.text)
    os.close(count)
    assert not scene.transfer.check()


def test_nothing_was_moved_at_first(scene: Scene) -> None:
    assert not scene.transfer.check()
    assert not scene.transfer.saved


@pytest.mark.parametrize("saving", [False, True])
def test_only_a_saved_state_that_was_asked_after_counts_as_saved(
    scene: Scene, saving: bool
) -> None:
    scene.state = b"state"
    read, write = channel("pipe")
    if saving:
        scene.transfer.send(write)
    else:
        os.close(write)
        scene.transfer.receive(read)
    assert not scene.transfer.saved
    assert scene.transfer.check()
    assert scene.transfer.saved == saving
    scene.transfer.stop()
    assert not scene.transfer.saved
    if saving:
        os.close(read)


@pytest.mark.parametrize("loads", [False, True])
def test_another_transfer_ends_the_one_before(scene: Scene, loads: bool) -> None:
    read, write = channel("pipe")
    scene.transfer.send(write)
    other, another = channel("pipe")
    if loads:
        os.close(another)
        scene.transfer.receive(other)
    else:
        scene.state = b""
        scene.transfer.send(another)
        os.close(other)
    while os.read(read, 1 << 20):  # to its end
        pass
    os.close(read)
    assert scene.transfer.check()
