"""Statements about what is not allowed: it is refused or ends the connection, never the backend.

The specifications say little about mistakes: a backend that detects an error may close the
connection (vhost-user, "Communication"), and with REPLY_ACK a failure must not be acknowledged as a
success. After each of these statements a new connection must have a console that works.
"""

from __future__ import annotations

import os
import socket
import struct
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from ...worker.vhost_user.message import (
    ProtocolFeature,
    Region,
    Request,
    VringAddr,
    VringFd,
    VringState,
    encode,
    encode_regions,
    encode_u64,
)
from ..bad import raw_message
from ..console import Event
from ..driver import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, fence
from ..errors import DeviceError
from ..features import Feature
from ..frontend import Frontend
from ..packed import PackedDriver
from ..queue import Queue
from .bench import CONTROL_RX, CONTROL_TX, SIZE, TX, Bench, split_driver
from .buffers import on_rings
from .rings import write
from .statement import BrokenError, Level, expect, statement

MUST, SHOULD = Level.MUST, Level.SHOULD
F, P = Feature, ProtocolFeature

_HEADER = "vhost-user Header"
_COMMUNICATION = "vhost-user Communication"
_PAGE = 4096
_TOP = 1 << 64


# Messages


def _closes(bench: Bench, data: bytes, what: str, fds: Sequence[int] = ()) -> None:
    """Send bytes that are no message; raise BrokenError unless the backend hangs up or refuses."""
    frontend = bench.negotiate()
    with suppress(ConnectionError):
        frontend.send_raw(data, fds)
        try:
            answer = frontend.recv()
        except TimeoutError:
            raise BrokenError(
                f"{what}: no reaction", "the connection to end, or a refusal"
            ) from None
        refused = len(answer.payload) == 8 and any(answer.payload)
        expect(
            answer.header.request != Request.GET_FEATURES and (refused or not answer.payload),
            f"{what}: answered by message {answer.header.request} with {answer.payload.hex()}",
            "the connection's end, or a no",
        )


@statement("hostile.cut-message", SHOULD, _HEADER, hostile=True)
def cut_message(bench: Bench) -> None:
    """A frontend that hangs up in the middle of a message does no harm."""
    whole = raw_message(Request.SET_FEATURES, bytes(8))
    for count in range(1, len(whole)):
        frontend = bench.connect()
        frontend.send_raw(whole[:count])
    bench.connect()


@statement("hostile.version", SHOULD, _HEADER, hostile=True)
def version(bench: Bench) -> None:
    """A message of a version other than 1 is not answered as if it were one."""
    for number in (0, 2, 3):
        _closes(bench, raw_message(Request.GET_FEATURES, flags=number), f"version {number}")


@statement("hostile.reply-bit", SHOULD, _HEADER, hostile=True)
def reply_bit(bench: Bench) -> None:
    """A request that says it is a reply is not answered as if it were none."""
    _closes(bench, raw_message(Request.GET_FEATURES, flags=5), "the reply bit on a request")


@statement("hostile.huge-message", SHOULD, _HEADER, hostile=True)
def huge_message(bench: Bench) -> None:
    """A message that says it is larger than any is not waited for."""
    for size in (0x1_0000, 0x7FFF_FFFF, 0xFFFF_FFFF):
        _closes(bench, raw_message(Request.SET_FEATURES, size=size), f"a payload of {size} bytes")


_WRONG_SIZES: dict[Request, tuple[int, ...]] = {
    Request.SET_FEATURES: (0, 7, 9),
    Request.SET_MEM_TABLE: (0, 7),
    Request.SET_VRING_NUM: (4, 9),
    Request.SET_VRING_ADDR: (32, 41),
    Request.SET_VRING_KICK: (4,),
    Request.SET_VRING_ENABLE: (7,),
}


