"""Statements about the protocol's extensions: memory slots, logging, in-flight buffers, state."""

from __future__ import annotations

import mmap
import os
import select
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from ...worker.vhost_user.message import (
    InflightArea,
    LogArea,
    ProtocolFeature,
    Region,
    Request,
    VringState,
)
from ..console import ConsoleDriver, Control, Event
from ..driver import Buffer
from ..errors import DeviceError, NackError
from ..features import Feature
from ..frontend import Frontend
from .bench import CONTROL_RX, RX, SIZE, TX, Bench, marker, split_driver
from .rings import untouched, write
from .statement import BrokenError, Level, NotApplicableError, expect, statement

MUST, SHOULD = Level.MUST, Level.SHOULD
F, P = Feature, ProtocolFeature

_PAGE = 4096

# Memory slots


def _slots(count: int) -> list[Region]:
    return [
        Region(0x1000_0000 + at * 0x40_0000, 0x10_0000, 0x7E00_0000_0000 - at * 0x100_0000, 0)
        for at in range(count)
    ]


def _write_from(bench: Bench, frontend: Frontend, region: int) -> None:
    queue = frontend.queues[TX]
    memory = queue.driver.memory
    addr = memory.alloc(8, region=region)
    memory.write(addr, b"region\r\n")
    queue.driver.add_buffers([Buffer(addr, 8, False)])
    queue.notify()
    bench.used(queue)


def _in_slots(bench: Bench, count: int) -> tuple[Frontend, list[tuple[Region, int]]]:
    """Return a running frontend with memory that was added region by region."""
    frontend = bench.negotiate()
    memory = bench.memory(_slots(count))
    regions = memory.regions()
    for region, fd in regions:
        frontend.add_mem_reg(region, fd)
    for index in (0, 1):
        frontend.start_queue(index, bench.ring(memory))
    return frontend, regions


@statement("slots.count", MUST, "vhost-user GET_MAX_MEM_SLOTS", P.CONFIGURE_MEM_SLOTS)
def slots_count(bench: Bench) -> None:
    """GET_MAX_MEM_SLOTS says how many memory slots there are, at least one."""
    count = bench.negotiate().get_max_mem_slots()
    expect(count >= 1, f"{count} slots", "1 or more")


@statement("slots.add", MUST, "vhost-user ADD_MEM_REG", P.CONFIGURE_MEM_SLOTS)
def slots_add(bench: Bench) -> None:
    """Regions added one at a time are mapped, before rings start and while they run."""
    count = min(bench.negotiate().get_max_mem_slots(), 20)
    frontend, _ = _in_slots(bench, count)
    for region in range(count):
        _write_from(bench, frontend, region)


@statement("slots.add-while-running", MUST, "vhost-user ADD_MEM_REG", P.CONFIGURE_MEM_SLOTS)
def slots_add_while_running(bench: Bench) -> None:
    """A region added while rings run is used by the next buffer in it."""
    frontend = bench.negotiate()
    memory = bench.memory(_slots(2))
    (first, first_fd), (second, second_fd) = memory.regions()
    frontend.add_mem_reg(first, first_fd)
    for index in (0, 1):
        frontend.start_queue(index, bench.ring(memory))
    _write_from(bench, frontend, 0)
    frontend.add_mem_reg(second, second_fd)
    _write_from(bench, frontend, 1)
    _write_from(bench, frontend, 0)


@statement("slots.remove", MUST, "vhost-user REM_MEM_REG", P.CONFIGURE_MEM_SLOTS)
def slots_remove(bench: Bench) -> None:
    """A region is removed by its addresses and size, whatever offset is said; others stay."""
    frontend, regions = _in_slots(bench, 3)
    region, fd = regions[2]
    frontend.rem_mem_reg(region._replace(mmap_offset=12345))
    for number in (0, 1):
        _write_from(bench, frontend, number)
    frontend.add_mem_reg(region, fd)
    _write_from(bench, frontend, 2)


