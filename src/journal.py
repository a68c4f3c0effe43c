"""A port's journal: what the guest wrote to it and what is typed to it, in one memory file.

The file outlives the worker: the master makes it, and a successor goes on at the offsets it holds.
Offsets count bytes since the journal was made and never go back. An output ring keeps the last
`size` bytes of an endless stream, any number of readers have cursors in it; an input ring holds
what the guest has not taken yet.

Layout, native byte order: a page of u64 words (magic; output size, head, seen and tail; input size,
head and tail; a number that no other journal has), the output ring, the input ring, and spare room
as large as the output ring. Sizes are powers of two and whole pages. A byte counts once its head is
stored, and a head is one aligned 8-byte store, so a worker killed anywhere leaves a journal that is
whole. What a running virtqueue brought counts only once its ledger says so, too: see `ledger`,
`go_back`.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets

_MAGIC = int.from_bytes(b"VDCJRNL3", "little")
_PAGE = 4096
_WORD = 8
(
    _MAGIC_AT,
    _OUT_SIZE,
    _OUT_HEAD,
    _OUT_SEEN,
    _OUT_TAIL,
    _IN_SIZE,
    _IN_HEAD,
    _IN_TAIL,
    _NUMBER,
) = range(9)

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def create(name: str, output_bytes: int, input_bytes: int) -> int:
    """Return the descriptor of a new, empty, sealed journal with rings of these sizes.

    Pages take memory only once they are used. Raises ValueError for a size that is no power of two
    or less than a page, OSError when the memory cannot be had.
    """
    for size in (output_bytes, input_bytes):
        if size < _PAGE or size & (size - 1):
            raise ValueError(f"a ring of {size} bytes: not a power of two of at least {_PAGE}")
    number = secrets.randbits(53)  # what JSON can carry everywhere
    header = (_MAGIC, output_bytes, 0, 0, 0, input_bytes, 0, 0, number)
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, _PAGE + 2 * output_bytes + input_bytes)
        os.pwrite(fd, b"".join(word.to_bytes(_WORD, "little") for word in header), 0)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def number(fd: int) -> int:
    """Return the number of the journal in the file `fd`, without mapping it."""
    return int.from_bytes(os.pread(fd, _WORD, _NUMBER * _WORD), "little")


class Output:
    """One port's output: the last `size` bytes of everything the guest ever wrote to it.

    `tail` is the offset of the oldest byte still kept. It is stored before the bytes it leaves out
    are overwritten: a successor that does not know by what knows which ones are whole.
    """

    def __init__(self, ring: memoryview, words: memoryview) -> None:
        self.size = len(ring)
        self.head: int = words[_OUT_HEAD]
        self.tail: int = min(words[_OUT_TAIL], self.head)
        self._ring = self._view = ring
        self._mask = self.size - 1
        self._words = words

    @property
    def seen(self) -> int:
        """The offset up to which some reader has taken the output; where an absent one goes on."""
        return self._words[_OUT_SEEN]

    @seen.setter
    def seen(self, offset: int) -> None:
        self._words[_OUT_SEEN] = offset

    def begin_at(self, offset: int) -> None:
        """Let an output that is still empty go on where another journal's was."""
        self.tail = self._words[_OUT_TAIL] = offset
        self.head = self._words[_OUT_HEAD] = self.seen = offset

    def go_back(self, offset: int) -> None:
        """Let nothing from `offset` on count: the next to be appended is the byte there."""
        self.head = self._words[_OUT_HEAD] = offset
        self.tail = self._words[_OUT_TAIL] = min(self.tail, offset)

    def copy(self, offset: int) -> bytes:
        """Return everything from `offset`, which is as for `span`, to the head."""
        first = bytes(self.span(offset))
        return first + bytes(self.span(offset + len(first)))

    def append(self, data: memoryview | bytes) -> None:
        """Add at most `size` bytes; the oldest give way. They count from `commit` on."""
        self.append_from(memoryview(data), 0, len(data))

    def append_from(self, source: memoryview, at: int, count: int) -> None:
        """Do the same with the `count` bytes from `at` of `source`."""
        tail = self.head + count - self.size
        if tail > self.tail:
            self.tail = self._words[_OUT_TAIL] = tail
        start = self.head & self._mask
        end = start + count
        if end <= self.size:
            self._ring[start:end] = source[at : at + count]
        else:
            first = self.size - start
            self._ring[start:] = source[at : at + first]
            self._ring[: count - first] = source[at + first : at + count]
        self.head += count

    def commit(self) -> None:
        """Make everything appended count, for a successor too."""
        self._words[_OUT_HEAD] = self.head

    def span(self, offset: int) -> memoryview:
        """Return the bytes from `offset` that lie in one piece: up to the head or the ring's end.

        `offset` must be from `tail` to `head`.
        """
        at = offset & self._mask
        return self._view[at : min(at + self.head - offset, self.size)]


