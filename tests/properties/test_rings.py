"""Both ring formats in every mode, under a driver and a server that do at random what they may.

The model is one list of every buffer ever offered, and how many of them were published, popped,
pushed, used, and asked about or reaped: each is a first part of the one before. All bytes of all
buffers, and those between them, are compared after each step, and every page that changed is looked
up in the dirty log while there is one. Now and then the server is killed at any line, and another
goes on. VDC_EXAMPLES=n tries more: see `budget`.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import pytest
from arena import PAGE, Arena
from budget import Machine, run
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule
from vhost_device_console.journal import Input, Output
from vhost_device_console.ledger import Page, Pending
from vhost_device_console.testing import Buffer, Chain, PackedDriver, RingDriver, SplitDriver
from vhost_device_console.testing.packed import FRESH
from vhost_device_console.testing.split import DESC_F_INDIRECT, DESC_F_WRITE
from vhost_device_console.worker.virtqueue import chain as device
from vhost_device_console.worker.virtqueue.features import (
    EVENT_IDX,
    IN_ORDER,
    INDIRECT_DESC,
    RING_PACKED,
)
from vhost_device_console.worker.virtqueue.inflight import (
    Inflight,
    PackedState,
    SplitState,
    create,
)
from vhost_device_console.worker.virtqueue.log import DirtyLog
from vhost_device_console.worker.virtqueue.memory import GuestMemory, map_region
from vhost_device_console.worker.virtqueue.ring import Ring, place

MOST = 1 << 15
BITS = [[bit for bit in range(8) if byte >> bit & 1] for byte in range(256)]
SPLIT_SIZES = [1, 2, 4, 8, 16, 64, 256]
PACKED_SIZES = [1, 2, 3, 4, 5, 7, 8, 13, 64, 255]
LAP = st.integers(0, 1)
PIECES = [1, 0, 2, 15, 16, 100, PAGE - 1, PAGE, 5000]
SOME = st.integers(0, 30)
SEED = st.integers(0, 1 << 16)
SHOW = ["notify", "publish", "hide"]
SERVED = ["publish", "hide"]
SHARES = [100, 99, 50, 1, 0]
LOGGED = ["everything", "buffers", "nothing"]
TAKE = ["go on", "sleep", "refuse calls"]
TURNS = [
    *["offer", "serve", "move", "take"] * 3,
    *["kick", "want kicks", "refuse kicks", "ask early"],
]
ROOM = [0, 1, 16, 200, 1 << 14, 1 << 20]  # in the journal, when buffers are moved there
LINGER = [0, 0, 100, 2_000]  # nanoseconds; nobody comes meanwhile


class Offered(NamedTuple):
    """A buffer: what the driver wrote to it or, once it was pushed, the device."""

    chain: Chain
    size: int
    data: bytearray


class Rings(Machine):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features
        self.event_idx = bool(features & EVENT_IDX)
        self.packed = bool(features & RING_PACKED)
        self.guest = Arena()
        self.memory = GuestMemory(
            [map_region(fd, *region) for region, fd in self.guest.regions()],
        )
        self.ring, self.words = bytearray(1 << 16), bytearray(64)
        self.page = bytearray(PAGE)
        self.renew_streams()
        self.log: DirtyLog | None = None
        self.log_fd: int | None = None
        self.log_own = False
        self.area: SplitState | PackedState | None = None
        self.area_fd: int | None = None
        self.begun_at = 0

    @initialize(
        data=st.data(), writable=st.booleans(), tracked=st.booleans(), turns=SOME, seed=SEED
    )
    def begin(
        self, data: st.DataObject, writable: bool, tracked: bool, turns: int, seed: int
    ) -> None:
        self.writable = writable
        size = data.draw(st.sampled_from(PACKED_SIZES if self.packed else SPLIT_SIZES))
        if self.packed:
            places = st.builds(lambda at, lap: at | lap << 15, st.integers(0, size - 1), LAP)
            start = data.draw(st.just(FRESH) | places)
        else:
            start = data.draw(st.just(0) | st.integers(0xFFF0, 0xFFFF))
        self.driver = self.make_driver(size, start, data.draw(st.integers(0, 4)))
        if tracked:
            self.area_fd, self.area_size = create(2, size, self.features)
            self.map_area()
        self.forget()
        self.serve_at(self.driver.base)
        self.traffic(turns, seed)

    def forget(self) -> None:
        """Begin as a ring that is new."""
        self.offered: list[Offered] = []
        self.published = self.popped = self.pushed = self.used = self.asked = self.reaped = 0
        self.told = 0  # so far the driver may have said that it wants no call
        self.fetched = 0  # as popped, but with a predecessor's that were left in flight
        self.notified = 0
        self.begun_at = self.driver.base
        self.streamed = [self.stream]  # where the stream was before each, and after the last pushed
        self.ends = [0]  # how many descriptors, or in a split ring buffers, there were before each
        # The kick that the device has asked for: any, none, or the one for this entry.
        self.kick_at: int | bool = 0 if self.event_idx and not self.packed else True
        # The call that the driver has asked for, likewise.
        self.call_at: int | bool = 0 if self.event_idx else True
        self.calls = True  # an event index moves on with what was taken, unless calls are refused
        self.driver_sleeps = False

    def make_driver(self, size: int, start: int, before: int) -> RingDriver:
        """Return a driver whose areas have so many entries or words before a page's end."""
        end = self.guest.regions()[0][0].guest_addr
        kind: type[SplitDriver | PackedDriver] = PackedDriver if self.packed else SplitDriver
        driver = kind(
            self.guest,
            size,
            start=start,
            desc=end + 2 * PAGE - 16 * before,
            avail=end + 4 * PAGE - 4 * before,
            used=end + 6 * PAGE - 4 * before,
        )
        driver.set_features(self.features)
        return driver

    def map_area(self) -> None:
        assert self.area_fd is not None
        self.area = Inflight(
            self.area_fd, self.area_size, 0, 2, self.driver.size, self.features
        ).queue(1)

    def renew_streams(self) -> None:
        """Look anew at what outlives a server."""
        ring, words = memoryview(self.ring), memoryview(self.words).cast("Q")
        self.output, self.input = Output(ring, words), Input(ring, words)

    @property
    def stream(self) -> int:
        """How far the ring's stream is."""
        return self.input.tail if self.writable else self.output.head

    def serve_at(self, base: int) -> None:
        if self.writable:
            self.input.go_back(self.streamed[self.used])
        self.make_ring(base)
        self.begin_serving()

    def make_ring(self, base: int, resume: Pending | None = None) -> None:
        user = self.guest.user_addr
        self.queue: Ring = place(
            self.memory,
            self.driver.size,
            user(self.driver.desc_addr),
            user(self.driver.avail_addr),
            user(self.driver.used_addr),
            features=self.features,
            base=base,
            writable=self.writable,
            most_bytes=MOST,
            inflight=self.area,
            ledger=Page(memoryview(self.page)),
            stream=self.input if self.writable else self.output,
            resume=resume,
        )
        self.set_log()
        assert self.area is None or self.area.discarded is None

    def begin_serving(self) -> None:
        self.taken: dict[int, device.Chain] = {}
        self.popped = self.pushed = self.used
        del self.streamed[self.used + 1 :]
        self.device_sleeps = False
        self.owed: set[int] = set()  # pages with used elements that were not published

    def close(self) -> None:
        self.guest.close()
        vars(self).pop("queue", None)  # a failure's traceback keeps the machine, not its memory
        vars(self).pop("taken", None)
        del self.memory, self.area, self.log
        for fd in (self.log_fd, self.area_fd):
            if fd is not None:
                os.close(fd)

    # The driver

    @rule(count=st.integers(1, 6), pieces=st.integers(1, 5), seed=SEED, then=st.sampled_from(SHOW))
    def offer(self, count: int, pieces: int, seed: int, then: str) -> None:
        """Offer some buffers of about so many pieces, then show them, or kick as well."""
        rng = random.Random(seed)
        for _ in range(count):
            ways = ["direct", "indirect", "mixed"] if self.features & INDIRECT_DESC else ["direct"]
            sizes = [rng.choice(PIECES) for _ in range(rng.randint(1, pieces) if seed else pieces)]
            self.offer_one(sizes, rng.choice(ways), rng)
        if then != "hide":
            self.driver.publish()
            self.published = len(self.offered)
        if then == "notify":
            self.kick()

    def offer_one(self, sizes: list[int], way: str, rng: random.Random) -> None:
        if not self.driver.free:
            return
        direct = {"direct": len(sizes), "indirect": 0, "mixed": min(2, len(sizes) - 1)}[way]
        direct = min(direct, self.driver.free - (way != "direct"))
        if way == "direct":
            sizes = sizes[:direct]
        data = b"" if self.writable else rng.randbytes(sum(sizes))
        buffers: list[Buffer] = []
        try:
            for before, size in zip(accumulate(sizes, initial=0), sizes, strict=False):
                buffers.append(Buffer(self.guest.alloc(max(size, 1)), size, self.writable))
                self.guest.write(buffers[-1].addr, data[before : before + size])
            chain = self.add(buffers, direct, way, rng)
        except MemoryError:
            for buffer in buffers:
                self.guest.free(buffer.addr)
            return
        note(f"buffer {len(self.offered)}: {way}, pieces of {sizes}, head {chain.head}")
        chain.owned += tuple(buffer.addr for buffer in buffers)
        self.offered.append(Offered(chain, sum(sizes), bytearray(data)))
        self.ends.append(self.ends[-1] + (len(chain.descriptors) if self.packed else 1))

    def add(self, buffers: list[Buffer], direct: int, way: str, rng: random.Random) -> Chain:
        driver = self.driver
        if not isinstance(driver, SplitDriver):
            return driver.add_buffers(buffers, indirect=way != "direct")
        # Only a split ring's descriptors can be any, and the last one of several indirect (2.7.5).
        table = []
        if way != "direct":
            table = [Buffer(self.table(buffers[direct:], rng), 16 * len(buffers[direct:]), False)]
        needed = direct + len(table)
        if self.features & IN_ORDER:  # 2.7.5: descriptors in ring order
            chain = driver.add_buffers([*buffers[:direct], *table])
        else:
            taken = {at for each in driver.pending.values() for at in each.descriptors}
            free = rng.sample(sorted(set(range(driver.size)) - taken), needed)
            chain = driver.add_buffers([*buffers[:direct], *table], descriptors=free)
        if table:
            addr, size, _ = table[0]
            flags = DESC_F_INDIRECT | rng.choice([0, DESC_F_WRITE])  # ignored here (2.7.5.3.2)
            driver.write_desc(chain.descriptors[-1], addr, size, flags)
            chain.buffers = tuple(buffers)
            chain.owned += (addr,)
        return chain

    def table(self, buffers: list[Buffer], rng: random.Random) -> int:
        """Write a table whose chain begins at its first entry and goes on anywhere."""
        places = [0, *rng.sample(range(1, len(buffers)), len(buffers) - 1)]
        entries = [b""] * len(buffers)
        for buffer, at, following in zip(buffers, places, [*places[1:], None], strict=True):
            flags = self.writable * DESC_F_WRITE | (following is not None)
            entries[at] = b"".join(
                number.to_bytes(count, "little")
                for number, count in (
                    (buffer.addr, 8),
                    (buffer.size, 4),
                    (flags, 2),
                    (following or 0, 2),
                )
            )
        addr = self.guest.alloc(16 * len(buffers))
        self.guest.write(addr, b"".join(entries))
        return addr

    @rule()
    def kick(self) -> None:
        """Kick if that is wanted for what was published."""
        kicked = self.driver.kick_needed()
        old, new = self.ends[self.notified], self.ends[self.published]
        self.check_notified(kicked, self.kick_at, old, new)
        assert kicked or not (self.device_sleeps and self.popped < self.published), "a lost kick"
        self.notified = self.published
        if kicked:
            self.device_sleeps = False

    def check_notified(self, done: bool, at: int | bool, old: int, new: int) -> None:
        """Fail unless moving from `old` to `new` notified as was asked."""
        if isinstance(at, bool):
            assert done == (at and old != new)
        elif new - at <= (self.driver.size if self.packed else 0xFFFF):
            assert done == (old <= at < new)
        # Any further away an entry cannot be told from the one a lap, or two, later.

    @rule(then=st.sampled_from(TAKE))
    def take(self, then: str) -> None:
        """Take what was used, which must be what the model says."""
        done = self.driver.reap()
        assert len(done) == self.used - self.reaped
        for used, offered in zip(done, self.offered[self.reaped : self.used], strict=True):
            assert used.chain is offered.chain
            written = bytes(offered.data) if self.writable else b""
            assert (used.length, used.data) == (len(written), written)
        self.reaped = self.used
        if done and self.event_idx and self.calls:
            self.call_at = self.ends[self.reaped]
        if then == "sleep":
            assert not self.driver.enable_calls()
            self.calls = True
            self.call_at = self.ends[self.reaped] if self.event_idx else True
            self.driver_sleeps = True
        elif then == "refuse calls":
            self.driver.disable_calls()
            # Where there is no word for that, by naming the one entry that it took last.
            by_entry = self.event_idx and not self.packed
            self.call_at = self.ends[self.reaped] - 1 if by_entry else False
            self.calls = self.driver_sleeps = False

    @rule()
    def ask_early(self) -> None:
        """Ask for calls without having taken what is there: then there may be none for that."""
        more = self.driver.enable_calls()
        self.calls = True
        assert more == (self.reaped < self.used)
        self.call_at = self.ends[self.reaped] if self.event_idx else True
        self.driver_sleeps = not more

    # The device

    @contextmanager
    def writes(self) -> Iterator[set[int]]:
        """Give the set of the pages that the device changes meanwhile, if those of rings count."""
        pages: set[int] = set()
        before = self.guest.pages() if self.log_own else {}
        yield pages
        if before:
            after = self.guest.pages()
            pages |= {page for page in after if after[page] != before[page]}

    def marked(self, pages: set[int]) -> None:
        """Fail unless the log, if any, has these pages."""
        if self.log:
            missing = pages - self.dirty()
            assert not missing, f"pages {sorted(map(hex, missing))} are not marked"

    def dirty(self) -> set[int]:
        assert self.log_fd is not None
        bits = os.pread(self.log_fd, PAGE, self.log_at)
        return {8 * at + bit for at, byte in enumerate(bits) if byte for bit in BITS[byte]}

    @rule(
        count=st.integers(1, 20),
        back=st.integers(0, 4),
        keep=st.integers(0, 2),
        share=st.sampled_from(SHARES),
        then=st.sampled_from(SERVED),
    )
    def serve(self, count: int, back: int, keep: int, share: int, then: str) -> None:
        """Pop up to `count` buffers, put so many `back`, complete all but `keep` popped ones.

        Each is filled to that `share` of its room.
        """
        before, again = self.popped, self.fetched
        while self.popped < before + count and self.pop():
            pass
        while back and self.popped > before:
            back -= 1
            self.popped -= 1
            self.queue.unpop(self.taken.pop(self.popped).head)
            self.fetched = max(again, self.popped)
        for at in range(self.pushed, max(self.pushed, self.popped - keep)):
            self.push(at, share)
        if then == "publish":
            self.publish_used()

    def pop(self) -> bool:
        chain = self.queue.pop()
        assert (chain is None) == (self.popped == self.published)
        if chain is None:
            return False
        self.compare(chain)
        self.taken[self.popped] = chain
        self.popped += 1
        self.fetched = max(self.fetched, self.popped)
        self.device_sleeps = False
        return True

    def compare(self, chain: device.Chain) -> None:
        offered = self.offered[self.popped]
        assert chain.size == offered.size == sum(map(len, chain.spans))
        if not self.writable:
            assert b"".join(chain.spans) == offered.data

    def push(self, at: int, share: int) -> None:
        chain, offered = self.taken.pop(at), self.offered[at]
        pages: set[int] = set()
        if self.writable:
            pages = self.fill(
                chain, offered, random.Random(at).randbytes(offered.size * share // 100)
            )
            self.input.bypass(len(offered.data))
        self.streamed.append(self.stream)
        with self.writes() as unseen:
            self.queue.push(chain.head, len(offered.data) if self.writable else 0)
        self.owed |= unseen
        self.pushed += 1
        self.marked(pages)

    def fill(self, chain: device.Chain, offered: Offered, data: bytes) -> set[int]:
        """Write `data` where `chain` says, and return the pages where it should then be."""
        pages: set[int] = set()
        rest = data
        for span in chain.spans:
            span[: len(rest)] = rest[: len(span)]
            rest = rest[len(span) :]
        offered.data[:] = data
        for buffer in offered.chain.buffers:
            self.guest.expect(buffer.addr, data[: buffer.size])
            pages |= {(buffer.addr + at) // PAGE for at in range(len(data[: buffer.size]))}
            data = data[buffer.size :]
        return pages

    def publish_used(self) -> None:
        """Let the driver see what was pushed, and call it if it wants that."""
        with self.writes() as pages:
            called = self.queue.publish()
        old, new = self.ends[self.asked], self.ends[self.pushed]
        self.check_notified(called, self.call_at, old if called else max(old, self.told), new)
        self.used = self.asked = self.pushed
        if called:
            self.driver_sleeps = False
        self.marked(self.owed | pages)
        self.owed.clear()

    @precondition(lambda self: not self.writable and self.popped == self.pushed)
    @rule(most=st.integers(1, 40), room=st.sampled_from(ROOM), linger=st.sampled_from(LINGER))
    def move(self, most: int, room: int, linger: int) -> None:
        """Move up to `most` buffers, of `room` bytes in all, into the journal; then mostly call."""
        output, began = self.output, self.output.head
        with self.writes() as pages:
            count = self.queue.take(output, most, began + room, linger)
        offered = self.offered[self.popped : self.published]
        data = b"".join(each.data for each in offered[:count])
        assert output.head - began == len(data) <= room
        kept = min(len(data), output.size)
        assert output.copy(output.head - kept) == data[len(data) - kept :]
        for each in offered[:count]:
            self.streamed.append(self.streamed[-1] + each.size)
        self.popped += count
        self.pushed = self.used = self.popped
        self.fetched = max(self.fetched, self.popped)
        if count:
            self.device_sleeps = False
        self.marked(self.owed | pages)
        self.owed.clear()
        first = self.first_to_call_for()
        if self.queue.held:
            assert self.queue.held == offered[count].size > room - len(data)
        elif count < min(most, len(offered)):
            assert first is not None, "it left buffers though nobody waits for a call"
        self.told = max(self.told, self.ends[self.used] if first is None else first)
        if most % 4:
            self.publish_used()

    def first_to_call_for(self) -> int | None:
        """Return the first entry in use for which the driver wants a call and had none, if any.

        It may have been asked about those before, and not be asked again.
        """
        old, new = self.ends[self.asked], self.ends[self.used]
        at = self.call_at
        if isinstance(at, bool):
            return old if at and old != new else None
        return at if old <= at < new else None

    @rule()
    def want_kicks(self) -> None:
        with self.writes() as pages:
            more = self.queue.want_kicks()
        assert more == (self.popped < self.published)
        front = self.fetched if self.area else self.popped
        self.kick_at = self.ends[front] if self.event_idx else True
        self.device_sleeps = not more
        self.marked(pages)

    @rule()
    def refuse_kicks(self) -> None:
        with self.writes() as pages:
            self.queue.refuse_kicks()
        if self.packed or not self.event_idx:
            self.kick_at = False
        self.device_sleeps = False
        self.marked(pages)

    # Both

    @rule(turns=SOME, seed=SEED)
    def traffic(self, turns: int, seed: int) -> None:
        """Let both sides do so many things in an order that `seed` says."""
        rng = random.Random(seed)
        for _ in range(turns):
            match rng.choice(TURNS):
                case "offer":
                    steps = rng.randint(1, 6), rng.randint(1, 5), rng.randrange(1 << 16)
                    self.offer(*steps, rng.choice(SHOW))
                case "serve":
                    count, keep, share = (
                        rng.randint(1, 20),
                        rng.choice([0, 0, 1, 2]),
                        rng.choice(SHARES),
                    )
                    self.serve(count, rng.choice([0] * 8 + [1, 3]), keep, share, rng.choice(SERVED))
                case "move" if not self.writable and self.popped == self.pushed:
                    self.move(rng.randint(1, 40), rng.choice(ROOM), rng.choice(LINGER))
                case "take":
                    self.take(rng.choice(TAKE))
                case "kick":
                    self.kick()
                case "want kicks":
                    self.want_kicks()
                case "refuse kicks":
                    self.refuse_kicks()
                case "ask early":
                    self.ask_early()

    def finish(self) -> None:
        """Serve all there is and take it back."""
        if not hasattr(self, "driver"):
            return
        for _ in range(2):
            self.driver.publish()
            self.published = len(self.offered)
            self.serve(len(self.offered), 0, 0, 100, "publish")
            self.take("go on")
        assert self.driver.in_flight == 0
        self.guest.check()

    # The session

    @rule(seed=SEED)
    def restart_at_the_first_entry(self, seed: int) -> None:
        """Restart where a packed ring's lap begins, be it the first one or any other."""
        self.finish()
        while self.driver.base & FRESH - 1 and self.packed:
            left = self.driver.size - (self.driver.base & FRESH - 1)
            self.offer_one([1] * min(left, 50), "direct", random.Random(0))
            self.finish()
        self.restart(False, 0, seed)

    @rule(crash=st.booleans(), turns=SOME, seed=SEED)
    def restart(self, crash: bool, turns: int, seed: int) -> None:
        """Stop the ring and start it where it was: what was not used is popped again.

        After a crash with an area for what is in flight, that says where; what the frontend says
        may be as old as the ring.
        """
        if self.asked < self.used:
            self.publish_used()
        index = self.queue.index
        if crash and self.area:
            self.map_area()
            self.serve_at(self.begun_at)
        else:
            self.serve_at(index)
        assert self.queue.index == index
        self.refuse_kicks()
        self.traffic(turns, seed)

    @precondition(lambda self: self.popped == self.pushed)
    @rule(line=st.integers(0, 400), turns=SOME, seed=SEED)
    def die(self, line: int, turns: int, seed: int) -> None:
        """Kill the server at that line of what it does, and let another one go on."""
        self.guest.check()
        base, clean = self.driver.base, self.guest.pages()
        moves: list[int | bytes] = []
        self.take_over(self.killed_at(line, lambda: self.serve_raw(random.Random(seed), moves)))
        self.make_ring(0, Page(memoryview(self.page)).pending())
        used = self.count_to(self.driver.base, self.used, base)
        assert self.used <= used <= self.pushed + len(moves)
        pages = self.owed.copy()
        for offered, move in zip(self.offered[self.pushed : used], moves, strict=False):
            size = move if isinstance(move, int) else len(move)
            self.streamed.append(self.streamed[-1] + size)
            if isinstance(move, bytes):
                offered.data[:] = move
                pages |= self.pages_of(offered)
        assert self.stream == self.streamed[used]
        if self.log_own:
            after, first = self.guest.pages(), self.driver.desc_addr // PAGE
            pages |= {page for page in after if after[page] != clean[page] and page >= first}
        self.marked(pages)
        self.used = self.asked = used
        self.told = max(self.told, self.ends[used])
        self.begin_serving()
        self.fetched = self.count_to(self.queue.index, used, self.driver.base)
        self.driver_sleeps = False  # since everyone is called
        for offered in self.offered[self.reaped :] if self.writable else ():
            for buffer in offered.chain.buffers:  # what is beyond what was written is not looked at
                self.guest.expect(buffer.addr, self.guest.read(buffer.addr, buffer.size))
        self.take("go on")
        self.refuse_kicks()
        self.traffic(turns, seed)

    def killed_at(self, line: int, action: Callable[[], None]) -> tuple[Any, ...]:
        """Return what outlives a server that is killed when it comes to that line, or its end."""
        left: list[tuple[Any, ...]] = []

        def trace(*_: object) -> Any:
            nonlocal line
            line -= 1
            if line == 0:
                left.append(self.left_behind())
            return trace if line > 0 else None

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            action()
        finally:
            sys.settrace(before)
        return left[0] if left else self.left_behind()

    def serve_raw(self, rng: random.Random, moves: list[int | bytes]) -> None:
        """Serve some, keeping only how far each moves the stream, or what is written to it."""
        for _ in range(rng.randint(1, 6)):
            step = rng.choice(["one", "take", "publish"])
            if step == "publish":
                self.queue.publish()
            elif step == "take" and not self.writable:
                before = len(moves)
                moves += [each.size for each in self.offered[self.pushed + before : self.published]]
                limit = self.output.head + rng.choice(ROOM)
                del moves[before + self.queue.take(self.output, rng.randint(1, 40), limit, 0) :]
            elif (chain := self.queue.pop()) is not None:
                share = rng.choice(SHARES) if self.writable else 0
                rest = data = rng.randbytes(chain.size * share // 100)
                for span in chain.spans if data else ():
                    span[: len(rest)] = rest[: len(span)]
                    rest = rest[len(span) :]
                moves.append(data if self.writable else 0)
                self.input.bypass(len(data))
                self.queue.push(chain.head, len(data))
        self.queue.publish()

    def left_behind(self) -> tuple[Any, ...]:
        area = log = b""
        if self.area_fd is not None:
            area = os.pread(self.area_fd, self.area_size, 0)
        if self.log_fd is not None:
            log = os.pread(self.log_fd, PAGE, self.log_at)
        kept = [bytes(each) for each in (self.ring, self.words, self.page)]
        return self.guest.pages(), kept, area, log

    def take_over(self, left: tuple[Any, ...]) -> None:
        """Have everything as that server left it, and the stream where it had committed it."""
        pages, kept, area, log = left
        self.guest.restore(pages)
        for each, data in zip((self.ring, self.words, self.page), kept, strict=True):
            each[:] = data
        if self.area_fd is not None:
            os.pwrite(self.area_fd, area, 0)
            self.map_area()
        if self.log_fd is not None:
            os.pwrite(self.log_fd, log, self.log_at)
        self.renew_streams()
        kept_in = Page(memoryview(self.page))
        if self.writable:
            self.input.go_back(kept_in.offset(self.input.tail))
        else:
            self.output.go_back(kept_in.offset(self.output.head))

    def count_to(self, place: int, count: int, before: int) -> int:
        """Return which buffer is at a place of the ring, when `count` is at the one `before`."""
        if not self.packed:
            return count + ((place - before) & 0xFFFF)
        laps = (place ^ before) >> 15 & 1
        passed = laps * self.driver.size + (place & FRESH - 1) - (before & FRESH - 1)
        return self.ends.index(self.ends[count] + passed)

    def pages_of(self, offered: Offered) -> set[int]:
        """Return the pages with what was written to a buffer."""
        left, pages = len(offered.data), set()
        for buffer in offered.chain.buffers:
            pages |= {(buffer.addr + at) // PAGE for at in range(min(buffer.size, left))}
            left -= min(buffer.size, left)
        return pages

    @rule(zero=st.booleans(), turns=SOME, seed=SEED)
    def reset(self, zero: bool, turns: int, seed: int) -> None:
        """Let the driver begin anew, and say so in this format's terms or, as Linux can, by 0."""
        self.driver.reset()
        self.forget()
        if self.area_fd is not None:
            os.pwrite(self.area_fd, bytes(self.area_size), 0)  # as QEMU does
        self.serve_at(0 if zero else self.driver.base)
        assert self.queue.fresh
        self.refuse_kicks()
        self.traffic(turns, seed)

    @precondition(lambda self: self.popped == self.pushed)
    @rule(what=st.sampled_from(LOGGED), offset=st.integers(0, 1), turns=SOME, seed=SEED)
    def log_to(self, what: str, offset: int, turns: int, seed: int) -> None:
        """Log into a new file from now on; the ring's own words only if they have an address."""
        self.log, self.log_own = None, what == "everything"
        self.owed.clear()
        if self.log_fd is not None:
            os.close(self.log_fd)
            self.log_fd = None
        if what != "nothing":
            self.log_fd, self.log_at = os.memfd_create("log"), offset * PAGE
            os.truncate(self.log_fd, self.log_at + PAGE)
            self.log = DirtyLog(self.log_fd, PAGE, self.log_at, self.memory.end)
        self.set_log()
        self.traffic(turns, seed)

    def set_log(self) -> None:
        self.queue.log(self.log, self.driver.used_addr if self.log_own else None)

    @precondition(lambda self: self.log)
    @rule(turns=SOME, seed=SEED)
    def sweep(self, turns: int, seed: int) -> None:
        """Copy the dirty pages, as a frontend does in each round of a migration."""
        assert self.log_fd is not None
        os.pwrite(self.log_fd, bytes(PAGE), self.log_at)
        self.traffic(turns, seed)

    # What always holds

    @invariant()
    def every_byte_is_where_it_should_be(self) -> None:
        self.guest.check()

    @invariant()
    def buffers_in_flight_are_counted(self) -> None:
        flight = self.offered[self.reaped :]
        assert [*self.driver.pending.values()] == [offered.chain for offered in flight]
        taken = sum(len(offered.chain.descriptors) for offered in flight)
        assert self.driver.free == self.driver.size - taken

    @invariant()
    def both_sides_agree_where_the_ring_is(self) -> None:
        assert self.queue.index == self.place()
        assert self.queue.ready() == (self.popped < self.published)
        assert self.driver.has_used() == (self.reaped < self.used)

    def place(self) -> int:
        """Return where the ring goes on; what is in flight comes before if an area has it."""
        base = self.driver.base
        if self.area is None:
            return base
        if not self.packed:
            return base + self.fetched - self.used & 0xFFFF
        at = (base & 0x7FFF) + self.ends[self.fetched] - self.ends[self.used]
        lap, size = base & FRESH, self.driver.size
        return base & ~0xFFFF | (at | lap if at < size else at - size | lap ^ FRESH)

    @invariant()
    def a_ring_that_was_used_is_not_new(self) -> None:
        """Both formats come to where they began; each admits when that cannot be told apart."""
        if self.used and self.queue.fresh:
            assert self.driver.base == (FRESH | FRESH << 16 if self.packed else 0)
            assert not self.packed or self.driver.free == 0

    @invariant()
    def nobody_sleeps_while_there_is_something(self) -> None:
        assert not (self.driver_sleeps and self.driver.has_used() and self.asked == self.used)


@pytest.mark.parametrize("in_order", [0, IN_ORDER], ids=["any order", "in order"])
@pytest.mark.parametrize("event_idx", [0, EVENT_IDX], ids=["flags", "event index"])
@pytest.mark.parametrize("indirect", [0, INDIRECT_DESC], ids=["direct", "indirect"])
@pytest.mark.parametrize("packed", [0, RING_PACKED], ids=["split", "packed"])
def test_every_byte_and_notification_is_accounted_for(
    packed: int, indirect: int, event_idx: int, in_order: int
) -> None:
    run(Rings, packed | indirect | event_idx | in_order, examples=24, steps=16)
