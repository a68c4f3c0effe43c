"""Statements about rings' states and guest memory, as vhost-user has them."""

from __future__ import annotations

from ...worker.vhost_user.message import ProtocolFeature, Region
from ..console import Event
from ..driver import Buffer
from ..features import Feature
from ..frontend import Frontend
from ..memory import GuestMemory
from ..queue import Queue
from .bench import CONTROL_RX, CONTROL_TX, SIZE, TX, Bench, marker
from .statement import Level, expect, statement

MUST, SHOULD = Level.MUST, Level.SHOULD
F, P = Feature, ProtocolFeature

_STATES = "vhost-user Ring states"


def write(bench: Bench, queue: Queue, data: bytes = b"\r\n") -> None:
    """Write something on a transmit queue, and wait until it was used."""
    queue.driver.add([data])
    queue.notify()
    bench.used(queue)


def call(bench: Bench, queue: Queue, why: str) -> None:
    """Write something on a transmit queue, and check that the device calls for it.

    The buffer is taken only after the call: taking it moves the event that the driver asks for, and
    a device may look at that at any time after it has used the buffer.
    """
    queue.driver.add([b"\r\n"])
    queue.notify()
    expect(bench.called(queue), "no call", why)
    bench.used(queue)


def untouched(bench: Bench, queue: Queue, data: bytes = b"\r\n") -> bool:
    """Offer something on a ring that shall not work, kick, and tell whether nothing happens."""
    queue.driver.add([data])
    queue.driver.publish()
    queue.kick()
    return bench.quiet(queue.driver.has_used)


@statement("ring.kick-starts", MUST, _STATES)
def kick_starts(bench: Bench) -> None:
    """Buffers that were there before the ring was started are used once it is kicked."""
    frontend = bench.negotiate()
    memory = bench.memory()
    frontend.set_memory(memory)
    driver = bench.ring(memory)
    driver.set_features(frontend.features)
    driver.add([b"first\r\n"])
    driver.publish()
    queue = frontend.start_queue(TX, driver)
    queue.kick()
    bench.used(queue)


def answers(bench: Bench, frontend: Frontend) -> None:
    """Ask the device for its ports, which only enabled rings do, and wait for the answer."""
    heard = frontend.queues[CONTROL_RX]
    heard.driver.add(writable=[64])
    heard.notify()
    bench.say(frontend, Event.DEVICE_READY)
    bench.used(heard)


@statement("ring.enabled-at-once", MUST, _STATES, F.MULTIPORT)
def enabled_at_once(bench: Bench) -> None:
    """SET_FEATURES without bit 30 enables all rings: no SET_VRING_ENABLE is needed."""
    frontend = bench.connect()
    frontend.set_owner()
    frontend.set_features(bench.features & ~F.PROTOCOL_FEATURES)
    answers(bench, bench.start(frontend))


@statement("ring.disabled-first", MUST, _STATES, F.PROTOCOL_FEATURES, F.MULTIPORT)
def disabled_first(bench: Bench) -> None:
    """With bit 30 a ring begins disabled: what the device has to say waits until it is enabled."""
    frontend = bench.start(enable=False)
    heard = frontend.queues[CONTROL_RX]
    heard.driver.add(writable=[64])
    heard.notify()
    frontend.enable(CONTROL_TX)
    bench.say(frontend, Event.DEVICE_READY)
    expect(bench.quiet(heard.driver.has_used), "a buffer of the disabled ring was filled", "none")


@statement("ring.disabled-drains", MUST, _STATES, F.PROTOCOL_FEATURES)
def disabled_drains(bench: Bench) -> None:
    """A started but disabled transmit ring is processed: its buffers are used."""
    frontend = bench.start()
    write(bench, frontend.queues[TX])
    frontend.disable(TX)
    write(bench, frontend.queues[TX])


@statement("ring.disabled-discards", MUST, _STATES, F.PROTOCOL_FEATURES, client=True)
def disabled_discards(bench: Bench) -> None:
    """What is sent through a disabled transmit ring reaches nobody."""
    console = bench.console()
    client = bench.meet(console)
    frontend, queue = console.frontend, console.port.tx
    frontend.disable(TX)
    queue.driver.add([b"never to be seen"])
    queue.driver.publish()
    queue.kick()
    bench.quiet(queue.driver.has_used)
    frontend.barrier()
    queue.driver.reap()
    frontend.enable(TX)
    end = marker()
    queue.driver.add([end])
    queue.driver.publish()
    queue.kick()
    got = client.read_until(end)
    expect(b"never to be seen" not in got, "the client got it", "nothing")