def _wrong_size(request: Request, sizes: tuple[int, ...]) -> None:
    def check(bench: Bench) -> None:
        for size in sizes:
            data = raw_message(request, bytes(size), flags=9)
            _closes(bench, data, f"{request.name} of {size} bytes")

    listed = " or ".join(map(str, sizes))
    check.__doc__ = f"{request.name} with a payload of {listed} bytes is refused"
    name = f"hostile.size-{request.name.lower().replace('_', '-')}"
    statement(name, SHOULD, f"vhost-user {request.name}", hostile=True)(check)


for _request, _sizes in _WRONG_SIZES.items():
    _wrong_size(_request, _sizes)


@statement("hostile.regions-cut", SHOULD, "vhost-user SET_MEM_TABLE", hostile=True)
def regions_cut(bench: Bench) -> None:
    """A memory table that counts more regions than it has is refused."""
    data = raw_message(Request.SET_MEM_TABLE, struct.pack("=II", 2, 0) + bytes(32), flags=9)
    _closes(bench, data, "two regions in room for one")


@statement("hostile.config-size", SHOULD, "vhost-user GET_CONFIG", P.CONFIG, hostile=True)
def config_size(bench: Bench) -> None:
    """GET_CONFIG whose size is not that of its payload is refused, or has an empty answer."""
    for size, room in ((12, 8), (4, 12), (0xFFFF_FFFF, 12)):
        payload = struct.pack("=III", 0, size, 0) + bytes(room)
        what = f"GET_CONFIG of {size} bytes in {room}"
        _closes(bench, raw_message(Request.GET_CONFIG, payload), what)


@statement("hostile.config-write", SHOULD, "vhost-user SET_CONFIG", P.CONFIG, hostile=True)
def config_write(bench: Bench) -> None:
    """SET_CONFIG past the end of the configuration is refused."""
    frontend = bench.negotiate()
    expect(
        bench.refused(frontend, lambda: frontend.set_config(0xFFFF_FFF0, bytes(12))),
        "it was acknowledged with 0",
        "a refusal",
    )


@statement("hostile.unknown-request", SHOULD, _COMMUNICATION, hostile=True)
def unknown_request(bench: Bench) -> None:
    """A request that does not exist is not acknowledged as done."""
    for request in (0, 1000, 0xFFFF_FFFF):
        frontend = bench.negotiate()
        expect(
            bench.refused(frontend, lambda f=frontend, r=request: f.tell(r, bytes(8))),  # type: ignore[misc]
            f"request {request} was acknowledged with 0",
            "a refusal",
        )


# Descriptors


@contextmanager
def _eventfd(value: int = 0) -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        if value:
            os.eventfd_write(fd, value)
        yield fd
    finally:
        os.close(fd)


@statement("hostile.stray-descriptors", SHOULD, _COMMUNICATION, hostile=True)
def stray_descriptors(bench: Bench) -> None:
    """Descriptors with messages that take none are closed, 253 at a time."""
    with _eventfd() as fd:
        for _ in range(6):
            frontend = bench.connect()
            with suppress(ConnectionError):
                frontend.send_raw(encode(Request.GET_FEATURES), [fd] * 253)
                frontend.recv()


@statement("hostile.inner-descriptors", SHOULD, _COMMUNICATION, hostile=True)
def inner_descriptors(bench: Bench) -> None:
    """Descriptors that come inside a message, not with its first byte, do no harm."""
    data = encode(Request.SET_FEATURES, encode_u64(bench.features))
    with _eventfd() as fd:
        frontend = bench.negotiate()
        with suppress(ConnectionError):
            frontend.send_raw(data[:15])
            frontend.send_raw(data[15:], [fd] * 8)
            frontend.barrier()


@statement("hostile.no-kick", SHOULD, "vhost-user SET_VRING_KICK", hostile=True)
def no_kick(bench: Bench) -> None:
    """SET_VRING_KICK without the descriptor that it says it has is refused."""
    frontend = bench.negotiate()
    payload = VringFd(TX, True).encode()
    expect(
        bench.refused(frontend, lambda: frontend.tell(Request.SET_VRING_KICK, payload)),
        "it was acknowledged with 0",
        "a refusal",
    )


