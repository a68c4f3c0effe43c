"""The daemons under measurement: starting, watching and ending them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil

PEER_CRATE = "vhost-device-console"

#: The largest time, in seconds, for a daemon to listen or to end.
PATIENCE = 30.0

#: Where Linux' merging of equal pages is asked for and told about.
KSM = Path("/sys/kernel/mm/ksm")

#: What makes our daemon leave its compiled core alone.
PURE = {"VHOST_DEVICE_CONSOLE_PURE": "1"}

#: The distribution's Python, whose processes are smaller than those of most others.
DEBIAN = "/usr/bin/python3"

_ROOT = Path(__file__).resolve().parent.parent

_MIB = 1 << 20
_FIRST_PORT, _LAST_PORT = 20000, 32000


class BenchmarkError(Exception):
    """The benchmark cannot run; the message says why and what to do."""


class Side(NamedTuple):
    """A daemon to measure: its program, and what its environment has besides this one's."""

    program: str
    environment: dict[str, str]


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


def find_debian(build: Path) -> str | None:
    """Return our daemon installed for the distribution's own Python, under `build`, or None.

    None where there is no such Python, or where pip cannot install (why is then in `debian.log`).
    """
    if os.path.realpath(DEBIAN) == os.path.realpath(sys.executable):
        return find_ours()
    if not os.path.exists(DEBIAN):
        return None
    home, source = build / "debian", build / "source"
    # A copy, since an installation leaves files beside the sources, and takes along what is there.
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(
        _ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.c")
    )
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE*"):
        for path in _ROOT.glob(name):
            shutil.copy(path, source)
    python, constraints = home / "bin" / "python", _ROOT / "constraints.txt"
    commands = (
        f"{DEBIAN} -m venv --clear --without-pip {home}",
        f"{sys.executable} -m pip --python {python} install -c {constraints} {source}",
    )
    with (build / "debian.log").open("wb") as log:
        for command in commands:
            done = subprocess.run(
                command.split(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                timeout=300,
                check=False,
            )
            if done.returncode:
                return None
    return str(home / "bin" / "vhost-device-console")


def version(side: Side) -> str:
    """Return what `--version` says after the program's name."""
    done = subprocess.run(
        [side.program, "--version"],
        env=os.environ | side.environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    return done.stdout.strip().partition(" ")[2] or "unknown"


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
    """A daemon's memory in MiB, summed over its processes: PSS, and private dirty pages."""

    pss: float
    private: float


@dataclass(frozen=True)
class Daemon:
    """A running daemon: `socket` is the prefix of its vhost-user sockets, `port` its first port.

    `began` is the moment just before it was started, in seconds of the monotonic clock.
    """

    side: Side
    environment: dict[str, str]
    process: subprocess.Popen[bytes]
    began: float
    socket: str
    port: int
    log: Path

    def processes(self) -> list[psutil.Process]:
        """Return the daemon's process and all its descendants."""
        try:
            first = psutil.Process(self.process.pid)
            return [first, *first.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def cpu_seconds(self) -> dict[int, float]:
        """Return each process's CPU time."""
        times = {}
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess, OSError):
                used = process.cpu_times()
                # The first has the threads that have ended, the other is not in whole ticks.
                times[process.pid] = max(used.user + used.system, _activity(process.pid).cpu_s)
        return times

    def activity(self) -> Activity:
        """Return what all the threads that live have done."""
        each = [_activity(process.pid) for process in self.processes()]
        return Activity(sum(a.cpu_s for a in each), sum(a.switches for a in each))

    def memory(self) -> Memory:
        """Return the memory of all the daemon's processes, guest memory they touched included."""
        rollups = [
            _fields(Path(f"/proc/{process.pid}/smaps_rollup").read_text())
            for process in self.processes()
        ]
        return Memory(
            sum(each["Pss"] for each in rollups) / 1024,
            sum(each["Private_Dirty"] for each in rollups) / 1024,
        )

    def missed(self) -> int | None:
        """Return how many bytes it says that its readers missed; None if it does not count."""
        time.sleep(0.5)  # so that its workers have told it
        done = subprocess.run(
            [self.side.program, "status", "--json"],
            env=self.environment,
            capture_output=True,
            timeout=PATIENCE,
            check=False,
        )
        if done.returncode:
            return None
        guests = json.loads(done.stdout)["guests"]
        return sum(int(port["missed"]) for guest in guests for port in guest["ports"])

    def last_words(self) -> str:
        """Return the end of what the daemon wrote to its terminal."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-5:])


def _activity(pid: int) -> Activity:
    """Return what the living threads of a process have done, in the scheduler's nanoseconds."""
    nanoseconds = switches = 0
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # one that has just ended
            nanoseconds += int((thread / "schedstat").read_text().split()[0])
            for line in (thread / "status").read_text().splitlines():
                if "ctxt_switches:" in line:
                    switches += int(line.split()[1])
    return Activity(nanoseconds / 1e9, switches)


def _fields(rollup: str) -> dict[str, int]:
    """Return a smaps_rollup's numbers, in KiB."""
    rows = [line.split() for line in rollup.splitlines()[1:]]
    return {row[0].rstrip(":"): int(row[1]) for row in rows}


@contextlib.contextmanager
def merging() -> Iterator[None]:
    """Let the kernel merge equal pages (KSM) in the block, as its administrator could for good."""
    wanted = {"pages_to_scan": "5000", "run": "1"}
    before = {name: (KSM / name).read_text() for name in wanted}
    try:
        for name, value in wanted.items():
            (KSM / name).write_text(value)
        yield
    finally:
        for name, value in before.items():
            (KSM / name).write_text(value)


def wait_until_merged() -> None:
    """Wait until the kernel has looked at every page three times, from now on."""
    deadline = time.monotonic() + 2 * PATIENCE
    last = int((KSM / "full_scans").read_text()) + 4
    while int((KSM / "full_scans").read_text()) < last and time.monotonic() < deadline:
        time.sleep(0.1)


@contextlib.contextmanager
def on(cpus: set[int]) -> Iterator[None]:
    """Let what is started in the block run on `cpus`."""
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, mine)


@contextlib.contextmanager
def started(
    side: Side, folder: Path, guests: int, cpus: set[int], *options: str
) -> Iterator[Daemon]:
    """Start a daemon for `guests` guests with TCP ports, on `cpus`; wait for nothing.

    It is gone with all its processes when the block ends.
    """
    with tempfile.TemporaryDirectory(dir=folder) as home:
        socket, port, log = f"{home}/con.sock", _ports.take(guests), Path(home, "log")
        names = ("-s", socket, "-c", str(guests), "-b", "network", "-p", str(port), *options)
        # Its monitor socket lies there too, and is found there.
        environment = {**os.environ, **side.environment, "XDG_RUNTIME_DIR": home}
        with log.open("wb") as output, on(cpus):
            began = time.monotonic()
            process = subprocess.Popen(
                [side.program, *names],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        daemon = Daemon(side, environment, process, began, socket, port, log)
        try:
            yield daemon
        finally:
            _end(daemon)


@contextlib.contextmanager
def running(
    side: Side, folder: Path, guests: int, cpus: set[int], *options: str
) -> Iterator[Daemon]:
    """Start a daemon as `started` does, ready to be connected to when the block begins.

    Raises BenchmarkError when it does not listen in time.
    """
    with started(side, folder, guests, cpus, *options) as daemon:
        _wait_until_listening(daemon, guests)
        _wait_until_at_rest(daemon)
        yield daemon


def _wait_until_listening(daemon: Daemon, guests: int) -> None:
    sockets = {f"{daemon.socket}{index}" for index in range(guests)}
    ports = set(range(daemon.port, daemon.port + guests))
    deadline = time.monotonic() + PATIENCE
    while not (sockets <= _listening_sockets() and ports <= _tcp_ports(listening=True)):
        if daemon.process.poll() is not None or time.monotonic() > deadline:
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


def _end(daemon: Daemon) -> None:
    process, family = daemon.process, daemon.processes()
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()  # psutil compares the start time: never a stranger with the same id
    process.wait(PATIENCE)
