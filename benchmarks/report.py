"""From the rounds' records to Markdown: medians, ranges, ratios, targets, and what got worse."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import TypedDict

import rows
from rows import CURVES, HEAD, SECTIONS, SIDES, TARGETS, Cells, Record, Row, Section, number

#: Between these marks a Markdown file has what `rewrite` puts there.
RESULTS = ("<!-- results: written by run.py, not by hand -->", "<!-- end of results -->")
SPEED = ("<!-- speed: written by benchmarks/run.py, not by hand -->", "<!-- end of speed -->")

#: A median that is worse by this factor, and out of the other's range, is worse.
NOISE = 1.15


class Results(TypedDict):
    """A result file."""

    versions: dict[str, str]
    machine: Record
    rounds: int
    quick: bool
    took_s: float
    cells: Cells


def _sections() -> Iterator[Section]:
    yield from SECTIONS
    for curve in CURVES:
        text = f"![{curve.title}](results/{curve.name}.svg)"
        yield Section(curve.title, curve.rows(), text)


def _spread(values: list[float]) -> str:
    spread = f" ({number(min(values))} to {number(max(values))})" if len(values) > 1 else ""
    return f"{number(median(values))}{spread}"


def _text(row: Row, cells: Cells, side: str) -> str:
    errors = [str(r["error"]) for r in row.records(cells, side) if "error" in r]
    values = row.values(cells, side)
    if not values:
        return f"fails: {errors[0].splitlines()[0][:100]}" if any(errors) else ""
    return _spread(values) + (f"; {len(errors)} rounds failed" if errors else "")


def _ratio(row: Row, cells: Cells) -> str:
    costs = row.costs(cells, "ours", "peer")
    return _spread([rows.inverse(cost) for cost in costs]) if costs else ""


def _of_limit(row: Row, cells: Cells) -> str:
    costs = row.costs(cells, "ours", "floor")
    return f"{_spread(costs)} times" if costs else ""


def _table(section: Section, cells: Cells) -> str:
    columns = {"": [row.title for row in section.rows]}
    for side, title in SIDES.items():
        columns[title] = [_text(row, cells, side) for row in section.rows]
        if side == "peer":
            columns["ratio"] = [_ratio(row, cells) for row in section.rows]
        if side == "floor":
            columns["of the limit"] = [_of_limit(row, cells) for row in section.rows]
    columns = {title: column for title, column in columns.items() if any(column)}
    if SIDES["ours"] not in columns:
        return ""
    lines = [_line(list(columns)), _line(["---"] * len(columns))]
    lines += [_line(list(line)) for line in zip(*columns.values(), strict=True) if any(line[1:])]
    text = [section.text, ""] if section.text else []
    return "\n".join([f"### {section.title}", "", *text, *lines, ""])


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _names() -> Iterator[tuple[Row, str]]:
    """Yield every row with a name of its own."""
    for section in _sections():
        above = ""
        for row in section.rows:
            if not row.title.startswith("…"):
                above = row.title.partition(":")[0]
            own = row.title.removeprefix("… ")
            yield row, f"{section.title}: {f'{above}: {own}' if row.title != own else own}"


def _targets(results: Results) -> str:
    cells, names = results["cells"], dict(_names())
    compiled, missing = "plain" in results["versions"], 0
    lines = [_line(["target", "found", ""]), _line(["---"] * 3)]
    for target in TARGETS:
        side = target.side
        if side in ("compiled", "plain") and not compiled:
            side = {"compiled": "", "plain": "ours"}[side]
        elif side == "compiled":
            side = "ours"
        found = rows.Target(target.row, target.bound, target.against, side).measured(cells)
        if found is None and side:
            missing += 1
            continue
        if found is None:
            verdict = "no compiled core"
        elif (found >= target.bound) if target.at_least else (found <= target.bound):
            verdict = "reached"
        else:
            verdict = "**not reached**"
        against = {
            "": "",
            "peer": " times better than the peer",
            "virtconsole": " times better than QEMU's own",
            "floor": " times the limit",
        }
        how = "at least" if target.at_least else "at most"
        with_what = f", {SIDES[side]}" if side not in ("ours", "") else ""
        lines.append(
            _line(
                [
                    f"{names[target.row]}{with_what}: {how} {number(target.bound)}"
                    f"{against[target.against]}",
                    "" if found is None else number(found),
                    verdict,
                ]
            )
        )
    text = [f"{missing} more were not measured.", ""] if missing else []
    return "\n".join(["### Targets", "", *lines, "", *text])


def circumstances(results: Results, pinned: str) -> str:
    """Return how often, where and of what the results are; `pinned` says where, if on one CPU."""
    machine, versions = results["machine"], results["versions"]
    kind = "a virtual machine" if machine["virtual"] == "yes" else "a machine"
    pinned = pinned if machine["pinned"] == "yes" else "Nothing was pinned to a CPU."
    peer = f"version {versions['peer']}" if "peer" in versions else "not available, so no ratio"
    return (
        f"Rounds: {results['rounds']}, in {results['took_s']:.0f} s, on {kind} with "
        f"{machine['cpus']} CPUs ({machine['cpu']}) and {machine['memory_gib']} GiB, Linux "
        f"{machine['linux']}, CPython {machine['python']}. {pinned} Other programs "
        f"used {machine['others_percent']} % of the CPUs meanwhile. Ours: version "
        f"{versions['ours']}; peer: {peer}."
    )


def _machine(results: Results) -> str:
    pinned = "Guests and their clients ran on one CPU, their daemon on another."
    debian = "Debian's Python: measured." if "debian" in results["versions"] else ""
    debian = debian or "The distribution's own Python was not measured beside it."
    return f"{circumstances(results, pinned)} {debian}"


def _with_derived(results: Results) -> Results:
    derived = results.copy()
    derived["cells"] = rows.derive(results["cells"])
    return derived


def render(results: Results) -> str:
    """Return the machine's description, the targets and the tables, in Markdown."""
    results = _with_derived(results)
    tables = (_table(section, results["cells"]) for section in _sections())
    return "\n".join([_machine(results), "", _targets(results), *filter(None, tables)])