@statement("hostile.kick-file", SHOULD, "vhost-user SET_VRING_KICK", hostile=True)
def kick_file(bench: Bench) -> None:
    """A kick descriptor that cannot be waited on, a file or a folder, does no harm."""
    for path in ("/", __file__):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            frontend = bench.start()
            with suppress(ConnectionError, DeviceError):
                frontend.set_vring_kick(TX, fd)
                frontend.barrier()
        finally:
            os.close(fd)


@statement("hostile.call-broken", SHOULD, "vhost-user SET_VRING_CALL", hostile=True)
def call_broken(bench: Bench) -> None:
    """A call descriptor whose other end is closed is passed over; buffers are used."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        frontend = bench.start()
        frontend.set_vring_call(TX, theirs.fileno())
    frontend.barrier()
    for _ in range(3):
        frontend.queues[TX].driver.enable_calls()
        write(bench, frontend.queues[TX])


@statement("hostile.call-full", SHOULD, "vhost-user SET_VRING_CALL", hostile=True)
def call_full(bench: Bench) -> None:
    """A call descriptor that nobody has read for too long is passed over; buffers are used."""
    with _eventfd((1 << 64) - 2) as fd:
        frontend = bench.start()
        frontend.set_vring_call(TX, fd)
        for _ in range(3):
            frontend.queues[TX].driver.enable_calls()
            write(bench, frontend.queues[TX])


@statement("hostile.call-blocks", SHOULD, "vhost-user SET_VRING_CALL", hostile=True)
def call_blocks(bench: Bench) -> None:
    """A full call descriptor that blocks holds nothing up: the frontend can make it so any time."""
    frontend = bench.start(queues=2)
    with _eventfd((1 << 64) - 2) as fd:
        frontend.set_vring_call(TX, fd)
        frontend.barrier()
        os.set_blocking(fd, True)
        try:
            for _ in range(3):
                frontend.queues[TX].driver.enable_calls()
                write(bench, frontend.queues[TX])
            frontend.barrier()
        finally:
            os.eventfd_read(fd)  # whoever it holds up goes on


@statement("hostile.path-descriptors", SHOULD, _COMMUNICATION, hostile=True)
def path_descriptors(bench: Bench) -> None:
    """Descriptors that name a file, and can be neither read nor written, do no harm."""
    fd = os.open("/", os.O_PATH | os.O_CLOEXEC)
    try:
        for request in (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR):
            frontend = bench.start(queues=2)
            with suppress(ConnectionError, DeviceError):
                frontend.tell(request, VringFd(TX, True).encode(), [fd])
                frontend.queues[TX].driver.add([b"\r\n"])
                frontend.queues[TX].notify()
                frontend.barrier()
    finally:
        os.close(fd)


@statement("hostile.same-again", SHOULD, _COMMUNICATION, hostile=True)
def same_again(bench: Bench) -> None:
    """What a message sets may be set thousands of times: nothing of it is kept too long."""
    frontend = bench.negotiate()
    memory = bench.memory()
    with _eventfd() as fd:
        for _ in range(200):
            frontend.set_memory(memory, ack=False)
        for _ in range(2000):
            frontend.set_vring_call(TX, fd, ack=False)
            frontend.set_vring_err(TX, fd, ack=False)
        frontend.barrier()
    bench.start(frontend, memory=memory)
    write(bench, frontend.queues[TX])


# Rings' configuration


@statement("hostile.ring-index", MUST, "vhost-user A vring state description", hostile=True)
def ring_index(bench: Bench) -> None:
    """A ring's index is compared in all its 32 bits: 65537 is not ring 1."""
    for index in (256, 65536, 65537, 0xFFFF_FFFF):
        for request in (Request.SET_VRING_NUM, Request.SET_VRING_BASE, Request.SET_VRING_ADDR):
            frontend = bench.negotiate()
            frontend.set_memory(bench.memory())
            payload = (
                VringAddr(index, 0, 0, 0, 0, 0).encode()
                if request is Request.SET_VRING_ADDR
                else VringState(index, 2).encode()
            )
            expect(
                bench.refused(frontend, lambda f=frontend, r=request, p=payload: f.tell(r, p)),  # type: ignore[misc]
                f"{request.name} of ring {index} was acknowledged with 0",
                "a refusal",
            )