@statement("slots.remove-closes", MUST, "vhost-user REM_MEM_REG", P.CONFIGURE_MEM_SLOTS)
def slots_remove_closes(bench: Bench) -> None:
    """A descriptor that comes with REM_MEM_REG is closed, whether the message is taken or not."""
    frontend, regions = _in_slots(bench, 2)
    ours, theirs = os.pipe2(os.O_CLOEXEC)
    try:
        try:
            frontend.rem_mem_reg(regions[1][0], theirs)
        except (NackError, ConnectionError):
            pass
        finally:
            os.close(theirs)
        ended = bool(select.select([ours], [], [], bench.timeout)[0])
    finally:
        os.close(ours)
    expect(ended, "it is still open", "it to be closed")


@statement(
    "slots.remove-unknown", SHOULD, "vhost-user REM_MEM_REG", P.CONFIGURE_MEM_SLOTS, hostile=True
)
def slots_remove_unknown(bench: Bench) -> None:
    """Removing a region that was never added is refused."""
    frontend, regions = _in_slots(bench, 2)
    other = regions[1][0]._replace(guest_addr=0x5000_0000)
    expect(
        bench.refused(frontend, lambda: frontend.rem_mem_reg(other)),
        "it was acknowledged with 0",
        "a refusal",
    )


@statement("slots.add-without", MUST, "vhost-user ADD_MEM_REG", P.CONFIGURE_MEM_SLOTS, hostile=True)
def slots_add_without(bench: Bench) -> None:
    """ADD_MEM_REG has exactly one descriptor: with none it is refused."""
    frontend = bench.negotiate()
    payload = struct.pack("=QQQQQ", 0, *_slots(1)[0])
    expect(
        bench.refused(frontend, lambda: frontend.tell(Request.ADD_MEM_REG, payload)),
        "it was acknowledged with 0",
        "a refusal",
    )


# The log of written pages


