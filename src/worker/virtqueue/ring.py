"""A running virtqueue, whatever its format: what it can do, and where it is made."""

from __future__ import annotations

from typing import Any, Protocol

from ... import config
from ...errors import RefusedError
from ...journal import Input, Output
from ...ledger import Page, Pending
from .chain import Chain
from .features import EVENT_IDX, IN_ORDER, INDIRECT_DESC, RING_PACKED, RING_RESET
from .inflight import PackedState, SplitState
from .log import DirtyLog
from .memory import GuestMemory
from .packed import PackedQueue
from .split import SplitQueue
from .tracked import TrackedPackedQueue, TrackedSplitQueue

#: What a device with these rings offers, with RING_PACKED where it is asked for: Linux' console
#: driver never suppresses a packed ring's calls, and takes one for every buffer. IN_ORDER is kept
#: by every user of a ring: it pushes what it popped in that order. RING_RESET is a stop and a start
#: to a ring, as any other.
RING_FEATURES = INDIRECT_DESC | EVENT_IDX | IN_ORDER | RING_RESET


class Ring(Protocol):
    """One running ring: `pop` buffers, `push` them back in order, `publish`.

    What is pushed may be visible before that, if it is very much: so whoever moves a stream moves
    it by a buffer's bytes before the buffer is pushed.
    """

    @property
    def size(self) -> int:
        """The number of descriptors."""

    @property
    def index(self) -> int:
        """What GET_VRING_BASE says of this ring: where it goes on, in its format's terms."""

    @property
    def fresh(self) -> bool:
        """Whether the ring is where a new one begins: a driver has just set it up."""

    @property
    def held(self) -> int:
        """The size of the buffer that `take` left for want of room, 0 for none."""

    def keep(self, page: Page | None, stream: Output | Input | None) -> None:
        """Commit there from now on, as `place` has it; nothing is pushed that is not visible."""

    def take(self, output: Output, most: int, limit: int, linger_ns: int) -> int:
        """Move up to `most` buffers into `output`, each completed and seen by the guest at once.

        Stops before a buffer that would bring the output's head past `limit`. When there are no
        more it looks for `linger_ns` longer, unless the guest wants a call: `publish` tells.

        Returns how many were moved. Raises GuestError as `pop` does; those before count.
        """

    def ready(self) -> bool:
        """Say whether `pop` has something to look at."""

    def pop(self) -> Chain | None:
        """Return the next buffer, or None when the guest has given no more.

        Raises GuestError when the ring or the chain is not what the specification allows; the
        queue can then only be stopped.
        """

    def unpop(self, head: int) -> None:
        """Put the chain popped last, `head`, back; again and again, until the one pushed last."""

    def push(self, head: int, written: int) -> None:
        """Complete the oldest popped chain, `head`, with `written` bytes; not visible yet."""

    def pending(self) -> Pending:
        """Return what was pushed and is not visible yet, to be given to a successor's `place`."""

    def publish(self) -> bool:
        """Let the guest see what was pushed; return whether it wants a call."""

    def want_kicks(self) -> bool:
        """Ask the guest to kick at its next buffer; return whether there already is one."""

    def refuse_kicks(self) -> None:
        """Ask the guest not to kick."""

    def log(self, log: DirtyLog | None, used_addr: int | None) -> None:
        """From now on, mark in `log` what is written for the guest; None: nowhere.

        `used_addr` is SET_VRING_ADDR's log address, None without VHOST_VRING_F_LOG. Call it while
        no popped chain waits for its `push`. Raises RefusedError when the log is too small for it.
        """


def check_size(size: int, features: int) -> None:
    """Raise RefusedError when no ring of the format that `features` choose has `size` entries.

    Source: VIRTIO 1.2, sections 2.7 and 2.8.10.1.
    """
    packed = bool(features & RING_PACKED)
    if not 0 < size <= config.LARGEST_QUEUE or (size & (size - 1) and not packed):
        wanted = "any number" if packed else "a power of two"
        raise RefusedError(
            f"a ring cannot have {size} entries: {wanted} from 1 to {config.LARGEST_QUEUE}"
        )


def place(
    memory: GuestMemory,
    size: int,
    desc: int,
    avail: int,
    used: int,
    *,
    features: int,
    base: int,
    writable: bool,
    most_bytes: int,
    inflight: SplitState | PackedState | None = None,
    ledger: Page | None = None,
    stream: Output | Input | None = None,
    resume: Pending | None = None,
) -> Ring:
    """Return the ring of `size` entries at the frontend addresses of SET_VRING_ADDR.

    `base` is what SET_VRING_BASE said, or `index` of the ring's predecessor. A split ring goes on
    where its own used index says instead: that is true even after a crash.
    `writable` says which way the guest's buffers go: True when this side fills them.
    A chain of more than `most_bytes` is an error. With `inflight`, what is popped is kept there
    until it is published, and what a predecessor left there is popped first.

    Before the guest sees what was pushed, it is committed in `ledger`, with how far that brings
    `stream`, whose buffers these are. After the ring's worker was killed, `resume` is what was
    committed there, or `pending` elsewhere: where the ring goes on, whatever `base` says. It is all
    visible then, and nothing else is. The stream must have gone back before, and the guest may miss
    a call.

    Raises RefusedError when no ring of the negotiated format can be there: its size is none of
    that format's, an area is misaligned or not within one memory region, `base` is no place in it,
    or `inflight` is of the other format or too small.
    """
    packed = bool(features & RING_PACKED)
    check_size(size, features)
    if inflight is not None and packed != isinstance(inflight, PackedState):
        raise RefusedError("an inflight area was made for rings of the other format")
    where = (memory, size, desc, avail, used)
    options: dict[str, Any] = {
        "features": features,
        "writable": writable,
        "most_bytes": most_bytes,
        "page": ledger or Page(),
        "stream": stream,
        "resume": resume,
    }
    if isinstance(inflight, PackedState):
        return TrackedPackedQueue(*where, **options, base=base, state=inflight)
    if isinstance(inflight, SplitState):
        return TrackedSplitQueue(*where, **options, state=inflight)
    return PackedQueue(*where, **options, base=base) if packed else SplitQueue(*where, **options)
