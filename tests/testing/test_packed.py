"""The packed ring's driver against a device that reads the memory with struct alone."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator

import pytest
from vhost_device_console.testing import (
    Buffer,
    DeviceError,
    Feature,
    GuestMemory,
    PackedDriver,
    RingFullError,
    SplitDriver,
    make_driver,
)
from vhost_device_console.testing.packed import EVENT_DESC, EVENT_DISABLE, EVENT_ENABLE

SIZE = 5
AVAIL, USED = 0x80, 0x8000

Element = tuple[int, int, bool]


class Device:
    """The other side of a ring, from the layout in VIRTIO 1.2, section 2.8."""

    def __init__(self, driver: PackedDriver, at: int = 0, wrap: int = 1) -> None:
        self.memory = driver.memory
        self.driver = driver
        self.size = driver.size
        self.taken = self.returned = (at, wrap)

    def forward(self, place: tuple[int, int], count: int) -> tuple[int, int]:
        at, wrap = place
        return ((at + count) % self.size, wrap ^ (at + count >= self.size))

    def descriptor(self, at: int) -> tuple[int, int, int, int]:
        addr, size, buffer_id, flags = struct.unpack(
            "<QIHH", self.memory.read(self.driver.desc_addr + 16 * at, 16)
        )
        return addr, size, buffer_id, flags

    def available(self) -> bool:
        at, wrap = self.taken
        flags = self.descriptor(at)[3]
        return (bool(flags & AVAIL), bool(flags & USED)) == (bool(wrap), not wrap)

    def pop(self) -> tuple[int, int, list[Element]]:
        """Return a chain's id, how many descriptors it takes, and its elements."""
        assert self.available()
        found: list[Element] = []
        count = 0
        while True:
            at, wrap = self.taken
            addr, size, buffer_id, flags = self.descriptor(at)
            assert flags & (AVAIL | USED) == (AVAIL if wrap else USED)
            self.taken = self.forward(self.taken, 1)
            count += 1
            if flags & 4:
                for entry in range(size // 16):
                    data = self.memory.read(addr + 16 * entry, 16)
                    *element, _, inner = struct.unpack("<QIHH", data)
                    assert inner & ~2 == 0
                    found.append((element[0], element[1], bool(inner & 2)))
            else:
                found.append((addr, size, bool(flags & 2)))
            if not flags & 1:
                return buffer_id, count, found

    def push(self, buffer_id: int, count: int, length: int) -> None:
        at, wrap = self.returned
        flags = (AVAIL | USED) * wrap | (2 if length else 0)
        data = struct.pack("<QIHH", 0, length, buffer_id, flags)
        self.memory.write(self.driver.desc_addr + 16 * at, data)
        self.returned = self.forward(self.returned, count)

    def serve(self, length: int = 0) -> list[Element]:
        buffer_id, count, found = self.pop()
        self.push(buffer_id, count, length)
        return found

    def set_event(self, flags: int, at: int = 0, wrap: int = 0) -> None:
        self.memory.write(self.driver.used_addr, struct.pack("<HH", at | wrap << 15, flags))

    def event(self) -> tuple[int, int, int]:
        place, flags = struct.unpack("<HH", self.memory.read(self.driver.avail_addr, 4))
        return flags, place & 0x7FFF, place >> 15


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory(1 << 16) as memory:
        yield memory


def test_ring_parts_are_aligned(memory: GuestMemory) -> None:
    """Descriptors lie on 16 bytes, the event structures on 4."""
    memory.alloc(1, 1)
    driver = PackedDriver(memory, SIZE)
    assert [driver.desc_addr % 16, driver.avail_addr % 4, driver.used_addr % 4] == [0, 0, 0]


def test_fresh_ring(memory: GuestMemory) -> None:
    """A ring begins zeroed, at entry 0, with both wrap counters at 1."""
    driver = PackedDriver(memory, SIZE)
    assert memory.read(driver.desc_addr, 16 * SIZE) == bytes(16 * SIZE)
    assert driver.base == 0x8000_8000


def test_chain_as_the_device_sees_it(memory: GuestMemory) -> None:
    """Readable buffers come first, then writable ones; the id is the last descriptor's."""
    driver = PackedDriver(memory, SIZE)
    device = Device(driver)
    chain = driver.add([b"abc", b"de"], [10, 20])
    driver.publish()
    buffer_id, count, found = device.pop()
    assert (buffer_id, count) == (chain.head, 4)
    assert [(size, writable) for _, size, writable in found] == [
        (3, False),
        (2, False),
        (10, True),
        (20, True),
    ]
    assert [memory.read(addr, size) for addr, size, _ in found[:2]] == [b"abc", b"de"]


def test_nothing_is_seen_before_publish(memory: GuestMemory) -> None:
    """However much was offered, the first descriptor's flags come with publish."""
    driver = PackedDriver(memory, SIZE)
    for _ in range(3):
        driver.add([b"x"])
    device = Device(driver)
    assert not device.available()
    driver.publish()
    assert [len(device.pop()[2]) for _ in range(3)] == [1, 1, 1]
    assert not device.available()


def test_indirect_chain(memory: GuestMemory) -> None:
    """An indirect chain takes one descriptor; its table has no flag but WRITE."""
    driver = PackedDriver(memory, SIZE)
    device = Device(driver)
    driver.add([b"abc"], [10], indirect=True)
    driver.publish()
    assert driver.free == SIZE - 1
    assert device.descriptor(0)[1] == 32
    assert device.descriptor(0)[3] == AVAIL | 4
    assert [(size, writable) for _, size, writable in device.pop()[2]] == [(3, False), (10, True)]


def test_empty_chain(memory: GuestMemory) -> None:
    """A chain without buffers is a ValueError."""
    with pytest.raises(ValueError, match="at least one buffer"):
        PackedDriver(memory, SIZE).add()


def test_ring_full(memory: GuestMemory) -> None:
    """Too few free descriptors is an error that says how many, and loses none."""
    driver = PackedDriver(memory, SIZE)
    for _ in range(SIZE - 1):
        driver.add([b"x"])
    with pytest.raises(RingFullError, match="2 descriptors are needed, 1 of 5 are free"):
        driver.add([b"x", b"y"])
    assert driver.free == 1


def test_ring_full_keeps_memory(memory: GuestMemory) -> None:
    """A chain that did not fit gives its memory back."""
    driver = PackedDriver(memory, 1)
    driver.add([b"x"])
    for _ in range(100):
        with pytest.raises(RingFullError):
            driver.add([bytes(1 << 14)], indirect=True)


def test_reap_gives_what_was_written(memory: GuestMemory) -> None:
    """A used chain comes back with its length and the bytes written, across its buffers."""
    driver = PackedDriver(memory, SIZE)
    device = Device(driver)
    chain = driver.add(writable=[4, 4, 4])
    driver.publish()
    buffer_id, count, found = device.pop()
    memory.write(found[0][0], b"abcd")
    memory.write(found[1][0], b"efgh")
    assert not driver.has_used()
    device.push(buffer_id, count, 6)
    assert driver.has_used()
    (used,) = driver.reap()
    assert (used.chain, used.length, used.data) == (chain, 6, b"abcdef")


def test_reap_out_of_order(memory: GuestMemory) -> None:
    """Chains come back in the device's order, whatever their lengths."""
    driver = PackedDriver(memory, 8)
    device = Device(driver)
    chains = [driver.add([b"x"] * count) for count in (1, 3, 2)]
    driver.publish()
    popped = [device.pop()[:2] for _ in chains]
    for buffer_id, count in reversed(popped):
        device.push(buffer_id, count, 0)
    assert [used.chain for used in driver.reap()] == chains[::-1]
    assert driver.free == 8


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 100])
@pytest.mark.parametrize("indirect", [False, True])
def test_laps(memory: GuestMemory, size: int, indirect: bool) -> None:
    """A ring of any size serves any number of chains of any length that fits."""
    driver = PackedDriver(memory, size)
    device = Device(driver)
    rng = random.Random(size)
    for _ in range(6 * size):
        pieces = [rng.randbytes(3) for _ in range(rng.randint(1, size))]
        driver.add(pieces, indirect=indirect)
        driver.publish()
        assert [memory.read(addr, count) for addr, count, _ in device.serve()] == pieces
        assert len(driver.reap()) == 1
    assert driver.free == size


