"""Faults of processes, people and the system, while another guest of the daemon converses."""

from __future__ import annotations

import ast
import fcntl
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import vhost_device_console
from scene import (
    MARKER,
    assert_same,
    attach,
    boot,
    call,
    converse,
    exactly,
    footprints,
    noise,
    unread,
)

from launch import Daemon, receive_until, until

StartDaemon = Callable[..., Daemon]

#: The workers of the first guest fall until there is a file `mended`.
_FALLS = """
import functools, os
from vhost_device_console import cli, master, worker

def run(guest, heirlooms):
    if guest.name.endswith("0") and not os.path.exists({mended!r}):
        return 3
    return worker.run(guest, heirlooms)

master.serve = functools.partial(master.serve, run=run)
cli.main()
"""


@contextmanager
def bystander(served: Daemon) -> Iterator[Callable[[], None]]:
    """Have the second guest converse all the while; give what returns once it did so anew.

    In the end its worker is the same, and all of the daemon holds what it held.
    """
    worker = served.workers()[1]
    idle = footprints(served)
    over = threading.Event()
    rounds = 0
    failed: list[BaseException] = []

    def talk() -> None:
        nonlocal rounds
        try:
            while not over.wait(0.01):
                converse(console, peer)
                rounds += 1
        except BaseException as error:
            failed.append(error)

    def again() -> None:
        wanted = rounds + 2  # the first of them may have been under way
        until(lambda: failed or rounds >= wanted, "the other guest converses no more")

    with attach(served, 1) as peer, boot(served, 1) as console:
        converse(console, peer)
        talker = threading.Thread(target=talk)
        talker.start()
        try:
            again()
            yield again
            again()
        finally:
            over.set()
            talker.join()
    if failed:
        raise failed[0]
    assert served.workers()[1] == worker
    assert served.status()[1]["restarts"] == 0
    until(lambda: footprints(served) == idle, f"(descriptors, memory files) not {idle} again")


def test_a_killed_worker_is_no_other_guest_s_concern(daemon: StartDaemon) -> None:
    served = daemon("unix", 2)
    with bystander(served) as again, attach(served) as peer, boot(served) as console:
        converse(console, peer)
        os.kill(served.workers()[0], signal.SIGKILL)
        again()
        converse(console, peer)


def test_workers_that_fall_again_and_again_are_named_and_their_guest_is_served_at_last(
    daemon: StartDaemon, folder: Path
) -> None:
    mended = folder / "mended"
    code = _FALLS.format(mended=str(mended))
    served = daemon("unix", 2, program=[sys.executable, "-c", code])
    with call(served) as peer:
        # Not `bystander`, which wants all workers running.
        with attach(served, 1) as other, boot(served, 1) as console:
            status = served.until(
                lambda guests: guests[0]["restarts"] > 2 and guests[0]["state"] == "backoff",
                "not put off",
            )
            assert status[0]["died"] == "exit status 3"
            converse(console, other)
            assert served.status()[1]["restarts"] == 0
        mended.touch()
        with boot(served) as console:
            converse(console, peer)


def test_a_killed_master_takes_everything_with_it_and_another_can_follow(
    daemon: StartDaemon,
) -> None:
    served = daemon("unix", 1)
    with attach(served) as peer, boot(served) as console:
        converse(console, peer)
        served.signal(signal.SIGKILL)
        assert served.wait() == -signal.SIGKILL
        assert peer.recv(1) == b""
    following = daemon("unix", 1)
    with attach(following) as peer, boot(following) as console:
        converse(console, peer)


def test_what_is_pending_when_the_daemon_is_told_to_end_arrives(daemon: StartDaemon) -> None:
    """It arrives where it is read at once: for slower ones there is a limit."""
    served = daemon("unix", 1)
    data = noise(1 << 19)
    with attach(served) as peer, boot(served) as console:
        console.write(data)
        assert unread(peer) < len(data)
        served.signal(signal.SIGTERM)
        assert_same(exactly(peer, len(data)), data)
        assert peer.recv(1) == b""
    assert served.wait() == 0


def test_a_client_that_never_reads_does_not_keep_the_daemon_from_ending(
    daemon: StartDaemon,
) -> None:
    served = daemon("unix", 1)
    with attach(served), boot(served) as console:
        console.write(noise(1 << 20))
        served.signal(signal.SIGTERM)
        assert served.wait() == 0


def test_a_guest_that_writes_without_end_leaves_room_for_others(daemon: StartDaemon) -> None:
    served = daemon("unix", 2)
    over = threading.Event()

    def read() -> None:
        while peer.recv(1 << 20):
            pass

    def write() -> None:
        while not over.is_set():
            console.write(bytes(1 << 16))

    with bystander(served) as again, attach(served) as peer, boot(served) as console:
        threads = [threading.Thread(target=work) for work in (read, write)]
        for thread in threads:
            thread.start()
        for _ in range(5):
            again()
        over.set()
        threads[1].join()
        peer.shutdown(socket.SHUT_RDWR)
        threads[0].join()


def test_a_client_that_types_without_end_leaves_room_for_others(daemon: StartDaemon) -> None:
    """The guest does not read: the client is made to wait, and nothing of it is lost."""
    served = daemon("unix", 2)
    with bystander(served) as again, attach(served) as peer, boot(served) as console:
        converse(console, peer)
        typed = 0
        peer.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                typed += peer.send(b"x" * 4096)
                assert typed < 64 << 20, "it takes without end"
        again()
        assert console.read(typed) == b"x" * typed
        peer.settimeout(30)
        converse(console, peer)


