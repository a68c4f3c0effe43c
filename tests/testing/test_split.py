"""The ring driver against a device that reads the memory with struct alone."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from vhost_device_console.testing import (
    Buffer,
    DeviceError,
    Feature,
    GuestMemory,
    RingFullError,
    SplitDriver,
    need_event,
)

SIZE = 8


class Device:
    """The other side of a ring, from the layout in VIRTIO 1.2, section 2.7."""

    def __init__(self, driver: SplitDriver, start: int = 0) -> None:
        self.memory = driver.memory
        self.desc = driver.desc_addr
        self.avail = driver.avail_addr
        self.used = driver.used_addr
        self.taken = self.returned = start

    def u16(self, addr: int) -> int:
        (value,) = struct.unpack("<H", self.memory.read(addr, 2))
        return int(value)

    def store_u16(self, addr: int, value: int) -> None:
        self.memory.view(addr, 2, "H")[0] = value & 0xFFFF

    def descriptor(self, table: int, index: int) -> tuple[int, int, int, int]:
        addr, size, flags, following = struct.unpack(
            "<QIHH", self.memory.read(table + 16 * index, 16)
        )
        return addr, size, flags, following

    def chain(self, table: int, index: int) -> list[tuple[int, int, bool]]:
        found: list[tuple[int, int, bool]] = []
        while True:
            addr, size, flags, following = self.descriptor(table, index)
            if flags & 4:
                assert not flags & 1
                return found + self.chain(addr, 0)
            found.append((addr, size, bool(flags & 2)))
            if not flags & 1:
                return found
            index = following

    def available(self) -> bool:
        return self.taken != self.u16(self.avail + 2)

    def pop(self) -> tuple[int, list[tuple[int, int, bool]]]:
        assert self.available()
        head = self.u16(self.avail + 4 + 2 * (self.taken % SIZE))
        self.taken = (self.taken + 1) & 0xFFFF
        return head, self.chain(self.desc, head)

    def push(self, head: int, length: int) -> None:
        self.memory.write(
            self.used + 4 + 8 * (self.returned % SIZE), struct.pack("<II", head, length)
        )
        self.returned = (self.returned + 1) & 0xFFFF
        self.store_u16(self.used + 2, self.returned)

    def set_avail_event(self, value: int) -> None:
        self.store_u16(self.used + 4 + 8 * SIZE, value)

    def used_event(self) -> int:
        return self.u16(self.avail + 4 + 2 * SIZE)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory(1 << 16) as memory:
        yield memory


def test_ring_parts_are_aligned(memory: GuestMemory) -> None:
    """Descriptors lie on 16 bytes, the available ring on 2, the used ring on 4."""
    memory.alloc(1, 1)
    driver = SplitDriver(memory, SIZE)
    assert [driver.desc_addr % 16, driver.avail_addr % 2, driver.used_addr % 4] == [0, 0, 0]


def test_chain_as_the_device_sees_it(memory: GuestMemory) -> None:
    """Readable buffers come first, then writable ones, each with its bytes."""
    driver = SplitDriver(memory, SIZE)
    device = Device(driver)
    chain = driver.add([b"abc", b"de"], [10, 20])
    driver.publish()
    head, buffers = device.pop()
    assert head == chain.head
    assert [(size, writable) for _, size, writable in buffers] == [
        (3, False),
        (2, False),
        (10, True),
        (20, True),
    ]
    assert [memory.read(addr, size) for addr, size, _ in buffers[:2]] == [b"abc", b"de"]


def test_nothing_is_seen_before_publish(memory: GuestMemory) -> None:
    """A chain offered counts from publish on."""
    driver = SplitDriver(memory, SIZE)
    driver.add([b"x"])
    assert not Device(driver).available()


def test_indirect_chain(memory: GuestMemory) -> None:
    """An indirect chain takes one descriptor, and its table holds the buffers."""
    driver = SplitDriver(memory, SIZE)
    device = Device(driver)
    chain = driver.add([b"abc"], [10], indirect=True)
    driver.publish()
    assert driver.free == SIZE - 1
    _, size, flags, _ = device.descriptor(driver.desc_addr, chain.head)
    assert (size, flags) == (32, 4)
    assert [(size, writable) for _, size, writable in device.pop()[1]] == [(3, False), (10, True)]


def test_chosen_descriptors(memory: GuestMemory) -> None:
    """A chain can be laid out over any free descriptors."""
    driver = SplitDriver(memory, SIZE)
    addr = memory.alloc(8)
    buffers = [Buffer(addr + at, 1, False) for at in range(3)]
    driver.add_buffers(buffers, descriptors=[5, 0, 7])
    driver.publish()
    head, seen = Device(driver).pop()
    assert head == 5
    assert seen == [tuple(buffer) for buffer in buffers]
    assert Device(driver).descriptor(driver.desc_addr, 5)[3] == 0
    assert Device(driver).descriptor(driver.desc_addr, 0)[3] == 7


def test_chosen_descriptor_in_use(memory: GuestMemory) -> None:
    """A descriptor in use cannot be chosen."""
    driver = SplitDriver(memory, SIZE)
    buffer = Buffer(memory.alloc(8), 8, True)
    driver.add_buffers([buffer], descriptors=[3])
    with pytest.raises(RingFullError, match="not 1 free"):
        driver.add_buffers([buffer], descriptors=[3])


def test_chosen_descriptor_twice(memory: GuestMemory) -> None:
    """A descriptor cannot be chosen twice for one chain."""
    driver = SplitDriver(memory, SIZE)
    buffer = Buffer(memory.alloc(8), 8, True)
    with pytest.raises(RingFullError, match="not 2 free"):
        driver.add_buffers([buffer, buffer], descriptors=[3, 3])


def test_empty_chain(memory: GuestMemory) -> None:
    """A chain without buffers is a ValueError."""
    with pytest.raises(ValueError, match="at least one buffer"):
        SplitDriver(memory, SIZE).add()


def test_ring_full(memory: GuestMemory) -> None:
    """Too few free descriptors is an error that says how many, and loses none."""
    driver = SplitDriver(memory, SIZE)
    for _ in range(SIZE - 1):
        driver.add([b"x"])
    with pytest.raises(RingFullError, match="2 descriptors are needed, 1 of 8 are free"):
        driver.add([b"x", b"y"])
    assert driver.free == 1


def test_ring_full_keeps_memory(memory: GuestMemory) -> None:
    """A chain that did not fit gives its memory back."""
    driver = SplitDriver(memory, 1)
    driver.add([b"x"])
    for _ in range(100):
        with pytest.raises(RingFullError):
            driver.add([bytes(1 << 14)])


def test_reap_gives_what_was_written(memory: GuestMemory) -> None:
    """A used chain comes back with used.len and the bytes written, across its buffers."""
    driver = SplitDriver(memory, SIZE)
    device = Device(driver)
    chain = driver.add(writable=[4, 4, 4])
    driver.publish()
    head, buffers = device.pop()
    memory.write(buffers[0][0], b"abcd")
    memory.write(buffers[1][0], b"efgh")
    device.push(head, 6)
    (used,) = driver.reap()
    assert (used.chain, used.length, used.data) == (chain, 6, b"abcdef")


def test_reap_tells_an_excessive_length(memory: GuestMemory) -> None:
    """A used.len beyond the buffers is told as it is; the data end with the buffers."""
    driver = SplitDriver(memory, SIZE)
    device = Device(driver)
    driver.add(writable=[4])
    driver.publish()
    device.push(device.pop()[0], 1000)
    (used,) = driver.reap()
    assert (used.length, len(used.data)) == (1000, 4)


def test_reap_out_of_order(memory: GuestMemory) -> None:
    """Chains come back in the device's order."""
    driver = SplitDriver(memory, SIZE)
    device = Device(driver)
    chains = [driver.add([b"x"]) for _ in range(3)]
    driver.publish()
    heads = [device.pop()[0] for _ in range(3)]
    for head in reversed(heads):
        device.push(head, 0)
    assert [used.chain for used in driver.reap()] == chains[::-1]


