"""The master: forks, listens, restarts, stops; its workers here are a few lines each."""

from __future__ import annotations

import fcntl
import json
import os
import re
import select
import signal
import socket
import stat
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from vhost_device_console import monitor
from vhost_device_console.config import PortTable, parse_port
from vhost_device_console.errors import ConsoleError

from launch import Daemon, Ports, until, wait_ended, wait_readable

StartDaemon = Callable[..., Daemon]

#: Workers by name. Each is `run`; `report` sends a health record, `stopped` waits for SIGTERM.
PRELUDE = """
import functools, json, os, signal, sys
from vhost_device_console import cli, master
from vhost_device_console.health import Health, PortHealth, encode

signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())

def report(heirlooms, **counters):
    port = PortHealth(id=0, name="console0", **counters)
    os.write(heirlooms.health, encode(Health(ports=[port])))

def stopped():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    signal.sigwait([signal.SIGTERM])
    return 0

"""

IDLE = """
def run(guest, heirlooms):
    report(heirlooms)
    return stopped()
"""


#: Have a daemon of root's not say that it is that.
AS_IT_IS = ("--user", "root") if os.geteuid() == 0 else ()


def program(run: str) -> list[str]:
    code = PRELUDE + run + "\nmaster.serve = functools.partial(master.serve, run=run)\ncli.main()\n"
    return [sys.executable, "-c", code]


@pytest.fixture
def start(daemon: StartDaemon) -> StartDaemon:
    """Give a function from a worker's source to a daemon that runs it."""

    def with_worker(
        run: str = IDLE, backend: str = "unix", count: int = 1, *options: str, **more: Any
    ) -> Daemon:
        return daemon(backend, count, *options, program=program(run), **more)

    return with_worker


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """Give both ends of a pseudo-terminal."""
    ours, theirs = os.openpty()
    yield ours, theirs
    os.close(ours)
    os.close(theirs)


# Forking


def test_there_is_a_worker_for_each_guest(start: StartDaemon) -> None:
    served = start(count=3)
    workers = served.workers()
    assert len(set(workers)) == 3
    assert {psutil.Process(pid).ppid() for pid in workers} == {served.pid}


def test_sockets_accept_once_it_is_ready(start: StartDaemon) -> None:
    for path in start(count=2).sockets:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)


FDS = """
def is_open(fd):
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True

def run(guest, heirlooms):
    mine = [fd for fd in range(4096) if is_open(fd)]
    with open(guest.socket_path + ".fds", "w") as file:
        json.dump([mine, [heirlooms.ledger, heirlooms.health, heirlooms.custody,
                          *(port.journal for port in heirlooms.ports)]], file)
    report(heirlooms)
    status = stopped()
    os.unlink(guest.socket_path + ".fds")
    return status
"""


def test_a_worker_has_stdio_and_what_it_inherits_and_nothing_else(start: StartDaemon) -> None:
    served = start(FDS, count=3)
    served.workers()
    for path in served.sockets:
        mine, inherited = json.loads(Path(path + ".fds").read_text())
        assert mine == sorted([0, 1, 2, *inherited])


def test_a_successor_inherits_as_little(start: StartDaemon) -> None:
    served = start(FDS, count=2)
    (first, _) = served.workers()
    os.kill(first, signal.SIGKILL)
    served.until(lambda g: g[0]["restarts"] == 1 and g[0]["state"] == "running", "no successor")
    mine, inherited = json.loads(Path(served.sockets[0] + ".fds").read_text())
    assert mine == sorted([0, 1, 2, *inherited])


SIGNALS = """
def run(guest, heirlooms):
    kept = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE)
    assert all(signal.getsignal(each) == signal.SIG_IGN for each in kept)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
    assert signal.set_wakeup_fd(-1) == -1
    report(heirlooms)
    return stopped()
"""


def test_a_worker_starts_with_signals_of_its_own(start: StartDaemon) -> None:
    served = start(SIGNALS)
    served.workers()
    assert served.status()[0]["restarts"] == 0


PIPE_END = """
import select
def run(guest, heirlooms):
    report(heirlooms)
    poll = select.poll()
    poll.register(heirlooms.health, 0)
    poll.poll()
    return 0
"""


def test_the_end_of_the_master_is_the_end_of_each_worker_s_pipe(start: StartDaemon) -> None:
    served = start(PIPE_END, count=3)
    workers = served.workers()
    served.signal(signal.SIGKILL)
    assert served.wait() == -signal.SIGKILL
    for pid in workers:
        wait_ended(pid)


