"""From the rounds' records to the table in README.md: medians, ranges, ratios."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TypedDict

Record = dict[str, float | str]
Records = dict[str, list[Record]]

BEGIN = "<!-- results: written by run.py, not by hand -->"
END = "<!-- end of results -->"


class Results(TypedDict):
    """A result file: `cells[name][side]` and `footprint[guests][side]` hold a record a round."""

    versions: dict[str, str]
    machine: Record
    rounds: int
    quick: bool
    took_s: float
    cells: dict[str, Records]
    footprint: dict[str, Records]


@dataclass(frozen=True)
class Row:
    """One line of the table: `value` of each of `records`; which of two is the better one."""

    title: str
    records: Records
    value: Callable[[Record], float]
    higher_is_better: bool = False


def _key(name: str) -> Callable[[Record], float]:
    return lambda record: float(record[name])


def _cpu_ms_per_mib(record: Record) -> float:
    return float(record["cpu_s"]) * 1e3 / (float(record["all_bytes"]) / 2**20)


def _per_1000_buffers(name: str, size: int) -> Callable[[Record], float]:
    return lambda record: float(record[name]) * 1000 / (float(record["bytes"]) / size)


def _rows(results: Results) -> list[Row]:
    cells = results["cells"]
    rows: list[Row] = []
    for gap, title in (("0", "back to back"), ("5", "5 µs apart"), ("50", "50 µs apart")):
        for percent in ("p50", "p99"):
            name = f"16-byte write until its buffer is back, {title}: {percent}, µs"
            rows.append(Row(name, cells[f"roundtrip {gap}"], _key(f"{percent}_us")))
    for size, title in ((16, "64 of 16 B"), (4096, "16 of 4 KiB"), (32768, "16 of 32 KiB")):
        records = cells[f"output {size}"]
        rows.append(Row(f"output, {title} at a time: MB/s", records, _key("mb_s"), True))
        rows.append(Row("… the daemon's CPU: ms/MiB", _without(records, "floor"), _cpu_ms_per_mib))
        rows.append(Row("… kicks per 1000 buffers", records, _per_1000_buffers("kicks", size)))
        rows.append(Row("… interrupts per 1000 buffers", records, _per_1000_buffers("calls", size)))
    for size, title in ((4096, "4 KiB"), (32768, "32 KiB")):
        name = f"input, 64 buffers of {title}: MB/s"
        rows.append(Row(name, cells[f"input {size}"], _key("mb_s"), True))
    for percent in ("p50", "p99"):
        rows.append(
            Row(f"echo of a key, 20 ms apart: {percent}, µs", cells["echo"], _key(f"{percent}_us"))
        )
    rows.append(Row("plain TCP socket, one CPU to the other: MB/s", cells["copy"], _key("mb_s")))
    for guests, records in results["footprint"].items():
        name = "1 idle guest" if guests == "1" else f"{guests} idle guests"
        rows.append(Row(f"{name}: CPU, %", records, _key("cpu_percent")))
        rows.append(Row("… context switches a second", records, _key("switches_s")))
        rows.append(Row("… memory (PSS), MiB", records, _key("pss_mib")))
        rows.append(Row("… with its files in full, MiB", records, _key("alone_mib")))
    rows.append(Row("each further guest: PSS, MiB", _growth(results["footprint"]), _key("mib")))
    return rows


def _without(records: Records, side: str) -> Records:
    return {key: value for key, value in records.items() if key != side}


def _growth(footprint: dict[str, Records]) -> Records:
    """Return each round's memory of one more guest, between the fewest guests and the most."""
    counts = sorted(footprint, key=int)
    few, many = counts[0], counts[-1]
    growth: Records = {}
    for side in footprint[few]:
        growth[side] = [
            {"mib": (float(b["pss_mib"]) - float(a["pss_mib"])) / (int(many) - int(few))}
            for a, b in zip(footprint[few][side], footprint[many][side], strict=True)
            if "pss_mib" in a and "pss_mib" in b
        ]
    return growth


def _values(row: Row, side: str) -> list[float]:
    return [row.value(record) for record in row.records.get(side, []) if "error" not in record]


def _number(value: float) -> str:
    """Return three significant digits, in plain notation."""
    if value == 0:
        return "0"
    digits = max(0, 2 - int(f"{abs(value):e}".partition("e")[2]))
    return f"{value:.{min(digits, 4)}f}"


def _text(row: Row, side: str) -> str:
    values = _values(row, side)
    errors = [str(r["error"]) for r in row.records.get(side, []) if "error" in r]
    failed = f"; {len(errors)} rounds failed" if errors else ""
    if not values:
        return f"fails: {errors[0].splitlines()[0]}" if errors else ""
    spread = f" ({_number(min(values))} to {_number(max(values))})" if len(values) > 1 else ""
    return f"{_number(median(values))}{spread}{failed}"


def _ratio(row: Row) -> str:
    ours, peer = _values(row, "ours"), _values(row, "peer")
    if not ours or not peer:
        return ""
    a, b = median(ours), median(peer)
    if not row.higher_is_better:
        a, b = b, a
    return f"{_number(a / b)}" if b else ""


def _machine(results: Results) -> str:
    machine, versions = results["machine"], results["versions"]
    kind = "a virtual machine" if machine["virtual"] == "yes" else "a machine"
    pinned = (
        "The guest and its client ran on one CPU, the daemon on another."
        if machine["pinned"] == "yes"
        else "Nothing was pinned to a CPU."
    )
    peer = f"version {versions['peer']}" if "peer" in versions else "not available, so no ratio"
    return (
        f"Rounds: {results['rounds']}, in {results['took_s']:.0f} s, on {kind} with "
        f"{machine['cpus']} CPUs ({machine['cpu']}) and {machine['memory_gib']} GiB, Linux "
        f"{machine['linux']}, CPython {machine['python']}. {pinned} Other programs "
        f"used {machine['others_percent']} % of the CPUs meanwhile. Ours: version "
        f"{versions['ours']}; peer: {peer}."
    )


def render(results: Results) -> str:
    """Return the machine's description and the table, in Markdown."""
    has_peer = "peer" in results["versions"]
    columns = ["", "ours", *(["peer", "ratio"] if has_peer else []), "floor"]
    lines = [_machine(results), "", _line(columns), _line(["---"] * len(columns))]
    for row in _rows(results):
        peer = [_text(row, "peer"), _ratio(row)] if has_peer else []
        lines.append(_line([row.title, _text(row, "ours"), *peer, _text(row, "floor")]))
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def rewrite(readme: Path, table: str) -> None:
    """Put `table` between the two marks in `readme`."""
    head, _, rest = readme.read_text().partition(BEGIN)
    _, _, tail = rest.partition(END)
    readme.write_text(f"{head}{BEGIN}\n\n{table}\n\n{END}{tail}")
