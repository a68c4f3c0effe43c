"""A guest and its frontend for testing vhost-user backends, written from the specifications.

Guest memory, the driver side of split and packed virtqueues, a vhost-user frontend that talks as
QEMU or User Mode Linux does, a guest's console driver, and messages that are wrong on purpose::

    from vhost_device_console.testing import ConsoleDriver, GuestMemory
    from vhost_device_console.testing import connect_like_qemu, stop_like_qemu

    with GuestMemory() as memory:
        with connect_like_qemu("/tmp/console.sock0", memory) as frontend:
            console = ConsoleDriver(frontend)
            console.wait_open()
            console.write(b"login: ")  # returns once the backend has used the buffer
            name = console.read_until(b"root")
            stop_like_qemu(frontend)

Every wait has a deadline and names what it waited for. `python -m
vhost_device_console.testing.guest SOCKET` is a whole guest with a local shell.
"""

from .console import ConsoleDriver, Control, Event, GuestPort
from .conversation import (
    connect_like_cloud_hypervisor,
    connect_like_crosvm,
    connect_like_qemu,
    connect_like_uml,
    pause_like_qemu,
    rebind_like_uml,
    resume_like_qemu,
    stop_like_qemu,
    stop_like_uml,
)
from .driver import Buffer, Chain, RingDriver, Used, fence, need_event
from .errors import DeviceError, NackError, RingFullError
from .features import DRIVER_FEATURES, Feature
from .frontend import FRONTEND_FEATURES, Frontend, Message
from .memory import GuestMemory
from .packed import PackedDriver, make_driver
from .queue import Queue
from .split import SplitDriver

__all__ = [
    "DRIVER_FEATURES",
    "FRONTEND_FEATURES",
    "Buffer",
    "Chain",
    "ConsoleDriver",
    "Control",
    "DeviceError",
    "Event",
    "Feature",
    "Frontend",
    "GuestMemory",
    "GuestPort",
    "Message",
    "NackError",
    "PackedDriver",
    "Queue",
    "RingDriver",
    "RingFullError",
    "SplitDriver",
    "Used",
    "connect_like_cloud_hypervisor",
    "connect_like_crosvm",
    "connect_like_qemu",
    "connect_like_uml",
    "fence",
    "make_driver",
    "need_event",
    "pause_like_qemu",
    "rebind_like_uml",
    "resume_like_qemu",
    "stop_like_qemu",
    "stop_like_uml",
]
