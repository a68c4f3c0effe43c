"""The guest's memory and virtqueues: where they lie, who kicks and is called, which of them run.

What a queue carries is the hall's to say, as a `Carrier`; when it is served and how its buffers
become visible is said here. So are the two channels beside the rings that a frontend can open: one
for messages of ours, one for the device's state.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import msgspec

from .. import config
from ..errors import FrontendError, GuestError, RefusedError
from ..health import Health
from ..journal import Input, Output
from ..ledger import Ledger, Pending
from .inheritance import Held
from .poller import HUP, IN, OUT, Poller, drain_fd
from .transfer import Transfer
from .vhost_user import message as wire
from .vhost_user import session as fx
from .vhost_user.backend_channel import BackendChannel
from .vhost_user.message import ProtocolFeature
from .virtqueue import inflight
from .virtqueue.chain import look
from .virtqueue.inflight import Inflight, PackedState, SplitState
from .virtqueue.log import DirtyLog
from .virtqueue.memory import GuestMemory, Region, map_region
from .virtqueue.ring import Ring, check_size, place

#: Buffers of one queue before the next queue has its turn.
BUDGET = 64

#: How often rings are looked at that are not kicked, since no descriptor came for that.
_POLL_S = 0.001

#: Broken queues that are logged one by one; the rest of a session's are only counted.
_LOGGED_BREAKS = 10

_ONE = wire.encode_u64(1)


class Work(NamedTuple):
    """What serving one virtqueue means, now.

    `wanted` is a cheap look at whether there may be work, `serve` does up to `BUDGET` buffers of it
    and returns how many, for so many nanoseconds it may look for more; `starving` says whether
    another buffer of the guest's would be of use.
    """

    wanted: Callable[[], bool]
    serve: Callable[[int], int]
    starving: Callable[[], bool]


def _never() -> bool:
    """Return False: nothing is wanted."""
    return False


def _nothing(_: int) -> int:
    return 0


#: A queue that nobody serves.
IDLE = Work(_never, _nothing, _never)


class Carrier(Protocol):
    """What the queues carry, by their index, and what else is the device's."""

    def kind(self, index: int) -> tuple[bool, int]:
        """Return whether the device writes into the queue's buffers, and a chain's most bytes."""

    def stream(self, index: int) -> Output | Input | None:
        """Return what the queue's buffers are moved into or from; None for control messages."""

    def commit(self) -> None:
        """Commit what the buffers mean that a control queue is about to complete."""

    def started(self, index: int, ring: Ring) -> None:
        """Hear that a queue runs from now on."""

    def work(self, index: int, ring: Ring, enabled: bool) -> Work:
        """Return what serving the queue means while it is `enabled` or not."""

    def disabled(self, index: int) -> None:
        """Hear that a queue is disabled, while its ring can still be looked at."""

    def leaving(self, index: int, ring: Ring) -> None:
        """Take what can be taken from a queue that runs: its frontend has gone."""

    def stopped(self, index: int, ring: Ring) -> None:
        """Hear that a queue does not run any more; `ring` can be looked at now, and not later."""

    def reset(self) -> None:
        """Forget what the guest said; no queue runs."""

    def save(self) -> bytes:
        """Return the device's state; no queue runs."""

    def largest_state(self) -> int:
        """Return how many bytes a state can have that this device could load."""

    def load(self, data: bytes) -> None:
        """Become the device of that state; no queue runs. Raises RefusedError when it cannot be."""

    def moved(self) -> None:
        """Hear that the frontend went away with the whole state: the guest is elsewhere now."""


