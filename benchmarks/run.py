"""Measure this console daemon and the Rust one side by side: `python benchmarks/run.py`.

README.md beside this file says what is measured and how; its table is written by this program.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

import guests
import report
from daemons import (
    PURE,
    BenchmarkError,
    Daemon,
    Side,
    find_debian,
    find_ours,
    find_peer,
    merging,
    running,
    started,
    version,
    wait_until_merged,
)
from rows import CURVES, FOOTPRINTS, Cells, Record

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent / "build" / "bench"
README = HERE / "README.md"

#: How long, in seconds, one workload may take beyond its measured time; 256 guests take a while.
GRACE = 20.0

#: A side that failed this often in a cell is not tried there again.
MOST_FAILURES = 2

#: Seconds in which no further round is begun, so that all of it, real guests too, takes 20 minutes.
LONGEST = 840.0

#: Rounds of real guests, which take most of two minutes each.
GUEST_ROUNDS = 2

#: Fewer rounds than this say too little to be compared with an earlier run.
ENOUGH = 3

#: Guests that do nothing, and for how many seconds a full run watches them.
IDLE_GUESTS, IDLE_SECONDS = 16, 60.0


@dataclass(frozen=True)
class Cell:
    """One measurement: the frontend's arguments, and for how many times the usual time it runs.

    `floor` names the frontend's own device for it, if it has one; `plain` says whether our daemon
    is measured without its compiled core too.
    """

    name: str
    arguments: str
    floor: str = ""
    plain: bool = False
    times: float = 1.0

    @property
    def guests(self) -> int:
        """How many guests there are."""
        return int(self.arguments.partition("--guests=")[2] or 1)


CELLS = (
    *(
        Cell(f"split {gap}", f"roundtrip --size=16 --gap-us={gap}", "echo", True)
        for gap in (0, 5, 50)
    ),
    *(
        Cell(f"packed {gap}", f"roundtrip --packed --size=16 --gap-us={gap}", "echo", True)
        for gap in (0, 5, 50)
    ),
    Cell("output 16", "output --size=16 --depth=64", "device", True),
    Cell("output 4096", "output --size=4096 --depth=16", "device", True),
    Cell("output 32768", "output --size=32768 --depth=16", "device", True),
    Cell("readers stuck", "output --size=4096 --depth=16 --readers=10 --stuck=1"),
    Cell("input 4096", "input --size=4096 --depth=64", "device", True),
    Cell("input 32768", "input --size=32768 --depth=64", "device", True),
    Cell("echo cold", "echo --gap-us=20000", "device", times=2),
    Cell("echo window", "echo --gap-us=20", "device"),
    Cell("load 100", "load --rate=10000 --size=100 --guests=100", times=4),
)

GROWTH = tuple(
    Cell(f"{curve.name} {x}", curve.arguments.format(x), curve.floor)
    for curve in CURVES
    for x in curve.along
)


@dataclass(frozen=True)
class Layout:
    """Where guests and their clients run, where their daemon, and where one that starts."""

    frontend: set[int]
    daemon: set[int]
    every: set[int]

    def arguments(self) -> list[str]:
        """Return the frontend's options that say so."""
        if self.frontend == self.daemon:
            return []
        return [f"--cpu={min(self.frontend)}", f"--device-cpu={min(self.daemon)}"]


def pin() -> Layout:
    """Put this process where the frontend runs; the daemon gets a CPU of its own."""
    every = os.sched_getaffinity(0)
    if len(every) < 2:
        return Layout(every, every, every)
    first, second, *_ = sorted(every)
    os.sched_setaffinity(0, {first})
    return Layout({first}, {second}, every)


