"""Rings that a hostile guest writes: that queue stops, everything else goes on."""

from __future__ import annotations

import os
import select
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from scene import Pair, attach, boot, converse, exactly, quiet_guest
from vhost_device_console.testing import (
    DRIVER_FEATURES,
    Buffer,
    ConsoleDriver,
    Feature,
    GuestMemory,
    Queue,
    connect_like_qemu,
)
from vhost_device_console.testing.split import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE

from launch import WITHIN, receive_until, until

RX, TX, CONTROL_RX, CONTROL_TX = range(4)
MIB = 1 << 20

Do = Callable[[Queue], None]


def one(addr: int, size: int, flags: int = 0, following: int = 0) -> Do:
    """Return what offers one descriptor, that one."""

    def do(queue: Queue) -> None:
        queue.driver.write_desc(0, addr, size, flags, following)
        queue.driver.offer(0)

    return do


def indirect(*table: tuple[int, int, int, int], size: int | None = None, flags: int = 0) -> Do:
    """Return what offers an indirect table of these descriptors; {B} stands for a good buffer."""

    def do(queue: Queue) -> None:
        memory = queue.driver.memory
        buffer = memory.alloc(4096)
        place = memory.alloc(max(16 * len(table), 16))
        packed = b"".join(
            struct.pack("<QIHH", buffer + addr if addr < 4096 else addr, length, more, following)
            for addr, length, more, following in table
        )
        memory.write(place, packed)
        length = 16 * len(table) if size is None else size
        queue.driver.write_desc(0, place, length, DESC_F_INDIRECT | flags, 1)
        queue.driver.write_desc(1, buffer, 8)
        queue.driver.offer(0)

    return do


def chain(*descriptors: tuple[int, int, int]) -> Do:
    """Return what offers good buffers of 8 bytes, from 0 on: (index, flags, following)."""

    def do(queue: Queue) -> None:
        buffer = queue.driver.memory.alloc(4096)
        for index, flags, following in descriptors:
            queue.driver.write_desc(index, buffer, 8, flags, following)
        queue.driver.offer(0)

    return do


def index_by(distance: int) -> Do:
    return lambda queue: queue.driver.set_avail_idx(queue.driver.avail_idx + distance)


def publish_after(do: Do, queue: Queue) -> None:
    """Do it, show it unless it shows itself, and kick."""
    before = queue.driver.avail_idx
    do(queue)
    if queue.driver.avail_idx == before:
        queue.driver.publish()
    queue.kick()


HOSTILE: dict[str, Do] = {
    "index jumps past the size": index_by(65),
    "index jumps far": index_by(0x7FFF),
    "index goes back": index_by(-1),
    "head is the size": lambda queue: queue.driver.offer(64) and None,
    "head of all ones": lambda queue: queue.driver.offer(0xFFFF) and None,
    "next is the size": chain((0, DESC_F_NEXT, 64)),
    "next of all ones": chain((0, DESC_F_NEXT, 0xFFFF)),
    "self-loop": chain((0, DESC_F_NEXT, 0)),
    "long cycle": chain(*[(index, DESC_F_NEXT, (index + 1) % 64) for index in range(64)]),
    "indirect in indirect": indirect((0, 16, DESC_F_INDIRECT, 0)),
    "indirect with next": indirect((0, 8, 0, 0), flags=DESC_F_NEXT),
    "indirect of 17 bytes": indirect((0, 8, 0, 0), size=17),
    "indirect of no bytes": indirect((0, 8, 0, 0), size=0),
    "indirect of 2^32 - 16 bytes": indirect((0, 8, 0, 0), size=0xFFFF_FFF0),
    "indirect with a loop": indirect((0, 8, DESC_F_NEXT, 0)),
    "indirect next past its end": indirect((0, 8, DESC_F_NEXT, 1)),
    "indirect table nowhere": one(1 << 60, 16, DESC_F_INDIRECT),
    "buffer wraps": one((1 << 64) - 8, 16),
    "buffer nowhere": one(0x1000, 16),
    "buffer past the end": one(0x4000_0000 + (16 << 20) - 8, 16),
    "buffer of 2^32 - 1 bytes": one(0x4000_0000, 0xFFFF_FFFF),
    "longer than the cap": indirect(
        *[(0, 4096, DESC_F_NEXT, index + 1) for index in range(256)], (0, 1, 0, 0)
    ),
}


