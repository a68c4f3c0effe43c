"""Tests of the soak itself: what it checks with finds what it is to find."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