@statement("hostile.ring-size", MUST, "VIRTIO 2.7", hostile=True)
def ring_size(bench: Bench) -> None:
    """A split ring of 0, 3, 65536 or 2^32 - 1 entries is refused before it starts."""
    for size in (0, 3, 65536, 0xFFFF_FFFF):
        frontend = bench.negotiate()
        memory = bench.memory()
        frontend.set_memory(memory)
        queue = frontend.queue(TX, bench.ring(memory))

        def setup(frontend: Frontend = frontend, queue: Queue = queue, size: int = size) -> None:
            frontend.describe_queue(queue)
            frontend.set_vring_num(TX, size)
            driver = queue.driver
            at = driver.memory.user_addr
            frontend.set_vring_addr(
                TX, at(driver.desc_addr), at(driver.used_addr), at(driver.avail_addr)
            )
            frontend.set_vring_kick(TX, queue.new_kick_fd())

        expect(bench.refused(frontend, setup), f"size {size} was acknowledged with 0", "a refusal")


@statement("hostile.address-first", SHOULD, "vhost-user SET_VRING_ADDR", hostile=True)
def address_first(bench: Bench) -> None:
    """A ring's addresses are refused while there is no memory table."""
    frontend = bench.negotiate()

    def setup() -> None:
        frontend.set_vring_num(TX, SIZE)
        frontend.set_vring_addr(TX, 0x1000, 0x2000, 0x3000)

    expect(bench.refused(frontend, setup), "they were acknowledged with 0", "a refusal")


@statement("hostile.kick-first", SHOULD, "vhost-user SET_VRING_KICK", hostile=True)
def kick_first(bench: Bench) -> None:
    """A ring that is kicked and enabled before it has a size or addresses does no harm."""
    frontend = bench.negotiate()
    with _eventfd(1) as fd, suppress(ConnectionError, DeviceError):
        frontend.set_vring_kick(TX, fd)
        if frontend.features & F.PROTOCOL_FEATURES:
            frontend.enable(TX)
        frontend.barrier()
        os.eventfd_write(fd, 1)
        frontend.barrier()


_USER = 0x7000_0000_0000
_ROOM = 1 << 20

_PLACES: dict[str, tuple[str, tuple[int, int, int]]] = {
    "before": (
        "that begins before its region",
        (_USER - 512, _USER + _PAGE, _USER + 2 * _PAGE),
    ),
    "past": (
        "whose used part goes past its region's end",
        (_USER, _USER + _ROOM - 256, _USER + 2 * _PAGE),
    ),
    "top": (
        "at the top of all addresses",
        (_TOP - 1024, _USER + _PAGE, _USER + 2 * _PAGE),
    ),
    "misaligned": (
        "whose descriptors are not at a multiple of 16",
        (_USER + 8, _USER + _PAGE, _USER + 2 * _PAGE),
    ),
}


def _place(name: str, what: str, place: tuple[int, int, int]) -> None:
    def check(bench: Bench) -> None:
        memory = bench.memory([Region(0, _ROOM, _USER, 0)])
        frontend = bench.negotiate()
        frontend.set_memory(memory)
        desc, used, avail = place

        def setup() -> None:
            frontend.set_vring_num(TX, SIZE)
            frontend.set_vring_addr(TX, desc, used, avail)
            with _eventfd(1) as fd:
                frontend.set_vring_kick(TX, fd)
            if frontend.features & F.PROTOCOL_FEATURES:
                frontend.enable(TX)

        expect(bench.refused(frontend, setup), "it was acknowledged with 0", "a refusal")

    check.__doc__ = f"A ring {what} is refused"
    section = "VIRTIO 2.7.1" if name == "misaligned" else "vhost-user Memory access"
    statement(f"hostile.ring-{name}", SHOULD, section, hostile=True)(check)


