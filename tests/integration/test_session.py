"""The vhost-user conversation with a whole daemon: as real frontends have it, and wrong."""

from __future__ import annotations

import os
import resource
import select
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from scene import (
    Pair,
    attach,
    boot,
    converse,
    exactly,
    footprint,
    nothing_to_read,
    status_of,
    wait_footprint,
    wait_port,
)
from vhost_device_console.testing import (
    DRIVER_FEATURES,
    FRONTEND_FEATURES,
    ConsoleDriver,
    Feature,
    Frontend,
    GuestMemory,
    NackError,
    SplitDriver,
    bad,
    connect_like_cloud_hypervisor,
    connect_like_crosvm,
    connect_like_qemu,
    connect_like_uml,
    pause_like_qemu,
    rebind_like_uml,
    resume_like_qemu,
    stop_like_qemu,
    stop_like_uml,
)
from vhost_device_console.worker.vhost_user.message import (
    ConfigSpan,
    ProtocolFeature,
    Region,
    Request,
    VringAddr,
    VringState,
    encode,
    encode_regions,
    encode_u64,
)

from conftest import StartDaemon
from launch import WITHIN, command, receive_until, until

PAGE = 4096
TWO_QUEUES = DRIVER_FEATURES & ~Feature.MULTIPORT


@pytest.fixture
def frontend(pair: Pair) -> Iterator[Frontend]:
    """Give a frontend of the first guest that has agreed on features, no more."""
    with Frontend(pair.daemon.sockets[0], timeout=WITHIN) as frontend:
        frontend.negotiate()
        yield frontend