JOURNAL = """
from vhost_device_console.journal import Journal
def run(guest, heirlooms):
    output = Journal(heirlooms.ports[0].journal).output
    output.append(b"x" * 100)
    output.commit()
    report(heirlooms, output=output.head)
    return stopped()
"""


def test_the_journal_outlives_a_worker(start: StartDaemon) -> None:
    served = start(JOURNAL)
    os.kill(served.workers()[0], signal.SIGKILL)
    # The second worker's offset went on from the first one's 100.
    served.until(lambda guests: guests[0]["ports"][0]["output"] == 200, "offsets did not go on")


# Death


@pytest.mark.parametrize(
    ("number", "cause"),
    [
        (signal.SIGKILL, "SIGKILL"),
        (signal.SIGSEGV, "SIGSEGV"),
        (signal.SIGBUS, r"SIGBUS \(the frontend shrank its memory\)"),
        (signal.SIGRTMIN + 3, "signal 37"),
    ],
)
def test_a_killed_worker_is_replaced_and_the_log_says_why(
    number: int, cause: str, start: StartDaemon
) -> None:
    served = start()
    (before,) = served.workers()
    os.kill(before, number)
    served.expect_log(f"c.sock0: its worker died: {cause}\n")
    (after,) = served.until(
        lambda guests: guests[0]["restarts"] == 1 and guests[0]["state"] == "running",
        "no successor",
    )
    assert after["worker"] not in (None, before)
    assert re.fullmatch(cause, after["died"])


def test_the_death_of_one_worker_does_not_touch_another(start: StartDaemon) -> None:
    served = start(count=2)
    first, second = served.workers()
    os.kill(first, signal.SIGKILL)
    guests = served.until(lambda guests: guests[0]["restarts"] == 1, "no successor")
    assert (guests[1]["worker"], guests[1]["restarts"]) == (second, 0)


def test_listeners_outlive_a_worker(start: StartDaemon) -> None:
    served = start()
    inode = os.stat(served.sockets[0]).st_ino
    os.kill(served.workers()[0], signal.SIGKILL)
    served.until(lambda guests: guests[0]["restarts"] == 1, "no successor")
    assert os.stat(served.sockets[0]).st_ino == inode


FALLS = """
def run(guest, heirlooms):
    raise ValueError("two\\nlines \\x1b[31m")
"""


def test_a_fault_is_one_clean_line_and_status_70(start: StartDaemon) -> None:
    served = start(FALLS)
    served.expect_log(
        r"^vhost-device-console: c.sock0: ValueError: two\\nlines \\x1b\[31m\n"
        r"vhost-device-console: c.sock0: its worker died: exit status 70$"
    )


def test_a_fault_s_traceback_is_for_debugging(start: StartDaemon) -> None:
    served = start(FALLS, "unix", 1, "--log-level", "debug")
    served.expect_log(r"vhost-device-console:   File .*in run")


def test_a_worker_that_keeps_falling_is_started_ever_more_rarely(start: StartDaemon) -> None:
    served = start(FALLS)
    began = time.monotonic()
    served.until(lambda guests: guests[0]["restarts"] == 4, "no fourth restart")
    # At once, then after 0.1, 0.2 and 0.4 seconds.
    assert time.monotonic() - began > 0.6


def test_a_falling_guest_leaves_the_others_alone(start: StartDaemon) -> None:
    served = start(
        """
def run(guest, heirlooms):
    if guest.name == "c.sock0":
        return 3
    report(heirlooms)
    return stopped()
""",
        count=2,
    )
    served.expect_log("c.sock0: its worker died: exit status 3")
    guests = served.until(lambda guests: guests[1]["state"] == "running", "the other is not up")
    assert guests[1]["restarts"] == 0


DONE_FIRST = """
def run(guest, heirlooms):
    if guest.name == "c.sock0":
        return 0
    report(heirlooms)
    return stopped()
"""


def test_a_guest_that_is_done_gives_its_sockets_back(start: StartDaemon) -> None:
    served = start(DONE_FIRST, count=2)
    served.until(lambda guests: guests[0]["state"] == "finished", "not finished")
    assert not os.path.exists(served.sockets[0])
    assert not os.path.exists(served.data[0])
    assert os.path.exists(served.sockets[1])


def test_the_daemon_ends_with_its_last_guest(start: StartDaemon) -> None:
    served = start(count=2)
    for pid in served.workers():
        os.kill(pid, signal.SIGTERM)  # they are done, as if their users had left
    assert served.wait() == 0


# Stopping


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_a_signal_ends_everything_with_status_0(number: int, start: StartDaemon) -> None:
    served = start(count=3)
    served.workers()
    served.signal(number)
    assert served.wait() == 0
    assert sorted(os.listdir(served.folder)) == ["run"]