def compile_frontend() -> str:
    """Return the frontend's program, compiled. Raises BenchmarkError without a compiler."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise BenchmarkError("no C compiler: install gcc or clang, then run this again")
    program = BUILD / "frontend"
    done = subprocess.run(
        [compiler, "-O2", "-std=gnu11", "-pthread", "-o", program, HERE / "frontend.c"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise BenchmarkError(f"frontend.c does not compile:\n{done.stderr}")
    return str(program)


@dataclass
class Bench:
    """What every measurement needs, and what they found."""

    frontend: str
    sides: dict[str, Side]
    layout: Layout
    folder: Path
    only: str = ""
    cells: Cells = field(default_factory=dict)

    def measure(self, cell: Cell, seconds: float) -> None:
        """Run one round of `cell` on each side, then on the floor."""
        if self._skips(cell.name):
            return
        seconds *= cell.times
        sides = ("ours", "plain", "peer") if cell.plain else ("ours", "peer")
        for name in sides:
            # The peer has no packed rings; a run that asks for them would measure nothing.
            if name != "peer" or "--packed" not in cell.arguments:
                self._keep(cell.name, name, lambda side: self._measure(side, cell, seconds))
        if cell.floor:
            arguments = [*cell.arguments.split(), f"--floor={cell.floor}"]
            self._add(cell.name, "floor", self.run(arguments, seconds))

    def measure_copy(self, seconds: float) -> None:
        """Run one round of the plain socket copy."""
        if not self._skips("copy"):
            self._add("copy", "floor", self.run(["copy"], seconds))

    def measure_memory(self, guests: int) -> None:
        """Measure the memory of `guests` connected guests, a client each, on each side."""

        def measure(side: Side) -> Record:
            with (
                running(side, self.folder, guests, self.layout.daemon) as daemon,
                self._idle_guests(daemon, guests),
            ):
                time.sleep(1.0)  # so that what the connection began has ended
                memory = daemon.memory()
                return {"pss_mib": memory.pss, "private_mib": memory.private}

        if not self._skips(f"memory {guests}"):
            for name in ("ours", "debian", "peer"):
                self._keep(f"memory {guests}", name, measure)

    def measure_merged(self, guests: int) -> None:
        """Measure the same on a host that merges equal pages; only ours says that it may."""

        def measure(side: Side) -> Record:
            with (
                merging(),
                running(side, self.folder, guests, self.layout.daemon) as daemon,
                self._idle_guests(daemon, guests),
            ):
                wait_until_merged()
                return {"pss_kib_each": daemon.memory().pss * 1024 / guests}

        if not self._skips("merged"):
            for name in ("ours", "debian"):
                self._keep("merged", name, measure)

    def measure_idle(self, guests: int, seconds: float) -> None:
        """Watch `guests` guests that do nothing; both sides in the same time, being at rest."""
        if self._skips("idle"):
            return
        daemons: dict[str, Daemon] = {}
        with ExitStack() as stack:
            for name in self.sides.keys() & {"ours", "peer"}:
                side = self.sides[name]
                daemon = stack.enter_context(running(side, self.folder, guests, self.layout.daemon))
                try:
                    stack.enter_context(self._idle_guests(daemon, guests))
                except BenchmarkError as error:
                    self._add("idle", name, {"error": str(error)})
                else:
                    daemons[name] = daemon
            time.sleep(2.0)  # so that what the connections began has ended
            before, begin = {n: d.activity() for n, d in daemons.items()}, time.monotonic()
            time.sleep(seconds)
            after, took = {n: d.activity() for n, d in daemons.items()}, time.monotonic() - begin
        for name in daemons:
            switches = after[name].switches - before[name].switches
            self._add(
                "idle",
                name,
                {
                    "cpu_percent": 100 * (after[name].cpu_s - before[name].cpu_s) / took,
                    "switches_guest_minute": switches / guests / took * 60,
                },
            )

    def measure_guests(self, rounds: int) -> None:
        """Measure real guests, as guests.py says."""
        if self._skips("guests"):
            return
        print("real guests", flush=True)
        programs: dict[str, guests.Program] = {
            name: side for name, side in self.sides.items() if name in ("ours", "peer")
        }
        self.cells |= guests.measure(programs, BUILD.parent, rounds)

    def measure_start(self, guests: int) -> None:
        """Measure the time from a daemon's start until all its guests' frontends are answered."""

        def measure(side: Side) -> Record:
            with started(side, self.folder, guests, self.layout.every) as daemon:
                record = self.run(["answer", *where(daemon), f"--guests={guests}"], GRACE)
                if "error" not in record:
                    record["start_s"] = float(record["monotonic_ns"]) / 1e9 - daemon.began
                return record

        if not self._skips(f"start {guests}"):
            for name in ("ours", "peer"):
                self._keep(f"start {guests}", name, measure)

    def _skips(self, name: str) -> bool:
        return self.only not in name

    def _add(self, cell: str, side: str, record: Record) -> None:
        self.cells.setdefault(cell, {}).setdefault(side, []).append(record)
        if "error" in record:
            print(f"  {side}, {cell}: {record['error']}", flush=True)

    def _keep(self, cell: str, name: str, measure: Callable[[Side], Record]) -> None:
        """Add what `measure` finds on the side of that name, unless it failed too often."""
        records = self.cells.get(cell, {}).get(name, [])
        if name not in self.sides or sum("error" in r for r in records) >= MOST_FAILURES:
            return
        try:
            record = measure(self.sides[name])
        except (BenchmarkError, OSError) as error:  # OSError: a process that has just ended
            record = {"error": str(error)}
        self._add(cell, name, record)

    def _measure(self, side: Side, cell: Cell, seconds: float) -> Record:
        options = ("--packed",) if "--packed" in cell.arguments else ()
        with running(side, self.folder, cell.guests, self.layout.daemon, *options) as daemon:
            before = daemon.cpu_seconds()

            def begun() -> None:
                before.update(daemon.cpu_seconds())

            record = self.run([*cell.arguments.split(), *where(daemon)], seconds, begun)
            after = daemon.cpu_seconds()
            record["cpu_s"] = sum(after.values()) - sum(before.values())
            if not after.keys() >= before.keys():
                record.setdefault("error", "a process of the daemon ended")
            if "error" in record:
                record["daemon_says"] = daemon.last_words()
            elif "--stuck" in cell.arguments and (missed := daemon.missed()) is not None:
                record["missed"] = missed
            return record

    def run(
        self,
        arguments: list[str],
        seconds: float,
        begun: Callable[[], None] = lambda: None,
    ) -> Record:
        """Run the frontend and return what it reports; a hang is an error like any other.

        `begun` is called when many guests have booted and begin to write.
        """
        command = [self.frontend, *arguments, f"--seconds={seconds}", *self.layout.arguments()]
        longest = seconds * 1.2 + GRACE
        record: Record = {}
        said = ""
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        watchdog = threading.Timer(longest, process.kill)
        watchdog.start()
        with process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    said = line.strip()
                    if not line.startswith("{"):
                        continue  # what is wrong with the arguments
                    if (parsed := _parse(line)).keys() == {"guests"}:
                        begun()
                    else:
                        record = parsed
            finally:
                watchdog.cancel()
                process.kill()
        hung = process.returncode == -signal.SIGKILL
        why = f"no end within {longest:.0f} s" if hung else f"exit {process.returncode}: {said}"
        return record or {"error": why}

    @contextmanager
    def _idle_guests(self, daemon: Daemon, guests: int) -> Iterator[None]:
        command = [self.frontend, "idle", *where(daemon), f"--guests={guests}"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            try:
                # Bounded by the frontend's own patience with each step of each guest.
                line = process.stdout.readline().decode()
                error = _parse(line).get("error") if line else "the frontend ended"
                if error:
                    raise BenchmarkError(str(error))
                yield
            finally:
                process.kill()


def where(daemon: Daemon) -> list[str]:
    """Return the frontend's options that say where `daemon` is."""
    return [f"--socket={daemon.socket}", f"--port={daemon.port}"]


