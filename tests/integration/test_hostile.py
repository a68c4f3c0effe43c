"""What else a frontend or a guest may do wrong, with rings of either format.

docs/robustness.md says for each kind of mistake which test shows it; these are those that no other
file is about.
"""

from __future__ import annotations

import fcntl
import os
import random
import select
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest
from scene import (
    Pair,
    attach,
    boot,
    converse,
    exactly,
    footprint,
    quiet_guest,
    status_of,
    wait_footprint,
)
from vhost_device_console.testing import (
    DRIVER_FEATURES,
    Buffer,
    ConsoleDriver,
    Feature,
    Frontend,
    GuestMemory,
    NackError,
    PackedDriver,
    Queue,
    RingDriver,
    SplitDriver,
    connect_like_qemu,
    connect_like_uml,
    make_driver,
)
from vhost_device_console.testing.driver import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE
from vhost_device_console.testing.packed import DESC_F_AVAIL, DESC_F_USED
from vhost_device_console.worker.vhost_user.message import (
    VRING_F_LOG,
    ConfigSpan,
    InflightArea,
    LogArea,
    Region,
    Request,
    StateTransfer,
    VringAddr,
    VringFd,
    VringState,
    encode,
    encode_region,
    encode_regions,
    encode_u64,
)

from conftest import StartDaemon
from launch import WITHIN, Daemon, until

RX, TX, CONTROL_RX, CONTROL_TX = range(4)
PAGE = 4096
MOST_FDS = 253
SPLIT = DRIVER_FEATURES
PACKED = DRIVER_FEATURES | Feature.RING_PACKED
FORMATS = pytest.mark.parametrize("features", [SPLIT, PACKED], ids=["split", "packed"])

#: Where the mock's guest memory lies: that of `GuestMemory()`.
GUEST, USER, SIZE = 0x4000_0000, 0x7F00_0000_0000, 16 << 20


@pytest.fixture
def frontend(pair: Pair) -> Iterator[Frontend]:
    """Give a frontend of the first guest that has agreed on features, no more."""
    with Frontend(pair.daemon.sockets[0], timeout=WITHIN) as frontend:
        frontend.negotiate()
        yield frontend


@pytest.fixture
def fd() -> Iterator[int]:
    """Give a descriptor that can be waited on."""
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


@contextmanager
def memfd(size: int, *, sealed: bool = False) -> Iterator[int]:
    """Give a memory file; one that is `sealed` takes no seal any more."""
    fd = os.memfd_create("memory", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        if sealed:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL)
        yield fd
    finally:
        os.close(fd)


def refused(do: Callable[[], Any]) -> None:
    with pytest.raises(NackError):
        do()


# Descriptors

#: Messages that are acknowledged, or have no answer, with something that could be carried out.
TOLD: dict[int, bytes] = {
    Request.SET_FEATURES: encode_u64(0),
    Request.SET_OWNER: b"",
    Request.RESET_OWNER: b"",
    Request.SET_VRING_NUM: VringState(0, 64).encode(),
    Request.SET_VRING_BASE: VringState(0, 0).encode(),
    Request.SET_VRING_ADDR: VringAddr(0, 0, 0, 0, 0, 0).encode(),
    Request.SET_VRING_ENABLE: VringState(0, 1).encode(),
    Request.SET_CONFIG: ConfigSpan(0, 0, bytes(4)).encode(),
    Request.RESET_DEVICE: b"",
    Request.SET_STATUS: encode_u64(1),
    Request.VRING_KICK: VringState(0, 0).encode(),
    Request.SEND_RARP: encode_u64(0),
    Request.IOTLB_MSG: bytes(40),
    Request.POSTCOPY_ADVISE: b"",
    41: b"",
    99: bytes(8),
}

#: Messages with an answer of their own, which cannot say no.
ANSWERED: dict[int, bytes] = {
    Request.GET_FEATURES: b"",
    Request.GET_PROTOCOL_FEATURES: b"",
    Request.GET_QUEUE_NUM: b"",
    Request.GET_VRING_BASE: VringState(0, 0).encode(),
    Request.GET_CONFIG: ConfigSpan(0, 0, bytes(4)).encode(),
    Request.GET_INFLIGHT_FD: InflightArea(0, 0, 4, 64).encode(),
    Request.GET_MAX_MEM_SLOTS: b"",
    Request.GET_STATUS: b"",
    Request.CHECK_DEVICE_STATE: b"",
}

#: Messages that carry a descriptor, one each.
WITH_FD: dict[int, bytes] = {
    Request.SET_MEM_TABLE: encode_regions([Region(0, PAGE, 0, 0)]),
    Request.ADD_MEM_REG: encode_region(Region(0, PAGE, 0, 0)),
    Request.SET_VRING_KICK: VringFd(0, True).encode(),
    Request.SET_VRING_CALL: VringFd(0, True).encode(),
    Request.SET_VRING_ERR: VringFd(0, True).encode(),
    Request.SET_BACKEND_REQ_FD: b"",
    Request.SET_LOG_FD: b"",
    Request.SET_INFLIGHT_FD: InflightArea(PAGE, 0, 1, 8).encode(),
}


@pytest.mark.parametrize("count", [1, MOST_FDS])
def test_fds_on_a_message_that_takes_none(
    pair: Pair, frontend: Frontend, fd: int, count: int
) -> None:
    """Every message that takes no descriptor is refused with one, and all of them are closed."""
    held = footprint(pair.worker)
    for request, payload in TOLD.items():
        frontend.send(request, payload, [fd] * count, need_reply=True)
        assert status_of(frontend, request) != 0, request
    wait_footprint(pair.worker, held)
    assert frontend.get_features() == frontend.offered


def test_fds_on_a_question(pair: Pair, fd: int) -> None:
    """A question with descriptors ends the connection: its answer has no room for a refusal."""
    for request, payload in ANSWERED.items():
        with Frontend(pair.daemon.sockets[0], timeout=WITHIN) as frontend:
            frontend.negotiate()
            frontend.send(request, payload, [fd] * MOST_FDS)
            frontend.wait_closed()
        wait_footprint(pair.worker, pair.held)


def test_fds_inside_any_message(pair: Pair, frontend: Frontend, fd: int) -> None:
    """Descriptors that come with a payload are closed, and the message is refused."""
    held = footprint(pair.worker)
    for request, payload in (TOLD | WITH_FD).items():
        data = encode(request, payload, need_reply=True)
        for at in (12, 13) if payload else ():
            frontend.send_raw(data[:at])
            frontend.send_raw(data[at:], [fd])
            assert status_of(frontend, request) != 0, (request, at)
    wait_footprint(pair.worker, held)
    assert frontend.get_features() == frontend.offered


@pytest.mark.parametrize("count", [0, 2, MOST_FDS])
def test_another_number_of_fds_than_a_message_has(
    pair: Pair, frontend: Frontend, fd: int, count: int
) -> None:
    """A message that came without its descriptor, or with more, is refused."""
    held = footprint(pair.worker)
    for request, payload in WITH_FD.items():
        frontend.send(request, payload, [fd] * count, need_reply=True)
        assert status_of(frontend, request) != 0, request
    transfer = StateTransfer(0, 0).encode()
    frontend.send(Request.SET_DEVICE_STATE_FD, transfer, [fd] * count)
    assert frontend.reply_to(Request.SET_DEVICE_STATE_FD).payload == encode_u64(0x101)
    wait_footprint(pair.worker, held)
    frontend.send(Request.SET_LOG_BASE, LogArea(1 << 20, 0).encode(), [fd] * count)
    frontend.wait_closed()


