"""The curves of a report as SVG files: the same results give the same bytes."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from rows import CURVES, SIDES, Cells, Curve, number

matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "vhost-device-console"}

#: A colour and a form of each side's line.
_STYLES = {"ours": ("#0b5fa5", "o-"), "peer": ("#c2410c", "s-"), "floor": ("#808080", "--")}


def draw(cells: Cells, folder: Path) -> None:
    """Write a plot of each curve to `folder`, a file that has the curve's name."""
    for curve in CURVES:
        _draw(curve, cells).savefig(folder / f"{curve.name}.svg", metadata={"Date": None})


def _draw(curve: Curve, cells: Cells) -> Figure:
    figure = Figure(figsize=(7, 4), layout="constrained", facecolor="white")
    axes = figure.subplots()
    for side, (color, form) in _STYLES.items():
        for index, y in enumerate(curve.ys):
            points = [
                (x, values)
                for x, row in zip(curve.along, curve.rows()[index :: len(curve.ys)], strict=True)
                if (values := row.values(cells, side))
            ]
            if not points:
                continue
            xs = [x for x, _ in points]
            medians = [median(values) for _, values in points]
            label = f"{SIDES[side]}: {y.title}" if len(curve.ys) > 1 else SIDES[side]
            axes.plot(xs, medians, form, color=color, label=label, alpha=1 / (1 + index))
            lowest, highest = [[f(values) for _, values in points] for f in (min, max)]
            axes.fill_between(xs, lowest, highest, color=color, alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(curve.along, [str(x) for x in curve.along])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: number(y)))
    axes.set_title(curve.title, loc="left", fontsize="medium")
    axes.set_xlabel(curve.x)
    axes.set_ylabel(curve.ys[0].title if len(curve.ys) == 1 else "MB/s")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    return figure