def writable(do: Do) -> Do:
    """Return `do` with all that it puts in the ring's own table writable."""

    def done(queue: Queue) -> None:
        write = queue.driver.write_desc

        def write_desc(
            index: int, addr: int, size: int, flags: int = 0, following: int = 0
        ) -> None:
            write(index, addr, size, flags | DESC_F_WRITE, following)

        queue.driver.write_desc = write_desc  # type: ignore[method-assign]
        try:
            do(queue)
        finally:
            queue.driver.write_desc = write  # type: ignore[method-assign]

    return done


@contextmanager
def broken(pair: Pair, console: ConsoleDriver, index: int) -> Iterator[Queue]:
    """Check that queue `index` breaks within: told by its error fd and the log, and left alone."""
    queue = console.frontend.queues[index]
    error = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        console.frontend.set_vring_err(index, error)
        used = queue.driver.used_idx
        yield queue
        assert select.select([error], [], [], WITHIN)[0], "no error was signalled"
        assert os.eventfd_read(error) == 1
        assert queue.driver.used_idx == used
        queue.kick()
        console.frontend.barrier()
        assert queue.driver.used_idx == used
        assert console.frontend.get_vring_base(index) == used
    finally:
        os.close(error)
    pair.daemon.expect_log(rf"queue {index} is broken and stopped: \w+")


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_output_ring(pair: Pair, name: str) -> None:
    """A hostile output ring is stopped; input and control go on."""
    with attach(pair.daemon) as peer, quiet_guest(pair) as console:
        with broken(pair, console, TX) as tx:
            publish_after(HOSTILE[name], tx)
        peer.sendall(b"typed")
        rx = console.port.rx
        rx.driver.add(writable=[16])
        rx.notify()
        assert rx.wait(WITHIN)[0].data == b"typed"
        console.send_control(0, 6, 1)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_input_ring(pair: Pair, name: str) -> None:
    """A hostile input ring is stopped; output goes on, and the input is not lost."""
    with attach(pair.daemon) as peer:
        with quiet_guest(pair) as console:
            peer.sendall(b"typed")
            with broken(pair, console, RX) as rx:
                publish_after(writable(HOSTILE[name]), rx)
            console.write(b"written")
            assert exactly(peer, 7) == b"written"
        with boot(pair.daemon) as console:
            assert console.read(5) == b"typed"


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_control_ring(pair: Pair, name: str) -> None:
    """A hostile control ring is stopped; output and input go on."""
    with attach(pair.daemon) as peer, boot(pair.daemon) as console:
        with broken(pair, console, CONTROL_TX) as control:
            publish_after(HOSTILE[name], control)
        console.multiport = False  # its dialogue is over
        converse(console, peer)


@pytest.mark.parametrize(
    ("index", "parts"),
    [
        (TX, [True]),
        (TX, [False, True]),
        (TX, [True, False]),
        (CONTROL_TX, [True]),
        (RX, [False]),
        (RX, [True, False]),
        (RX, [False, True]),
    ],
    ids=lambda value: str(value),
)
@pytest.mark.parametrize("indirectly", [False, True])
def test_wrong_direction(pair: Pair, index: int, parts: list[bool], indirectly: bool) -> None:
    """A descriptor of the wrong direction, first or later, stops the queue."""
    with attach(pair.daemon) as peer, quiet_guest(pair) as console:
        if index == RX:
            peer.sendall(b"typed")
        with broken(pair, console, index) as queue:
            memory = queue.driver.memory
            buffers = [Buffer(memory.alloc(16), 16, part) for part in parts]
            queue.driver.add_buffers(buffers, indirect=indirectly)
            queue.driver.publish()
            queue.kick()
    if index == RX:
        with boot(pair.daemon) as console:
            assert console.read(5) == b"typed"


