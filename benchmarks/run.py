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
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

import report
from daemons import BenchmarkError, Daemon, find_ours, find_peer, running, version

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent / "build" / "bench"
README = HERE / "README.md"

#: How long, in seconds, one workload may take beyond its measured time.
GRACE = 8.0

#: A side that failed this often in a cell is not tried there again.
MOST_FAILURES = 2

FOOTPRINT_GUESTS = (1, 16, 64)

Record = dict[str, float | str]


@dataclass(frozen=True)
class Cell:
    """One measurement: a workload of the frontend and its arguments; `seconds` of a full run."""

    name: str
    arguments: tuple[str, ...]
    seconds: float = 1.0


CELLS = (
    Cell("roundtrip 0", ("roundtrip", "--size=16")),
    Cell("roundtrip 5", ("roundtrip", "--size=16", "--gap-us=5")),
    Cell("roundtrip 50", ("roundtrip", "--size=16", "--gap-us=50")),
    Cell("output 16", ("output", "--size=16", "--depth=64")),
    Cell("output 4096", ("output", "--size=4096", "--depth=16")),
    Cell("output 32768", ("output", "--size=32768", "--depth=16")),
    Cell("input 4096", ("input", "--size=4096")),
    Cell("input 32768", ("input", "--size=32768")),
    Cell("echo", ("echo", "--gap-us=20000"), 1.5),
)


@dataclass(frozen=True)
class Layout:
    """Which CPU the guest and its client run on, and which one the daemon; None: any."""

    frontend: int | None
    daemon: int | None

    def arguments(self) -> list[str]:
        """Return the frontend's options that say so."""
        if self.frontend is None:
            return []
        return [f"--cpu={self.frontend}", f"--device-cpu={self.daemon}"]