class _Queue:
    """One virtqueue: descriptors that outlive a stop, and the ring while it runs.

    `call_inband` and `error_inband` are true until the frontend says where to tell it, be it
    nowhere (None).
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.ring: Ring | None = None
        self.start: fx.StartRing | None = None
        self.base = 0
        self.enabled = False
        self.broken = False
        self.kick: Held | None = None
        self.call: Held | None = None
        self.call_inband = True
        self.error: Held | None = None
        self.error_inband = True
        self.tracked = False  # in the inflight area
        self.control = False  # what it carries is committed before the guest sees it
        self.work = IDLE


class _SavedRegion(msgspec.Struct, array_like=True):
    region: tuple[int, ...]
    key: int


class _SavedQueue(msgspec.Struct, array_like=True, kw_only=True):
    """`start` is there while the ring runs: its size and its address, as SET_VRING_ADDR has it.

    `pushed` is what a control queue has completed and its guest may not see yet.
    """

    index: int
    base: int
    enabled: bool
    broken: bool
    kick: int | None
    call: int | None
    call_inband: bool
    error: int | None
    error_inband: bool
    start: tuple[int, tuple[int, ...]] | None
    tracked: bool
    pushed: Pending | None


class Saved(msgspec.Struct, array_like=True, kw_only=True):
    """All that a successor's queues begin with; descriptors are named by their keys."""

    features: int
    protocol: int
    regions: list[_SavedRegion]
    queues: list[_SavedQueue]
    channel: int | None
    config_changed: bool
    dirty: tuple[int, int, int] | None
    dirty_event: int | None
    inflight: tuple[int, int, int, int, int] | None
    saved: bool

    @property
    def running(self) -> list[int]:
        """The indices of those that run."""
        return [queue.index for queue in self.queues if queue.start is not None]

    def keys(self) -> list[int]:
        """Return all keys in it."""
        keys = [region.key for region in self.regions]
        for queue in self.queues:
            keys += [key for key in (queue.kick, queue.call, queue.error) if key is not None]
        for key in (self.channel, self.dirty_event):
            if key is not None:
                keys.append(key)
        for area in (self.dirty, self.inflight):
            if area is not None:
                keys.append(area[-1])
        return keys


def _close(fd: int | None) -> None:
    if fd is not None:
        os.close(fd)


def _notify(fd: int | None) -> None:
    """Add one to an eventfd, or write the same bytes to UML's socket.

    Full means that the other side has not looked yet, broken that it never will: both are its own.
    """
    if fd is not None:
        try:
            os.set_blocking(fd, False)  # the frontend has the same description, and may undo it
            os.write(fd, _ONE)
        except OSError:
            return


def _dup(fd: int) -> Held:
    """Return a descriptor of our own for one that came with a message, never a blocking one."""
    try:
        os.set_blocking(fd, False)
        return Held(os.dup(fd), _key(fd))
    except OSError as error:
        raise RefusedError(f"a file descriptor cannot be kept: {error}") from None


def _keep(fd: int | None) -> Held | None:
    return None if fd is None else _dup(fd)


def _key(fd: int) -> int:
    """Return the key of a descriptor that came with a message."""
    assert isinstance(fd, Held)  # noqa: S101  all of them are
    return fd.key


def _key_of(fd: Held | None) -> int | None:
    return None if fd is None else fd.key