def _write_end() -> tuple[int, list[int]]:
    read, write = os.pipe()
    return write, [read]


def _listening() -> tuple[int, list[int]]:
    listener = socket.socket(socket.AF_UNIX)
    with socket.socket(socket.AF_UNIX) as caller:
        listener.bind("")  # a name of the system's choice
        listener.listen()
        caller.connect(listener.getsockname())
    return listener.detach(), []


def _pidfd() -> tuple[int, list[int]]:
    with subprocess.Popen(["true"]) as child:
        return os.pidfd_open(child.pid), []


def _nested_epoll() -> tuple[int, list[int]]:
    inner = os.eventfd(1)
    epoll = select.epoll()
    epoll.register(inner, select.EPOLLIN)
    outer = os.dup(epoll.fileno())
    epoll.close()
    return outer, [inner]


@pytest.mark.parametrize("make", [_write_end, _listening, _pidfd, _nested_epoll])
def test_a_kick_fd_that_cannot_be_read(
    pair: Pair, make: Callable[[], tuple[int, list[int]]]
) -> None:
    """A kick descriptor that gives nothing, ready or not, kicks nobody and stops nothing."""
    with boot(pair.daemon) as console, attach(pair.daemon) as peer:
        kick, others = make()
        console.frontend.set_vring_kick(TX, kick)
        for other in [kick, *others]:
            os.close(other)
        peer.sendall(b"typed")
        assert console.read(5) == b"typed"
        console.frontend.set_vring_kick(TX, console.port.tx.new_kick_fd())
        converse(console, peer)


def test_whatever_is_set_is_given_back_when_it_is_set_again(pair: Pair, fd: int) -> None:
    """Thousands of messages that each keep something keep no more than the last of them."""
    with boot(pair.daemon) as console, memfd(1 << 20) as file:
        frontend = console.frontend
        high = Region(1 << 40, 1 << 20, 1 << 40, 0)
        log = LogArea(1 << 18, 0)  # reaches to 8 GiB
        add, remove = (
            encode(request, encode_region(high))
            for request in (Request.ADD_MEM_REG, Request.REM_MEM_REG)
        )
        ours, theirs = socket.socketpair()

        def round_() -> None:
            frontend.send_raw(add, [file])
            frontend.send_raw(remove)
            for request in (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR):
                for index in (0, 1, 255):
                    if request != Request.SET_VRING_KICK or index != 255:
                        frontend.send_raw(encode(request, VringFd(index, True).encode()), [fd])
            frontend.send_raw(encode(Request.SET_BACKEND_REQ_FD), [theirs.fileno()])
            frontend.send_raw(encode(Request.SET_LOG_FD), [fd])
            area = InflightArea(PAGE, 0, 1, 8)
            frontend.send_raw(encode(Request.SET_INFLIGHT_FD, area.encode()), [file])
            frontend.set_log_base(log, file)

        with ours, theirs:
            round_()
            frontend.barrier()
            held = footprint(pair.worker)
            for _ in range(500):
                round_()
            frontend.barrier()
            wait_footprint(pair.worker, held)


# Describing rings


@pytest.mark.parametrize("size", [0, 32769, 65536 + 64, 0xFFFF_FFFF])
def test_a_packed_ring_of_no_size_it_can_have(frontend: Frontend, size: int) -> None:
    """A packed ring has 1 to 32768 entries."""
    frontend.set_features(frontend.features | frontend.offered & Feature.RING_PACKED)
    refused(lambda: frontend.set_vring_num(0, size))
    frontend.set_vring_num(0, 3)


def test_a_running_packed_ring_is_not_changed(pair: Pair) -> None:
    """Size, base, place and format of a packed ring that runs are refused, and it goes on."""
    with boot(pair.daemon, features=PACKED) as console, attach(pair.daemon) as peer:
        frontend, driver = console.frontend, console.port.tx.driver
        user = driver.memory.user_addr
        refused(lambda: frontend.set_vring_num(TX, 32))
        refused(lambda: frontend.set_vring_base(TX, 0x8000_8000))
        refused(
            lambda: frontend.set_vring_addr(
                TX, user(driver.desc_addr), user(driver.used_addr) + 64, user(driver.avail_addr)
            )
        )
        for changed in (Feature.RING_PACKED, Feature.EVENT_IDX, Feature.INDIRECT_DESC):
            refused(lambda changed=changed: frontend.set_features(PACKED & ~changed))
        converse(console, peer)


@pytest.mark.parametrize(
    ("desc", "used", "avail"),
    [
        (USER - 16, USER + PAGE, USER + 2 * PAGE),
        (USER + SIZE - 1023, USER + PAGE, USER + 2 * PAGE),
        (USER, USER + SIZE - 2, USER + 2 * PAGE),
        (USER, USER + PAGE, USER + SIZE),
        (0, USER, USER + PAGE),
        (USER, (1 << 64) - 4, USER + PAGE),
        (USER + 8, USER + PAGE, USER + 2 * PAGE),
        (USER, USER + PAGE + 2, USER + 2 * PAGE),
        (USER, USER + PAGE, USER + 2 * PAGE + 2),
    ],
    ids=[
        "before the region",
        "descriptors past the end",
        "device event past the end",
        "driver event at the end",
        "nowhere",
        "at the top of the address space",
        "misaligned descriptors",
        "misaligned device event",
        "misaligned driver event",
    ],
)
def test_a_packed_ring_outside_memory(frontend: Frontend, desc: int, used: int, avail: int) -> None:
    """A packed ring that is not wholly within a region, or misaligned, is refused."""
    with GuestMemory() as memory:
        frontend.set_features(frontend.features | Feature.RING_PACKED)
        frontend.set_memory(memory)
        frontend.set_vring_num(0, 64)
        refused(lambda: frontend.set_vring_addr(0, desc, used, avail))
        frontend.set_vring_addr(0, USER, USER + PAGE, USER + 2 * PAGE)


@FORMATS
def test_a_ring_across_two_regions(pair: Pair, features: int) -> None:
    """A ring lies in one region, though the next one goes on where that ends."""
    low = Region(0, PAGE, USER, 0)
    high = Region(PAGE, PAGE, USER + PAGE, 0)
    with (
        GuestMemory([low, high]) as memory,
        Frontend(pair.daemon.sockets[0], timeout=WITHIN) as frontend,
    ):
        frontend.negotiate(features)
        frontend.set_memory(memory)
        frontend.set_vring_num(0, 64)
        refused(lambda: frontend.set_vring_addr(0, USER + PAGE - 512, USER, USER + 1024))
        frontend.set_vring_addr(0, USER + PAGE, USER, USER + 1024)


def test_a_base_that_is_no_place_in_a_packed_ring(pair: Pair, fd: int) -> None:
    """A packed ring does not start at an entry that it has not, whenever that is said."""
    with (
        GuestMemory() as memory,
        Frontend(pair.daemon.sockets[0], timeout=WITHIN) as frontend,
    ):
        frontend.negotiate(PACKED)
        frontend.set_memory(memory)
        frontend.set_vring_num(0, 64)
        place = (0, USER, USER + PAGE, USER + 2 * PAGE)
        frontend.set_vring_base(0, 0x8040_8040)
        refused(lambda: frontend.set_vring_addr(*place))
        frontend.set_vring_base(0, 0x803F_803F)
        frontend.set_vring_addr(*place)
        frontend.set_vring_base(0, 0xFFFF_FFFF)
        refused(lambda: frontend.set_vring_kick(0, fd))
        frontend.set_vring_base(0, 0x8000_8000)
        frontend.set_vring_kick(0, fd)


