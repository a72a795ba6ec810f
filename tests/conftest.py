"""Shared by all tests: one CPU thread, and a small lab, built once.

Several threads that wait for each other crawl where the cores are shared.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from specs_fast.config import LabConfig
from specs_fast.lab import LabPaths, build

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def mini_lab(tmp_path_factory: pytest.TempPathFactory) -> LabPaths:
    """48 training questions, 12 per evaluation split, and the committed base model as a folder."""
    return build(LabConfig(questions_train=48, questions_eval=12, seed=0), Path(tmp_path_factory.mktemp("lab")))