@contextmanager
def open_path(path: str | Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def eventfd(value: int = 0, flags: int = os.EFD_NONBLOCK) -> Iterator[int]:
    fd = os.eventfd(value, flags | os.EFD_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def refused(do: Callable[[], Any]) -> None:
    with pytest.raises(NackError):
        do()


# Conversations of real frontends


@pytest.mark.parametrize("newer", [False, True], ids=["6.1", "7.2"])
def test_uml(pair: Pair, newer: bool) -> None:
    """User Mode Linux: two-slot tables, backend channel, socket pairs, 256 entries, disabling."""
    with GuestMemory.like_uml() as memory:
        frontend = connect_like_uml(pair.daemon.sockets[0], memory, newer=newer, timeout=WITHIN)
        with frontend, attach(pair.daemon) as peer:
            assert [queue.driver.size for queue in frontend.queues.values()] == [256] * 4
            assert frontend.backend_channel is not None
            console = ConsoleDriver(frontend)
            console.wait_open()
            converse(console, peer)
            stop_like_uml(frontend)


def test_qemu(pair: Pair) -> None:
    """QEMU: three call descriptors each, error descriptors, disabling, GET_VRING_BASE."""
    with GuestMemory.like_qemu() as memory:
        frontend = connect_like_qemu(pair.daemon.sockets[0], memory, timeout=WITHIN)
        with frontend, attach(pair.daemon) as peer:
            console = ConsoleDriver(frontend)
            console.wait_open()
            converse(console, peer)
            used = {index: queue.driver.used_idx for index, queue in frontend.queues.items()}
            assert stop_like_qemu(frontend) == used
            assert used[1] >= 1


@pytest.mark.parametrize("connect", [connect_like_qemu, connect_like_uml])
@pytest.mark.parametrize("queue_count", [2, 4])
def test_two_queues(pair: Pair, connect: Any, queue_count: int) -> None:
    """Without MULTIPORT the console works at once, whether all queues are started or two."""
    with boot(
        pair.daemon, connect=connect, features=TWO_QUEUES, queue_count=queue_count
    ) as console:
        assert not console.multiport
        with attach(pair.daemon) as peer:
            converse(console, peer)


@pytest.mark.parametrize("missing", [Feature.EVENT_IDX, Feature.INDIRECT_DESC, Feature.VERSION_1])
def test_without_a_feature(pair: Pair, missing: Feature) -> None:
    """Any subset of the features will do."""
    features = DRIVER_FEATURES & ~missing
    with boot(pair.daemon, features=features) as console, attach(pair.daemon) as peer:
        converse(console, peer)


def test_without_protocol_features(pair: Pair) -> None:
    """A frontend that knows no protocol features has rings that are enabled from the start."""
    with GuestMemory() as memory, Frontend(pair.daemon.sockets[0], timeout=WITHIN) as frontend:
        frontend.offered = frontend.get_features()
        frontend.set_features(frontend.offered & DRIVER_FEATURES & ~Feature.PROTOCOL_FEATURES)
        frontend.set_memory(memory)
        for index in range(4):
            frontend.start_queue(index, SplitDriver(memory, 64))
        console = ConsoleDriver(frontend)
        console.wait_open()
        with attach(pair.daemon) as peer:
            converse(console, peer)


@pytest.mark.parametrize("size", [1, 2, 1024, 32768])
def test_ring_size(pair: Pair, size: int) -> None:
    """Rings of any size work, up to the largest there is."""
    options = {"features": TWO_QUEUES, "queue_size": size, "queue_count": 2, "timeout": WITHIN}
    with (
        GuestMemory() as memory,
        connect_like_qemu(pair.daemon.sockets[0], memory, **options) as frontend,
        attach(pair.daemon) as peer,
    ):
        converse(ConsoleDriver(frontend, buffers=64), peer)


def test_index_wraps(pair: Pair) -> None:
    """A ring whose indices run past 65535 goes on from 0."""
    with GuestMemory() as memory:
        drivers = [SplitDriver(memory, 8, start=65530) for _ in range(4)]
        with (
            connect_like_qemu(pair.daemon.sockets[0], memory, drivers, timeout=WITHIN) as frontend,
            attach(pair.daemon) as peer,
        ):
            console = ConsoleDriver(frontend)
            # This driver says it anew, at whatever index its rings begin.
            console.wait_open()
            console.write(bytes(range(32)), chunk=1)
            assert drivers[1].used_idx < 65530
            assert exactly(peer, 32) == bytes(range(32))
            converse(console, peer)


def test_several_regions(pair: Pair) -> None:
    """Memory may come in pieces, with offsets in their files, and buffers cross adjacent ones."""
    regions = [
        Region(0, 1 << 20, 0x7000_0000, 0),
        Region(1 << 20, 1 << 20, 0x9000_0000, PAGE),
        Region(1 << 32, 1 << 20, 0x5000_0000, 3 * PAGE),
    ]
    with (
        GuestMemory(regions) as memory,
        connect_like_qemu(pair.daemon.sockets[0], memory, timeout=WITHIN) as frontend,
        attach(pair.daemon) as peer,
    ):
        console = ConsoleDriver(frontend, buffers=8)
        console.wait_open()
        converse(console, peer)
        crossing = (1 << 20) - 5
        memory.write(crossing, b"0123456789")
        tx = frontend.queues[1]
        tx.driver.write_desc(0, crossing, 10)
        tx.driver.offer(0)
        tx.notify()
        tx.wait(WITHIN)
        assert exactly(peer, 10) == b"0123456789"


def test_uml_calls_are_eight_bytes(pair: Pair) -> None:
    """A call on a socket is exactly eight bytes, as virtio_uml reads them."""
    with boot(pair.daemon, connect=connect_like_uml) as console:
        tx = console.port.tx
        for number in range(1, 4):
            tx.driver.enable_calls()
            tx.driver.add([b"."])
            tx.notify()
            until(tx.driver.has_used, "the buffer never came back")
            console.frontend.barrier()  # whatever follows that was done, too
            assert tx.call_fd is not None
            assert os.read(tx.call_fd, 1 << 16) == struct.pack("=Q", 1), number
            tx.driver.reap()


def test_config_can_be_read_again_and_written_whole(frontend: Frontend) -> None:
    """Any span can be read at any time; a write of the whole space changes nothing."""
    whole = frontend.get_config(0, 12)
    assert struct.unpack("<HHII", whole)[2] == 1  # max_nr_ports
    assert frontend.get_config(0, 8) == whole[:8]
    assert frontend.get_config(4, 4) == whole[4:8]
    frontend.set_config(0, whole)
    frontend.set_config(0, bytes([255]) * 12)
    assert frontend.get_config(0, 12) == whole


def test_config_before_features(pair: Pair) -> None:
    """The configuration is there before the guest has chosen its features."""
    with Frontend(pair.daemon.sockets[0], timeout=WITHIN) as frontend:
        frontend.set_protocol_features(ProtocolFeature.CONFIG)
        assert len(frontend.get_config(0, 12)) == 12


def test_offers(pair: Pair) -> None:
    """What is on offer: these features and no others, and the queues of one port."""
    with Frontend(pair.daemon.sockets[0], timeout=WITHIN) as frontend:
        assert Feature(frontend.get_features()) == (
            Feature.SIZE
            | Feature.MULTIPORT
            | Feature.EMERG_WRITE
            | Feature.LOG_ALL
            | Feature.INDIRECT_DESC
            | Feature.EVENT_IDX
            | Feature.PROTOCOL_FEATURES
            | Feature.VERSION_1
            | Feature.RING_PACKED
            | Feature.IN_ORDER
            | Feature.RING_RESET
        )
        assert ProtocolFeature(frontend.get_protocol_features()) == (
            FRONTEND_FEATURES ^ ProtocolFeature.INBAND_NOTIFICATIONS
        )
        assert frontend.get_queue_num() == 4


def test_packed_rings_are_offered_to_who_asked_for_them(pair: Pair, daemon: StartDaemon) -> None:
    """Without --packed, which these tests' daemon has, all else is offered, and no packed rings."""
    with (
        Frontend(pair.daemon.sockets[0], timeout=WITHIN) as asked,
        Frontend(daemon("unix").sockets[0], timeout=WITHIN) as plain,
    ):
        assert asked.get_features() ^ plain.get_features() == Feature.RING_PACKED


# One frontend at a time


def test_second_frontend_is_refused_while_the_first_lives(pair: Pair) -> None:
    """A second frontend is hung up on, said so in the log, and the first one goes on."""
    with boot(pair.daemon) as console, attach(pair.daemon) as peer:
        with Frontend(pair.daemon.sockets[0], timeout=WITHIN) as second:
            second.wait_closed()
        pair.daemon.expect_log(r"another frontend was refused")
        converse(console, peer)


def test_message_byte_by_byte(pair: Pair) -> None:
    """A conversation that dribbles in is understood as if it came at once."""
    with Frontend(pair.daemon.sockets[0], timeout=WITHIN) as frontend:
        frontend.negotiate()
        with GuestMemory() as memory:
            region, fd = memory.regions()[0]
            frontend.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            data = encode(Request.SET_MEM_TABLE, encode_regions([region]), need_reply=True)
            frontend.send_raw(data[:1], [fd])
            for at in range(1, len(data)):
                frontend.send_raw(data[at : at + 1])
            assert status_of(frontend, Request.SET_MEM_TABLE) == 0


def test_many_messages_at_once(frontend: Frontend) -> None:
    """Messages that come in one piece are answered one by one, in order."""
    one = encode(Request.GET_QUEUE_NUM) + encode(Request.GET_FEATURES)
    frontend.send_raw(one * 50)
    for _ in range(50):
        assert frontend.reply_to(Request.GET_QUEUE_NUM).payload == encode_u64(4)
        assert frontend.reply_to(Request.GET_FEATURES).payload == encode_u64(frontend.offered)


# Wrong messages


@pytest.mark.parametrize("message", [*bad.TRUNCATED, *bad.BROKEN], ids=lambda m: m.name)
def test_broken_stream_closes(frontend: Frontend, message: bad.BadMessage) -> None:
    """A stream that cannot be followed is closed."""
    frontend.send_raw(message.data)
    if message.hang_up:
        frontend.socket.shutdown(socket.SHUT_WR)
    frontend.wait_closed()


@pytest.mark.parametrize("message", bad.REFUSED, ids=lambda m: m.name)
def test_refused_message_changes_nothing(frontend: Frontend, message: bad.BadMessage) -> None:
    """A message that cannot be carried out gets a non-zero answer; the next one is understood."""
    with ExitStack() as fds:
        sent = [fds.enter_context(eventfd()) for _ in range(message.fds)]
        frontend.send_raw(message.data, sent)
        assert status_of(frontend, struct.unpack_from("=I", message.data)[0]) != 0
        assert frontend.get_features() == frontend.offered


@pytest.mark.parametrize("message", bad.REFUSED, ids=lambda m: m.name)
def test_refusal_without_reply_ack_closes(pair: Pair, message: bad.BadMessage) -> None:
    """Where the refusal cannot be told, the connection ends."""
    with ExitStack() as fds, Frontend(pair.daemon.sockets[0], timeout=WITHIN) as frontend:
        frontend.negotiate(protocol=0)
        sent = [fds.enter_context(eventfd()) for _ in range(message.fds)]
        with suppress(BrokenPipeError):  # dropped before the call returns
            frontend.send_raw(message.data, sent)
        frontend.wait_closed()


def test_slow_message_closes(pair: Pair, frontend: Frontend) -> None:
    """A frontend that never ends its message is dropped in the end, and this is logged."""
    frontend.send_raw(encode(Request.GET_FEATURES)[:7])
    frontend.wait_closed()
    pair.daemon.expect_log("a message was not whole after")


def test_fds_on_payload_bytes_are_closed(pair: Pair, frontend: Frontend) -> None:
    """Descriptors that come inside a message are closed, and the message refused."""
    data = encode(Request.SET_FEATURES, encode_u64(frontend.features), need_reply=True)
    held = footprint(pair.worker)
    with eventfd() as fd:
        frontend.send_raw(data[:15])
        frontend.send_raw(data[15:], [fd] * 20)
        assert status_of(frontend, Request.SET_FEATURES) != 0
    wait_footprint(pair.worker, held)


def test_fds_of_an_unfinished_message_are_closed(pair: Pair, frontend: Frontend) -> None:
    """Descriptors of a message that is never finished are closed with the connection."""
    daemon = pair.daemon.pid
    before = footprint(daemon)[0]
    with eventfd() as fd:
        frontend.send_raw(encode(Request.SET_VRING_CALL, encode_u64(0))[:5], [fd] * 253)
        until(lambda: footprint(daemon)[0] >= before + 253, "the descriptors never arrived")
    frontend.close()
    until(lambda: footprint(daemon)[0] <= before, "the descriptors were never closed")


def test_no_room_for_fds_closes(pair: Pair, frontend: Frontend) -> None:
    """When a message's descriptors do not all fit, those that did are closed, and the stream."""
    _, hard = resource.prlimit(pair.worker, resource.RLIMIT_NOFILE)
    before = resource.prlimit(pair.worker, resource.RLIMIT_NOFILE)
    highest = max(int(fd) for fd in os.listdir(f"/proc/{pair.worker}/fd"))
    resource.prlimit(pair.worker, resource.RLIMIT_NOFILE, (highest + 20, hard))
    try:
        with eventfd() as fd:
            with suppress(BrokenPipeError):
                frontend.send_raw(encode(Request.SET_OWNER), [fd] * 253)
            frontend.wait_closed()
        pair.daemon.expect_log("no room for the file descriptors")
    finally:
        resource.prlimit(pair.worker, resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("path", ["/", __file__], ids=["folder", "file"])
def test_kick_that_cannot_be_waited_on(pair: Pair, path: str) -> None:
    """A file or folder as kick descriptor is refused; the ring keeps the one it has."""
    with boot(pair.daemon) as console, attach(pair.daemon) as peer, open_path(path) as fd:
        refused(lambda: console.frontend.set_vring_kick(1, fd))
        converse(console, peer)


@contextmanager
def nested_epolls(depth: int) -> Iterator[int]:
    """Give an epoll descriptor that watches another, which watches another, and so on."""
    with ExitStack() as stack:
        inner = stack.enter_context(select.epoll())
        for _ in range(depth):
            outer = stack.enter_context(select.epoll())
            outer.register(inner.fileno(), select.EPOLLIN)
            inner = outer
        yield inner.fileno()


FD_MESSAGES = [
    (Request.SET_VRING_KICK, encode_u64(1)),
    (Request.SET_VRING_CALL, encode_u64(1)),
    (Request.SET_VRING_ERR, encode_u64(1)),
    (Request.SET_LOG_FD, b""),
    (Request.SET_BACKEND_REQ_FD, b""),
]


@pytest.mark.parametrize(("request_", "payload"), FD_MESSAGES)
def test_descriptor_that_is_only_a_path(pair: Pair, request_: Request, payload: bytes) -> None:
    """A descriptor opened with O_PATH, with which nothing can be done, is refused."""
    with boot(pair.daemon) as console, attach(pair.daemon) as peer:
        held = footprint(pair.worker)
        with open_path("/", os.O_PATH) as fd:
            refused(lambda: console.frontend.tell(request_, payload, [fd]))
            assert console.frontend.set_device_state_fd(0, fd) == 0x101
        wait_footprint(pair.worker, held)
        converse(console, peer)


@pytest.mark.parametrize("depth", [1, 3, 4])
def test_descriptor_that_watches_others(frontend: Frontend, depth: int) -> None:
    """Epoll descriptors nested so deep that nobody can wait for them are refused."""
    with nested_epolls(depth) as fd:
        for request, payload in FD_MESSAGES:
            with suppress(NackError):
                frontend.tell(request, payload, [fd])
        frontend.set_device_state_fd(1, fd)
        frontend.check_device_state()
        frontend.barrier()


def test_call_that_would_block(pair: Pair) -> None:
    """A full call descriptor that was made blocking again holds nothing up."""
    with boot(pair.daemon) as console, attach(pair.daemon) as peer, eventfd() as fd:
        tx = console.port.tx
        console.frontend.set_vring_call(1, fd)
        console.frontend.barrier()
        with suppress(BlockingIOError):
            os.eventfd_write(fd, (1 << 64) - 2)
        os.set_blocking(fd, True)
        for number in range(3):
            tx.driver.enable_calls()
            tx.driver.add([b"%d" % number])
            tx.notify()
            assert exactly(peer, 1) == b"%d" % number
            until(tx.driver.has_used, "the buffer never came back")
            tx.driver.reap()


@pytest.mark.parametrize("kind", ["eventfd", "pipe"])
def test_blocking_kick_never_blocks(pair: Pair, kind: str) -> None:
    """A kick descriptor that blocks, or that anyone else has emptied, holds nothing up."""
    with boot(pair.daemon) as console, attach(pair.daemon) as peer:
        if kind == "eventfd":
            read = write = os.eventfd(0, os.EFD_CLOEXEC)
        else:
            read, write = os.pipe()
        try:
            console.frontend.set_vring_kick(1, read)
            for _ in range(100):  # with nothing in the ring, and emptied again at once
                os.write(write, struct.pack("=Q", 1))
                if select.select([read], [], [], 0)[0]:
                    os.set_blocking(read, False)
                    with suppress(BlockingIOError):
                        os.read(read, 8)
                    os.set_blocking(read, True)
            console.frontend.barrier()
            console.port.tx.driver.add([b"kicked"])
            console.port.tx.driver.publish()
            os.write(write, struct.pack("=Q", 1))
            assert exactly(peer, 6) == b"kicked"
        finally:
            for fd in {read, write}:
                os.close(fd)


def test_kick_that_hangs_up(pair: Pair) -> None:
    """A kick pipe whose other end is closed costs nothing and harms nothing."""
    with boot(pair.daemon) as console, attach(pair.daemon) as peer:
        read, write = os.pipe()
        console.frontend.set_vring_kick(1, read)
        os.close(read)
        os.close(write)
        console.frontend.barrier()
        with eventfd() as kick:
            console.frontend.set_vring_kick(1, kick)
            console.port.tx.driver.add([b"kicked"])
            console.port.tx.driver.publish()
            os.eventfd_write(kick, 1)
            assert exactly(peer, 6) == b"kicked"


@pytest.mark.parametrize("kind", ["full eventfd", "full socket", "broken socket", "file", "none"])
def test_call_that_cannot_be_made(pair: Pair, kind: str) -> None:
    """A call descriptor that is full, broken or absent is passed over; buffers come back."""
    with ExitStack() as stack, boot(pair.daemon) as console, attach(pair.daemon) as peer:
        tx = console.port.tx
        if kind == "full eventfd":
            fd: int | None = stack.enter_context(eventfd(0))
            assert fd is not None
            os.eventfd_write(fd, (1 << 64) - 2)
        elif kind == "file":
            fd = stack.enter_context(open_path("/dev/full", os.O_RDWR))
        elif kind == "none":
            fd = None
        else:
            ours, theirs = socket.socketpair()
            stack.enter_context(ours)
            fd = stack.enter_context(theirs).fileno()
            if kind == "broken socket":
                ours.close()
            else:
                theirs.setblocking(False)
                with suppress(BlockingIOError):
                    while True:
                        theirs.send(bytes(4096))
        console.frontend.set_vring_call(1, fd)
        for number in range(10):
            tx.driver.enable_calls()
            tx.driver.add([b"%d" % number])
            tx.notify()
            assert exactly(peer, 1) == b"%d" % number
            until(tx.driver.has_used, "the buffer never came back")
            tx.driver.reap()


def test_same_message_again_and_again(pair: Pair) -> None:
    """What a message sets is freed when it is set again, thousands of times over."""
    with boot(pair.daemon) as console:
        frontend = console.frontend
        held = footprint(pair.worker)
        (region, memory_fd) = frontend.queues[0].driver.memory.regions()[0]
        table = encode(Request.SET_MEM_TABLE, encode_regions([region]))
        ours, theirs = socket.socketpair()
        with eventfd() as fd, ours, theirs:
            for _ in range(2000):
                for request in (Request.SET_VRING_CALL, Request.SET_VRING_ERR):
                    frontend.send_raw(encode(request, encode_u64(0)), [fd])
                frontend.send_raw(encode(Request.SET_VRING_KICK, encode_u64(1)), [fd])
                frontend.send_raw(encode(Request.SET_BACKEND_REQ_FD), [theirs.fileno()])
            for _ in range(200):
                frontend.send_raw(table, [memory_fd])
            frontend.barrier()
            # An error descriptor came to what QEMU gives already: none is new.
            assert footprint(pair.worker) == held


@pytest.mark.parametrize("index", [256, 65536, 65537, 0xFFFF_FFFF])
def test_no_such_ring(frontend: Frontend, index: int) -> None:
    """A ring index is compared in all its 32 bits."""
    for request in (
        Request.SET_VRING_NUM,
        Request.SET_VRING_BASE,
        Request.SET_VRING_ENABLE,
    ):
        refused(lambda request=request: frontend.tell(request, VringState(index, 1).encode()))
    refused(lambda: frontend.tell(Request.SET_VRING_ADDR, VringAddr(index, 0, 0, 0, 0, 0).encode()))


def test_queues_that_no_port_has(pair: Pair) -> None:
    """A frontend may have more queues than the console; they run and come to nothing."""
    with boot(pair.daemon, queue_count=10) as console, attach(pair.daemon) as peer:
        converse(console, peer)
        spare = console.frontend.queues[9]
        spare.driver.add([b"to nobody"])
        spare.notify()
        converse(console, peer)
        assert stop_like_qemu(console.frontend)[9] <= 1


def test_get_base_of_no_such_ring_closes(frontend: Frontend) -> None:
    """Where a request's own answer cannot say no, the connection ends."""
    frontend.send(Request.GET_VRING_BASE, VringState(65537, 0).encode())
    frontend.wait_closed()


@pytest.mark.parametrize("most", [64, 256])
def test_largest_queue_option(daemon: StartDaemon, most: int) -> None:
    """A ring larger than --max-queue-size is refused, one of that size is not."""
    running = daemon("unix", 1, "-q", str(most))
    with Frontend(running.sockets[0], timeout=WITHIN) as frontend:
        frontend.negotiate()
        refused(lambda: frontend.set_vring_num(0, 2 * most))
        frontend.set_vring_num(0, most)


def test_running_ring_is_not_changed(pair: Pair) -> None:
    """Size, addresses and base of a ring that runs are refused, and it goes on."""
    with boot(pair.daemon) as console, attach(pair.daemon) as peer:
        frontend, driver = console.frontend, console.port.tx.driver
        user = driver.memory.user_addr
        refused(lambda: frontend.set_vring_num(1, 32))
        refused(lambda: frontend.set_vring_base(1, 0))
        refused(
            lambda: frontend.set_vring_addr(
                1, user(driver.desc_addr), user(driver.used_addr) + 64, user(driver.avail_addr)
            )
        )
        refused(lambda: frontend.set_features(frontend.features & ~Feature.EVENT_IDX))
        converse(console, peer)


def test_cloud_hypervisor(pair: Pair) -> None:
    """cloud-hypervisor: two queues, a reply to everything, the backend channel last."""
    with boot(pair.daemon, connect=connect_like_cloud_hypervisor) as console:
        assert not console.multiport
        with attach(pair.daemon) as peer:
            converse(console, peer)


def test_crosvm(pair: Pair) -> None:
    """crosvm: rings of 32768 entries, no acknowledgements."""
    with (
        GuestMemory(1 << 28) as memory,  # the control queue is kept full
        connect_like_crosvm(pair.daemon.sockets[0], memory, timeout=WITHIN) as frontend,
        attach(pair.daemon) as peer,
    ):
        console = ConsoleDriver(frontend, buffers=64)
        console.wait_open()
        converse(console, peer)


def test_cloud_hypervisor_comes_again(pair: Pair) -> None:
    """cloud-hypervisor, connected anew, goes on where it was, with buffers it gave before."""
    with boot(pair.daemon, connect=connect_like_cloud_hypervisor) as console:
        with attach(pair.daemon) as peer:
            converse(console, peer)
        console.frontend.reconnect()
        with attach(pair.daemon) as peer:
            converse(console, peer)


def test_uml_driver_is_bound_again(pair: Pair) -> None:
    """A driver that is bound again has new rings, and nobody said that the old ones stopped."""
    with (
        GuestMemory.like_uml() as memory,
        connect_like_uml(pair.daemon.sockets[0], memory, timeout=WITHIN) as frontend,
        attach(pair.daemon) as peer,
    ):
        console = ConsoleDriver(frontend)
        console.wait_open()
        converse(console, peer)
        rebind_like_uml(frontend, memory)
        again = ConsoleDriver(frontend)
        again.wait_open()
        converse(again, peer)


@pytest.mark.parametrize("status", [False, True])
def test_qemu_pauses_and_goes_on(pair: Pair, status: bool) -> None:
    """A guest that QEMU stops and continues finds its console as it was, open."""
    protocol = FRONTEND_FEATURES if status else FRONTEND_FEATURES & ~ProtocolFeature.STATUS
    with GuestMemory.like_qemu() as memory:
        frontend = connect_like_qemu(
            pair.daemon.sockets[0], memory, protocol=protocol, timeout=WITHIN
        )
        with frontend, attach(pair.daemon) as peer:
            console = ConsoleDriver(frontend)
            console.wait_open()
            converse(console, peer)
            pause_like_qemu(frontend)
            peer.sendall(b"while it was paused\n")
            resume_like_qemu(frontend, memory)
            console.read_until(b"while it was paused\n")
            converse(console, peer)


def test_nothing_is_said_to_a_guest_that_stands_still(daemon: StartDaemon) -> None:
    """A new size is told once a ring runs again, not while the device is suspended."""
    running = daemon("unix", 1)
    with GuestMemory.like_qemu() as memory:
        frontend = connect_like_qemu(
            running.sockets[0], memory, features=TWO_QUEUES, queue_count=2, timeout=WITHIN
        )
        with frontend:
            pause_like_qemu(frontend)
            guest = running.status()[0]["name"]
            done = command(running.folder, "resize", guest, "132x43")
            assert done.returncode == 0, done.stderr
            wait_port(running, columns=132)
            frontend.barrier()
            frontend.take_backend()
            assert frontend.config_changes == 0
            resume_like_qemu(frontend, memory)
            frontend.recv_backend()
            assert frontend.config_changes == 1
            assert struct.unpack_from("<HH", frontend.get_config(0, 4)) == (132, 43)


def test_address_before_memory(frontend: Frontend) -> None:
    """A ring cannot lie in memory that was not given."""
    frontend.set_vring_num(0, 64)
    refused(lambda: frontend.set_vring_addr(0, 0x1000, 0x2000, 0x3000))


def test_kick_before_address(frontend: Frontend) -> None:
    """A ring without addresses does not start."""
    frontend.set_vring_num(0, 64)
    with eventfd() as fd:
        refused(lambda: frontend.set_vring_kick(0, fd))


def test_address_before_size(frontend: Frontend) -> None:
    """A ring without a size has no room to check."""
    with GuestMemory() as memory:
        frontend.set_memory(memory)
        start = memory.regions()[0][0].user_addr
        refused(lambda: frontend.set_vring_addr(0, start, start + PAGE, start + 2 * PAGE))


_USER = 0x7000_0000_0000
_SIZE = 1 << 20


@pytest.mark.parametrize(
    ("desc", "used", "avail"),
    [
        (_USER - 1024, _USER + PAGE, _USER + 2 * PAGE),
        (_USER + _SIZE - 512, _USER + PAGE, _USER + 2 * PAGE),
        (_USER, _USER + _SIZE - 256, _USER + 2 * PAGE),
        (_USER, _USER + PAGE, _USER + _SIZE - 64),
        (_USER, _USER + _SIZE, _USER + PAGE),
        (0, _USER, _USER + PAGE),
        ((1 << 64) - 1024, _USER, _USER + PAGE),
        (_USER + 8, _USER + PAGE, _USER + 2 * PAGE),
        (_USER, _USER + PAGE + 2, _USER + 2 * PAGE),
        (_USER, _USER + PAGE, _USER + 2 * PAGE + 1),
    ],
    ids=[
        "before the region",
        "descriptors past the end",
        "used past the end",
        "available past the end",
        "at the end",
        "nowhere",
        "at the top of the address space",
        "misaligned descriptors",
        "misaligned used",
        "misaligned available",
    ],
)
def test_ring_outside_memory(frontend: Frontend, desc: int, used: int, avail: int) -> None:
    """A ring that is not wholly within a region, or misaligned, is refused."""
    with GuestMemory([Region(0, _SIZE, _USER, 0)]) as memory:
        frontend.set_memory(memory)
        frontend.set_vring_num(0, 64)
        refused(lambda: frontend.set_vring_addr(0, desc, used, avail))
        frontend.set_vring_addr(0, _USER, _USER + PAGE, _USER + 2 * PAGE)


_TOP = 1 << 64


@pytest.mark.parametrize(
    "regions",
    [
        [Region(0, _SIZE, _USER, 0), Region(_SIZE - PAGE, PAGE, 0, 0)],
        [Region(0, _SIZE, _USER, 0), Region(_SIZE, PAGE, _USER + _SIZE - PAGE, 0)],
        [Region(0, _SIZE, _USER, 0)] * 2,
        [Region(_TOP - PAGE, _SIZE, _USER, 0)],
        [Region(0, _SIZE, _TOP - PAGE, 0)],
        [Region(0, _SIZE + PAGE, _USER, 0)],
        [Region(0, _SIZE, _USER, PAGE)],
        [Region(0, 1 << 62, _USER, 0)],
        [Region(0, _TOP - PAGE, 0, PAGE)],
    ],
    ids=[
        "guest addresses overlap",
        "frontend addresses overlap",
        "the same twice",
        "past the guest's last address",
        "past the frontend's last address",
        "bigger than the file",
        "past the end of the file",
        "2^62 bytes",
        "nearly 2^64 bytes",
    ],
)
def test_impossible_memory(pair: Pair, frontend: Frontend, regions: list[Region]) -> None:
    """A memory table that cannot be is refused whole: nothing of it stays mapped."""
    held = footprint(pair.worker)
    fd = os.memfd_create("memory")
    try:
        os.ftruncate(fd, _SIZE)
        refused(
            lambda: frontend.tell(
                Request.SET_MEM_TABLE, encode_regions(regions), [fd] * len(regions)
            )
        )
    finally:
        os.close(fd)
    assert footprint(pair.worker) == held


def test_read_only_memory(frontend: Frontend) -> None:
    """Memory that cannot be written is refused."""
    fd = os.memfd_create("memory")
    try:
        os.ftruncate(fd, _SIZE)
        with open_path(f"/proc/self/fd/{fd}") as read_only:
            payload = encode_regions([Region(0, _SIZE, _USER, 0)])
            refused(lambda: frontend.tell(Request.SET_MEM_TABLE, payload, [read_only]))
    finally:
        os.close(fd)


def test_refused_memory_leaves_the_old(pair: Pair) -> None:
    """After a refused memory table the rings run on in the one before."""
    with boot(pair.daemon) as console, attach(pair.daemon) as peer:
        payload = encode_regions([])
        refused(lambda: console.frontend.tell(Request.SET_MEM_TABLE, payload))
        converse(console, peer)


def test_memory_removed_under_a_ring(pair: Pair) -> None:
    """A table that takes away a running ring's memory is refused and that ring stopped."""
    with boot(pair.daemon) as console, GuestMemory([Region(0, PAGE, PAGE, 0)]) as other:
        refused(lambda: console.frontend.set_memory(other))
        tx = console.port.tx
        used = tx.driver.used_idx
        tx.driver.add([b"lost"])
        tx.driver.publish()
        tx.kick()
        console.frontend.barrier()
        assert tx.driver.used_idx == used
        assert console.frontend.get_vring_base(1) == used


def test_config_past_the_end(frontend: Frontend) -> None:
    """Reading past the configuration's end gets an empty answer, writing a refusal."""
    for offset, size in ((12, 1), (0, 13), (8, 5), (0xFFFF_FFFF, 1)):
        payload = ConfigSpan(offset, 0, bytes(size)).encode()
        assert frontend.request(Request.GET_CONFIG, payload).payload == b""
        refused(lambda payload=payload: frontend.tell(Request.SET_CONFIG, payload))


def test_no_reply_is_read(pair: Pair, frontend: Frontend) -> None:
    """A frontend that asks and asks and never reads is dropped; the worker does not wait."""
    data = encode(Request.GET_FEATURES) * 256
    with suppress(ConnectionError):
        while True:
            frontend.send_raw(data)
    pair.daemon.expect_log("does not read the replies")


def test_backend_channel_is_replaced(pair: Pair, frontend: Frontend) -> None:
    """Another backend channel takes the place of the one before, which is closed."""
    frontend.set_backend_req_fd()
    held = footprint(pair.worker)
    first, frontend.backend_channel = frontend.backend_channel, None
    assert first is not None
    with first:
        assert nothing_to_read(first)
        frontend.set_backend_req_fd()
        assert footprint(pair.worker) == held
        assert first.recv(1) == b""


def test_rings_that_nobody_kicks_are_polled(pair: Pair) -> None:
    """Without kick descriptors both directions work, until the rings are kicked again."""
    with attach(pair.daemon) as peer, boot(pair.daemon) as console:
        for index in (0, 1):
            console.frontend.set_vring_kick(index, None)
        for _ in range(3):
            console.port.tx.driver.add([b"polled"])
            console.port.tx.driver.publish()
            console.port.flush()
            assert receive_until(peer, b"polled") == b"polled"
            peer.sendall(b"typed")
            assert console.read(5) == b"typed"
        for index in (0, 1):
            queue = console.frontend.queues[index]
            console.frontend.set_vring_kick(index, queue.new_kick_fd())
        converse(console, peer)