# Memory

IMPOSSIBLE = {
    "bigger than the file": Region(0, (1 << 20) + PAGE, USER, 0),
    "past the end of the file": Region(0, 1 << 20, USER, PAGE),
    "2^62 bytes": Region(0, 1 << 62, USER, 0),
    "past the guest's last address": Region((1 << 64) - PAGE, 1 << 20, USER, 0),
    "past the frontend's last address": Region(0, 1 << 20, (1 << 64) - PAGE, 0),
    "past the file's last offset": Region(0, 1 << 20, USER, (1 << 64) - PAGE),
    "no bytes": Region(0, 0, USER, 0),
}


@pytest.mark.parametrize("region", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_a_slot_that_cannot_be(pair: Pair, frontend: Frontend, region: Region) -> None:
    """A region to be added that cannot be is refused, and nothing of it stays mapped."""
    held = footprint(pair.worker)
    with memfd(1 << 20) as file:
        refused(lambda: frontend.add_mem_reg(region, file))
    wait_footprint(pair.worker, held)


def test_a_slot_that_cannot_be_written(frontend: Frontend) -> None:
    """A region to be added whose descriptor only reads is refused."""
    with memfd(1 << 20) as file:
        read_only = os.open(f"/proc/self/fd/{file}", os.O_RDONLY)
        try:
            refused(lambda: frontend.add_mem_reg(Region(0, 1 << 20, USER, 0), read_only))
        finally:
            os.close(read_only)


@pytest.mark.parametrize("by_slot", [False, True], ids=["table", "slots"])
@FORMATS
def test_memory_taken_from_some_rings(pair: Pair, features: int, by_slot: bool) -> None:
    """Rings whose memory goes are stopped, and the message refused; the others run on in theirs."""
    low = Region(0, 1 << 22, USER, 0)
    high = Region(1 << 32, 1 << 20, USER + (1 << 32), 0)
    with (
        GuestMemory([low, high]) as memory,
        Frontend(pair.daemon.sockets[0], timeout=WITHIN) as frontend,
        attach(pair.daemon) as peer,
    ):
        frontend.negotiate(features)
        frontend.add_memory(memory)
        for index in range(4):
            if index == TX:
                tx = in_region(memory, features, 1)
                frontend.start_queue(index, tx)
            else:
                frontend.start_queue(index, in_region(memory, features, 0))
        console = ConsoleDriver(frontend, buffers=16)
        console.wait_open()
        base = tx.base
        if by_slot:
            refused(lambda: frontend.rem_mem_reg(high))
        else:
            payload = encode_regions([low])
            fds = [fd for region, fd in memory.regions() if region == low]
            refused(lambda: frontend.tell(Request.SET_MEM_TABLE, payload, fds))
        peer.sendall(b"typed")
        assert console.read(5) == b"typed"
        frontend.queues[TX].kick()
        assert frontend.get_vring_base(TX) == base


def in_region(memory: GuestMemory, features: int, region: int) -> RingDriver:
    """Return a ring of 64 entries that is all in one region."""
    place = {name: memory.alloc(PAGE, 16, region=region) for name in ("desc", "avail", "used")}
    kind = PackedDriver if features & Feature.RING_PACKED else SplitDriver
    return kind(memory, 64, **place)


@pytest.mark.parametrize("by_slot", [False, True], ids=["table", "slots"])
def test_memory_in_use_cannot_shrink(pair: Pair, by_slot: bool) -> None:
    """A memory file that takes a seal gets it: nobody can cut it short under the worker."""
    protocol = {} if by_slot else {"connect": connect_like_uml}
    with boot(pair.daemon, **protocol) as console, attach(pair.daemon) as peer:
        ((_, file),) = console.port.tx.driver.memory.regions()
        with pytest.raises(PermissionError):
            os.ftruncate(file, PAGE)
        converse(console, peer)


@pytest.mark.parametrize("what", ["memory", "area in flight"])
@FORMATS
def test_memory_that_shrinks(daemon: StartDaemon, features: int, what: str) -> None:
    """A frontend that cuts its files short loses its worker, and the log says why."""
    running = daemon("unix", 2, "--packed")
    with (
        boot(running, 1) as other,
        attach(running, 1) as watcher,
        GuestMemory() as memory,
        memfd(1 << 16, sealed=True) as area,
    ):
        ((_, file),) = memory.regions()
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL)
        bystander = running.workers()[1]
        with Frontend(running.sockets[0], timeout=WITHIN) as frontend:
            frontend.negotiate(features & ~Feature.MULTIPORT)
            frontend.set_memory(memory)
            frontend.set_inflight_fd(InflightArea(1 << 16, 0, 2, 64), area)
            for index in (RX, TX):
                frontend.start_queue(index, make_driver(memory, 64, frontend.features))
            tx = frontend.queues[TX]
            tx.driver.add([b"last words"])
            os.ftruncate(area, 0)
            if what == "memory":
                os.ftruncate(file, 0)
            else:
                tx.driver.publish()
            tx.kick()
            frontend.wait_closed()
        running.expect_log(r"worker died: .*SIGBUS \(the frontend shrank its memory\)")
        converse(other, watcher)
        assert running.workers()[1] == bystander
        with boot(running) as console, attach(running) as peer:
            converse(console, peer)


# Packed rings that a hostile guest writes

Descriptors = list[tuple[int, int, int]]

#: Makes the descriptors of a bad chain; `way` is WRITE or 0, whichever the queue is for.
Bad = Callable[[GuestMemory, int], Descriptors]


def good(memory: GuestMemory) -> int:
    """Return the address of a buffer that there is."""
    return memory.alloc(PAGE, 16)


def table(memory: GuestMemory, *entries: tuple[int, int, int]) -> tuple[int, int]:
    """Write an indirect table; return its address and size."""
    data = b"".join(struct.pack("<QIHH", addr, size, 0, flags) for addr, size, flags in entries)
    place = memory.alloc(max(len(data), 32))
    memory.write(place, data)
    return place, len(data)


def indirect(*entries: tuple[int | None, int, int], size: int | None = None) -> Bad:
    """Return what makes an indirect table of these entries; None is a good buffer."""

    def make(memory: GuestMemory, way: int) -> Descriptors:
        filled = [
            (good(memory) if addr is None else addr, length, more ^ way)
            for addr, length, more in entries
        ]
        place, length = table(memory, *filled)
        return [(place, length if size is None else size, DESC_F_INDIRECT)]

    return make


def nested(memory: GuestMemory, way: int) -> Descriptors:
    inner = table(memory, (good(memory), 8, way))
    return [(*table(memory, (*inner, DESC_F_INDIRECT)), DESC_F_INDIRECT)]


def in_a_list(memory: GuestMemory, way: int) -> Descriptors:
    inner = table(memory, (good(memory), 8, way))
    return [(good(memory), 8, DESC_F_NEXT | way), (*inner, DESC_F_INDIRECT)]


