"""Packed models under torch.compile and under bf16 autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from separate_runs import relative_error, separate_scores, weighted_gradients
from tiny_models import COMPILED, MODELS, make_model, mixed_trees
from transformers import PreTrainedModel

from specs_fast.data.types import Tree
from specs_fast.models import score
from specs_fast.models.attention import text_module
from specs_fast.models.load import enable_gradient_checkpointing


def check_compiled(model: PreTrainedModel, parts: list[torch.nn.Module], batches: list[list[Tree]]) -> None:
    """`parts` compile without a graph break, for the first batch only, and log-probs and gradients are those of eager calls."""
    torch._dynamo.reset()
    compiled_for: list[int] = []
    expected = []
    for trees in batches:
        logp = score(model, trees, packing="shared").logp
        expected.append((logp.detach(), weighted_gradients(model, logp)))

    def note(graph: Any, example: Any) -> Any:
        compiled_for.append(batch)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example)

    for part in parts:
        part.compile(backend=note, fullgraph=True, dynamic=True if len(batches) > 1 else None)
    for batch in range(len(batches)):
        logp, gradients = expected[batch]
        got = score(model, batches[batch], packing="shared").logp
        torch.testing.assert_close(got, logp, atol=1e-6, rtol=0)
        assert relative_error(weighted_gradients(model, got), gradients) < 1e-6
    assert set(compiled_for) == {0}


def test_compiled_text_stack_with_windows_and_checkpointing_equals_eager() -> None:
    kind = COMPILED[0]
    model = make_model(kind, num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    enable_gradient_checkpointing(model)
    check_compiled(model, [text_module(model)], [mixed_trees(kind)])


def test_compiled_layer_serves_every_batch() -> None:
    kind = COMPILED[1]
    model = make_model(kind, num_hidden_layers=1)
    check_compiled(model, list(text_module(model).layers), [mixed_trees(kind), mixed_trees(kind, seed=1)[:2]])


@pytest.mark.parametrize("packing", ["shared", "none"])
@pytest.mark.parametrize("kind", MODELS)
def test_under_bf16_autocast_packed_is_as_near_to_fp32_as_separate(kind: str, packing: str) -> None:
    model, trees = make_model(kind, tie_word_embeddings=False), mixed_trees(kind)
    exact, _ = separate_scores(model, trees)
    with torch.autocast("cpu", torch.bfloat16):
        separate, _ = separate_scores(model, trees)
        logp = score(model, trees, packing=packing).logp
        gradients = weighted_gradients(model, logp)
    error, of_separate = (float((values.detach() - exact.detach()).norm()) for values in (logp, separate))
    assert 0 < error < 2 * of_separate
    reference, of_bf16 = weighted_gradients(model, exact), weighted_gradients(model, separate)
    assert distance(gradients, reference) < 2 * distance(of_bf16, reference)


def distance(gradients: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    """||got - expected|| over all parameters."""
    assert gradients.keys() == reference.keys()
    return sum(float((gradients[name] - reference[name]).square().sum()) for name in reference) ** 0.5