class Queues:
    """All virtqueues of one guest; `changed` hears what is served out of turn, or broken."""

    def __init__(
        self,
        carrier: Carrier,
        poller: Poller,
        counters: Health,
        log: logging.LoggerAdapter[logging.Logger],
        changed: Callable[[], None],
        ledger: Ledger,
    ) -> None:
        self._carrier = carrier
        self._ledger = ledger
        self._poller = poller
        self._counters = counters
        self._log = log
        self._changed = changed
        self._features = 0
        self._protocol = ProtocolFeature(0)
        self._regions: list[Region] = []
        self._keys: list[_SavedRegion] = []  # of the regions, in the same order
        self._memory: GuestMemory | None = None
        self._queues: dict[int, _Queue] = {}
        self._running: list[_Queue] = []
        self._backend_channel: BackendChannel | None = None
        self._channel_blocked = False
        self._channel_key = 0
        self._config_changed = False
        self._polling = poller.timer(self._poll)
        self._breaks = 0
        self._transfer = Transfer(poller, log, carrier.save, carrier.load, carrier.largest_state)
        self._dirty: DirtyLog | None = None
        self._dirty_area: tuple[int, int, int] | None = None
        self._dirty_event: Held | None = None
        self._fault: FrontendError | None = None
        self._inflight: Inflight | None = None
        self._inflight_area: tuple[int, int, int, int, int] | None = None

    # The loop's work

    def drain(self, linger_ns: int = 0) -> bool:
        """Serve every queue once; return whether anything moved.

        For `linger_ns` more may be looked for. Raises FrontendError when the frontend has taken
        away what it gave.
        """
        if self._fault is not None:
            raise self._fault
        worked = False
        for queue in self._running:
            if queue.work.wanted():
                worked |= self._serve(queue, partial(queue.work.serve, linger_ns))
                if queue.ring is None:  # broken, and what is iterated has changed
                    return True
        return worked

    def _serve(self, queue: _Queue, serve: Callable[[], int]) -> bool:
        """Let `serve` move buffers, and tell the guest; return whether it moved any."""
        try:
            count = serve()
        except GuestError as error:
            self._break(queue, error)
            return True
        if not count:
            return False
        self._counters.chains += count
        if queue.control:
            self._carrier.commit()
        self._publish(queue)
        if self._dirty is not None and self._dirty.marked:
            self._dirty.marked = False
            _notify(self._dirty_event)
        return True

    def serve(self, index: int, serve: Callable[[], int]) -> bool:
        """Serve a running queue out of turn; return whether anything moved."""
        try:
            return self._serve(self._queues[index], serve)
        except FrontendError as error:
            self._fault = error  # the next `drain` tells
            return True

    def drain_all(self) -> None:
        """Move what is there now; a guest that goes on writing has had its ring's worth."""
        end = self._counters.chains + config.LARGEST_QUEUE * len(self._running)
        try:
            while self.drain() and self._counters.chains < end:
                pass
        except FrontendError as error:
            self._fault = error  # the next `drain` tells

    def look(self, until_ns: int, linger_ns: int = 0) -> bool:
        """Look until then for a buffer of use, and serve its queue as `drain` does."""
        queues = [queue for queue in self._running if queue.ring and queue.work.starving()]
        at = look([queue.ring for queue in queues if queue.ring], until_ns)
        return at >= 0 and self._serve(queues[at], partial(queues[at].work.serve, linger_ns))

    def arm(self) -> bool:
        """Ask for kicks where buffers would be of use; return whether there is one already."""
        more = False
        try:
            for queue in self._running:
                if queue.work.starving() and queue.ring is not None:
                    more |= queue.ring.want_kicks()
        except FrontendError as error:
            self._fault = error  # the next `drain` tells
            return True
        return more

    def reconnect(self) -> None:
        """Ask the carrier anew what each enabled queue carries."""
        for queue in self._running:
            if queue.ring is None:
                continue
            before = queue.control
            kept = self._kept(queue)
            if "ledger" in kept or not before:
                queue.ring.keep(kept.get("ledger"), kept.get("stream"))
            if queue.enabled:
                queue.work = self._carrier.work(queue.index, queue.ring, queue.enabled)

    def _publish(self, queue: _Queue) -> None:
        if queue.ring is not None and queue.ring.publish():
            self._call(queue)

    def _call(self, queue: _Queue) -> None:
        if queue.call is not None:
            self._counters.calls += 1
            _notify(queue.call)
        elif queue.call_inband and (channel := self._inband()):
            self._counters.calls += 1
            channel.call(queue.index)
            self._after(channel)

    def _error(self, queue: _Queue) -> None:
        if queue.error is not None:
            _notify(queue.error)
        elif queue.error_inband and (channel := self._inband()):
            channel.error(queue.index)
            self._after(channel)

    def _break(self, queue: _Queue, error: GuestError) -> None:
        self._breaks += 1
        if self._breaks <= _LOGGED_BREAKS:
            self._log.error("queue %d is broken and stopped: %s", queue.index, error)
        self._counters.broken += 1
        self._publish(queue)  # what was completed before the mistake
        self._halt(queue)
        queue.broken = True
        self._error(queue)
        self._changed()

    def release(self) -> None:
        """Stop everything and give back all that came from the frontend, which is gone."""
        self._fault, self._dirty = None, None
        for queue in self._running:
            self._mark(queue)
        self.drain_all()  # what the guest wrote before it went is still in its memory
        for queue in self._running:
            if queue.ring is not None and queue.enabled:
                self._carrier.leaving(queue.index, queue.ring)
                queue.ring.publish()
        self._fault = None
        for queue in self._queues.values():
            self._stop(queue)
            _close(queue.call)
            _close(queue.error)
        self._queues.clear()
        self._regions, self._memory, self._keys = [], None, []
        self._features = 0
        self._protocol = ProtocolFeature(0)
        _close(self._dirty_event)
        self._dirty_event = self._dirty_area = None
        self._inflight = self._inflight_area = None
        self._close_channel()
        self._config_changed = False
        self._breaks = 0
        saved = self._transfer.saved
        self._transfer.stop()
        if saved:
            self._carrier.moved()

    # What a successor begins with

    def save(self) -> Saved:
        """Return what `resume` takes."""
        return Saved(
            features=self._features,
            protocol=self._protocol,
            regions=self._keys,
            queues=[self._save(queue) for queue in self._queues.values()],
            channel=None if self._backend_channel is None else self._channel_key,
            config_changed=self._config_changed,
            dirty=self._dirty_area,
            dirty_event=_key_of(self._dirty_event),
            inflight=self._inflight_area,
            saved=self._transfer.saved,
        )

    @staticmethod
    def _save(queue: _Queue) -> _SavedQueue:
        start, ring = queue.start, queue.ring
        runs = start is not None and ring is not None
        return _SavedQueue(
            index=queue.index,
            base=queue.base,
            enabled=queue.enabled,
            broken=queue.broken,
            kick=_key_of(queue.kick),
            call=_key_of(queue.call),
            call_inband=queue.call_inband,
            error=_key_of(queue.error),
            error_inband=queue.error_inband,
            start=(start.size, tuple(start.addr)) if runs and start is not None else None,
            tracked=queue.tracked,
            pushed=ring.pending() if queue.control and ring is not None else None,
        )

    def resume(self, saved: Saved, held: dict[int, int]) -> None:
        """Go on where a predecessor was; what is kept of the descriptors in `held` is taken out.

        Raises FrontendError when that cannot be: its frontend has taken away what it gave.
        """
        self._features = saved.features
        self._protocol = ProtocolFeature(saved.protocol)
        self._keys = saved.regions
        self._regions = [map_region(held[each.key], *each.region) for each in saved.regions]
        self._memory = GuestMemory(self._regions) if self._regions else None
        if saved.dirty is not None:
            self._dirty = DirtyLog(
                held[saved.dirty[-1]], *saved.dirty[:2], self._memory.end if self._memory else 0
            )
            self._dirty_area = saved.dirty
        if saved.inflight is not None:
            size, offset, count, entries, key = saved.inflight
            self._inflight = Inflight(held[key], size, offset, count, entries, self._features)
            self._inflight_area = saved.inflight

        def own(key: int | None) -> Held | None:
            return None if key is None else Held(held.pop(key), key)

        self._dirty_event = own(saved.dirty_event)
        self._config_changed = saved.config_changed
        self._transfer.saved = saved.saved
        for each in saved.queues:
            queue = self._queue(each.index)
            queue.base, queue.enabled, queue.broken = each.base, each.enabled, each.broken
            queue.call, queue.call_inband = own(each.call), each.call_inband
            queue.error, queue.error_inband = own(each.error), each.error_inband
            self._take_kick(queue, own(each.kick))
            if each.start is not None:
                self._go_on(queue, each)
        channel = own(saved.channel)
        if channel is not None:
            self._open_channel(channel)
        for queue in self._queues.values():
            if queue.ring is not None:
                self._call(queue)  # the one before may not have got to it
        if self._dirty is not None:
            _notify(self._dirty_event)
        self._poll()

    def _go_on(self, queue: _Queue, saved: _SavedQueue) -> None:
        """Have a ring where a predecessor's was; what that one completed is seen by the guest."""
        if saved.start is None:
            return
        size, addr = saved.start
        queue.start = fx.StartRing(
            queue.index, size, wire.VringAddr(*addr), queue.base, None, queue.enabled
        )
        queue.tracked = saved.tracked
        state = None
        if saved.tracked and self._inflight is not None:
            state = self._inflight.queue(queue.index)
        kept = self._kept(queue)
        if "ledger" in kept:
            kept["resume"] = kept["ledger"].pending()
        elif saved.pushed is not None:
            kept["resume"] = saved.pushed
        queue.ring = self._place(queue, size, queue.start.addr, queue.base, state, **kept)
        self._mark(queue)
        if queue.enabled:
            queue.work = self._carrier.work(queue.index, queue.ring, True)
        self._running.append(queue)

    # Messages of ours to the frontend

    def config_changed(self) -> None:
        """Tell the frontend, if it can be told, that the configuration space has changed."""
        self._config_changed = True
        self._tell_config()

    def _tell_config(self) -> None:
        channel = self._backend_channel
        # While all rings are stopped nothing is sent to the frontend ("Suspended device state").
        if not self._config_changed or channel is None or not self._running:
            return
        if ProtocolFeature.CONFIG in self._protocol:
            channel.config_changed()
            self._after(channel)
        self._config_changed = False

    def _inband(self) -> BackendChannel | None:
        if ProtocolFeature.INBAND_NOTIFICATIONS in self._protocol:
            return self._backend_channel
        return None

    def _after(self, channel: BackendChannel) -> None:
        """Wait for what the channel waits for, or give it up."""
        if channel.broken is not None:
            self._log.info("no more messages to the frontend: %s", channel.broken)
            self._close_channel()
        elif channel.blocked != self._channel_blocked:
            self._channel_blocked = channel.blocked
            self._poller.want(channel.fileno(), IN | OUT if channel.blocked else IN)

    def _open_channel(self, fd: Held) -> None:
        channel = BackendChannel(fd)

        def ready(events: int) -> None:
            channel.work()
            if events & HUP and channel.broken is None:  # reported for ever
                channel.broken = "it is broken"
            self._after(channel)

        try:
            self._poller.watch(fd, ready)
        except OSError as error:
            channel.close()
            raise RefusedError(f"the backend channel cannot be waited on: {error}") from None
        self._close_channel()
        self._backend_channel, self._channel_blocked = channel, False
        self._channel_key = fd.key
        self._tell_config()
        for queue in self._queues.values():  # what the one before did not get to
            if queue.ring is not None and queue.call is None:
                self._call(queue)
            if queue.broken and queue.error is None:
                self._error(queue)

    def _close_channel(self) -> None:
        channel, self._backend_channel = self._backend_channel, None
        if channel is not None:
            self._poller.forget(channel.fileno())
            channel.close()

    # The session's effects

    def apply(self, effect: fx.Effect) -> Any:
        """Carry out one effect. fds in it are the message's: what is kept is a duplicate.

        Raises RefusedError when it cannot be done, with everything as it was.
        """
        match effect:
            case fx.SetFeatures(features):
                self._set_features(features)
            case fx.SetProtocolFeatures(features):
                self._protocol = features
            case fx.MapMemory(regions, fds):
                self._use(
                    [map_region(fd, *region) for fd, region in zip(fds, regions, strict=True)],
                    [
                        _SavedRegion(tuple(region), _key(fd))
                        for fd, region in zip(fds, regions, strict=True)
                    ],
                )
            case fx.AddMemory(region, fd):
                if len(self._regions) == wire.MOST_SLOTS:
                    raise RefusedError(f"there are {wire.MOST_SLOTS} memory regions already")
                self._use(
                    [*self._regions, map_region(fd, *region)],
                    [*self._keys, _SavedRegion(tuple(region), _key(fd))],
                )
            case fx.RemoveMemory(region):
                self._remove(region)
            case fx.CheckSize(size):
                check_size(size, self._features)
            case fx.CheckRing(ring, size, addr, base):
                self._place(self._queue(ring), size, addr, base)
            case fx.StartRing():
                self._start(effect)
            case fx.KickRing(ring):
                self._counters.kicks += 1
                queue = self._queue(ring)
                if queue.ring is not None and not queue.enabled:
                    self._discard(queue, queue.ring)
                self.drain_all()
                self._changed()
            case fx.LogRing(ring, addr):
                queue = self._queue(ring)
                if queue.start is not None:
                    self._mark(queue, addr)
                    queue.start = queue.start._replace(addr=addr)
            case fx.SetLog(area, fd):
                self._set_log(DirtyLog(fd, *area, self._memory.end if self._memory else 0))
                self._dirty_area = (*area, _key(fd))
            case fx.SetLogEvent(fd):
                event = _dup(fd)
                _close(self._dirty_event)
                self._dirty_event = event
            case fx.EnableRing(ring, enabled):
                self._enable(self._queue(ring), enabled)
            case fx.StopRing(ring):
                return self._stop(self._queue(ring))
            case fx.SetCall(ring, fd):
                queue = self._queue(ring)
                kept = _keep(fd)
                _close(queue.call)
                queue.call, queue.call_inband = kept, False
                if queue.ring is not None:
                    _notify(queue.call)  # the one before may have swallowed a call
            case fx.SetError(ring, fd):
                queue = self._queue(ring)
                kept = _keep(fd)
                _close(queue.error)
                queue.error, queue.error_inband = kept, False
            case fx.SetBackendChannel(fd):
                self._open_channel(_dup(fd))
            case fx.MakeInflight(queues, size):
                try:
                    fd, total = inflight.create(queues, size, self._features)
                except OSError as error:
                    raise RefusedError(f"no room to keep what is in flight: {error}") from None
                return total, 0, fd
            case fx.SetInflight(area, fd):
                self._inflight = Inflight(fd, *area, self._features)
                self._inflight_area = (*area, _key(fd))
            case fx.AnyBroken():
                return any(queue.broken for queue in self._queues.values())
            case fx.ResetDevice():
                self._inflight = self._inflight_area = None
                self._carrier.reset()
            case fx.SaveState(fd):
                self._transfer.send(_dup(fd))
            case fx.LoadState(fd):
                self._transfer.receive(_dup(fd))
            case fx.CheckState():
                return self._transfer.check()
        return None

    def _queue(self, index: int) -> _Queue:
        queue = self._queues.get(index)
        if queue is None:
            queue = self._queues[index] = _Queue(index)
        return queue

    # The log of a migration

    def _logging(self) -> bool:
        return self._dirty is not None and bool(self._features & wire.LOG_ALL_BIT)

    def _set_features(self, features: int) -> None:
        """Go by these features. Raises RefusedError when the log would be too small."""
        before, log = self._features, self._dirty
        self._features = features
        if features & wire.LOG_ALL_BIT:
            try:
                self._set_log(log)
            except RefusedError:
                self._features = before
                raise
        else:
            if before & wire.LOG_ALL_BIT:
                self._dirty = self._dirty_area = None  # of a migration that is over
            for queue in self._running:
                self._mark(queue)

    def _set_log(self, log: DirtyLog | None) -> None:
        """Log into `log`, where logging is chosen. Raises RefusedError when it is too small."""
        before = self._dirty
        self._check_log(log, self._memory)
        self._dirty = log
        try:
            for queue in self._running:
                self._mark(queue)
        except RefusedError:
            self._dirty = before
            for queue in self._running:
                self._mark(queue)
            raise

    @staticmethod
    def _check_log(log: DirtyLog | None, memory: GuestMemory | None) -> None:
        if log is not None and memory is not None and not log.covers(0, memory.end):
            raise RefusedError("the dirty log is too small for the memory")

    def _mark(self, queue: _Queue, addr: wire.VringAddr | None = None) -> None:
        """Let a running ring mark what it writes where it shall, its own parts as `addr` says.

        Raises RefusedError when those are not in the log.
        """
        if queue.ring is None or queue.start is None:
            return
        addr = addr or queue.start.addr
        used = addr.log if addr.flags & wire.VRING_F_LOG else None
        queue.ring.log(self._dirty if self._logging() else None, used)

    # Memory

    def _remove(self, region: wire.Region) -> None:
        """Forget the region with these addresses and this size; "the mmap offset is ignored"."""
        end = region.guest_addr + region.size
        left = [
            (each, saved)
            for each, saved in zip(self._regions, self._keys, strict=True)
            if (each.guest, each.guest_end, each.user) != (region.guest_addr, end, region.user_addr)
        ]
        if len(left) == len(self._regions):
            raise RefusedError(f"there is no memory region {region}")
        self._use([each for each, _ in left], [saved for _, saved in left])

    def _use(self, regions: list[Region], keys: list[_SavedRegion]) -> None:
        """Go on with this memory; rings that are not in it any more are stopped."""
        memory = GuestMemory(regions) if regions else None
        if self._logging():
            self._check_log(self._dirty, memory)
        self.drain_all()  # under the old table, as the guest meant it
        self._regions, self._memory, self._keys = regions, memory, keys
        lost = []
        for queue in [*self._running]:
            start = queue.start
            if start is None:
                continue
            self._halt(queue)
            try:
                self._begin(queue, start._replace(enabled=queue.enabled, base=queue.base))
            except RefusedError:
                lost.append(queue.index)
        if lost:
            raise RefusedError(f"the new memory table has no place for running queues {lost}")

    def _place(
        self,
        queue: _Queue,
        size: int,
        addr: wire.VringAddr,
        base: int,
        state: SplitState | PackedState | None = None,
        **ledger: Any,
    ) -> Ring:
        if self._memory is None:
            raise RefusedError(f"queue {queue.index} has addresses but there is no memory table")
        writable, most_bytes = self._carrier.kind(queue.index)
        return place(
            self._memory,
            size,
            addr.desc,
            addr.avail,
            addr.used,
            features=self._features,
            base=base,
            writable=writable,
            most_bytes=most_bytes,
            inflight=state,
            **ledger,
        )

    def _kept(self, queue: _Queue) -> dict[str, Any]:
        """Return where a queue's ring keeps how far it is."""
        stream = self._carrier.stream(queue.index)
        queue.control = stream is None
        if stream is None:
            return {}
        return {"ledger": self._ledger.page(queue.index), "stream": stream}

    def _start(self, effect: fx.StartRing) -> None:
        queue = self._queue(effect.ring)
        begins = queue.ring is None and not queue.broken
        if begins:
            # Refused before anything is replaced.
            self._place(queue, effect.size, effect.addr, effect.base)
        self._watch_kick(queue, effect.kick)
        if begins:
            self._begin(queue, effect)
        self._poll()

    def _begin(self, queue: _Queue, start: fx.StartRing) -> None:
        ring = self._resume(queue, start)
        before = queue.start, queue.ring, queue.enabled
        queue.start, queue.ring, queue.enabled = start, ring, start.enabled
        try:
            self._mark(queue)
        except RefusedError:
            queue.start, queue.ring, queue.enabled = before
            raise
        self._carrier.started(queue.index, ring)
        if queue.enabled:
            ring.refuse_kicks()
            queue.work = self._carrier.work(queue.index, ring, True)
        self._running.append(queue)
        self._transfer.stop()
        self._tell_config()

    def _resume(self, queue: _Queue, start: fx.StartRing) -> Ring:
        """Return a ring that goes on, with what was in flight where the frontend kept that."""
        state = None if self._inflight is None else self._inflight.queue(queue.index)
        kept = self._kept(queue)
        queue.tracked = False
        if state is None:
            return self._place(queue, start.size, start.addr, start.base, **kept)
        try:
            ring = self._place(queue, start.size, start.addr, start.base, state, **kept)
            why, state.discarded = state.discarded, None
            queue.tracked = True
        except RefusedError as error:
            ring = self._place(queue, start.size, start.addr, start.base, **kept)
            why = str(error)
        if why is not None:
            self._log.warning(
                "queue %d goes on where it was, what was in flight is not known: %s",
                queue.index,
                why,
            )
        return ring

    def _enable(self, queue: _Queue, enabled: bool) -> None:
        ring = queue.ring
        if ring is None or enabled == queue.enabled:
            return
        if enabled:
            queue.enabled = True
            queue.work = self._carrier.work(queue.index, ring, True)
            return
        self.drain_all()  # what was there while it was enabled counts
        self._carrier.disabled(queue.index)
        queue.enabled = False
        queue.work = IDLE
        # Linux' UML disables a ring and gives its memory to somebody else: from here on it is only
        # touched when it is kicked, and kicks from before do not count.
        ring.want_kicks()
        if queue.kick is not None:
            drain_fd(queue.kick)

    def _discard(self, queue: _Queue, ring: Ring) -> None:
        """Serve a disabled queue that was kicked, without effect."""
        work = self._carrier.work(queue.index, ring, False)
        try:
            while work.wanted() and work.serve(0):
                self._publish(queue)
                self._changed()
            if work is not IDLE:
                ring.want_kicks()
        except GuestError as error:
            self._break(queue, error)
        except FrontendError as error:
            self._fault = error  # the next `drain` tells

    def probe(self, index: int) -> Ring:
        """Return another view of a running ring: what is popped there stays in the ring."""
        queue = self._queues[index]
        if queue.ring is None or queue.start is None:
            raise RefusedError(f"queue {index} does not run")
        return self._place(queue, queue.start.size, queue.start.addr, queue.ring.index)

    def _stop(self, queue: _Queue) -> int:
        self._halt(queue)
        queue.broken = False
        self._watch_kick(queue, None)
        return queue.base

    def _halt(self, queue: _Queue) -> None:
        """Take a ring out of service; its index is kept."""
        if queue.ring is None:
            return
        ring, queue.ring = queue.ring, None
        queue.base = ring.index
        queue.work = IDLE
        self._running.remove(queue)
        self._carrier.stopped(queue.index, ring)

    def _poll(self) -> None:
        """Have the loop look again soon, if there is a ring that nobody kicks."""
        if ProtocolFeature.INBAND_NOTIFICATIONS in self._protocol:
            return
        if any(queue.kick is None for queue in self._running):
            self._polling.start(_POLL_S)

    def _watch_kick(self, queue: _Queue, fd: int | None) -> None:
        self._take_kick(queue, _keep(fd))

    def _take_kick(self, queue: _Queue, kick: Held | None) -> None:
        if kick is not None:

            def kicked(events: int) -> None:
                self._counters.kicks += 1
                count = drain_fd(kick)
                if count == 0 or events & HUP:  # reported for ever
                    self._poller.forget(kick)
                if queue.ring is not None and not queue.enabled and count:
                    self._discard(queue, queue.ring)
                elif queue.ring is not None and queue.enabled:
                    try:
                        queue.ring.refuse_kicks()
                    except FrontendError as error:
                        self._fault = error  # the next `drain` tells

            try:
                self._poller.watch(kick, kicked)
            except OSError as error:
                os.close(kick)
                raise RefusedError(
                    f"queue {queue.index}: its kick fd cannot be waited on: {error}"
                ) from None
        if queue.kick is not None:
            self._poller.forget(queue.kick)
            os.close(queue.kick)
        queue.kick = kick
