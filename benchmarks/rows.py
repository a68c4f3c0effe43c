"""What a report says: the rows of its tables, the targets, the curves, and how values compare."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import median

Record = dict[str, float | str]
Records = dict[str, list[Record]]

#: `cells[name][side]` holds a record a round; a side that was not measured is not there.
Cells = dict[str, Records]

Value = str | Callable[[Record], float]

SIDES = {
    "ours": "ours",
    "plain": "ours, plain Python",
    "debian": "ours, Debian's Python",
    "peer": "peer",
    "virtconsole": "QEMU's own",
    "floor": "limit",
}

GAPS = {"0": "back to back", "5": "5 µs apart", "50": "50 µs apart"}
OUTPUTS = {"16": "64 of 16 B", "4096": "16 of 4 KiB", "32768": "16 of 32 KiB"}
FOOTPRINTS = (1, 16, 64)


@dataclass(frozen=True)
class Row:
    """One line of a table: a value of each record of a cell.

    `reference` is the cell that has the peer's records, if `cell` has none; `limit` says whether
    the floor's value means anything here.
    """

    title: str
    cell: str
    value: Value
    higher_is_better: bool = False
    reference: str = ""
    limit: bool = True

    def of(self, record: Record) -> float | None:
        """Return the value in `record`, or None when that round failed or has no such value."""
        if "error" in record:
            return None
        try:
            return self.value(record) if callable(self.value) else float(record[self.value])
        except (KeyError, ZeroDivisionError):
            return None

    def records(self, cells: Cells, side: str) -> list[Record]:
        """Return the rounds of `side`."""
        if side == "floor" and not self.limit:
            return []
        cell = self.reference if side == "peer" and self.reference else self.cell
        return cells.get(cell, {}).get(side, [])

    def values(self, cells: Cells, side: str) -> list[float]:
        """Return the values of `side` in the rounds that did not fail."""
        return [v for v in map(self.of, self.records(cells, side)) if v is not None]

    def costs(self, cells: Cells, side: str, against: str) -> list[float]:
        """Return, for each round of both, how many times worse than `against` `side` is."""
        pairs = zip(self.records(cells, side), self.records(cells, against), strict=False)
        costs = []
        for one, other in pairs:
            a, b = self.of(one), self.of(other)
            if a is not None and b is not None:
                worse, better = (b, a) if self.higher_is_better else (a, b)
                costs.append(quotient(worse, better))
        return costs


@dataclass(frozen=True)
class Section:
    """A table and its heading; `text` stands before it."""

    title: str
    rows: tuple[Row, ...]
    text: str = ""


@dataclass(frozen=True)
class Target:
    """What a row is to reach: `bound`, absolutely or against another side.

    Against another program it says how many times better ours has to be; against the limit, how
    many times worse it may be.
    """

    row: Row
    bound: float
    against: str = ""
    side: str = "ours"

    def measured(self, cells: Cells) -> float | None:
        """Return what is to be held against `bound`, or None when it was not measured."""
        if not self.against:
            values = self.row.values(cells, self.side)
            return median(values) if values else None
        costs = self.row.costs(cells, self.side, self.against)
        if not costs:
            return None
        return median(costs) if self.against == "floor" else inverse(median(costs))

    @property
    def at_least(self) -> bool:
        """Whether it is to be at least `bound`, not at most."""
        return self.against != "floor" if self.against else self.row.higher_is_better


@dataclass(frozen=True)
class Curve:
    """How a value grows: a cell `name x`, with these arguments, for each x of `along`."""

    name: str
    title: str
    x: str
    ys: tuple[Row, ...]
    along: tuple[int, ...]
    arguments: str
    floor: str = ""

    def rows(self) -> tuple[Row, ...]:
        """Return a row for each point, those of one x together."""
        return tuple(
            replace(y, title=f"{x} {self.x}: {y.title}", cell=f"{self.name} {x}")
            for x in self.along
            for y in self.ys
        )


def quotient(a: float, b: float) -> float:
    """Return a / b for values that may be zero, two of them being as good as each other."""
    return a / b if b else math.inf if a else 1.0


def inverse(value: float) -> float:
    """Return 1 / value, infinity included."""
    return 1 / value if value else math.inf


def number(value: float) -> str:
    """Return three significant digits, in plain notation."""
    if value == 0 or math.isinf(value):
        return "∞" if value else "0"
    digits = max(0, 2 - int(f"{abs(value):e}".partition("e")[2]))
    return f"{value:.{min(digits, 4)}f}"


def _cpu_ms_per_mib(record: Record) -> float:
    return float(record["cpu_s"]) * 1e3 / (float(record["all_bytes"]) / 2**20)


def _cpu_percent(record: Record) -> float:
    return 100 * float(record["cpu_s"]) / float(record["seconds"])


def _cpu_percent_a_guest(record: Record) -> float:
    return _cpu_percent(record) / float(record["guests"])


def _notifications(record: Record) -> float:
    writes = float(record.get("count") or float(record["chains_s"]) * float(record["seconds"]))
    return 1000 * (float(record["kicks"]) + float(record["calls"])) / writes


def _watchers_got(record: Record) -> float:
    return 100 * float(record["least_watched"]) / float(record["all_bytes"])


def _delivered_mb_s(record: Record) -> float:
    watched = float(record.get("all_watched", 0))
    return float(record["mb_s"]) * (1 + watched / float(record["all_bytes"]))


def derive(cells: Cells) -> Cells:
    """Return `cells` and what follows from several of them, round by round."""
    more: Cells = {}

    def join(name: str, one: str, other: str, value: Callable[[Record, Record], float]) -> None:
        for side, records in cells.get(one, {}).items():
            if others := cells.get(other, {}).get(side):
                more.setdefault(name, {})[side] = [
                    {"value": value(a, b)} if "error" not in a.keys() | b.keys() else {"error": ""}
                    for a, b in zip(records, others, strict=False)
                ]

    join("readers share", "readers stuck", "output 4096", _quotient("mb_s"))
    few, *rest = FOOTPRINTS
    for many in rest:
        for field in ("pss_mib", "private_mib"):
            more_guests = (f"memory {many}", f"memory {few}")
            join(f"{field} {many}", *more_guests, _slope(field, many - few))
    for size in ("4096", "32768"):
        copies = cells.get("copy", {}).get("floor", [])
        for side, records in cells.get(f"input {size}", {}).items():
            if side != "floor":
                more.setdefault(f"input share {size}", {})[side] = [
                    record if "error" in record else {"value": _quotient("mb_s")(record, whole)}
                    for record, whole in zip(records, copies, strict=False)
                ]
    return {**cells, **more}


def _quotient(field: str) -> Callable[[Record, Record], float]:
    return lambda a, b: float(a[field]) / float(b[field])


def _slope(field: str, guests: int) -> Callable[[Record, Record], float]:
    return lambda many, few: 1024 * (float(many[field]) - float(few[field])) / guests


def _roundtrips(kind: str) -> Iterator[Row]:
    for gap, apart in GAPS.items():
        cell, reference = f"{kind} {gap}", f"split {gap}"
        yield Row(f"{apart}: p50, µs", cell, "p50_us", reference=reference)
        yield Row("… p99, µs", cell, "p99_us", reference=reference)
        yield Row("… notifications a 1000", cell, _notifications, reference=reference, limit=False)


def _outputs() -> Iterator[Row]:
    for size, what in OUTPUTS.items():
        cell = f"output {size}"
        if size == "16":
            yield Row(f"{what} at a time: M buffers/s", cell, _millions("chains_s"), True)
            yield Row("… MB/s", cell, "mb_s", True)
        else:
            yield Row(f"{what} at a time: MB/s", cell, "mb_s", True)
        yield Row("… the daemon's CPU, ms/MiB", cell, _cpu_ms_per_mib, limit=False)
        yield Row("… notifications a 1000", cell, _notifications, limit=False)


def _millions(field: str) -> Callable[[Record], float]:
    return lambda record: float(record[field]) / 1e6


def _guest_ms_per_mib(record: Record) -> float:
    return float(record["vcpu_s"]) * 1e3 / (float(record["bytes"]) / 2**20)


def _guests() -> Iterator[Row]:
    for kind, system in (("uml", "User Mode Linux"), ("qemu", "QEMU (TCG)")):
        for port, device in (("hvc0", "hvc0"), ("port", "a generic port")):
            yield Row(f"{system}, dd to {device}: MB/s", f"{kind} {port}", "mb_s", True)
            yield Row("… the guest's CPU, ms/MiB", f"{kind} {port}", _guest_ms_per_mib)


def _memory() -> Iterator[Row]:
    for guests in FOOTPRINTS:
        yield Row(f"{guests} connected, PSS, MiB", f"memory {guests}", "pss_mib")
        yield Row("… private dirty, MiB", f"memory {guests}", "private_mib")
    for guests in FOOTPRINTS[1:]:
        yield Row(f"each further one, up to {guests}: PSS, KiB", f"pss_mib {guests}", "value")
        yield Row("… private dirty, KiB", f"private_mib {guests}", "value")
    title = f"{FOOTPRINTS[-1]} connected, equal pages merged by the host: PSS each, KiB"
    yield Row(title, "merged", "pss_kib_each")


CURVES = (
    Curve(
        "size",
        "Output by the size of a buffer, 16 at a time",
        "bytes a buffer",
        (Row("MB/s", "", "mb_s", True),),
        (16, 64, 256, 1024, 4096, 16384, 65536),
        "output --depth=16 --size={}",
        "device",
    ),
    Curve(
        "depth",
        "Output by the number of buffers at a time, 16 bytes each",
        "buffers at a time",
        (Row("M buffers/s", "", _millions("chains_s"), True),),
        (1, 4, 16, 64, 128, 256),
        "output --size=16 --depth={}",
        "device",
    ),
    Curve(
        "readers",
        "Output by the number of readers, 16 buffers of 4 KiB at a time",
        "readers",
        (
            Row("the guest's MB/s", "", "mb_s", True),
            Row("MB/s of all readers together", "", _delivered_mb_s, True),
        ),
        (1, 2, 4, 8, 16, 32),
        "output --depth=16 --size=4096 --readers={}",
    ),
    Curve(
        "guests",
        "CPU by the number of guests, each writing 10 KB/s in lines of 100 bytes",
        "guests",
        (Row("the daemon's CPU a guest, % of a core", "", _cpu_percent_a_guest),),
        (1, 4, 16, 64, 256),
        "load --rate=10000 --size=100 --guests={}",
    ),
)

SPLIT = tuple(_roundtrips("split"))
OUTPUT = tuple(_outputs())
READERS = (
    Row("the guest's MB/s", "readers stuck", "mb_s", True),
    Row("… as a share of what it is with one reader", "readers share", "value", True),
    Row("what the least of the nine got, %", "readers stuck", _watchers_got, True),
    Row("bytes missed, by the daemon's count", "readers stuck", "missed"),
)
INPUT = tuple(
    row
    for size, what in (("4096", "4 KiB"), ("32768", "32 KiB"))
    for row in (
        Row(f"64 buffers of {what}: MB/s", f"input {size}", "mb_s", True),
        Row("… as a share of a plain socket copy", f"input share {size}", "value", True),
    )
)
ECHO = (
    Row("20 ms apart, everybody asleep: p50, µs", "echo cold", "p50_us"),
    Row("… p99, µs", "echo cold", "p99_us"),
    Row("20 µs apart, inside the poll window: p50, µs", "echo window", "p50_us"),
    Row("… p99, µs", "echo window", "p99_us"),
)
IDLE = (
    Row("CPU, %", "idle", "cpu_percent"),
    Row("context switches a guest a minute", "idle", "switches_guest_minute"),
)
MEMORY = tuple(_memory())
GUESTS = tuple(_guests())
MANY = (
    Row("100 guests, 10 KB/s each: CPU, % of a core", "load 100", _cpu_percent),
    Row("… bytes lost", "load 100", "lost"),
    Row("… latest arrival, ms", "load 100", "late_ms"),
    Row("start of 256 guests, until all answer: s", "start 256", "start_s"),
)

SECTIONS = (
    Section(
        "Round trip of 16 bytes, split rings",
        SPLIT,
    ),
    Section(
        "Round trip of 16 bytes, packed rings",
        tuple(_roundtrips("packed")),
        "The peer has none: beside them are its split rings.",
    ),
    Section("Output", OUTPUT, "To one reader, that reads as fast as it can."),
    Section("Ten readers, one stuck", READERS, "Output, 16 of 4 KiB at a time."),
    Section(
        "Input",
        (*INPUT, Row("plain TCP socket, one CPU to the other: MB/s", "copy", "mb_s", True)),
    ),
    Section("Echo of a key", ECHO),
    Section("16 idle guests", IDLE),
    Section("Memory", MEMORY),
    Section("Many guests", MANY),
    Section(
        "Real guests",
        GUESTS,
        "`dd` of 8 MiB, or less where that would take longer than 10 s. The peer has no generic"
        " port.",
    ),
)


def _row(rows: tuple[Row, ...], cell: str, value: Value) -> Row:
    return next(row for row in rows if row.cell == cell and row.value == value)


def _targets() -> Iterator[Target]:
    loop = _row(SPLIT, "split 0", "p50_us")
    yield Target(loop, 3, "peer")
    yield Target(loop, 2, "floor", "compiled")
    yield Target(loop, 8, "floor", "plain")
    for gap in ("5", "50"):
        yield Target(_row(SPLIT, f"split {gap}", "p50_us"), 20, "peer")
    for gap in GAPS:
        yield Target(_row(SPLIT, f"split {gap}", _notifications), 100, "peer")
    small = next(row for row in OUTPUT if row.cell == "output 16")
    yield Target(small, 5, "peer")
    yield Target(small, 2.5)
    for size, times in (("4096", 30), ("32768", 40)):
        yield Target(_row(OUTPUT, f"output {size}", "mb_s"), times, "peer")
        yield Target(_row(OUTPUT, f"output {size}", "mb_s"), 1.5, "floor")
        yield Target(_row(OUTPUT, f"output {size}", _cpu_ms_per_mib), 30, "peer")
    for size in OUTPUTS:
        yield Target(_row(OUTPUT, f"output {size}", _notifications), 100, "peer")
    yield Target(READERS[1], 0.8)
    for size, share in (("4096", 1 / 3), ("32768", 2 / 3)):
        yield Target(_row(INPUT, f"input share {size}", "value"), share)
    yield Target(ECHO[0], 1 / 1.15, "peer")
    yield Target(ECHO[2], 1 / 0.8, "peer")
    yield Target(IDLE[0], 0)
    yield Target(IDLE[1], 1)
    yield Target(_row(MEMORY, "pss_mib 64", "value"), 700, side="debian")
    yield Target(_row(MEMORY, "merged", "pss_kib_each"), 700, side="debian")
    yield Target(MANY[0], 50)
    yield Target(MANY[1], 0)
    yield Target(MANY[3], 3)
    for row in GUESTS:
        yield Target(row, 1, "peer")
        yield Target(row, 1, "virtconsole")


#: What the project wants to reach.
TARGETS = tuple(_targets())

#: The table in the project's own README: a title, and the row.
HEAD = (
    ("a 16-byte write until its buffer is back, µs: back to back", SPLIT[0]),
    ("… 50 µs apart", _row(SPLIT, "split 50", "p50_us")),
    ("16-byte writes, 64 at a time, M/s", OUTPUT[0]),
    ("4 KiB writes, MB/s", _row(OUTPUT, "output 4096", "mb_s")),
    ("32 KiB writes, MB/s", _row(OUTPUT, "output 32768", "mb_s")),
    ("… the daemon's CPU, ms/MiB", _row(OUTPUT, "output 32768", _cpu_ms_per_mib)),
    ("echo of a key, everybody asleep, µs", ECHO[0]),
    ("100 guests, 10 KB/s each, % of a core", MANY[0]),
    ("memory of a further guest, KiB", _row(MEMORY, "pss_mib 64", "value")),
)
