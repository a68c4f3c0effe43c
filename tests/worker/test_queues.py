"""The queues' own rules, with a guest in this process; whole sessions are in tests/integration."""

from __future__ import annotations

import logging
import os
import resource
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest
from vhost_device_console import ledger
from vhost_device_console.config import LARGEST_QUEUE
from vhost_device_console.errors import FrontendError, RefusedError
from vhost_device_console.health import Health
from vhost_device_console.journal import Input, Output
from vhost_device_console.ledger import Ledger
from vhost_device_console.testing import GuestMemory, SplitDriver
from vhost_device_console.worker.inheritance import Held
from vhost_device_console.worker.poller import Poller
from vhost_device_console.worker.queues import Queues, Work
from vhost_device_console.worker.vhost_user import session as fx
from vhost_device_console.worker.vhost_user.message import (
    InflightArea,
    LogArea,
    ProtocolFeature,
    VringAddr,
)
from vhost_device_console.worker.virtqueue.ring import Ring

LOG_ALL = 1 << 26
PACKED = 1 << 34
PAGE = 4096
IP_RECVERR = 11  # linux/in.h; the socket module has no name for it
SIZE = 1 << 20


#: Its queues carry control messages only, so no page of it is used.
LEDGER = Ledger(ledger.create("test"))


class Echoes:
    """A device that takes every buffer of every queue."""

    def __init__(self) -> None:
        self.taken = 0
        self.then: Callable[[], None] = lambda: None
        self.calls: list[str] = []

    def kind(self, _: int) -> tuple[bool, int]:
        return False, SIZE

    def stream(self, _: int) -> Output | Input | None:
        return None

    def commit(self) -> None:
        pass

    def started(self, index: int, _: Ring) -> None:
        self.calls.append(f"started {index}")

    def disabled(self, index: int) -> None:
        self.calls.append(f"disabled {index}")

    def leaving(self, index: int, _: Ring) -> None:
        self.calls.append(f"leaving {index}")

    def stopped(self, index: int, _: Ring) -> None:
        self.calls.append(f"stopped {index}")

    def work(self, _: int, ring: Ring, enabled: bool) -> Work:
        def take(_: int) -> int:
            count = 0
            while (chain := ring.pop()) is not None:
                ring.push(chain.head, 0)
                count += 1
            self.taken += count
            self.then()
            return count

        return Work(ring.ready, take, lambda: enabled)

    def reset(self) -> None:
        self.calls.append("reset")

    def save(self) -> bytes:
        self.calls.append("save")
        return b"state"

    def largest_state(self) -> int:
        return SIZE

    def load(self, data: bytes) -> None:
        self.calls.append(f"load {data!r}")

    def moved(self) -> None:
        self.calls.append("moved")


class Scene:
    """Queues, a guest's memory that they have mapped, and a ring in it that may be started."""

    def __init__(self, memory: GuestMemory) -> None:
        self.poller = Poller(0)
        self.counters = Health()
        self.device = Echoes()
        log = logging.LoggerAdapter(logging.getLogger("test"))
        self.queues = Queues(self.device, self.poller, self.counters, log, lambda: None, LEDGER)
        self.memory = memory
        self.driver = SplitDriver(memory, 8)
        self.kick = os.eventfd(0, os.EFD_NONBLOCK)
        self.call = os.eventfd(0, os.EFD_NONBLOCK)
        regions = memory.regions()
        self.apply(fx.MapMemory([region for region, _ in regions], [regions[0][1]]))

    def apply(self, effect: fx.Effect) -> Any:
        """Carry out an effect; its descriptors are its message's."""
        message = {
            name: [Held(fd, fd) for fd in value] if name == "fds" else Held(value, value)
            for name, value in effect._asdict().items()
            if name in ("fd", "fds", "kick") and value is not None
        }
        return self.queues.apply(effect._replace(**message))

    def addr(self, *, flags: int = 0, log: int = 0) -> VringAddr:
        user = self.memory.user_addr
        parts = (self.driver.desc_addr, self.driver.used_addr, self.driver.avail_addr)
        return VringAddr(1, flags, *map(user, parts), log)

    def start(self, *, call: bool = True) -> None:
        if call:
            self.apply(fx.SetCall(1, self.call))
        self.apply(fx.StartRing(1, 8, self.addr(), 0, self.kick, True))

    def offer(self, data: bytes = b"x") -> None:
        self.driver.add([data])
        self.driver.publish()

    def close(self) -> None:
        self.queues.release()
        self.poller.close()
        os.close(self.kick)
        os.close(self.call)


