"""Shared by all tests: one CPU thread, and a small lab, built once.

Several threads that wait for each other crawl where the cores are shared.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from specs_fast.lab import LabPaths

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def mini_lab(tmp_path_factory: pytest.TempPathFactory) -> LabPaths:
    """48 training questions, 12 per evaluation split, and the committed base model as a folder."""
    from specs_fast.config import LabConfig
    from specs_fast.lab import build  # imports transformers, which many tests do without

    return build(LabConfig(questions_train=48, questions_eval=12, seed=0), Path(tmp_path_factory.mktemp("lab")))
