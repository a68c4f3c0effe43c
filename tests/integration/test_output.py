"""The guest's output: whole, in order, and never held up by those who read it."""

from __future__ import annotations

import hashlib
import socket
import time
from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest
from scene import (
    MARKER,
    Pair,
    assert_same,
    attach,
    boot,
    call,
    exactly,
    noise,
    nothing_to_read,
    numbered,
    port_of,
    reset,
    unread,
    wait_port,
)
from vhost_device_console.testing import (
    DRIVER_FEATURES,
    Buffer,
    ConsoleDriver,
    Feature,
    Frontend,
    Queue,
    stop_like_qemu,
)

from conftest import StartDaemon
from launch import WITHIN, receive_until, until

MIB = 1 << 20

BACKENDS = pytest.mark.parametrize("backend", ["unix", "network"])


class Hasher(Thread):
    """Reads `count` bytes of `peer` as fast as it can, and keeps their hash alone."""

    def __init__(self, peer: socket.socket, count: int) -> None:
        super().__init__(daemon=True)
        self._peer = peer
        self._left = count
        self._hash = hashlib.sha256()
        self.start()

    def run(self) -> None:
        room = bytearray(MIB)
        while self._left and (count := self._peer.recv_into(room)):
            self._hash.update(memoryview(room)[:count])
            self._left -= count

    def result(self) -> str:
        self.join(WITHIN)
        assert not self.is_alive(), "the reader never got it all"
        assert self._left == 0, f"{self._left} bytes never came"
        return self._hash.hexdigest()


# Nobody is there


def test_kept_until_somebody_comes(daemon: StartDaemon) -> None:
    """What was written while nobody watched is given to the first reader, first byte first."""
    running = daemon()
    with boot(running) as console:
        for line in range(100):
            console.write(b"line %d\n" % line)
        with attach(running) as peer:
            assert receive_until(peer, b"line 99\n") == b"".join(
                b"line %d\n" % line for line in range(100)
            )
            console.write(b"live\n")
            assert exactly(peer, 5) == b"live\n"


def test_kept_after_the_guest_is_gone(daemon: StartDaemon) -> None:
    """What a guest wrote before it went is there for whoever comes later."""
    running = daemon("unix")
    with boot(running) as console:
        console.write(b"last words")
    with attach(running) as peer:
        assert exactly(peer, 10) == b"last words"


def test_all_of_a_full_journal_is_kept(daemon: StartDaemon) -> None:
    """Exactly 1 MiB is kept without loss."""
    running = daemon()
    data = numbered(MIB)
    with boot(running) as console:
        console.write(data, depth=16)
        with attach(running) as peer:
            assert_same(exactly(peer, MIB), data)
    assert port_of(running)["missed"] == 0


@BACKENDS
def test_more_than_a_journal_is_marked(daemon: StartDaemon, backend: str) -> None:
    """Of more than 1 MiB the last 1 MiB comes, after a line that says how much does not."""
    running = daemon(backend)
    lost = 3 * MIB + 40
    data = numbered(MIB + lost)
    with boot(running) as console:
        console.write(data, depth=16)
        with attach(running) as peer:
            marker = b"\r\n[vhost-device-console: %d bytes missed]\r\n" % lost
            assert exactly(peer, len(marker)) == marker
            assert_same(exactly(peer, MIB), data[lost:])
            wait_port(running, missed=lost, output=MIB + lost, stalls=0)


# Readers come and go


@BACKENDS
def test_next_reader_gets_the_rest(daemon: StartDaemon, backend: str) -> None:
    """One reads and leaves, the guest writes, the next gets exactly what the first did not."""
    running = daemon(backend)
    with boot(running) as console:
        console.write(b"for the first")
        with attach(running) as first:
            assert exactly(first, 13) == b"for the first"
            console.write(b", still")
            assert exactly(first, 7) == b", still"
        wait_port(running, readers=0)
        console.write(b"for the second")
        with attach(running) as second:
            assert exactly(second, 14) == b"for the second"
            console.write(b", live")
            assert exactly(second, 6) == b", live"


def test_in_flight_at_a_reset_comes_again(daemon: StartDaemon) -> None:
    """What a client that is reset has not acknowledged is given to the next, with no gap."""
    running = daemon()
    data = numbered(MIB)
    with boot(running) as console:
        console.write(data, depth=16)
        first = attach(running, receive_buffer=4096)
        start = exactly(first, 800)
        until(lambda: unread(first) > 0, "nothing more came")
        acknowledged = 800 + unread(first)
        reset(first)
        wait_port(running, readers=0)
        assert start == data[:800]
        with attach(running) as second:
            end = receive_until(second, data[-8:])
    assert_same(end, data[len(data) - len(end) :])
    again = len(data) - len(end)
    assert 0 <= again <= acknowledged


