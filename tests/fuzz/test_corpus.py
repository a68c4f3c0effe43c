"""Every input that is kept, through its target: what was found once is found again."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator

import pytest
import targets

import fuzz

#: Loaded before any test: some keep a file open.
TARGETS = {name: targets.load(name) for name in targets.NAMES}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Have nothing logged of what is fuzzed; other tests look at the log."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(autouse=True)
def _mappings_are_collected(nothing_stays_open: None) -> Iterator[None]:  # noqa: ARG001
    """Leave nothing mapped by garbage alone, before it is looked at what stays open."""
    yield
    gc.collect()


@pytest.mark.parametrize("name", targets.NAMES)
def test_target_holds(name: str) -> None:
    """Any of the kept inputs meets an error of the right kind, or none."""
    for data in fuzz.corpus(name):
        try:
            TARGETS[name].run(data)
        except BaseException as error:
            error.add_note(f"{name} with {data.hex()}")
            raise