def test_a_signal_right_after_the_start_ends_it_as_well(start: StartDaemon) -> None:
    served = start(count=8)
    served.signal(signal.SIGTERM)
    assert served.wait() == 0


def test_a_signal_that_the_caller_ignores_stays_ignored(start: StartDaemon) -> None:
    served = start(preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    served.signal(signal.SIGHUP)
    assert served.workers()


def test_a_signal_that_the_caller_blocks_ends_it_all_the_same(start: StartDaemon) -> None:
    served = start(preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]))
    served.workers()
    served.signal(signal.SIGTERM)
    assert served.wait() == 0


STUBBORN = """
def run(guest, heirlooms):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    report(heirlooms)
    while True:
        signal.pause()
"""


def test_a_worker_that_does_not_end_is_killed_in_time(start: StartDaemon) -> None:
    served = start(STUBBORN)
    served.workers()
    began = time.monotonic()
    served.signal(signal.SIGTERM)
    assert served.wait() == 0
    assert 4 < time.monotonic() - began < 15
    served.expect_log("c.sock0: its worker does not end: killed")


def test_stopping_while_a_restart_is_due_does_not_wait_for_it(start: StartDaemon) -> None:
    served = start(FALLS)
    served.until(lambda guests: guests[0]["restarts"] == 3, "not falling")
    served.signal(signal.SIGTERM)
    assert served.wait() == 0


# Idling


def test_an_idle_master_never_wakes(start: StartDaemon) -> None:
    served = start(IDLE, "unix", 4, *AS_IT_IS)
    served.workers()
    process = psutil.Process(served.pid)
    until(lambda: process.status() == psutil.STATUS_SLEEPING, "it does not sleep")
    before = process.num_ctx_switches()
    assert served.process.stderr is not None
    # Nothing can be waited for here: the claim is that nothing happens.
    assert not select.select([served.process.stderr.fileno()], [], [], 1.0)[0]
    assert process.num_ctx_switches() == before


# Health and status


def test_status_has_what_a_worker_reported(start: StartDaemon) -> None:
    served = start(
        """
def run(guest, heirlooms):
    report(heirlooms, open=True, readers=2, output=10, input=20, missed=3, discarded=4, stalls=5,
           columns=80, rows=24, state="ready", host_open=True, held=True, size_by="resize", lag=9)
    return stopped()
"""
    )
    served.workers()
    (guest,) = served.status()
    assert (guest["frontend"], guest["max_ports"]) == (None, 1)
    assert guest["ports"] == [
        {
            "id": 0,
            "name": "console0",
            "endpoint": served.data[0],
            "console": True,
            "overflow": "drop",
            "state": "ready",
            "open": True,
            "host_open": True,
            "held": True,
            "readers": 2,
            "output": 10,
            "input": 20,
            "missed": 3,
            "discarded": 4,
            "stalls": 5,
            "columns": 80,
            "rows": 24,
            "size_by": "resize",
            "log": None,
            "log_failing": False,
            "lag": 9,
        }
    ]


def test_counters_go_on_over_restarts_and_readers_do_not(start: StartDaemon) -> None:
    served = start(
        """
def run(guest, heirlooms):
    report(heirlooms, readers=1, output=10, input=1, missed=2, discarded=3, stalls=4)
    return stopped()
"""
    )
    os.kill(served.workers()[0], signal.SIGKILL)
    served.until(lambda g: g[0]["restarts"] == 1 and g[0]["state"] == "running", "no successor")
    (port,) = served.status()[0]["ports"]
    counters = ("readers", "output", "input", "missed", "discarded", "stalls")
    assert [port[name] for name in counters] == [1, 10, 1, 4, 6, 8]  # offsets are the journal's


def test_a_guest_s_own_counters_go_on_over_restarts_too(start: StartDaemon) -> None:
    served = start(
        """
def run(guest, heirlooms):
    counters = dict(sessions=1, kicks=2, calls=3, chains=4, refused=5, broken=6, ignored=7)
    os.write(heirlooms.health, encode(Health(**counters)))
    return stopped()
"""
    )
    os.kill(served.workers()[0], signal.SIGKILL)
    served.until(lambda g: g[0]["restarts"] == 1 and g[0]["state"] == "running", "no successor")
    (guest,) = served.status()
    counters = ("sessions", "kicks", "calls", "chains", "refused", "broken", "ignored")
    assert [guest[name] for name in counters] == [2, 4, 6, 8, 10, 12, 14]


