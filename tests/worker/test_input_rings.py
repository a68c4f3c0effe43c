"""Input straight into the buffers of real rings: both formats, kept in flight, and logged."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from vhost_device_console.journal import Input, Output
from vhost_device_console.testing import Buffer
from vhost_device_console.worker.console.port import Inlet, Port
from vhost_device_console.worker.virtqueue.features import RING_PACKED
from vhost_device_console.worker.virtqueue.inflight import Inflight, create
from vhost_device_console.worker.virtqueue.log import DirtyLog

sys.path.append(str(Path(__file__).parent / "virtqueue"))

from rings import MakeSides, Sides

SIZE = 8
PAGE = 4096


class Bench:
    """A port whose input goes into the ring of `sides`, and a pipe to type into."""

    def __init__(self, ends: ExitStack, sides: Sides) -> None:
        output, input_ = (memoryview(bytearray(PAGE)) for _ in range(2))
        words = memoryview(bytearray(64)).cast("Q")
        self.port = Port(0, "console0", Output(output, words), Input(input_, words), console=True)
        self.sides = sides
        self.port.inlet = Inlet(sides.queue, lambda: True, self.serve)
        self._reads, self.writes = os.pipe2(os.O_NONBLOCK)
        ends.callback(os.close, self._reads)
        ends.callback(os.close, self.writes)

    def serve(self, move: Callable[[], int]) -> None:
        move()
        self.sides.queue.publish()

    def read(self, into: list[memoryview]) -> int | None:
        try:
            return os.readv(self._reads, into)
        except BlockingIOError:
            return None

    def run(self, data: bytes) -> bytes:
        """Type `data` in pieces into buffers of all sizes; return what the guest got."""
        got = b""
        at = 0
        for turn in range(4000):
            if at < len(data):
                at += os.write(self.writes, data[at : at + 1 + turn * 37 % 300])
            while self.sides.driver.free > 1:
                self.sides.driver.add([], [1 + turn * 31 % 90])
            self.sides.driver.publish()
            if len(self.port.input) < PAGE:
                self.port.receive(self.read)
            if turn % 3 == 0 and self.port.give_input(self.sides.queue, SIZE):
                self.sides.queue.publish()
            got += b"".join(used.data for used in self.sides.driver.reap())
            if len(got) == len(data):
                return got
        return got


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    with ExitStack() as ends:

        def make(features: int, **options: Any) -> Bench:
            return Bench(ends, MakeSides(ends)(features, size=SIZE, writable=True, **options))

        yield make


FORMATS = pytest.mark.parametrize("format_", [0, RING_PACKED], ids=["split", "packed"])
TYPED = bytes(at * 7 % 253 for at in range(20_000))


@FORMATS
def test_every_byte_arrives_in_order(bench: Callable[..., Bench], format_: int) -> None:
    assert bench(format_).run(TYPED) == TYPED


@FORMATS
def test_what_was_put_back_is_not_in_flight(bench: Callable[..., Bench], format_: int) -> None:
    fd, size = create(1, SIZE, format_)
    state = Inflight(fd, size, 0, 1, SIZE, format_).queue(0)
    made = bench(format_, inflight=state)
    assert made.run(TYPED) == TYPED
    again = Inflight(fd, size, 0, 1, SIZE, format_).queue(0)
    os.close(fd)
    successor = made.sides.serve(made.sides.queue.index, inflight=again)
    assert made.sides.driver.in_flight > 0
    popped = 0
    while successor.pop() is not None:
        popped += 1
    assert popped == made.sides.driver.in_flight


@FORMATS
def test_the_log_has_every_page_that_was_filled_and_no_other(
    bench: Callable[..., Bench], format_: int
) -> None:
    made = bench(format_)
    end = made.sides.memory.end
    size = end // (8 * PAGE) + 1
    fd = os.memfd_create("log")
    os.ftruncate(fd, size)
    made.sides.queue.log(DirtyLog(fd, size, 0, end), None)
    first = -(-made.sides.guest.alloc(SIZE * PAGE + PAGE) // PAGE)  # a page for each buffer
    for at in range(SIZE):
        made.sides.driver.add_buffers([Buffer((first + at) * PAGE, 16, True)])
    made.sides.driver.publish()
    for count in (16, 20):  # one buffer is filled, then two of four that the next read has
        os.write(made.writes, bytes(count))
        made.port.receive(made.read)
    marked = os.pread(fd, size, 0)
    os.close(fd)
    pages = {8 * at + bit for at, byte in enumerate(marked) for bit in range(8) if byte >> bit & 1}
    assert pages == {first, first + 1, first + 2}
