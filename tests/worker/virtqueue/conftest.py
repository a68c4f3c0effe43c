"""The `sides` fixture: rings of either format, with memory that is closed at the end."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from rings import MakeSides


@pytest.fixture
def sides() -> Iterator[MakeSides]:
    with ExitStack() as ends:
        yield MakeSides(ends)