@pytest.fixture
def scene() -> Iterator[Scene]:
    with GuestMemory(SIZE) as memory:
        made = Scene(memory)
        yield made
        made.close()


@contextmanager
def file_of(size: int) -> Iterator[int]:
    """Give a file that cannot be sealed against shrinking."""
    fd = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR)
    try:
        os.ftruncate(fd, size)
        yield fd
    finally:
        os.close(fd)


def log_into(scene: Scene, fd: int, size: int) -> None:
    scene.apply(fx.SetLog(LogArea(size, 0), fd))
    scene.apply(fx.SetFeatures(LOG_ALL))
    scene.apply(fx.LogRing(1, scene.addr(flags=1)))


def log_size(scene: Scene) -> int:
    ((region, _),) = scene.memory.regions()
    return -(-(region.guest_addr + region.size) // (8 * PAGE))


def test_what_a_running_ring_has_is_served_and_the_guest_called(scene: Scene) -> None:
    scene.start()
    scene.offer()
    assert scene.queues.drain()
    assert (scene.device.taken, len(scene.driver.reap())) == (1, 1)
    assert os.eventfd_read(scene.call) >= 1
    assert not scene.queues.drain()


def test_a_guest_that_never_stops_writing_does_not_keep_its_frontend_waiting(scene: Scene) -> None:
    """As many buffers as the largest ring has are taken for it, whatever it gives meanwhile."""

    def write_on() -> None:
        scene.driver.reap()
        scene.offer()

    scene.start()
    scene.offer()
    scene.device.then = write_on
    scene.queues.drain_all()
    assert scene.device.taken == LARGEST_QUEUE
    scene.device.then = lambda: None  # the scene is closed without it


@pytest.mark.parametrize("how", ["drain", "arm", "kick"])
def test_a_log_that_was_cut_off_is_told_by_the_next_drain(scene: Scene, how: str) -> None:
    size = log_size(scene)
    with file_of(size) as fd:
        scene.start()
        log_into(scene, fd, size)
        os.ftruncate(fd, 0)
        if how == "drain":
            scene.offer()
        elif how == "arm":
            assert scene.queues.arm()
        else:
            os.eventfd_write(scene.kick, 1)
            scene.poller.run(
                stop_after(scene.poller), lambda: False, lambda *_: False, lambda: False
            )
        with pytest.raises(FrontendError, match="dirty log"):
            scene.queues.drain()


def stop_after(poller: Poller) -> Callable[[int], int]:
    """Return a drain with which the loop looks at its descriptors once, then ends."""
    rounds = iter((True,))

    def drain(_: int) -> int:
        more = next(rounds, None)
        if more is None:
            poller.stop()
        return bool(more)

    return drain


def test_a_log_that_was_cut_off_does_not_outlive_its_frontend(scene: Scene) -> None:
    size = log_size(scene)
    with file_of(size) as fd:
        scene.start()
        log_into(scene, fd, size)
        os.ftruncate(fd, 0)
        scene.offer()
        scene.queues.drain_all()
        scene.queues.release()
    assert not scene.queues.drain()


def test_a_new_log_is_refused_whole(scene: Scene) -> None:
    size = log_size(scene)
    with file_of(size) as fd, file_of(1) as small:
        scene.start()
        log_into(scene, fd, size)
        with pytest.raises(RefusedError):
            scene.apply(fx.SetLog(LogArea(1, 0), small))
        scene.offer()
        scene.queues.drain()
        assert any(os.pread(fd, size, 0))


def test_a_log_from_before_the_memory_grew_cannot_be_chosen(scene: Scene) -> None:
    size = log_size(scene)
    ((low, low_fd),) = scene.memory.regions()
    with file_of(size) as fd:
        scene.apply(fx.SetLog(LogArea(size, 0), fd))
        scene.apply(fx.AddMemory(low._replace(guest_addr=1 << 40, user_addr=0x1000_0000), low_fd))
        with pytest.raises(RefusedError, match="too small"):
            scene.apply(fx.SetFeatures(LOG_ALL))


def test_a_log_is_forgotten_once_its_migration_is_over(scene: Scene) -> None:
    size = log_size(scene)
    with file_of(size) as fd:
        scene.start()
        log_into(scene, fd, size)
        scene.apply(fx.SetFeatures(0))
        scene.apply(fx.SetFeatures(LOG_ALL))
        os.pwrite(fd, bytes(size), 0)
        scene.offer()
        scene.queues.drain()
        assert not any(os.pread(fd, size, 0))


def test_the_format_says_which_sizes_there_are(scene: Scene) -> None:
    with pytest.raises(RefusedError, match="power of two"):
        scene.apply(fx.CheckSize(100))
    scene.apply(fx.SetFeatures(PACKED))
    scene.apply(fx.CheckSize(100))


def test_a_size_is_looked_at_again_when_the_ring_starts(scene: Scene) -> None:
    """The format may be chosen after the size."""
    with pytest.raises(RefusedError, match="power of two"):
        scene.apply(fx.StartRing(1, 100, scene.addr(), 0, scene.kick, True))


def test_no_room_for_an_area_is_a_refusal(scene: Scene) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        with pytest.raises(RefusedError):
            scene.apply(fx.MakeInflight(4, 64))
        with pytest.raises(RefusedError):
            scene.apply(fx.SetError(1, scene.call))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_reset_forgets_what_was_in_flight(scene: Scene) -> None:
    size, offset, fd = scene.apply(fx.MakeInflight(2, 8))
    try:
        scene.apply(fx.SetInflight(InflightArea(size, offset, 2, 8), fd))
        scene.apply(fx.ResetDevice())
        scene.start()
        assert os.pread(fd, size, 0) == bytes(size)  # no ring has used it
    finally:
        os.close(fd)


def test_a_state_that_was_taken_along_is_told_of_when_the_frontend_goes(scene: Scene) -> None:
    read, write = os.pipe()
    try:
        scene.apply(fx.SaveState(write))
        assert scene.apply(fx.CheckState())
        scene.queues.release()
        assert scene.device.calls == ["save", "moved"]
    finally:
        os.close(read)
        os.close(write)


def test_a_device_that_went_on_has_not_moved(scene: Scene) -> None:
    read, write = os.pipe()
    try:
        scene.apply(fx.SaveState(write))
        assert scene.apply(fx.CheckState())
        scene.start()
        scene.queues.release()
        assert "moved" not in scene.device.calls
    finally:
        os.close(read)
        os.close(write)


def dead_process(stack: ExitStack) -> int:
    """Return a descriptor of a process that has ended: readable for ever, with nothing to read."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    fd = os.pidfd_open(child)
    stack.callback(os.waitpid, child, 0)
    assert select.select([fd], [], [], 20)[0]
    return fd


def caller(stack: ExitStack) -> int:
    """Return a listening socket with somebody who waits to be taken."""
    listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    stack.enter_context(socket.create_connection(listening.getsockname()))
    return os.dup(listening.fileno())


def no_more(stack: ExitStack) -> int:
    """Return a socket whose other end has said that nothing more will come."""
    ours, theirs = socket.socketpair()
    stack.enter_context(ours).shutdown(socket.SHUT_WR)
    return theirs.detach()


def failed(stack: ExitStack) -> int:
    """Return a socket with an error that only recvmsg(MSG_ERRQUEUE) would take away."""
    sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    sock.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as nobody:
        nobody.bind(("127.0.0.1", 0))
        sock.connect(nobody.getsockname())
    sock.send(b"x")
    assert select.select([sock], [], [], 20)[0]
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    return os.dup(sock.fileno())


READY_FOR_EVER = pytest.mark.parametrize("ready", [dead_process, caller, no_more, failed])


def look_often(poller: Poller) -> None:
    """Let the loop look at its descriptors many times."""
    rounds = iter(range(20))

    def flush() -> bool:
        if next(rounds, None) is None:
            poller.stop()
        return True

    poller.run(lambda _: 0, flush, lambda *_: False, lambda: False)


@READY_FOR_EVER
def test_a_kick_that_is_ready_for_ever_is_heard_once(
    scene: Scene, ready: Callable[[ExitStack], int]
) -> None:
    with ExitStack() as stack:
        fd = ready(stack)
        stack.callback(os.close, fd)
        scene.apply(fx.StartRing(1, 8, scene.addr(), 0, fd, True))
        look_often(scene.poller)
        assert scene.counters.kicks == 1


@READY_FOR_EVER
def test_a_channel_that_is_ready_for_ever_is_given_up(
    scene: Scene, ready: Callable[[ExitStack], int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with ExitStack() as stack:
        fd = ready(stack)
        stack.callback(os.close, fd)
        scene.apply(fx.SetBackendChannel(fd))
        look_often(scene.poller)
        assert "no more messages to the frontend" in caplog.text


@READY_FOR_EVER
def test_a_state_from_what_is_ready_for_ever_is_over(
    scene: Scene, ready: Callable[[ExitStack], int], caplog: pytest.LogCaptureFixture
) -> None:
    with ExitStack() as stack:
        fd = ready(stack)
        stack.callback(os.close, fd)
        scene.apply(fx.LoadState(fd))
        look_often(scene.poller)
        assert "not transferred" in caplog.text or "load b''" in scene.device.calls


def test_a_guest_that_breaks_its_queues_on_and_on_does_not_fill_the_log(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(50):
        scene.driver = SplitDriver(scene.memory, 8)
        scene.start()
        scene.driver.offer(8)  # there is no such descriptor
        scene.driver.publish()
        scene.queues.drain()
        scene.apply(fx.StopRing(1))
    assert scene.counters.broken == 50
    assert caplog.text.count("is broken") == 10
    caplog.clear()  # the errors know the frames that know the memory


INBAND = ProtocolFeature.INBAND_NOTIFICATIONS | ProtocolFeature.BACKEND_REQ | ProtocolFeature.CONFIG


@pytest.mark.parametrize("protocol", [INBAND, ProtocolFeature.BACKEND_REQ])
def test_calls_are_messages_only_where_that_was_agreed(
    scene: Scene, protocol: ProtocolFeature
) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        scene.apply(fx.SetProtocolFeatures(protocol))
        scene.apply(fx.SetBackendChannel(theirs.fileno()))
        scene.start(call=False)
        scene.offer()
        scene.queues.drain()
        if protocol is INBAND:
            assert ours.recv(100).startswith(b"\x04")
        else:
            with pytest.raises(BlockingIOError):
                ours.recv(100)


def test_a_full_channel_is_written_when_there_is_room_again(scene: Scene) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        scene.apply(fx.SetProtocolFeatures(INBAND))
        scene.apply(fx.SetBackendChannel(theirs.fileno()))
        scene.start(call=False)
        theirs.setblocking(False)
        filled = 0
        for piece in (1 << 12, 1):
            with suppress(BlockingIOError):
                while True:
                    filled += theirs.send(bytes(piece))
        scene.queues.config_changed()
        ours.settimeout(20)
        left = filled
        while left:
            left -= len(ours.recv(min(left, 1 << 16)))
        ours.setblocking(False)
        heard = b""

        def listen(_: int) -> int:
            nonlocal heard
            try:
                heard += ours.recv(100)
            except BlockingIOError:
                return False
            scene.poller.stop()
            return False

        guard = scene.poller.timer(scene.poller.stop)
        guard.start(20)
        scene.poller.run(listen, lambda: False, lambda *_: False, lambda: False)
        assert heard == bytes.fromhex("02000000 01000000 00000000")
