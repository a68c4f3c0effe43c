"""`screen`: what a terminal would show, which has read all that a console has put out.

The terminal is emulated when somebody asks (pyte), from the history; whatever the guest wrote, it
can only ever fill the cells of the screen.
"""

from __future__ import annotations

import copy
import json
import re
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import suppress
from html import escape
from itertools import groupby
from typing import Any, NamedTuple

import pyte
from pyte.screens import Char, Cursor

from ..words import clean
from .link import Link
from .looking import history

#: The largest screen, in columns and rows; the usual one.
LARGEST = (1000, 500)
USUAL = (80, 24)

#: How much of the history, from its end, makes the screen, in bytes.
MOST_HISTORY = 1 << 20

#: Characters that may share a cell; those of a title.
_MOST_MARKS = 8
_LONGEST_TITLE = 256

#: xterm's private modes of the other screen; with 1049 the cursor is kept, too.
_OTHER_SCREEN = {47, 1047, 1049}

#: What 16 colours look like, here; the names are pyte's.
_COLOURS = {
    "black": "000000",
    "red": "cd3131",
    "green": "0dbc79",
    "brown": "e5b510",
    "blue": "2472c8",
    "magenta": "bc3fbc",
    "cyan": "11a8cd",
    "white": "d5d5d5",
    "brightblack": "666666",
    "brightred": "f14c4c",
    "brightgreen": "23d18b",
    "brightbrown": "f5f543",
    "brightblue": "3b8eea",
    "brightmagenta": "d670d6",
    "bfightmagenta": "d670d6",  # as pyte 0.8 spells it
    "brightcyan": "29b8db",
    "brightwhite": "ffffff",
}
FOREGROUND, BACKGROUND = "d5d5d5", "101014"

#: The size of a cell in pixels, and where in it the letters stand.
CELL, BASE, FONT_SIZE = (9, 18), 14, 15


class _Screen(pyte.Screen):
    """A screen with another one for programs that fill it, as xterm's."""

    def __init__(self, columns: int, rows: int) -> None:
        self._main: tuple[Any, Cursor] | None = None
        super().__init__(columns, rows)

    def reset(self) -> None:
        self._main = None
        super().reset()

    def set_mode(self, *modes: int, **options: Any) -> None:
        if options.get("private") and _OTHER_SCREEN.intersection(modes) and self._main is None:
            self._main = (dict(self.buffer), copy.copy(self.cursor))
            self.buffer.clear()
        super().set_mode(*modes, **options)

    def reset_mode(self, *modes: int, **options: Any) -> None:
        if options.get("private") and _OTHER_SCREEN.intersection(modes) and self._main is not None:
            buffer, cursor = self._main
            self._main = None
            self.buffer.clear()
            self.buffer.update(buffer)
            if 1049 in modes:
                self.cursor = cursor
            self.ensure_hbounds()
            self.ensure_vbounds()
        super().reset_mode(*modes, **options)


class _Tolerant:
    """The screen as the parser sees it: with sequences that make no sense nothing is done."""

    def __init__(self, screen: pyte.Screen) -> None:
        self._screen = screen

    def __getattr__(self, name: str) -> Callable[..., None]:
        method = getattr(self._screen, name)

        def call(*args: Any, **options: Any) -> None:
            # What pyte does not foresee is any of these: it assigns nothing for ESC [ 4 J.
            with suppress(TypeError, ValueError, LookupError, UnboundLocalError):
                method(*args, **options)

        return call


#: C1 in UTF-8, as the sequences of two characters that pyte knows.
_C1 = {code: f"\x1b{chr(code - 0x40)}" for code in range(0x80, 0xA0)}

#: ECMA-48 strings, which a line's end ends too; and control sequences.
_SEQUENCES = re.compile(
    r"\x1b(?:"
    r"(?P<kind>[]PX^_])(?P<string>[^\x07\x18\x1a\x1b\n]*)(?:\x07|\x1b\\)?"
    r"|\[(?P<prefix>[<-?]?)(?P<parameters>[0-9;:]*)(?P<between>[ -/]*)(?P<final>[@-~])"
    r"|\["  # one that is none, or not whole
    r")"
)

#: A number that is no row or column any more; the largest part of a colour.
_LARGEST = 9999
_BRIGHTEST = 255


class Style(NamedTuple):
    """How a cell looks; colours are six hexadecimal digits, None for the terminal's own."""

    fg: str | None = None
    bg: str | None = None
    bold: bool = False
    italic: bool = False
    underlined: bool = False
    struck: bool = False


_BLANK = Style()


