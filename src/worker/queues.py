"""The guest's memory and virtqueues: where they lie, who kicks and is called, which of them run.

What a queue carries is the hall's to say, as a `Carrier`; when it is served and how its buffers
become visible is said here.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from .. import config
from ..errors import GuestError, RefusedError
from ..health import Health
from .poller import HUP, Poller, drain_fd
from .vhost_user import message as wire
from .vhost_user import session as fx
from .virtqueue.memory import GuestMemory, map_region
from .virtqueue.split import SplitQueue

#: Buffers of one queue before the next queue has its turn.
BUDGET = 64

_ONE = wire.encode_u64(1)


class Work(NamedTuple):
    """What serving one virtqueue means, now.

    `wanted` is a cheap look at whether there may be work, `serve` does up to `BUDGET` buffers of it
    and returns how many it moved, `starving` says whether another buffer of the guest's would be
    of use.
    """

    wanted: Callable[[], bool]
    serve: Callable[[], int]
    starving: Callable[[], bool]


def never() -> bool:
    """Return False: nothing is wanted."""
    return False


def _nothing() -> int:
    return 0


#: A queue that nobody serves.
IDLE = Work(never, _nothing, never)


class Carrier(Protocol):
    """What the queues carry, by their index."""

    def kind(self, index: int) -> tuple[bool, int]:
        """Return whether the device writes into the queue's buffers, and a chain's most bytes."""

    def started(self, index: int, ring: SplitQueue) -> None:
        """Hear that a queue runs from now on."""

    def work(self, index: int, ring: SplitQueue, enabled: bool) -> Work:
        """Return what serving the queue means while it is `enabled` or not."""

    def stopped(self, index: int) -> None:
        """Hear that a queue does not run any more."""


class _Queue:
    """One virtqueue: descriptors that outlive a stop, and the ring while it runs."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.ring: SplitQueue | None = None
        self.place: fx.StartRing | None = None
        self.base = 0
        self.enabled = False
        self.kick: int | None = None
        self.call: int | None = None
        self.error: int | None = None
        self.work = IDLE


def _close(fd: int | None) -> None:
    if fd is not None:
        os.close(fd)


def _notify(fd: int | None) -> None:
    """Add one to an eventfd, or write the same bytes to UML's socket.

    Full means that the other side has not looked yet, broken that it never will: both are its own.
    """
    if fd is not None:
        try:
            os.write(fd, _ONE)
        except OSError:
            return


def _keep(fd: int | None) -> int | None:
    """Return a descriptor of our own for one that came with a message, never a blocking one."""
    if fd is None:
        return None
    try:
        kept = os.dup(fd)
    except OSError as error:
        raise RefusedError(f"no room for another file descriptor: {error}") from None
    os.set_blocking(kept, False)
    return kept


