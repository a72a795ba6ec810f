"""The code blocks of docs/embedding.md run as they stand."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_hosts import common_settings, gradients, largest_difference, make_batch, make_model, texts, tokenizer

from specs_fast.integrations.transformers import LogprobOutput

PAGE = Path(__file__).parents[2] / "docs" / "embedding.md"
BLOCKS = dict(re.findall(r"<!-- run: ([\w ]+) -->\n```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))


def _run(name: str, **names: Any) -> dict[str, Any]:
    exec(compile(BLOCKS[name], f"{PAGE.name}: {name}", "exec"), names)
    return names


def _expected_gradients(model: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Of -(mean logp) - 0.01 * (mean entropy) at temperature 0.8, from dense logits."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logp = (logits[:, :-1] / 0.8).log_softmax(-1)
    labels = batch["labels"][:, 1:]
    kept = labels != -100
    chosen = logp.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    (-(chosen[kept].sum() + 0.01 * entropy[kept].sum()) / kept.sum()).backward()
    expected = gradients(model)
    model.zero_grad()
    return expected


def test_every_python_block_of_the_page_is_run() -> None:
    assert set(BLOCKS) == {"own loop", "swapped head", "hf trainer", "trl", "verl"}
    assert PAGE.read_text(encoding="utf-8").count("```python") == len(BLOCKS)


@pytest.mark.parametrize("name", ["own loop", "swapped head"])
def test_a_loop_of_ones_own(name: str) -> None:
    model, batch = make_model(), make_batch()
    expected = _expected_gradients(model, batch)
    _run(name, model=model, batch=batch)
    assert largest_difference(gradients(model), expected) < 1e-5


def test_hf_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed; it comes with specs-fast[trl]")
    from transformers import TrainingArguments

    model = make_model()
    rows = [{key: value[0] for key, value in make_batch(rows=1, seed=seed).items()} for seed in range(8)]
    before = model.lm_head.weight.clone()
    names = _run("hf trainer", model=model, train_dataset=rows, args=TrainingArguments(**common_settings(tmp_path)))
    assert len(names["trainer"].state.log_history) == 3 and not model.lm_head.weight.equal(before)
    assert isinstance(model(**make_batch()), LogprobOutput)


def test_trl(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="trl is not installed; it comes with specs-fast[trl]")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig
    from trl.trainer import utils

    make_model(vocab_size=len(tokenizer())).save_pretrained(tmp_path / "model")
    data = {key: texts(8, 6, seed) for seed, key in enumerate(("prompt", "chosen", "rejected"))}
    theirs = utils._ChunkedLogProbFunction
    try:
        names = _run(
            "trl",
            model=AutoModelForCausalLM.from_pretrained(tmp_path / "model"),
            args=DPOConfig(**common_settings(tmp_path / "out")),
            train_dataset=Dataset.from_dict(data),
            tokenizer=tokenizer(),
        )
        assert utils._ChunkedLogProbFunction is not theirs
    finally:
        utils._ChunkedLogProbFunction = theirs
    assert len(names["trainer"].state.log_history) == 3


def test_verls_function_with_a_stand_in_for_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    path = "verl.utils.kernel.linear_cross_entropy"
    parts = path.split(".")
    for depth in range(1, len(parts) + 1):
        module = types.ModuleType(".".join(parts[:depth]))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        if depth > 1:
            setattr(sys.modules[".".join(parts[: depth - 1])], parts[depth - 1], module)
    _run("verl")
    function = sys.modules[path].linear_cross_entropy
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(1, 9, 8), torch.randn(20, 8), torch.randint(0, 20, (1, 9))
    logp, entropy = function(hidden, weight, labels, 0.7, "none")
    dense = (hidden[0] @ weight.T / 0.7).log_softmax(-1)
    torch.testing.assert_close(logp, dense.gather(1, labels[0][:, None]).squeeze(1))
    torch.testing.assert_close(entropy, -(dense.exp() * dense).sum(-1))
    with pytest.raises(ValueError, match="no reduction, no tensor-parallel group"):
        function(hidden, weight, labels, 0.7, "mean")
