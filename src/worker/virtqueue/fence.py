"""The one memory fence, for the places where the virtio specification asks for a barrier."""

from __future__ import annotations

import platform
from _thread import allocate_lock

#: x86 reorders nothing but a store with a later load, so only `fence` is needed there.
WEAKLY_ORDERED = platform.machine() not in ("x86_64", "i686", "i386")

_lock = allocate_lock()
_lock.acquire()
_release = _lock.release
_acquire = _lock.acquire


def full() -> None:
    """Let no load after this call be made before the stores ahead of it are visible.

    Releasing and taking a lock that nobody else wants is two atomic read-modify-write operations
    on one word. On x86-64 each is a locked instruction, a full barrier. On ARM64 the release orders
    everything before it ahead of its store, the acquire that reads this store is ordered after it,
    and everything later is after the acquire: the pair is a full barrier too.
    """
    _release()
    _acquire()