def test_indirect_never_negotiated(pair: Pair) -> None:
    """An indirect table that the guest did not say it would use stops the queue."""
    features = DRIVER_FEATURES & ~Feature.INDIRECT_DESC
    with quiet_guest(pair, features) as console, broken(pair, console, TX) as tx:
        publish_after(indirect((0, 8, 0, 0)), tx)


def test_good_buffers_before_a_bad_one(pair: Pair) -> None:
    """What was whole before the mistake is completed and shown."""
    with attach(pair.daemon) as peer, quiet_guest(pair) as console:
        tx = console.port.tx
        used = tx.driver.used_idx
        for number in range(5):
            tx.driver.add([b"%d" % number])
        tx.driver.offer(64)
        tx.notify()
        assert exactly(peer, 5) == b"01234"
        until(lambda: tx.driver.used_idx == used + 5, "they never came back")
        assert console.frontend.get_vring_base(TX) == used + 5


def test_broken_queue_starts_again(pair: Pair) -> None:
    """A queue that was broken works again when it is set up anew."""
    with attach(pair.daemon) as peer, quiet_guest(pair) as console:
        with broken(pair, console, TX) as tx:
            publish_after(HOSTILE["self-loop"], tx)
        tx.driver.reset()
        console.frontend.start_queue(TX, tx.driver)
        console.write(b"again")
        assert exactly(peer, 5) == b"again"


def test_another_kick_does_not_mend_a_broken_queue(pair: Pair) -> None:
    """It stays stopped until it is set up anew, and nothing waits for it meanwhile."""
    with quiet_guest(pair) as console:
        tx = console.port.tx
        publish_after(HOSTILE["self-loop"], tx)
        until(lambda: pair.daemon.status()[0]["broken"], "not broken")
        used = tx.driver.used_idx
        tx.driver.write_desc(0, tx.driver.memory.alloc(4096), 8)
        console.frontend.set_vring_kick(TX, tx.new_kick_fd())
        console.frontend.set_memory(tx.driver.memory)
        assert tx.driver.used_idx == used


@pytest.mark.parametrize("addr", [0, 1 << 60], ids=["address 0", "nowhere"])
def test_empty_buffers(pair: Pair, addr: int) -> None:
    """Buffers without bytes come back with 0, whatever their address; nothing spins."""
    with attach(pair.daemon) as peer, quiet_guest(pair) as console:
        tx, rx, control = (console.frontend.queues[index] for index in (TX, RX, CONTROL_TX))
        for queue, flag in ((tx, False), (control, False), (rx, True)):
            queue.driver.add_buffers([Buffer(addr, 0, flag)] * 3)
            queue.driver.add_buffers([Buffer(addr, 0, flag)])
        rx.driver.add(writable=[0, 4])
        for queue in (tx, control, rx):
            queue.notify()
        assert [used.length for used in until(tx.driver.reap, "tx")] == [0, 0]
        assert [used.length for used in until(control.driver.reap, "control")] == [0, 0]
        peer.sendall(b"read")
        until(lambda: rx.driver.used_idx == 3, "input")
        assert [used.length for used in rx.driver.reap()] == [0, 0, 4]


def test_descriptor_that_changes_all_the_time(pair: Pair) -> None:
    """A guest that rewrites descriptors while they are read only harms its own queue."""
    with attach(pair.daemon) as peer, quiet_guest(pair) as console:
        tx = console.port.tx
        good = tx.driver.memory.alloc(4096)
        for _ in range(200):
            for index in range(32):
                tx.driver.write_desc(index, good, 8)
                tx.driver.set_avail_entry(tx.driver.avail_idx + index, index)
            tx.driver.set_avail_idx(tx.driver.avail_idx + 32)
            tx.kick()
            for index in range(32):
                tx.driver.write_desc(index, 1 << 60, 0xFFFF_FFFF, DESC_F_NEXT, 99)
                tx.driver.write_desc(index, good, 8)
        console.frontend.barrier()
        peer.sendall(b"typed")
        rx = console.port.rx
        rx.driver.add(writable=[16])
        rx.notify()
        assert rx.wait(WITHIN)[0].data == b"typed"


