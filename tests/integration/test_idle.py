"""A daemon with nothing to do does nothing."""

from __future__ import annotations

import os
import select
import socket
from contextlib import ExitStack

import pytest
from scene import attach, boot, converse
from vhost_device_console.testing import connect_like_qemu, connect_like_uml

from conftest import StartDaemon

#: Wake-ups that are no fault: a report of the last work that comes due, a collector of the system.
_FEW = 4


def work(pid: int) -> tuple[int, int]:
    """Return how often a process went to sleep, and its processor time in clock ticks."""
    with open(f"/proc/{pid}/status") as lines:
        sleeps = next(int(line.split()[1]) for line in lines if line.startswith("voluntary"))
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rpartition(") ")[2].split()
    return sleeps, int(fields[11]) + int(fields[12])


@pytest.mark.parametrize("backend", ["unix", "network", "pty"])
def test_idle_daemon_sleeps(daemon: StartDaemon, backend: str) -> None:
    """With guests connected and clients attached that say nothing, no process of it wakes."""
    running = daemon(backend, 2)
    with ExitStack() as stack:
        for guest, connect in enumerate((connect_like_qemu, connect_like_uml)):
            console = stack.enter_context(boot(running, guest, connect))
            if backend == "pty":
                name = running.status()[guest]["ports"][0]["endpoint"]
                slave = os.open(name, os.O_RDWR | os.O_NOCTTY)
                stack.callback(os.close, slave)
                console.write(b"x")
                assert os.read(slave, 1) == b"x"
            else:
                converse(console, stack.enter_context(attach(running, guest)))
        processes = [running.pid, *running.workers()]
        silent, other = (stack.enter_context(end) for end in socket.socketpair())
        assert other
        # What the last work left to do, a report a quarter of a second later, is done by then.
        assert not select.select([silent], [], [], 0.6)[0]
        before = [work(pid) for pid in processes]
        assert not select.select([silent], [], [], 2)[0]
        for (sleeps, ticks), pid in zip(before, processes, strict=True):
            now_sleeps, now_ticks = work(pid)
            assert now_sleeps - sleeps <= _FEW
            assert now_ticks - ticks <= 1
