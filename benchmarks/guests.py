"""Measure what real guests print: `python benchmarks/guests.py`.

Guests of User Mode Linux and of QEMU run `dd` to the virtio console (hvc0) and to a generic port.
They are driven over another console, so that what arrives is dd's bytes alone; each is compared.
QEMU's own console device, in its process and on a chardev socket, is a side of its own, and so is
this daemon with packed rings.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "guests")]

from console import PROMPT, Console  # noqa: E402
from vhost_device_console import monitor  # noqa: E402
from vhost_device_console.errors import ConsoleError  # noqa: E402

from launch import Ports  # noqa: E402

Record = dict[str, float | str]
Cells = dict[str, dict[str, list[Record]]]

#: A side's program, what its environment has besides this one's, and options.
Program = tuple[str, dict[str, str], *tuple[str, ...]]

#: The side that is QEMU's own device, and needs no daemon.
VIRTCONSOLE = "virtconsole"

#: The Rust daemon, which has no generic port.
PEER = "peer"

#: Bytes that dd writes, before and while it is measured; a side that would take longer than
#: LONGEST seconds for them writes fewer.
WARM_UP = 1 << 19
BYTES = 8 << 20
LONGEST = 10.0

#: What is measured: a cell's name, the device in the guest, and dd's block size: a page, as hvc
#: takes it, and the most that a generic port takes at once.
TARGETS = (("hvc0", "/dev/hvc0", 4096), ("port", "/dev/virtio-ports/data", 32768))

#: A side that failed this often with a kind of guest is not tried there again.
MOST_FAILURES = 2

#: Seconds for which nothing may arrive, and for a daemon to come up.
PATIENCE = 30.0

#: A worker tells the monitor its counters, these among them, within this many seconds.
COUNTED = 0.3
COUNTERS = ("kicks", "calls", "chains")

_PATTERN = "".join(f"{number}\n" for number in range(1, 200000)).encode()[: 1 << 20] * 8
_PREPARE = (
    b"dmesg -n 1; stty raw < /dev/hvc0; seq 199999 | head -c 1048576 > f;"
    b" cat f f f f f f f f > /pattern"
)
_MEASURE = (
    b"m() { head -n 1 /proc/stat; time dd if=/pattern of=$1 bs=$2 count=$3; head -n 1 /proc/stat; }"
)


class GuestError(Exception):
    """A measurement failed; the message says how in a line."""


@dataclass(frozen=True)
class Place:
    """Where a guest's console is: a daemon's `socket`, or, for QEMU's own, our TCP `ports`.

    `folder` is for what the guest keeps; `control` is a descriptor for its other console.
    """

    folder: Path
    control: int
    socket: str = ""
    targets: int = len(TARGETS)
    ports: tuple[int, ...] = ()


def _uml(folder: Path, place: Place) -> list[str | Path]:
    return [
        *(folder / "boot", place.socket, f"uml_dir={place.folder}/uml/"),
        *(f"con1=fd:{place.control},fd:{place.control}", _shell_on("tty1")),
    ]


def _qemu(folder: Path, place: Place) -> list[str | Path]:
    options: list[str | Path] = [
        *("-name", "guest,debug-threads=on"),
        *("-chardev", f"socket,id=control,fd={place.control}", "-serial", "chardev:control"),
    ]
    shell = _shell_on("ttyS1")
    if place.socket:
        queues = f"vhost-user-test-device-pci.num_vqs={2 * place.targets + 2}"
        return [folder / "boot", place.socket, shell, "--", "-global", queues, *options]
    options += ["-device", "virtio-serial-pci"]
    for device, name, port in zip(
        ("virtconsole", "virtserialport"), ("console", "data"), place.ports, strict=True
    ):
        options += ["-chardev", f"socket,id={name},host=127.0.0.1,port={port}"]
        options += ["-device", f"{device},chardev={name},name={name}"]
    return [  # the machine that contrib/guest/boot-qemu makes
        *(folder / "qemu", "-machine", "q35,memory-backend=memory", "-accel", "tcg"),
        *("-object", "memory-backend-memfd,id=memory,size=256M,share=on"),
        *("-cpu", "max", "-m", "256", "-nodefaults", "-display", "none", "-serial", "stdio"),
        *("-kernel", folder / "vmlinuz", "-initrd", folder / "initramfs"),
        *("-append", f"console=ttyS0 console=hvc0 rdinit=/init {shell}", *options),
    ]


def _shell_on(tty: str) -> str:
    return f"vdc.run=exec sh </dev/{tty} >/dev/{tty} 2>&1"


@dataclass(frozen=True)
class Kind:
    """A kind of guest: its folder under `build`, its command, its thread that runs the guest."""

    name: str
    folders: tuple[str, ...]
    command: Callable[[Path, Place], list[str | Path]]
    thread: str
    own_device: bool = False

    def folder(self, build: Path) -> Path | None:
        """Return where `contrib/guest/fetch` put it, or None."""
        places = [build / folder for folder in self.folders]
        return next((place for place in places if (place / "version").exists()), None)


KINDS = (
    # The Rust daemon works with this kernel only, and the suite of it is the newest.
    Kind("uml", ("guest/sid", "guest/trixie", "guest/bookworm"), _uml, ""),
    Kind("qemu", ("guest-qemu",), _qemu, "CPU 0/TCG", own_device=True),
)


def _cpu_seconds(process: psutil.Process, thread: str = "") -> float:
    """Return the CPU time of a process's threads, or of those called `thread`, exactly."""
    nanoseconds = 0
    for task in Path(f"/proc/{process.pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):
            if thread in ("", (task / "comm").read_text().strip()):
                nanoseconds += int((task / "schedstat").read_text().split()[0])
    return nanoseconds / 1e9


def _family(pid: int) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        first = psutil.Process(pid)
        return [first, *first.children(recursive=True)]
    return []


@contextmanager
def _running(command: Sequence[str | Path], log: Path, **popen: object) -> Iterator[int]:
    """Run a process of a session of its own, and end all of that; gives its id."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            **popen,  # type: ignore[call-overload]
        )
    try:
        yield process.pid
    finally:
        family = _family(process.pid)
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()  # psutil compares the start time: never a stranger with the same id
        process.wait(PATIENCE)


def _help(program: str) -> str:
    return subprocess.run(
        [program, "--help"], capture_output=True, text=True, timeout=PATIENCE, check=False
    ).stdout


def _last_words(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "; ".join(line.strip() for line in lines[-2:])


def _connect(port: int, pid: int, log: Path) -> socket.socket:
    """Return a connection to the daemon's `port`, once it listens."""
    deadline = time.monotonic() + PATIENCE
    while True:
        with suppress(ConnectionRefusedError):
            return socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
        if time.monotonic() > deadline or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            raise GuestError(f"the daemon does not listen: {_last_words(log)}")
        time.sleep(0.02)


class Guest:
    """A guest at its prompt: its consoles' other ends, and the processes that make it."""

    def __init__(self, kind: Kind, ends: ExitStack, folder: Path) -> None:
        self._kind = kind
        self._ends = ends
        self._folder = folder
        self._buffer = bytearray(1 << 20)
        self._daemon: int | None = None
        self._readers: list[socket.socket] = []

    def start_daemon(self, program: Program, ports: int) -> str:
        """Start a daemon with readers at its console and generic port; return its socket."""
        path, environment, *options = program
        run = self._folder / "run"
        run.mkdir(mode=0o700)
        tcp = Ports()
        self._ends.callback(tcp.close)
        first = tcp(ports)
        command = [path, "-s", f"{self._folder}/s", "-b", "network", "-p", str(first)]
        command += options
        if "--max-queue-size" in _help(path):
            command += ["-q", "256"]  # what User Mode Linux wants, and more than the peer's default
        if ports > 1:
            command += ["--port", f"name=data,backend=network,tcp-port={first + 1}"]
        log = self._folder / "daemon.log"
        environment = {**os.environ, **environment, "RUNTIME_DIRECTORY": str(run)}
        self._daemon = self._ends.enter_context(_running(command, log, env=environment))
        for port in range(first, first + ports):
            reader = self._ends.enter_context(_connect(port, self._daemon, log))
            self._readers.append(reader)
        return f"{self._folder}/s0"

    def boot(self, folder: Path, where: str) -> None:
        """Boot it on a daemon's socket, or, without one, with QEMU's own devices."""
        ours, theirs = socket.socketpair()
        self._ends.enter_context(ours)
        listeners = []
        if not where:
            for _ in TARGETS:
                listener = self._ends.enter_context(socket.create_server(("127.0.0.1", 0)))
                listener.settimeout(PATIENCE)
                listeners.append(listener)
        ports = tuple(listener.getsockname()[1] for listener in listeners)
        place = Place(
            self._folder, theirs.fileno(), where, len(self._readers) or len(TARGETS), ports
        )
        log = self._folder / "guest.log"
        with theirs:
            self._pid = self._ends.enter_context(
                _running(self._kind.command(folder, place), log, pass_fds=[theirs.fileno()])
            )
        try:
            for listener in listeners:
                reader, _ = listener.accept()
                reader.settimeout(PATIENCE)
                self._readers.append(self._ends.enter_context(reader))
            self._shell = Console(ours.fileno())
            self._shell.until(PROMPT)
            self._shell.run(_PREPARE)
            self._shell.run(_MEASURE)
        except (OSError, EOFError):
            said = [_last_words(self._folder / name) for name in ("guest.log", "daemon.log")]
            raise GuestError(
                f"the guest does not come up: {'; '.join(filter(None, said))}"
            ) from None

    def measure(self, index: int) -> Record:
        """Have the guest write to TARGETS[index], and return what that took."""
        _, device, block = TARGETS[index]
        reader = self._readers[index]
        self._shell.run(f"until [ -e {device} ]; do usleep 1000; done".encode())
        # On hvc0, the boot log comes first.
        self._shell.run(f"echo be'g'in > {device}".encode())
        said = b""
        while not said.endswith(b"begin\n"):
            said += reader.recv(1 << 16)
        rate = float(self._write(device, block, WARM_UP, reader)["mb_s"])
        size = BYTES
        while size > 1 << 20 and size / rate > LONGEST * 1e6:
            size >>= 1
        return self._write(device, block, size, reader)

    def _write(self, device: str, block: int, size: int, reader: socket.socket) -> Record:
        before = self._used()
        self._shell.send(f"m {device} {block} {size // block}\n".encode())
        received = bytearray(reader.recv(4096))
        first, early = time.perf_counter(), len(received)
        while len(received) < size:
            count = reader.recv_into(self._buffer)
            if not count:
                raise GuestError("the daemon has hung up")
            received += memoryview(self._buffer)[:count]
        arrived = time.perf_counter() - first
        said = self._shell.until(PROMPT).decode(errors="replace")
        after = self._used()
        if received != _PATTERN[:size]:
            raise GuestError(f"other bytes than dd's {size} arrived")

        times = [
            60 * int(minutes) + float(rest)
            for minutes, rest in re.findall(r"(?:real|user|sys)\s+(\d+)m ([0-9.]+)s", said)
        ]
        ticks = [list(map(int, line.split())) for line in re.findall(r"cpu  (.*)", said)]
        if len(times) != 3 or len(ticks) != 2:
            raise GuestError(f"the guest said {said!r}")
        spent = [late - early for early, late in zip(*ticks, strict=True)]
        # dd may be done while its last buffers are still queued, and before the first byte is here.
        seconds = max(arrived * size / (size - early), times[0])
        record: Record = {
            "bytes": size,
            "seconds": seconds,
            "mb_s": size / seconds / 1e6,
            "dd_s": times[0],
            "guest_cpu_s": times[1] + times[2],
            # Not idle (4th) and not waiting (5th), proc_stat(5).
            "guest_busy_s": (sum(spent[:8]) - spent[3] - spent[4]) / 100,
        }
        record |= {name: after[name] - used for name, used in before.items()}
        return record

    def _used(self) -> dict[str, float]:
        """Return what was used up so far: CPU seconds here, and our daemon's counters."""
        machine, daemon = _family(self._pid), _family(self._daemon) if self._daemon else []
        used = {
            "vcpu_s": _cpu_seconds(machine[0], self._kind.thread),
            "machine_cpu_s": sum(map(_cpu_seconds, machine)),
            "daemon_cpu_s": sum(map(_cpu_seconds, daemon)),
        }
        if path := next((self._folder / "run").glob("*.sock"), None):
            counters: dict[str, float] = {}
            before = {"chains": -1.0}
            while counters != before:
                before = counters
                time.sleep(COUNTED)
                with suppress(ConsoleError):
                    guest = monitor.ask(str(path)).guests[0]
                    counters = {name: getattr(guest, name) for name in COUNTERS}
            used |= counters
        return used


def _measure_side(kind: Kind, build: Path, program: Program | None, targets: int) -> list[Record]:
    """Return a record for each of the first `targets` of TARGETS; an error if it failed."""
    records: list[Record] = []
    try:
        folder = kind.folder(build)
        if folder is None:
            raise GuestError(f"no {kind.name} guest: run contrib/guest/fetch --all")
        with ExitStack() as ends:
            scratch = ends.enter_context(tempfile.TemporaryDirectory(prefix="vdc", dir="/tmp"))
            guest = Guest(kind, ends, Path(scratch))
            guest.boot(folder, guest.start_daemon(program, targets) if program else "")
            for index in range(targets):
                records.append(guest.measure(index))
    except (GuestError, OSError, EOFError, psutil.Error) as error:
        missing = targets - len(records)
        records += [{"error": str(error) or type(error).__name__}] * missing
    return records


def measure(programs: dict[str, Program], build: Path, rounds: int) -> Cells:
    """Return `cells[name][side]`: a record a round, the sides in turn, a fresh guest each.

    `build` is where `contrib/guest/fetch` put guests. A record has `seconds` from dd's beginning
    until its last byte is here, `mb_s` and `bytes`; CPU time: `guest_cpu_s` (dd's, as the guest
    says), `guest_busy_s` (all of the guest's, as it says; it does not notice all of what it spends
    with interrupts off), `vcpu_s` (the thread that runs it, of User Mode Linux the kernel, as
    this machine says), `machine_cpu_s` (with QEMU's other threads and the guest's processes) and
    `daemon_cpu_s`; of our daemon also `kicks`, `calls` and `chains`; or `error`.
    """
    cells: Cells = {}
    failures: Counter[tuple[str, str]] = Counter()
    affinity = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))  # a guest is not bound to one CPU
    try:
        for _ in range(rounds):
            for kind in KINDS:
                sides: dict[str, Program | None] = dict(programs)
                if kind.own_device:
                    sides[VIRTCONSOLE] = None
                for side, program in sides.items():
                    if failures[kind.name, side] == MOST_FAILURES:
                        continue
                    records = _measure_side(kind, build, program, 1 if side == PEER else 2)
                    failures[kind.name, side] += any("error" in record for record in records)
                    for (target, *_), record in zip(TARGETS, records, strict=False):
                        cell = cells.setdefault(f"{kind.name} {target}", {})
                        cell.setdefault(side, []).append(record)
    finally:
        os.sched_setaffinity(0, affinity)
    return cells


