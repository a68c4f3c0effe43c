"""A guest's ledger: what its worker has committed, for a successor to go on from.

One memory file, made by the master and inherited by each worker in turn. A page belongs to each
virtqueue, some pages to each port for what its clients have got and given (`records`, zeros at
first; the console's side says what they hold), and some for its log (`log`, of which `backends.log`
says the same).

The first word of a queue's page is the one place where buffers are committed: in a single 8-byte
store it says how far the port's stream is *after* the pushes that are to become visible next, where
the ring's used side stood before them, and how many they are. So a worker killed anywhere leaves a
batch either whole, to be made visible by the successor if it is not yet, or never taken. After that
word come the pushes themselves, heads then lengths, of a ring that keeps them nowhere else.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import sys
from array import array
from collections.abc import Iterable
from typing import NamedTuple

_PAGE = 4096
_QUEUES = 256
_PORTS = 128
_RECORD_BYTES, _LOG_BYTES = 8 * _PAGE, 10 * _PAGE
_PORT_BYTES = _RECORD_BYTES + _LOG_BYTES
_BYTES = _QUEUES * _PAGE + _PORTS * _PORT_BYTES

_LOW16 = 0xFFFF
_LOW32 = 0xFFFF_FFFF

#: Where in a port's `log` the index's entries are: their number, and the last of them in turn.
LOG_INDEX = slice(128, 2 * _PAGE)
_ENTRY_WORDS = 4
LOG_ENTRIES = (LOG_INDEX.stop - LOG_INDEX.start - 8) // (8 * _ENTRY_WORDS)

#: Pushes that a page keeps: beside the word, two arrays of u32.
MOST_PUSHES = _PAGE // 8 - 1

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def create(name: str) -> int:
    """Return the descriptor of a new, empty, sealed ledger.

    Pages take memory only once they are used. Raises OSError when the memory cannot be had.
    """
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, _BYTES)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


class Pending(NamedTuple):
    """Buffers pushed that may not be visible yet: `pushed` of them, and where their ring `begin`s.

    `begin` is a used index or, of a packed ring, an entry with its wrap counter in bit 15. `pushes`
    are the heads and lengths where the ring itself does not show them.
    """

    begin: int
    pushed: int
    pushes: list[tuple[int, int]]


class Page:
    """One virtqueue's page: its `word`, and the pushes' `heads` and `lengths`.

    Without memory it is one that no successor will see.
    """

    def __init__(self, memory: memoryview | None = None) -> None:
        view = memoryview(bytearray(_PAGE)) if memory is None else memory
        self.word = view[:8].cast("Q")
        entries = view[8:].cast("I")
        self.heads, self.lengths = entries[:MOST_PUSHES], entries[MOST_PUSHES:]

    def offset(self, near: int) -> int:
        """Return how far the stream was, which is less than 2^32 before `near`."""
        return near - ((near - (self.word[0] >> 32)) & _LOW32)

    def pending(self) -> Pending:
        """Return what was committed last."""
        word = self.word[0]
        pushed = word & _LOW16
        pushes = zip(self.heads[:pushed], self.lengths[:pushed], strict=True)
        return Pending(word >> 16 & _LOW16, pushed, list(pushes))


def is_known(fd: int) -> bool:
    """Tell whether the ledger behind `fd` is as this version makes them."""
    return os.fstat(fd).st_size == _BYTES


def copy_logs(old: int, new: int, port_ids: Iterable[int]) -> None:
    """Have a new ledger know of those ports' logs what an old one of this version knows.

    Raises OSError.
    """
    for port_id in port_ids if is_known(old) else ():
        at = _log_at(port_id)
        os.pwrite(new, os.pread(old, _LOG_BYTES, at), at)


def _log_at(port_id: int) -> int:
    return _QUEUES * _PAGE + port_id * _PORT_BYTES + _RECORD_BYTES


class Ledger:
    """A mapped ledger.

    Takes over no descriptor: `fd` may be closed afterwards. Raises ValueError when the file is no
    ledger.
    """

    def __init__(self, fd: int) -> None:
        self._view = memoryview(mmap.mmap(fd, 0))
        if len(self._view) != _BYTES:
            raise ValueError("not a ledger")

    def page(self, queue: int) -> Page:
        """Return a virtqueue's page. Raises IndexError when there is none."""
        if not 0 <= queue < _QUEUES:
            raise IndexError(f"no ledger has a page for queue {queue}")
        return Page(self._view[queue * _PAGE :][:_PAGE])

    def records(self, port_id: int) -> memoryview:
        """Return a port's 32768 bytes. Raises IndexError when there are none."""
        return self._port(port_id)[:_RECORD_BYTES]

    def log(self, port_id: int) -> memoryview:
        """Return the 40960 bytes of a port's log. Raises IndexError when there are none."""
        return self._port(port_id)[_RECORD_BYTES:]

    def _port(self, port_id: int) -> memoryview:
        if not 0 <= port_id < _PORTS:
            raise IndexError(f"no ledger has records for port {port_id}")
        return self._view[_QUEUES * _PAGE + port_id * _PORT_BYTES :][:_PORT_BYTES]


class LogEntry(NamedTuple):
    """So many bytes had a log's file of that generation when the byte at that offset came.

    `time` is in nanoseconds since 1970.
    """

    generation: int
    size: int
    offset: int
    time: int


def log_entries(fd: int, port_id: int, known: int) -> tuple[int, list[LogEntry]]:
    """Return how many entries there ever were for a port's log, and those since `known` of them.

    Only the last ones, where there is no room for all; none of another version's ledger. Maps
    nothing; `fd` is a ledger's.
    """
    if not is_known(fd):
        return known, []
    at = _log_at(port_id) + LOG_INDEX.start
    count = int.from_bytes(os.pread(fd, 8, at), sys.byteorder)
    if count <= known:
        return count, []
    words = array("Q", os.pread(fd, 8 * _ENTRY_WORDS * LOG_ENTRIES, at + 8))
    after = int.from_bytes(os.pread(fd, 8, at), sys.byteorder)
    # One more may be about to be written, over the oldest.
    first = max(known, after + 1 - LOG_ENTRIES, count - LOG_ENTRIES)
    numbers = (number % LOG_ENTRIES * _ENTRY_WORDS for number in range(first, count))
    return count, [LogEntry(*words[number : number + _ENTRY_WORDS]) for number in numbers]
