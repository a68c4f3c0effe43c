"""What a run of soak.py was like: measured and judged."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any

from vhost_device_console import __version__

MIB = 1 << 20

#: What `measure` gives.
WHAT = ("RSS", "PSS", "descriptors")

#: A fitted line may rise by this part of the mean in the second half, beside what scatter explains.
MOST_GROWTH = 0.03

#: In a run of fewer seconds than this, a line may rise by that part of the mean.
SHORT, SHORT_GROWTH = 420.0, 0.15

#: A smaller rise of the line is none: what processes share comes and goes with them.
LEAST = {"RSS": 1.0 * MIB, "PSS": 1.0 * MIB, "descriptors": 10.0}

#: So many standard errors of a slope are scatter.
ERRORS = 3.0

#: Seconds until 50 and 99 % of killed workers' successors serve. A machine that only tests may be
#: anybody's and busy with anything: there it is enough that nobody hangs.
TYPICAL, MOST = (2.0, 10.0) if os.environ.get("CI") else (0.2, 1.0)

#: Fewer kills say too little.
FEWEST_KILLS = 10


def measure(pid: int) -> list[int]:
    """Return a process's RSS and PSS in bytes and its number of descriptors. Raises OSError."""
    found = {}
    with open(f"/proc/{pid}/smaps_rollup") as file:
        for line in file:
            name, _, rest = line.partition(":")
            if name in WHAT or name.upper() in WHAT:
                found[name.upper()] = int(rest.split()[0]) * 1024
    return [found["RSS"], found["PSS"], len(os.listdir(f"/proc/{pid}/fd"))]


@dataclass
class Sample:
    """One moment: the master, and all workers together, of which `counted` were found.

    `connected` guests had a frontend, `bytes` had been checked until then.
    """

    at: float
    master: list[int] = field(default_factory=list)
    workers: list[int] = field(default_factory=lambda: [0, 0, 0])
    counted: int = 0
    bytes: int = 0
    connected: int = 0


@dataclass
class Line:
    """A line fitted to what was measured in the second half of a run."""

    mean: float
    growth: float
    allowed: float


def fit(times: list[float], values: list[float], least: float) -> Line:
    """Fit a line (least squares): the mean, how much it rises in all, how much it may."""
    middle, mean = fmean(times), fmean(values)
    spread = sum((time - middle) ** 2 for time in times)
    slope = (
        sum((time - middle) * (value - mean) for time, value in zip(times, values, strict=True))
        / spread
    )
    rest = sum(
        (value - mean - slope * (time - middle)) ** 2
        for time, value in zip(times, values, strict=True)
    )
    error = (rest / (len(times) - 2) / spread) ** 0.5
    span = times[-1] - times[0]
    # A few fast samples that scatter wildly excuse no more than as much again.
    scatter = min(ERRORS * error * span, MOST_GROWTH * mean)
    return Line(mean, slope * span, max(least, MOST_GROWTH * mean + scatter))


def percent(values: list[float], which: int) -> float:
    """Return a percentile."""
    return quantiles(values, n=100, method="inclusive")[which - 1] if len(values) > 1 else values[0]


@dataclass
class Life:
    """What happened; times in seconds, `kills` are when, how long to a byte, the kind."""

    seconds: float
    guests: int
    seed: int
    kills: list[tuple[float, float, str]] = field(default_factory=list)
    reported: list[float] = field(default_factory=list)
    reloads: list[float] = field(default_factory=list)
    full: list[float] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    totals: dict[str, int] = field(default_factory=dict)
    cpu: dict[str, float] = field(default_factory=dict)

    def lines(self) -> dict[str, Line]:
        """Return a line for everything that may not grow; none of a run that was too short."""
        half = [sample for sample in self.whole() if sample.at >= self.seconds / 2]
        if len(half) < 4:
            return {}
        times = [sample.at for sample in half]
        return {
            f"{who}, {what}": fit(times, [values(sample)[index] for sample in half], LEAST[what])
            for who, values in (("master", self.of_master), ("all workers", self.of_workers))
            for index, what in enumerate(WHAT)
        }

    def whole(self) -> list[Sample]:
        """Return the samples with nearly all workers and frontends; some are always just gone."""
        nearly = 0.8 * self.guests
        return [each for each in self.samples if min(each.counted, each.connected) >= nearly]

    def of_master(self, sample: Sample) -> list[float]:
        """Return what the master had."""
        return [float(value) for value in sample.master]

    def of_workers(self, sample: Sample) -> list[float]:
        """Return what all workers had; those that were not found as much as the others."""
        return [value * self.guests / sample.counted for value in sample.workers]

    def judge(self) -> list[str]:
        """Return what was not as promised."""
        # Workers that have just begun come to share less and less with each other.
        more = SHORT_GROWTH if self.seconds < SHORT else 0.0
        wrong = [
            f"{what} grew by {line.growth:.0f} in the second half, {line.allowed:.0f} may be: "
            f"it is {line.mean:.0f}"
            for what, line in self.lines().items()
            if line.growth > max(line.allowed, more * line.mean)
        ]
        served = [took for _, took, _ in self.kills]
        if len(served) < min(FEWEST_KILLS, self.seconds / 10):
            wrong.append(f"only {len(served)} workers were killed")
            return wrong
        for which, most in ((50, TYPICAL), (99, MOST)):
            if (took := percent(served, which)) > most:
                wrong.append(
                    f"{which} % of killed workers' successors take up to {took:.3f} s to the "
                    f"first byte, {most:g} s may be"
                )
        return wrong


