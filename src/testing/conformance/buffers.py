"""Statements about virtqueues (VIRTIO 1.2, sections 2.6 to 2.8), in the formats on offer."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from ..console import Control, Event
from ..driver import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, Buffer, RingDriver
from ..features import Feature
from ..frontend import Frontend
from ..packed import EVENT_DESC, FRESH
from ..queue import Queue
from .bench import CONTROL_RX, CONTROL_TX, SIZE, TX, Bench, packed_driver, split_driver
from .rings import call, write
from .statement import Check, Level, expect, statement

MUST, SHOULD = Level.MUST, Level.SHOULD
F = Feature

_DESC = struct.Struct("<QIHH")
_READY = Control(0, Event.DEVICE_READY, 1).encode()
_ROUNDS = 200


def on_rings(
    name: str, level: Level, split: str, packed: str, *needs: Feature, **more: Any
) -> Callable[[Check], Check]:
    """Make a function two statements: one for each ring format, with the section it is from."""

    def register(check: Check) -> Check:
        statement(f"split.{name}", level, f"VIRTIO {split}", *needs, **more)(check)
        statement(f"packed.{name}", level, f"VIRTIO {packed}", F.RING_PACKED, *needs, **more)(check)
        return check

    return register


# Buffers and what they are made of


@on_rings("used-once", MUST, "2.7.8", "2.8.6")
def used_once(bench: Bench) -> None:
    """Every buffer is returned once, under its own id."""
    frontend = bench.start()
    queue = frontend.queues[TX]
    for number in (1, 3, 20):
        for _ in range(number):
            queue.driver.add([b"\r\n", b"\r\n"][: 1 + number % 2])
        queue.notify()
        bench.used(queue, number)
    expect(bench.quiet(queue.driver.has_used), "a buffer more than offered was used", "none")


@on_rings("written-nothing", MUST, "2.7.8", "2.8.4")
def written_nothing(bench: Bench) -> None:
    """A buffer that the device may only read is returned with nothing written."""
    queue = bench.start().queues[TX]
    for size in (1, 16, 4096):
        queue.driver.add([b"\n" * size])
        queue.notify()
        (used,) = bench.used(queue)
        expect(used.length == 0, f"{size} bytes returned with length {used.length}", "length 0")


def _hear(bench: Bench, frontend: Frontend, sizes: list[int]) -> bytes:
    """Return the device's answer to DEVICE_READY in a buffer of these parts."""
    heard = frontend.queues[CONTROL_RX]
    heard.driver.add(writable=sizes)
    heard.notify()
    bench.say(frontend, Event.DEVICE_READY)
    (used,) = bench.used(heard)
    expect(
        used.length == 8 and len(used.data) == 8,
        f"length {used.length} in room for {sum(sizes)}",
        "the 8 bytes of a PORT_ADD",
    )
    return used.data


def _is_port_add(data: bytes) -> None:
    port, event, _ = struct.unpack("<IHH", data)
    expect(event == Event.PORT_ADD, f"{data.hex()}: event {event} for port {port}", "PORT_ADD (1)")


@on_rings("written-length", MUST, "2.7.8.2", "2.8.4", F.MULTIPORT)
def written_length(bench: Bench) -> None:
    """A buffer that the device wrote to is returned with as many bytes as it wrote."""
    _is_port_add(_hear(bench, bench.start(), [4096]))


@on_rings("written-bounds", MUST, "2.7.5", "2.8.4", F.MULTIPORT)
def written_bounds(bench: Bench) -> None:
    """Nothing is written outside the buffer that was given."""
    frontend = bench.start()
    heard = frontend.queues[CONTROL_RX]
    memory = heard.driver.memory
    place = memory.alloc(4096)
    memory.write(place, b"\xa5" * 4096)
    heard.driver.add_buffers([Buffer(place + 64, 8, True)])
    heard.notify()
    bench.say(frontend, Event.DEVICE_READY)
    bench.used(heard)
    around = memory.read(place, 64) + memory.read(place + 72, 4096 - 72)
    expect(set(around) == {0xA5}, "bytes around an 8-byte buffer changed", "them as they were")


