"""System calls that Python has no words for.

All is made ready when this is imported, and takes numbers only: a forked worker that calls them
writes to few pages of those that it shares.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

_libc = ctypes.CDLL(None, use_errno=True)


def _function(name: str, arguments: int) -> Callable[..., int]:
    function = getattr(_libc, name)
    function.argtypes = [ctypes.c_long] * arguments
    return function  # type: ignore[no-any-return]


_syscall = _function("syscall", 6)
_syscall.restype = ctypes.c_long  # type: ignore[attr-defined]
_prctl = _function("prctl", 5)
_capget = _function("capget", 2)
_capset = _function("capset", 2)


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def system_call(number: int, a: int = 0, b: int = 0, c: int = 0, d: int = 0, e: int = 0) -> int:
    """Return what the system call `number` returns; raises OSError."""
    return _checked(_syscall(number, a, b, c, d, e))


def prctl(option: int, argument: int = 0) -> int:
    """Change this process, or tell how it is, as PR_ `option` says; raises OSError."""
    return _checked(_prctl(option, argument, 0, 0, 0))


_VERSION_3 = 0x20080522  # linux/capability.h: sets of 64 bits, in two halves

_header = (ctypes.c_uint32 * 2)(_VERSION_3, 0)
_sets = (ctypes.c_uint32 * 6)()
_capability_arguments = (ctypes.addressof(_header), ctypes.addressof(_sets))


def capabilities() -> tuple[int, int, int]:
    """Return the effective, permitted and inheritable capabilities of this thread, bit by bit."""
    _checked(_capget(*_capability_arguments))
    effective, permitted, inheritable = (
        low | _sets[i + 3] << 32 for i, low in enumerate(_sets[:3])
    )
    return effective, permitted, inheritable


def set_capabilities(effective: int, permitted: int, inheritable: int) -> None:
    """Change those of this thread; an ambient one goes with its inheritable one. Raises OSError."""
    for i, bits in enumerate((effective, permitted, inheritable)):
        _sets[i], _sets[i + 3] = bits & (1 << 32) - 1, bits >> 32
    _checked(_capset(*_capability_arguments))