for _name, (_what, _addresses) in _PLACES.items():
    _place(_name, _what, _addresses)


# Memory

_TABLES: dict[str, tuple[str, list[Region]]] = {
    "empty": ("with a region of no bytes", [Region(0, 0, _USER, 0)]),
    "overlap": (
        "with overlapping regions",
        [Region(0, _ROOM, _USER, 0), Region(_ROOM - _PAGE, _PAGE, 0, 0)],
    ),
    "past-file": (
        "with a region larger than its file",
        [Region(0, _ROOM + _PAGE, _USER, 0)],
    ),
    "huge": ("with a region of 2^62 bytes", [Region(0, 1 << 62, _USER, 0)]),
    "past-top": ("with a region past 2^64", [Region(_TOP - _PAGE, _ROOM, _USER, 0)]),
}


def _table(name: str, what: str, regions: list[Region]) -> None:
    def check(bench: Bench) -> None:
        frontend = bench.negotiate()
        with tempfile.TemporaryFile() as file:
            file.truncate(_ROOM)
            fds = [file.fileno()] * len(regions)
            payload = encode_regions(regions)
            expect(
                bench.refused(frontend, lambda: frontend.tell(Request.SET_MEM_TABLE, payload, fds)),
                "it was acknowledged with 0",
                "a refusal",
            )

    check.__doc__ = f"A memory table {what} is refused"
    statement(f"hostile.memory-{name}", SHOULD, "vhost-user SET_MEM_TABLE", hostile=True)(check)


for _name, (_what, _regions) in _TABLES.items():
    _table(_name, _what, _regions)


@statement("hostile.memory-missing", MUST, "vhost-user SET_MEM_TABLE", hostile=True)
def memory_missing(bench: Bench) -> None:
    """A memory table of two regions with one descriptor is refused."""
    frontend = bench.negotiate()
    with tempfile.TemporaryFile() as file:
        file.truncate(_ROOM)
        payload = encode_regions([Region(0, _PAGE, _USER, 0), Region(_PAGE, _PAGE, 0, _PAGE)])
        fds = [file.fileno()]
        expect(
            bench.refused(frontend, lambda: frontend.tell(Request.SET_MEM_TABLE, payload, fds)),
            "it was acknowledged with 0",
            "a refusal: the descriptors match the regions in number",
        )


@statement("hostile.memory-gone", SHOULD, "vhost-user SET_MEM_TABLE", hostile=True)
def memory_gone(bench: Bench) -> None:
    """A memory table without the memory of a running ring does no harm."""
    frontend = bench.start()
    other = bench.memory([Region(0, _PAGE, _PAGE, 0)])
    with suppress(ConnectionError, DeviceError):
        frontend.set_memory(other)
        queue = frontend.queues[TX]
        queue.driver.add([b"\r\n"])
        queue.driver.publish()
        queue.kick()
        frontend.barrier()


@statement("hostile.second-frontend", SHOULD, _COMMUNICATION, hostile=True)
def second_frontend(bench: Bench) -> None:
    """A second frontend that connects leaves the first one's console working."""
    frontend = bench.start()
    write(bench, frontend.queues[TX])
    with socket.socket(socket.AF_UNIX) as other:
        other.settimeout(bench.timeout)
        with suppress(OSError):
            other.connect(bench.backend.path)
            other.sendall(encode(Request.GET_FEATURES))
        write(bench, frontend.queues[TX])
    write(bench, frontend.queues[TX])


# Descriptors of buffers

Raw = tuple[int, int, int, int]