def chained_on(memory: GuestMemory, way: int) -> Descriptors:
    inner = table(memory, (good(memory), 8, way))
    return [(*inner, DESC_F_INDIRECT | DESC_F_NEXT), (good(memory), 8, way)]


def one(addr: int, size: int, flags: int = 0) -> Bad:
    return lambda _memory, way: [(addr, size, flags | way)]


#: What is offered, and what the log says of it.
HOSTILE: dict[str, tuple[Bad, str]] = {
    "a chain without an end": (
        lambda memory, way: [(good(memory), 8, DESC_F_NEXT | way)] * 64,
        "loop",
    ),
    "a chain that goes on where nothing is": (
        lambda memory, way: [(good(memory), 8, DESC_F_NEXT | way)],
        "nothing is available",
    ),
    "indirect in indirect": (nested, "indirect"),
    "indirect in a list": (in_a_list, "indirect"),
    "indirect with a list": (chained_on, "indirect"),
    "indirect of 17 bytes": (indirect((None, 8, 0), size=17), "table of 17 bytes"),
    "indirect of no bytes": (indirect((None, 8, 0), size=0), "table of 0 bytes"),
    "indirect of 2^32 - 16 bytes": (indirect((None, 8, 0), size=0xFFFF_FFF0), "4294967280 bytes"),
    "indirect table nowhere": (one(1 << 60, 16, DESC_F_INDIRECT), "in no memory region"),
    "indirect into nowhere": (indirect((1 << 60, 8, 0)), "in no memory region"),
    "a buffer that wraps": (one((1 << 64) - 8, 16), "in no memory region"),
    "a buffer nowhere": (one(0x1000, 16), "in no memory region"),
    "a buffer past the end": (one(GUEST + SIZE - 8, 16), "in no memory region"),
    "a buffer of 2^32 - 1 bytes": (
        one(GUEST, 0xFFFF_FFFF),
        "more than 1048576 bytes|in no memory region",
    ),
    "longer than the cap": (
        indirect(*[(GUEST, PAGE, 0)] * 256, (GUEST, 1, 0)),
        "more than 1048576 bytes",
    ),
    "the other direction": (
        lambda memory, way: [(good(memory), 8, way ^ DESC_F_WRITE)],
        "only the other kind",
    ),
    "the other direction later": (
        lambda memory, way: [
            (good(memory), 8, DESC_F_NEXT | way),
            (good(memory), 8, way ^ DESC_F_WRITE),
        ],
        "only the other kind",
    ),
    "the other direction in a table": (
        indirect((None, 8, DESC_F_WRITE), (None, 8, 0)),
        "only the other kind",
    ),
}


@contextmanager
def broken(pair: Pair, console: ConsoleDriver, index: int, why: str = "") -> Iterator[Queue]:
    """Check that queue `index` breaks within: signalled once, counted once, and left alone."""
    queue = console.frontend.queues[index]
    counted = pair.daemon.status()[0]["broken"]
    error = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        console.frontend.set_vring_err(index, error)
        base = queue.driver.base
        yield queue
        assert select.select([error], [], [], WITHIN)[0], "no error was signalled"
        queue.kick()
        console.frontend.barrier()
        assert os.eventfd_read(error) == 1
        assert queue.driver.base == base
        assert console.frontend.get_vring_base(index) == base
    finally:
        os.close(error)
    pair.daemon.expect_log(rf"queue {index} is broken and stopped: .*{why}")
    pair.daemon.until(lambda guests: guests[0]["broken"] == counted + 1, "not counted once")


def offer(queue: Queue, descriptors: Descriptors) -> None:
    """Show the device these descriptors, and kick."""
    assert isinstance(queue.driver, PackedDriver)
    queue.driver.offer(descriptors)
    queue.driver.publish()
    queue.kick()


def typed(console: ConsoleDriver, peer: socket.socket) -> None:
    """Check that input arrives at a guest that has no buffers."""
    peer.sendall(b"typed")
    rx = console.port.rx
    rx.driver.add(writable=[16])
    rx.notify()
    assert rx.wait(WITHIN)[0].data == b"typed"


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_packed_rings(pair: Pair, name: str) -> None:
    """Each queue with such a packed ring is stopped, the others go on, and no input is lost."""
    bad, why = HOSTILE[name]
    with attach(pair.daemon) as peer:
        with quiet_guest(pair, PACKED) as console:
            memory = console.port.tx.driver.memory
            with broken(pair, console, CONTROL_TX, why) as queue:
                offer(queue, bad(memory, 0))
            console.multiport = False  # its dialogue is over
            console.write(b"written")
            assert exactly(peer, 7) == b"written"
            with broken(pair, console, TX, why) as queue:
                offer(queue, bad(memory, 0))
            typed(console, peer)
            if name == "longer than the cap":  # there is none for a buffer to be filled
                return
            peer.sendall(b"kept")
            with broken(pair, console, RX, why) as queue:
                offer(queue, bad(memory, DESC_F_WRITE))
        with boot(pair.daemon, features=PACKED) as console:
            assert console.read(4) == b"kept"


def test_indirect_never_negotiated_in_a_packed_ring(pair: Pair) -> None:
    """An indirect table that the guest did not say it would use stops the queue."""
    with (
        quiet_guest(pair, PACKED & ~Feature.INDIRECT_DESC) as console,
        broken(pair, console, TX, "indirect") as tx,
    ):
        offer(tx, indirect((None, 8, 0))(tx.driver.memory, 0))


def test_a_packed_ring_goes_round_before_its_guest_errs(pair: Pair) -> None:
    """A mistake on a later lap stops the queue where it is, with all before it completed."""
    with attach(pair.daemon) as peer, quiet_guest(pair, PACKED) as console:
        console.write(bytes(100), chunk=1)
        assert exactly(peer, 100) == bytes(100)
        with broken(pair, console, TX, "loop") as tx:
            offer(tx, HOSTILE["a chain without an end"][0](tx.driver.memory, 0))


def test_good_buffers_before_a_bad_one_in_a_packed_ring(pair: Pair) -> None:
    """What was whole before the mistake is completed and shown."""
    with attach(pair.daemon) as peer, quiet_guest(pair, PACKED) as console:
        driver = console.port.tx.driver
        assert isinstance(driver, PackedDriver)
        good_ones = [driver.add([b"%d" % number]) for number in range(5)]
        driver.offer(one(0, 1)(driver.memory, 0))
        driver.publish()
        console.port.tx.kick()
        assert exactly(peer, 5) == b"01234"
        reaped: list[Any] = []
        until(lambda: reaped.extend(driver.reap()) or len(reaped) == 5, "they never came back")
        assert [used.chain for used in reaped] == good_ones
        assert console.frontend.get_vring_base(TX) == 0x8005_8005


@FORMATS
def test_a_broken_queue_stays_so_in_new_memory(pair: Pair, features: int) -> None:
    """A memory table does not bring a broken queue back; setting it up anew does."""
    with attach(pair.daemon) as peer, quiet_guest(pair, features) as console:
        frontend, tx = console.frontend, console.port.tx
        memory = tx.driver.memory
        with broken(pair, console, TX):
            chain = tx.driver.add_buffers([Buffer(0, 1, False)])
            tx.driver.publish()
            tx.kick()
            until(lambda: pair.daemon.status()[0]["broken"], "not broken")
            frontend.set_memory(memory)
        del tx.driver.pending[chain.head]
        tx.driver.reset()
        frontend.start_queue(TX, tx.driver)
        console.write(b"again")
        assert exactly(peer, 5) == b"again"


