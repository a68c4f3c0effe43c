"""A run of soak.py as a picture."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from report import MIB, WHAT, Life

matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "vhost-device-console"}


def _draw(life: Life) -> Figure:
    """Draw memory and descriptors over time, and how long each killed worker was missed."""
    figure = Figure(figsize=(8, 9), layout="constrained", facecolor="white")
    memory, files, missed = figure.subplots(3, sharex=True)
    samples = life.whole()
    minutes = [sample.at / 60 for sample in samples]
    both = (("workers", life.of_workers, "#0b5fa5"), ("master", life.of_master, "#c2410c"))
    for name, measured, color in both:
        for index, form in enumerate(("--", "-", "-")):
            values = [measured(sample)[index] for sample in samples]
            if index == 2:
                files.plot(minutes, values, form, color=color, label=name)
            else:
                sizes = [value / MIB for value in values]
                memory.plot(minutes, sizes, form, color=color, label=f"{name}, {WHAT[index]}")
    missed.plot(
        [at / 60 for at, _, _ in life.kills],
        [1000 * took for _, took, _ in life.kills],
        ".",
        color="#0b5fa5",
        label="a worker killed",
    )
    for axes in (memory, files, missed):
        for number, at in enumerate(life.reloads):
            label = "reload" if number == 0 else None
            axes.axvline(at / 60, color="#808080", linewidth=0.5, label=label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="best", fontsize="small")
    memory.set_ylabel("MiB")
    files.set_ylabel("descriptors")
    missed.set_ylabel("ms to the first byte")
    missed.set_xlabel("minutes")
    memory.set_title(f"{life.guests} guests", loc="left", fontsize="medium")
    return figure


def write(life: Life, folder: Path) -> None:
    """Write the plot that the report shows."""
    _draw(life).savefig(folder / "soak.svg", metadata={"Date": None})