def test_reap_frees_descriptors_and_memory(memory: GuestMemory) -> None:
    """A ring and its memory serve any number of chains, direct and indirect."""
    driver = SplitDriver(memory, SIZE)
    device = Device(driver)
    for turn in range(100):
        driver.add([bytes(1 << 14)], [1 << 14], indirect=bool(turn % 2))
        driver.publish()
        device.push(device.pop()[0], 0)
        assert len(driver.reap()) == 1
    assert driver.free == SIZE


def test_indices_wrap(memory: GuestMemory) -> None:
    """Chains keep their order over the wrap-around of both 16-bit indices."""
    driver = SplitDriver(memory, SIZE, start=65530)
    device = Device(driver, 65530)
    seen = []
    for turn in range(12):
        driver.add([bytes([turn])])
        driver.publish()
        head, ((addr, size, _),) = device.pop()
        seen.append(memory.read(addr, size))
        device.push(head, 0)
        assert len(driver.reap()) == 1
    assert seen == [bytes([turn]) for turn in range(12)]
    assert (driver.avail_idx, driver.used_idx) == (6, 6)


def test_used_element_never_offered(memory: GuestMemory) -> None:
    """A used element that names no chain in flight is the device's fault."""
    driver = SplitDriver(memory, SIZE)
    driver.add([b"x"])
    Device(driver).push(7, 0)
    with pytest.raises(DeviceError, match="names chain 7, not in flight"):
        driver.reap()