def _machine() -> str:
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    return (
        f"{os.cpu_count()} CPUs ({model}), {memory} GiB, Linux {platform.release()}, "
        f"Python {platform.python_version()}"
    )


def _times(values: list[float]) -> str:
    if not values:
        return "- | - | -"
    figures = (percent(values, 50), percent(values, 99), max(values))
    return " | ".join(f"{1000 * value:.0f} ms" for value in figures)


def text(life: Life, failures: list[str]) -> str:
    """Return the report as Markdown."""
    count = {**dict.fromkeys(("received", "typed", "logged"), 0), **life.totals}
    served = [took for _, took, _ in life.kills]
    lines = [
        "# Soak",
        "",
        f"Written by `make soak`: version {__version__}, {life.seconds / 60:g} minutes, "
        f"{life.guests} guests, on {_machine()}.",
        "",
        "**Every promise was kept.**" if not failures else "**Failed**: " + "; ".join(failures),
        "",
        "| what happened | how often |",
        "|---|---|",
        f"| workers killed (SIGKILL) in the middle of traffic | {len(life.kills)} |",
        f"| daemon reloaded (SIGHUP) | {len(life.reloads)} |",
        f"| disk of all logs full for 3 s | {len(life.full)} |",
        f"| logs rotated | {count.get('rotations', 0)} |",
        f"| frontends that came again with the same rings | {count.get('reconnections', 0)} |",
        f"| guests that booted anew | {count.get('reboots', 0)} |",
        f"| clients that came | {count.get('clients', 0)} |",
        f"| ports that had nobody for a while | {count.get('absences', 0)} |",
        "",
        "Processor time used, of one CPU: "
        + ", ".join(f"{100 * share:.0f} % by {who}" for who, share in life.cpu.items())
        + ".",
        "",
        "| bytes | written | checked | lost | twice |",
        "|---|---|---|---|---|",
        f"| from guests to TCP clients | {count.get('written', 0)} | {count['received']} | 0 | 0 |",
        f"| from TCP clients to guests | {count['typed']} | {count['typed']} | 0 | 0 |",
        f"| from guests to logs | {count.get('written', 0)} | {count['logged']} | 0 | 0 |",
        "",
        "A port may have two clients, or none, so clients do not get just what was written. The",
        "run ends at the first byte that is lost, comes twice or is another one.",
        "",
        "| after a kill, until | median | 99 % | longest |",
        "|---|---|---|---|",
        f"| a client gets a byte written after it | {_times(served)} |",
        f"| its successor reports ({len(life.reported)} of them) | {_times(life.reported)} |",
        "",
        "Reports are asked for from outside, by `status` of all guests, so they are seen later",
        "than they come, during a reload in particular.",
        "",
        "| in the second half | mean | rise of the fitted line | allowed |",
        "|---|---|---|---|",
    ]
    for what, line in life.lines().items():
        unit, by = ("", 1) if what.endswith("descriptors") else (" MiB", MIB)
        lines.append(
            f"| {what} | {line.mean / by:.1f}{unit} | {line.growth / by:+.2f}{unit} | "
            f"{line.allowed / by:.2f}{unit} |"
        )
    lines += [
        "",
        "At the end, when all guests and clients are gone, the master and every worker have just",
        "as many descriptors as before the first one came.",
        "",
        "![Memory, descriptors and times after a kill](soak.svg)",
        "",
    ]
    return "\n".join(lines)


def write(life: Life, failures: list[str], folder: Path) -> None:
    """Write the report and its numbers; its plot is in plots.py."""
    (folder / "soak.md").write_text(text(life, failures))
    numbers: dict[str, Any] = {
        "version": __version__,
        "machine": _machine(),
        "seconds": life.seconds,
        "guests": life.guests,
        "seed": life.seed,
        "failures": failures,
        "totals": life.totals,
        "cpu": {who: round(share, 3) for who, share in life.cpu.items()},
        "kills": [[round(at, 3), round(took, 4), kind] for at, took, kind in life.kills],
        "reported": [round(took, 4) for took in life.reported],
        "reloads": [round(at, 1) for at in life.reloads],
        "full": [round(at, 1) for at in life.full],
        "samples": [
            [
                round(sample.at, 1),
                sample.master,
                sample.workers,
                sample.counted,
                sample.bytes,
                sample.connected,
            ]
            for sample in life.samples
        ],
    }
    (folder / "soak.json").write_text(json.dumps(numbers, separators=(",", ":")) + "\n")