@pytest.mark.parametrize("start", [0, 3, 4, 0x8000, 0x8003, 0x8004])
def test_start_anywhere(memory: GuestMemory, start: int) -> None:
    """A ring may begin at any entry, on a lap of either wrap counter."""
    driver = PackedDriver(memory, SIZE, start=start)
    device = Device(driver, start & 0x7FFF, start >> 15)
    assert not device.available()
    assert driver.base == start | start << 16
    for _ in range(3 * SIZE):
        driver.add([b"x"])
        driver.publish()
        device.serve()
        assert not device.available()
        assert len(driver.reap()) == 1


def test_base_follows_what_was_used(memory: GuestMemory) -> None:
    """A ring goes on after the last used chain, reaped or not."""
    driver = PackedDriver(memory, SIZE)
    device = Device(driver)
    for _ in range(2):
        driver.add([b"x"] * 2)
    driver.publish()
    device.serve()
    assert driver.base == 0x8002_8002
    device.serve()
    assert driver.base == 0x8004_8004
    driver.reap()
    assert driver.base == 0x8004_8004
    driver.add([b"x"] * 2)
    driver.publish()
    device.serve()
    assert driver.base == 0x0001_0001


def test_used_descriptor_never_offered(memory: GuestMemory) -> None:
    """A used descriptor that names no buffer in flight is the device's fault."""
    driver = PackedDriver(memory, SIZE)
    driver.add([b"x"])
    Device(driver).push(7, 1, 0)
    with pytest.raises(DeviceError, match="names buffer 7, not in flight"):
        driver.reap()