def test_used_index_too_far(memory: GuestMemory) -> None:
    """A used.idx past what is in flight is the device's fault."""
    driver = SplitDriver(memory, SIZE)
    driver.add([b"x"])
    driver.set_used_idx(2)
    with pytest.raises(DeviceError, match="2 past the last one, with 1 chains in flight"):
        driver.reap()


# Section 2.7.10.1, by hand: (event, new, old) -> notify.
@pytest.mark.parametrize(
    ("event", "new", "old", "needed"),
    [
        (0, 1, 0, True),
        (1, 1, 0, False),
        (5, 5, 0, False),
        (4, 5, 0, True),
        (4, 5, 4, True),
        (4, 6, 5, False),
        (0, 0, 0, False),
        (65535, 0, 65535, True),
        (65535, 2, 65530, True),
        (0, 2, 65530, True),
        (2, 2, 65530, False),
        (65529, 2, 65530, False),
        (65530, 65530, 65530, False),
    ],
)
def test_need_event(event: int, new: int, old: int, needed: bool) -> None:
    """A notification is due exactly when the index moves past the event."""
    assert need_event(event, new, old) is needed


def test_kick_by_event(memory: GuestMemory) -> None:
    """With EVENT_IDX a kick is needed when the chain after avail_event becomes available."""
    driver = SplitDriver(memory, SIZE, event_idx=True)
    Device(driver).set_avail_event(2)
    needed = []
    for _ in range(4):
        driver.add([b"x"])
        driver.publish()
        needed.append(driver.kick_needed())
    assert needed == [False, False, True, False]


def test_kick_by_event_for_a_batch(memory: GuestMemory) -> None:
    """Chains published together are one decision."""
    driver = SplitDriver(memory, SIZE, event_idx=True)
    Device(driver).set_avail_event(2)
    for _ in range(4):
        driver.add([b"x"])
    driver.publish()
    assert driver.kick_needed()
    assert not driver.kick_needed()


def test_kick_ignores_the_flag_with_events(memory: GuestMemory) -> None:
    """With EVENT_IDX used.flags means nothing."""
    driver = SplitDriver(memory, SIZE, event_idx=True)
    Device(driver).store_u16(driver.used_addr, 1)
    driver.add([b"x"])
    driver.publish()
    assert driver.kick_needed()


@pytest.mark.parametrize(("flags", "needed"), [(0, True), (1, False)])
def test_kick_by_flag(memory: GuestMemory, flags: int, needed: bool) -> None:
    """Without EVENT_IDX used.flags decides."""
    driver = SplitDriver(memory, SIZE)
    Device(driver).store_u16(driver.used_addr, flags)
    driver.add([b"x"])
    driver.publish()
    assert driver.kick_needed() is needed


def test_kick_after_nothing(memory: GuestMemory) -> None:
    """Nothing published, nothing to kick for."""
    driver = SplitDriver(memory, SIZE)
    driver.publish()
    assert not driver.kick_needed()


