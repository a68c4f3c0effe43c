"""Nothing is noticed of a service that hangs, is killed, reloaded or restarted."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from pid1 import own_cgroup
from scene import attach, boot, converse, exactly
from service import Service, StartService
from vhost_device_console.testing import ConsoleDriver

from launch import WITHIN


@pytest.fixture
def web(service: StartService) -> Service:
    """Give a service with one guest."""
    return service("web")


@contextmanager
def used(web: Service, index: int = 0) -> Iterator[tuple[ConsoleDriver, socket.socket]]:
    """Give a guest's console and a person at it, who have talked."""
    with boot(web, index) as console, attach(web, index) as peer:
        converse(console, peer)
        yield console, peer


def talk_during(console: ConsoleDriver, peer: socket.socket, act: Callable[[], object]) -> int:
    """Have lines go both ways while `act` goes on; return how many did, each once and in order."""
    count = 0
    with ThreadPoolExecutor(1) as other:
        doing = other.submit(act)
        while not doing.done():
            line = b"%09d\n" % count
            console.write(line)
            peer.sendall(line)
            assert exactly(peer, len(line)) == line
            assert console.read(len(line)) == line
            count += 1
        doing.result()
    converse(console, peer)
    return count


# What hangs or dies


def test_a_killed_worker_is_replaced_and_its_guest_goes_on(web: Service) -> None:
    with used(web) as (console, peer):
        (worker,) = web.workers()
        talk_during(console, peer, lambda: web.kill(worker))
        assert web.workers() != [worker]


#: Takes memory as one of the control group argv[1] until process argv[2] has ended.
EAT = """
import os, select, sys
with open(sys.argv[1] + "/cgroup.procs", "w") as group:
    group.write("0")
victim = os.pidfd_open(int(sys.argv[2]))
eaten = []
while not select.select([victim], [], [], 0)[0]:
    eaten.append(b"x" * (1 << 20))
"""


@contextmanager
def little_memory(web: Service, worker: int) -> Iterator[Path]:
    """Give a control group of 96 MiB that `worker` is in, and check that the kernel ended somebody.

    Where control groups of version 2 limit memory it is the service's own, else one of version 1.
    """
    limit = str(96 << 20)
    process = web.machine.outside(worker)
    if "memory" in (web.cgroup / "cgroup.controllers").read_text().split():
        (web.cgroup / "memory.max").write_text(limit)
        (web.cgroup / "memory.swap.max").write_text("0")
        yield web.cgroup
        assert re.search(r"^oom_kill [1-9]", (web.cgroup / "memory.events").read_text(), re.M)
        return
    own = own_cgroup("memory")
    assert own is not None, "no control group limits memory here"
    group = own / f"vhost-device-console-{process}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(limit)
        (group / "cgroup.procs").write_text(str(process))
        yield group
        assert re.search(r"^oom_kill [1-9]", (group / "memory.oom_control").read_text(), re.M)
    finally:
        for left in (group / "cgroup.procs").read_text().split():
            (own / "cgroup.procs").write_text(left)
        group.rmdir()


def test_a_worker_ended_for_want_of_memory_is_replaced_and_its_guest_goes_on(web: Service) -> None:
    with used(web) as (console, peer):
        master, (worker,) = web.pid, web.workers()
        with little_memory(web, worker) as group:
            process = str(web.machine.outside(worker))
            # It is the first to be ended, then who took its memory, if there still is too little.
            Path(f"/proc/{process}/oom_score_adj").write_text("1000")
            eat = [sys.executable, "-c", EAT, str(group), process]
            subprocess.run(eat, check=False, timeout=WITHIN)
        converse(console, peer)
        assert web.workers() != [worker]
    assert (web.pid, web.show("NRestarts"), web.show("Result")) == (master, "0", "success")


def test_the_kernel_would_end_a_worker_before_its_master(web: Service) -> None:
    def score(pid: int) -> int:
        return int(Path(web.machine.path(f"/proc/{pid}/oom_score_adj")).read_text())

    assert all(score(web.pid) < score(worker) for worker in web.workers())
