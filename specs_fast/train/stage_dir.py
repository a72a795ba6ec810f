"""Stage folders: complete or absent.

A stage writes into ``<name>.partial`` and renames it to ``<name>`` at its end, after ``DONE.json``; a killed stage leaves
only a ``.partial`` folder, which the next start removes. So a folder that exists under its own name is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

DONE = "DONE.json"


def is_done(folder: Path) -> bool:
    """Whether a stage finished; a folder of that name without its marker raises rather than being trusted."""
    if not folder.exists():
        return False
    if not (folder / DONE).is_file():
        raise ValueError(f"{folder} exists but has no {DONE}: it is no finished stage of this program; move it away")
    return True


def run_stage(folder: Path, work: Callable[[Path], Mapping[str, Any]]) -> bool:
    """Run ``work(partial_folder)`` unless ``folder`` is finished; its result is stored in DONE.json. True if it ran."""
    if is_done(folder):
        return False
    partial = folder.with_name(folder.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    summary = dict(work(partial))
    write_json(partial / DONE, summary)
    os.rename(partial, folder)
    return True


def read_done(folder: Path) -> dict[str, Any]:
    """The summary a finished stage left."""
    done: dict[str, Any] = json.loads((folder / DONE).read_text(encoding="utf-8"))
    return done


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is complete or absent."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def fingerprint(model_dir: str | Path) -> str:
    """16 hex digits over the weights and configuration files of a model folder: equal weights, equal fingerprint."""
    model_dir = Path(model_dir)
    files = sorted([*model_dir.glob("*.safetensors"), model_dir / "config.json"])
    if len(files) < 2:
        raise ValueError(f"{model_dir}: no *.safetensors weights found; expected a folder written by save_pretrained")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()[:16]
