"""`top`: all guests of all daemons, alive on the whole screen, or a frame or lines for scripts."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import termios
import threading
import time
import tty
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType

import msgspec
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .. import monitor
from ..tables import size
from ..words import clean
from .terminal import ending, kept

#: Samples that a sparkline goes back; and those shown at once, also in less than so many columns.
_SAMPLES = 60
_SHOWN, _SHOWN_NARROW, _NARROW = 16, 8, 100
_BARS = " ▁▂▃▄▅▆▇█"

#: A name is cut beyond so many characters.
_LONGEST_NAME = 40

_KEYS = {"up": b"\x1b[A", "down": b"\x1b[B", "up too": b"\x1bOA", "down too": b"\x1bOB"}

_HELP = """\
q       leave
s       sort by the next column
r       the other way round
up down choose a guest (k j)
Enter   attach to it; its escape key, Ctrl-], and q lead back here
?       this help, and back"""

Ask = Callable[[], Sequence[tuple[str, monitor.Status]]]


@dataclass
class Row:
    """A guest in one sample; rates in bytes per second, over the time since the one before."""

    path: str
    guest: monitor.GuestStatus
    rate_in: float = 0.0
    rate_out: float = 0.0
    rates: deque[float] = field(default_factory=lambda: deque(maxlen=_SAMPLES))

    @property
    def input(self) -> int:
        """Bytes that it was given so far, by all its ports."""
        return sum(port.input for port in self.guest.ports)

    @property
    def output(self) -> int:
        """Bytes that it has put out so far, by all its ports."""
        return sum(port.output for port in self.guest.ports)

    @property
    def readers(self) -> int:
        """How many are attached."""
        return sum(port.readers for port in self.guest.ports)

    @property
    def lag(self) -> int:
        """Bytes that whoever is furthest behind has not read."""
        return max((port.lag for port in self.guest.ports), default=0)

    @property
    def dropped(self) -> int:
        """Bytes that somebody missed, or that went nowhere."""
        return sum(port.missed + port.discarded for port in self.guest.ports)


class Samples:
    """All guests as they were when last asked, and how fast they were."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._at = 0.0
        self.rows: list[Row] = []

    def take(self, now: float) -> list[Row]:
        """Ask all daemons, at `now` on the monotonic clock; raises ConsoleError."""
        before = {(row.path, row.guest.name): row for row in self.rows}
        span = now - self._at
        rows = []
        for path, status in self._ask():
            for guest in status.guests:
                row = Row(path, guest)
                if (last := before.get((path, guest.name))) is not None and span > 0:
                    row.rates = last.rates
                    row.rate_in = max(0, row.input - last.input) / span
                    row.rate_out = max(0, row.output - last.output) / span
                    row.rates.append(row.rate_in + row.rate_out)
                rows.append(row)
        self._at, self.rows = now, rows
        return rows


