"""A console's screen as a PNG, with a font of this system's."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from ..errors import ConsoleError
from .screen import BACKGROUND, BASE, CELL, FONT_SIZE, FOREGROUND

if TYPE_CHECKING:
    from .screen import Cell, Terminal

#: Where monospaced fonts are, and what they are called, with what their bold one is.
_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts")
_FONTS = (
    ("DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf"),
    ("LiberationMono-Regular.ttf", "LiberationMono-Bold.ttf"),
    ("NotoSansMono-Regular.ttf", "NotoSansMono-Bold.ttf"),
    ("FreeMono.ttf", "FreeMonoBold.ttf"),
    ("UbuntuMono-R.ttf", "UbuntuMono-B.ttf"),
)


def png(terminal: Terminal) -> bytes:
    """Return what the terminal shows as a PNG; raises ConsoleError when there is no font."""
    regular, bold = _fonts()
    columns, rows = terminal.size
    image = Image.new("RGB", (columns * CELL[0], rows * CELL[1]), f"#{BACKGROUND}")
    draw = ImageDraw.Draw(image)
    for row in range(rows):
        for cell in terminal.cells(row):
            _draw(draw, row, cell, bold if cell.style.bold else regular)
    if (cursor := terminal.cursor) is not None:
        draw.rectangle(_box(cursor[0], cursor[1], 1), outline=f"#{FOREGROUND}")
    out = BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def _box(column: int, row: int, span: int) -> tuple[int, int, int, int]:
    x, y = column * CELL[0], row * CELL[1]
    return x, y, x + span * CELL[0] - 1, y + CELL[1] - 1


def _draw(draw: ImageDraw.ImageDraw, row: int, cell: Cell, font: ImageFont.FreeTypeFont) -> None:
    left, top, right, bottom = _box(cell.column, row, cell.span)
    colour = f"#{cell.style.fg or FOREGROUND}"
    if cell.style.bg is not None:
        draw.rectangle((left, top, right, bottom), fill=f"#{cell.style.bg}")
    if cell.text.strip():
        draw.text((left, top + BASE), cell.text, fill=colour, font=font, anchor="ls")
    if cell.style.underlined:
        draw.line((left, bottom - 1, right, bottom - 1), fill=colour)
    if cell.style.struck:
        draw.line((left, top + CELL[1] // 2, right, top + CELL[1] // 2), fill=colour)


def _fonts() -> tuple[ImageFont.FreeTypeFont, ImageFont.FreeTypeFont]:
    """Return a monospaced font and its bold one. Raises ConsoleError."""
    for regular, bold in _candidates():
        with suppress(OSError):
            return ImageFont.truetype(regular, FONT_SIZE), ImageFont.truetype(bold, FONT_SIZE)
    raise ConsoleError(
        "there is no monospaced font for a PNG: install one, such as fonts-dejavu-core, "
        "or choose --format svg"
    )


def _candidates() -> Iterator[tuple[str, str]]:
    """Yield paths of a font and of its bold one: well-known ones, then the system's choice."""
    found: dict[str, str] = {}
    for folder in _FOLDERS:
        for path in Path(os.path.expanduser(folder)).rglob("*.ttf"):
            found.setdefault(path.name, str(path))
    for regular, bold in _FONTS:
        if regular in found:
            yield found[regular], found.get(bold, found[regular])
    with suppress(OSError, subprocess.SubprocessError):
        ask = partial(subprocess.run, capture_output=True, text=True, check=True, timeout=5)
        chosen = ask(["fc-match", "-f", "%{file}", "monospace"]).stdout
        yield chosen, chosen