def test_empty_buffers_in_packed_rings(pair: Pair) -> None:
    """Buffers without bytes come back with 0, whatever their address; nothing spins."""
    with attach(pair.daemon) as peer, quiet_guest(pair, PACKED) as console:
        tx, rx, control = (console.frontend.queues[index] for index in (TX, RX, CONTROL_TX))
        for queue, flag in ((tx, False), (control, False), (rx, True)):
            queue.driver.add_buffers([Buffer(1 << 60, 0, flag)] * 3)
            queue.driver.add_buffers([Buffer(0, 0, flag)])
        rx.driver.add(writable=[0, 4])
        for queue in (tx, control, rx):
            queue.notify()
        for queue in (tx, control):
            got: list[Any] = []
            until(lambda q=queue, g=got: g.extend(q.driver.reap()) or len(g) == 2, "empty buffers")
            assert [used.length for used in got] == [0, 0]
        peer.sendall(b"read")
        filled: list[Any] = []
        until(lambda: filled.extend(rx.driver.reap()) or len(filled) == 3, "input")
        assert [used.length for used in filled] == [0, 0, 4]


def test_a_buffer_across_adjacent_regions_of_a_packed_ring(pair: Pair) -> None:
    """A buffer may lie in two regions that touch, for a chain's sake; across a hole it may not."""
    half = 1 << 20
    regions = [
        Region(0, half, 0x7000_0000, 0),
        Region(half, half, 0x9000_0000, PAGE),
        Region(2 * half + PAGE, PAGE, 0xA000_0000, 0),
    ]
    with (
        GuestMemory(regions) as memory,
        connect_like_qemu(
            pair.daemon.sockets[0], memory, features=PACKED, timeout=WITHIN
        ) as frontend,
        attach(pair.daemon) as peer,
    ):
        console = ConsoleDriver(frontend, buffers=8)
        console.wait_open()
        tx = console.port.tx
        memory.write(half - 5, b"0123456789")
        tx.driver.add_buffers([Buffer(half - 5, 10, False)])
        tx.notify()
        assert exactly(peer, 10) == b"0123456789"
        console.port.flush()
        with broken(pair, console, TX, "in no memory region"):
            offer(tx, [(2 * half - 5, PAGE + 10, 0)])


def test_packed_descriptors_that_change_all_the_time(pair: Pair) -> None:
    """A guest that rewrites descriptors while they are read only harms its own queue."""
    with attach(pair.daemon) as peer, quiet_guest(pair, PACKED) as console:
        tx = console.port.tx
        driver = tx.driver
        assert isinstance(driver, PackedDriver)
        buffer = good(driver.memory)
        for turn in range(300):
            lap = DESC_F_USED if turn & 1 else DESC_F_AVAIL
            for at in range(64):
                driver.write_desc(at, buffer, 8, at, lap)
            tx.kick()
            for at in range(64):
                driver.write_desc(at, 1 << 60, 0xFFFF_FFFF, 99, DESC_F_NEXT | lap)
                driver.write_desc(at, buffer, 8, at, lap)
        console.frontend.barrier()
        typed(console, peer)


def test_used_descriptors_rewritten(pair: Pair) -> None:
    """What the guest writes over used descriptors of a packed ring is not believed."""
    with attach(pair.daemon) as peer, quiet_guest(pair, PACKED) as console:
        tx = console.port.tx
        assert isinstance(tx.driver, PackedDriver)
        for number in range(3):
            tx.driver.add([b"%d" % number])
            tx.notify()
            tx.wait(WITHIN)
            tx.driver.write_desc(number, 1 << 60, 0xFFFF_FFFF, 99, 0xFFFF)
        tx.driver.add([b"still here"])
        tx.notify()
        assert exactly(peer, 13) == b"012still here"