class Cell(NamedTuple):
    """What is seen from `column` on, `span` columns wide."""

    column: int
    span: int
    text: str
    style: Style


class Terminal:
    """A terminal of `columns` and `rows`, which is fed what a guest has written."""

    def __init__(self, columns: int, rows: int) -> None:
        self._screen = _Screen(columns, rows)
        self._stream = pyte.Stream(_Tolerant(self._screen), strict=False)  # type: ignore
        self._title = ""

    def feed(self, data: bytes) -> None:
        """Show `data`, which is all that there is: nothing is kept of a sequence that goes on."""
        text = data.decode(errors="replace").translate(_C1)
        self._stream.feed(_SEQUENCES.sub(self._known, text))

    def _known(self, match: re.Match[str]) -> str:
        """Return a sequence as pyte takes it, nothing for one that it would take for another."""
        if match["kind"] is not None:
            what, _, title = match["string"].partition(";")
            if match["kind"] == "]" and what in ("0", "2"):
                self._title = title[:_LONGEST_TITLE]
            return ""
        if match["prefix"] not in ("", "?") or match["between"]:  # None for what is none
            return ""
        parameters = match["parameters"]
        largest = _LARGEST
        if match["final"] == "m":
            parameters = ";".join(map(_without_colons, parameters.split(";")))
            largest = _BRIGHTEST
        elif ":" in parameters:
            return ""
        numbers = [
            str(min(int(n.lstrip("0")[:5] or 0), largest)) for n in parameters.split(";")[:32]
        ]
        return f"\x1b[{match['prefix']}{';'.join(numbers)}{match['final']}"

    @property
    def size(self) -> tuple[int, int]:
        """Columns and rows."""
        return self._screen.columns, self._screen.lines

    @property
    def cursor(self) -> tuple[int, int] | None:
        """Its column and row, from 0, None while it is hidden."""
        cursor = self._screen.cursor
        if cursor.hidden:
            return None
        return min(cursor.x, self._screen.columns - 1), min(cursor.y, self._screen.lines - 1)

    @property
    def title(self) -> str:
        """What the guest would have the window called."""
        return clean(self._title)

    def cells(self, row: int) -> Iterator[Cell]:
        """Yield the cells that are not the second half of another."""
        line = self._screen.buffer[row]
        columns = self._screen.columns
        for column in range(columns):
            cell = line[column]
            if cell.data:
                wide = column + 1 < columns and not line[column + 1].data
                yield Cell(column, 1 + wide, _shown(cell.data), _style(cell))

    def runs(self, row: int) -> Iterator[Cell]:
        """Yield cells of one width that look the same as one, without the blanks at the end."""
        cells = list(self.cells(row))
        while cells and cells[-1].text == " " and cells[-1].style == _BLANK:
            cells.pop()
        for _, group in groupby(cells, key=lambda cell: (cell.style, cell.span)):
            run = list(group)
            span = sum(cell.span for cell in run)
            yield Cell(run[0].column, span, "".join(cell.text for cell in run), run[0].style)

    def text(self, row: int) -> str:
        """Return a row's text without the blanks at its end."""
        return "".join(cell.text for cell in self.cells(row)).rstrip()


def _shown(data: str) -> str:
    """Return what of a cell's text can be shown: nothing that steers, nor that never ends."""
    shown = "".join(
        char for char in data[:_MOST_MARKS] if char.isprintable() or unicodedata.combining(char)
    )
    return shown or " "


def _style(cell: Char) -> Style:
    fg, bg = _colour(cell.fg, bright=cell.bold), _colour(cell.bg)
    if cell.reverse:
        fg, bg = bg or BACKGROUND, fg or FOREGROUND
    return Style(fg, bg, cell.bold, cell.italics, cell.underscore, cell.strikethrough)


def _colour(name: str, *, bright: bool = False) -> str | None:
    if name == "default":
        return None
    if bright and f"bright{name}" in _COLOURS:
        return _COLOURS[f"bright{name}"]
    return _COLOURS.get(name, name)


# How it is written


def plain(terminal: Terminal) -> str:
    """Return the rows as text, without the empty ones at the end."""
    rows = [terminal.text(row) for row in range(terminal.size[1])]
    while rows and not rows[-1]:
        rows.pop()
    return "".join(f"{row}\n" for row in rows)


def ansi(terminal: Terminal) -> str:
    """Return the rows with colours, as sequences of ECMA-48 that do nothing else."""
    lines = []
    for row in range(terminal.size[1]):
        line, last = "", _BLANK
        for _, _, text, style in terminal.runs(row):
            line += text if style == last else _sgr(style) + text
            last = style
        lines.append(line + _sgr(_BLANK) * (last != _BLANK))
    while lines and not lines[-1]:
        lines.pop()
    return "".join(f"{line}\n" for line in lines)