@statement("ring.enabled-before-start", MUST, _STATES, F.PROTOCOL_FEATURES, F.MULTIPORT)
def enabled_before_start(bench: Bench) -> None:
    """SET_VRING_ENABLE of a ring that is not started takes effect when it starts."""
    frontend = bench.negotiate()
    for index in range(4):
        frontend.enable(index)
    answers(bench, bench.start(frontend, enable=False))


@statement("ring.enabled-again", MUST, _STATES, F.PROTOCOL_FEATURES, F.MULTIPORT)
def enabled_again(bench: Bench) -> None:
    """A ring that was disabled works again once it is enabled."""
    frontend = bench.start()
    for _ in range(3):
        for index in (CONTROL_RX, CONTROL_TX):
            frontend.disable(index)
        frontend.barrier()
        for index in (CONTROL_RX, CONTROL_TX):
            frontend.enable(index)
        answers(bench, frontend)


@statement("ring.stop", MUST, "vhost-user GET_VRING_BASE")
def stop(bench: Bench) -> None:
    """GET_VRING_BASE stops a ring: what comes after it is not used, kicked or not."""
    frontend = bench.start()
    queue = frontend.queues[TX]
    write(bench, queue)
    frontend.get_vring_base(TX)
    expect(untouched(bench, queue), "a stopped ring's buffer was used", "no ring that is served")


@statement("ring.stop-one", MUST, "vhost-user GET_VRING_BASE", F.MULTIPORT)
def stop_one(bench: Bench) -> None:
    """GET_VRING_BASE stops only the ring it names."""
    frontend = bench.start()
    frontend.get_vring_base(CONTROL_TX)
    write(bench, frontend.queues[TX])


@statement("ring.start-again", MUST, "vhost-user SET_VRING_BASE")
def start_again(bench: Bench) -> None:
    """A stopped ring goes on where it was, with what was offered meanwhile."""
    frontend = bench.start()
    queue = frontend.queues[TX]
    for _ in range(3):
        write(bench, queue)
        base = frontend.stop_queue(TX)
        queue.driver.add([b"meanwhile\r\n"])
        queue.driver.publish()
        frontend.start_queue(TX, queue.driver, base=base)
        queue.kick()
        bench.used(queue)


@statement("ring.suspended", MUST, "vhost-user Suspended device state")
def suspended(bench: Bench) -> None:
    """While all rings are stopped nothing is written to guest memory, and nobody is called."""
    frontend = bench.start()
    memory = frontend.queues[TX].driver.memory
    for queue in frontend.queues.values():
        if queue.index % 2 == 0:
            queue.driver.add(writable=[64] * 4)
        else:
            queue.driver.add([b"\0" * 8])
        queue.driver.enable_calls()
    for index in frontend.queues:
        frontend.get_vring_base(index)
    (region, _) = memory.regions()[0]
    for queue in frontend.queues.values():
        queue.driver.publish()
        queue.kick()
        queue.take_calls()
    before = memory.read(region.guest_addr, region.size)
    calls = bench.quiet(lambda: any(queue.take_calls() for queue in frontend.queues.values()))
    expect(calls, "a call while all rings are stopped", "none")
    after = memory.read(region.guest_addr, region.size)
    expect(before == after, "guest memory was written while all rings are stopped", "no write")


@statement("ring.new-driver", MUST, _STATES, F.MULTIPORT)
def new_driver(bench: Bench) -> None:
    """After all rings were stopped, new ones from index 0 on have a device that works."""
    frontend = bench.start()
    write(bench, frontend.queues[TX])
    for index in frontend.queues:
        frontend.stop_queue(index)
    memory = frontend.queues[TX].driver.memory
    for index in list(frontend.queues):
        frontend.start_queue(index, bench.ring(memory))
    console = bench.console(frontend) if bench.all_queues() == 4 else None
    if console is None:
        write(bench, frontend.queues[TX])
    else:
        console.write(b"new\r\n")


