"""Logs of a running daemon: every byte once, whatever happens to files, disks and workers."""

from __future__ import annotations

import gzip
import json
import os
import re
import resource
import select
import signal
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from scene import (
    MARKER,
    assert_same,
    attach,
    boot,
    exactly,
    noise,
    numbered,
    port_of,
    wait_port,
)
from vhost_device_console import archive
from vhost_device_console.testing.console import ConsoleDriver

from conftest import StartDaemon
from launch import WITHIN, Daemon, command, until, wait_readable

MIB = 1 << 20


def logged(running: Daemon, data: bytes, name: str = "log0") -> None:
    """Wait until a log has as many bytes as `data`, and check that it is that."""
    path = running.folder / name
    until(lambda: path.stat().st_size >= len(data), f"{name} never had {len(data)} bytes")
    assert_same(path.read_bytes(), data)


def small(path: Path) -> bool:
    """Say whether there is a file that need not be rotated."""
    try:
        return path.stat().st_size < 65536
    except FileNotFoundError:  # between two names
        return False


def in_order(folder: Path) -> bytes:
    """Return what is in all files of log0, oldest first."""
    old = [path for path in folder.glob("log0.*") if path.suffix[1:].isdigit()]
    files = sorted(old, key=lambda path: -int(path.suffix[1:]))
    return b"".join(path.read_bytes() for path in [*files, folder / "log0"])


