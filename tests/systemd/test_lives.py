"""Nothing is noticed of a service that hangs, is killed, reloaded or restarted."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from pid1 import Machine, own_cgroup
from scene import attach, boot, converse, exactly
from service import Service, StartService
from vhost_device_console.testing import ConsoleDriver

from launch import WITHIN, until

#: How often; the documented figures are those of 50 and 20.
RELOADS = int(os.environ.get("SYSTEMD_RELOADS", "3"))
RESTARTS = int(os.environ.get("SYSTEMD_RESTARTS", "3"))

#: Seconds within which systemd, or the master, takes for hung who says nothing.
PATIENCE = 2


@pytest.fixture
def web(service: StartService) -> Service:
    """Give a service with one guest."""
    return service("web")


@pytest.fixture
def watched(service: StartService) -> Service:
    """Give a service with two guests and a watchdog of little patience."""
    options = "OPTIONS=--backend=unix --socket-count=2"
    return service("web", options, f"WatchdogSec={PATIENCE}", guests=2)


@contextmanager
def used(web: Service, index: int = 0) -> Iterator[tuple[ConsoleDriver, socket.socket]]:
    """Give a guest's console and a person at it, who have talked."""
    with boot(web, index) as console, attach(web, index) as peer:
        converse(console, peer)
        yield console, peer


class Talk(NamedTuple):
    """How many lines went each way, each once and in order, and the longest wait for one."""

    lines: int
    longest_s: float


def talk_during(console: ConsoleDriver, peer: socket.socket, act: Callable[[], object]) -> Talk:
    """Have lines go both ways while `act` goes on."""
    lines, longest = 0, 0.0
    with ThreadPoolExecutor(1) as other:
        doing = other.submit(act)
        while not doing.done():
            line = b"%01000d\n" % lines
            begun = time.monotonic()
            console.write(line)
            peer.sendall(line)
            assert exactly(peer, len(line)) == line
            assert console.read(len(line)) == line
            longest = max(longest, time.monotonic() - begun)
            lines += 1
        doing.result()
    converse(console, peer)
    return Talk(lines, longest)


def report(what: str, talks: Sequence[Talk]) -> None:
    """Print what docs/promises.md tells."""
    lines, longest = sum(talk.lines for talk in talks), max(talk.longest_s for talk in talks)
    print(f"{len(talks)} {what}: {lines} lines of 1 kB each way, the longest wait {longest:.2f} s")


# What hangs or dies


def test_a_worker_that_hangs_is_replaced_and_its_guest_goes_on(watched: Service) -> None:
    with used(watched) as (console, peer):
        master, (worker, _) = watched.pid, watched.workers()
        watched.kill(worker, "STOP")
        watched.until(lambda guests: guests[0]["worker"] not in (None, worker), "never replaced")
        converse(console, peer)
    assert (watched.pid, watched.show("NRestarts")) == (master, "0")


def test_a_worker_that_hangs_holds_up_no_other_guest(watched: Service) -> None:
    with used(watched) as (console, peer), used(watched, 1) as (other, friend):
        hung, well = watched.workers()
        watched.kill(hung, "STOP")

        def replaced() -> None:
            watched.until(lambda guests: guests[0]["worker"] not in (None, hung), "never replaced")

        assert talk_during(other, friend, replaced).lines
        assert watched.workers()[1] == well
        converse(console, peer)


def test_a_master_that_hangs_is_replaced_and_the_guests_go_on(watched: Service) -> None:
    with used(watched) as (console, peer):
        master = watched.pid
        watched.kill(master, "STOP")
        watched.machine.wait(watched.name, NRestarts="1", ActiveState="active")
        converse(console, peer)
        assert watched.pid != master
    assert "watchdog" in watched.log().lower()


def test_a_service_whose_workers_are_well_is_not_ended(watched: Service) -> None:
    """Its master says so in time: what it says last is never older than systemd's patience."""
    with used(watched) as (console, peer):
        first = int(watched.show("WatchdogTimestampMonotonic"))
        until(
            lambda: int(watched.show("WatchdogTimestampMonotonic")) > first + 2_000_000 * PATIENCE,
            "systemd was told nothing",
        )
        converse(console, peer)
    assert watched.show("NRestarts") == "0"


def test_a_killed_worker_is_replaced_and_its_guest_goes_on(web: Service) -> None:
    with used(web) as (console, peer):
        (worker,) = web.workers()
        talk_during(console, peer, lambda: web.kill(worker))
        assert web.workers() != [worker]


