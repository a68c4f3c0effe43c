"""A worker killed at any store: what its successor makes of the ring, the journal and the ledger.

Each turn of a device is watched: whenever anything that outlives it has changed, all of that is
copied. Then a successor goes on from each copy, as one of a worker killed there would.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import select
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from killed import typed
from vhost_device_console import core, journal, ledger
from vhost_device_console.errors import GuestError, RefusedError
from vhost_device_console.journal import Input, Journal, Output
from vhost_device_console.ledger import MOST_PUSHES, Page, Pending
from vhost_device_console.testing import Chain, GuestMemory, make_driver
from vhost_device_console.worker.virtqueue import inflight, packed
from vhost_device_console.worker.virtqueue import memory as mapped
from vhost_device_console.worker.virtqueue.features import (
    EVENT_IDX,
    IN_ORDER,
    INDIRECT_DESC,
    RING_PACKED,
)
from vhost_device_console.worker.virtqueue.inflight import Inflight
from vhost_device_console.worker.virtqueue.log import DirtyLog
from vhost_device_console.worker.virtqueue.ring import Ring, place

PAGE = 4096
SIZE = 4096  # bytes of each of the journal's rings
NO_LIMIT = 1 << 62
BEGIN = (1 << 32) - 1000  # of the streams, soon to pass what a word of the ledger can say
LOG = 9 * PAGE
MOST = SIZE


class Kind(NamedTuple):
    """A format, and whether what is popped is kept in an inflight area."""

    format: int
    tracked: bool = False


IDS = {
    Kind(0): "split",
    Kind(RING_PACKED): "packed",
    Kind(0, True): "split in flight",
    Kind(RING_PACKED, True): "packed in flight",
}
KINDS = pytest.mark.parametrize("kind", IDS, ids=IDS.values())
FEATURES = pytest.mark.parametrize(
    "features", [0, EVENT_IDX | IN_ORDER], ids=["flags", "event index, in order"]
)
WAYS = pytest.mark.parametrize("way", ["direct", "pieces", "table", "mixed"])
BOTH = pytest.mark.parametrize("writable", [False, True], ids=["output", "input"])
STORES = pytest.mark.skipif(
    core() != "plain Python", reason="no store of a compiled ring can be watched"
)


class Memory(GuestMemory):
    """Guest memory that gives nothing back, so that one number says what is taken."""

    def __init__(self, size: int, align: int) -> None:
        super().__init__(size)
        self.align = align
        self.next = self.regions()[0][0].guest_addr

    def alloc(self, size: int, align: int = 16, *, region: int | None = None) -> int:
        assert region is None
        align = max(align, self.align)
        addr = -(-self.next // align) * align
        self.next = addr + size
        return addr

    def free(self, addr: int) -> None:
        pass


State = list[bytes]


class Scene:
    """A guest's ring, and all that outlives the worker which serves it.

    `offered` is every chain so far with its data, of which the guest has `reaped` so many back.
    """

    def __init__(
        self,
        ends: ExitStack,
        kind: Kind,
        features: int = 0,
        *,
        way: str = "direct",
        writable: bool = False,
        size: int = 4,
        largest: int = 300,
        logged: bool = False,
    ) -> None:
        self.kind, self.way, self.writable = kind, way, writable
        self.largest, self.together = largest, 2
        self.features = kind.format | features | INDIRECT_DESC
        self.rng = random.Random(7)
        room = 1 << 20 if logged else 1 << 18 if largest == SIZE else 1 << 16
        self.guest = ends.enter_context(Memory(room, PAGE if logged else 16))
        self.driver = make_driver(
            self.guest, size, self.features, start=None if kind.format else 0xFFFD
        )
        self.memory = mapped.GuestMemory(
            [mapped.map_region(fd, *region) for region, fd in self.guest.regions()]
        )
        self.journal_fd = journal.create("test", SIZE, SIZE)
        self.area_fd, self.area_size = inflight.create(1, size, self.features)
        self.log_fd = os.memfd_create("log")
        os.truncate(self.log_fd, LOG)
        self.logged = logged
        self.page = mmap.mmap(-1, PAGE)
        fds = [self.journal_fd, self.area_fd, self.log_fd]
        for fd in fds:
            ends.callback(os.close, fd)
        fds.append(self.guest.regions()[0][1])
        self.shared = [self.page, *(mmap.mmap(fd, 0) for fd in fds)]
        self.offered: list[tuple[Chain, bytes]] = []
        self.reaped = 0
        kept = Journal(self.journal_fd)
        self.stream: Output | Input = kept.input if writable else kept.output
        self.stream.begin_at(BEGIN)
        self.got = BEGIN  # the guest has the input up to there
        page = Page(memoryview(self.page))
        self.queue = self.place(None, ledger=page, stream=self.stream)

    # What outlives a worker, and what the guest knows

    def copy(self) -> State:
        return [each[:] for each in self.shared]

    def restore(self, state: State, known: dict[str, Any]) -> None:
        for memory, data in zip(self.shared, state, strict=True):
            memory[:] = data
        self.guest.next = known["next"]
        self.offered, self.reaped, self.got = [*known["offered"]], known["reaped"], known["got"]
        vars(self.driver).update({name: _copy(it) for name, it in known["driver"].items()})

    def known(self) -> dict[str, Any]:
        return {
            "next": self.guest.next,
            "offered": [*self.offered],
            "reaped": self.reaped,
            "got": self.got,
            "driver": {name: _copy(it) for name, it in vars(self.driver).items()},
        }

    def watch(self, action: Callable[[], object]) -> list[State]:
        """Return every state there is while `action` is done, from before until after it."""
        states = [self.copy()]

        def trace(*_: object) -> Any:
            now = self.copy()
            if now != states[-1]:
                states.append(now)
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            action()
        finally:
            sys.settrace(before)
        now = self.copy()
        return states if now == states[-1] else [*states, now]

    # The guest

    def offer(self) -> None:
        """Offer as much as there is room for."""
        while self.driver.free:
            pieces = 1 if self.way == "direct" else self.rng.randint(1, 3)
            table = self.way == "table" or (self.way == "mixed" and self.rng.random() < 0.4)
            if pieces > self.driver.free and not table:
                pieces = 1
            data = [self.rng.randbytes(self.rng.randint(1, self.largest)) for _ in range(pieces)]
            if self.writable:
                chain = self.driver.add((), map(len, data), indirect=table)
            else:
                chain = self.driver.add(data, indirect=table)
            self.offered.append((chain, b"".join(data)))
        self.driver.publish()

    def reap(self) -> None:
        """Take back what can be seen, which must be the next ones, and as they should be."""
        for used in self.driver.reap():
            chain, _ = self.offered[self.reaped]
            assert used.chain is chain
            self.reaped += 1
            if self.writable:
                assert used.data == typed(self.got, self.got + used.length)
                assert used.length > 0
                self.got += used.length
            else:
                assert used.length == 0

    def spoil(self, rng: random.Random) -> None:
        """Write anything anywhere into the ring, most of it where it matters."""
        for addr in (self.driver.desc_addr, self.driver.avail_addr, self.driver.used_addr):
            for _ in range(rng.randint(0, 6)):
                data = rng.choice([rng.randbytes(2), b"\xff\xff", b"\0\0", b"\x80\0"])
                self.guest.write(addr + 2 * rng.randint(0, 8), data)

    # The device

    def succeed(self, resume: Pending) -> tuple[Ring, Output | Input]:
        """Return what a successor makes of it."""
        kept, page = Journal(self.journal_fd), Page(memoryview(self.page))
        stream: Output | Input
        if self.writable:
            stream = kept.input
            stream.go_back(page.offset(kept.input.tail))
        else:
            stream = kept.output
            stream.go_back(page.offset(kept.output.head))
        return self.place(resume, ledger=page, stream=stream), stream

    def committed(self) -> Pending:
        return Page(memoryview(self.page)).pending()

    def place(self, resume: Pending | None, **options: Any) -> Ring:
        area = None
        if self.kind.tracked:
            area = Inflight(
                self.area_fd, self.area_size, 0, 1, self.driver.size, self.features
            ).queue(0)
        user = self.guest.user_addr
        ring = place(
            self.memory,
            self.driver.size,
            user(self.driver.desc_addr),
            user(self.driver.avail_addr),
            user(self.driver.used_addr),
            features=self.features,
            base=self.driver.base if resume is None else 0x1234_5678,
            writable=self.writable,
            most_bytes=MOST,
            inflight=area,
            resume=resume,
            **options,
        )
        assert area is None or area.discarded is None
        if self.logged:
            ring.log(DirtyLog(self.log_fd, LOG, 0, self.memory.end), self.driver.used_addr)
        return ring

    def serve(self, queue: Ring, stream: Output | Input, style: int) -> None:
        """Serve what there is, in one of several ways."""
        queue.refuse_kicks()
        if isinstance(stream, Output):
            self.take(queue, stream, style)
        else:
            self.give(queue, stream, style)
        queue.publish()
        queue.want_kicks()

    def take(self, queue: Ring, output: Output, style: int) -> None:
        match style:
            case 0:
                while queue.take(output, 64, NO_LIMIT, 0):
                    pass
            case 1:
                queue.take(output, 2, NO_LIMIT, 0)
                queue.take(output, 64, output.head + self.largest, 0)
            case _:
                self.move_all(queue, output.append)

    def give(self, queue: Ring, held: Input, style: int) -> None:
        """Give what waits, then in one style what never waited."""
        if style == 0:
            held.feed(typed(held.head, held.head + min(2 * self.largest, SIZE - len(held))))

        def fill(span: memoryview) -> int:
            done = 0
            while len(held) and done < len(span):
                count = min(len(held.span()), len(span) - done)
                span[done : done + count] = held.span()[:count]
                held.consume(count)
                done += count
            return done

        def read(span: memoryview) -> int:
            span[:] = typed(held.tail, held.tail + len(span))
            held.bypass(len(span))
            return len(span)

        self.move_all(queue, fill, lambda: len(held) > 0)
        if style == 1 and not len(held):
            self.move_all(queue, read)

    def move_all(
        self,
        queue: Ring,
        move: Callable[[memoryview], int | None],
        more: Callable[[], bool] = lambda: True,
    ) -> None:
        """Complete all there is, the first one after it was put back, and show some at a time."""
        if (first := queue.pop()) is not None:
            queue.unpop(first.head)
        count = 0
        while more() and (chain := queue.pop()) is not None:
            queue.push(chain.head, sum([move(span) or 0 for span in chain.spans]))
            count += 1
            if count % self.together == 0:
                queue.publish()

    # What is to be true

    def check(self, state: State, known: dict[str, Any], *, onward: bool, twice: bool) -> None:
        """Fail unless a successor of who was killed there goes on as if nothing had happened."""
        self.restore(state, known)
        self.reap()
        if onward:
            self.offer()
        resume = self.committed()
        if not twice:
            self.go_on(*self.succeed(resume))
            return
        known = self.known()
        for each in self.watch(lambda: self.succeed(resume)):
            self.restore(each, known)
            self.go_on(*self.succeed(self.committed()))

    def go_on(self, queue: Ring, stream: Output | Input) -> None:
        """Fail unless the guest has what was committed, and gets and gives all the rest."""
        self.reap()
        self.compare(stream)
        again = queue.pop()
        assert (again is None) == (self.reaped == len(self.offered))
        if again is not None:
            _, data = self.offered[self.reaped]
            assert again.size == len(data)
            assert self.writable or b"".join(again.spans) == data
            queue.unpop(again.head)
        for style in (0, 2, 1):
            self.serve(queue, stream, style)
            self.reap()
            self.compare(stream)
        self.serve(queue, stream, 2 if isinstance(stream, Output) else 1)
        self.reap()
        assert self.reaped == len(self.offered)
        if self.logged:
            self.find_marked()

    def compare(self, stream: Output | Input) -> None:
        if isinstance(stream, Input):
            assert stream.tail == self.got
            assert stream.copy() == typed(stream.tail, stream.head)
            return
        sent = b"".join(data for _, data in self.offered)
        head, tail = stream.head - BEGIN, stream.tail - BEGIN
        assert head == sum(len(data) for _, data in self.offered[: self.reaped])
        assert stream.copy(stream.tail) == sent[tail:head]
        assert 0 <= tail <= max(0, len(sent) - SIZE)

    def find_marked(self) -> None:
        """Fail unless every page that changed since the log was empty is marked there."""
        now = self.shared[-1][:]
        log = self.shared[-2][:]
        first = self.guest.regions()[0][0].guest_addr // PAGE
        events = self.driver.avail_addr // PAGE  # the guest's own
        for at in range(0, len(now), PAGE):
            page = first + at // PAGE
            if now[at : at + PAGE] != self.clean[at : at + PAGE] and page != events:
                assert log[page // 8] >> page % 8 & 1, f"page {page:#x} changed"

    def begin_log(self) -> None:
        self.clean = self.shared[-1][:]
        self.shared[-2][:] = bytes(LOG)


def _copy(it: Any) -> Any:
    return it.copy() if isinstance(it, list | dict) else it


MakeScene = Callable[..., Scene]


@pytest.fixture
def scene() -> Iterator[MakeScene]:
    with ExitStack() as ends:

        def make(*arguments: Any, **options: Any) -> Scene:
            made = Scene(ends, *arguments, **options)
            ends.callback(vars(made).clear)
            return made

        yield make


def sweep(it: Scene, turns: int, *, twice: bool = False) -> int:
    """Kill the device at each of its stores in so many turns; return how many those were."""
    deaths = 0
    for turn in range(turns):
        it.reap()
        it.offer()
        if it.logged:
            it.begin_log()
        known = it.known()
        states = it.watch(lambda style=turn % 3: it.serve(it.queue, it.stream, style))  # type: ignore[misc]
        after = it.copy()
        for state in states:
            for onward in (False,) if it.logged else (False, True):
                it.check(state, known, onward=onward, twice=twice)
            deaths += 1
        it.restore(after, known)
    it.reap()
    return deaths


# Killed


@STORES
@KINDS
@FEATURES
@WAYS
@BOTH
def test_nothing_is_lost_or_doubled_wherever_a_worker_dies(
    scene: MakeScene, kind: Kind, features: int, way: str, writable: bool
) -> None:
    """The ring's indices and laps, the journal's rings and the descriptors all wrap meanwhile."""
    it = scene(kind, features, way=way, writable=writable)
    assert sweep(it, 5) > 50
    assert it.stream.head > 1 << 32


@STORES
@KINDS
@BOTH
def test_a_successor_can_be_killed_too(scene: MakeScene, kind: Kind, writable: bool) -> None:
    it = scene(kind, EVENT_IDX, way="mixed", writable=writable)
    assert sweep(it, 3, twice=True) > 30


@STORES
@KINDS
def test_what_gave_way_for_nothing_is_never_shown(scene: MakeScene, kind: Kind) -> None:
    """A batch may be larger than the journal; whoever lags finds a gap, and no other bytes."""
    it = scene(kind, largest=SIZE, size=8)
    assert sweep(it, 4) > 50


@STORES
@BOTH
@pytest.mark.parametrize("tracked", [False, True], ids=["packed", "packed in flight"])
def test_a_batch_that_the_ledger_has_no_room_for_is_shown_in_parts(
    scene: MakeScene, tracked: bool, writable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "MOST_PUSHES", 3)
    it = scene(Kind(RING_PACKED, tracked), way="mixed", writable=writable, size=13)
    it.together = 10
    assert sweep(it, 4) > 50


@STORES
@KINDS
@BOTH
def test_the_dirty_log_has_what_the_dead_may_have_written(
    scene: MakeScene, kind: Kind, writable: bool
) -> None:
    it = scene(kind, EVENT_IDX, way="pieces", writable=writable, logged=True)
    assert sweep(it, 3) > 30


# Where the ledger ends


def test_more_pushes_than_a_page_keeps_are_shown_before(scene: MakeScene) -> None:
    it = scene(Kind(RING_PACKED), size=1024, largest=1)
    assert isinstance(it.stream, Output)
    it.offer()
    shown = 0
    for count in range(1024):
        assert shown == count // MOST_PUSHES * MOST_PUSHES
        chain = it.queue.pop()
        assert chain is not None
        it.stream.append(chain.spans[0])
        it.queue.push(chain.head, 0)
        shown += len(it.driver.reap())
    it.reaped = shown
    it.go_on(*it.succeed(it.committed()))


@pytest.mark.parametrize("kind", [Kind(0), Kind(RING_PACKED)], ids=["split", "packed"])
def test_a_position_outside_a_packed_ring_is_refused(scene: MakeScene, kind: Kind) -> None:
    it = scene(kind)
    it.page[:8] = (0x8004 << 16).to_bytes(8, "little")
    if kind.format:
        with pytest.raises(RefusedError, match="a packed ring of 4 entries cannot go on"):
            it.succeed(it.committed())
    else:
        assert it.succeed(it.committed())[0].index == 0x8004


def test_more_pushes_than_a_packed_ring_can_hold_are_refused(scene: MakeScene) -> None:
    it = scene(Kind(RING_PACKED))
    committed = it.committed()
    with pytest.raises(RefusedError, match="more was pushed than a ring of 4 entries can hold"):
        it.succeed(committed._replace(pushed=1, pushes=[(5 << 16, 0)]))


# Control queues: no ledger, but what is pending is told


@STORES
@KINDS
@FEATURES
@pytest.mark.parametrize("onward", [False, True], ids=["dead at once", "the guest goes on"])
def test_what_is_pending_is_shown_once_wherever_a_worker_dies(
    scene: MakeScene, kind: Kind, features: int, onward: bool
) -> None:
    """Nothing else is: what the worker did after it had told is done again."""
    it = scene(kind, features, way="mixed")
    queue = it.place(None)
    deaths = 0

    def go_on() -> None:
        queue.publish()
        if (chain := queue.pop()) is not None:
            queue.push(chain.head, 0)

    for turn in range(8):
        it.reap()
        it.offer()
        for _ in range(turn % 3):
            if (chain := queue.pop()) is not None:
                queue.push(chain.head, 0)
        told, known = queue.pending(), it.known()
        states = it.watch(go_on)
        for state in states:
            it.restore(state, known)
            it.reap()
            if onward:
                it.offer()
            successor = it.place(told)
            it.reap()
            assert it.reaped == known["reaped"] + told.pushed
            assert successor.pending().pushed == 0
            again = successor.pop()
            assert (again is None) == (it.reaped == len(it.offered))
            assert again is None or again.head & 0xFFFF == it.offered[it.reaped][0].head
            deaths += 1
        it.restore(states[-1], known)
    assert deaths > 10


# Killed while the guest goes on, and in the middle of whatever a compiled ring does


class Killed:
    """A ring whose workers are killed one after another, and the guest's side of it."""

    def __init__(self, ends: ExitStack, kind: Kind, writable: bool, deaths: int) -> None:
        features = kind.format | EVENT_IDX | INDIRECT_DESC
        guest = ends.enter_context(GuestMemory(1 << 20))
        self.driver = make_driver(guest, 32, features, start=None if kind.format else 0xFFF0)
        self.writable = writable
        self.rng = random.Random(3)
        region, memory = guest.regions()[0]
        area, area_size = inflight.create(1, self.driver.size, features)
        self.journal = journal.create("test", 1 << 16, SIZE)
        book = ledger.create("test")
        for fd in (area, self.journal, book):
            ends.callback(os.close, fd)
        ring = {
            "size": self.driver.size,
            "desc": guest.user_addr(self.driver.desc_addr),
            "avail": guest.user_addr(self.driver.avail_addr),
            "used": guest.user_addr(self.driver.used_addr),
            "features": features,
            "base": self.driver.base,
        }
        fds = {"memory": memory, "journal": self.journal, "ledger": book, "area": area}
        what = {"region": region, "fds": fds, "ring": ring, "writable": writable, "seed": 4}
        what |= {"area_size": area_size if kind.tracked else 0, "deaths": deaths}
        self.process = ends.enter_context(
            subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("killed.py")), json.dumps(what)],
                pass_fds=[*fds.values()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        )
        ends.callback(self.process.kill)
        self.offered: deque[tuple[Chain, bytes]] = deque()
        self.reaped = self.got = 0

    def offer(self) -> None:
        while self.driver.free >= 3:
            data = [
                self.rng.randbytes(self.rng.randint(1, 60))
                for _ in range(self.rng.choice([1, 1, 3]))
            ]
            table = self.rng.random() < 0.3
            if self.writable:
                chain = self.driver.add((), map(len, data), indirect=table)
            else:
                chain = self.driver.add(data, indirect=table)
            self.offered.append((chain, b"".join(data)))
        self.driver.publish()

    def reap(self) -> None:
        for used in self.driver.reap():
            chain, data = self.offered.popleft()
            assert used.chain is chain
            if self.writable:
                data = typed(self.got, self.got + used.length)
                assert used.data == data
            else:
                assert Journal(self.journal).output.copy(self.got)[: len(data)] == data
            self.got += len(data)
            self.reaped += 1

    def said(self) -> bytes:
        """Return what the workers or their master have said by now."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], 0)
        return self.process.stdout.readline() if ready else b""


@KINDS
@BOTH
def test_nothing_is_lost_or_doubled_by_workers_killed_at_random(kind: Kind, writable: bool) -> None:
    with ExitStack() as ends:
        it = Killed(ends, kind, writable, deaths=60)
        deadline = time.monotonic() + 90
        while not (said := it.said()):
            assert time.monotonic() < deadline
            it.offer()
            it.reap()
        assert said == b"enough\n"
        while it.driver.in_flight or it.reaped <= 60:
            assert time.monotonic() < deadline
            if it.reaped <= 60:  # who dies soon does little
                it.offer()
            it.reap()
        rest, _ = it.process.communicate(timeout=20)
        assert (rest, it.process.returncode) == (b"", 0)
        kept = Journal(it.journal)
        assert it.got == (kept.input.tail if writable else kept.output.head)


# A guest that writes what it likes into its ring


@STORES
@KINDS
@BOTH
def test_whatever_a_guest_does_to_its_ring_breaks_that_ring_at_most(
    scene: MakeScene, kind: Kind, writable: bool
) -> None:
    """Who goes on in such a ring finds an error of the guest's, or what may be a buffer."""
    it = scene(kind, EVENT_IDX, way="mixed", writable=writable)
    wrong = 0
    for turn in range(4):
        it.reap()
        it.offer()
        known = it.known()
        serve = partial(it.serve, it.queue, it.stream, turn % 3)
        states = it.watch(serve)
        for state in states[::3]:
            for seed in range(4):
                it.restore(state, known)
                it.spoil(random.Random(seed))
                for _ in range(2):  # who is killed leaves something to go on from
                    queue, stream = it.succeed(it.committed())
                    before = stream.head
                    try:
                        it.serve(queue, stream, 2)
                    except GuestError:
                        wrong += 1
                        queue.publish()
                    assert before <= stream.head <= before + 100 * MOST
        it.restore(states[-1], known)
    assert wrong > 10