def render_head(results: Results) -> str:
    """Return the short table for the project's own README."""
    cells = rows.derive(results["cells"])
    lines = [_line(["", "ours", "Rust peer", "ratio"]), _line(["---"] * 4)]
    for title, row in HEAD:
        ours, peer = row.values(cells, "ours"), row.values(cells, "peer")
        ratio = [rows.inverse(cost) for cost in row.costs(cells, "ours", "peer")]
        numbers = [number(median(values)) if values else "" for values in (ours, peer, ratio)]
        lines.append(_line([title, *numbers]))
    return "\n".join(lines)


def _costs(row: Row, cells: Cells, side: str, against: str) -> list[float]:
    """Return costs, lower is better: against another side, or the values themselves."""
    if against:
        return row.costs(cells, side, against)
    values = row.values(cells, side)
    return [rows.inverse(value) for value in values] if row.higher_is_better else values


def worse(new: Results, old: Results) -> Iterator[str]:
    """Yield a line for each number that is worse than in `old` by more than the noise.

    The ratio to the peer is compared, or what it is of the limit, or, where there is neither in
    both, the number itself: machines differ, and what runs beside it does too.
    """
    now, before = rows.derive(new["cells"]), rows.derive(old["cells"])
    for row, name in _names():
        for side in ("ours", "plain", "debian"):
            for against in ("peer", "floor", ""):
                a, b = _costs(row, now, side, against), _costs(row, before, side, against)
                if a and b:
                    break
            if a and b and min(a) > max(b) and median(a) > NOISE * median(b):
                what = {"peer": " against the peer", "floor": " against the limit", "": ""}[against]
                times = f"{number(rows.quotient(median(a), median(b)))} times its cost"
                yield f"{name} ({SIDES[side]}){what}: {times} in {old['versions']['ours']}"


def last_committed(folder: Path) -> Results | None:
    """Return the results in `folder` of the newest version, as they were committed, or None."""

    def git(*command: str) -> str:
        return subprocess.run(
            ["git", *command], cwd=folder, capture_output=True, text=True, check=False
        ).stdout

    names = [
        name for name in git("ls-tree", "--name-only", "HEAD", "./").split() if ".json" in name
    ]
    if not names:
        return None

    def by_version(name: str) -> list[int]:
        return [int(part) for part in name.removesuffix(".json").split(".") if part.isdigit()]

    newest: Results = json.loads(git("show", f"HEAD:./{max(names, key=by_version)}"))
    return newest


def rewrite(document: Path, marks: tuple[str, str], table: str) -> None:
    """Put `table` between the two marks in `document`, if it has them."""
    text = document.read_text()
    head, begin, rest = text.partition(marks[0])
    _, end, tail = rest.partition(marks[1])
    if begin and end:
        document.write_text(f"{head}{begin}\n\n{table.strip()}\n\n{end}{tail}")
