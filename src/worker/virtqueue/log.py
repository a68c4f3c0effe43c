"""The dirty log of a live migration: one bit for every page of guest memory that was written.

The frontend reads and clears the same bits all the time, and other backends set theirs beside ours,
so a bit may only be set by an atomic OR. Python has none, but the kernel does: futex(2) with
FUTEX_WAKE_OP performs one on a 32-bit word of user memory, whether anybody waits there or not. It
also reports a page that is gone as EFAULT, where a store of our own would kill us (SIGBUS).

Source: QEMU docs/interop/vhost-user.rst, "Migration"; linux/futex.h.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys

from ...errors import FrontendError, RefusedError
from .memory import map_file

_PAGE_BITS = 12  # VHOST_LOG_PAGE is 0x1000 on every machine

_FUTEX_WAKE_OP_PRIVATE = 5 | 128
_OP_OR = 2 << 28
_OP_SHIFT = 8 << 28  # the argument is a bit's number
_ALL_BITS = 0xFFF << 12  # as an argument of 12 bits with a sign: -1

#: The number of futex(2), by machine and size of a pointer in bytes.
_FUTEX = {
    ("x86_64", 8): 202,
    ("aarch64", 8): 98,
    ("riscv64", 8): 98,
    ("loongarch64", 8): 98,
    ("ppc64le", 8): 221,
    ("ppc64", 8): 221,
    ("s390x", 8): 238,
}.get((platform.machine(), ctypes.sizeof(ctypes.c_void_p)))

_syscall = ctypes.PyDLL(None, use_errno=True).syscall
_syscall.argtypes = [
    ctypes.c_long,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_uint,
]
_syscall.restype = ctypes.c_long

#: Byte 0 of a word has its bits 0 to 7 on a little-endian machine and 24 to 31 on the others.
_SWAP = 0 if sys.byteorder == "little" else 24


class DirtyLog:
    """A log mapped from the frontend's file; it is unmapped with its last user.

    `marked` turns True with any mark; whoever tells the frontend of marks (SET_LOG_FD) resets it.
    """

    def __init__(self, fd: int, size: int, offset: int, memory_end: int) -> None:
        """Map `size` bytes from `offset` of the file `fd`, which stays the caller's to close.

        `memory_end` is the first guest address after the last region. Raises RefusedError when the
        log does not reach that far, the file does not have it, or this machine cannot set its bits.
        """
        if size << 3 + _PAGE_BITS < memory_end:
            raise RefusedError(f"a dirty log of {size} bytes is too small for {memory_end:#x}")
        if _FUTEX is None:
            raise RefusedError(f"a dirty log cannot be kept on {platform.machine()}")
        self.marked = False
        self._bytes = size
        view = map_file(fd, size, offset, "a dirty log")
        self._pin = ctypes.c_char.from_buffer(view)  # keeps the mapping, and knows where it is
        start = ctypes.addressof(self._pin)
        self._first = start & ~3  # the word with the log's first byte
        self._skew = (start & 3) << 3  # the bits of that word before it
        try:
            self._or(self._first, 0)  # changes nothing, but a kernel that cannot do it says so
        except FrontendError as error:
            raise RefusedError(str(error)) from None

    def covers(self, addr: int, size: int) -> bool:
        """Say whether these bytes at a guest address have their bits in the log."""
        return addr >= 0 and addr + size <= self._bytes << 3 + _PAGE_BITS

    def mark(self, addr: int, size: int) -> None:
        """Mark the pages of `size` bytes at a guest address, after they were written.

        Each bit is set whether it is already or not: who looks first could see it set, and the
        frontend clear it, before the write is there for the frontend to copy. Raises FrontendError
        when the frontend has cut off its log.
        """
        if size <= 0:
            return
        self.marked = True
        bit = (addr >> _PAGE_BITS) + self._skew
        end = (addr + size - 1 >> _PAGE_BITS) + self._skew + 1
        while bit < end:
            word = self._first + (bit >> 5 << 2)
            if not bit & 31 and end - bit >= 32:
                self._or(word, _ALL_BITS)
                bit += 32
            else:
                self._or(word, _OP_SHIFT | (bit & 31 ^ _SWAP) << 12)
                bit += 1

    def _or(self, word: int, argument: int) -> None:
        if _syscall(_FUTEX, word, _FUTEX_WAKE_OP_PRIVATE, 0, None, word, _OP_OR | argument) < 0:
            reason = os.strerror(ctypes.get_errno())
            raise FrontendError(f"the dirty log cannot be written: {reason}")