@contextmanager
def _log(frontend: Frontend, *, offset: int = 0) -> Iterator[mmap.mmap]:
    """Give the log of a running guest, as a map, once the backend logs to it."""
    memory = frontend.queues[TX].driver.memory
    top = max(region.guest_addr + region.size for region, _ in memory.regions())
    size = -(-(top // _PAGE + 8) // 8 // _PAGE) * _PAGE
    fd = os.memfd_create("log", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, offset + size)
        with mmap.mmap(fd, size, offset=offset) as log:
            frontend.start_log(LogArea(size, offset), fd)
            yield log
    finally:
        os.close(fd)


def _dirty(log: mmap.mmap, addr: int) -> bool:
    page = addr // _PAGE
    return bool(log[page // 8] >> page % 8 & 1)


@statement("log.base", MUST, "vhost-user Communication", P.LOG_SHMFD)
def log_base(bench: Bench) -> None:
    """SET_LOG_BASE is answered."""
    frontend = bench.start()
    with _log(frontend):
        write(bench, frontend.queues[TX])


@statement("log.data", MUST, "vhost-user Migration", P.LOG_SHMFD, F.LOG_ALL, F.MULTIPORT)
def log_data(bench: Bench) -> None:
    """The page of a buffer that the device writes to is marked, at the offset of the log."""
    frontend = bench.start()
    heard = frontend.queues[CONTROL_RX]
    memory = heard.driver.memory
    addr = -(-memory.alloc(3 * _PAGE) // _PAGE) * _PAGE
    heard.driver.add_buffers([Buffer(addr, 64, True)])
    with _log(frontend, offset=_PAGE) as log:
        heard.notify()
        bench.say(frontend, Event.DEVICE_READY)
        bench.used(heard)
        expect(_dirty(log, addr), f"page {addr // _PAGE:#x} is not marked", "it to be")
        expect(not _dirty(log, addr + _PAGE), "the page after it is marked too", "that it is not")


@statement("log.used", MUST, "vhost-user Migration", P.LOG_SHMFD, F.LOG_ALL)
def log_used(bench: Bench) -> None:
    """The page of the used ring is marked when a buffer is used."""
    frontend = bench.start(queues=2)
    queue = frontend.queues[TX]
    with _log(frontend) as log:
        write(bench, queue)
        expect(
            any(_dirty(log, queue.driver.used_addr + at) for at in (0, 4)),
            "the used ring's page is not marked",
            "it to be",
        )


@statement("log.used-elsewhere", MUST, "vhost-user Migration", P.LOG_SHMFD, F.LOG_ALL)
def log_used_elsewhere(bench: Bench) -> None:
    """The used ring is marked as if it lay at the log address of SET_VRING_ADDR."""
    frontend = bench.start(queues=2)
    queue = frontend.queues[TX]
    driver = queue.driver
    user = driver.memory.user_addr
    place = driver.memory.alloc(16 * _PAGE, _PAGE) + 8 * _PAGE
    with _log(frontend) as log:
        frontend.set_vring_addr(
            TX,
            user(driver.desc_addr),
            user(driver.used_addr),
            user(driver.avail_addr),
            place,
            flags=1,
        )
        log[:] = bytes(len(log))
        write(bench, queue)
        expect(_dirty(log, place), "the log address's page is not marked", "it to be")


@statement("log.off", SHOULD, "vhost-user Migration", P.LOG_SHMFD, F.LOG_ALL)
def log_off(bench: Bench) -> None:
    """Once LOG_ALL is no longer among the features nothing is marked."""
    frontend = bench.start(queues=2)
    with _log(frontend) as log:
        write(bench, frontend.queues[TX])
        frontend.stop_log()
        log[:] = bytes(len(log))
        write(bench, frontend.queues[TX])
        expect(not any(log[:]), "a page is marked", "none")


@statement("log.packed", MUST, "vhost-user Migration", P.LOG_SHMFD, F.LOG_ALL, F.RING_PACKED)
def log_packed(bench: Bench) -> None:
    """In a packed ring the written descriptors' page is marked, by its guest address."""
    frontend = bench.start(queues=2)
    queue = frontend.queues[TX]
    with _log(frontend) as log:
        write(bench, queue)
        expect(
            _dirty(log, queue.driver.desc_addr) or _dirty(log, queue.driver.used_addr),
            "neither the descriptors' page nor the log address's is marked",
            "one of them to be",
        )


@statement("log.descriptor", SHOULD, "vhost-user SET_LOG_FD", P.LOG_SHMFD)
def log_descriptor(bench: Bench) -> None:
    """SET_LOG_FD is taken."""
    frontend = bench.start(queues=2)
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        frontend.set_log_fd(fd)
        frontend.barrier()
    finally:
        os.close(fd)


@statement("log.small", SHOULD, "vhost-user Migration", P.LOG_SHMFD, F.LOG_ALL, hostile=True)
def log_small(bench: Bench) -> None:
    """A log too small for the guest's memory, or past its file's end, does no harm."""
    for area in (LogArea(1, 0), LogArea(1 << 40, 0), LogArea(_PAGE, (1 << 64) - _PAGE)):
        frontend = bench.start(queues=2)
        fd = os.memfd_create("log", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, _PAGE)
            frontend.start_log(area, fd)
            write(bench, frontend.queues[TX])
        except (ConnectionError, DeviceError, BrokenError):
            pass
        finally:
            os.close(fd)


# Buffers in flight

_REGION = struct.Struct("<QHHHH")  # features, version, desc_num, last_batch_head, used_idx
_DESC_STATE = 16


def _area(bench: Bench) -> tuple[Frontend, InflightArea, int]:
    frontend = bench.negotiate()
    frontend.get_inflight_fd(4, SIZE)
    if frontend.inflight is None:
        raise BrokenError("GET_INFLIGHT_FD was answered with no area", "one")
    area, fd = frontend.inflight
    return frontend, area, fd


@statement("inflight.get", MUST, "vhost-user GET_INFLIGHT_FD", P.INFLIGHT_SHMFD)
def inflight_get(bench: Bench) -> None:
    """GET_INFLIGHT_FD is answered with a shared area for the queues and sizes asked for."""
    frontend, area, fd = _area(bench)
    expect(
        (area.queues, area.queue_size) == (4, SIZE),
        f"{area.queues} queues of {area.queue_size}",
        f"4 of {SIZE}, as asked",
    )
    least = 4 * (_REGION.size + _DESC_STATE * SIZE)
    expect(area.size >= least, f"{area.size} bytes", f"at least {least}")
    length = os.fstat(fd).st_size
    expect(length >= area.offset + area.size, f"a file of {length} bytes", f"{area}")
    frontend.forget_inflight()


@statement("inflight.set", MUST, "vhost-user SET_INFLIGHT_FD", P.INFLIGHT_SHMFD)
def inflight_set(bench: Bench) -> None:
    """With its area set rings work, and afterwards no buffer is marked as in flight."""
    frontend, area, fd = _area(bench)
    frontend.set_inflight_fd(area, fd)
    bench.start(frontend)
    queue = frontend.queues[TX]
    for _ in range(5):
        write(bench, queue)
    frontend.get_vring_base(TX)
    each = area.size // area.queues
    with mmap.mmap(fd, area.offset + area.size) as shared:
        part = shared[area.offset + TX * each : area.offset + (TX + 1) * each]
    _, version, _, _, used_idx = _REGION.unpack_from(part)
    marked = [at for at in range(SIZE) if part[_REGION.size + _DESC_STATE * at]]
    expect(not marked, f"descriptors {marked} are marked", "none, for all were used")
    expect(version == 0 or used_idx == 5, f"used_idx {used_idx} in the area", "5, as in the ring")
    frontend.forget_inflight()


@statement("inflight.once", MUST, "vhost-user Inflight I/O tracking", P.INFLIGHT_SHMFD)
def inflight_once(bench: Bench) -> None:
    """Buffers marked as in flight when a frontend comes back are used, each once."""
    frontend, area, fd = _area(bench)
    memory = bench.memory()
    driver = bench.ring(memory)
    driver.set_features(frontend.features)
    chains = [driver.add([b"again\r\n"]) for _ in range(3)]
    driver.publish()
    each = area.size // area.queues
    with mmap.mmap(fd, area.offset + area.size) as shared:
        at = area.offset + TX * each
        _REGION.pack_into(shared, at, 0, 1, SIZE, 0, 0)
        struct.pack_into("<BxxxxxHQ", shared, at + 16 + 16 * chains[0].head, 1, 0, 1)
    frontend.set_inflight_fd(area, fd)
    frontend.set_memory(memory)
    queue = frontend.start_queue(TX, driver, base=0)
    queue.kick()
    bench.used(queue, 3)
    expect(bench.quiet(driver.has_used), "a buffer was used again", "each once")
    frontend.forget_inflight()


@statement(
    "inflight.nonsense", SHOULD, "vhost-user SET_INFLIGHT_FD", P.INFLIGHT_SHMFD, hostile=True
)
def inflight_nonsense(bench: Bench) -> None:
    """An area of the frontend's with impossible counts and lists does no harm."""
    frontend, area, _ = _area(bench)
    fd = os.memfd_create("inflight", os.MFD_CLOEXEC)
    try:
        os.write(fd, b"\xff" * (area.offset + area.size))
        frontend.set_inflight_fd(area, fd)
        bench.start(frontend)
        split_driver(frontend.queues[TX]).add([b"\r\n"])
        frontend.queues[TX].notify()
        frontend.barrier()
    except (ConnectionError, DeviceError):
        pass
    finally:
        os.close(fd)
        frontend.forget_inflight()


# Device status, reset


@statement("status.kept", MUST, "vhost-user GET_STATUS", P.STATUS)
def status_kept(bench: Bench) -> None:
    """The device status reads back as it was written."""
    frontend = bench.negotiate()
    for status in (1, 3, 11, 15):
        frontend.set_status(status)
        got = frontend.get_status()
        expect(got == status, f"status {got:#x}", f"{status:#x}")


@statement("status.reset", MUST, "VIRTIO 2.4.1", P.STATUS)
def status_reset(bench: Bench) -> None:
    """After the status 0, which resets the device, it reads as 0."""
    frontend = bench.negotiate()
    frontend.set_status(15)
    frontend.set_status(0)
    got = frontend.get_status()
    expect(got == 0, f"status {got:#x}", "0")


@statement("reset.rings", MUST, "vhost-user RESET_DEVICE", P.RESET_DEVICE)
def reset_rings(bench: Bench) -> None:
    """After RESET_DEVICE the rings do nothing."""
    frontend = bench.start(queues=2)
    queue = frontend.queues[TX]
    write(bench, queue)
    frontend.reset_device()
    frontend.barrier()
    expect(untouched(bench, queue), "a buffer was used after the reset", "none")


@statement("reset.anew", MUST, "vhost-user RESET_DEVICE", P.RESET_DEVICE)
def reset_anew(bench: Bench) -> None:
    """After RESET_DEVICE the device is set up again over the same connection."""
    console = bench.console()
    console.write(b"before\r\n")
    frontend = console.frontend
    for _ in range(2):
        frontend.reset_device()
        frontend.set_features(bench.features)
        memory = bench.memory()
        bench.start(frontend, memory=memory, queues=bench.all_queues())
        bench.console(frontend).write(b"after\r\n")


# State


def _stopped(bench: Bench) -> Frontend:
    """Return a guest that has a console and whose rings are all stopped."""
    console = bench.console()
    for index in console.frontend.queues:
        console.frontend.get_vring_base(index)
    return console.frontend


@statement("state.save", MUST, "vhost-user SET_DEVICE_STATE_FD", P.DEVICE_STATE)
def state_save(bench: Bench) -> None:
    """A stopped device's state is written to its end, and CHECK_DEVICE_STATE says 0."""
    _stopped(bench).save_state()


@statement("state.save-again", SHOULD, "vhost-user Migrating back-end state", P.DEVICE_STATE)
def state_save_again(bench: Bench) -> None:
    """If a migration fails the source goes on, and can be saved another time."""
    console = bench.console()
    frontend = console.frontend
    for _ in range(2):
        bases = {index: frontend.get_vring_base(index) for index in frontend.queues}
        frontend.save_state()
        for index, base in bases.items():
            frontend.start_queue(index, frontend.queues[index].driver, base=base)
        console.write(b"still here\r\n")


@statement("state.load", MUST, "vhost-user Migrating back-end state", P.DEVICE_STATE)
def state_load(bench: Bench) -> None:
    """A device that loads a state goes on as if nothing had happened to the guest."""
    target = _moved(bench, bench.console())
    write(bench, target.queues[TX])


def _moved(bench: Bench, console: ConsoleDriver) -> Frontend:
    """Return the frontend of a guest that was migrated, over another connection."""
    source = console.frontend
    bases = {index: source.get_vring_base(index) for index in source.queues}
    state = source.save_state()
    target = bench.negotiate()
    target.set_memory(source.queues[TX].driver.memory)
    target.load_state(state)
    for index, base in bases.items():
        target.start_queue(index, source.queues[index].driver, base=base)
    for queue in target.queues.values():
        queue.kick()
    return target


@statement(
    "state.load-silent", MUST, "vhost-user Migrating back-end state", P.DEVICE_STATE, F.MULTIPORT
)
def state_load_silent(bench: Bench) -> None:
    """After a load no port is announced or described again; it may be open or of another size."""
    console = bench.console()

    def more() -> bool:
        before = len(console.control)
        console.pump()
        return len(console.control) > before

    while not bench.quiet(more):
        pass
    target = _moved(bench, console)
    write(bench, target.queues[TX])
    queue = target.queues[CONTROL_RX]
    bench.quiet(lambda: False)
    events = [Control.decode(used.data).event for used in queue.driver.reap()]
    again = [event for event in events if event not in (Event.PORT_OPEN, Event.RESIZE)]
    expect(not again, f"control events {again}", "none but PORT_OPEN and RESIZE")


@statement(
    "state.load-open", MUST, "vhost-user Migrating back-end state", P.DEVICE_STATE, client=True
)
def state_load_open(bench: Bench) -> None:
    """A port that was open in the guest gets its input after the load, with no more words."""
    console = bench.console()
    bench.meet(console)
    target = _moved(bench, console)
    late = marker()
    bench.client().send(late)
    queue = target.queues[RX]
    got = bytearray()

    def arrived() -> bool:
        got.extend(b"".join(used.data for used in queue.driver.reap()))
        return late in got

    bench.until(arrived, f"{late!r} in the input (so far {bytes(got[-40:])!r})")


@statement("state.nonsense", SHOULD, "vhost-user CHECK_DEVICE_STATE", P.DEVICE_STATE, hostile=True)
def state_nonsense(bench: Bench) -> None:
    """A state that is none, or cut short, is refused: CHECK_DEVICE_STATE says another number."""
    state = _stopped(bench).save_state()
    if not state:
        raise NotApplicableError("the state is empty")
    for wrong in (b"\xff" * 4096, state[: len(state) // 2]):
        frontend = bench.negotiate()
        frontend.set_memory(bench.memory())
        expect(
            bench.refused(frontend, lambda f=frontend, w=wrong: f.load_state(w)),  # type: ignore[misc]
            f"{len(wrong)} bytes that are no state were taken",
            "a refusal",
        )


@statement("state.direction", MUST, "vhost-user SET_DEVICE_STATE_FD", P.DEVICE_STATE, hostile=True)
def state_direction(bench: Bench) -> None:
    """A transfer in a direction or a phase that does not exist is refused, without a descriptor."""
    for direction, phase in ((2, 0), (0, 1), (1, 0xFFFF_FFFF)):
        frontend = _stopped(bench)
        ours, theirs = os.pipe2(os.O_CLOEXEC)
        try:
            answer = frontend.set_device_state_fd(direction, theirs, phase=phase)
        except ConnectionError:
            continue
        finally:
            os.close(ours)
            os.close(theirs)
        expect(
            answer & 0xFF and answer & 0x100,
            f"direction {direction}, phase {phase} answered with {answer:#x}",
            "an error in bits 0 to 7, and bit 8",
        )


# In-band notifications


@statement(
    "inband.needs", SHOULD, "vhost-user In-band notifications", P.INBAND_NOTIFICATIONS, hostile=True
)
def inband_needs(bench: Bench) -> None:
    """INBAND_NOTIFICATIONS without BACKEND_REQ and REPLY_ACK ends the connection."""
    frontend = bench.connect()
    frontend.get_protocol_features()
    frontend.set_protocol_features(P.INBAND_NOTIFICATIONS)
    try:
        frontend.barrier()
    except ConnectionError:
        return
    raise BrokenError("the connection goes on", "its end")


def _inband(bench: Bench) -> Frontend:
    frontend = bench.negotiate()
    frontend.set_backend_req_fd()
    return bench.start(frontend, queues=2, call_as="inband")


@statement("inband.kick", MUST, "vhost-user VRING_KICK", P.INBAND_NOTIFICATIONS)
def inband_kick(bench: Bench) -> None:
    """A ring without descriptors is started and kicked by VRING_KICK."""
    frontend = _inband(bench)
    for _ in range(5):
        write(bench, frontend.queues[TX])


@statement("inband.call", MUST, "vhost-user VRING_CALL", P.INBAND_NOTIFICATIONS)
def inband_call(bench: Bench) -> None:
    """The guest is called by VRING_CALL, which names the ring and has 0 as its number."""
    frontend = _inband(bench)
    queue = frontend.queues[TX]
    queue.driver.enable_calls()
    queue.driver.add([b"\r\n"])
    queue.notify()
    message = frontend.recv_backend()
    state = VringState.decode(message.payload)
    expect(message.header.request == 4, f"message {message.header.request}", "VRING_CALL (4)")
    expect(state == (TX, 0), f"{state}", f"ring {TX}, number 0")
    bench.used(queue)


@statement(
    "inband.acknowledged", SHOULD, "vhost-user In-band notifications", P.INBAND_NOTIFICATIONS
)
def inband_acknowledged(bench: Bench) -> None:
    """A kick is acknowledged once the ring was served, which simulations count on."""
    frontend = _inband(bench)
    queue = frontend.queues[TX]
    for _ in range(20):
        queue.driver.add([b"\r\n"])
        queue.driver.publish()
        queue.kick()
        expect(queue.driver.has_used(), "the buffer was not used yet", "it to be")
        bench.used(queue)