def _parse(line: str) -> Record:
    """Return the frontend's record, and of what each watcher got the sum and the least.

    The least is the second least, since one may be stuck.
    """
    record = json.loads(line)
    if watched := sorted(record.pop("watcher_bytes", [])):
        record["least_watched"] = watched[:2][-1]
        record["all_watched"] = sum(watched)
    return dict(record)


def describe_machine(layout: Layout) -> Record:
    """Return what the numbers depend on, without naming the machine."""
    models = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    flags = Path("/proc/cpuinfo").read_text()
    return {
        "cpu": models[0] if models else platform.machine(),
        "cpus": os.cpu_count() or 1,
        "virtual": "yes" if " hypervisor " in flags else "no",
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "linux": ".".join(platform.release().split(".")[:2]),
        "python": platform.python_version(),
        "pinned": "no" if layout.daemon == layout.frontend else "yes",
    }


class Others:
    """What other programs do on this machine meanwhile: a number that should be near zero."""

    def __init__(self) -> None:
        self._busy, self._begin = self._foreign_s(), time.monotonic()

    @staticmethod
    def _foreign_s() -> float:
        """Return the CPU time since boot, in seconds, that is not this benchmark's."""
        times = psutil.cpu_times()
        used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        mine = sum(usage.ru_utime + usage.ru_stime for usage in used)
        return float(times.user + times.nice + times.system - mine)

    def percent(self) -> float:
        """Return their share of all CPUs since this object was made."""
        foreign = max(0.0, self._foreign_s() - self._busy)
        return 100 * foreign / (time.monotonic() - self._begin) / (os.cpu_count() or 1)


