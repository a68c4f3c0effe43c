"""Fixtures for what people use; whole daemons are as in tests/integration."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "integration"))  # behind the folder of launch.py
