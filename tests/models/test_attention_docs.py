"""The code blocks of docs/attention.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from tiny_models import make_model, mixed_trees
from torch import Tensor

from specs_fast.models import score

PAGE = Path(__file__).parents[2] / "docs" / "attention.md"
FIRST, MODEL, TRANSFORMERS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_the_picture_s_layout() -> None:
    names: dict[str, object] = {"torch": torch}
    exec(compile(FIRST, PAGE.name, "exec"), names)
    layout, out = names["layout"], names["out"]
    assert layout.visible_from[5] == 5 and layout.visible_until[5] == 8  # as the picture says
    assert layout.visible_from[8] == 8 and layout.visible_until[8] == 15
    assert out.shape == (15, 8, 64)


def test_a_model_of_ones_own() -> None:
    names: dict[str, object] = {"torch": torch}
    exec(compile(FIRST + MODEL, PAGE.name, "exec"), names)
    torch.manual_seed(0)
    attention, layout = names["Attention"](32, 4, 2), names["layout"]
    hidden = torch.randn(15, 32)

    def rotate(x: Tensor, positions: Tensor) -> Tensor:
        return x * (1 + positions[:, None, None].cos())

    together = attention(hidden, layout, rotate)
    path = [0, 1, 2, 3, 4, 8, 9, 12, 13, 14]  # prompt, B, B2
    alone = attention(hidden[path], names["PackedLayout"].from_segments([10], [-1]), rotate)
    torch.testing.assert_close(together[path], alone, atol=1e-5, rtol=0)


def test_transformers() -> None:
    model, tree = make_model("qwen3"), mixed_trees("qwen3")[0]
    names: dict[str, object] = {"torch": torch, "model": model}
    names |= {"prompt": tree.prompt.input_ids, "responses": list(tree.responses)}
    exec(compile(FIRST + TRANSFORMERS, PAGE.name, "exec"), names)
    torch.testing.assert_close(names["logp"], score(model, [tree], packing="shared").logp, atol=1e-5, rtol=0)
