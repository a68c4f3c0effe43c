"""The tests that docs/robustness.md names exist, and each of its promises names one."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROWS = [
    line
    for line in (TESTS.parent / "docs/robustness.md").read_text().splitlines()
    if re.match(r"\| (?!what (?:comes|happens) \|)", line)
]
_NAMED = re.compile(r"`([\w/]+\.py)::(\w+)`")


@cache
def functions(path: str) -> set[str]:
    tree = ast.parse((TESTS / path).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip()[:50])
def test_a_promise_is_shown_by_tests_that_exist(row: str) -> None:
    _, _what, _becomes, shown_by, _ = row.split("|")
    named = _NAMED.findall(shown_by)
    assert len(named) == shown_by.count("`") // 2 > 0
    assert [name for path, name in named if name not in functions(path)] == []


def test_every_test_of_hostile_guests_is_named() -> None:
    named = {name for path, name in _NAMED.findall("\n".join(ROWS)) if "test_hostile" in path}
    there = {name for name in functions("integration/test_hostile.py") if name.startswith("test_")}
    assert there - named == set()