@pytest.mark.parametrize("packed", [False, True])
def test_batch_in_order(memory: GuestMemory, packed: bool) -> None:
    """With IN_ORDER one used element stands for all chains up to the one it names."""
    driver: SplitDriver | PackedDriver
    if packed:
        driver = PackedDriver(memory, 8, in_order=True)
    else:
        driver = SplitDriver(memory, 8, in_order=True)
    chains = [driver.add(writable=[4] * count) for count in (2, 1, 2)]
    driver.publish()
    if isinstance(driver, PackedDriver):
        Device(driver).push(chains[1].head, 3, 3)
    else:
        memory.write(driver.used_addr + 4, struct.pack("<II", chains[1].head, 3))
        driver.set_used_idx(2)
    used = driver.reap()
    assert [entry.chain for entry in used] == chains[:2]
    assert [entry.length for entry in used] == [8, 3]
    assert (driver.in_flight, driver.has_used()) == (1, False)


def test_batch_in_order_split_index(memory: GuestMemory) -> None:
    """With IN_ORDER used.idx moves by the whole batch."""
    driver = SplitDriver(memory, 8, in_order=True)
    chains = [driver.add([b"x"]) for _ in range(3)]
    driver.publish()
    memory.write(driver.used_addr + 4, struct.pack("<II", chains[2].head, 0))
    driver.set_used_idx(1)
    with pytest.raises(DeviceError, match="moved by 1, its elements stand for 3"):
        driver.reap()


def test_descriptors_in_order(memory: GuestMemory) -> None:
    """With IN_ORDER a split driver goes round its descriptor table."""
    driver = SplitDriver(memory, 4, in_order=True)
    seen = []
    for turn in range(8):
        chain = driver.add([b"x"])
        driver.publish()
        seen.extend(chain.descriptors)
        memory.write(driver.used_addr + 4 + 8 * (turn % 4), struct.pack("<II", chain.head, 0))
        driver.set_used_idx(turn + 1)
        driver.reap()
    assert seen == [0, 1, 2, 3, 0, 1, 2, 3]


@pytest.mark.parametrize(("flags", "needed"), [(EVENT_ENABLE, True), (EVENT_DISABLE, False)])
@pytest.mark.parametrize("event_idx", [False, True])
def test_kick_by_flag(memory: GuestMemory, flags: int, needed: bool, event_idx: bool) -> None:
    """ENABLE and DISABLE count with EVENT_IDX and without it."""
    driver = PackedDriver(memory, SIZE, event_idx=event_idx)
    Device(driver).set_event(flags)
    driver.add([b"x"])
    driver.publish()
    assert driver.kick_needed() is needed


@pytest.mark.parametrize("start", [0, 2, 4, 0x8000, 0x8002, 0x8004])
@pytest.mark.parametrize("count", [1, 2, SIZE])
def test_kick_by_event(memory: GuestMemory, start: int, count: int) -> None:
    """With DESC a kick is needed exactly when that descriptor becomes available on that lap."""
    for distance in range(2 * SIZE):
        driver = PackedDriver(memory, SIZE, event_idx=True, start=start)
        device = Device(driver)
        at, wrap = start & 0x7FFF, start >> 15
        for _ in range(distance):
            at, wrap = device.forward((at, wrap), 1)
        device.set_event(EVENT_DESC, at, wrap)
        for _ in range(count):
            driver.add([b"x"])
        driver.publish()
        assert driver.kick_needed() is (distance < count), distance
        assert not driver.kick_needed()


