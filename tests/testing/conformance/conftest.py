"""Where the fake backend is found; and a machine that is quiet sooner."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from vhost_device_console.testing.conformance import bench

sys.path.append(str(Path(__file__).parent))


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait less for what does not happen: the fake backend does things at once."""
    monkeypatch.setattr(bench, "QUIET", 0.05)