def test_used_event_follows_reap(memory: GuestMemory) -> None:
    """With EVENT_IDX each reap asks for a call at the next chain."""
    driver = SplitDriver(memory, SIZE, event_idx=True, start=65535)
    device = Device(driver, 65535)
    driver.add([b"x"])
    driver.publish()
    device.push(device.pop()[0], 0)
    driver.reap()
    assert device.used_event() == 0


def test_disable_calls_by_event(memory: GuestMemory) -> None:
    """With EVENT_IDX no call is due for as many chains as the ring holds."""
    driver = SplitDriver(memory, SIZE, event_idx=True)
    driver.disable_calls()
    event = Device(driver).used_event()
    assert not any(need_event(event, new, 0) for new in range(1, SIZE + 1))


@pytest.mark.parametrize("event_idx", [False, True])
def test_avail_flags(memory: GuestMemory, event_idx: bool) -> None:
    """NO_INTERRUPT is used without EVENT_IDX, and never with it."""
    driver = SplitDriver(memory, SIZE, event_idx=event_idx)
    device = Device(driver)
    driver.disable_calls()
    assert device.u16(driver.avail_addr) == (0 if event_idx else 1)
    driver.enable_calls()
    assert device.u16(driver.avail_addr) == 0


def test_enable_calls_tells_what_came_meanwhile(memory: GuestMemory) -> None:
    """A chain used while calls were off is not lost."""
    driver = SplitDriver(memory, SIZE)
    device = Device(driver)
    driver.disable_calls()
    driver.add([b"x"])
    driver.publish()
    assert not driver.enable_calls()
    device.push(device.pop()[0], 0)
    assert driver.enable_calls()


def test_set_features(memory: GuestMemory) -> None:
    """Whether events count is what was negotiated."""
    driver = SplitDriver(memory, SIZE)
    driver.set_features(Feature.VERSION_1 | Feature.EVENT_IDX)
    assert driver.event_idx
    driver.set_features(Feature.VERSION_1)
    assert not driver.event_idx


def test_chain_by_hand(memory: GuestMemory) -> None:
    """Descriptors written by hand reach the device as they are."""
    driver = SplitDriver(memory, SIZE)
    driver.write_desc(3, 0x1122334455667788, 0x99AABBCC, 0xDDEE, 0xFF00)
    driver.offer(3)
    driver.publish()
    device = Device(driver)
    assert device.u16(device.avail + 2) == 1
    assert device.u16(device.avail + 4) == 3
    assert device.descriptor(device.desc, 3) == (0x1122334455667788, 0x99AABBCC, 0xDDEE, 0xFF00)


def test_raw_words(memory: GuestMemory) -> None:
    """Every word of the available ring can be anything."""
    driver = SplitDriver(memory, SIZE)
    driver.set_avail_flags(0xAAAA)
    driver.set_avail_idx(0xBBBB)
    driver.set_avail_entry(7, 0xCCCC)
    driver.set_used_event(0xDDDD)
    ring = struct.unpack("<11H", memory.read(driver.avail_addr, 22))
    assert ring == (0xAAAA, 0xBBBB, 0, 0, 0, 0, 0, 0, 0, 0xCCCC, 0xDDDD)


def test_reset(memory: GuestMemory) -> None:
    """After reset the ring is as new, wherever it starts."""
    driver = SplitDriver(memory, SIZE)
    driver.add([b"x"], indirect=True)
    driver.publish()
    driver.reset(300)
    assert (driver.free, driver.in_flight) == (SIZE, 0)
    assert (driver.avail_idx, driver.used_idx) == (300, 300)


def test_placed_ring(memory: GuestMemory) -> None:
    """The ring's parts can be put anywhere."""
    base = memory.alloc(4096, 4096)
    driver = SplitDriver(memory, SIZE, desc=base, avail=base + 0x202, used=base + 0x304)
    driver.add([b"x"])
    driver.publish()
    assert struct.unpack("<H", memory.read(base + 0x204, 2)) == (1,)


def test_a_chain_that_is_not_published_needs_no_kick_yet(memory: GuestMemory) -> None:
    driver = SplitDriver(memory, 8)
    driver.add([b"x"])
    assert not driver.kick_needed()
    driver.publish()
    assert driver.kick_needed()
