"""Makes the tiny models of tests/models importable by name (tests run with PYTHONSAFEPATH=1)."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "models"))