def test_times_of_service_are_counted_over_all_workers(start: StartDaemon) -> None:
    served = start(
        """
def run(guest, heirlooms):
    more = [9] * os.path.exists(guest.socket_path + ".second")  # as of another version
    open(guest.socket_path + ".second", "w").close()
    health = Health(services=[1, 2, *more], service_ns=1_500_000_000)
    os.write(heirlooms.health, encode(health))
    return stopped()
"""
    )
    os.kill(served.workers()[0], signal.SIGKILL)
    served.until(lambda g: g[0]["restarts"] == 1 and g[0]["state"] == "running", "no successor")
    (guest,) = served.status()
    assert guest["services"]["counts"] == [2, 4, 9] + [0] * 17
    assert len(guest["services"]["bounds"]) == 19
    assert guest["services"]["seconds"] == 3.0
    assert guest["services"]["bounds"][:2] == [4.096e-06, 8.192e-06]


def test_processor_seconds_are_those_of_all_workers(start: StartDaemon) -> None:
    served = start(
        """
import time
def run(guest, heirlooms):
    if not os.path.exists(guest.socket_path + ".second"):
        open(guest.socket_path + ".second", "w").close()
        while time.process_time() < 0.3:
            pass
    os.write(heirlooms.health, encode(Health(kicks=1)))
    return stopped()
"""
    )
    (worker,) = served.workers()
    before = served.status()[0]["cpu_seconds"]
    assert before >= 0.29  # the kernel tells it in ticks of 10 ms
    os.kill(worker, signal.SIGKILL)
    served.until(lambda g: g[0]["restarts"] == 1 and g[0]["state"] == "running", "no successor")
    assert served.status()[0]["cpu_seconds"] >= before