def pin() -> Layout:
    """Put this process where the frontend runs; the daemon gets a CPU of its own."""
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        return Layout(None, None)
    os.sched_setaffinity(0, {cpus[0]})
    return Layout(cpus[0], cpus[1])


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
    """What every measurement needs, and what they found: `cells[name][side]`, a record a round."""

    frontend: str
    sides: dict[str, str]
    layout: Layout
    folder: Path
    cells: dict[str, dict[str, list[Record]]] = field(default_factory=dict)
    footprint: dict[str, dict[str, list[Record]]] = field(default_factory=dict)

    def measure(self, cell: Cell, seconds: float) -> None:
        """Run one round of `cell` on each side, then on the floor."""
        found = self.cells.setdefault(cell.name, {})
        for side, program in self.sides.items():
            records = found.setdefault(side, [])
            if sum("error" in record for record in records) < MOST_FAILURES:
                records.append(self._measure(program, cell, seconds))
                if "error" in records[-1]:
                    print(f"  {side}, {cell.name}: {records[-1]['error']}", flush=True)
        found.setdefault("floor", []).append(self._run([*cell.arguments, "--floor"], seconds))

    def measure_copy(self, seconds: float) -> None:
        """Run one round of the plain socket copy."""
        found = self.cells.setdefault("copy", {})
        found.setdefault("floor", []).append(self._run(["copy"], seconds))

    def _measure(self, program: str, cell: Cell, seconds: float) -> Record:
        try:
            with running(program, self.folder, 1, self.layout.daemon) as daemon:
                before = daemon.cpu_seconds()
                record = self._run([*cell.arguments, *_where(daemon)], seconds)
                after = daemon.cpu_seconds()
                record["cpu_s"] = sum(after.values()) - sum(before.values())
                if not after.keys() >= before.keys():
                    record.setdefault("error", "a process of the daemon ended")
                if "error" in record and (words := daemon.last_words()):
                    record["daemon_says"] = words
                return record
        except BenchmarkError as error:
            return {"error": str(error)}

    def _run(self, arguments: list[str], seconds: float) -> Record:
        """Run the frontend and return what it reports; a hang is an error like any other."""
        command = [self.frontend, *arguments, f"--seconds={seconds}", *self.layout.arguments()]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=seconds + GRACE, check=False
            )
        except subprocess.TimeoutExpired:
            return {"error": f"no end within {seconds + GRACE:.0f} s"}
        return _parse(done.stdout) if done.stdout else {"error": f"exit {done.returncode}"}

    def measure_footprint(self, guests: int, seconds: float) -> None:
        """Run `guests` connected guests that do nothing, a client each, on each side."""
        found = self.footprint.setdefault(str(guests), {})
        for side, program in self.sides.items():
            try:
                with (
                    running(program, self.folder, guests, self.layout.daemon) as daemon,
                    self._idle_guests(daemon, guests),
                ):
                    record = _rest(daemon, seconds)
            except (BenchmarkError, OSError) as error:  # OSError: a process that has just ended
                record = {"error": str(error)}
                print(f"  {side}, {guests} idle guests: {error}", flush=True)
            found.setdefault(side, []).append(record)

    @contextmanager
    def _idle_guests(self, daemon: Daemon, guests: int) -> Iterator[None]:
        command = [self.frontend, "idle", *_where(daemon), f"--guests={guests}"]
        with subprocess.Popen(
            [*command, *self.layout.arguments()], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
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


def _where(daemon: Daemon) -> list[str]:
    return [f"--socket={daemon.socket}", f"--port={daemon.port}"]


def _parse(line: str) -> Record:
    record: Record = json.loads(line)
    return record


def _rest(daemon: Daemon, seconds: float) -> Record:
    """Return what an idle daemon uses, once it has come to rest."""
    time.sleep(1.0)
    before, begin = daemon.activity(), time.monotonic()
    time.sleep(seconds)
    after, took = daemon.activity(), time.monotonic() - begin
    memory = daemon.memory()
    return {
        "cpu_percent": 100 * (after.cpu_s - before.cpu_s) / took,
        "switches_s": (after.switches - before.switches) / took,
        "pss_mib": memory.pss,
        "alone_mib": memory.alone,
        "processes": len(daemon.processes()),
    }


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
        "pinned": "no" if layout.daemon is None else "yes",
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


def measure_all(bench: Bench, rounds: int, quick: bool) -> None:
    """Run every cell `rounds` times, the sides in turn, then the idle guests."""
    speed = 0.3 if quick else 1.0
    for index in range(rounds):
        print(f"round {index + 1} of {rounds}", flush=True)
        for cell in CELLS:
            bench.measure(cell, cell.seconds * speed)
        bench.measure_copy(speed)
    for index in range(1 if quick else min(rounds, 3)):
        print(f"idle guests, round {index + 1}", flush=True)
        for guests in FOOTPRINT_GUESTS:
            bench.measure_footprint(guests, 1.0 if quick else 3.0)


def main() -> int:
    """Run the benchmark; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="3 short rounds, in under two minutes; prints the table and leaves the files alone",
    )
    parser.add_argument("--rounds", type=int, help="rounds of every cell (default 5, quick 3)")
    parser.add_argument("--peer", help="the Rust daemon's program (default $VDC_PEER, or cargo)")
    parser.add_argument("--name", help="the result file's name (default: our version)")
    options = parser.parse_args()
    rounds = options.rounds or (3 if options.quick else 5)
    if rounds < 1:
        parser.error("--rounds must be at least 1")
    BUILD.mkdir(parents=True, exist_ok=True)
    try:
        frontend = compile_frontend()
        sides = {"ours": find_ours()}
        peer = find_peer(options.peer, BUILD)
        if peer is None:
            print("peer not available: no --peer, no $VDC_PEER, no cargo that installs it")
        else:
            sides["peer"] = peer
        versions = {side: version(program) for side, program in sides.items()}
    except BenchmarkError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that every daemon is ended
    layout = pin()
    machine = describe_machine(layout)
    begin, others = time.monotonic(), Others()
    with tempfile.TemporaryDirectory(prefix="vdc", dir="/tmp") as folder:
        bench = Bench(frontend, sides, layout, Path(folder))
        measure_all(bench, rounds, options.quick)
    machine["others_percent"] = round(others.percent(), 1)
    results: report.Results = {
        "versions": versions,
        "machine": machine,
        "rounds": rounds,
        "quick": options.quick,
        "took_s": round(time.monotonic() - begin),
        "cells": bench.cells,
        "footprint": bench.footprint,
    }
    table = report.render(results)
    print(table)
    name = options.name or versions["ours"]
    path = BUILD / "quick.json" if options.quick else HERE / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    if not options.quick:
        report.rewrite(README, table)
    print(f"all rounds are in {os.path.relpath(path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
