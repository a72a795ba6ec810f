"""``python -m specs_fast`` is the ``specs-fast`` command."""

from __future__ import annotations

import sys

from specs_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
