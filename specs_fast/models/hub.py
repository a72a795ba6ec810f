"""Hub names as local folders, so that everything after the start reads files that no longer change."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from specs_fast.models.load import is_hub_name

FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
"""Weights, configuration, tokenizer and processor; no code and no pickles."""


def local_folder(path: str) -> Path:
    """The folder of a model: ``path`` itself, or for a hub name ``owner/model`` its snapshot, downloaded where needed.

    ValueError naming the model where the hub does not have it or cannot be reached.
    """
    if not is_hub_name(path):
        return Path(path)
    try:
        return Path(snapshot_download(path, allow_patterns=list(FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{path}: no such model folder, and it could not be had from the hub ({str(error).strip().splitlines()[0]})"
        ) from error
