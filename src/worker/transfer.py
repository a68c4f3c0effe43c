"""The device's state on its way to another backend, or from one, as a frontend moves it.

The bytes mean nothing here. They go through a descriptor of the frontend's, at its pace, and the
end of the file is the end of the state (vhost-user, "Migrating back-end state").
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

from ..errors import RefusedError
from .poller import IN, OUT, Poller

_CHUNK = 1 << 18

#: Chunks before everything else has its turn.
_TURN = 16


class Transfer:
    """At most one transfer at a time; `save` makes a state, `load` takes one or refuses it.

    A state has no more than `most()` bytes. `saved` is true once the frontend knows that it has the
    whole state, until the device goes on.
    """

    def __init__(
        self,
        poller: Poller,
        log: logging.LoggerAdapter[logging.Logger],
        save: Callable[[], bytes],
        load: Callable[[bytes], None],
        most: Callable[[], int],
    ) -> None:
        self._poller = poller
        self._log = log
        self._save = save
        self._load = load
        self._most = most
        self._fd: int | None = None
        self._loading = False
        self._unsent = memoryview(b"")
        self._received = bytearray()
        self._whole = False
        self.saved = False

    def send(self, fd: int) -> None:
        """Write the state into `fd`, which is taken over. Raises RefusedError."""
        self.stop()
        self._begin(fd, OUT, loading=False)
        self._unsent = memoryview(self._save())

    def receive(self, fd: int) -> None:
        """Read a state from `fd`, which is taken over. Raises RefusedError."""
        self.stop()
        self._begin(fd, IN, loading=True)

    def _begin(self, fd: int, events: int, *, loading: bool) -> None:
        try:
            self._poller.watch(fd, self._ready, events, file_too=True)
        except OSError as error:
            os.close(fd)
            raise RefusedError(f"the way of a state cannot be waited on: {error}") from None
        self._fd = fd
        self._loading = loading

    def _ready(self, _: int) -> None:
        if not self._move(_TURN):  # it would be ready for ever
            self._fail("its descriptor says that it is ready, and is not")

    def _move(self, chunks: int) -> bool:
        """Move what can be moved now, no more than so many chunks; return whether that was any."""
        moved = False
        try:
            for _ in range(chunks):
                if self._fd is None:
                    break
                os.set_blocking(self._fd, False)  # the frontend may have undone it
                if self._loading:
                    self._take(self._fd)
                else:
                    self._give(self._fd)
                moved = True
        except BlockingIOError:
            return moved
        except (OSError, RefusedError) as error:
            self._fail(str(error))
        return True

    def _give(self, fd: int) -> None:
        self._unsent = self._unsent[os.write(fd, self._unsent[:_CHUNK]) :]
        if not self._unsent:
            self._end()
            self._whole = True

    def _take(self, fd: int) -> None:
        data = os.read(fd, _CHUNK)
        self._received += data
        if len(self._received) > (most := self._most()):
            raise RefusedError(f"it has more than {most} bytes")
        if not data:
            state = bytes(self._received)
            self._end()
            self._load(state)
            self._whole = True

    def _fail(self, why: str) -> None:
        self._log.error("the device's state was not transferred: %s", why)
        self._end()

    def check(self) -> bool:
        """Say whether the last transfer is over and was whole.

        The frontend asks when it has seen the end, so what is left can be moved without waiting.
        """
        self._move(self._most() // _CHUNK + 2)
        if self._fd is not None:
            self._fail("the frontend asked how it went before it was over")
        self.saved = self._whole and not self._loading
        return self._whole

    def stop(self) -> None:
        """Let go of a transfer and of how it went, as a new one begins or the device goes on."""
        self._end()
        self._whole = self.saved = False

    def _end(self) -> None:
        fd, self._fd = self._fd, None
        self._unsent = memoryview(b"")
        self._received.clear()
        if fd is not None:
            self._poller.forget(fd)
            os.close(fd)
