"""Whole conversations as real frontends have them, message by message in their order."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence

from ..worker.vhost_user.message import ProtocolFeature
from .features import DRIVER_FEATURES, Feature
from .frontend import FRONTEND_FEATURES, Frontend
from .memory import GuestMemory
from .split import SplitDriver

_NO_LOG = (1 << 64) - 1
_CONSOLE_QUEUES = 4


def connect_like_uml(
    target: str | socket.socket,
    memory: GuestMemory,
    drivers: Sequence[SplitDriver] | None = None,
    *,
    features: int = DRIVER_FEATURES,
    queue_size: int = 256,
    queue_count: int = _CONSOLE_QUEUES,
    newer: bool = False,
    timeout: float = 10.0,
) -> Frontend:
    """Connect and start every queue as Linux' virtio_uml does, up to version 6.12.

    Memory tables have room for two regions, calls come through socket pairs, rings have 256
    entries, kick descriptors block. `drivers` are rings to start, by default new ones; the
    frontend's `queues` hold them. `newer` asks for GET_QUEUE_NUM first and sends memory tables of
    the right size, as 7.2 does. Raises what `Frontend` raises.
    """
    drivers = _drivers(memory, drivers, queue_size, queue_count)

    def talk(frontend: Frontend) -> None:
        frontend.set_owner(ack=False)
        frontend.offered = frontend.get_features()
        protocol = 0
        if frontend.offered & Feature.PROTOCOL_FEATURES:
            protocol = frontend.get_protocol_features() & FRONTEND_FEATURES
            # virtio_uml counts a feature as agreed on before it says so, hence asks for the reply.
            frontend.set_protocol_features(protocol, ack=bool(protocol & ProtocolFeature.REPLY_ACK))
        if newer and protocol & ProtocolFeature.MQ:
            frontend.get_queue_num()
        if protocol & ProtocolFeature.BACKEND_REQ:
            frontend.set_backend_req_fd()
        frontend.set_features(frontend.offered & features)
        if protocol & ProtocolFeature.CONFIG:
            frontend.get_config(0, 8)
        frontend.set_memory(memory, slots=None if newer else 2)
        queues = [frontend.queue(index, driver) for index, driver in enumerate(drivers)]
        for queue in queues:
            queue.driver.set_features(frontend.features)
            frontend.give_call(queue, "socketpair")
            frontend.describe_queue(queue, log=_NO_LOG)
        for queue in queues:
            frontend.set_vring_kick(queue.index, queue.new_kick_fd(blocking=True))
            frontend.enable(queue.index)

    return _connected(target, timeout, talk)


def stop_like_uml(frontend: Frontend) -> None:
    """Disable the queues, last first, wait until that is done, and close, as virtio_uml does."""
    for index in sorted(frontend.queues, reverse=True):
        frontend.disable(index)
    frontend.barrier()
    frontend.close()


def connect_like_qemu(
    target: str | socket.socket,
    memory: GuestMemory,
    drivers: Sequence[SplitDriver] | None = None,
    *,
    features: int = DRIVER_FEATURES,
    queue_size: int = 64,
    queue_count: int = _CONSOLE_QUEUES,
    timeout: float = 10.0,
) -> Frontend:
    """Connect and start every queue as QEMU's vhost-user-test-device does.

    Calls come through event descriptors, of which each queue gets three one after the other.
    `drivers` are rings to start, by default new ones; the frontend's `queues` hold them. Raises
    what `Frontend` raises.
    """
    drivers = _drivers(memory, drivers, queue_size, queue_count)

    def talk(frontend: Frontend) -> None:
        frontend.offered = frontend.get_features()
        if frontend.offered & Feature.PROTOCOL_FEATURES:
            offered = frontend.get_protocol_features()
            frontend.set_protocol_features(offered & FRONTEND_FEATURES)
        if frontend.protocol_features & ProtocolFeature.MQ:
            frontend.get_queue_num()
        if frontend.protocol_features & ProtocolFeature.BACKEND_REQ:
            frontend.set_backend_req_fd()
        frontend.set_owner(ack=False)
        frontend.get_features()
        queues = [frontend.queue(index, driver) for index, driver in enumerate(drivers)]
        for queue in queues:
            frontend.give_call(queue, "eventfd")
            err = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            try:
                frontend.set_vring_err(queue.index, err)
            finally:
                os.close(err)
        if frontend.protocol_features & ProtocolFeature.CONFIG:
            frontend.get_config(0, 12)
        frontend.set_features(frontend.offered & features, ack=False)
        frontend.set_memory(memory)
        for queue in queues:
            queue.driver.set_features(frontend.features)
            frontend.describe_queue(queue, ack=False)
            frontend.set_vring_kick(queue.index, queue.new_kick_fd())
            frontend.give_call(queue, "eventfd")
        if frontend.features & Feature.PROTOCOL_FEATURES:
            for queue in queues:
                frontend.enable(queue.index)
        for queue in queues:
            frontend.give_call(queue, "eventfd")

    return _connected(target, timeout, talk)


def stop_like_qemu(frontend: Frontend) -> dict[int, int]:
    """Disable and stop the queues as QEMU does, close, and return where each can go on."""
    indices = sorted(frontend.queues)
    if frontend.features & Feature.PROTOCOL_FEATURES:
        for index in indices:
            frontend.disable(index)
    bases = {index: frontend.stop_queue(index) for index in indices}
    frontend.close()
    return bases


def _drivers(
    memory: GuestMemory, drivers: Sequence[SplitDriver] | None, size: int, count: int
) -> Sequence[SplitDriver]:
    return [SplitDriver(memory, size) for _ in range(count)] if drivers is None else drivers


def _connected(
    target: str | socket.socket, timeout: float, talk: Callable[[Frontend], None]
) -> Frontend:
    frontend = Frontend(target, timeout=timeout)
    try:
        frontend.conversation = talk
        talk(frontend)
    except BaseException:
        frontend.close()
        raise
    return frontend
