"""Loading a model or a processor folder, with errors that name what is missing.

Weights are safetensors; code from a model folder is never run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from specs_fast.data.processor import register

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


def load_model(
    path_or_dir: str | Path,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    freeze_vision: bool = False,
    gradient_checkpointing: bool = False,
) -> PreTrainedModel:
    """A vision-language or causal language model from a folder (or a hub name ``owner/model``), in eval mode.

    dtype: "float32", "bfloat16", "float16" or "float64". device: a torch device, or "auto" (CUDA where there is one).
    freeze_vision: nothing that makes image features gets a gradient: the vision tower, and the merger, projector or connector
    between it and the text.
    gradient_checkpointing: activations of each layer are recomputed in the backward of `models.score`, although the
    model stays in eval mode (dropout is never on).

    Raises ValueError for: a folder or file that is not there (named), a shard or safetensors file that is cut short, weights
    that the architecture has and the files have not or in another shape, a torn or unknown configuration, an unknown dtype,
    `freeze_vision` on a model without a vision tower.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype!r}; allowed: {', '.join(_DTYPES)}")
    path = str(path_or_dir)
    if not is_hub_name(path):
        check_model_folder(Path(path))
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if is_hub_name(path):
            raise ValueError(f"{path}: no such model folder, and no such model on the hub ({error})") from error
        raise ValueError(
            f"{Path(path) / 'config.json'}: not the configuration of a model that transformers knows "
            f"({str(error).splitlines()[0]}); copy it again or save the model again"
        ) from error
    multimodal = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    auto_class = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
    loaded: tuple[PreTrainedModel, dict[str, Any]] = auto_class.from_pretrained(
        path,
        dtype=_DTYPES[dtype],
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported in `info` and refused below
    )
    model, info = loaded
    if info["mismatched_keys"]:
        name, found, expected = sorted(info["mismatched_keys"])[0]
        raise ValueError(
            f"{path}: {name!r} is {list(found)} in the weights and {list(expected)} in config.json "
            f"({len(info['mismatched_keys'])} such parameters); the two belong to different models"
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"{path}: the weights lack {len(missing)} parameters of {type(model).__name__}, the first is {missing[0]!r}; "
            "the folder is incomplete or belongs to another architecture"
        )
    model.eval()
    if freeze_vision:
        if vision_tower(model) is None:
            raise ValueError(
                f"freeze_vision: {type(model).__name__} ({path}) has no vision tower; set freeze_vision: false"
            )
        of_text = {id(parameter) for parameter in text_module(model).parameters()}
        for parameter in model.base_model.parameters():
            if id(parameter) not in of_text:
                parameter.requires_grad_(False)
    if gradient_checkpointing:
        enable_gradient_checkpointing(model)
    return model.to(resolve_device(device))


def load_processor(path_or_dir: str | Path) -> Any:
    """The processor of a vision-language model, or the tokenizer of a language model. Raises ValueError for a folder
    that is not there or holds neither."""
    path = str(path_or_dir)
    if not is_hub_name(path) and not Path(path).is_dir():
        raise ValueError(f"{path}: no such folder")
    register()
    try:
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"{path}: no processor or tokenizer could be loaded from this folder: {error}") from error
    declared = [name for name in _PROCESSOR_FILES if (Path(path) / name).is_file()]
    if declared and not hasattr(processor, "image_processor"):
        raise ValueError(
            f"{path}: {declared[0]} declares a processor, but transformers loaded {type(processor).__name__} only, which would "
            "drop every image; the processor class is unknown here, or a package that it needs (torchvision) is missing"
        )
    return processor


def resolve_device(device: str) -> torch.device:
    """CUDA where there is one, else the CPU, for "auto"; otherwise the torch device of that name.

    ValueError for a name that is no device, and for a CUDA device that is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device {device!r} is no device; allowed: auto, cpu, cuda or cuda:N") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {device!r} is not here: PyTorch sees {torch.cuda.device_count()} CUDA devices; use auto or cpu "
            "(`specs-fast doctor` shows what is here)"
        )
    return found


def enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Recompute each layer's activations in the backward (non-reentrant). Raises ValueError where unsupported."""
    if not model.supports_gradient_checkpointing:
        raise ValueError(
            f"{type(model).__name__} does not support gradient checkpointing; set gradient_checkpointing: false"
        )
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def text_module(model: PreTrainedModel) -> torch.nn.Module:
    """The text stack of a vision-language model, the base model of a language model."""
    base = model.base_model
    for name in ("language_model", "text_model"):
        text = getattr(base, name, None)
        if text is not None:
            return text
    return base


def vision_tower(model: PreTrainedModel) -> torch.nn.Module | None:
    """The module that encodes images, or None for a language model."""
    base = model.base_model
    for name in ("visual", "vision_tower", "vision_model"):
        tower = getattr(base, name, None)
        if tower is not None:
            return tower
    return None


def image_token_id(model: PreTrainedModel) -> int | None:
    """Id of the token that stands for one feature of an image; None for a language model."""
    for name in ("image_token_id", "image_token_index"):
        value = getattr(model.config, name, None)
        if value is not None:
            return int(value)
    return None


def check_model_folder(folder: Path) -> None:
    """Raise ValueError, naming the file, unless `folder` holds a config and whole safetensors weights."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such model folder")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: config.json is missing; a model folder holds config.json and safetensors weights")
    for name in _weight_files(folder):
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{folder}: the weights file {name} is missing; copy it again or save the model again")
        try:
            with safe_open(str(file), framework="pt") as handle:
                handle.keys()
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{file}: not a whole safetensors file ({error}); copy it again or save it again"
            ) from error


def _weight_files(folder: Path) -> list[str]:
    index = folder / _INDEX
    if not index.is_file():
        return [_WEIGHTS]
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return sorted(set(weight_map.values()))
    except (json.JSONDecodeError, KeyError, AttributeError) as error:
        raise ValueError(f"{index}: not a safetensors index ({error!r}); copy it again or save it again") from error


def is_hub_name(path: str) -> bool:
    """``owner/model`` with no such local folder; everything else is a local path."""
    return (
        not Path(path).exists() and path.count("/") == 1 and not path.startswith((".", "/", "~")) and "\\" not in path
    )
