"""The daemons under measurement: starting, watching and ending them."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

PEER_CRATE = "vhost-device-console"

#: The largest time, in seconds, for a daemon to listen or to end.
PATIENCE = 30.0

_MIB = 1 << 20
_FIRST_PORT, _LAST_PORT = 20000, 32000


class BenchmarkError(Exception):
    """The benchmark cannot run; the message says why and what to do."""


def find_ours() -> str:
    """Return the daemon of the environment that runs this. Raises BenchmarkError without one."""
    path = Path(sysconfig.get_path("scripts")) / "vhost-device-console"
    if not path.exists():
        raise BenchmarkError(
            "vhost-device-console is not installed in this Python environment: "
            "`pip install -e .` first"
        )
    return str(path)


def find_peer(given: str | None, build: Path) -> str | None:
    """Return the Rust peer's program, installing it under `build` if need be, or None.

    Looked for in turn: `given`, $VDC_PEER, what an earlier run installed, cargo. Raises
    BenchmarkError when the one that was named does not exist.
    """
    named = given or os.environ.get("VDC_PEER")
    if named:
        if shutil.which(named) is None:
            raise BenchmarkError(f"the peer {named} is not a program: check --peer or $VDC_PEER")
        return named
    installed = build / "peer" / "bin" / PEER_CRATE
    if not installed.exists():
        cargo = shutil.which("cargo")
        if cargo is None:
            return None
        print("installing the peer with cargo; this takes a minute, once", flush=True)
        with (build / "peer.log").open("wb") as log, contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(
                [cargo, "install", PEER_CRATE, "--root", str(build / "peer")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                timeout=600,
                check=False,
            )
    return str(installed) if installed.exists() else None


def version(program: str) -> str:
    """Return what `program --version` says, its last word."""
    said = subprocess.run(
        [program, "--version"], capture_output=True, text=True, timeout=PATIENCE, check=False
    ).stdout.split()
    return said[-1] if said else "unknown"


def _tcp_ports(*, listening: bool) -> set[int]:
    """Return the local ports in use, or only those that listen."""
    return {
        connection.laddr[1]
        for connection in psutil.net_connections("tcp4")
        if connection.laddr and (not listening or connection.status == psutil.CONN_LISTEN)
    }


class _Ports:
    """Ranges of TCP ports, each used once, since a closed one lingers."""

    def __init__(self) -> None:
        self._next = _FIRST_PORT + os.getpid() % 1000 * 8

    def take(self, count: int) -> int:
        """Return the first of `count` consecutive ports that nobody uses."""
        while True:
            first, self._next = self._next, self._next + count
            if self._next > _LAST_PORT:
                first, self._next = _FIRST_PORT, _FIRST_PORT + count
            if _tcp_ports(listening=False).isdisjoint(range(first, first + count)):
                return first


_ports = _Ports()


def _listening_sockets() -> set[str]:
    """Return the paths of the unix sockets that listen (flag __SO_ACCEPTCON, unix(7))."""
    lines = Path("/proc/net/unix").read_text(errors="replace").splitlines()[1:]
    rows = [line.split(maxsplit=7) for line in lines]
    return {row[7] for row in rows if len(row) > 7 and int(row[3], 16) & 0x10000}


@dataclass(frozen=True)
class Activity:
    """What a daemon's threads have done so far: seconds on a CPU and context switches."""

    cpu_s: float
    switches: int


@dataclass(frozen=True)
class Memory:
    """A daemon's memory in MiB.

    `pss` is the sum over its processes. That is lower while strangers map the same files (any
    other Python), so `alone` is the same with each file's resident pages counted once and in full.
    """

    pss: float
    alone: float


