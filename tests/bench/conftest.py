"""``bench/`` is not installed: it is loaded from the checkout, as ``specs-fast bench`` does."""

from __future__ import annotations

from pathlib import Path

from specs_fast.cli import source_package

source_package("bench", Path(__file__).resolve().parents[2])
