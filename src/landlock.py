"""Landlock: a process gives up every path, TCP, and whoever is outside (landlock(7)).

No exception is made: descriptors that are open already stay usable, and so do those of memory.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable

from .kernel import system_call

# The numbers are the same on every machine (asm-generic/unistd.h).
_CREATE_RULESET = 444
_RESTRICT_SELF = 446

_VERSION = 1  # LANDLOCK_CREATE_RULESET_VERSION

#: The rights that a kernel with at least this ABI knows (linux/landlock.h).
_FILES = {1: (1 << 13) - 1, 2: 1 << 13, 3: 1 << 14, 5: 1 << 15}
_TCP = {4: 0b11}  # bind, connect
_SCOPES = {6: 0b11}  # abstract unix sockets, signals

#: struct landlock_ruleset_attr, of which an older kernel takes what it does not know if it is 0.
_rules = (ctypes.c_uint64 * 3)()


Call = Callable[..., int]


def _known(rights: dict[int, int], abi: int) -> int:
    return sum(bits for since, bits in rights.items() if since <= abi)


def restrict_self(call: Call = system_call, *, network: bool = False) -> int:
    """Give up all that this kernel's Landlock can take, but TCP with `network`; return its ABI.

    The process must have no_new_privs. Raises OSError, with a line for people, where the kernel has
    no Landlock (before 5.13, or built without) or was started without it.
    """
    try:
        abi = call(_CREATE_RULESET, 0, 0, _VERSION)
        tcp = 0 if network else _known(_TCP, abi)
        _rules[:] = [_known(_FILES, abi), tcp, _known(_SCOPES, abi)]
        ruleset = call(_CREATE_RULESET, ctypes.addressof(_rules), ctypes.sizeof(_rules), 0)
        try:
            call(_RESTRICT_SELF, ruleset)
        finally:
            os.close(ruleset)
    except OSError as error:
        why = {errno.ENOSYS: "has none", errno.EOPNOTSUPP: "was started without it"}
        said = why.get(error.errno or 0, f"refuses it: {(error.strerror or '').lower()}")
        raise OSError(error.errno, f"this kernel {said}") from error
    return abi
