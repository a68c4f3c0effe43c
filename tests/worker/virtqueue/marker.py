"""Set and clear every second bit of a dirty log's first word, over and over; print what was lost.

Run as a process it is another backend, and a frontend that clears what that backend has set.
"""

from __future__ import annotations

import mmap
import sys

from vhost_device_console.worker.virtqueue.log import DirtyLog

_ANDN = 1 << 28  # makes FUTEX_OP_OR FUTEX_OP_ANDN
_SHIFT = 8 << 28


def mark_and_clear(fd: int, rounds: int, first: int) -> int:
    """Return how often a bit was not what this process had just made it."""
    log = DirtyLog(fd, 4, 0, 0)
    lost = 0
    with mmap.mmap(fd, mmap.PAGESIZE) as memory:
        for turn in range(rounds):
            bit = first + turn * 2 % 32
            log.mark(bit << 12, 1)
            lost += not memory[bit // 8] >> bit % 8 & 1
            log._or(log._first, _ANDN | _SHIFT | bit << 12)  # noqa: SLF001
            lost += memory[bit // 8] >> bit % 8 & 1
    return lost


if __name__ == "__main__":
    print("ready", flush=True)
    sys.stdin.readline()
    print(mark_and_clear(*map(int, sys.argv[1:])))