def test_kick_is_for_what_was_published(memory: GuestMemory) -> None:
    """What is offered and not published asks for no kick."""
    driver = PackedDriver(memory, SIZE, event_idx=True)
    Device(driver).set_event(EVENT_DESC, 1, 1)
    driver.add([b"x"])
    driver.publish()
    driver.add([b"x"])
    assert not driver.kick_needed()
    driver.publish()
    assert driver.kick_needed()


def test_calls(memory: GuestMemory) -> None:
    """Calls are asked for at the next used descriptor, or by flag, and refused by flag."""
    driver = PackedDriver(memory, SIZE)
    device = Device(driver)
    driver.disable_calls()
    assert device.event()[0] == EVENT_DISABLE
    driver.enable_calls()
    assert device.event()[0] == EVENT_ENABLE
    driver.set_features(Feature.RING_PACKED | Feature.EVENT_IDX)
    for _ in range(SIZE + 1):
        driver.add([b"x"])
        driver.publish()
        device.serve()
        driver.reap()
    assert device.event() == (EVENT_DESC, 1, 0)
    driver.disable_calls()
    assert device.event()[0] == EVENT_DISABLE


def test_enable_calls_tells_what_came_meanwhile(memory: GuestMemory) -> None:
    """A chain used while calls were off is not lost."""
    driver = PackedDriver(memory, SIZE)
    driver.disable_calls()
    driver.add([b"x"])
    driver.publish()
    assert not driver.enable_calls()
    Device(driver).serve()
    assert driver.enable_calls()


def test_chain_by_hand(memory: GuestMemory) -> None:
    """Descriptors by hand reach the device as they are, available by the lap's wrap counter."""
    driver = PackedDriver(memory, SIZE)
    driver.offer([(0x1122334455667788, 0x99AABBCC, 1), (5, 6, 2)], buffer_id=0xDDEE)
    driver.publish()
    device = Device(driver)
    assert device.descriptor(0) == (0x1122334455667788, 0x99AABBCC, 0, AVAIL | 1)
    assert device.descriptor(1) == (5, 6, 0xDDEE, AVAIL | 2)
    driver.write_desc(4, 1, 2, 3, 0xFFFF)
    assert device.descriptor(4) == (1, 2, 3, 0xFFFF)


def test_reset(memory: GuestMemory) -> None:
    """After reset the ring is as new, and its memory is free."""
    driver = PackedDriver(memory, SIZE)
    for _ in range(100):
        driver.add([bytes(1 << 14)], indirect=True)
        driver.publish()
        driver.reset()
    assert (driver.free, driver.in_flight, driver.base) == (SIZE, 0, 0x8000_8000)
    assert memory.read(driver.desc_addr, 16 * SIZE) == bytes(16 * SIZE)


def test_placed_ring(memory: GuestMemory) -> None:
    """The ring's parts can be put anywhere."""
    base = memory.alloc(4096, 4096)
    driver = PackedDriver(memory, SIZE, desc=base, avail=base + 0x204, used=base + 0x304)
    driver.add_buffers([Buffer(base, 1, True)])
    driver.publish()
    driver.disable_calls()
    assert struct.unpack("<QIHH", memory.read(base, 16)) == (base, 1, 0, AVAIL | 2)
    assert memory.read(base + 0x204, 4) == b"\0\0\1\0"


def test_format_of_the_features(memory: GuestMemory) -> None:
    """A driver is made for the format that was negotiated, and takes no other."""
    packed = make_driver(memory, SIZE, Feature.RING_PACKED | Feature.IN_ORDER)
    split = make_driver(memory, 8, Feature.EVENT_IDX)
    assert isinstance(packed, PackedDriver)
    assert (packed.in_order, packed.event_idx) == (True, False)
    assert isinstance(split, SplitDriver)
    assert (split.in_order, split.event_idx) == (False, True)
    with pytest.raises(ValueError, match="split rings were negotiated"):
        packed.set_features(Feature.VERSION_1)
    with pytest.raises(ValueError, match="packed rings were negotiated"):
        split.set_features(Feature.RING_PACKED)
