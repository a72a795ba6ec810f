"""One self-contained HTML page per run: pictures, the model's words at each stage, curves, pairs, before and after."""

from __future__ import annotations

import os
from pathlib import Path

from specs_fast.report.page import page_html
from specs_fast.report.run_data import read_run


def build(run_dir: str | Path) -> Path:
    """Write ``report.html`` into a run folder and return its path.

    Works for a run that stopped anywhere: what is missing is shown as not there yet. The page needs no network and no other
    file. FileNotFoundError where ``run_dir`` is no run folder.
    """
    run_dir = Path(run_dir)
    path = run_dir / "report.html"
    temporary = path.with_name("report.html.tmp")
    temporary.write_text(page_html(read_run(run_dir)), encoding="utf-8")
    os.replace(temporary, path)
    return path