class Daemon:
    """A running daemon: `socket` is the prefix of its vhost-user sockets, `port` its first port."""

    def __init__(self, process: subprocess.Popen[bytes], socket: str, port: int, log: Path) -> None:
        self.socket = socket
        self.port = port
        self.log = log
        self._process = process

    def processes(self) -> list[psutil.Process]:
        """Return the daemon's process and all its descendants."""
        try:
            first = psutil.Process(self._process.pid)
            return [first, *first.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def cpu_seconds(self) -> dict[int, float]:
        """Return each process's CPU time, in the kernel's ticks, with threads that have ended."""
        times = {}
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                used = process.cpu_times()
                times[process.pid] = used.user + used.system
        return times

    def activity(self) -> Activity:
        """Return what the threads that live have done, in the scheduler's nanoseconds."""
        nanoseconds = switches = 0
        for process in self.processes():
            for thread in Path(f"/proc/{process.pid}/task").iterdir():
                nanoseconds += int((thread / "schedstat").read_text().split()[0])
                for line in (thread / "status").read_text().splitlines():
                    if "ctxt_switches:" in line:
                        switches += int(line.split()[1])
        return Activity(nanoseconds / 1e9, switches)

    def memory(self) -> Memory:
        """Return the memory of all the daemon's processes, guest memory they touched included."""
        pss = own = 0
        files: dict[str, int] = {}
        for process in self.processes():
            rollup = _fields(Path(f"/proc/{process.pid}/smaps_rollup").read_text())
            pss += rollup["Pss"]
            own += rollup["Pss"] - rollup["Pss_File"]
            mine: dict[str, int] = {}
            path = ""
            for line in (
                Path(f"/proc/{process.pid}/smaps").read_text("utf-8", "replace").splitlines()
            ):
                words = line.split()
                if "-" in words[0] and not words[0].endswith(":"):
                    path = words[5] if len(words) > 5 else ""
                elif words[0] == "Rss:":
                    resident = int(words[1])
                elif words[0] == "Anonymous:" and path.startswith("/") and "memfd:" not in path:
                    mine[path] = mine.get(path, 0) + resident - int(words[1])
            for path, size in mine.items():
                files[path] = max(files.get(path, 0), size)
        return Memory(pss * 1024 / _MIB, (own + sum(files.values())) * 1024 / _MIB)

    def last_words(self) -> str:
        """Return the end of what the daemon wrote to its terminal."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-5:])


def _fields(rollup: str) -> dict[str, int]:
    """Return a smaps_rollup's numbers, in KiB."""
    rows = [line.split() for line in rollup.splitlines()[1:]]
    return {row[0].rstrip(":"): int(row[1]) for row in rows}


@contextlib.contextmanager
def running(program: str, folder: Path, guests: int, cpu: int | None) -> Iterator[Daemon]:
    """Run `program` for `guests` guests on TCP ports, on CPU `cpu` alone if one is given.

    Ready to be connected to when the block begins, gone with all its processes when it ends.
    Raises BenchmarkError when it does not listen in time.
    """
    socket = str(folder / "con.sock")
    port = _ports.take(guests)
    command = [program, "-s", socket, "-c", str(guests), "-b", "network", "-p", str(port)]
    log = folder / "daemon.log"
    ours = os.sched_getaffinity(0)
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
    finally:
        os.sched_setaffinity(0, ours)
    daemon = Daemon(process, socket, port, log)
    try:
        _wait_until_listening(daemon, process, guests)
        _wait_until_at_rest(daemon)
        yield daemon
    finally:
        _end(daemon, process)
        for index in range(guests):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{socket}{index}")


def _wait_until_listening(daemon: Daemon, process: subprocess.Popen[bytes], guests: int) -> None:
    sockets = {f"{daemon.socket}{index}" for index in range(guests)}
    ports = set(range(daemon.port, daemon.port + guests))
    deadline = time.monotonic() + PATIENCE
    while not (sockets <= _listening_sockets() and ports <= _tcp_ports(listening=True)):
        if process.poll() is not None or time.monotonic() > deadline:
            raise BenchmarkError(f"the daemon does not listen: {daemon.last_words()}")
        time.sleep(0.02)


def _wait_until_at_rest(daemon: Daemon) -> None:
    """Wait until no process of the daemon's has run for a moment: its workers are then ready."""
    deadline = time.monotonic() + PATIENCE
    before: Activity | None = None
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            now = daemon.activity()
            if now == before:
                return
            before = now
        time.sleep(0.1)
    raise BenchmarkError("the daemon does not come to rest")


def _end(daemon: Daemon, process: subprocess.Popen[bytes]) -> None:
    family = daemon.processes()
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()  # psutil compares the start time: never a stranger with the same id
    process.wait(PATIENCE)
