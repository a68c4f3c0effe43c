"""Property tests: each example maps memory files anew, which count as open until collected."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _mappings_are_collected(nothing_stays_open: None) -> Iterator[None]:  # noqa: ARG001
    """Leave nothing mapped by garbage alone, before it is looked at what stays open."""
    yield
    gc.collect()
