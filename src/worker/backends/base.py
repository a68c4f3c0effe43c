"""What every console backend is: an endpoint where clients arrive, and clients that come and go."""

from __future__ import annotations

import errno
from typing import Protocol

from ...errors import FrontendError


class Client(Protocol):
    """One attached person or program. Nothing here ever blocks.

    `reads` and `writes` are two descriptors to wait on, one for each half. `stays` says that the
    end of its input is not the beginning of its leaving, `resizes` that its size changes without
    a word. `framed` ones are told offsets instead of notices among the bytes, see
    `attached`.
    """

    name: str
    reads: int
    writes: int
    stays: bool
    resizes: bool
    framed: bool

    @property
    def due(self) -> bool:
        """Whether it is to be told something beside the output."""

    def read(self, into: list[memoryview]) -> int | None:
        """Fill these spans in turn; return how many bytes, 0 at the end of input, None for not now.

        Raises ConnectionError when the client is gone, FrontendError when the spans are: memory of
        a file that was cut off.
        """

    def write(self, data: memoryview | bytes) -> int:
        """Write what fits now; return how many bytes, 0 for none.

        Raises ConnectionError when the client is gone, other OSErrors when the sink failed.
        """

    def on_its_way(self) -> int:
        """Return a measure of what was written and has not arrived yet, 0 where it is not known."""

    def end_output(self) -> int:
        """Write no more; return how many of the bytes written are known never to arrive."""

    def unread(self) -> int:
        """Return how many bytes were typed that nobody can read once the client is closed."""

    def total_written(self) -> int | None:
        """Return how many bytes were ever written to the client, whoever was killed after that.

        None where the system does not count; what was written last may come twice then.
        """

    def total_read(self) -> int | None:
        """Return how many bytes were ever read from the client, whoever was killed after that.

        None where the system does not count; what was read last may be lost then.
        """

    def size(self) -> tuple[int, int]:
        """Return the client's columns and rows, (0, 0) where they are not known."""

    def close(self) -> None:
        """Let the client go, whoever else has its descriptors."""


class Endpoint(Protocol):
    """Where the clients of one port arrive whom the master does not accept."""

    def fileno(self) -> int | None:
        """Return the descriptor that is readable when clients arrive, None when none ever does."""

    def accept(self) -> Client | None:
        """Return a client that has arrived, None when there is none (yet).

        Raises OSError when the system has no room for one; it is looked for again at the next.
        """

    def close(self) -> None:
        """Accept no more; the clients are their owner's."""

    def abandon(self) -> None:
        """Give back what would stay changed when this process ends; the clients go on elsewhere."""


def gap(lost: int) -> bytes:
    """Return what a reader is told, among the bytes of the guest's, of `lost` ones between them."""
    return b"\r\n[vhost-device-console: %d bytes missed]\r\n" % lost


def not_now(error: OSError) -> bool:
    """Say whether a read failed only for now. Raises FrontendError if it did for want of memory."""
    if error.errno == errno.EFAULT:
        raise FrontendError("the guest's memory is gone: its frontend cut it off") from None
    return isinstance(error, BlockingIOError)
