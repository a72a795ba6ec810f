"""Makes the helper modules of this folder importable by name (tests run with PYTHONSAFEPATH=1)."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