class Queues:
    """All virtqueues of one guest; `changed` hears when one broke."""

    def __init__(
        self,
        carrier: Carrier,
        poller: Poller,
        counters: Health,
        log: logging.LoggerAdapter[logging.Logger],
        changed: Callable[[], None],
    ) -> None:
        self._carrier = carrier
        self._poller = poller
        self._counters = counters
        self._log = log
        self._changed = changed
        self._features = 0
        self._memory: GuestMemory | None = None
        self._queues: dict[int, _Queue] = {}
        self._running: list[_Queue] = []
        self._backend_channel: int | None = None

    # The loop's work

    def drain(self) -> bool:
        """Serve every queue once; return whether anything moved."""
        worked = False
        for queue in self._running:
            if not queue.work.wanted():
                continue
            try:
                count = queue.work.serve()
            except GuestError as error:
                self._break(queue, error)
                return True
            if count:
                worked = True
                self._counters.chains += count
                self._publish(queue)
        return worked

    def drain_all(self) -> None:
        """Move what is there now; a guest that goes on writing has had its ring's worth."""
        for _ in range(config.LARGEST_QUEUE // BUDGET):
            if not self.drain():
                return

    def arm(self) -> bool:
        """Ask for kicks where buffers would be of use; return whether there is one already."""
        more = False
        for queue in self._running:
            if queue.work.starving() and queue.ring is not None:
                more |= queue.ring.want_kicks()
        return more

    def reconnect(self) -> None:
        """Ask the carrier anew what each enabled queue carries."""
        for queue in self._running:
            if queue.ring is not None and queue.enabled:
                queue.work = self._carrier.work(queue.index, queue.ring, queue.enabled)

    def _publish(self, queue: _Queue) -> None:
        if queue.ring is not None and queue.ring.publish() and queue.call is not None:
            self._counters.calls += 1
            _notify(queue.call)

    def _break(self, queue: _Queue, error: GuestError) -> None:
        self._log.error("queue %d is broken and stopped: %s", queue.index, error)
        self._counters.broken += 1
        self._publish(queue)  # what was completed before the mistake
        self._halt(queue)
        _notify(queue.error)
        self._changed()

    def release(self) -> None:
        """Stop everything and give back all that came from the frontend, which is gone."""
        self.drain_all()  # what the guest wrote before it went is still in its memory
        for queue in self._queues.values():
            self._stop(queue)
            _close(queue.call)
            _close(queue.error)
        self._queues.clear()
        self._memory = None
        self._features = 0
        _close(self._backend_channel)
        self._backend_channel = None

    # The session's effects

    def apply(self, effect: fx.Effect) -> Any:
        """Carry out one effect. fds in it are the message's: what is kept is a duplicate.

        Raises RefusedError when it cannot be done, with everything as it was.
        """
        match effect:
            case fx.SetFeatures(features):
                self._features = features
            case fx.MapMemory(regions, fds):
                self._map(regions, fds)
            case fx.CheckRing(ring, size, addr):
                self._place(self._queue(ring), size, addr)
            case fx.StartRing():
                self._start(effect)
            case fx.EnableRing(ring, enabled):
                self._enable(self._queue(ring), enabled)
            case fx.StopRing(ring):
                return self._stop(self._queue(ring))
            case fx.SetCall(ring, fd):
                queue = self._queue(ring)
                kept = _keep(fd)
                _close(queue.call)
                queue.call = kept
                if queue.ring is not None:
                    _notify(queue.call)  # the one before may have swallowed a call
            case fx.SetError(ring, fd):
                queue = self._queue(ring)
                kept = _keep(fd)
                _close(queue.error)
                queue.error = kept
            case fx.SetBackendChannel(fd):
                kept = _keep(fd)
                _close(self._backend_channel)
                self._backend_channel = kept
        return None

    def _queue(self, index: int) -> _Queue:
        queue = self._queues.get(index)
        if queue is None:
            queue = self._queues[index] = _Queue(index)
        return queue

    def _map(self, regions: list[wire.Region], fds: list[int]) -> None:
        mapped = [map_region(fd, *region) for fd, region in zip(fds, regions, strict=True)]
        memory = GuestMemory(mapped)
        self.drain_all()  # under the old table, as the guest meant it
        self._memory = memory
        lost = []
        for queue in [*self._running]:
            place = queue.place
            if place is None:
                continue
            self._halt(queue)
            try:
                self._begin(queue, place._replace(enabled=queue.enabled))
            except RefusedError:
                lost.append(queue.index)
        if lost:
            raise RefusedError(f"the new memory table has no place for running queues {lost}")

    def _place(self, queue: _Queue, size: int, addr: wire.VringAddr) -> SplitQueue:
        if self._memory is None:
            raise RefusedError(f"queue {queue.index} has addresses but there is no memory table")
        writable, most_bytes = self._carrier.kind(queue.index)
        return SplitQueue(
            self._memory,
            size,
            addr.desc,
            addr.avail,
            addr.used,
            features=self._features,
            writable=writable,
            most_bytes=most_bytes,
        )

    def _start(self, effect: fx.StartRing) -> None:
        queue = self._queue(effect.ring)
        if queue.ring is None:
            self._place(queue, effect.size, effect.addr)  # refused before anything is replaced
        self._watch_kick(queue, effect.kick)
        if queue.ring is None:
            self._begin(queue, effect)

    def _begin(self, queue: _Queue, place: fx.StartRing) -> None:
        ring = self._place(queue, place.size, place.addr)
        ring.refuse_kicks()
        queue.place, queue.ring, queue.enabled = place, ring, place.enabled
        self._carrier.started(queue.index, ring)
        if queue.enabled:
            queue.work = self._carrier.work(queue.index, ring, True)
        self._running.append(queue)

    def _enable(self, queue: _Queue, enabled: bool) -> None:
        ring = queue.ring
        if ring is None or enabled == queue.enabled:
            return
        if not enabled:
            self.drain_all()  # what was there while it was enabled counts
        queue.enabled = enabled
        queue.work = self._carrier.work(queue.index, ring, enabled)

    def _stop(self, queue: _Queue) -> int:
        self._halt(queue)
        self._watch_kick(queue, None)
        return queue.base

    def _halt(self, queue: _Queue) -> None:
        """Take a ring out of service; its index is kept."""
        if queue.ring is None:
            return
        queue.base = queue.ring.index
        queue.ring = None
        queue.work = IDLE
        self._running.remove(queue)
        self._carrier.stopped(queue.index)

    def _watch_kick(self, queue: _Queue, fd: int | None) -> None:
        kick = _keep(fd)
        if kick is not None:

            def kicked(events: int) -> None:
                self._counters.kicks += 1
                drain_fd(kick)
                if events & HUP:  # reported for ever
                    self._poller.forget(kick)
                if queue.ring is not None:
                    queue.ring.refuse_kicks()

            try:
                self._poller.watch(kick, kicked)
            except PermissionError:
                os.close(kick)
                raise RefusedError(
                    f"queue {queue.index}: its kick fd cannot be waited on"
                ) from None
        if queue.kick is not None:
            self._poller.forget(queue.kick)
            os.close(queue.kick)
        queue.kick = kick
