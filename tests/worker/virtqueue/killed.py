"""Serve a ring by one worker after another, each killed at some moment; what that is comes as JSON.

With as many deaths as were asked for it says so, and the next worker lives until the input ends.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import sys

from vhost_device_console.journal import Input, Journal, Output
from vhost_device_console.ledger import Ledger
from vhost_device_console.worker.virtqueue.inflight import Inflight
from vhost_device_console.worker.virtqueue.memory import GuestMemory, map_region
from vhost_device_console.worker.virtqueue.ring import Ring, place

_NO_LIMIT = 1 << 62
_LATEST_S = 0.003


def typed(start: int, end: int) -> bytes:
    """Return these bytes of an endless input in which no place looks like another nearby."""
    first, last = start // 4, -(-end // 4)
    return b"".join(at.to_bytes(4, "big") for at in range(first, last))[
        start - 4 * first : end - 4 * first
    ]


def take(ring: Ring, output: Output) -> bool:
    return ring.take(output, 64, _NO_LIMIT, 0) > 0


def give(ring: Ring, held: Input) -> bool:
    """Give what waits, and what never waited when there is nothing; then have more wait."""
    given = 0
    while given < 64 and (chain := ring.pop()) is not None:
        if len(held):
            data = bytes(held.span()[: chain.size])
            held.consume(len(data))
        else:
            data = typed(held.tail, held.tail + chain.size)
            held.bypass(len(data))
        at = 0
        for span in chain.spans:
            piece = data[at : at + len(span)]
            span[: len(piece)] = piece
            at += len(piece)
        ring.push(chain.head, len(data))
        given += 1
    ring.publish()
    if not len(held):
        held.feed(typed(held.head, held.head + 3000))
    return given > 0


def work(
    region: list[int],
    fds: dict[str, int],
    ring: dict[str, int],
    area_size: int,
    writable: bool,
    first: bool,
) -> None:
    parent = os.getppid()
    memory = GuestMemory([map_region(fds["memory"], *region)])
    kept, page = Journal(fds["journal"]), Ledger(fds["ledger"]).page(5)
    area = None
    if area_size:
        area = Inflight(fds["area"], area_size, 0, 1, ring["size"], ring["features"]).queue(0)
    stream: Output | Input
    if writable:
        stream = kept.input
        stream.go_back(page.offset(stream.tail))
    else:
        stream = kept.output
        stream.go_back(page.offset(stream.head))
    queue = place(
        memory,
        **ring,
        writable=writable,
        most_bytes=1 << 16,
        inflight=area,
        ledger=page,
        stream=stream,
        resume=None if first else page.pending(),
    )
    if area is not None and area.discarded is not None:
        sys.exit(area.discarded)
    while os.getppid() == parent:
        if not (give(queue, stream) if isinstance(stream, Input) else take(queue, stream)):
            os.sched_yield()


def begin(**what: object) -> int:
    child = os.fork()
    if not child:
        try:
            work(**what)  # type: ignore[arg-type]
        except BaseException as error:
            print(f"a worker failed: {error!r}", flush=True)
        os._exit(0)
    return child


def main(deaths: int, seed: int, **what: object) -> None:
    rng = random.Random(seed)
    worker = begin(**what, first=True)
    # The first one begins the ring; whoever comes later goes on.
    started = Ledger(what["fds"]["ledger"]).page(5)  # type: ignore[index]
    while not started.word[0]:
        os.sched_yield()
    for _ in range(deaths):
        select.select([sys.stdin], [], [], rng.random() * _LATEST_S)
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)
        worker = begin(**what, first=False)
    print("enough", flush=True)
    sys.stdin.read()
    os.kill(worker, signal.SIGKILL)
    os.waitpid(worker, 0)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
