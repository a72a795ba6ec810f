"""The base model that the package carries: fp16 on disk, fp32 in use.

The weights were rounded to fp16 before they were measured, so loading them as fp32 gives exactly the model that
``provenance.json`` describes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLForConditionalGeneration

from specs_fast.lab.processor import build_processor

BASE_MODEL = Path(__file__).parent / "base_model"
WEIGHTS, CONFIG, PROVENANCE = "model.safetensors", "config.json", "provenance.json"


def round_to_half(model: torch.nn.Module) -> None:
    """Rounds every weight to the nearest fp16 value, in place; the dtype stays fp32."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.half().float())


def _set_dtype(config_file: Path, dtype: str) -> None:
    """Rewrites the dtype that a config.json declares, of the model and of its parts."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = dtype
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _cast(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Copies a safetensors file with its floating tensors in ``dtype``."""
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in load_file(source).items()}
    save_file(tensors, target, metadata={"format": "pt"})
    target.chmod(0o644)


def save_base(model: Qwen3VLForConditionalGeneration, folder: Path, provenance: dict[str, Any]) -> None:
    """Writes config, fp16 weights, processor files and provenance."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    build_processor().save_pretrained(folder)
    _cast(folder / WEIGHTS, folder / WEIGHTS, torch.float16)
    _set_dtype(folder / CONFIG, "float16")
    (folder / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")


def unpack_base(folder: Path, source: Path = BASE_MODEL) -> Path:
    """Copies the packaged base to ``folder`` as fp32, ready for ``from_pretrained`` and training.

    Raises ValueError where the package carries no base (a checkout without it): the command that makes one is named.
    """
    if not (source / WEIGHTS).is_file():
        raise ValueError(
            f"{source} holds no {WEIGHTS}; make the base with: python -m specs_fast.lab.base --out {source}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and file.name != WEIGHTS:
            shutil.copyfile(file, folder / file.name)
    _cast(source / WEIGHTS, folder / WEIGHTS, torch.float32)
    _set_dtype(folder / CONFIG, "float32")
    return folder