def _offer(queue: Queue, *descriptors: Raw) -> None:
    """Offer descriptors by hand: address, size, flags, next; and kick."""
    driver = queue.driver
    if isinstance(driver, PackedDriver):
        driver.offer([raw[:3] for raw in descriptors])
    else:
        split = split_driver(queue)
        for index, raw in enumerate(descriptors):
            split.write_desc(index, *raw)
        split.offer(0)
    driver.publish()
    queue.kick()


def _lives(frontend: Frontend, queue: Queue) -> None:
    """Check that the backend is not busy with a ring that cannot be served."""
    try:
        frontend.barrier()
        frontend.get_vring_base(queue.index)
    except ConnectionError:
        return  # it hung up, which it may
    except TimeoutError as error:
        raise BrokenError(str(error), "an answer, or the end of the connection") from None


@on_rings("bad-outside", SHOULD, "2.7.5", "2.8.13", hostile=True)
def outside(bench: Bench) -> None:
    """A buffer that is in no memory, or only in part, does no harm."""
    for addr, size in ((0x10, 16), (0x4000_0000 + (32 << 20) - 8, 16), (_TOP - 8, 16)):
        frontend = bench.start(queues=2)
        _offer(frontend.queues[TX], (addr, size, 0, 0))
        _lives(frontend, frontend.queues[TX])


@on_rings("bad-direction", MUST, "2.7.5.1", "2.8.15", F.MULTIPORT, hostile=True)
def direction(bench: Bench) -> None:
    """Into a buffer that is only to be read the device does not write, whichever ring it is on."""
    frontend = bench.start()
    heard, told = frontend.queues[CONTROL_RX], frontend.queues[CONTROL_TX]
    memory = heard.driver.memory
    addr = memory.alloc(64)
    memory.write(addr, b"\xa5" * 64)
    _offer(heard, (addr, 64, 0, 0))
    with suppress(ConnectionError, BrokenError):
        bench.say(frontend, Event.DEVICE_READY)
    bench.quiet(heard.driver.has_used)
    expect(memory.read(addr, 64) == b"\xa5" * 64, "it was written to", "it to be left alone")
    _lives(frontend, told)


@on_rings("bad-writable", SHOULD, "5.3.6.1", "5.3.6.1", hostile=True)
def writable(bench: Bench) -> None:
    """A buffer to be written on the transmit ring does no harm."""
    frontend = bench.start(queues=2)
    queue = frontend.queues[TX]
    _offer(queue, (queue.driver.memory.alloc(64), 64, DESC_F_WRITE, 0))
    _lives(frontend, queue)


@on_rings("bad-endless", MUST, "2.7.5.2", "2.8.17", hostile=True)
def endless(bench: Bench) -> None:
    """A chain without an end, which is a loop, is given up."""
    frontend = bench.start(size=8, queues=2)
    queue = frontend.queues[TX]
    addr = queue.driver.memory.alloc(8)
    _offer(queue, *[(addr, 1, DESC_F_NEXT, (at + 1) % 8) for at in range(8)])
    _lives(frontend, queue)


@statement("split.bad-self-loop", MUST, "VIRTIO 2.7.5.2", hostile=True)
def self_loop(bench: Bench) -> None:
    """A descriptor that is its own next one is given up."""
    frontend = bench.start(queues=2)
    queue = frontend.queues[TX]
    _offer(queue, (queue.driver.memory.alloc(8), 0, DESC_F_NEXT, 0))
    _lives(frontend, queue)


@statement("split.bad-next", SHOULD, "VIRTIO 2.7.5", hostile=True)
def bad_next(bench: Bench) -> None:
    """A next descriptor, or a first one, past the table's end does no harm."""
    for head, following in ((0, SIZE), (0, 0xFFFF), (SIZE, 0), (0xFFFF, 0)):
        frontend = bench.start(queues=2)
        queue = frontend.queues[TX]
        driver = split_driver(queue)
        driver.write_desc(0, driver.memory.alloc(8), 8, DESC_F_NEXT, following)
        driver.offer(head)
        driver.publish()
        queue.kick()
        _lives(frontend, queue)


