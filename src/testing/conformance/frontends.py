"""Statements about the frontends there are: what each says, in its own order, is understood."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...worker.vhost_user.message import ProtocolFeature
from ..console import ConsoleDriver
from ..conversation import (
    connect_like_cloud_hypervisor,
    connect_like_crosvm,
    connect_like_qemu,
    connect_like_uml,
    stop_like_qemu,
    stop_like_uml,
)
from ..features import DRIVER_FEATURES, Feature
from ..frontend import Frontend
from ..memory import GuestMemory
from .bench import Bench
from .rings import write
from .statement import Level, expect, statement

SHOULD = Level.SHOULD
F, P = Feature, ProtocolFeature

_SPLIT = DRIVER_FEATURES & ~F.RING_PACKED


def _guest(
    bench: Bench,
    connect: Callable[..., Frontend],
    stop: Callable[[Frontend], Any],
    memory: GuestMemory,
    **options: Any,
) -> None:
    target = bench.connect().socket
    options.setdefault("features", _SPLIT)
    options.setdefault("queue_count", bench.all_queues(F.MULTIPORT & ~options["features"]))
    with memory, connect(target, memory, timeout=bench.timeout, **options) as frontend:
        ConsoleDriver(frontend, buffers=16).write(b"hello\r\n")
        stop(frontend)


@statement("frontend.qemu", SHOULD, "QEMU hw/virtio/vhost-user-base.c")
def qemu(bench: Bench) -> None:
    """QEMU's vhost-user-test-device is served, with rings of 64 and three calls each."""
    _guest(bench, connect_like_qemu, stop_like_qemu, GuestMemory.like_qemu(32 << 20))


@statement("frontend.qemu-large", SHOULD, "QEMU hw/virtio/vhost-user-base.c")
def qemu_large(bench: Bench) -> None:
    """QEMU's vhost-user-test-device with vq_size=1024 is served."""
    memory = GuestMemory.like_qemu(32 << 20)
    _guest(bench, connect_like_qemu, stop_like_qemu, memory, queue_size=1024)


@statement("frontend.qemu-two-queues", SHOULD, "QEMU hw/virtio/vhost-user-base.c")
def qemu_two_queues(bench: Bench) -> None:
    """QEMU's vhost-user-test-device is served whose guest knows nothing of ports."""
    memory = GuestMemory.like_qemu(32 << 20)
    _guest(bench, connect_like_qemu, stop_like_qemu, memory, features=_SPLIT & ~F.MULTIPORT)


@statement("frontend.qemu-config", SHOULD, "QEMU hw/virtio/vhost-user-base.c", P.CONFIG)
def qemu_config(bench: Bench) -> None:
    """QEMU writes the whole configuration back when a guest writes to any of it: not an error."""
    frontend = bench.start()
    frontend.set_config(0, frontend.get_config(0, 12))
    frontend.barrier()


@statement("frontend.uml", SHOULD, "Linux arch/um/drivers/virtio_uml.c")
def uml(bench: Bench) -> None:
    """User Mode Linux to 6.12: tables with room for two regions, rings of 256, calls by socket."""
    _guest(bench, connect_like_uml, stop_like_uml, GuestMemory.like_uml(32 << 20))


@statement("frontend.uml-newer", SHOULD, "Linux arch/um/drivers/virtio_uml.c")
def uml_newer(bench: Bench) -> None:
    """User Mode Linux 7.2 is served, which asks how many queues there are."""
    _guest(bench, connect_like_uml, stop_like_uml, GuestMemory.like_uml(32 << 20), newer=True)


@statement("frontend.uml-channel", SHOULD, "Linux arch/um/drivers/virtio_uml.c")
def uml_channel(bench: Bench) -> None:
    """BACKEND_REQ is offered, without which User Mode Linux cannot have its interrupt."""
    expect(bench.backend.protocol & P.BACKEND_REQ, "it is not", "protocol feature 5")


@statement("frontend.uml-packed", SHOULD, "Linux arch/um/drivers/virtio_uml.c", F.RING_PACKED)
def uml_packed(bench: Bench) -> None:
    """User Mode Linux says base 0 also for packed rings, whose wrap counters begin at 1."""
    frontend = bench.negotiate()
    memory = bench.memory()
    frontend.set_memory(memory)
    queue = frontend.start_queue(1, bench.ring(memory), base=0)
    for _ in range(3):
        queue.driver.add([b"\r\n"])
        queue.notify()
        bench.used(queue)


@statement("frontend.cloud-hypervisor", SHOULD, "Cloud Hypervisor vu_common_ctrl.rs")
def cloud_hypervisor(bench: Bench) -> None:
    """Cloud Hypervisor's generic vhost-user device is served, which has two queues of 256."""
    memory = GuestMemory.like_qemu(32 << 20)
    _guest(bench, connect_like_cloud_hypervisor, Frontend.close, memory, queue_count=2)


@statement("frontend.crosvm", SHOULD, "crosvm vhost_user_frontend/mod.rs")
def crosvm(bench: Bench) -> None:
    """The frontend of crosvm is served, whose rings have 32768 entries."""
    memory = GuestMemory.like_qemu(256 << 20)
    _guest(bench, connect_like_crosvm, Frontend.close, memory)


@statement("frontend.comes-back", SHOULD, "vhost-user Communication")
def comes_back(bench: Bench) -> None:
    """A frontend that connects again goes on with its rings, and what was offered is used once."""
    frontend = bench.start(queues=2)
    driver = frontend.queues[1].driver
    for _ in range(3):
        write(bench, frontend.queues[1])
    again = bench.negotiate()
    again.set_memory(driver.memory)
    driver.add([b"meanwhile\r\n"])
    driver.publish()
    queue = again.start_queue(1, driver, base=driver.base)
    queue.kick()
    bench.used(queue)
    expect(bench.quiet(driver.has_used), "a buffer was used again", "each once")