def _without_colons(parameter: str) -> str:
    """Return a parameter of SGR whose parts have colons (ITU-T T.416) as older ones are written."""
    parts = parameter.split(":")
    if parts[0] in ("38", "48") and parts[1:2] == ["2"]:
        return ";".join([parts[0], "2", *parts[-3:]])
    if parts[0] in ("38", "48"):
        return ";".join(parts)
    if parts[0] == "4" and parts[1:] == ["0"]:
        return "24"
    return parts[0]


def _sgr(style: Style) -> str:
    codes = ["0"]
    flags = (style.bold, style.italic, style.underlined, style.struck)
    codes += [code for code, on in zip("1349", flags, strict=True) if on]
    for base, colour in ((38, style.fg), (48, style.bg)):
        if colour is not None:
            codes.append(f"{base};2;{';'.join(map(str, bytes.fromhex(colour)))}")
    return f"\x1b[{';'.join(codes)}m" if style != _BLANK else "\x1b[m"


def svg(terminal: Terminal) -> str:
    """Return a picture in SVG: rectangles and text, no script and no link."""
    columns, rows = terminal.size
    width, height = columns * CELL[0], rows * CELL[1]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-size="{FONT_SIZE}" '
        "font-family=\"'DejaVu Sans Mono',Menlo,Consolas,monospace\">",
        f"<title>{escape(terminal.title)}</title>",
        f'<rect width="{width}" height="{height}" fill="#{BACKGROUND}"/>',
    ]
    for row in range(rows):
        parts += _svg_row(terminal, row)
    if (cursor := terminal.cursor) is not None:
        parts.append(_rectangle(*cursor, 1, FOREGROUND, ' fill-opacity="0.5"'))
    return "\n".join([*parts, "</svg>", ""])


def _svg_row(terminal: Terminal, row: int) -> Iterator[str]:
    y = row * CELL[1] + BASE
    for column, span, text, style in terminal.runs(row):
        if style.bg is not None:
            yield _rectangle(column, row, span, style.bg)
        if not text.strip() and not (style.underlined or style.struck):
            continue
        look = ' font-weight="bold"' * style.bold + ' font-style="italic"' * style.italic
        lines = ["underline"] * style.underlined + ["line-through"] * style.struck
        look += f' text-decoration="{" ".join(lines)}"' if lines else ""
        # The length puts every cell in its place, whatever font there is.
        yield (
            f'<text x="{column * CELL[0]}" y="{y}" textLength="{span * CELL[0]}" '
            f'lengthAdjust="spacingAndGlyphs" xml:space="preserve" '
            f'fill="#{style.fg or FOREGROUND}"{look}>{escape(text)}</text>'
        )


def _rectangle(column: int, row: int, span: int, colour: str, more: str = "") -> str:
    width, height = CELL
    return (
        f'<rect x="{column * width}" y="{row * height}" width="{span * width}" '
        f'height="{height}" fill="#{colour}"{more}/>'
    )


def as_json(terminal: Terminal) -> str:
    """Return a line of JSON: the size, cursor (column, row; null if hidden), title and text."""
    columns, rows = terminal.size
    told = {
        "columns": columns,
        "rows": rows,
        "cursor": terminal.cursor,
        "title": terminal.title,
        "text": [terminal.text(row) for row in range(rows)],
    }
    return json.dumps(told) + "\n"


FORMATS = ("text", "ansi", "svg", "png", "json")


def render(terminal: Terminal, form: str) -> bytes:
    """Return what the terminal shows, in one of `FORMATS`. Raises ConsoleError."""
    if form == "png":
        from .picture import png

        return png(terminal)
    writers: dict[str, Callable[[Terminal], str]] = {
        "text": plain,
        "ansi": ansi,
        "svg": svg,
        "json": as_json,
    }
    return writers[form](terminal).encode(errors="replace")


def show(link: Link, size: tuple[int, int] | None, form: str) -> bytes:
    """Return the screen of the console behind `link`, in columns and rows `size`, else the port's.

    Raises ConsoleError.
    """
    found = history(link)
    known = size or (found.size if all(found.size) else USUAL)
    columns, rows = (min(pair) for pair in zip(known, LARGEST, strict=True))
    terminal = Terminal(columns, rows)
    terminal.feed(b"".join(span.data for span in found.spans))
    return render(terminal, form)