@contextmanager
def full_disk(worker: int, size: int) -> Iterator[None]:
    """Let a worker write files up to `size` bytes only, for a while."""
    soft, hard = resource.prlimit(worker, resource.RLIMIT_FSIZE)
    resource.prlimit(worker, resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.prlimit(worker, resource.RLIMIT_FSIZE, (soft, hard))


# Everything, and nothing else


def test_what_a_guest_writes_is_in_its_log_with_nobody_attached(
    daemon: StartDaemon, folder: Path
) -> None:
    """Each guest's console has a file of its own."""
    running = daemon("unix", 2, "--log-file", str(folder / "log"))
    for guest in (0, 1):
        with boot(running, guest) as console:
            console.write(b"guest %d\n" % guest)
        logged(running, b"guest %d\n" % guest, f"log{guest}")


@pytest.mark.parametrize("readers", [0, 1])
def test_however_fast_a_guest_writes_its_log_has_no_gap(
    daemon: StartDaemon, folder: Path, readers: int
) -> None:
    """Twice as much as the journal keeps is given to the device at once, again and again."""
    running = daemon("unix", 1, "--log-file", str(folder / "log"))
    data = noise(16 * MIB)
    with boot(running) as console:
        peers = [attach(running) for _ in range(readers)]  # who do not read
        console.write(data, chunk=32768, depth=64)
        logged(running, data)
        for peer in peers:
            peer.close()


def test_a_log_is_nobody_to_the_guest_and_takes_nothing_from_people(
    daemon: StartDaemon, folder: Path
) -> None:
    """A generic port stays closed, and who comes later gets what they would have got without."""
    running = daemon(
        "unix",
        1,
        *("--log-file", str(folder / "log")),
        *("--port", f"name=agent,backend=unix,path={folder}/agent,log={folder}/agent.log"),
    )
    with boot(running, queue_count=6) as console:
        console.write(b"early")
        logged(running, b"early")
        port = running.status()[0]["ports"][1]
        assert (port["host_open"], port["readers"]) == (False, 0)
        with attach(running) as peer:
            assert exactly(peer, 5) == b"early"


def test_a_log_goes_on_where_the_daemon_before_left_it(daemon: StartDaemon, folder: Path) -> None:
    """A file that is there already is written on at its end."""
    for number in (1, 2):
        running = daemon("unix", 1, "--log-file", str(folder / "log"))
        with boot(running) as console:
            console.write(b"again")
        running.close()
        logged(running, number * b"again")


def test_a_port_that_comes_and_goes_has_a_log(daemon: StartDaemon, folder: Path) -> None:
    """What its guest wrote is all there when it is removed, and once when it comes back."""
    running = daemon("unix", 1, "--max-ports", "2")
    table = f"name=x,console,backend=unix,path={folder}/x,log={folder}/x.log"
    with boot(running, queue_count=6) as console:
        for text in (b"here", b"herehere"):
            said = command(folder, "port", "add", "c.sock0", table)
            assert said.returncode == 0, said.stderr
            console.wait_until(lambda: 1 in console.ports and console.ports[1].is_console, "port 1")
            console.ports[1].write(b"here")
            assert command(folder, "port", "remove", "c.sock0", "x").returncode == 0
            logged(running, text, "x.log")
            console.wait_until(lambda: 1 not in console.ports, "port 1 stays")


# Files


def test_full_logs_are_rotated_and_nothing_is_lost_between_them(
    daemon: StartDaemon, folder: Path
) -> None:
    """All files together are what the guest wrote, and none is smaller than it should be."""
    running = daemon(
        "unix",
        1,
        *("--log-file", str(folder / "log")),
        *("--log-max-bytes", "65536", "--log-keep", "99"),
    )
    data = numbered(4 * MIB)
    with boot(running) as console:
        for start in range(0, len(data), MIB // 8):
            console.write(data[start : start + MIB // 8], depth=16)
            until(lambda: small(folder / "log0"), "it is never rotated")
    sizes = [path.stat().st_size for path in folder.glob("log0.*[0-9]")]
    assert len(sizes) >= 32
    assert min(sizes) >= 65536
    assert_same(in_order(folder), data)


def test_a_log_that_was_renamed_is_opened_anew_on_demand(daemon: StartDaemon, folder: Path) -> None:
    """SIGUSR1: once its worker has the new file, nothing goes to the one that was renamed."""
    running = daemon("unix", 1, "--log-file", str(folder / "log"))
    with boot(running) as console:
        for number in range(3):
            console.write(b"%d before\n" % number)
            (folder / "log0").rename(folder / f"log0.{9 - number}")
            console.write(b"%d renamed\n" % number)
            running.signal(signal.SIGUSR1)
            until((folder / "log0").exists, "it is not there again")
        ends = 0
        while not (folder / "log0").stat().st_size:
            console.write(b"end\n")
            ends += 1
    text = b"".join(b"%d before\n%d renamed\n" % (number, number) for number in range(3))
    until(lambda: in_order(folder) == text + ends * b"end\n", "the files are not all of it")


def test_a_folder_that_is_not_there_is_one_line(folder: Path) -> None:
    """The daemon does not start, and says what is wrong."""
    said = command(folder, "-s", f"{folder}/c", "-b", "unix", "--log-file", f"{folder}/no/log")
    assert said.returncode == 2
    assert said.stderr.endswith(
        "vhost-device-console: error: cannot write log "
        f"{folder}/no/log0: folder {folder}/no does not exist\n"
    )


def test_another_daemon_s_log_is_refused(daemon: StartDaemon, folder: Path) -> None:
    """Two writers would mix up what they write."""
    daemon("unix", 1, "--log-file", str(folder / "log"))
    said = command(folder, "-s", f"{folder}/d", "-b", "unix", "--log-file", f"{folder}/log")
    assert said.returncode == 2
    assert said.stderr.endswith("log0: another port or daemon writes it\n")


# Disks


def test_nobody_waits_for_a_full_disk(daemon: StartDaemon, folder: Path) -> None:
    """The log goes on where it was; what is lost meanwhile stands in it, and is counted."""
    running = daemon("unix", 1, "--log-file", str(folder / "log"))
    (worker,) = running.workers()
    data = numbered(4 * MIB)
    with boot(running) as console:
        console.write(data[:MIB], depth=16)
        logged(running, data[:MIB])
        with full_disk(worker, MIB + 1000):
            console.write(data[MIB:], depth=16)
            running.expect_log("log0 cannot be written, tried again every second: file too large")
            wait_port(running, log_failing=True)
        running.expect_log("log0 is written again")
    wait_port(running, log_failing=False, missed=2 * MIB - 1000)
    text = (folder / "log0").read_bytes()
    gap = MARKER.search(text)
    assert gap is not None
    assert_same(text[: gap.start()], data[: MIB + 1000])
    assert int(gap[1]) == 2 * MIB - 1000
    assert_same(text[gap.end() :], data[3 * MIB :])


def test_a_disk_that_is_full_for_a_moment_costs_nothing(daemon: StartDaemon, folder: Path) -> None:
    """A write that stops in the middle is continued at the right byte."""
    running = daemon("unix", 1, "--log-file", str(folder / "log"))
    (worker,) = running.workers()
    data = numbered(MIB)
    with boot(running) as console:
        with full_disk(worker, 12345):
            console.write(data, chunk=32768, depth=16)
            running.expect_log("cannot be written")
        logged(running, data)
    assert port_of(running)["missed"] == 0


# Workers


def wait_successor(served: Daemon, worker: int) -> None:
    """Wait until another worker than this one serves."""
    served.until(
        lambda guests: guests[0]["state"] == "running" and guests[0]["worker"] != worker,
        "its worker is the old one",
    )


#: Bytes in buffers that are under way when a worker is killed.
AT_ONCE = 48 * 4096


def write_amid_deaths(served: Daemon, console: ConsoleDriver, data: bytes) -> None:
    """Have the guest write `data`, and a worker killed for each AT_ONCE of it."""
    for start in range(0, len(data), AT_ONCE):
        (worker,) = served.workers()
        for at in range(start, start + AT_ONCE, 4096):
            console.port.submit(data[at : at + 4096])
        os.kill(worker, signal.SIGKILL)
        console.port.flush()
        wait_successor(served, worker)
    wait_port(served, output=len(data))


def test_a_worker_that_is_killed_leaves_no_trace_in_a_log(
    daemon: StartDaemon, folder: Path
) -> None:
    """Six are killed with buffers under way, and another file is begun all the time."""
    running = daemon(
        "unix",
        1,
        *("--log-file", str(folder / "log")),
        *("--log-max-bytes", "65536", "--log-keep", "99"),
    )
    data = numbered(6 * AT_ONCE)
    with boot(running) as console:
        write_amid_deaths(running, console, data)
        until(lambda: len(in_order(folder)) >= len(data), "the logs are too short")
    assert_same(in_order(folder), data)


# Lines, old files, times

STAMP = re.compile(rb"(?m)^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z ")


def plain(form: str, text: bytes) -> bytes:
    """Return the output of which a log in that format is."""
    if form == "timestamps":
        return STAMP.sub(b"", text)
    return b"".join(json.loads(line)["text"].encode() for line in text.splitlines())


def all_of(folder: Path, form: str) -> bytes:
    """Return the output in all files of log0, oldest first; that of half a file when one moves."""
    parts = []
    for name, _ in archive.files(str(folder / "log0")):
        with suppress(FileNotFoundError):
            data = Path(name).read_bytes()
            parts.append(plain(form, gzip.decompress(data) if name.endswith(".gz") else data))
    return b"".join(parts)


@pytest.mark.parametrize("form", ["timestamps", "json"])
def test_a_worker_that_is_killed_leaves_no_trace_in_lines(
    daemon: StartDaemon, folder: Path, form: str
) -> None:
    """With buffers under way, and another file begun all the time, which is compressed."""
    running = daemon(
        "unix",
        1,
        *("--log-file", str(folder / "log"), "--log-format", form, "--log-compress"),
        *("--log-max-bytes", "65536", "--log-keep", "99"),
    )
    data = numbered(4 * AT_ONCE)
    with boot(running) as console:
        write_amid_deaths(running, console, data)
        until(lambda: len(all_of(folder, form)) >= len(data), "the logs are too short")
        until(lambda: [*folder.glob("log0.*.gz")], "none is ever compressed")
    assert_same(all_of(folder, form), data)


def test_old_files_are_compressed_and_kept_within_a_total(
    daemon: StartDaemon, folder: Path
) -> None:
    """What is left of them is the end of what the guest wrote, without a gap."""
    running = daemon(
        "unix",
        1,
        *("--log-file", str(folder / "log"), "--log-compress", "--no-log-times"),
        *("--log-max-bytes", "65536", "--log-total-bytes", "600000"),
    )
    data = noise(2 * MIB)
    with boot(running) as console:
        for start in range(0, len(data), MIB // 16):
            console.write(data[start : start + MIB // 16], depth=16)
            until(lambda: small(folder / "log0"), "it is never rotated")
        console.write(b"the end")
        until(lambda: (folder / "log0").read_bytes().endswith(b"the end"), "it is not written")

        def settled() -> bool:
            old = [name for name, _ in archive.files(str(folder / "log0"))][:-1]
            return all(name.endswith(".gz") for name in old)

        until(settled, "not all are compressed")
        names = [name for name, _ in archive.files(str(folder / "log0"))]
        assert sum(os.stat(name).st_size for name in names) <= 600000
        kept = b"".join(
            gzip.decompress(Path(name).read_bytes())
            if name.endswith(".gz")
            else Path(name).read_bytes()
            for name in names
        )
        assert len(kept) > 200000
        assert_same(kept, (data + b"the end")[-len(kept) :])


def test_another_file_is_begun_as_time_goes_by(daemon: StartDaemon, folder: Path) -> None:
    """Each second, of a guest that writes once and is quiet after that."""
    running = daemon("unix", 1, *("--log-file", str(folder / "log"), "--log-max-age", "1s"))
    with boot(running) as console:
        console.write(b"first")
        until((folder / "log0.1").exists, "it is never too old")
        until(lambda: in_order(folder) == b"first", "it is not all there")
        console.write(b"second")
        until((folder / "log0.2").exists, "it is never too old")
    assert in_order(folder) == b"firstsecond"


def test_what_cannot_be_begun_anew_now_is_tried_again_and_not_all_the_time(
    daemon: StartDaemon, folder: Path
) -> None:
    hindrance = folder / "log0.new"
    hindrance.mkdir()
    running = daemon("unix", 1, *("--log-file", str(folder / "log"), "--log-max-age", "1s"))
    process = psutil.Process(running.pid)
    with boot(running) as console:
        console.write(b"first")
        running.expect_log("log0 cannot be rotated")
        before = sum(process.cpu_times()[:2])
        assert running.process.stderr is not None
        # Nothing can be waited for here: the claim is that next to nothing happens.
        assert not select.select([running.process.stderr.fileno()], [], [], 1.0)[0]
        assert sum(process.cpu_times()[:2]) - before < 0.3
        hindrance.rmdir()
        until((folder / "log0.1").exists, "it is not tried again")


def test_the_index_says_when_output_came(daemon: StartDaemon, folder: Path) -> None:
    """And where it is in the journal, also when its worker was killed soon after that."""
    running = daemon("unix", 1, "--log-file", str(folder / "log"))
    index = folder / "log0.times"
    begun = time.time_ns()
    with boot(running) as console:
        console.write(b"one")
        logged(running, b"one")
        running.kill_worker()
        until(lambda: index.exists() and index.stat().st_size == 32, "there is no entry")
        size, journal, offset, at = struct.unpack("<4Q", index.read_bytes())
        assert (size, offset) == (0, 0)
        assert journal
        assert begun <= at <= time.time_ns()


def test_tail_follows_a_log_into_each_of_its_files(daemon: StartDaemon, folder: Path) -> None:
    """What `tail -F` prints is what the guest wrote, if no file goes between two of its looks.

    It looks every 10 ms: with inotify it may miss what comes just before it watches a new file.
    """
    running = daemon(
        "unix",
        1,
        *("--log-file", str(folder / "log"), "--log-compress", "--log-max-bytes", "4096"),
    )
    data = numbered(60 * 2048)
    (folder / "log0").touch()
    with (
        boot(running) as console,
        subprocess.Popen(
            ["tail", "-n", "+1", "-s", "0.01", "---disable-inotify", "-F", folder / "log0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as tail,
    ):
        assert tail.stdout is not None
        try:
            seen = b""
            for start in range(0, len(data), 2048):
                console.write(data[start : start + 2048])
                while len(seen) < start + 2048:
                    deadline = time.monotonic() + WITHIN
                    wait_readable(tail.stdout.fileno(), deadline, "tail has not got so far")
                    seen += os.read(tail.stdout.fileno(), 65536)
        finally:
            tail.kill()
    assert_same(seen, data)
    assert len([*archive.files(str(folder / "log0"))]) > 2


# Another configuration


def configure(folder: Path, *lines: str) -> str:
    """Write a configuration whose port has these keys too, and return its path."""
    (folder / "c.toml").write_text(
        f'[[guest]]\nsocket = "{folder}/c.sock0"\n[[guest.port]]\nname = "c"\nconsole = true\n'
        f'backend = "unix"\npath = "{folder}/c.data"\n' + "\n".join(lines)
    )
    return str(folder / "c.toml")


@pytest.fixture
def configured(folder: Path) -> Iterator[Daemon]:
    """Give a daemon with a configuration file, and a log at `log0`."""
    config = configure(folder, f'log = "{folder}/log0"')
    with Daemon(folder, None, 0, "--config", config, socket_path=None) as served:
        served.sockets = [f"{folder}/c.sock0"]
        yield served


def reload(served: Daemon) -> None:
    """Have a daemon begin anew, with another worker."""
    (worker,) = served.workers()
    served.signal(signal.SIGHUP)
    wait_successor(served, worker)


def test_a_reload_leaves_no_trace_in_a_log(configured: Daemon) -> None:
    """What comes before, meanwhile and after is in the file once."""
    data = numbered(MIB)
    with boot(configured) as console:
        for start in range(0, MIB, MIB // 4):
            for at in range(start, start + MIB // 8, 4096):
                console.port.submit(data[at : at + 4096])
            reload(configured)
            console.write(data[start + MIB // 8 : start + MIB // 4], depth=16)
        logged(configured, data)


def test_a_log_goes_on_at_another_path(configured: Daemon) -> None:
    """Both files together are what the guest wrote."""
    with boot(configured) as console:
        console.write(b"before")
        logged(configured, b"before")
        configure(configured.folder, f'log = "{configured.folder}/other"')
        reload(configured)
        console.write(b"after")
        logged(configured, b"after", "other")
        assert port_of(configured)["log"] == f"{configured.folder}/other"
    logged(configured, b"before")


@pytest.mark.parametrize("again", ["log0", "other"])
def test_a_log_that_is_dropped_and_comes_back_repeats_nothing(
    configured: Daemon, again: str
) -> None:
    """It goes on where it was, with what the journal kept meanwhile."""
    with boot(configured) as console:
        console.write(b"with ")
        logged(configured, b"with ")
        configure(configured.folder)
        reload(configured)
        console.write(b"without ")
        assert port_of(configured)["log"] is None
        configure(configured.folder, f'log = "{configured.folder}/{again}"')
        reload(configured)
        console.write(b"again")
        logged(configured, b"with without again"[0 if again == "log0" else 5 :], again)


def test_a_log_that_cannot_be_opened_ends_no_daemon(configured: Daemon) -> None:
    """A reload that brings one says so; its guest goes on, and the next reload brings it."""
    folder = configured.folder
    with boot(configured) as console:
        console.write(b"first ")
        logged(configured, b"first ")
        configure(folder)
        reload(configured)
        configure(folder, f'log = "{folder}/new/log"')
        reload(configured)
        configured.expect_log(f"cannot write log {folder}/new/log: folder {folder}/new does not")
        wait_port(configured, log=f"{folder}/new/log", log_failing=True)
        console.write(b"second ")
        (folder / "new").mkdir()
        reload(configured)
        console.write(b"third")
        logged(configured, b"second third", "new/log")
        wait_port(configured, log_failing=False)