def _table(cells: Cells) -> Iterator[str]:
    """Yield the lines of a Markdown table of medians."""
    columns = {
        "MB/s": "mb_s",
        "dd in the guest: CPU s": "guest_cpu_s",
        "the guest: CPU s": "guest_busy_s",
        "its vCPU: s": "vcpu_s",
        "its processes: s": "machine_cpu_s",
        "daemon: s": "daemon_cpu_s",
        "kicks": "kicks",
        "calls": "calls",
        "chains": "chains",
        "MiB": "bytes",
    }
    yield f"| | {' | '.join(columns)} |"
    yield f"| --- |{' --- |' * len(columns)}"
    for cell, sides in cells.items():
        for side, records in sides.items():
            good = [record for record in records if "error" not in record]
            if errors := [str(record["error"]) for record in records if "error" in record]:
                yield f"| {cell}, {side}: {len(errors)} failed: {errors[-1]} |"
            row = [f"{cell}, {side}"]
            for key in columns.values() if good else ():
                values = [float(record[key]) for record in good if key in record]
                scale = 1 << 20 if key == "bytes" else 1
                row.append(f"{median(values) / scale:.3g}" if values else "")
            if good:
                yield f"| {' | '.join(row)} |"


def main() -> int:
    """Measure what the command line names and print a table."""
    from daemons import BenchmarkError, find_ours, find_peer

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", help="the Rust daemon's program")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # not without ending the guests
    build = ROOT / "build"
    try:
        ours = find_ours()
        programs: dict[str, Program] = {"ours": (ours, {}), "packed": (ours, {}, "--packed")}
        if peer := find_peer(given.peer, build / "bench"):
            programs[PEER] = (peer, {})
    except BenchmarkError as error:
        print(error, file=sys.stderr)
        return 1
    for line in _table(measure(programs, build, given.rounds)):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