def test_used_index_rewritten(pair: Pair) -> None:
    """What the guest writes over used.idx is not believed."""
    with attach(pair.daemon) as peer, quiet_guest(pair) as console:
        tx = console.port.tx
        used = tx.driver.used_idx
        tx.driver.set_used_idx(used + 1000)
        tx.driver.add([b"still here"])
        tx.notify()
        assert exactly(peer, 10) == b"still here"
        until(lambda: tx.driver.used_idx == used + 1, "its own count")


# The control queue


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"x",
        bytes(7),
        struct.pack("<IHH", 1, 3, 1),
        struct.pack("<IHH", 0xFFFF_FFFF, 6, 1),
        struct.pack("<IHH", 0, 8, 1),
        struct.pack("<IHH", 0, 0xFFFF, 1),
        struct.pack("<IHH", 0, 1, 1),
        struct.pack("<IHH", 0, 5, 1),
        struct.pack("<IHH", 9, 6, 1) + bytes(100),
        bytes([255]) * (MIB // 4),
    ],
    ids=lambda m: f"{len(m)} bytes {m[:8].hex()}",
)
def test_control_message_without_sense(pair: Pair, message: bytes) -> None:
    """A control message that makes no sense is ignored, its buffer returned, with no answer."""
    with attach(pair.daemon) as peer, boot(pair.daemon) as console:
        console.control.clear()
        used = console.frontend.queues[CONTROL_RX].driver.used_idx
        console.send_control_raw(message)
        converse(console, peer)
        assert console.frontend.queues[CONTROL_RX].driver.used_idx == used


def test_longest_control_message(pair: Pair) -> None:
    """A control message of 1 MiB is returned as any other."""
    with attach(pair.daemon) as peer, boot(pair.daemon) as console:
        control = console.frontend.queues[CONTROL_TX]
        buffer = control.driver.memory.alloc(1 << 16)
        control.driver.add_buffers([Buffer(buffer, 1 << 16, False)] * 16)
        control.notify()
        console.wait_until(lambda: console.control_idle, "the message back")
        converse(console, peer)


def test_open_before_add(pair: Pair) -> None:
    """PORT_OPEN before DEVICE_READY opens nothing."""
    with (
        GuestMemory() as memory,
        attach(pair.daemon) as peer,
        connect_like_qemu(pair.daemon.sockets[0], memory, timeout=WITHIN) as frontend,
    ):
        control, rx, tx = (frontend.queues[index] for index in (CONTROL_TX, RX, TX))
        rx.driver.add(writable=[16])
        rx.notify()
        control.driver.add([struct.pack("<IHH", 0, 6, 1)])
        control.notify()
        control.wait(WITHIN)
        peer.sendall(b"held")
        tx.driver.add([b"a sign of life"])
        tx.notify()
        receive_until(peer, b"a sign of life")
        frontend.barrier()
        assert not rx.driver.has_used()
    with boot(pair.daemon) as console:
        assert console.read(4) == b"held"


def test_control_flood_without_buffers(pair: Pair) -> None:
    """A guest that asks and asks and takes no answer gets its buffers, and few answers later."""
    with attach(pair.daemon) as peer, boot(pair.daemon) as console:
        control, answers = (console.frontend.queues[i] for i in (CONTROL_TX, CONTROL_RX))
        start = answers.driver.used_idx
        for _ in range(2000):
            until(lambda: control.driver.reap() or control.driver.free, "control buffers")
            control.driver.add([struct.pack("<IHH", 0, 3, 1)])
            control.notify()
        until(lambda: control.driver.reap() or not control.driver.in_flight, "control buffers")
        assert answers.driver.used_idx - start == answers.driver.size
        console.control.clear()
        converse(console, peer)
        # Three for each question, as many as there were buffers, and what was kept.
        assert answers.driver.size <= len(console.control) <= answers.driver.size + 16