@on_rings("parts-read", MUST, "2.7.4.1", "2.8.5", F.MULTIPORT)
def parts_read(bench: Bench) -> None:
    """A message is read whatever descriptors it is in: here 1, 3, 2 and 2 bytes."""
    frontend = bench.start()
    heard, told = frontend.queues[CONTROL_RX], frontend.queues[CONTROL_TX]
    heard.driver.add(writable=[64])
    heard.notify()
    told.driver.add([_READY[:1], _READY[1:4], _READY[4:6], _READY[6:]])
    told.notify()
    bench.used(told)
    (used,) = bench.used(heard)
    _is_port_add(used.data)


@on_rings("parts-written", MUST, "2.7.4.1", "2.8.5", F.MULTIPORT)
def parts_written(bench: Bench) -> None:
    """A message is written whatever descriptors there are: here 1, 2, 4 and 64 bytes."""
    _is_port_add(_hear(bench, bench.start(), [1, 2, 4, 64]))


@on_rings("longest-chain", MUST, "2.7.5", "2.8.5")
def longest_chain(bench: Bench) -> None:
    """A chain may have as many descriptors as the ring has entries."""
    queue = bench.start().queues[TX]
    queue.driver.add([b"."] * (SIZE - 2) + [b"\r", b"\n"])
    queue.notify()
    bench.used(queue)


@on_rings("large-buffer", MUST, "2.7.4.1", "2.8.5")
def large_buffer(bench: Bench) -> None:
    """A descriptor of 32 KiB, the most Linux gives a port, is one buffer."""
    write(bench, bench.start().queues[TX], b".\r\n." * 8192)


@on_rings("empty-buffer", SHOULD, "2.7.4.1", "2.8.5", hostile=True)
def empty_buffer(bench: Bench) -> None:
    """A buffer without a byte is returned like any other, and the ring goes on."""
    queue = bench.start().queues[TX]
    write(bench, queue, b"")
    write(bench, queue)


@on_rings("read-only", MUST, "2.7.5.1", "2.8.15")
def read_only(bench: Bench) -> None:
    """What the device may only read it does not write."""
    queue = bench.start().queues[TX]
    memory = queue.driver.memory
    addr = memory.alloc(4096)
    data = bytes(byte % 64 + 32 for byte in range(4096))
    memory.write(addr, data)
    queue.driver.add_buffers([Buffer(addr, 4096, False)])
    queue.notify()
    bench.used(queue)
    expect(memory.read(addr, 4096) == data, "the bytes of an output buffer changed", "no write")


@statement("split.driver-parts", MUST, "VIRTIO 2.7.5.1")
def driver_parts(bench: Bench) -> None:
    """Neither the descriptor table nor the available ring is written by the device."""
    queue = bench.start().queues[TX]
    driver = split_driver(queue)

    def parts() -> bytes:
        table = driver.memory.read(driver.desc_addr, 16 * SIZE)
        return table + driver.memory.read(driver.avail_addr, 6 + 2 * SIZE)

    driver.add([b"parts\r\n", b"\r\n"])
    driver.publish()
    before = parts()
    queue.kick()
    bench.until(driver.has_used, "the buffer's return")
    expect(parts() == before, "the driver's parts of the ring changed", "no write")


