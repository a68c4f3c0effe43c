"""docs/operations.md lists every line that the log may have, and no other."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]

#: Methods whose first text is a line of the log, or the end of one.
_LOGS = {"debug", "info", "warning", "error", "warn", "_warn"}

_LEVELS = {"error", "warning", "info", "debug"}

#: What stands for anything that varies.
_ANY = "…"


@cache
def trees() -> list[ast.Module]:
    """Return all source files that the daemon runs."""
    paths = [path for path in sorted((ROOT / "src").rglob("*.py")) if "testing" not in path.parts]
    return [ast.parse(path.read_text()) for path in paths]


def text(node: ast.AST) -> str | None:
    """Return a literal's text with `…` for what varies, None for what is no text."""
    match node:
        case ast.Constant(value=str(value)):
            return re.sub(r"%[sdr]", _ANY, value)
        case ast.JoinedStr(values=values):
            return "".join(text(value) or _ANY for value in values)
    return None


def said() -> set[str]:
    """Return every line of the log that the source has, without the guest's name before it."""
    lines = set()
    for tree in trees():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            texts = [found for each in node.args if (found := text(each)) is not None]
            if node.func.attr in _LOGS and texts:
                lines.add(texts[0].removeprefix(f"{_ANY}: "))
    # Those that only pass on a text from elsewhere.
    return {line for line in lines if re.search(r"\w", line.replace("port ", ""))}


def documented() -> dict[str, str]:
    """Return the lines of the document with their levels."""
    section = (
        (ROOT / "docs/operations.md").read_text().partition("\n## What each line of the log")[2]
    )
    rows = re.findall(r"^\| `([^`]+)` \| (\w+) \| [^|]+ \|$", section, re.MULTILINE)
    assert len(rows) == len(re.findall(r"^\| `", section, re.MULTILINE))
    return dict(rows)


def test_every_line_of_the_log_is_explained() -> None:
    assert said() - documented().keys() == set()


def test_every_line_that_is_explained_is_one_that_may_come() -> None:
    everything = "\n".join(
        found for tree in trees() for node in ast.walk(tree) if (found := text(node)) is not None
    )
    fragments = {
        fragment
        for line in documented()
        for fragment in line.split(_ANY)
        if len(fragment) > 5 and fragment not in everything
    }
    assert fragments == set()


def test_every_line_has_a_level() -> None:
    assert set(documented().values()) <= _LEVELS
