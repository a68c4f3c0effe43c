"""What the device under test, or the test itself, did wrong."""

from __future__ import annotations

from ..errors import ConsoleError


class DeviceError(ConsoleError):
    """The backend broke the vhost-user protocol or the virtio specification."""


class NackError(DeviceError):
    """The backend answered a message that asked for a reply with a status other than zero."""

    def __init__(self, request: str, status: int) -> None:
        super().__init__(f"the backend refused {request} with status {status}")
        self.status = status


class RingFullError(ConsoleError):
    """More descriptors are needed than the ring has free: reap, then try again."""
