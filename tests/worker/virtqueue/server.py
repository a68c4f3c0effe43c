"""A process that serves one ring and sleeps whenever it may: started with what it needs as JSON."""

from __future__ import annotations

import json
import os
import select
import sys

from vhost_device_console.worker.virtqueue.memory import GuestMemory, map_region
from vhost_device_console.worker.virtqueue.ring import place


def main(kick: int, call: int, region: list[int], fd: int, ring: dict[str, int]) -> None:
    memory = GuestMemory([map_region(fd, *region)])
    queue = place(memory, **ring, writable=False, most_bytes=1 << 16)
    while True:
        queue.refuse_kicks()
        while (chain := queue.pop()) is not None:
            if chain.size == 1:
                return
            queue.push(chain.head, 0)
            if queue.publish():
                os.write(call, (1).to_bytes(8, "little"))
        if not queue.want_kicks():
            select.select([kick], [], [])
            os.read(kick, 8)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