@statement("split.bad-avail", SHOULD, "VIRTIO 2.7.6.1", hostile=True)
def bad_avail(bench: Bench) -> None:
    """An available index that goes back, or on by more than there are entries, does no harm."""
    for jump in (SIZE + 1, 0x8000, 0xFFFF):
        frontend = bench.start(queues=2)
        queue = frontend.queues[TX]
        driver = split_driver(queue)
        driver.set_avail_idx(jump)
        fence()
        queue.kick()
        _lives(frontend, queue)


@statement("split.bad-used", SHOULD, "VIRTIO 2.7.8", hostile=True)
def bad_used(bench: Bench) -> None:
    """A used index that the driver, whose it is not, overwrites does no harm."""
    frontend = bench.start(queues=2)
    queue = frontend.queues[TX]
    write(bench, queue)
    driver = split_driver(queue)
    driver.set_used_idx(1000)
    driver.add([b"\r\n"])
    driver.publish()
    queue.kick()
    _lives(frontend, queue)


def _indirect(bench: Bench, size: int, flags: int, *entries: Raw, without: int = 0) -> None:
    frontend = bench.start(queues=2, without=without)
    queue = frontend.queues[TX]
    memory = queue.driver.memory
    text = memory.alloc(8)
    memory.write(text, b"table\r\n ")
    table = memory.alloc(64)
    packed = isinstance(queue.driver, PackedDriver)
    for at, (addr, length, more, next_) in enumerate(entries):
        words = (next_, more) if packed else (more, next_)
        memory.write(table + 16 * at, struct.pack("<QIHH", addr or text, length, *words))
    last: list[Raw] = [(text, 8, 0, 0)] if flags & DESC_F_NEXT else []
    _offer(queue, (table, size, DESC_F_INDIRECT | flags, 1), *last)
    _lives(frontend, queue)


@on_rings("bad-table-size", SHOULD, "2.7.5.3", "2.8.7", F.INDIRECT_DESC, hostile=True)
def table_size(bench: Bench) -> None:
    """A table of descriptors of no bytes, of 15, or of 4 GiB does no harm."""
    for size in (0, 15, 17, 0xFFFF_FFF0):
        _indirect(bench, size, 0, (0, 8, 0, 0))


@on_rings("bad-table-nested", SHOULD, "2.7.5.3.1", "2.8.19", F.INDIRECT_DESC, hostile=True)
def table_nested(bench: Bench) -> None:
    """A table in a table does no harm."""
    _indirect(bench, 16, 0, (0, 16, DESC_F_INDIRECT, 0))


@on_rings("bad-table-chained", SHOULD, "2.7.5.3.1", "2.8.19", F.INDIRECT_DESC, hostile=True)
def table_chained(bench: Bench) -> None:
    """A descriptor with both INDIRECT and NEXT does no harm."""
    _indirect(bench, 16, DESC_F_NEXT, (0, 8, 0, 0))


@on_rings("bad-table-unasked", SHOULD, "2.7.5.3.1", "2.8.19", hostile=True)
def table_unasked(bench: Bench) -> None:
    """A table although INDIRECT_DESC was not negotiated does no harm."""
    _indirect(bench, 16, 0, (0, 8, 0, 0), without=F.INDIRECT_DESC)


@statement("split.bad-table-loop", MUST, "VIRTIO 2.7.5.2", F.INDIRECT_DESC, hostile=True)
def table_loop(bench: Bench) -> None:
    """A loop in a table is given up, and so is a next one past its end."""
    _indirect(bench, 32, 0, (0, 1, DESC_F_NEXT, 1), (0, 1, DESC_F_NEXT, 0))
    _indirect(bench, 32, 0, (0, 1, DESC_F_NEXT, 2))