@FORMATS
def test_a_ring_whose_parts_overlap(pair: Pair, features: int) -> None:
    """A ring that lies over itself harms nothing but itself."""
    with attach(pair.daemon) as peer, quiet_guest(pair, features) as console:
        frontend, memory = console.frontend, console.port.tx.driver.memory
        frontend.get_vring_base(TX)
        place = memory.alloc(PAGE, PAGE)
        user = memory.user_addr(place)
        frontend.set_vring_addr(TX, user, user, user)
        for word in (0x0080_0000_0000_0008, 0xFFFF_FFFF_FFFF_FFFF, 0x0001_0000_0001_0000):
            memory.write(place, struct.pack("<Q", word) * (PAGE // 8))
            frontend.set_vring_kick(TX, console.port.tx.new_kick_fd())
            console.port.tx.kick()
            typed(console, peer)
            frontend.get_vring_base(TX)


@FORMATS
def test_input_into_the_rings_themselves(pair: Pair, features: int) -> None:
    """A guest whose input buffers are its own rings gets what it asked for, and no other does."""
    with attach(pair.daemon) as peer, quiet_guest(pair, features) as console:
        rx, tx = console.port.rx, console.port.tx
        for addr in (rx.driver.desc_addr, rx.driver.avail_addr, rx.driver.used_addr):
            rx.driver.add_buffers([Buffer(addr, 4 if addr % 16 else 1024, True)])
        rx.driver.add_buffers([Buffer(tx.driver.desc_addr, 1024, True)])
        rx.driver.publish()
        rx.kick()
        peer.sendall(b"\xff" * 4096)
        tx.kick()
        for _ in range(20):
            console.frontend.barrier()
        assert pair.daemon.status()[0]["worker"] == pair.worker


# The control queue of a packed guest


def test_control_messages_without_sense_in_packed_rings(pair: Pair) -> None:
    """Control messages that make no sense are ignored and returned, with no answer."""
    with attach(pair.daemon) as peer, boot(pair.daemon, features=PACKED) as console:
        console.control.clear()
        base = console.frontend.queues[CONTROL_RX].driver.base
        ignored = pair.daemon.status()[0]["ignored"]
        senseless = [
            b"",
            bytes(7),
            struct.pack("<IHH", 1, 3, 1),
            struct.pack("<IHH", 0xFFFF_FFFF, 6, 1),
            struct.pack("<IHH", 0, 0xFFFF, 1),
            struct.pack("<IHH", 0, 1, 1),
            bytes([255]) * (1 << 18),
        ]
        for message in senseless:
            console.send_control_raw(message)
        converse(console, peer)
        assert console.frontend.queues[CONTROL_RX].driver.base == base
        pair.daemon.until(
            lambda guests: guests[0]["ignored"] == ignored + len(senseless), "not all were counted"
        )


def test_longest_control_message_of_a_packed_ring(pair: Pair) -> None:
    """A control message of 1 MiB is returned as any other."""
    with attach(pair.daemon) as peer, boot(pair.daemon, features=PACKED) as console:
        control = console.frontend.queues[CONTROL_TX]
        buffer = control.driver.memory.alloc(1 << 16)
        control.driver.add_buffers([Buffer(buffer, 1 << 16, False)] * 16)
        control.notify()
        console.wait_until(lambda: console.control_idle, "the message back")
        converse(console, peer)


def test_control_flood_without_buffers_in_packed_rings(pair: Pair) -> None:
    """A guest that asks and asks and takes no answer gets its buffers, and few answers later."""
    with attach(pair.daemon) as peer, boot(pair.daemon, features=PACKED) as console:
        control, answers = (console.frontend.queues[i] for i in (CONTROL_TX, CONTROL_RX))
        for _ in range(2000):
            until(lambda: control.driver.reap() or control.driver.free, "control buffers")
            control.driver.add([struct.pack("<IHH", 0, 3, 1)])
            control.notify()
        until(lambda: control.driver.reap() or not control.driver.in_flight, "control buffers")
        console.control.clear()
        converse(console, peer)
        assert answers.driver.size <= len(console.control) <= answers.driver.size + 16


@FORMATS
def test_guest_bytes_that_steer_terminals(pair: Pair, features: int) -> None:
    """Escape sequences reach the client raw, and no line of the log."""
    steering = b"\x1b]52;c;aGk=\x07\x1b]0;title\x07\x1b[2J\x9b2J\xc2\x9b2J\x90q\x9c\r\n\0"
    with attach(pair.daemon) as peer, quiet_guest(pair, features) as console:
        console.write(steering)
        assert exactly(peer, len(steering)) == steering
        console.send_control_raw(struct.pack("<IHH", 0, 7, 1) + steering)
        tx = console.port.tx
        with broken(pair, console, TX, "in no memory region"):
            tx.driver.add_buffers([Buffer(0, 1, False)])
            tx.driver.publish()
            tx.kick()
    with pytest.raises(TimeoutError):
        pair.daemon.expect_log(r"\x1b|\x9b|\\x9b|\x90|\\x90", within=0)


# Buffers in flight, in packed rings


def word(at: int, value: int) -> Callable[[memoryview], None]:
    """Return what writes 16 bits into an area."""

    def do(area: memoryview) -> None:
        struct.pack_into("<H", area, at, value)

    return do


def every_entry(area: memoryview) -> None:
    area[32 : 32 + 32 * 8 : 32] = b"\1" * 8


def nothing_but_ones(area: memoryview) -> None:
    area[:] = b"\xff" * len(area)


#: What is wrong with the region of a ring of 8 entries (QueueRegionPacked).
DAMAGE: dict[str, Callable[[memoryview], None]] = {
    "another version": word(8, 2),
    "another number of entries": word(10, 9),
    "a free list with a loop": word(32 + 32 * 5 + 2, 4),
    "a free list that leaves the area": word(14, 0xFFFF),
    "a used index past the end": word(16, 8),
    "an old used index past the end": word(18, 0xFFFF),
    "a wrap counter of 2": word(20, 2),
    "every entry in flight": every_entry,
    "nothing but ones": nothing_but_ones,
}


@pytest.mark.parametrize("name", DAMAGE)
def test_an_area_of_packed_rings_that_makes_no_sense(pair: Pair, name: str) -> None:
    """Whatever an area holds, the ring goes on where it was, and what it holds is used anew."""
    features = PACKED & ~Feature.MULTIPORT
    with (
        GuestMemory() as memory,
        Frontend(pair.daemon.sockets[0], timeout=WITHIN) as frontend,
        attach(pair.daemon) as peer,
    ):
        drivers = [make_driver(memory, 8, features) for _ in range(2)]
        for turn in range(3):
            if turn:
                frontend.reconnect()
            frontend.negotiate(features)
            frontend.set_memory(memory)
            if not turn:
                frontend.get_inflight_fd(2, 8)
            assert frontend.inflight is not None
            area, fd = frontend.inflight
            if turn == 1:
                held = bytearray(os.pread(fd, area.size, 0))
                DAMAGE[name](memoryview(held)[area.size // 2 :])
                os.pwrite(fd, held, 0)
            frontend.set_inflight_fd(area, fd)
            tx = [frontend.start_queue(index, driver) for index, driver in enumerate(drivers)][TX]
            for count in range(5):
                data = b"%d %d" % (turn, count)
                tx.driver.add([data])
                tx.notify()
                assert exactly(peer, len(data)) == data
                tx.wait(WITHIN)
    pair.daemon.expect_log("queue 1 goes on where it was, what was in flight is not known")


# Whole conversations that make little sense


@FORMATS
def test_log_all_without_a_log(pair: Pair, features: int) -> None:
    """A guest with VHOST_F_LOG_ALL whose frontend gives no log is served, and nothing is logged."""
    with (
        boot(pair.daemon, features=features | Feature.LOG_ALL) as console,
        attach(pair.daemon) as peer,
    ):
        frontend = console.frontend
        assert frontend.features & Feature.LOG_ALL
        converse(console, peer)
        for index, queue in frontend.queues.items():
            driver = queue.driver
            user = driver.memory.user_addr
            frontend.set_vring_addr(
                index,
                user(driver.desc_addr),
                user(driver.used_addr),
                user(driver.avail_addr),
                (1 << 64) - 1,
                flags=VRING_F_LOG,
            )
        converse(console, peer)


@FORMATS
def test_a_log_event_that_cannot_be_signalled(pair: Pair, features: int) -> None:
    """A log's event that is full, and made to block, holds nothing up."""
    log = LogArea(-(-(GUEST + SIZE) // (8 * PAGE)), 0)
    with (
        boot(pair.daemon, features=features) as console,
        attach(pair.daemon) as peer,
        memfd(log.size) as bitmap,
    ):
        event = os.eventfd(0)
        try:
            os.eventfd_write(event, (1 << 64) - 2)
            console.frontend.set_log_fd(event)
            os.set_blocking(event, True)
            console.frontend.start_log(log, bitmap)
            for _ in range(10):
                converse(console, peer)
        finally:
            os.close(event)


@FORMATS
def test_rings_described_and_never_started(pair: Pair, fd: int, features: int) -> None:
    """Rings that never get their kick descriptor are left alone, and nothing of them stays."""
    with (
        GuestMemory() as memory,
        Frontend(pair.daemon.sockets[0], timeout=WITHIN) as frontend,
    ):
        frontend.negotiate(features)
        frontend.set_memory(memory)
        drivers = [make_driver(memory, 64, frontend.features) for _ in range(4)]
        for index, driver in enumerate(drivers):
            frontend.describe_queue(frontend.queue(index, driver))
            frontend.set_vring_call(index, fd)
            frontend.set_vring_err(index, fd)
            frontend.enable(index)
            driver.add([b"nobody sees this"])
            driver.publish()
        frontend.barrier()
        assert not any(driver.has_used() for driver in drivers)
        assert frontend.get_vring_base(TX) == drivers[TX].base


def start_without_a_size(frontend: Frontend, index: int, driver: RingDriver) -> None:
    """Start a ring as `Frontend.start_queue` does, but for SET_VRING_NUM."""
    queue = frontend.queue(index, driver)
    user = driver.memory.user_addr
    frontend.set_vring_base(index, driver.base)
    frontend.set_vring_addr(
        index, user(driver.desc_addr), user(driver.used_addr), user(driver.avail_addr)
    )
    frontend.give_call(queue, "eventfd")
    frontend.set_vring_kick(index, queue.new_kick_fd())
    frontend.enable(index)


@pytest.mark.parametrize(("before", "after"), [(SPLIT, PACKED), (PACKED, SPLIT)])
def test_a_format_chosen_after_the_sizes(pair: Pair, before: int, after: int) -> None:
    """Sizes that were told before the format was changed count for the new one."""
    with (
        GuestMemory() as memory,
        Frontend(pair.daemon.sockets[0], timeout=WITHIN) as frontend,
        attach(pair.daemon) as peer,
    ):
        frontend.negotiate(before)
        frontend.set_memory(memory)
        for index in range(4):
            frontend.set_vring_num(index, 64)
        frontend.set_features(frontend.offered & after)
        for index in range(4):
            start_without_a_size(frontend, index, make_driver(memory, 64, frontend.features))
        console = ConsoleDriver(frontend)
        console.wait_open()
        converse(console, peer)


@pytest.mark.parametrize("described", [False, True])
def test_a_packed_size_that_no_split_ring_has(pair: Pair, fd: int, described: bool) -> None:
    """A ring of 100 entries does not become a split one when the format is changed."""
    with (
        GuestMemory() as memory,
        Frontend(pair.daemon.sockets[0], timeout=WITHIN) as frontend,
    ):
        frontend.negotiate(PACKED)
        frontend.set_memory(memory)
        frontend.set_vring_num(0, 100)
        place = (0, USER, USER + PAGE, USER + 2 * PAGE)
        if described:
            frontend.set_vring_addr(*place)
        frontend.set_features(frontend.features & ~Feature.RING_PACKED)
        if not described:
            refused(lambda: frontend.set_vring_addr(*place))
        refused(lambda: frontend.set_vring_kick(0, fd))
        frontend.set_vring_num(0, 64)
        frontend.set_vring_addr(*place)
        frontend.set_vring_kick(0, fd)


def test_a_place_that_no_packed_ring_has(pair: Pair, fd: int) -> None:
    """An available ring that lies where no event structure can is refused when the ring starts."""
    with (
        GuestMemory() as memory,
        Frontend(pair.daemon.sockets[0], timeout=WITHIN) as frontend,
    ):
        frontend.negotiate(SPLIT)
        frontend.set_memory(memory)
        frontend.set_vring_num(0, 64)
        frontend.set_vring_addr(0, USER, USER + PAGE, USER + 2 * PAGE + 2)
        frontend.set_features(frontend.features | Feature.RING_PACKED)
        refused(lambda: frontend.set_vring_kick(0, fd))
        frontend.barrier()


def _by_base(frontend: Frontend) -> None:
    for index in range(4):
        frontend.stop_queue(index)


def _by_status(frontend: Frontend) -> None:
    frontend.set_status(0)


def _by_reset(frontend: Frontend) -> None:
    frontend.reset_device()


@pytest.mark.parametrize("stop", [_by_base, _by_status, _by_reset])
def test_a_guest_rebooted_into_another_driver(pair: Pair, stop: Callable[[Frontend], None]) -> None:
    """On one connection a guest may have split rings, then packed ones, and split ones again."""
    with (
        GuestMemory() as memory,
        Frontend(pair.daemon.sockets[0], timeout=WITHIN) as frontend,
        attach(pair.daemon) as peer,
    ):
        frontend.negotiate(SPLIT)
        frontend.set_memory(memory)
        for features in (SPLIT, PACKED, SPLIT, PACKED & ~Feature.EVENT_IDX):
            frontend.set_features(frontend.offered & features)
            for index in range(4):
                frontend.start_queue(index, make_driver(memory, 64, frontend.features))
            console = ConsoleDriver(frontend, buffers=8)
            console.wait_open()
            converse(console, peer)
            stop(frontend)


def test_all_queues_named_and_a_few_started(pair: Pair) -> None:
    """A frontend may tell of 256 queues; what it starts of them runs, what it named is freed."""
    with (
        GuestMemory() as memory,
        Frontend(pair.daemon.sockets[0], timeout=WITHIN) as frontend,
        attach(pair.daemon) as peer,
    ):
        frontend.negotiate()
        frontend.set_memory(memory)
        event = os.eventfd(0)
        for index in range(256):
            frontend.set_vring_num(index, 8)
            frontend.set_vring_base(index, 0)
            frontend.set_vring_call(index, event)
            frontend.set_vring_err(index, event)
            frontend.enable(index)
        os.close(event)
        for index in (*range(4), 6, 7, 254, 255):
            frontend.start_queue(index, SplitDriver(memory, 64))
        assert footprint(pair.worker)[0] > pair.held[0] + 512
        console = ConsoleDriver(frontend)
        console.wait_open()
        spare = frontend.queues[255]
        spare.driver.add([b"to nobody"])
        spare.notify()
        converse(console, peer)
        assert frontend.get_vring_base(200) == 0


def test_resets_and_states_without_end(pair: Pair) -> None:
    """A driver that is reset thousands of times, running or not, starts as ever."""
    with boot(pair.daemon) as console, attach(pair.daemon) as peer:
        frontend, memory = console.frontend, console.port.tx.driver.memory
        features = frontend.features
        for number in range(1000):
            frontend.send(Request.SET_STATUS, encode_u64(number % 2 * 15))
            frontend.send(Request.RESET_DEVICE)
        frontend.barrier()
        frontend.set_features(features)
        for index in range(4):
            frontend.start_queue(index, SplitDriver(memory, 64))
        later = ConsoleDriver(frontend, buffers=8)
        later.wait_open()
        converse(later, peer)


# In-band notifications


@pytest.fixture
def inband(daemon: StartDaemon) -> Daemon:
    return daemon("unix", 1, "--inband", "--packed")


def test_inband_kicks_of_no_ring(inband: Daemon) -> None:
    """A kick of a queue that does not exist or has no addresses, or with a number, is refused."""
    with Frontend(inband.sockets[0], timeout=WITHIN) as frontend:
        frontend.negotiate()
        for ring, number in ((256, 0), (65537, 0), (0xFFFF_FFFF, 0), (0, 1), (0, 0), (255, 0)):
            payload = VringState(ring, number).encode()
            refused(lambda payload=payload: frontend.tell(Request.VRING_KICK, payload))
        frontend.barrier()


@FORMATS
def test_inband_kicks_of_a_broken_queue(inband: Daemon, features: int) -> None:
    """A queue that is broken is told of once, and stays stopped, however often it is kicked."""
    with (
        GuestMemory.like_uml() as memory,
        connect_like_uml(inband.sockets[0], memory, features=features, timeout=WITHIN) as frontend,
        attach(inband) as peer,
    ):
        console = ConsoleDriver(frontend)
        console.wait_open()
        tx = console.port.tx
        tx.driver.add_buffers([Buffer(0, 1, False)])
        tx.driver.publish()
        for _ in range(1000):
            tx.kick()
        frontend.take_backend()
        assert frontend.broken == [TX]
        peer.sendall(b"typed")
        assert console.read(5) == b"typed"


# The device's state


@pytest.mark.parametrize("path", ["/", "/dev/zero", "/dev/null", "/dev/full", __file__])
@pytest.mark.parametrize("direction", [0, 1], ids=["save", "load"])
def test_a_way_for_the_state_that_is_none(frontend: Frontend, path: str, direction: int) -> None:
    """Files, folders and endless devices are no way for a state, and hold nothing up."""
    way = os.open(path, os.O_RDONLY)
    try:
        assert frontend.set_device_state_fd(direction, way) == 0x100
    finally:
        os.close(way)
    assert frontend.check_device_state() == 1
    frontend.barrier()


# Anything at all

#: Messages that lead somewhere, to be said more often than others.
LIKELY = [
    *[Request.SET_MEM_TABLE, Request.ADD_MEM_REG, Request.SET_VRING_ADDR] * 3,
    *[Request.SET_VRING_NUM, Request.SET_VRING_KICK, Request.SET_VRING_ENABLE] * 3,
]


class Babbler:
    """A frontend that says anything, of which much can be carried out.

    Each connection begins with some sense: one MiB of memory at address 0, and rings in it.
    """

    def __init__(self, path: str, seed: int, files: list[int], others: list[int]) -> None:
        self._path = path
        self._random = random.Random(seed)
        self._files = files
        self._others = others
        self._places = [[64 * self._random.randrange(1 << 13) for _ in range(3)] for _ in range(6)]
        self.frontend = self._connect()
        self.carried_out = 0

    def _connect(self) -> Frontend:
        frontend = Frontend(self._path, timeout=WITHIN)
        try:
            frontend.negotiate(self._random.choice([SPLIT, PACKED]))
            frontend.add_mem_reg(Region(0, 1 << 20, 0, 0), self._files[0])
            for index, place in enumerate(self._places):
                frontend.set_vring_num(index, 64)
                frontend.set_vring_addr(index, *place)
                frontend.set_vring_kick(index, self._others[0])
                frontend.enable(index)
        except BaseException:
            frontend.close()
            raise
        return frontend

    def _number(self) -> int:
        pick = self._random.choice
        return pick([0, 1, 2, 3, 7, 8, 64, 255, 256, PAGE, 1 << 20, 0x8000_8000, 0xFFFF_FFFF])

    def _ring(self) -> int:
        return self._random.choice([0, 1, 2, 3, 4, 5, 255, self._number()])

    def _region(self) -> Region:
        pick = self._random.choice
        at = pick([0, 0, 1 << 20, 1 << 32, self._number()])
        size = pick([1 << 20, 1 << 20, PAGE, self._number()])
        return Region(at, size, pick([at, at, at, self._number()]), pick([0, 0, PAGE, 5]))

    def _payload(self, request: int) -> bytes:
        pick, ring = self._random.choice, self._ring()
        place = pick(self._places)
        match request:
            case Request.SET_FEATURES:
                return encode_u64(self.frontend.offered & pick([SPLIT, PACKED, -1, 0, 1 << 26]))
            case Request.SET_PROTOCOL_FEATURES:
                return encode_u64(self.frontend.protocol_features)
            case Request.SET_MEM_TABLE:
                return encode_regions([self._region() for _ in range(pick([1, 1, 1, 2, 8]))])
            case Request.ADD_MEM_REG | Request.REM_MEM_REG:
                return encode_region(self._region())
            case Request.SET_VRING_NUM:
                return VringState(ring, pick([1, 8, 64, 256, self._number()])).encode()
            case Request.SET_VRING_ADDR:
                flags, log = pick([0, 0, 1, 0xFFFF]), pick([0, self._number(), (1 << 64) - 1])
                return VringAddr(ring, flags, *place, log).encode()
            case Request.SET_VRING_ENABLE:
                return VringState(ring, pick([0, 1, 1, 1, 2])).encode()
            case Request.SET_VRING_BASE | Request.GET_VRING_BASE | Request.VRING_KICK:
                return VringState(ring, self._number()).encode()
            case Request.SET_VRING_KICK | Request.SET_VRING_CALL | Request.SET_VRING_ERR:
                return encode_u64(ring & 0x1FF)
            case Request.GET_CONFIG | Request.SET_CONFIG:
                data = self._random.randbytes(pick([1, 4, 8, 12, 256]))
                return ConfigSpan(pick([0, 4, 8, 0xFFFF_FFFF]), pick([0, 1]), data).encode()
            case Request.SET_LOG_BASE:
                return LogArea(pick([PAGE, 1 << 18, self._number()]), pick([0, 3, PAGE])).encode()
            case Request.GET_INFLIGHT_FD | Request.SET_INFLIGHT_FD:
                size, queues = pick([1 << 20, self._number()]), pick([1, 4, 256])
                return InflightArea(size, pick([0, 64, 7]), queues, pick([8, 64, 256])).encode()
            case Request.SET_DEVICE_STATE_FD:
                return StateTransfer(pick([0, 1, 1, 2]), pick([0, 0, 0, 1])).encode()
            case Request.SET_STATUS:
                return encode_u64(pick([0, 15, 15, 64, 0x10]))
        return b""

    def _fds(self, request: int, payload: bytes) -> list[int]:
        pick = self._random.choice
        if self._random.random() < 0.03:
            return [pick(self._files + self._others) for _ in range(pick([0, 1, 2, MOST_FDS]))]
        match request:
            case Request.SET_MEM_TABLE:
                return [pick(self._files) for _ in range(payload[0])]
            case Request.SET_LOG_BASE | Request.SET_INFLIGHT_FD | Request.ADD_MEM_REG:
                return [pick(self._files)]
            case Request.SET_VRING_KICK | Request.SET_VRING_CALL | Request.SET_VRING_ERR:
                return [pick(self._others)] if not payload[1] & 1 else []
            case Request.SET_LOG_FD | Request.SET_BACKEND_REQ_FD | Request.SET_DEVICE_STATE_FD:
                return [pick(self._others)]
        return []

    def say(self) -> None:
        """Say one thing, and hear what comes of it."""
        request = self._random.choice([*Request, *LIKELY])
        payload = self._payload(request)
        try:
            self.frontend.send(request, payload, self._fds(request, payload), need_reply=True)
            answer = self.frontend.recv()
        except ConnectionError:
            self.frontend.close()
            self.frontend = self._connect()
            return
        for fd in answer.fds:
            os.close(fd)
        self.carried_out += answer.payload == encode_u64(0)

    def write(self) -> None:
        """Write into the rings what may be a buffer or not, and kick."""
        pick = self._random.choice
        desc, _used, avail = pick(self._places)
        flags = pick([0, 0, 2, 2, 1, 4, 0xFFFF]) | pick([0x80, 0x80, 0x8000, 0])
        buffer = struct.pack(
            "<QIHH", pick([0, 1 << 10, self._number()]), pick([0, 8, 64]), 0, flags
        )
        heads = struct.pack("<HHQQ", pick([0, 1]), self._random.randrange(64), 0, 0)
        os.pwrite(self._files[0], buffer * pick([1, 8, 64]), desc)
        os.pwrite(self._files[0], pick([heads, heads, heads, self._random.randbytes(8)]), avail)
        with suppress(OSError):
            os.write(self._others[0], encode_u64(1))


@pytest.mark.parametrize("seed", range(4))
def test_random_conversations(pair: Pair, seed: int) -> None:
    """Whatever is said in whatever order, over whatever memory, the worker lives."""
    before = pair.daemon.status()[0]
    with ExitStack() as ends:
        files = [ends.enter_context(memfd(1 << 20)) for _ in range(3)]
        others = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(4)]
        others += os.pipe2(os.O_NONBLOCK)
        for end in socket.socketpair():
            end.setblocking(False)
            others.append(end.detach())
        others += [os.open("/", flags) for flags in (os.O_RDONLY, os.O_PATH)]
        others.append(os.open(__file__, os.O_RDONLY))
        for other in others:
            ends.callback(os.close, other)
        babbler = Babbler(pair.daemon.sockets[0], seed, files, others)
        ends.callback(lambda: babbler.frontend.close())
        for _ in range(2000):
            babbler.say()
            babbler.write()
    after = pair.daemon.status()[0]
    assert babbler.carried_out > 500
    for counter in ("sessions", "chains", "kicks", "refused", "broken"):
        assert after[counter] > before[counter], counter
