"""Whole conversations as real frontends have them, message by message in their order.

Sources: QEMU hw/virtio/{vhost-user,vhost-user-base,vhost}.c, Linux arch/um/drivers/virtio_uml.c,
cloud-hypervisor virtio-devices/src/vhost_user/{generic_vhost_user,vu_common_ctrl}.rs and the
rust-vmm vhost crate, crosvm devices/src/virtio/vhost_user_frontend/mod.rs.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence

from ..worker.vhost_user.message import ProtocolFeature, Request
from .driver import RingDriver
from .features import DRIVER_FEATURES, Feature
from .frontend import FRONTEND_FEATURES, Frontend
from .memory import GuestMemory
from .packed import make_driver
from .split import SplitDriver

_NO_LOG = (1 << 64) - 1
_CONSOLE_QUEUES = 4

#: What virtio_uml knows, MQ apart, which came after 6.12 (arch/um/drivers/vhost_user.h).
_UML_PROTOCOL = (
    ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.INBAND_NOTIFICATIONS
)

#: What cloud-hypervisor's generic device passes on: nothing that is a device's own.
_CLOUD_HYPERVISOR_FEATURES = (
    Feature.INDIRECT_DESC | Feature.EVENT_IDX | Feature.VERSION_1 | Feature.IN_ORDER
)
_CLOUD_HYPERVISOR_PROTOCOL = (
    ProtocolFeature.CONFIG
    | ProtocolFeature.MQ
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.INFLIGHT_SHMFD
    | ProtocolFeature.LOG_SHMFD
    | ProtocolFeature.DEVICE_STATE
    | ProtocolFeature.BACKEND_REQ
)

_CROSVM_PROTOCOL = (
    ProtocolFeature.CONFIG
    | ProtocolFeature.MQ
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.DEVICE_STATE
    | ProtocolFeature.REPLY_ACK
)

# The virtio device status (VIRTIO 1.2, section 2.1).
_ACKNOWLEDGE, _DRIVER, _DRIVER_OK, _FEATURES_OK = 1, 2, 4, 8


class _Drivers:
    """The rings of one guest: given, or made once the features are known."""

    def __init__(
        self,
        memory: GuestMemory,
        drivers: Sequence[RingDriver] | None,
        size: int,
        count: int,
    ) -> None:
        self._memory = memory
        self._drivers = drivers
        self._size = size
        self._count = count

    def get(self, features: int) -> Sequence[RingDriver]:
        if self._drivers is None:
            self._drivers = [
                make_driver(self._memory, self._size, features) for _ in range(self._count)
            ]
        return self._drivers


def connect_like_uml(
    target: str | socket.socket,
    memory: GuestMemory,
    drivers: Sequence[RingDriver] | None = None,
    *,
    features: int = DRIVER_FEATURES,
    queue_size: int = 256,
    queue_count: int = _CONSOLE_QUEUES,
    newer: bool = False,
    timeout: float = 10.0,
) -> Frontend:
    """Connect and start every queue as Linux' virtio_uml does, up to version 6.12.

    Memory tables have room for two regions, calls come through socket pairs, rings have 256
    entries, kick descriptors block. With in-band notifications on offer there are neither kick nor
    call descriptors. `drivers` are rings to start, by default new ones; the frontend's `queues`
    hold them. `newer` asks for GET_QUEUE_NUM first and sends memory tables of the right size, as
    7.2 does. Raises what `Frontend` raises.
    """
    rings = _Drivers(memory, drivers, queue_size, queue_count)

    def talk(frontend: Frontend) -> None:
        frontend.set_owner(ack=False)
        frontend.offered = frontend.get_features()
        protocol = 0
        if frontend.offered & Feature.PROTOCOL_FEATURES:
            known = _UML_PROTOCOL | (ProtocolFeature.MQ if newer else ProtocolFeature(0))
            protocol = frontend.get_protocol_features() & known
            # virtio_uml counts a feature as agreed on before it says so, hence asks for the reply.
            frontend.set_protocol_features(protocol, ack=bool(protocol & ProtocolFeature.REPLY_ACK))
        if protocol & ProtocolFeature.BACKEND_REQ:
            frontend.set_backend_req_fd()
        if protocol & ProtocolFeature.MQ:
            frontend.get_queue_num()
        _bind_uml(frontend, memory, rings, features, slots=None if newer else 2)

    return _connected(target, timeout, talk)


def rebind_like_uml(
    frontend: Frontend,
    memory: GuestMemory,
    *,
    features: int = DRIVER_FEATURES,
    queue_size: int = 256,
) -> None:
    """Take the driver from the device and give it back, as sysfs can: rings are made anew.

    virtio_uml only disables the old ones; nothing says that they have stopped.
    """
    count = len(frontend.queues)
    _disable_uml(frontend)
    for queue in frontend.queues.values():
        queue.close()
    rings = _Drivers(memory, None, queue_size, count)
    _bind_uml(frontend, memory, rings, features, slots=None)


def _bind_uml(
    frontend: Frontend, memory: GuestMemory, rings: _Drivers, features: int, slots: int | None
) -> None:
    frontend.set_features(frontend.offered & features)
    if frontend.protocol_features & ProtocolFeature.CONFIG:
        frontend.get_config(0, 8)
    frontend.set_memory(memory, slots=slots)
    inband = bool(frontend.protocol_features & ProtocolFeature.INBAND_NOTIFICATIONS)
    drivers = rings.get(frontend.features)
    queues = [frontend.queue(index, driver) for index, driver in enumerate(drivers)]
    for queue in queues:
        queue.driver.set_features(frontend.features)
        if inband:
            queue.inband = frontend
        else:
            frontend.give_call(queue, "socketpair")
        # It says 0 whatever the ring; these drivers may begin elsewhere.
        frontend.describe_queue(queue, log=_NO_LOG)
    for queue in queues:
        if not inband:
            frontend.set_vring_kick(queue.index, queue.new_kick_fd(blocking=True))
        frontend.enable(queue.index)


def _disable_uml(frontend: Frontend) -> None:
    for index in sorted(frontend.queues, reverse=True):
        frontend.disable(index)
    frontend.barrier()


def stop_like_uml(frontend: Frontend) -> None:
    """Disable the queues, last first, wait until that is done, and close, as virtio_uml does."""
    _disable_uml(frontend)
    frontend.close()


def connect_like_qemu(
    target: str | socket.socket,
    memory: GuestMemory,
    drivers: Sequence[RingDriver] | None = None,
    *,
    features: int = DRIVER_FEATURES,
    protocol: int = FRONTEND_FEATURES,
    queue_size: int = 64,
    queue_count: int = _CONSOLE_QUEUES,
    timeout: float = 10.0,
) -> Frontend:
    """Connect and start every queue as QEMU's vhost-user-test-device does.

    It takes every protocol feature it has a number for, also those it does not use. Calls come
    through event descriptors, of which each queue gets three one after the other. `drivers` are
    rings to start, by default new ones; the frontend's `queues` hold them. `protocol` are the
    protocol features of an older QEMU. Raises what `Frontend` raises.
    """
    rings = _Drivers(memory, drivers, queue_size, queue_count)

    def talk(frontend: Frontend) -> None:
        frontend.offered = frontend.get_features()
        if frontend.offered & Feature.PROTOCOL_FEATURES:
            offered = frontend.get_protocol_features()
            frontend.set_protocol_features(offered & protocol)
        if frontend.protocol_features & ProtocolFeature.MQ:
            frontend.get_queue_num()
        if frontend.protocol_features & ProtocolFeature.CONFIGURE_MEM_SLOTS:
            frontend.get_max_mem_slots()
        if frontend.protocol_features & ProtocolFeature.BACKEND_REQ:
            frontend.set_backend_req_fd()
        frontend.set_owner(ack=False)
        frontend.get_features()
        for index, driver in enumerate(rings.get(frontend.offered & features)):
            frontend.give_call(frontend.queue(index, driver), "eventfd")
            err = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            try:
                frontend.set_vring_err(index, err)
            finally:
                os.close(err)
        if frontend.protocol_features & ProtocolFeature.CONFIG:
            frontend.get_config(0, 12)
        _start_qemu(frontend, memory, frontend.offered & features)

    return _connected(target, timeout, talk)


def _start_qemu(frontend: Frontend, memory: GuestMemory | None, features: int) -> None:
    """Do what vhost_dev_start does; `memory` is None when the backend has it already."""
    frontend.set_features(features, ack=False)
    status = bool(frontend.protocol_features & ProtocolFeature.STATUS)
    if status:
        frontend.add_status(_FEATURES_OK)
    if memory is not None:
        if frontend.protocol_features & ProtocolFeature.CONFIGURE_MEM_SLOTS:
            frontend.add_memory(memory)
        else:
            frontend.set_memory(memory)
    queues = list(frontend.queues.values())
    for queue in queues:
        queue.driver.set_features(frontend.features)
        frontend.describe_queue(queue, ack=False)
        frontend.set_vring_kick(queue.index, queue.new_kick_fd())
        frontend.give_call(queue, "eventfd")
    if frontend.features & Feature.PROTOCOL_FEATURES:
        for queue in queues:
            frontend.enable(queue.index)
    if status:
        frontend.add_status(_ACKNOWLEDGE | _DRIVER | _DRIVER_OK)
    for queue in queues:
        frontend.give_call(queue, "eventfd")


def pause_like_qemu(frontend: Frontend) -> dict[int, int]:
    """Stop the queues as QEMU does for `stop` and migration; return where each can go on.

    To the backend it looks like a guest's reset.
    """
    indices = sorted(frontend.queues)
    if frontend.features & Feature.PROTOCOL_FEATURES:
        for index in indices:
            frontend.disable(index)
    bases = {index: frontend.stop_queue(index) for index in indices}
    if frontend.protocol_features & ProtocolFeature.STATUS:
        frontend.set_status(0, ack=False)
    return bases


def resume_like_qemu(frontend: Frontend, memory: GuestMemory) -> None:
    """Start the queues again, as QEMU does for `cont`; memory it has told of stays."""
    slots = frontend.protocol_features & ProtocolFeature.CONFIGURE_MEM_SLOTS
    _start_qemu(frontend, None if slots else memory, frontend.features)


def stop_like_qemu(frontend: Frontend) -> dict[int, int]:
    """Disable and stop the queues as QEMU does, close, and return where each can go on."""
    bases = pause_like_qemu(frontend)
    frontend.close()
    return bases


def connect_like_cloud_hypervisor(
    target: str | socket.socket,
    memory: GuestMemory,
    drivers: Sequence[SplitDriver] | None = None,
    *,
    features: int = DRIVER_FEATURES,
    queue_size: int = 256,
    queue_count: int = 2,
    timeout: float = 10.0,
) -> Frontend:
    """Connect and start every queue as cloud-hypervisor's generic vhost-user device does.

    It passes on no feature of the console's own, so there are two queues. Rings go on at their
    available index, unless IN_ORDER was chosen. After a reconnection it brings the area for buffers
    in flight that it got first. `drivers` are rings to start, by default new ones. Raises what
    `Frontend` raises.
    """
    if drivers is None:
        drivers = [SplitDriver(memory, queue_size) for _ in range(queue_count)]

    def talk(frontend: Frontend) -> None:
        frontend.set_owner(ack=False)
        frontend.offered = frontend.get_features()
        known = _CLOUD_HYPERVISOR_FEATURES | Feature.PROTOCOL_FEATURES
        protocol = 0
        if frontend.offered & Feature.PROTOCOL_FEATURES:
            protocol = frontend.get_protocol_features() & _CLOUD_HYPERVISOR_PROTOCOL
            frontend.set_protocol_features(protocol)
        asks = bool(protocol & ProtocolFeature.REPLY_ACK)
        if protocol & ProtocolFeature.MQ:
            frontend.request(Request.GET_QUEUE_NUM, need_reply=asks)
        frontend.set_features(frontend.offered & features & known)
        frontend.set_memory(memory)
        queues = [frontend.queue(index, driver) for index, driver in enumerate(drivers)]
        for queue in queues:
            frontend.set_vring_num(queue.index, queue.driver.size)
        if protocol & ProtocolFeature.INFLIGHT_SHMFD:
            if frontend.inflight is None:
                size = queues[0].driver.size
                frontend.get_inflight_fd(len(queues), size, need_reply=asks)
            if frontend.inflight is not None:
                frontend.set_inflight_fd(*frontend.inflight)
        for queue, driver in zip(queues, drivers, strict=True):
            driver.set_features(frontend.features)
            frontend.set_vring_addr(
                queue.index,
                memory.user_addr(driver.desc_addr),
                memory.user_addr(driver.used_addr),
                memory.user_addr(driver.avail_addr),
            )
            in_order = frontend.features & Feature.IN_ORDER
            frontend.set_vring_base(queue.index, driver.used_idx if in_order else driver.avail_idx)
            frontend.give_call(queue, "eventfd")
            frontend.set_vring_kick(queue.index, queue.new_kick_fd())
        for queue in queues:
            frontend.enable(queue.index)
        if protocol & ProtocolFeature.BACKEND_REQ:
            frontend.set_backend_req_fd()

    return _connected(target, timeout, talk)


def connect_like_crosvm(
    target: str | socket.socket,
    memory: GuestMemory,
    drivers: Sequence[RingDriver] | None = None,
    *,
    features: int = DRIVER_FEATURES,
    queue_size: int = 1 << 15,
    queue_count: int = _CONSOLE_QUEUES,
    timeout: float = 10.0,
) -> Frontend:
    """Connect and start every queue as crosvm does.

    Rings may have 32768 entries, nothing is acknowledged though REPLY_ACK is chosen, and each queue
    is described, started and enabled before the next one. It never chooses packed rings. `drivers`
    are rings to start, by default new ones. Raises what `Frontend` raises.
    """
    rings = _Drivers(memory, drivers, queue_size, queue_count)

    def talk(frontend: Frontend) -> None:
        frontend.set_owner(ack=False)
        frontend.offered = frontend.get_features() & ~Feature.RING_PACKED
        if frontend.offered & Feature.PROTOCOL_FEATURES:
            protocol = frontend.get_protocol_features() & _CROSVM_PROTOCOL
            frontend.set_protocol_features(protocol)
        if frontend.protocol_features & ProtocolFeature.BACKEND_REQ:
            frontend.set_backend_req_fd(ack=False)
        if frontend.protocol_features & ProtocolFeature.MQ:
            frontend.get_queue_num()
        frontend.set_features(frontend.offered & features, ack=False)
        frontend.set_memory(memory, ack=False)
        for index, driver in enumerate(rings.get(frontend.features)):
            queue = frontend.queue(index, driver)
            driver.set_features(frontend.features)
            frontend.set_vring_num(index, driver.size, ack=False)
            frontend.set_vring_addr(
                index,
                memory.user_addr(driver.desc_addr),
                memory.user_addr(driver.used_addr),
                memory.user_addr(driver.avail_addr),
                ack=False,
            )
            frontend.set_vring_base(index, driver.base, ack=False)
            frontend.give_call(queue, "eventfd", ack=False)
            frontend.set_vring_kick(index, queue.new_kick_fd(), ack=False)
            if frontend.features & Feature.PROTOCOL_FEATURES:
                frontend.set_vring_enable(index, True, ack=False)

    return _connected(target, timeout, talk)


def _connected(
    target: str | socket.socket, timeout: float, talk: Callable[[Frontend], None]
) -> Frontend:
    frontend = Frontend(target, timeout=timeout)
    try:
        frontend.conversation = talk
        talk(frontend)
    except BaseException:
        frontend.close()
        frontend.forget_inflight()
        raise
    return frontend
