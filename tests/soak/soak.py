"""Run one daemon for long, with all that may happen to it, and check every byte: `make soak`.

50 guests with mixed rings have traffic in both directions, frontends and clients come and go,
workers are killed, logs are rotated, their disk is full now and then, the daemon is reloaded. At
TCP clients, in the guests and in the logs nothing may be lost or come twice; memory and descriptors
may not grow; a killed worker's successor has to be at work soon. The report and its plot are in
build/soak, with --keep in docs too. The exit status says whether every promise was kept.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import resource
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from load import KINDS, Violation

import plots
import report
from launch import COMMAND, Daemon, Ports
from logs import KEPT, Follower
from report import Life, Sample

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "soak"

#: Processes that the guests are in.
PROCESSES = 4

#: Seconds between kills, samples, full disks and reloads, and how long a disk is full.
KILL_EVERY, SAMPLE_EVERY, FULL_EVERY, RELOAD_EVERY, FULL_FOR = 2.0, 5.0, 40.0, 60.0, 3.0

#: Of one kill in so many it is seen how long its successor takes to report.
REPORTS_OF = 3

#: When a log is rotated; and room for all of them, in bytes.
LOG_BYTES, DISK = 128 << 10, 96 << 20


_CLONE_NEWNS = 0x20000


class Load:
    """A process of guests."""

    def __init__(self, guests: list[dict[str, Any]], seed: int) -> None:
        self.numbers = {guest["number"] for guest in guests}
        self.process = subprocess.Popen(
            [sys.executable, HERE / "load.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        self._rest = b""
        self.tell({"guests": guests, "seed": seed})

    def fileno(self) -> int:
        assert self.process.stdout is not None
        return self.process.stdout.fileno()

    def hear(self) -> list[dict[str, Any]]:
        """Return what it has said. Raises Violation when it has ended."""
        data = os.read(self.fileno(), 1 << 16)
        if not data:
            raise Violation("a process of guests has ended")
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def tell(self, what: Any) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(what).encode() + b"\n")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()


class Disk:
    """Where the logs are: a small file system of its own, or, for who is not root, files only.

    Without one of its own some workers may not write more instead (RLIMIT_FSIZE).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "logs"
        self.folder.mkdir()
        self._ballast = self.folder / "ballast"
        self._limited: list[int] = []
        self.small = os.geteuid() == 0 and self._mount()

    def _mount(self) -> bool:
        # In a namespace of mounts that goes with this process.
        if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNS):
            return False
        make = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "soak", str(self.folder)]
        return not any(
            subprocess.run(command, check=False).returncode
            for command in (["mount", "--make-rprivate", "/"], make)
        )

    def fill(self, workers: list[int]) -> None:
        """Have no room."""
        if self.small:
            with self._ballast.open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(1 << 16))
            return
        for worker in workers[::5]:
            with suppress(ProcessLookupError):
                resource.prlimit(worker, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
                self._limited.append(worker)

    def free(self) -> None:
        """Have room again."""
        self._ballast.unlink(missing_ok=True)
        for worker in self._limited:
            with suppress(ProcessLookupError):
                unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
                resource.prlimit(worker, resource.RLIMIT_FSIZE, unlimited)
        self._limited.clear()

    def unmount(self) -> None:
        if self.small:
            subprocess.run(["umount", "--lazy", str(self.folder)], check=True)


class Soak:
    """One run."""

    def __init__(self, folder: Path, arguments: argparse.Namespace, ends: ExitStack) -> None:
        self.folder = folder
        self.random = random.Random(arguments.seed)
        self.life = Life(
            seconds=arguments.minutes * 60, guests=arguments.guests, seed=arguments.seed
        )
        self.disk = Disk(folder)
        ends.callback(self.disk.unmount)
        ports = Ports()
        ends.callback(ports.close)
        guests = self._describe(arguments.guests, ports)
        config = folder / "soak.toml"
        config.write_text(self._config(guests))
        self.log = ends.enter_context((folder / "log").open("wb+"))
        ends.callback(lambda: shutil.copy(folder / "log", BUILD / "daemon.log"))
        self.daemon = Daemon(
            folder,
            None,
            0,
            *("--config", str(config)),
            socket_path=None,
            program=[sys.executable, *COMMAND[1:]],
            stderr=self.log,
            stdout=subprocess.DEVNULL,
        )
        ends.push(self._end_daemon)
        self.workers = self.daemon.workers()
        self.baseline = self._footprints()
        self.followers = {
            f"{guest['number']}/{port}": Follower(
                f"guest {guest['number']}, port {port}",
                Path(path),
                guest["number"] * 20011 + port,
            )
            for guest in guests
            for port, path in enumerate(guest["logs"])
        }
        for follower in self.followers.values():
            ends.callback(follower.close)
        self.loads = [Load(guests[first::PROCESSES], arguments.seed) for first in range(PROCESSES)]
        self.selector = selectors.DefaultSelector()
        ends.callback(self.selector.close)
        for load in self.loads:
            ends.callback(load.close)
            self.selector.register(load, selectors.EVENT_READ, load)
        self.totals: dict[int, Counter[str]] = {}
        self.begun = time.monotonic()
        self.awaited: dict[int, tuple[float, int]] = {}  # killed: when, and who it was
        self.struck = 0

    def _describe(self, count: int, ports: Ports) -> list[dict[str, Any]]:
        guests = []
        for number in range(count):
            kind = KINDS[number % len(KINDS)]
            two = number % 5 == 0 and kind != "tracked split"
            tcp = [ports() for _ in range(1 + two)]
            guests.append(
                {
                    "number": number,
                    "socket": str(self.folder / f"g{number}"),
                    "tcp": tcp,
                    "logs": [
                        str(self.disk.folder / f"{number}-{port}") for port in range(len(tcp))
                    ],
                }
            )
        return guests

    def _config(self, guests: list[dict[str, Any]]) -> str:
        lines = []
        for guest in guests:
            lines += ["[[guest]]", f'socket = "{guest["socket"]}"', "packed = true"]
            for port, (tcp, log) in enumerate(zip(guest["tcp"], guest["logs"], strict=True)):
                lines += [
                    "[[guest.port]]",
                    f'name = "port{port}"',
                    f"console = {str(port == 0).lower()}",
                    'backend = "network"',
                    f"tcp-port = {tcp}",
                    f'log = "{log}"',
                    f"log-max-bytes = {LOG_BYTES}",
                    f"log-keep = {KEPT}",
                ]
        return "\n".join(lines) + "\n"

    # What there is

    def _footprints(self) -> dict[str, int]:
        """Return how many descriptors everybody has."""
        return {
            "the master": len(os.listdir(f"/proc/{self.daemon.pid}/fd")),
            **{
                f"worker {number}": len(os.listdir(f"/proc/{worker}/fd"))
                for number, worker in enumerate(self.workers)
            },
        }

    def sample(self) -> None:
        """Note memory and descriptors of all processes of the daemon."""
        connected = sum(guest["frontend"] is not None for guest in self.status())
        sample = Sample(at=time.monotonic() - self.begun, connected=connected)
        sample.master = report.measure(self.daemon.pid)
        for worker in self.workers:
            with suppress(OSError):
                each = report.measure(worker)
                sample.workers = [a + b for a, b in zip(sample.workers, each, strict=True)]
                sample.counted += 1
        sample.bytes = sum(self._total(what) for what in ("received", "typed"))
        self.life.samples.append(sample)

    def _total(self, what: str) -> int:
        return sum(total[what] for total in self.totals.values())

    def status(self) -> list[dict[str, Any]]:
        """Ask the daemon, and see whose successor has reported."""
        guests = self.daemon.status()
        now = time.monotonic()
        for number, guest in enumerate(guests):
            if guest["worker"] is None or guest["state"] != "running":
                continue
            self.workers[number] = guest["worker"]
            at, before = self.awaited.get(number, (0.0, guest["worker"]))
            if guest["worker"] != before:
                self.life.reported.append(now - at)
                del self.awaited[number]
        return guests

    # What happens

    def hear(self, within: float) -> list[dict[str, Any]]:
        """Take what the guests say within that time."""
        said = []
        for key, _ in self.selector.select(max(0.0, within)):
            for word in key.data.hear():
                said.append(word)
                self._take(key.fd, word)
        return said

    def _take(self, load: int, word: dict[str, Any]) -> None:
        match word:
            case {"violation": what}:
                raise Violation(what)
            case {"struck": number, "at": at, "pid": pid}:
                self.struck += 1
                if self.struck % REPORTS_OF == 0:
                    self.awaited[number] = (at, pid)
            case {"killed": _, "at": at, "served": served, "kind": kind}:
                self.life.kills.append((at - self.begun, served, kind))
            case {"total": total}:
                self.totals[load] = Counter(total)

    def kill(self) -> None:
        """Have one worker killed by its guest, in the middle of what it does."""
        number = self.random.randrange(len(self.workers))
        for load in self.loads:
            if number in load.numbers:
                load.tell({"kill": number, "pid": self.workers[number], "daemon": self.daemon.pid})

    def run(self) -> None:
        """Let it happen, for as long as it shall."""
        now = time.monotonic()
        kill, sample, full, reload = now + 5, now, now + 20, now + 30
        free, end = 0.0, self.begun + self.life.seconds
        while (now := time.monotonic()) < end:
            if now >= kill:
                self.status()
                self.kill()
                kill += KILL_EVERY * self.random.uniform(0.7, 1.3)
            if now >= sample:
                for load in self.loads:
                    load.tell("count")
                self.sample()
                self.follow()
                sample += SAMPLE_EVERY
            if now >= full:
                self.status()
                self.disk.fill(self.workers)
                self.life.full.append(now - self.begun)
                full, free = now + FULL_EVERY, now + FULL_FOR
            if free and now >= free:
                self.disk.free()
                free = 0.0
            if now >= reload:
                self.daemon.signal(signal.SIGHUP)
                self.life.reloads.append(now - self.begun)
                reload += RELOAD_EVERY
            # To ask so often costs the master something: that is not done for every kill.
            soon = now + (0.01 if self.awaited else 1)
            self.hear(min(kill, sample, full, reload, free or end, soon) - now)
            if self.awaited:
                self.status()
            if self.daemon.process.poll() is not None:
                raise Violation("the daemon has ended")
        self.disk.free()

    def follow(self) -> None:
        """Check what is in the logs."""
        for follower in self.followers.values():
            follower.read()

    # The end

    def finish(self) -> None:
        """See that everything has arrived, and that nothing is left."""
        for load in self.loads:
            load.tell("stop")
        settled: dict[str, int] = {}
        waiting = len(self.loads)
        deadline = time.monotonic() + 120
        while waiting and time.monotonic() < deadline:
            for word in self.hear(1.0):
                if "settled" in word:
                    settled |= word["settled"]
                    waiting -= 1
        if waiting:
            raise Violation("guests do not settle within 120 s")
        self._finish_logs(settled)
        self.life.totals = dict(sum(self.totals.values(), Counter()))
        self.life.cpu = {"the daemon": self._cpu([self.daemon.pid]) / self.life.seconds}
        loads = self._cpu([load.process.pid for load in self.loads])
        self.life.cpu["the guests and clients"] = loads / self.life.seconds
        self.life.totals["logged"] = sum(f.offset for f in self.followers.values())
        self.life.totals["rotations"] = sum(f.rotations for f in self.followers.values())
        for load in self.loads:
            load.tell("leave")
        waiting = len(self.loads)
        while waiting and time.monotonic() < deadline:
            waiting -= sum("left" in word for word in self.hear(1.0))
        for load in self.loads:
            self.selector.unregister(load)
        self._wait_footprints()

    def _cpu(self, pids: list[int]) -> float:
        """Return the seconds that processes and all they ever started have used."""
        used = 0.0
        for pid in pids:
            with suppress(psutil.NoSuchProcess):
                times = psutil.Process(pid).cpu_times()
                used += times.user + times.system + times.children_user + times.children_system
        if pids == [self.daemon.pid]:
            return used + self._cpu(self.workers)
        return used

    def _finish_logs(self, settled: dict[str, int]) -> None:
        deadline = time.monotonic() + 30
        while True:
            self.follow()
            behind = {
                name: (follower.offset, settled[name])
                for name, follower in self.followers.items()
                if follower.offset != settled[name]
            }
            if not behind:
                return
            if time.monotonic() > deadline:
                raise Violation(f"logs that are not whole: {behind}")
            self.hear(0.1)

    def _wait_footprints(self) -> None:
        deadline = time.monotonic() + 30
        # A log's index is opened with its first entry, and again after a reload.
        lazily = {"the master": len(self.followers)}
        while True:
            self.status()
            now = self._footprints()
            more = {
                who: f"{count}, not {self.baseline[who]}"
                for who, count in now.items()
                if not 0 <= count - self.baseline[who] <= lazily.get(who, 0)
            }
            if not more:
                return
            if time.monotonic() > deadline:
                raise Violation(f"descriptors at the end: {more}")
            self.hear(0.1)

    def _end_daemon(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.daemon.close()
            return
        self.daemon.process.kill()
        self.daemon.process.wait()

    def complaints(self) -> list[str]:
        """Return what the log has that should not be there."""
        self.log.seek(0)
        text = self.log.read().decode(errors="backslashreplace")
        bad = ("Traceback", "Error:", "cannot be followed", "dropped", "are lost", "exit status")
        return [line for line in text.splitlines() if any(word in line for word in bad)]


def main() -> int:
    """Run it and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, default=float(os.environ.get("SOAK_MINUTES", "30"))
    )
    parser.add_argument("--guests", type=int, default=50)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--keep", action="store_true", help="write the report to docs, too")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("soak: ended"))
    print(f"soak: {arguments.minutes:g} minutes, {arguments.guests} guests, seed {arguments.seed}")
    folder = Path(tempfile.mkdtemp(prefix="soak", dir="/tmp"))
    BUILD.mkdir(parents=True, exist_ok=True)
    soak: Soak | None = None
    failures: list[str] = []
    try:
        with ExitStack() as ends:
            soak = Soak(folder, arguments, ends)
            try:
                soak.run()
                soak.finish()
            except Violation as error:
                failures.append(str(error))
                raise
            finally:
                failures += soak.complaints()
    except Violation:
        pass
    except psutil.Error as error:
        failures.append(f"a process is gone: {error}")
    except (AssertionError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        failures.append(f"{type(error).__name__}: {error}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if soak is not None:
        failures += soak.life.judge()
        for out in (BUILD, ROOT / "docs") if arguments.keep else (BUILD,):
            report.write(soak.life, failures, out)
            plots.write(soak.life, out)
    for failure in failures:
        print(f"soak: {failure}")
    print("soak: FAILED" if failures else "soak: every promise was kept")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