def test_a_killed_master_is_replaced_and_the_guests_go_on(web: Service) -> None:
    with used(web) as (console, peer):
        for count in range(1, 4):

            def crash(count: int = count) -> None:
                web.kill(web.pid)
                web.machine.wait(web.name, NRestarts=str(count), ActiveState="active")

            talk_during(console, peer, crash)


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


# What operators do


@pytest.mark.timeout(60 + 30 * RELOADS)
def test_a_reload_keeps_the_master_and_is_noticed_by_nobody(web: Service) -> None:
    talks = []
    with used(web) as (console, peer):
        for _ in range(RELOADS):
            master, (worker,) = web.pid, web.workers()

            def reload(worker: int = worker) -> None:
                web.systemctl("reload")
                web.until(lambda guests: guests[0]["worker"] not in (None, worker), "not rolled")

            talks.append(talk_during(console, peer, reload))
            assert web.pid == master
    assert web.show("NRestarts") == "0"
    report("reloads", talks)


def toml(web: Service, guests: int) -> str:
    """Return the configuration of so many guests with unix endpoints."""
    return "".join(
        f"""
        [[guest]]
        socket = "{web.folder}/console.sock{index}"
        [[guest.port]]
        name = "console"
        console = true
        backend = "unix"
        path = "{web.folder}/console.sock{index}.data"
        """
        for index in range(guests)
    )


@pytest.fixture
def configured(machine: Machine) -> Iterator[Service]:
    """Give a service with a file of one guest."""
    file = "/etc/vhost-device-console/web.toml"
    with Service(machine, "web", f"GUESTS=--config={file}\nOPTIONS=\n", guests=2) as web:
        machine.write(file, toml(web, 1))
        web.systemctl("start")
        yield web
    os.unlink(machine.path(file))


def test_a_reload_brings_a_guest_more_while_the_others_go_on(configured: Service) -> None:
    web = configured
    with used(web) as (console, peer):
        web.machine.write("/etc/vhost-device-console/web.toml", toml(web, 2))
        talk_during(console, peer, lambda: web.systemctl("reload"))
        web.until(lambda guests: len(guests) == 2, "no second guest")
        with used(web, 1):
            converse(console, peer)


def test_a_reload_of_a_configuration_that_makes_no_sense_changes_nothing(
    configured: Service,
) -> None:
    web = configured
    with used(web) as (console, peer):
        before = web.pid, web.workers()
        web.machine.write("/etc/vhost-device-console/web.toml", "[[guest]]\n")
        web.systemctl("reload", "--no-block")
        until(lambda: "nothing is reloaded" in web.log(), "nothing was said")
        assert (web.pid, web.workers()) == before
        converse(console, peer)
    assert web.show("ActiveState") == "active"


@pytest.mark.timeout(60 + 30 * RESTARTS)
def test_a_restart_is_noticed_by_nobody(web: Service) -> None:
    talks = []
    with used(web) as (console, peer):
        for _ in range(RESTARTS):
            master = web.pid
            web.systemctl("reset-failed")  # or ten in a minute are too many
            talks.append(talk_during(console, peer, lambda: web.systemctl("restart")))
            assert web.pid not in (0, master)
    report("restarts", talks)


def test_a_restart_of_one_instance_leaves_the_other_alone(service: StartService) -> None:
    web, mail = service("web"), service("mail")
    with used(web) as (console, peer), used(mail) as (other, friend):
        workers = mail.workers()
        assert talk_during(other, friend, lambda: web.systemctl("restart")).lines
        assert mail.workers() == workers
        converse(console, peer)


def test_a_stop_hangs_up_on_frontends_and_people(web: Service) -> None:
    with used(web) as (console, peer):
        web.systemctl("stop")
        assert peer.recv(1) == b""
        assert console.frontend.socket.recv(1) == b""
    assert web.show("NFileDescriptorStore") == "0"


def test_after_a_stop_nothing_of_before_is_left(web: Service) -> None:
    with used(web) as (console, peer):
        console.write(b"of before\n")
        assert exactly(peer, 10) == b"of before\n"
        web.systemctl("stop")
    web.systemctl("start")
    with attach(web) as peer, boot(web) as console:
        console.write(b"of now\n")
        assert exactly(peer, 7) == b"of now\n"


def test_a_store_that_is_too_small_costs_connections_and_no_more(service: StartService) -> None:
    web = service("web", "", "FileDescriptorStoreMax=10")
    with used(web) as (_, peer):
        web.systemctl("restart")
        assert peer.recv(1) == b""
        assert "what systemd kept cannot be gone on with" in web.log()
    with used(web):
        pass
    assert web.show("NRestarts") == "0"