def spark(rates: Sequence[float], width: int) -> str:
    """Return the last `width` rates as bars, the highest of all that are kept being full."""
    most = max(rates, default=0.0) or 1.0
    steps = len(_BARS) - 1
    shown = [*rates][-width:]
    # What is more than nothing is to be seen.
    return "".join(_BARS[-int(-rate * steps // most)] for rate in shown).rjust(width)


@dataclass(frozen=True)
class Column:
    """A column: `head`, the cell's text, and what it is sorted by, the largest first if `down`."""

    head: str
    text: Callable[[Row], str]
    order: Callable[[Row], float | str]
    down: bool = True


def _number(count: float | None) -> float:
    return -1.0 if count is None else count


COLUMNS = (
    Column("NAME", lambda r: clean(r.guest.name), lambda r: r.guest.name, down=False),
    Column("STATE", lambda r: r.guest.state, lambda r: r.guest.state, down=False),
    Column("IN/s", lambda r: size(r.rate_in), lambda r: r.rate_in),
    Column("OUT/s", lambda r: size(r.rate_out), lambda r: r.rate_out),
    Column("RATE", lambda r: spark(r.rates, _SHOWN), lambda r: r.rate_in + r.rate_out),
    Column("READERS", lambda r: str(r.readers), lambda r: r.readers),
    Column("LAG", lambda r: size(r.lag), lambda r: r.lag),
    Column("DROPPED", lambda r: size(r.dropped), lambda r: r.dropped),
    Column("RESTARTS", lambda r: str(r.guest.restarts), lambda r: r.guest.restarts),
    Column(
        "RSS",
        lambda r: "-" if r.guest.rss is None else size(r.guest.rss),
        lambda r: _number(r.guest.rss),
    ),
    Column(
        "CPU",
        lambda r: "-" if r.guest.cpu is None else f"{r.guest.cpu:.1f}%",
        lambda r: _number(r.guest.cpu),
    ),
)

#: How a state is shown that is not as it should be.
_ALARMING = {"running": "", "starting": "yellow", "backoff": "yellow", "finished": "dim"}


@dataclass
class View:
    """What is seen: which column rows are sorted by, and which guest is chosen."""

    by: int = 0
    turned: bool = False
    chosen: tuple[str, str] | None = None
    help: bool = False
    failure: str = ""

    def sorted(self, rows: Sequence[Row]) -> list[Row]:
        """Return the rows in the order in which they are shown."""
        column = COLUMNS[self.by]
        named = sorted(rows, key=lambda row: (row.guest.name, row.path))
        return sorted(named, key=column.order, reverse=column.down is not self.turned)

    def index(self, rows: Sequence[Row]) -> int:
        """Return where the chosen guest is among sorted rows, the first if it is gone."""
        keys = [(row.path, row.guest.name) for row in rows]
        return keys.index(self.chosen) if self.chosen in keys else 0

    def move(self, rows: Sequence[Row], by: int) -> None:
        """Choose the guest so many rows on."""
        if rows:
            row = rows[min(max(0, self.index(rows) + by), len(rows) - 1)]
            self.chosen = (row.path, row.guest.name)

    def table(self, rows: Sequence[Row], width: int, height: int) -> Table:
        """Return the table, `height` rows of it around the chosen one at most."""
        table = Table(box=None, expand=True, padding=(0, 1, 0, 0), header_style="bold")
        for number, column in enumerate(COLUMNS):
            mark = ("▲" if self.turned is column.down else "▼") if number == self.by else ""
            table.add_column(
                Text(column.head + mark),
                justify="left" if number < 2 else "right",
                no_wrap=True,
                overflow="ellipsis",
                max_width=_LONGEST_NAME,
                ratio=1 if number == 0 else None,
            )
        at = self.index(rows)
        first = max(0, min(at - height // 2, len(rows) - height))
        for number, row in enumerate(rows[first : first + height], first):
            state = _ALARMING.get(row.guest.state, "red")
            cells = [
                Text(self._cell(column, row, width), style=state if column.head == "STATE" else "")
                for column in COLUMNS
            ]
            table.add_row(*cells, style="reverse" if number == at else "")
        return table

    @staticmethod
    def _cell(column: Column, row: Row, width: int) -> str:
        text = column.text(row)
        return text[-_SHOWN_NARROW:] if column.head == "RATE" and width < _NARROW else text

    def frame(self, rows: Sequence[Row], width: int, height: int) -> Table:
        """Return all that is on a screen of so many columns and lines."""
        frame = Table.grid(expand=True)
        frame.add_column(no_wrap=True, overflow="ellipsis")
        out = sum(row.rate_out for row in rows)
        into = sum(row.rate_in for row in rows)
        clock = time.strftime("%H:%M:%S")
        frame.add_row(
            Text(
                f"{clock}  {len(rows)} guest{'s' * (len(rows) != 1)}, "
                f"{size(into)}/s in, {size(out)}/s out",
                style="bold",
            )
        )
        frame.add_row(Text(self.failure, style="red") if self.failure else Text())
        if self.help:
            for line in _HELP.splitlines():
                frame.add_row(Text(line))
        else:
            frame.add_row(self.table(self.sorted(rows), width, max(1, height - 4)))
            frame.add_row(Text("q leave  s sort  Enter attach  ? help", style="dim"))
        return frame


# For scripts


def once(ask: Ask, interval: float, *, width: int | None) -> str:
    """Return a frame without colours, its rates those of `interval` seconds; raises ConsoleError.

    `width` is in columns, None for as many as it takes.
    """
    samples = Samples(ask)
    samples.take(time.monotonic())
    time.sleep(interval)
    rows = View().sorted(samples.take(time.monotonic()))
    table = [[column.head for column in COLUMNS]]
    table += [[column.text(row).strip() for column in COLUMNS] for row in rows]
    widths = [max(map(len, cells)) for cells in zip(*table, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if number < 2 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
        for cells in table
    ]
    return "".join(f"{line if width is None else line[:width]}\n" for line in lines)


def lines(ask: Ask, interval: float) -> Iterator[str]:
    """Yield a line of JSON each `interval` seconds, for ever; raises ConsoleError."""
    samples = Samples(ask)
    samples.take(time.monotonic())
    while True:
        time.sleep(interval)
        yield as_json(samples.take(time.monotonic()))


def as_json(rows: Sequence[Row]) -> str:
    """Return a sample as a line: all that `status --json` has, and the rates."""
    guests = [
        {
            **msgspec.to_builtins(row.guest),
            "input_per_second": round(row.rate_in, 1),
            "output_per_second": round(row.rate_out, 1),
            "readers": row.readers,
            "lag": row.lag,
        }
        for row in rows
    ]
    return json.dumps({"time": round(time.time(), 3), "guests": guests})


# For people


class Top:
    """The live view in this terminal."""

    def __init__(self, ask: Ask, interval: float) -> None:
        self._samples = Samples(ask)
        self._interval = interval
        self._view = View()
        self._rows: list[Row] = []
        self._failure = ""
        self._done = False
        self._enter = False
        self._pending = b""

    def run(self) -> None:
        """Show it until the person leaves, or the terminal does."""
        # The thread may still wait for a daemon when this ends: it goes with the process.
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        threading.Thread(target=self._sample, daemon=True).start()
        with ending():
            while not self._done:
                self._show()
                if self._enter:
                    self._attach()

    def _sample(self) -> None:
        """Ask again and again beside the view, which a daemon that is stuck is not to hold up."""
        while True:
            try:
                self._rows = self._samples.take(time.monotonic())
                self._failure = ""
            except Exception as error:
                self._failure = clean(str(error))
            with suppress(BlockingIOError):
                os.write(self._wake_write, b".")
            time.sleep(self._interval)

    def _show(self) -> None:
        """Show the view until it is left, for good or for a guest."""
        console = Console(highlight=False)
        self._enter = False
        with (
            selectors.DefaultSelector() as selector,
            _keys(),
            self._resizes(),
            Live(console=console, screen=True, auto_refresh=False) as live,
        ):
            selector.register(0, selectors.EVENT_READ)
            selector.register(self._wake_read, selectors.EVENT_READ)
            while not (self._done or self._enter):
                self._view.failure = self._failure
                frame = self._view.frame(self._rows, *console.size)
                live.update(frame, refresh=True)
                for key, _ in selector.select():
                    if key.fd == 0:
                        self._read_keys()
                    else:
                        os.read(self._wake_read, 4096)

    @contextmanager
    def _resizes(self) -> Iterator[None]:
        def resized(_number: int, _frame: FrameType | None) -> None:
            with suppress(BlockingIOError):
                os.write(self._wake_write, b".")

        before = signal.signal(signal.SIGWINCH, resized)
        try:
            yield
        finally:
            signal.signal(signal.SIGWINCH, before)

    def _read_keys(self) -> None:
        data = os.read(0, 1024)
        if not data:
            self._done = True
        keys = self._pending + data
        self._pending = b""
        while keys:
            name = next((name for name, code in _KEYS.items() if keys.startswith(code)), None)
            if name is not None:
                self._view.move(self._sorted(), -1 if name.startswith("up") else 1)
                keys = keys[3:]
            elif len(keys) < 3 and keys[:1] == b"\x1b":
                self._pending = keys
                return
            else:
                self._key(chr(keys[0]))
                keys = keys[1:]

    def _sorted(self) -> list[Row]:
        return self._view.sorted(self._rows)

    def _key(self, key: str) -> None:
        view = self._view
        match key:
            case "q" | "Q" | "\x03" | "\x04":
                self._done = True
            case "?" | "h":
                view.help = not view.help
            case "s":
                view.by, view.turned = (view.by + 1) % len(COLUMNS), False
            case "S":
                view.by, view.turned = (view.by - 1) % len(COLUMNS), False
            case "r":
                view.turned = not view.turned
            case "k":
                view.move(self._sorted(), -1)
            case "j":
                view.move(self._sorted(), 1)
            case "\r" | "\n":
                self._enter = bool(self._rows)

    def _attach(self) -> None:
        """Be attached to the chosen guest until that is left."""
        rows = self._sorted()
        row = rows[self._view.index(rows)]
        self._view.chosen = (row.path, row.guest.name)
        command = [sys.executable, "-m", __package__.split(".")[0], "attach", "--socket", row.path]
        with subprocess.Popen([*command, "--", row.guest.name]) as attached:
            try:
                status = attached.wait()
            except BaseException:
                attached.terminate()  # it has the terminal, and gives it back
                raise
        if status:
            self._failure = f"attach to {clean(row.guest.name)} ended with status {status}"


@contextmanager
def _keys() -> Iterator[None]:
    """Have keys come one by one and unseen."""
    with kept() as before:
        tty.setraw(0, termios.TCSANOW)
        mode = termios.tcgetattr(0)
        mode[1] = before[1]  # output as it was
        termios.tcsetattr(0, termios.TCSANOW, mode)
        yield
