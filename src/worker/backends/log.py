"""A port's log: a file that gets every byte of its output once, whoever is killed meanwhile.

It reads the journal like anybody, but nobody waits for a person behind it: a log that cannot be
written (its disk is full) stops, keeps its place, and tries again every second. What gave way
meanwhile is a gap that is counted, and stands in the file. As long as it can be written the port
takes no more than it has room for, so that there is none.

A worker opens nothing. The master opens the file, with O_APPEND, and a new one for each rotation;
each has a *generation*, which counts up. A record in shared memory says at each moment what is
about to be written, and where; the size of the file says how much of it was. What is not in the
file as it is in the journal, since a time comes before each line, lies ready in shared memory, too,
until all of it is written: once it does, it is what the record speaks of, and no longer the bytes
that it was made of.

The record is u64 words, native byte order: word 0 chooses the state in words 1 to 7 or that in
words 8 to 14. A state: generation (0: there is none), the file's size when it was stored, the
journal's offset of the next byte, the size of a gap whose notice comes before that or 0, how many
bytes of the notice, or of the text that lies ready, are written, how many bytes are being written
now (of the notice, if there is one, else of the text, if there is one, else of the journal), and
four times the text's size, plus 1 if it ends within a line, plus 2 if it began so.

Behind it is what the master puts in the index of times: how many entries there ever were, and the
last of them, in turn: see `ledger.LogEntry`. The text has the rest of the memory.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping

from ...config import LogFormat
from ...journal import Output
from ...ledger import LOG_ENTRIES, LOG_INDEX
from ..poller import Poller
from .base import gap
from .lines import LONGEST_LINE, MOST_TEXT, STAMP_BYTES, gap_object, objects, stamped

#: How often a file that cannot be written is tried again.
_RETRY_S = 1.0

#: More than any offset.
_NO_LIMIT = (1 << 63) - 1

#: An object is written of a line that has no end yet after so long.
_LINE_S = 1.0

#: So far apart are the entries of the index, at least.
_ENTRY_NS = 10_000_000

#: What a log has in shared memory, and where in it the index and the text are.
RECORD_BYTES = 40960
_TEXT_AT = RECORD_BYTES - MOST_TEXT

#: Where the two states begin.
_STATES = (1, 8)
_STATE_WORDS = 7

#: What is made into text at a time.
_CHUNK = 8192

#: What is said of a text beside its size.
_ENDS_WITHIN, _BEGAN_WITHIN = 1, 2


class Log:
    """One port's log, which goes on where `record` (RECORD_BYTES, zeros at first) says.

    `files` are the descriptors that the master keeps, by generation, its own from now on: those
    that a predecessor may have been writing, and the newest, which all that follows goes to.
    `changed` is called when a file has `limit` bytes (0: never), cannot be written, or can again.
    `generation` and `size` (bytes) are those of the file that is written, `missed` counts the bytes
    that gave way, `failing` says that the file cannot be written now. With `times` the index gets
    entries.
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
        *,
        form: LogFormat = LogFormat.RAW,
        times: bool = False,
    ) -> None:
        self.name = name
        self.missed = 0
        self.failing = False
        self._output = output
        self._record = words = record[: LOG_INDEX.start].cast("Q")
        self._index = record[LOG_INDEX].cast("Q")
        self._memory = record[_TEXT_AT:]
        self._form = form
        self._times = times
        self._noted = 0  # when the last entry was
        self._urged = 0  # lines that begin before that offset are written though they have no end
        self._examined = 0  # there is no more than half a line up to that offset
        self._began = 0  # when that came
        self._most = limit
        self._log = log
        self._changed = changed
        self._full_told = 0
        self._meddled = False
        self._retry = poller.timer(self._try_again)
        self._line = poller.timer(self._out_of_patience)
        at = _STATES[words[0]]
        state = words[at : at + _STATE_WORDS].tolist()
        self.generation, self.size, self._offset, self._lost = state[:4]
        self._told, self._under_way, ready = state[4:]
        self._ready, self._within = ready >> 2, ready & 3
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
        done = max(self._offset, self._examined)
        return self.failing or not (self._lost or self._ready or done < self._output.head)

    def begin_at(self, offset: int) -> None:
        """Go on there with an output that is still empty, and about to begin there."""
        self._offset = offset
        self._examined = 0
        self._store(0)

    def flush(self) -> bool:
        """Write what is there; return whether some of it was written."""
        progress = False
        if self._times and self._offset < self._output.head:
            self._note()
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
        if not (self._told or self._ready):
            more = max(0, output.tail - self._offset)
            self._lost += more
            self._offset += more
            self.missed += more
            if self._form is not LogFormat.RAW:
                self._prepare()
        if self._ready:
            data = self._memory[self._told : self._ready]
        elif self._lost:
            data = gap(self._lost)[self._told :]
        elif self._form is LogFormat.RAW and self._offset < output.head:
            data = output.span(self._offset)
        if data:
            self._store(len(data))
        return data

    def _prepare(self) -> None:
        """Make a text of what comes next, if that is enough for one."""
        head = self._output.head
        urged = self._urged > self._offset
        if not self._lost and (self._offset >= head or (head <= self._examined and not urged)):
            return
        now = time.time_ns()
        begun = self._within & _ENDS_WITHIN
        within, count = 0, 0
        if self._lost:
            if self._form is LogFormat.JSON:
                text = gap_object(self._lost, self._offset, now)
            else:
                notice = gap(self._lost)
                text = stamped(notice if begun else notice.lstrip(), bool(begun), now)
        else:
            data = self._peek(_CHUNK)
            if self._form is LogFormat.JSON:
                since = self._began if self._examined > self._offset else now
                text, count = objects(data, self._offset, now, since, all_of_it=urged)
                self._mind_rest(data, count, since)
            else:
                text = stamped(data, bool(begun), now)
                while len(text) > MOST_TEXT:
                    data = data[: len(data) // 2]
                    text = stamped(data, bool(begun), now)
                count = len(data)
                within = 0 if data.endswith(b"\n") else _ENDS_WITHIN
        if not text:
            return
        # Only what is stored next says that it is there, and that the bytes are not any more.
        self._memory[: len(text)] = text
        self._ready = len(text)
        self._within = within | (_BEGAN_WITHIN if begun else 0)
        self._offset += count
        self._lost = 0

    def _peek(self, most: int) -> bytes:
        """Return the next bytes of the journal."""
        data = bytes(self._output.span(self._offset)[:most])
        if len(data) < min(most, self._output.head - self._offset):
            data += bytes(self._output.span(self._offset + len(data))[: most - len(data)])
        return data

    def _mind_rest(self, data: bytes, count: int, since: int) -> None:
        """Let a line without an end, if there is no more behind `count` bytes, wait for a while."""
        end, rest = self._offset + len(data), len(data) - count
        half = 0 < rest < LONGEST_LINE and data.find(b"\n", count) < 0
        if half and end == self._output.head:
            self._examined = end
            if count or self._line.due is None:
                self._began = time.time_ns() if count else since
                self._line.start(_LINE_S)
        else:
            self._line.stop()

    def urge(self) -> bool:
        """Do the same as `flush`, and write half a line, too."""
        self._urged = self._output.head
        return self.flush()

    def _out_of_patience(self) -> None:
        self.urge()

    def _note(self) -> None:
        """Make an entry of the index: what is written next came now."""
        now = time.time_ns()
        if 0 <= now - self._noted < _ENTRY_NS or self._lost or self._offset < self._output.tail:
            return
        self._noted = now
        index = self._index
        count = index[0]
        at = 1 + count % LOG_ENTRIES * 4
        index[at] = self.generation
        index[at + 1] = self.size
        index[at + 2] = self._offset
        index[at + 3] = now
        index[0] = count + 1

    def _wrote(self, count: int, size: int) -> None:
        """Go on behind `count` bytes of what is under way, in a file of `size` bytes."""
        if self._ready:
            self._told += count
            if self._told >= self._ready:
                self._ready = self._told = 0
        elif not self._lost:
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
        record[at + 6] = self._ready << 2 | self._within
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
            self._changed()  # the one before is whole now
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
        self._told = self._kept_of_text() if self._ready else 0  # half a notice in one file is none
        if not self._ready:
            self._within = 0  # each file begins with a time
        self._fd, self.generation = fd, generation
        self.size = os.lseek(fd, 0, os.SEEK_END)
        self._store(0)
        self._retry.stop()
        if before >= 0:
            os.close(before)

    def _kept_of_text(self) -> int:
        """Return how much of the text need not be in another file: what of it is in this one.

        Half an object is none, and neither is half a time.
        """
        line = bytes(self._memory[: self._told]).rfind(b"\n") + 1
        if self._form is LogFormat.JSON:
            return line
        timed = line > 0 or not self._within & _BEGAN_WITHIN
        return line if timed and self._told - line < STAMP_BYTES else self._told

    def end(self) -> None:
        """Write what is left, say what cannot be written, and close the file."""
        self._urged = _NO_LIMIT
        self._line.stop()
        if self._retry.due is None:
            self.flush()
        else:
            self._retry.fire()
        self._retry.stop()
        self._line.stop()
        left = self._output.head - self._offset
        if left > 0:
            self._log.warning("the log %s lacks the last %d bytes", self.name, left)
        os.close(self._fd)
