"""Ports over a journal, and queues whose buffers the test gives."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from vhost_device_console.errors import GuestError
from vhost_device_console.journal import Input, Output
from vhost_device_console.worker.console.port import Port

SIZE = 4096


@dataclass
class Buffer:
    """A guest's buffer."""

    head: int
    size: int
    spans: list[memoryview]
    broken: bool = False


@dataclass
class Queue:
    """A virtqueue; `used` has (head, written) of what was completed."""

    given: deque[Buffer] = field(default_factory=deque)
    used: list[tuple[int, int]] = field(default_factory=list)
    popped: deque[Buffer] = field(default_factory=deque)
    heads: int = 0
    held: int = 0

    def write(self, *pieces: bytes) -> None:
        """Give one readable buffer in so many pieces."""
        self._give([memoryview(piece) for piece in pieces])

    def room(self, *sizes: int) -> list[memoryview]:
        """Give one writable buffer in pieces of those sizes; return them."""
        spans = [memoryview(bytearray(size)) for size in sizes]
        self._give(spans)
        return spans

    def mistake(self) -> None:
        """Let the next buffer be an error."""
        self.given.append(Buffer(0, 0, [], broken=True))

    def _give(self, spans: list[memoryview]) -> None:
        self.given.append(Buffer(self.heads, sum(map(len, spans)), spans))
        self.heads += 1

    def pop(self) -> Buffer | None:
        if not self.given:
            return None
        if self.given[0].broken:
            raise GuestError("a mistake")
        self.popped.append(self.given.popleft())
        return self.popped[-1]

    def unpop(self, head: int) -> None:
        self.given.appendleft(self.popped.pop())
        assert self.given[0].head == head

    def take(self, output: Output, most: int, limit: int, _linger_ns: int) -> int:
        self.held = 0
        taken = 0
        try:
            while taken < most and (chain := self.pop()) is not None:
                if output.head + chain.size > limit:
                    self.unpop(chain.head)
                    self.held = chain.size
                    break
                for span in chain.spans:
                    output.append(span)
                self.push(chain.head, 0)
                taken += 1
        finally:
            output.commit()
        return taken

    def push(self, head: int, written: int) -> None:
        assert head == self.popped.popleft().head
        self.used.append((head, written))


@pytest.fixture
def queue() -> Queue:
    return Queue()


@pytest.fixture
def ports() -> Callable[..., list[Port]]:
    """Give a function that makes ports of the given kinds: True for a console port."""

    def port(at: int, console: bool) -> Port:
        output, input_ = (memoryview(bytearray(SIZE)) for _ in range(2))
        words = memoryview(bytearray(64)).cast("Q")
        return Port(at, f"port{at}", Output(output, words), Input(input_, words), console=console)

    return lambda *kinds: [port(at, kind) for at, kind in enumerate(kinds)]


@pytest.fixture
def port(ports: Callable[..., list[Port]]) -> Port:
    return ports(True)[0]