@statement("split.any-order", MUST, "VIRTIO 2.7.5")
def any_order(bench: Bench) -> None:
    """A chain goes from descriptor to descriptor by `next`, wherever in the table they are."""
    queue = bench.start().queues[TX]
    driver = split_driver(queue)
    for order in ([SIZE - 1, 0, 7], [5, 4, 3], [1, SIZE // 2, 2]):
        addr = driver.memory.alloc(8)
        driver.memory.write(addr, b"order\r\n ")
        parts = [Buffer(addr, 2, False), Buffer(addr + 2, 3, False), Buffer(addr + 5, 2, False)]
        driver.add_buffers(parts, descriptors=order)
        queue.notify()
        bench.used(queue)


# Indirect descriptors


@on_rings("indirect", MUST, "2.7.5.3", "2.8.7", F.INDIRECT_DESC, F.MULTIPORT)
def indirect(bench: Bench) -> None:
    """A table of descriptors stands for the chain in it, read or written."""
    frontend = bench.start()
    heard, told = frontend.queues[CONTROL_RX], frontend.queues[CONTROL_TX]
    heard.driver.add(writable=[3, 61], indirect=True)
    heard.notify()
    told.driver.add([_READY[:5], _READY[5:]], indirect=True)
    told.notify()
    bench.used(told)
    (used,) = bench.used(heard)
    expect(used.length == 8, f"length {used.length}", "the 8 bytes of a PORT_ADD")
    _is_port_add(used.data)


@on_rings("indirect-and-direct", MUST, "2.7.5.3", "2.8.5", F.INDIRECT_DESC)
def indirect_and_direct(bench: Bench) -> None:
    """Buffers with and without a table of their own may follow each other on a ring."""
    queue = bench.start().queues[TX]
    for number in range(2 * SIZE):
        queue.driver.add([b"\r", b"\n"], indirect=bool(number % 3))
        queue.notify()
        bench.used(queue)


@statement("split.indirect-write-flag", MUST, "VIRTIO 2.7.5.3.2", F.INDIRECT_DESC)
def indirect_write_flag(bench: Bench) -> None:
    """The WRITE flag of a descriptor that refers to a table is ignored."""
    queue = bench.start().queues[TX]
    driver = split_driver(queue)
    table, text = _table(driver, (0, 4, DESC_F_NEXT, 1), (4, 4, 0, 0))
    driver.write_desc(0, table, 32, DESC_F_INDIRECT | DESC_F_WRITE)
    driver.offer(0, buffers=[Buffer(text, 8, False)])
    queue.notify()
    bench.used(queue)


@statement("split.indirect-last", MUST, "VIRTIO 2.7.5.3.2", F.INDIRECT_DESC, F.MULTIPORT)
def indirect_last(bench: Bench) -> None:
    """Normal descriptors may be followed by one that refers to a table; it ends the chain."""
    frontend = bench.start()
    heard, told = frontend.queues[CONTROL_RX], frontend.queues[CONTROL_TX]
    heard.driver.add(writable=[64])
    heard.notify()
    driver = split_driver(told)
    table, text = _table(driver, (2, 2, DESC_F_NEXT, 1), (4, 4, 0, 0))
    driver.memory.write(text, _READY)
    driver.write_desc(0, text, 2, DESC_F_NEXT, 1)
    driver.write_desc(1, table, 32, DESC_F_INDIRECT)
    driver.offer(0, buffers=[Buffer(text, 8, False)])
    told.notify()
    bench.used(told)
    (used,) = bench.used(heard)
    _is_port_add(used.data)


def _table(driver: RingDriver, *entries: tuple[int, int, int, int]) -> tuple[int, int]:
    """Write a table whose entries lie in a text of 8 bytes, and return both addresses."""
    text = driver.memory.alloc(8)
    driver.memory.write(text, b"table\r\n ")
    table = driver.memory.alloc(16 * len(entries))
    packed = [_DESC.pack(text + at, size, flags, next_) for at, size, flags, next_ in entries]
    driver.memory.write(table, b"".join(packed))
    return table, text


# Indices


@on_rings("laps", MUST, "2.7.13.3", "2.8.1")
def laps(bench: Bench) -> None:
    """A ring goes round and round, with buffers of one and of several descriptors."""
    queue = bench.start(size=8, queues=2).queues[TX]
    for number in range(50):
        queue.driver.add([b"\r\n"] * (1 + number % 3))
        queue.notify()
        bench.used(queue)


@statement("split.index-wraps", MUST, "VIRTIO 2.7.13.3")
def index_wraps(bench: Bench) -> None:
    """Indices go on from 65535 to 0."""
    queue = bench.start(size=8, start=65530, queues=2).queues[TX]
    for _ in range(20):
        write(bench, queue)


@statement("split.base", MUST, "vhost-user SET_VRING_BASE")
def base(bench: Bench) -> None:
    """A ring begins at the index that SET_VRING_BASE says, and the used ring says too."""
    queue = bench.start(start=7, queues=2).queues[TX]
    driver = split_driver(queue)
    write(bench, queue)
    expect(driver.used_idx == 8, f"used.idx {driver.used_idx} after the first", "8")


@statement("split.next-index", MUST, "vhost-user GET_VRING_BASE")
def next_index(bench: Bench) -> None:
    """GET_VRING_BASE returns the index of the next available entry, bits 16 to 31 zero."""
    frontend = bench.start(start=65534, queues=2)
    for _ in range(5):
        write(bench, frontend.queues[TX])
    got = frontend.get_vring_base(TX)
    expect(got == 3, f"{got} after 65534 and 5 buffers", "3")


@on_rings("in-order", MUST, "6.2", "6.2", F.IN_ORDER)
def in_order(bench: Bench) -> None:
    """With IN_ORDER buffers are used in the order in which they were offered."""
    queue = bench.start().queues[TX]
    for _ in range(3):
        offered = [queue.driver.add([b"\r\n"] * (1 + number % 2)) for number in range(20)]
        queue.notify()
        done = [used.chain for used in bench.used(queue, 20)]
        expect(done == offered, "buffers were returned in another order", "the order offered")


# Calls: used buffer notifications


@on_rings("call-wanted", MUST, "2.7.7.2", "2.8.10")
def call_wanted(bench: Bench) -> None:
    """Without EVENT_IDX every used buffer is notified while the driver's flag is clear."""
    queue = bench.start(without=F.EVENT_IDX, queues=2).queues[TX]
    for number in range(20):
        queue.driver.enable_calls()
        call(bench, queue, f"one for buffer {number}, the flag is clear")


@on_rings("call-unwanted", SHOULD, "2.7.7.2", "2.8.10")
def call_unwanted(bench: Bench) -> None:
    """Without EVENT_IDX no used buffer is notified while the driver's flag is set."""
    queue = bench.start(without=F.EVENT_IDX, queues=2).queues[TX]
    _no_call(bench, queue)


@on_rings("event-wanted", MUST, "2.7.7.2", "2.8.10", F.EVENT_IDX)
def event_wanted(bench: Bench) -> None:
    """With EVENT_IDX the used buffer that the driver names is notified."""
    queue = bench.start(queues=2).queues[TX]
    for number in range(3 * SIZE):
        queue.driver.enable_calls()
        call(bench, queue, f"one for buffer {number}, which the driver names")


@on_rings("event-unwanted", SHOULD, "2.7.7.2", "2.8.10", F.EVENT_IDX)
def event_unwanted(bench: Bench) -> None:
    """With EVENT_IDX no used buffer is notified that the driver does not name."""
    queue = bench.start(queues=2).queues[TX]
    _no_call(bench, queue)


def _no_call(bench: Bench, queue: Queue) -> None:
    write(bench, queue)
    queue.driver.disable_calls()
    while not bench.quiet(queue.take_calls):
        pass
    for _ in range(8):
        write(bench, queue)
    expect(bench.quiet(queue.take_calls), "a call that was not wanted", "none")


@statement("split.event-later", MUST, "VIRTIO 2.7.7.2", F.EVENT_IDX)
def event_later(bench: Bench) -> None:
    """When used_event is some buffers ahead, the call comes with that buffer."""
    queue = bench.start(start=65530, queues=2).queues[TX]
    driver = split_driver(queue)
    for ahead in (1, 3, 5):
        driver.disable_calls()
        driver.set_used_event(driver.used_idx + ahead)
        for _ in range(ahead):
            write(bench, queue)
        while not bench.quiet(queue.take_calls):
            pass
        call(bench, queue, f"one for buffer {ahead}, used_event names it")


@statement("split.event-in-batch", MUST, "VIRTIO 2.7.7.2", F.EVENT_IDX)
def event_in_batch(bench: Bench) -> None:
    """A call comes also when used_event is in the middle of buffers used together."""
    queue = bench.start(start=65530, queues=2).queues[TX]
    driver = split_driver(queue)
    for _ in range(5):
        driver.disable_calls()
        while not bench.quiet(queue.take_calls):
            pass
        driver.set_used_event(driver.used_idx + 4)
        for _ in range(8):
            driver.add([b"\r\n"])
        queue.notify()
        expect(bench.called(queue), "no call", "one for the fifth of 8 buffers")
        bench.used(queue, 8)


@statement("split.event-alone", MUST, "VIRTIO 2.7.7.2", F.EVENT_IDX)
def event_alone(bench: Bench) -> None:
    """With EVENT_IDX the flag in the available ring means nothing."""
    queue = bench.start(queues=2).queues[TX]
    driver = split_driver(queue)
    driver.enable_calls()
    driver.set_avail_flags(1)
    call(bench, queue, "one: used_event wants it, whatever the flags say")


@statement("split.flag-alone", MUST, "VIRTIO 2.7.7.2")
def flag_alone(bench: Bench) -> None:
    """Without EVENT_IDX the word used_event means nothing."""
    queue = bench.start(without=F.EVENT_IDX, queues=2).queues[TX]
    driver = split_driver(queue)
    driver.set_used_event(0x8000)
    driver.enable_calls()
    call(bench, queue, "one: the flag is clear, whatever used_event says")


# Kicks: available buffer notifications


@on_rings("kick-when-asked", MUST, "2.7.10", "2.8.10", F.EVENT_IDX)
def kick_when_asked(bench: Bench) -> None:
    """With EVENT_IDX a driver that kicks only when asked to has every buffer used."""
    queue = bench.start(queues=2).queues[TX]
    for _ in range(_ROUNDS):
        write(bench, queue)


@on_rings("kick-by-flag", MUST, "2.7.10", "2.8.10")
def kick_by_flag(bench: Bench) -> None:
    """Without EVENT_IDX a driver that kicks only when asked to has every buffer used."""
    queue = bench.start(without=F.EVENT_IDX, queues=2).queues[TX]
    for _ in range(_ROUNDS):
        write(bench, queue)


@on_rings("kick-for-nothing", MUST, "2.7.10.2", "2.8.16")
def kick_for_nothing(bench: Bench) -> None:
    """Kicks for no buffer do no harm, before the first one and after."""
    queue = bench.start(queues=2).queues[TX]
    for _ in range(20):
        queue.kick()
        queue.kick()
        write(bench, queue)
        queue.kick()
    expect(bench.quiet(queue.driver.has_used), "a buffer more than offered was used", "none")


@statement("split.device-flag", MUST, "VIRTIO 2.7.10.2")
def device_flag(bench: Bench) -> None:
    """Without EVENT_IDX the flags of the used ring are 0 or 1."""
    _flags(bench, bench.start(without=F.EVENT_IDX, queues=2), {0, 1})


@statement("split.device-no-flag", MUST, "VIRTIO 2.7.10.2", F.EVENT_IDX)
def device_no_flag(bench: Bench) -> None:
    """With EVENT_IDX the flags of the used ring are 0."""
    _flags(bench, bench.start(queues=2), {0})


def _flags(bench: Bench, frontend: Frontend, allowed: set[int]) -> None:
    queue = frontend.queues[TX]
    driver = split_driver(queue)
    for _ in range(20):
        write(bench, queue)
        seen = driver.used_flags
        expect(seen in allowed, f"used.flags {seen:#x}", f"one of {sorted(allowed)}")


# Reset of one queue


@on_rings("reset-forgets", MUST, "2.6.1.1.1", "2.6.1.1.1", F.RING_RESET)
def reset_forgets(bench: Bench) -> None:
    """A queue that was reset, by GET_VRING_BASE, uses nothing and calls nobody."""
    frontend = bench.start(queues=2)
    queue = frontend.queues[TX]
    write(bench, queue)
    bench.quiet(queue.take_calls)
    frontend.get_vring_base(TX)
    queue.driver.enable_calls()
    queue.driver.add([b"\r\n"])
    queue.driver.publish()
    queue.kick()
    expect(bench.quiet(queue.driver.has_used), "a buffer was used after the reset", "none")
    expect(not queue.take_calls(), "a call after the reset", "none")


@on_rings("reset-begins", MUST, "2.6.1.2.1", "2.6.1.2.1", F.RING_RESET)
def reset_begins(bench: Bench) -> None:
    """After its reset a queue begins anew, elsewhere and of another size; the others go on."""
    frontend = bench.start(queues=2)
    memory = frontend.queues[TX].driver.memory
    for size in (16, 256, 32):
        write(bench, frontend.queues[TX])
        frontend.stop_queue(TX)
        queue = frontend.start_queue(TX, bench.ring(memory, size))
        for _ in range(size + 3):
            write(bench, queue)


# What only packed rings have

_PACKED = F.RING_PACKED


@statement("packed.any-id", MUST, "VIRTIO 2.8.6", _PACKED)
def any_id(bench: Bench) -> None:
    """The id that is returned is that of a chain's last descriptor, any number of 16 bits."""
    queue = bench.start(queues=2).queues[TX]
    driver = packed_driver(queue)
    addr = driver.memory.alloc(2)
    driver.memory.write(addr, b"\r\n")
    for number in (0xFFFF, 0x8000, SIZE):
        driver.offer([(addr, 1, DESC_F_NEXT), (addr + 1, 1, 0)], buffer_id=number)
        queue.notify()
        bench.used(queue)


@statement("packed.any-size", MUST, "VIRTIO 2.8.10.1", _PACKED)
def any_size(bench: Bench) -> None:
    """A ring's size need not be a power of two."""
    for size in (1, 3, 100):
        frontend = bench.start(size=size, queues=2)
        for _ in range(2 * size + 1):
            write(bench, frontend.queues[TX])


@statement("packed.written-flag", MUST, "VIRTIO 2.8.3", _PACKED, F.MULTIPORT)
def written_flag(bench: Bench) -> None:
    """A used descriptor has the WRITE flag if the device has written, and only then."""
    frontend = bench.start()
    heard, told = (packed_driver(frontend.queues[index]) for index in (CONTROL_RX, CONTROL_TX))
    heard.add(writable=[64])
    frontend.queues[CONTROL_RX].notify()
    told.add([_READY])
    frontend.queues[CONTROL_TX].notify()
    for driver, wanted in ((told, 0), (heard, DESC_F_WRITE)):
        bench.until(driver.has_used, "a used descriptor")
        flags = driver.used_entry(0)[2]
        expect(flags & DESC_F_WRITE == wanted, f"flags {flags:#x}", f"WRITE to be {wanted:#x}")


@statement("packed.indirect-flags", MUST, "VIRTIO 2.8.7", _PACKED, F.INDIRECT_DESC)
def indirect_flags(bench: Bench) -> None:
    """In a table of descriptors every flag but WRITE is ignored, and so are the ids."""
    queue = bench.start(queues=2).queues[TX]
    driver = packed_driver(queue)
    text = driver.memory.alloc(8)
    driver.memory.write(text, b"table\r\n ")
    # A packed descriptor has the id where a split one has its flags, and the flags at the end.
    entries = [_DESC.pack(text + at, 4, 0xFFFF, DESC_F_NEXT | 0x8080) for at in (0, 4)]
    table = driver.memory.alloc(32)
    driver.memory.write(table, b"".join(entries))
    driver.offer([(table, 32, DESC_F_INDIRECT)])
    queue.notify()
    bench.used(queue)


@statement("packed.indirect-write-flag", MUST, "VIRTIO 2.8.7", _PACKED, F.INDIRECT_DESC)
def packed_indirect_write_flag(bench: Bench) -> None:
    """The WRITE flag of a descriptor that refers to a table is ignored."""
    queue = bench.start(queues=2).queues[TX]
    driver = packed_driver(queue)
    table, _ = _table(driver, (0, 8, 0, 0))
    driver.offer([(table, 16, DESC_F_INDIRECT | DESC_F_WRITE)])
    queue.notify()
    bench.used(queue)


@statement("packed.base", MUST, "vhost-user SET_VRING_BASE", _PACKED)
def packed_base(bench: Bench) -> None:
    """A ring begins at the entries and wrap counters that SET_VRING_BASE says."""
    for start in (5, 5 | FRESH, SIZE - 1):
        frontend = bench.start(start=start, queues=2)
        for _ in range(3):
            write(bench, frontend.queues[TX])


@statement("packed.next-index", MUST, "vhost-user GET_VRING_BASE", _PACKED)
def packed_next_index(bench: Bench) -> None:
    """GET_VRING_BASE returns the next entry and wrap counter, available and used."""
    for count in (3, 8, 11):
        frontend = bench.start(size=8, queues=2)
        for _ in range(count):
            write(bench, frontend.queues[TX])
        place = count % 8 | (0 if count // 8 % 2 else FRESH)
        got, wanted = frontend.get_vring_base(TX), place | place << 16
        expect(got == wanted, f"{got:#x} after {count} buffers", f"{wanted:#x}")


@statement("packed.start-again", MUST, "vhost-user SET_VRING_BASE", _PACKED)
def packed_start_again(bench: Bench) -> None:
    """A stopped ring goes on where it was, in either lap, with what was offered meanwhile."""
    frontend = bench.start(size=4, queues=2)
    queue = frontend.queues[TX]
    for _ in range(12):
        base = frontend.stop_queue(TX)
        queue.driver.add([b"meanwhile\r\n"])
        queue.driver.publish()
        frontend.start_queue(TX, queue.driver, base=base)
        queue.kick()
        bench.used(queue)


@statement("packed.event-later", MUST, "VIRTIO 2.8.10", _PACKED, F.EVENT_IDX)
def packed_event_later(bench: Bench) -> None:
    """When the driver names a descriptor further on, in this lap or the next, it is notified."""
    queue = bench.start(size=8, queues=2).queues[TX]
    driver = packed_driver(queue)
    for ahead in (1, 3, 5, 7):
        driver.disable_calls()
        at = (driver.next_used & ~FRESH) + ahead
        wrap = driver.next_used >> 15 ^ (at >= 8)
        driver.set_driver_event(EVENT_DESC, at % 8 | wrap << 15)
        for _ in range(ahead):
            write(bench, queue)
        while not bench.quiet(queue.take_calls):
            pass
        call(bench, queue, f"one for descriptor {at % 8}, which is named")


@statement("packed.device-event", MUST, "VIRTIO 2.8.14", _PACKED)
def device_event(bench: Bench) -> None:
    """Without EVENT_IDX the device's event flags are 0 or 1, reserved bits 0."""
    _device_event(bench, bench.start(without=F.EVENT_IDX, queues=2), {0, 1})


@statement("packed.device-event-idx", MUST, "VIRTIO 2.8.14", _PACKED, F.EVENT_IDX)
def device_event_idx(bench: Bench) -> None:
    """With EVENT_IDX the device's event flags are 0, 1 or 2, reserved bits 0."""
    _device_event(bench, bench.start(queues=2), {0, 1, 2})


def _device_event(bench: Bench, frontend: Frontend, allowed: set[int]) -> None:
    queue = frontend.queues[TX]
    for _ in range(20):
        write(bench, queue)
        (_, flags) = struct.unpack("<HH", queue.driver.memory.read(queue.driver.used_addr, 4))
        expect(flags in allowed, f"event flags {flags:#x}", f"one of {sorted(allowed)}")
