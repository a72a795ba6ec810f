"""A hub name becomes a local folder once, before anything reads from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from specs_fast.models import hub


def test_a_folder_stays_itself_and_a_hub_name_becomes_its_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append(name)
        assert "*.safetensors" in allow_patterns and not any(p.endswith((".py", ".bin")) for p in allow_patterns)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert hub.local_folder(str(tmp_path)) == tmp_path and asked == []
    assert hub.local_folder("owner/model") == tmp_path / "snapshot" and asked == ["owner/model"]


def test_a_model_that_cannot_be_had_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(hub, "snapshot_download", download)
    with pytest.raises(ValueError, match=r"owner/model: no such model folder, and .* the hub \(no network\)"):
        hub.local_folder("owner/model")