def test_what_a_worker_reported_last_counts_though_it_is_dead(start: StartDaemon) -> None:
    served = start(
        """
def run(guest, heirlooms):
    if os.path.exists(guest.socket_path + ".second"):
        return stopped()
    open(guest.socket_path + ".second", "w").close()
    for count in range(1, 1000):
        report(heirlooms, output=count)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    )
    served.until(lambda guests: guests[0]["restarts"] == 1, "no successor")
    assert served.status()[0]["ports"][0]["output"] == 999


def test_memory_and_processor_of_a_worker_are_shown(start: StartDaemon) -> None:
    served = start()
    (guest,) = served.until(lambda guests: guests[0]["rss"], "no memory")
    assert guest["rss"] > 1 << 20
    assert guest["cpu"] >= 0


def test_a_busy_worker_shows(start: StartDaemon) -> None:
    served = start("def run(guest, heirlooms):\n    report(heirlooms)\n    while True: pass\n")
    served.until(lambda guests: (guests[0]["cpu"] or 0) > 10, "no load seen")


@pytest.mark.parametrize(
    "noise", [b"\xff" * 100, b"\x01\x00\x00\x00\xc1"], ids=["too long", "no record"]
)
def test_a_worker_that_reports_nonsense_is_no_longer_heard_and_lives(
    noise: bytes, start: StartDaemon
) -> None:
    served = start(
        f"""
def run(guest, heirlooms):
    report(heirlooms, output=7)
    os.write(heirlooms.health, {noise!r})
    report(heirlooms, output=8)
    return stopped()
"""
    )
    served.expect_log("c.sock0: its worker's reports are ignored from now")
    (guest,) = served.status()
    assert guest["ports"][0]["output"] == 7
    assert guest["restarts"] == 0


def test_the_successor_of_one_that_reported_nonsense_is_heard_again(start: StartDaemon) -> None:
    served = start(
        """
def run(guest, heirlooms):
    if not os.path.exists(guest.socket_path + ".second"):
        open(guest.socket_path + ".second", "w").close()
        os.write(heirlooms.health, bytes([255]) * 100)
        return 1
    report(heirlooms, output=5)
    return stopped()
"""
    )
    served.until(lambda guests: guests[0]["ports"][0]["output"] == 5, "not heard")


def test_without_a_place_for_the_monitor_socket_it_runs_on(
    start: StartDaemon, folder: Path
) -> None:
    served = start(env={"RUNTIME_DIRECTORY": str(folder / "no" / "where")})
    served.expect_log("no status can be asked for: .*")
    assert os.path.exists(served.sockets[0])


def test_the_monitor_socket_is_its_owner_s_alone(start: StartDaemon) -> None:
    served = start()
    assert stat.S_IMODE(os.stat(served.monitor).st_mode) == 0o600


# Endpoints


def test_all_or_nothing(start: StartDaemon, folder: Path, ports: Ports) -> None:
    first = ports(3)
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", first + 2))
        busy.listen()
        with pytest.raises(RuntimeError, match=f"TCP port 127.0.0.1:{first + 2} is in use"):
            start(IDLE, "network", 3, tcp=first)
    assert sorted(os.listdir(folder)) == ["run"]
    assert os.listdir(folder / "run") == []


def test_the_names_of_ptys_are_printed(start: StartDaemon) -> None:
    served = start(IDLE, "pty", 2)
    said = served.expect_out(r"c.sock0: (/dev/pts/\d+)\nc.sock1: (/dev/pts/\d+)\n")
    endpoints = [guest["ports"][0]["endpoint"] for guest in served.status()]
    assert list(said.groups()) == endpoints


def test_a_closed_stdout_is_no_hindrance(start: StartDaemon) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        assert start(IDLE, "pty", 1, stdout=write).workers()
    finally:
        os.close(write)


# Inherited sockets


def test_an_inherited_listener_s_worker_is_replaced(start: StartDaemon, folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "mine"))
        listener.listen()
        fd = listener.fileno()
        served = start(IDLE, "pty", 1, "--fd", str(fd), socket_path=None, pass_fds=[fd])
        os.kill(served.workers()[0], signal.SIGKILL)
        (guest,) = served.until(lambda guests: guests[0]["restarts"] == 1, "no successor")
    assert (guest["name"], guest["socket"]) == (f"fd{fd}", f"fd {fd}")


def test_an_inherited_connection_goes_on_with_a_successor(start: StartDaemon) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        fd = theirs.fileno()
        served = start(IDLE, "pty", 1, "--fd", str(fd), socket_path=None, pass_fds=[fd])
        theirs.close()
        os.kill(served.workers()[0], signal.SIGKILL)
        served.until(lambda guests: guests[0]["restarts"] == 1, "no successor")
        ours.setblocking(False)
        with pytest.raises(BlockingIOError):
            ours.recv(1)


def test_an_inherited_connection_that_ended_is_status_0(start: StartDaemon) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        fd = theirs.fileno()
        served = start(
            """
def run(guest, heirlooms):
    import select, socket
    from vhost_device_console import custody
    report(heirlooms)
    line = socket.socket(fileno=heirlooms.custody)
    serial = 0
    while True:
        select.select([line], [], [])
        order, _ = custody.receive_order(line)
        if isinstance(order, custody.FrontendGone):
            return 0
        serial = order.serial
        custody.send(line, custody.Commit(serial=serial, newest=0, snapshot=b"", keys=[]))
""",
            "pty",
            1,
            "--fd",
            str(fd),
            socket_path=None,
            pass_fds=[fd],
        )
        served.workers()
        theirs.close()
        ours.close()
        assert served.wait() == 0


# The terminal

RAW = """
import tty
def run(guest, heirlooms):
    tty.setraw(0)
    os.write(1, b"raw")
    report(heirlooms)
    return stopped()
"""


def read_until(fd: int, end: bytes) -> bytes:
    data = b""
    deadline = time.monotonic() + 30
    while not data.endswith(end):
        wait_readable(fd, deadline, f"no {end!r} in {data!r}")
        data += os.read(fd, 1000)
    return data


def test_the_terminal_is_as_it_was_after_a_worker_was_killed(
    start: StartDaemon, terminal: tuple[int, int]
) -> None:
    _, theirs = terminal
    before = termios.tcgetattr(theirs)
    served = start(
        """
import tty
def run(guest, heirlooms):
    if os.path.exists(guest.socket_path + ".second"):
        report(heirlooms)
        return stopped()
    open(guest.socket_path + ".second", "w").close()
    tty.setraw(0)
    os.kill(os.getpid(), signal.SIGKILL)
""",
        "nested",
        stdin=theirs,
    )
    served.until(lambda g: g[0]["restarts"] == 1 and g[0]["state"] == "running", "no successor")
    assert termios.tcgetattr(theirs) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_terminal_is_as_it_was_after_the_end(
    number: int, start: StartDaemon, terminal: tuple[int, int]
) -> None:
    ours, theirs = terminal
    before = termios.tcgetattr(theirs)
    served = start(RAW, "nested", stdin=theirs, stdout=theirs)
    read_until(ours, b"raw")
    assert termios.tcgetattr(theirs) != before
    served.signal(number)
    assert served.wait() == 0
    assert termios.tcgetattr(theirs) == before


def test_log_lines_return_to_the_first_column_of_a_terminal(
    start: StartDaemon, terminal: tuple[int, int]
) -> None:
    ours, theirs = terminal
    tty.setraw(theirs)
    served = start(IDLE, "unix", 1, *AS_IT_IS, stderr=theirs)
    os.kill(served.workers()[0], signal.SIGKILL)
    assert read_until(ours, b"SIGKILL\r\n").startswith(b"vhost-device-console: c.sock0")


def test_a_stderr_that_nobody_reads_stops_nothing(start: StartDaemon) -> None:
    read, write = os.pipe()
    try:
        os.write(write, b"x" * fcntl.fcntl(write, fcntl.F_GETPIPE_SZ))
        served = start(IDLE, "unix", 1, *AS_IT_IS, stderr=write)
        os.kill(served.workers()[0], signal.SIGKILL)
        served.until(lambda guests: guests[0]["restarts"] == 1, "no successor")
        while select.select([read], [], [], 0)[0]:
            os.read(read, 1 << 16)
        os.kill(served.workers()[0], signal.SIGKILL)
        said = read_until(read, b"SIGKILL\n")
    finally:
        os.close(read)
        os.close(write)
    assert said.startswith(b"vhost-device-console: 1 log lines lost: stderr was not read\n")


def test_a_closed_stderr_stops_nothing(start: StartDaemon) -> None:
    served = start(preexec_fn=lambda: os.close(2))
    os.kill(served.workers()[0], signal.SIGKILL)
    served.until(lambda guests: guests[0]["restarts"] == 1, "no successor")


# Where workers run


def test_workers_run_on_the_cpus_that_were_chosen_and_their_master_anywhere(
    start: StartDaemon,
) -> None:
    everywhere = os.sched_getaffinity(0)
    chosen = max(everywhere)
    served = start(IDLE, "unix", 2, "--cpus", str(chosen))
    assert [os.sched_getaffinity(pid) for pid in served.workers()] == [{chosen}, {chosen}]
    assert os.sched_getaffinity(served.pid) == everywhere


def test_workers_run_anywhere_unless_told(start: StartDaemon) -> None:
    assert os.sched_getaffinity(start().workers()[0]) == os.sched_getaffinity(0)


def test_equal_memory_of_workers_may_be_merged(start: StartDaemon) -> None:
    said = Path(f"/proc/{start().workers()[0]}/ksm_stat")
    if not said.exists() or "ksm_merge_any" not in said.read_text():
        pytest.skip("this kernel does not tell")
    assert "ksm_merge_any: yes" in said.read_text()


# The limit on processes


def test_a_fork_that_is_refused_is_tried_again(start: StartDaemon) -> None:
    served = start(
        IDLE.replace(
            "def run",
            """
fork = os.fork
failures = [11, 11]
def refused():
    if failures:
        raise OSError(failures.pop(), "Resource temporarily unavailable")
    return fork()
os.fork = refused
def run""",
        )
    )
    served.expect_log("c.sock0: cannot start a worker: Resource temporarily unavailable")
    assert served.workers()


# Commands

#: Lists in its log every order it takes, after what it was forked with.
OBEDIENT = """
import select, socket
from vhost_device_console import custody
from vhost_device_console.journal import Journal

def told(order, fds):
    kinds = [os.readlink(f"/proc/self/fd/{fd}").split(":")[0] for fd in fds]
    os.write(2, f"{order} {kinds}\\n".encode())

def run(guest, heirlooms):
    os.write(2, f"forked with {[port.id for port in guest.ports]}\\n".encode())
    assert len(heirlooms.ports) == len(guest.ports)
    for port in heirlooms.ports:
        Journal(port.journal)
    ports = {port.id: PortHealth(id=port.id, name=port.name, output=1) for port in guest.ports}
    sock = socket.socket(fileno=heirlooms.custody)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    poll = select.poll()
    poll.register(heirlooms.health, 0)
    poll.register(sock, select.POLLIN)
    while True:
        os.write(heirlooms.health, encode(Health(ports=list(ports.values()))))
        ready = dict(poll.poll())
        if heirlooms.health in ready:
            return 0
        while got := custody.receive_order(sock):
            order, fds = got
            told(order, fds)
            if isinstance(order, custody.AddPort):
                Journal(fds[0])
                ports[order.port.id] = PortHealth(id=order.port.id, name=order.port.name)
            elif isinstance(order, custody.RemovePort):
                del ports[order.port]
"""

ROOM = ("--max-ports", "4")


def table(text: str) -> PortTable:
    return parse_port(text, "")


def ids(served: Daemon) -> list[int]:
    return [port["id"] for port in served.status()[0]["ports"]]


def held(served: Daemon) -> list[str]:
    """Return the journals and ptys that the master has open."""
    links = []
    for fd in Path(f"/proc/{served.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # a monitor client has just gone
            links.append(os.readlink(fd))
    return sorted(link for link in links if link.startswith(("/memfd:", "/dev/ptmx", "/dev/pts/")))


def add(served: Daemon, text: str, guest: str = "c.sock0") -> str:
    return monitor.change(served.monitor, monitor.PortAdd(guest, table(text)))


def remove(served: Daemon, port: str) -> str:
    return monitor.change(served.monitor, monitor.PortRemove("c.sock0", port))


def resize(served: Daemon, columns: int, rows: int, port: str = "0") -> str:
    return monitor.change(served.monitor, monitor.Resize("c.sock0", port, columns, rows))


def resize_for_ever(served: Daemon) -> None:
    while True:
        resize(served, 80, 24)


def test_an_added_port_is_made_told_and_shown(start: StartDaemon, folder: Path) -> None:
    served = start(OBEDIENT, "unix", 1, *ROOM)
    served.workers()
    said = add(served, f"name=agent,backend=unix,path={folder}/a")
    assert said == f"port 1 of c.sock0, agent, is at {folder}/a"
    served.expect_log(r"AddPort\(port=Port\(id=1, name='agent'.*\['/memfd'\]")
    served.until(lambda g: g[0]["ports"][1]["endpoint"] == f"{folder}/a", "not shown")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(f"{folder}/a")


def test_an_added_port_goes_with_the_daemon(start: StartDaemon, folder: Path) -> None:
    served = start(OBEDIENT, "unix", 1, *ROOM)
    served.workers()
    add(served, f"name=agent,backend=unix,path={folder}/a")
    served.signal(signal.SIGTERM)
    assert served.wait() == 0
    assert os.listdir(folder) == ["run"]


def test_a_successor_has_the_ports_there_are_then(start: StartDaemon) -> None:
    served = start(OBEDIENT, "unix", 1, *ROOM, "--port", "name=old,backend=pty")
    (worker,) = served.workers()
    add(served, "name=new,backend=pty")
    remove(served, "old")
    os.kill(worker, signal.SIGKILL)
    served.expect_log(r"forked with \[0, 2\]")
    assert ids(served) == [0, 2]


def test_a_removed_port_is_told_and_its_socket_gone(start: StartDaemon, folder: Path) -> None:
    served = start(OBEDIENT, "unix", 1, "--port", f"name=a,backend=unix,path={folder}/a")
    served.workers()
    before = held(served)
    assert remove(served, "1") == "port 1 of c.sock0, a, is gone"
    served.expect_log(r"RemovePort\(port=1\) \[\]")
    assert not os.path.exists(folder / "a0")
    assert ids(served) == [0]
    assert len(held(served)) == len(before) - 1


def test_a_port_may_come_and_go_for_ever(start: StartDaemon, folder: Path) -> None:
    served = start(OBEDIENT, "unix", 1, *ROOM)
    served.workers()
    before = held(served)
    for _ in range(30):
        add(served, f"name=a,backend=unix,path={folder}/a")
        remove(served, "a")
    assert held(served) == before
    assert ids(served) == [0]


def test_a_port_with_the_id_of_another_counts_from_0(start: StartDaemon) -> None:
    served = start(OBEDIENT, "unix", 1, "--port", "name=a,backend=pty")
    served.until(lambda g: g[0]["ports"][1]["output"] == 1, "nothing counted")
    remove(served, "a")
    add(served, "name=b,backend=pty")
    (_, port) = served.status()[0]["ports"]
    assert (port["id"], port["name"], port["output"]) == (1, "b", 0)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("name=a,backend=pty", "port a: another port has the name a"),
        ("name=b,backend=pty,id=1", "port b: another port has id 1"),
        ("name=b,backend=pty,id=4", "port b: c.sock0 may have ports 0 to 3: start its daemon with"),
        ("name=b,backend=nested", "port b: the terminal cannot become a port's"),
        ("name=b\nc,backend=pty", "is no name"),
        ("name=b,backend=unix,path=/nowhere/b", "folder /nowhere does not exist"),
    ],
)
def test_a_port_that_cannot_be_had_changes_nothing(
    text: str, line: str, start: StartDaemon
) -> None:
    served = start(OBEDIENT, "unix", 1, *ROOM, "--port", "name=a,backend=pty")
    served.workers()
    before = held(served)
    with pytest.raises(ConsoleError, match=re.escape(line)):
        add(served, text)
    assert ids(served) == [0, 1]
    assert held(served) == before


def test_a_socket_in_use_stays_its_owner_s(start: StartDaemon) -> None:
    served = start(OBEDIENT, "unix", 1, *ROOM)
    served.workers()
    with pytest.raises(ConsoleError, match="is in use by another process"):
        add(served, f"name=a,backend=unix,path={served.data[0]}")
    assert os.path.exists(served.data[0])


def test_a_size_is_told_by_the_port_s_name_or_id(start: StartDaemon) -> None:
    served = start(OBEDIENT)
    served.workers()
    assert resize(served, 100, 30, "console0") == "port 0 of c.sock0, console0, is 100x30"
    served.expect_log(r"Resize\(port=0, columns=100, rows=30\)")
    assert resize(served, 0, 0) == "port 0 of c.sock0, console0, has its clients' size"
    served.expect_log(r"Resize\(port=0, columns=0, rows=0\)")


def test_a_successor_is_told_the_size_again(start: StartDaemon) -> None:
    served = start(OBEDIENT)
    (worker,) = served.workers()
    resize(served, 100, 30)
    os.kill(worker, signal.SIGKILL)
    served.expect_log(r"its worker died(?s:.*)Resize\(port=0, columns=100, rows=30\)")


def test_that_a_size_was_given_back_is_told_again(start: StartDaemon) -> None:
    served = start(OBEDIENT, "pty", 1, "--port", "name=c,console,backend=pty")
    (worker,) = served.workers()
    resize(served, 100, 30)
    resize(served, 0, 0)
    resize(served, 50, 20, "c")
    os.kill(worker, signal.SIGKILL)
    log = served.expect_log(r"its worker died(?s:.*)Resize\(port=1, columns=50, rows=20\)")
    assert "Resize(port=0, columns=0, rows=0)" in log[0]


@pytest.mark.parametrize(
    ("size", "port", "line"),
    [
        ((80, 24), "agent", "port agent of c.sock0 is no console: it has no size"),
        ((80, 24), "7", "c.sock0 has no port 7"),
        ((80, 0), "0", "80x0 is no size"),
        ((0, 24), "0", "0x24 is no size"),
    ],
)
def test_a_size_that_cannot_be_is_one_line(
    size: tuple[int, int], port: str, line: str, start: StartDaemon
) -> None:
    served = start(OBEDIENT, "pty", 1, "--port", "name=agent,backend=pty")
    served.workers()
    with pytest.raises(ConsoleError, match=line):
        resize(served, *size, port)


@pytest.mark.parametrize(
    ("port", "line"),
    [
        ("0", "port 0 stays as long as its guest"),
        ("console0", "port 0 stays as long as its guest"),
        ("9", "c.sock0 has no port 9"),
    ],
)
def test_a_port_that_cannot_go_stays(port: str, line: str, start: StartDaemon) -> None:
    served = start(OBEDIENT)
    served.workers()
    with pytest.raises(ConsoleError, match=line):
        remove(served, port)
    assert ids(served) == [0]


def test_a_guest_that_is_not_there_is_one_line(start: StartDaemon) -> None:
    with pytest.raises(ConsoleError, match="there is no guest web here"):
        add(start(OBEDIENT), "name=a,backend=pty", "web")


@pytest.mark.parametrize(
    "request_",
    [
        monitor.PortAdd("c.sock0", table("name=b,backend=pty")),
        monitor.PortRemove("c.sock0", "a"),
        monitor.Resize("c.sock0", "0", 80, 24),
    ],
)
def test_a_guest_without_worker_is_not_changed_and_it_is_said(
    request_: monitor.Change, start: StartDaemon, folder: Path
) -> None:
    port = f"name=a,backend=unix,path={folder}/a"
    served = start(DONE_FIRST, "unix", 2, *ROOM, "--port", port)
    served.until(lambda guests: guests[0]["state"] == "finished", "not finished")
    with pytest.raises(ConsoleError, match=r"c\.sock0: its worker is down, see status"):
        monitor.change(served.monitor, request_)
    assert ids(served) == [0, 1]


def test_a_worker_that_takes_no_orders_is_said_and_nothing_changes(start: StartDaemon) -> None:
    served = start(IDLE, "pty", 1, *ROOM)
    served.workers()
    with pytest.raises(ConsoleError, match="its worker takes no orders"):
        resize_for_ever(served)
    before = held(served)
    with pytest.raises(ConsoleError, match="its worker takes no orders"):
        add(served, "name=a,backend=pty")
    assert ids(served) == [0]
    assert held(served) == before


def test_an_order_that_the_system_refuses_is_said_and_nothing_changes(start: StartDaemon) -> None:
    served = start(
        IDLE.replace(
            "def run",
            """
from vhost_device_console import custody
def refused(*_):
    raise OSError(109, "Too many references")
custody.send = refused
def run""",
        ),
        "pty",
        1,
        *ROOM,
    )
    served.workers()
    before = held(served)
    with pytest.raises(ConsoleError, match="its worker cannot be told: too many references"):
        add(served, "name=a,backend=pty")
    assert held(served) == before
    assert ids(served) == [0]