def test_watchers_see_the_same(daemon: StartDaemon) -> None:
    """Two watchers get the same live bytes."""
    running = daemon()
    data = noise(2 * MIB)
    with boot(running) as console, attach(running) as one, attach(running, readers=2) as two:
        readers = [Hasher(peer, len(data)) for peer in (one, two)]
        console.write(data, depth=16)
        wanted = hashlib.sha256(data).hexdigest()
        assert [reader.result() for reader in readers] == [wanted] * 2


def test_late_watcher_joins_live(daemon: StartDaemon) -> None:
    """Who comes while another watches sees what is written from then on."""
    running = daemon()
    with boot(running) as console, attach(running) as first:
        console.write(b"before")
        assert exactly(first, 6) == b"before"
        with attach(running, readers=2) as second:
            console.write(b"after")
            assert exactly(second, 5) == b"after"


# Fast


@BACKENDS
@pytest.mark.parametrize(
    ("count", "chunk", "how"),
    [
        (MIB // 4, 16, {}),
        (MIB // 4, 16, {"indirect": True}),
        (16 * MIB, 4096, {}),
        (32 * MIB, 32768, {}),
        (8 * MIB, 32768, {"indirect": True}),
        (16 * MIB, 1 << 18, {}),
    ],
    ids=["16 bytes", "16 indirect", "4 KiB", "32 KiB", "32 KiB indirect", "256 KiB"],
)
def test_fast_reader_loses_nothing(
    daemon: StartDaemon, backend: str, count: int, chunk: int, how: dict[str, Any]
) -> None:
    """However fast the guest writes, a client that reads as fast as it can gets every byte."""
    running = daemon(backend)
    data = noise(count)
    with boot(running) as console, attach(running) as peer:
        reader = Hasher(peer, count)
        console.write(data, chunk=chunk, depth=8, **how)
        assert reader.result() == hashlib.sha256(data).hexdigest()
        wait_port(running, output=count, missed=0)


@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
def test_chains_of_many_pieces(daemon: StartDaemon, indirect: bool) -> None:
    """The pieces of a chain come in their order, be they of any size."""
    running = daemon()
    data = noise(4 * MIB)
    sizes = (1, 3000, 0, 7, 16384, 60, 5)
    with boot(running) as console, attach(running) as peer:
        reader = Hasher(peer, len(data))
        at = 0
        while at < len(data):
            parts = []
            for size in sizes:
                parts.append(data[at : at + size])
                at += size
            console.wait_until(lambda: console.port.in_flight < 6, "room")
            console.port.submit(*parts, indirect=indirect)
        console.port.flush()
        assert reader.result() == hashlib.sha256(data).hexdigest()


# Readers that do not read


def test_stuck_reader_delays_the_guest_once(daemon: StartDaemon) -> None:
    """A reader that stops reading costs one stall limit; another one that reads gets all."""
    running = daemon()
    data = noise(8 * MIB)
    with boot(running) as console, attach(running, receive_buffer=4096) as stuck:
        with attach(running, readers=2) as peer:
            reader = Hasher(peer, len(data))
            began = time.monotonic()
            console.write(data, depth=8, timeout=WITHIN)
            took = time.monotonic() - began
            assert reader.result() == hashlib.sha256(data).hexdigest()
        port = wait_port(running, stalls=1, readers=1)
        assert port["output"] == len(data)
        # Without a limit it would never end; with one for each MiB it took 1.4 s and seven stalls.
        assert 0.2 <= took < 15
        # What it does read, late: the start, a marked gap, the end; then it is live again.
        seen = receive_until(stuck, data[-8:])
        match = MARKER.search(seen)
        assert match
        before, lost, after = seen[: match.start()], int(match[1]), seen[match.end() :]
        assert_same(before, data[: len(before)])
        assert_same(after, data[len(data) - len(after) :])
        assert len(before) + lost + len(after) == len(data)
        assert wait_port(running, missed=lost)["stalls"] == 1
        console.write(b"live")
        assert exactly(stuck, 4) == b"live"


def test_stuck_reader_alone_delays_the_guest_once(daemon: StartDaemon) -> None:
    """With nobody else there, too, the guest waits once and goes on."""
    running = daemon("unix")
    data = noise(4 * MIB)
    with boot(running) as console, attach(running) as stuck:
        console.write(data, depth=8, timeout=WITHIN)
        wait_port(running, stalls=1, output=len(data))
        seen = receive_until(stuck, data[-8:])
        match = MARKER.search(seen)
        assert match
        assert match.start() + int(match[1]) + len(seen) - match.end() == len(data)


def test_reader_that_catches_up_counts_again(daemon: StartDaemon) -> None:
    """Who was stuck and has read all is waited for again: it loses nothing as long as it reads."""
    running = daemon("unix")
    data = noise(4 * MIB)
    with boot(running) as console, attach(running) as peer:
        console.write(data, depth=8)
        match = MARKER.search(receive_until(peer, data[-8:]))
        assert match
        reader = Hasher(peer, len(data))
        console.write(data, depth=8)
        assert reader.result() == hashlib.sha256(data).hexdigest()
        wait_port(running, stalls=1, missed=int(match[1]), output=2 * len(data))


def test_stuck_reader_that_leaves_holds_nothing(daemon: StartDaemon) -> None:
    """A guest that waits for a reader goes on at once when that reader leaves."""
    running = daemon("unix")
    with boot(running) as console:
        with attach(running):
            console.write(bytes(2 * MIB), depth=8)
        wait_port(running, readers=0)
        console.write(bytes(2 * MIB), depth=8)
        wait_port(running, output=4 * MIB, stalls=1)


# What the guest is told


def test_output_used_length_is_zero(daemon: StartDaemon) -> None:
    """The device wrote nothing into output buffers, and says so."""
    running = daemon("unix")
    with boot(running) as console:
        console.write(bytes(100_000), chunk=1000, depth=7)
        assert set(console.port.output_lengths) == {0}
        assert len(console.port.output_lengths) == 100


def batch(console: ConsoleDriver, count: int) -> Queue:
    """Offer `count` buffers at once, wait until they are used, and forget no call."""
    tx = console.port.tx
    tx.take_calls()
    for _ in range(count):
        tx.driver.add([b"."])
    tx.notify()
    goal = tx.driver.avail_idx
    until(lambda: tx.driver.used_idx == goal, "the batch never came back")
    console.frontend.barrier()  # a call is made before the next message is looked at
    return tx


@pytest.mark.parametrize("offset", [0, 31], ids=["for the first", "for the last"])
def test_one_call_for_a_batch(daemon: StartDaemon, offset: int) -> None:
    """With EVENT_IDX a batch is one call, when the event asked for is passed."""
    running = daemon("unix")
    with boot(running) as console:
        console.port.tx.driver.set_used_event(console.port.tx.driver.used_idx + offset)
        assert batch(console, 32).take_calls() == 1


@pytest.mark.parametrize("features", [DRIVER_FEATURES, DRIVER_FEATURES & ~Feature.EVENT_IDX])
def test_no_call_when_suppressed(daemon: StartDaemon, features: int) -> None:
    """A guest that wants no call gets none."""
    running = daemon("unix")
    with boot(running, features=features) as console:
        console.port.tx.driver.disable_calls()
        assert batch(console, 32).take_calls() == 0


def test_call_without_event_idx(daemon: StartDaemon) -> None:
    """Without EVENT_IDX and with the flag clear, the guest is always called."""
    running = daemon("unix")
    with boot(running, features=DRIVER_FEATURES & ~Feature.EVENT_IDX) as console:
        for _ in range(3):
            assert batch(console, 8).take_calls() >= 1
            console.port.tx.driver.reap()


def test_input_is_called_for(daemon: StartDaemon) -> None:
    """A guest that sleeps is woken by what is typed."""
    running = daemon("unix")
    with boot(running) as console, call(running) as peer:
        console.pump()
        assert not console.arm()
        peer.sendall(b"k")
        assert console.sleep(time.monotonic() + WITHIN)
        assert console.read(1) == b"k"


def test_reader_gets_nothing_that_is_not_there(daemon: StartDaemon) -> None:
    """Empty buffers come back and show nothing."""
    running = daemon("unix")
    with boot(running) as console, attach(running) as peer:
        tx = console.port.tx
        for _ in range(100):
            tx.driver.add_buffers([Buffer(0, 0, False)])
            tx.notify()
            console.port.flush()
        assert nothing_to_read(peer)
        console.write(b"x")
        assert exactly(peer, 1) == b"x"


# The guest's last words


@pytest.mark.parametrize("stop", [Frontend.close, stop_like_qemu], ids=["killed", "stopped"])
def test_what_is_held_when_the_guest_goes_is_not_lost_silently(
    pair: Pair, stop: Callable[[Frontend], object]
) -> None:
    """Output that waits in the ring for a slow reader arrives; what gives way for it is marked."""
    with boot(pair.daemon) as console, attach(pair.daemon) as peer:
        data = numbered(3 << 20)
        sent = 0
        while console.port.in_flight < 20:
            console.port.submit(data[sent : sent + 4096])
            sent += 4096
            console.pump()
        stop(console.frontend)
        end = data[sent - 4096 : sent]
        got = bytearray()
        while not got.endswith(end):
            piece = peer.recv(1 << 20)
            assert piece
            got += piece
        gaps = [int(count) for count in MARKER.findall(got)]
        assert len(MARKER.sub(b"", bytes(got))) + sum(gaps) == sent