def measure_all(bench: Bench, rounds: int, quick: bool, merge: bool) -> int:
    """Run every cell `rounds` times, the sides in turn, if there is time; return how often."""
    seconds, begin, longest = 0.2 if quick else 0.6, time.monotonic(), 0.0
    for index in range(rounds):
        round_begin = time.monotonic()
        if round_begin - begin + longest > LONGEST:
            print(f"no time for more than {index} rounds", flush=True)
            return index
        print(f"round {index + 1} of {rounds}", flush=True)
        for cell in CELLS:
            bench.measure(cell, seconds)
        bench.measure_copy(seconds)
        # What varies less, or takes more time, is measured every other time.
        if index % 2 == 0 and not (quick and index):
            for count in FOOTPRINTS:
                bench.measure_memory(count)
            if merge:
                bench.measure_merged(FOOTPRINTS[-1])
            bench.measure_start(256)
            for cell in () if quick else GROWTH:
                bench.measure(cell, seconds / 2)
        if index == 0:
            bench.measure_idle(IDLE_GUESTS, 3.0 if quick else IDLE_SECONDS)
        longest = max(longest, time.monotonic() - round_begin)
    return rounds


def find_sides(peer: str | None, quick: bool) -> tuple[dict[str, Side], dict[str, str]]:
    """Return the daemons to measure and their versions. Raises BenchmarkError without ours."""
    sides = {"ours": Side(find_ours(), {})}
    if "compiled" in version(sides["ours"]):
        sides["plain"] = Side(sides["ours"].program, PURE)
    if debian := None if quick else find_debian(BUILD):
        sides["debian"] = Side(debian, {})
    if found := find_peer(peer, BUILD):
        sides["peer"] = Side(found, {})
    else:
        print("peer not available: no --peer, no $VDC_PEER, no cargo that installs it")
    return sides, {name: version(side) for name, side in sides.items()}


def main() -> int:
    """Run the benchmark; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="short rounds, in two minutes; prints the tables and leaves the files alone",
    )
    parser.add_argument("--rounds", type=int, help="rounds of every cell (default 5, quick 2)")
    parser.add_argument("--peer", help="the Rust daemon's program (default $VDC_PEER, or cargo)")
    parser.add_argument("--only", default="", help="only cells with this in their name; no files")
    parser.add_argument(
        "--merge",
        action="store_true",
        help="as root: measure memory with the kernel's merging of pages (KSM) switched on, too",
    )
    options = parser.parse_args()
    rounds = options.rounds or (2 if options.quick else 5)
    if rounds < 1:
        parser.error("--rounds must be at least 1")
    BUILD.mkdir(parents=True, exist_ok=True)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))  # for many guests
    begin, others = time.monotonic(), Others()
    try:
        frontend = compile_frontend()
        sides, versions = find_sides(options.peer, options.quick)
    except BenchmarkError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that every daemon is ended
    layout = pin()
    machine = describe_machine(layout)
    with tempfile.TemporaryDirectory(prefix="vdc", dir="/tmp") as folder:
        bench = Bench(frontend, sides, layout, Path(folder), options.only)
        rounds = measure_all(bench, rounds, options.quick, options.merge)
        if not options.quick:
            bench.measure_guests(min(rounds, GUEST_ROUNDS))
    machine["others_percent"] = round(others.percent(), 1)
    results: report.Results = {
        "versions": versions,
        "machine": machine,
        "rounds": rounds,
        "quick": options.quick,
        "took_s": round(time.monotonic() - begin),
        "cells": bench.cells,
    }
    last = report.last_committed(HERE / "results")
    publish(results, keep=not (options.quick or options.only))
    if last and rounds >= ENOUGH:
        print(f"compared with the last committed report, of {last['versions']['ours']}:")
        print("\n".join(report.worse(results, last)) or "nothing got worse by more than the noise")
    return 0


def publish(results: report.Results, *, keep: bool) -> None:
    """Print the report, and write the results, the report and the plots where they belong."""
    version_number = results["versions"]["ours"].split()[0]
    path = HERE / "results" / f"{version_number}.json" if keep else BUILD / "last.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(_anonymous(json.dumps(results, indent=1)) + "\n")
    text = _anonymous(report.render(results))
    print(text)
    if keep:
        from plots import draw

        draw(results["cells"], path.parent)
        report.rewrite(README, report.RESULTS, text)
        report.rewrite(HERE.parent / "README.md", report.SPEED, report.render_head(results))
    print(f"all rounds are in {os.path.relpath(path)}")


def _anonymous(text: str) -> str:
    """Return `text`, which may quote a daemon, without where this machine keeps its files."""
    return text.replace(str(HERE.parent), ".").replace(sys.base_prefix, "python")


if __name__ == "__main__":
    sys.exit(main())