@statement("ring.largest", SHOULD, "VIRTIO 2.7")
def largest(bench: Bench) -> None:
    """A ring of 1024 entries can be had, the size QEMU allows."""
    write(bench, bench.start(size=1024, queues=2).queues[TX])


@statement("ring.smallest", MUST, "VIRTIO 2.7")
def smallest(bench: Bench) -> None:
    """A ring of two entries works, lap after lap."""
    frontend = bench.start(size=2, queues=2)
    for _ in range(9):
        write(bench, frontend.queues[TX])


# Memory

_PAGE = 4096
_USER = 0x7E00_0000_0000


def _spread(count: int, *, touching: bool = False) -> list[Region]:
    step = 0x10_0000 if touching else 0x40_0000
    return [
        Region(0x1000_0000 + at * step, 0x10_0000, _USER - at * 0x100_0000, at * _PAGE)
        for at in range(count)
    ]


def _write_from(bench: Bench, memory: GuestMemory, regions: int) -> None:
    frontend = bench.start(bench.negotiate(), memory=memory, queues=2)
    queue = frontend.queues[TX]
    for region in range(regions):
        addr = memory.alloc(8, region=region)
        memory.write(addr, b"region\r\n")
        queue.driver.add_buffers([Buffer(addr, 8, False)])
        queue.notify()
        bench.used(queue)


@statement("memory.eight-regions", MUST, "vhost-user SET_MEM_TABLE")
def eight_regions(bench: Bench) -> None:
    """A table of 8 regions, each with its offset in its own file, is mapped and used."""
    _write_from(bench, bench.memory(_spread(8)), 8)


@statement("memory.two-addresses", MUST, "vhost-user Memory access", F.MULTIPORT)
def two_addresses(bench: Bench) -> None:
    """Rings lie at user addresses and buffers at guest addresses, whichever regions those are."""
    # Each region's guest addresses are the other's user addresses.
    one, two = 0x2000_0000, 0x3000_0000
    memory = bench.memory([Region(one, 1 << 20, two, 0), Region(two, 1 << 20, one, 0)])
    frontend = bench.start(memory=memory)
    heard = frontend.queues[CONTROL_RX]
    for region in (0, 1):
        addr = memory.alloc(64, region=region)
        heard.driver.add_buffers([Buffer(addr, 64, True)])
    heard.notify()
    bench.say(frontend, Event.DEVICE_READY)
    (used,) = bench.used(heard)
    expect(len(used.data) == 8, f"{used.length} bytes in the buffer", "a PORT_ADD of 8 bytes")


@statement("memory.touching", MUST, "VIRTIO 2.7.13.1")
def touching(bench: Bench) -> None:
    """A buffer may cross from one region into the next one, which begins where that ends."""
    memory = bench.memory(_spread(2, touching=True))
    frontend = bench.start(bench.negotiate(), memory=memory, queues=2)
    queue = frontend.queues[TX]
    border = 0x1000_0000 + 0x10_0000
    memory.write(border - 4, b"\0\0\0\0\0\0\r\n")
    queue.driver.add_buffers([Buffer(border - 4, 8, False)])
    queue.notify()
    bench.used(queue)


@statement("memory.on-the-fly", MUST, _STATES)
def on_the_fly(bench: Bench) -> None:
    """A new memory table with another region can be set while rings run; both are used then."""
    regions = _spread(2)
    memory = bench.memory(regions)
    frontend = bench.negotiate()
    bench.start(frontend, memory=memory, queues=2)
    queue = frontend.queues[TX]
    write(bench, queue)
    frontend.set_memory(memory)
    for region in (0, 1):
        addr = memory.alloc(8, region=region)
        memory.write(addr, b"region\r\n")
        queue.driver.add_buffers([Buffer(addr, 8, False)])
        queue.notify()
        bench.used(queue)


@statement("ring.full", MUST, "VIRTIO 2.7.14")
def whole_ring(bench: Bench) -> None:
    """As many buffers as the ring has entries can be out at once, and all are used."""
    frontend = bench.start(queues=2)
    queue = frontend.queues[TX]
    for _ in range(SIZE):
        queue.driver.add([b"\r\n"])
    queue.notify()
    bench.used(queue, SIZE)