def test_a_master_without_descriptors_starts_the_worker_later(daemon: StartDaemon) -> None:
    served = daemon("unix", 2)
    before = resource.prlimit(served.pid, resource.RLIMIT_NOFILE)
    with bystander(served) as again, attach(served) as peer, boot(served) as console:
        converse(console, peer)
        worker = served.workers()[0]
        resource.prlimit(served.pid, resource.RLIMIT_NOFILE, (3, before[1]))
        try:
            os.kill(worker, signal.SIGKILL)
            served.expect_log("cannot start a worker: Too many open files")
            again()
        finally:
            resource.prlimit(served.pid, resource.RLIMIT_NOFILE, before)
        converse(console, peer)


def test_a_log_that_nobody_reads_holds_no_guest_up(daemon: StartDaemon) -> None:
    """Stderr is a full pipe, and workers have something to say."""
    read, write = os.pipe()
    try:
        os.write(write, b"x" * fcntl.fcntl(write, fcntl.F_GETPIPE_SZ))
        served = daemon("unix", 2, "--log-level", "debug", stderr=write)
        with bystander(served) as again, attach(served) as peer:
            for _ in range(3):
                with boot(served) as console:
                    converse(console, peer)
            again()
    finally:
        os.close(read)
        os.close(write)


def test_a_master_that_hangs_holds_no_guest_up(daemon: StartDaemon) -> None:
    """Nobody reads what workers report and commit; they serve on, and it is read later."""
    served = daemon("unix", 2)
    with bystander(served) as again, attach(served) as peer, boot(served) as console:
        served.signal(signal.SIGSTOP)
        try:
            for _ in range(100):
                converse(console, peer)
            again()
        finally:
            served.signal(signal.SIGCONT)
        converse(console, peer)
        assert [guest["restarts"] for guest in served.status()] == [0, 0]


def test_a_worker_that_was_stopped_goes_on(daemon: StartDaemon) -> None:
    served = daemon("unix", 2)
    with bystander(served) as again, attach(served) as peer, boot(served) as console:
        converse(console, peer)
        worker = served.workers()[0]
        os.kill(worker, signal.SIGSTOP)
        try:
            again()
        finally:
            os.kill(worker, signal.SIGCONT)
        converse(console, peer)
        assert served.workers()[0] == worker


def test_a_worker_that_hangs_is_replaced_where_there_is_a_watchdog(daemon: StartDaemon) -> None:
    served = daemon("unix", 2, env={"WATCHDOG_USEC": "8000000"})
    with bystander(served) as again, attach(served) as peer, boot(served) as console:
        converse(console, peer)
        os.kill(served.workers()[0], signal.SIGSTOP)
        again()
        served.expect_log("c.sock0: its worker does not answer: killed")
        converse(console, peer)
        assert served.status()[0]["frontend"] == os.getpid()


def test_a_client_that_comes_while_the_master_has_no_descriptors_is_served_later(
    daemon: StartDaemon,
) -> None:
    served = daemon("unix", 2)
    before = resource.prlimit(served.pid, resource.RLIMIT_NOFILE)
    with bystander(served) as again, boot(served) as console:
        resource.prlimit(served.pid, resource.RLIMIT_NOFILE, (3, before[1]))
        try:
            peer = call(served)
            served.expect_log("cannot take in whoever comes, next try in a second")
            again()
        finally:
            resource.prlimit(served.pid, resource.RLIMIT_NOFILE, before)
        with peer:
            converse(console, peer)


def test_a_client_that_stops_reading_is_no_other_guest_s_concern(daemon: StartDaemon) -> None:
    """Its own guest writes on, and it finds a marker where it missed something."""
    served = daemon("unix", 2)
    with bystander(served) as again, attach(served) as peer, boot(served) as console:
        console.write(noise(4 << 20))
        again()
        console.write(b"the end")
        assert MARKER.search(receive_until(peer, b"the end"))


def test_a_pty_that_nobody_opens_is_no_other_guest_s_concern(folder: Path) -> None:
    config = folder / "c.toml"
    config.write_text(
        "".join(
            f'[[guest]]\nsocket = "{folder}/c.sock{index}"\n[[guest.port]]\nname = "c"\n'
            f'console = true\nbackend = "{backend}"\n{more}'
            for index, (backend, more) in enumerate(
                [("pty", ""), ("unix", f'path = "{folder}/c.sock1.data"\n')]
            )
        )
    )
    with Daemon(folder, None, 0, "--config", str(config), socket_path=None) as served:
        served.sockets = [str(folder / f"c.sock{index}") for index in range(2)]
        served.data = ["", str(folder / "c.sock1.data")]
        with bystander(served) as again, boot(served) as console:
            console.write(noise(4 << 20))
            again()
        served.data.pop(0)


def test_no_clock_is_read_that_can_be_set() -> None:
    """What is waited for is not put off, or brought forward, by who sets the time."""
    settable = {"CLOCK_REALTIME", "gmtime", "localtime", "now", "time", "time_ns", "utcnow"}
    package = Path(vhost_device_console.__path__[0])
    read = {
        (str(path.relative_to(package)), node.attr)
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in settable
        if isinstance(node.value, ast.Name) and node.value.id in ("time", "datetime", "date")
    }
    # What people are shown of a clock, and when things are said to have been: nothing waits for it.
    shown = {path for path, _ in read if path.startswith("people/")}
    assert shown <= {f"people/{name}.py" for name in ("desk", "keys", "recording", "top")}
    # Logs' ages are the calendar's; a file has a number that was in no record before.
    assert {each for each in read if each[0] not in shown} == {
        ("logs.py", "time"),
        ("logs.py", "time_ns"),
        ("worker/backends/lines.py", "gmtime"),
        ("worker/backends/log.py", "time_ns"),
    }