class Reader:
    """A cursor in an output: `offset` is the next byte to take, `missed` counts those lost."""

    def __init__(self, output: Output, offset: int) -> None:
        self._output = output
        self.offset = offset
        self.missed = 0

    @property
    def pending(self) -> int:
        """How many bytes lie between the cursor and the head, lost ones included."""
        return self._output.head - self.offset

    def skip_lost(self) -> int:
        """Move past bytes that gave way before they were read; return how many there were."""
        lost = self._output.tail - self.offset
        if lost <= 0:
            return 0
        self.offset += lost
        self.missed += lost
        return lost

    def span(self) -> memoryview:
        """Return the next bytes that lie in one piece, none when the reader has caught up.

        Call `skip_lost` first; `advance` by what was taken.
        """
        return self._output.span(self.offset)

    def advance(self, count: int) -> None:
        """Take `count` bytes of what `span` returned."""
        self.offset += count


class Input:
    """One port's input: at most `size` bytes on their way to the guest."""

    def __init__(self, ring: memoryview, words: memoryview) -> None:
        self.size = len(ring)
        self._ring = ring
        self._mask = self.size - 1
        self._words = words
        # What never lay in the ring moves the tail alone: a tail ahead is not a head behind.
        self.tail: int = words[_IN_TAIL]
        self.head: int = max(words[_IN_HEAD], self.tail)

    def __len__(self) -> int:
        return self.head - self.tail

    def begin_at(self, offset: int) -> None:
        """Let an input that is still empty go on where another journal's was."""
        self.head = self._words[_IN_HEAD] = offset
        self.tail = self._words[_IN_TAIL] = offset

    def go_back(self, tail: int) -> None:
        """Let what was consumed from `tail` on wait again."""
        self.tail = self._words[_IN_TAIL] = tail
        self.head = max(self._words[_IN_HEAD], tail)

    def copy(self) -> bytes:
        """Return everything that waits."""
        at = self.tail & self._mask
        end = at + len(self)
        return bytes(self._ring[at:end]) + bytes(self._ring[: max(0, end - self.size)])

    def feed(self, data: bytes) -> None:
        """Add `data`, for which there is room."""
        while data:
            room = self.room()
            room[: len(data)] = data[: len(room)]
            self.fed(len(data[: len(room)]))
            data = data[len(room) :]

    def room(self) -> memoryview:
        """Return free space in one piece, none when the ring is full; fill it, then `fed`."""
        at = self.head & self._mask
        return self._ring[at : min(at + self.size - (self.head - self.tail), self.size)]

    def fed(self, count: int) -> None:
        """Count the first `count` bytes of what `room` returned as input."""
        self.head += count
        self._words[_IN_HEAD] = self.head

    def span(self) -> memoryview:
        """Return waiting input in one piece, none when there is none; then `consume`."""
        at = self.tail & self._mask
        return self._ring[at : min(at + self.head - self.tail, self.size)]

    def consume(self, count: int) -> None:
        """Give up the first `count` bytes of what `span` returned: the guest has them."""
        self.tail += count
        self._words[_IN_TAIL] = self.tail

    def bypass(self, count: int) -> None:
        """Count bytes that the guest has and that never lay in the ring; it must be empty."""
        self.head += count
        self.consume(count)


class Journal:
    """A mapped journal: a port's `output` and `input`, and `spare` room of the output's size.

    Offsets of one mean nothing in another, which has another `number`.

    Takes over no descriptor: `fd` may be closed afterwards. Raises ValueError when the file is no
    journal.
    """

    def __init__(self, fd: int) -> None:
        view = memoryview(mmap.mmap(fd, 0))
        words = view[: len(view) // _WORD * _WORD].cast("Q")
        if len(view) < _PAGE or words[_MAGIC_AT] != _MAGIC:
            raise ValueError("not a journal")
        middle = _PAGE + words[_OUT_SIZE]
        end = middle + words[_IN_SIZE]
        self.output = Output(view[_PAGE:middle], words)
        self.input = Input(view[middle:end], words)
        self.spare = view[end:]
        self.number: int = words[_NUMBER]
