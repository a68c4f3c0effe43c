"""A port's log: a file that gets every byte of its output once, whoever is killed meanwhile.

It reads the journal like anybody, but nobody waits for a person behind it: a log that cannot be
written (its disk is full) stops, keeps its place, and tries again every second. What gave way
meanwhile is a gap that is counted, and stands in the file. As long as it can be written the port
takes no more than it has room for, so that there is none.

A worker opens nothing. The master opens the file, with O_APPEND, and a new one for each rotation;
each has a *generation*, which counts up. A record in shared memory says at each moment what is
about to be written, and where; the size of the file says how much of it was.

The record is 16 words, u64, native byte order: word 0 chooses the state in words 1 to 6 or that in
words 9 to 14. A state: generation (0: there is none), the file's size when it was stored, the
journal's offset of the next byte, the size of a gap whose notice comes before that or 0, how many
bytes of the notice are written, how many bytes are being written now (of the notice, if there is
one, else of the journal).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping

from ...journal import Output
from ..poller import Poller
from .base import gap

#: How often a file that cannot be written is tried again.
_RETRY_S = 1.0

#: More than any offset.
_NO_LIMIT = (1 << 63) - 1

#: What a record takes in shared memory.
RECORD_BYTES = 128

#: Where the two states begin.
_STATES = (1, 9)
_STATE_WORDS = 6


class Log:
    """One port's log, which goes on where `record` (RECORD_BYTES, zeros at first) says.

    `files` are the descriptors that the master keeps, by generation, its own from now on: those
    that a predecessor may have been writing, and the newest, which all that follows goes to.
    `changed` is called when a file has `limit` bytes (0: never), cannot be written, or can again.
    `generation` and `size` (bytes) are those of the file that is written, `missed` counts the bytes
    that gave way, `failing` says that the file cannot be written now.
    """

    def __init__(
        self,
        name: str,
        output: Output,
        record: memoryview,
        files: Mapping[int, int],
        limit: int,
        poller: Poller,
        log: logging.LoggerAdapter[logging.Logger],
        changed: Callable[[], None],
    ) -> None:
        self.name = name
        self.missed = 0
        self.failing = False
        self._output = output
        self._record = words = record.cast("Q")
        self._most = limit
        self._log = log
        self._changed = changed
        self._full_told = 0
        self._meddled = False
        self._retry = poller.timer(self._try_again)
        at = _STATES[words[0]]
        state = words[at : at + _STATE_WORDS].tolist()
        self.generation, self.size, self._offset, self._lost, self._told, self._under_way = state
        newest = max(files)
        self._fd = files.get(self.generation, -1)
        for generation, fd in files.items():
            if generation not in (self.generation, newest):
                os.close(fd)
        if not self.generation:
            self._offset = output.tail
        if self.generation != newest:
            self._move(newest, files[newest])
        else:
            try:
                self._look()
            except OSError as error:
                self._fail(error)

    @property
    def limit(self) -> int:
        """The offset that output may not pass before `flush`, lest bytes give way."""
        if self.failing:
            return _NO_LIMIT
        return self._offset + self._output.size

    @property
    def served(self) -> bool:
        """Whether everything that can be written is."""
        return self.failing or not (self._lost or self._offset < self._output.head)

    def begin_at(self, offset: int) -> None:
        """Go on there with an output that is still empty, and about to begin there."""
        self._offset = offset
        self._store(0)

    def flush(self) -> bool:
        """Write what is there; return whether some of it was written."""
        progress = False
        try:
            while self._retry.due is None and (data := self._next()):
                count = os.write(self._fd, data)
                # With O_APPEND that is where this write ended, whoever else writes to the file.
                size = os.lseek(self._fd, 0, os.SEEK_CUR)
                if size != self.size + count:
                    self._say_meddled(0)
                self._wrote(count, size)
                progress = True
        except OSError as error:
            self._fail(error)
        else:
            if self.failing and self._retry.due is None:
                self.failing = False
                self._log.info("the log %s is written again", self.name)
                self._changed()
        if self._most and self.size >= self._most and self._full_told != self.generation:
            self._full_told = self.generation
            self._changed()
        return progress

    def _next(self) -> memoryview | bytes:
        """Return what is to be written next, and have the record say so."""
        output = self._output
        data: memoryview | bytes = b""
        if not self._told:
            more = max(0, output.tail - self._offset)
            self._lost += more
            self._offset += more
            self.missed += more
        if self._lost:
            data = gap(self._lost)[self._told :]
        elif self._offset < output.head:
            data = output.span(self._offset)
        if data:
            self._store(len(data))
        return data

    def _wrote(self, count: int, size: int) -> None:
        """Go on behind `count` bytes of what is under way, in a file of `size` bytes."""
        if not self._lost:
            self._offset += count
        elif self._told + count < len(gap(self._lost)):
            self._told += count
        else:
            self._lost = self._told = 0
        self.size = size
        self._store(0)

    def _store(self, under_way: int) -> None:
        self._under_way = under_way
        record = self._record
        other = 1 - record[0]
        at = _STATES[other]
        record[at] = self.generation
        record[at + 1] = self.size
        record[at + 2] = self._offset
        record[at + 3] = self._lost
        record[at + 4] = self._told
        record[at + 5] = under_way
        record[0] = other  # one aligned store, which all of it counts from

    def _look(self) -> None:
        """Ask the file how much of what was under way is in it.

        Where somebody else changed it meanwhile that is not known: then all of it is, since
        nothing is to be in it twice. Raises OSError when the file does not even tell its size.
        """
        size = os.lseek(self._fd, 0, os.SEEK_END)
        count = size - self.size
        if not 0 <= count <= self._under_way:
            count = self._under_way
            self._say_meddled(0 if self._lost else count)
        self._wrote(count, size)

    def _say_meddled(self, doubtful: int) -> None:
        if doubtful or not self._meddled:
            self._meddled = True
            self._log.warning(
                "the log %s was changed by somebody else%s",
                self.name,
                f": {doubtful} bytes may be missing in it" if doubtful else "",
            )

    def _fail(self, error: OSError) -> None:
        if not self.failing:
            self.failing = True
            self._log.warning(
                "the log %s cannot be written, tried again every second: %s",
                self.name,
                (error.strerror or str(error)).lower(),
            )
            self._changed()
        self._retry.start(_RETRY_S)

    def _try_again(self) -> None:
        try:
            self._look()
        except OSError as error:
            self._fail(error)
        else:
            self.flush()

    def switch(self, generation: int, fd: int) -> None:
        """Write to another file from here on, if it is a newer one; `fd` is owned from now on."""
        if generation > self.generation:
            self._move(generation, fd)
        else:
            os.close(fd)

    def _move(self, generation: int, fd: int) -> None:
        before = self._fd
        try:
            self._look()
        except OSError:  # nobody has that file any more: what was under way may be in it
            if self._under_way:
                self._say_meddled(self._under_way)
            self._wrote(self._under_way, self.size)
        self._told = 0  # half a notice in one file is none
        self._fd, self.generation = fd, generation
        self.size = os.lseek(fd, 0, os.SEEK_END)
        self._store(0)
        self._retry.stop()
        if before >= 0:
            os.close(before)

    def end(self) -> None:
        """Write what is left, say what cannot be written, and close the file."""
        if self._retry.due is None:
            self.flush()
        else:
            self._retry.fire()
        self._retry.stop()
        left = self._output.head - self._offset
        if left > 0:
            self._log.warning("the log %s lacks the last %d bytes", self.name, left)
        os.close(self._fd)
