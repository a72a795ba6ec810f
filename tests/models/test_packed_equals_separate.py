"""Packed = padded = separate runs: log-probs to 1e-5 and gradients to 1e-5 relative in fp32."""

from __future__ import annotations

import pytest
import torch
from forests import random_forest, separate_forest_logp
from separate_runs import relative_error, separate_scores, weighted_gradients
from tiny_models import MODELS, WINDOW_BY_OPTION, make_image, make_model, make_prompt, mixed_trees, text_ids
from torch import Tensor
from transformers import PreTrainedModel

from specs_fast.data.types import Tree
from specs_fast.models import packed_hidden, score
from specs_fast.models.head import head_of
from specs_fast.models.load import enable_gradient_checkpointing
from specs_kernels import PackedLayout, linear_logprob

TOLERANCE = 1e-5


def packed_forest_logp(model: PreTrainedModel, forest) -> Tensor:  # noqa: ANN001
    layout = PackedLayout.from_segments(forest.lengths, forest.parents)
    ids = torch.cat(forest.input_ids)
    images = [image for segment in forest.images for image in segment]
    hidden = packed_hidden(model, ids, layout, images, torch.cat(forest.token_types))
    target = torch.where(layout.predictor_index >= 0, ids, -100)
    head = head_of(model)
    logp = linear_logprob(hidden, head.weight_VD, target, softcap=head.softcap, rows=layout.predictor_index).logp
    return logp[layout.predictor_index >= 0]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kind", MODELS)
def test_random_forests_equal_separate_runs(kind: str, seed: int) -> None:
    model = make_model(kind)
    forest = random_forest(kind, seed)
    expected = separate_forest_logp(model, forest)
    expected_gradients = weighted_gradients(model, expected)
    logp = packed_forest_logp(model, forest)
    torch.testing.assert_close(logp, expected, atol=TOLERANCE, rtol=0)
    assert relative_error(weighted_gradients(model, logp), expected_gradients) < TOLERANCE


@pytest.mark.parametrize("packing", ["shared", "none"])
@pytest.mark.parametrize("kind", MODELS)
def test_mixed_trees_equal_separate_runs(kind: str, packing: str) -> None:
    """Unequal groups, empty responses, one, two and no images in one batch, an untied head, a temperature, the entropy."""
    model = make_model(kind, tie_word_embeddings=False)
    trees = mixed_trees(kind)
    logp, entropy = separate_scores(model, trees, temperature=0.9)
    scores = score(model, trees, packing=packing, temperature=0.9, return_entropy=True)
    assert scores.lengths.tolist() == [4, 1, 0, 6, 3, 5, 2, 0, 7]
    assert scores.segment_ids.unique_consecutive().tolist() == [0, 1, 3, 4, 5, 6, 8]
    torch.testing.assert_close(scores.logp, logp, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(scores.entropy, entropy, atol=TOLERANCE, rtol=0)
    expected = weighted_gradients(model, logp + 0.1 * entropy)
    got = weighted_gradients(model, scores.logp + 0.1 * scores.entropy)
    assert relative_error(got, expected) < TOLERANCE


@pytest.mark.parametrize("packing", ["shared", "none"])
@pytest.mark.parametrize("kind", WINDOW_BY_OPTION)
def test_sliding_window_layers_equal_separate_runs(kind: str, packing: str) -> None:
    model = make_model(kind, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    assert model.config.get_text_config().layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    trees = mixed_trees("qwen3")
    full = score(make_model(kind), trees, packing=packing).logp
    logp, _ = separate_scores(model, trees)
    scores = score(model, trees, packing=packing)
    assert (logp - full).abs().max() > 0.01  # the window matters on these lengths
    torch.testing.assert_close(scores.logp, logp, atol=TOLERANCE, rtol=0)
    assert relative_error(weighted_gradients(model, scores.logp), weighted_gradients(model, logp)) < TOLERANCE


OPTIONS = [
    ("mistral", "sliding_window", 512),
    ("gemma2", "sliding_window", 512),
    ("gemma2", "attn_logit_softcapping", None),
    ("gemma2", "final_logit_softcapping", None),
    ("gemma2", "query_pre_attn_scalar", 16),
    ("gemma3_text", "sliding_window", 512),
    ("gemma3_text", "layer_types", ["sliding_attention", "sliding_attention", "full_attention"]),
]


@pytest.mark.parametrize("kind, option, value", OPTIONS, ids=[f"{kind}-{option}" for kind, option, _ in OPTIONS])
def test_options_of_the_tiny_models_matter(kind: str, option: str, value: object) -> None:
    """What the comparison with separate runs holds, these models use: with the option changed, log-probs are others."""
    trees = mixed_trees(kind)
    changed, plain = make_model(kind, **{option: value}), make_model(kind)
    with torch.no_grad():
        difference = score(changed, trees, packing="shared").logp - score(plain, trees, packing="shared").logp
    assert difference.abs().max() > 0.01


@pytest.mark.parametrize("window", [2, 5, 20, 25])
@pytest.mark.parametrize("kind", ["mistral", "gemma2", "gemma3_text"])
def test_windows_across_the_prompt_boundary(kind: str, window: int) -> None:
    """Windows that end in the response, reach back into the prompt, and cover it but for its first tokens."""
    model, generator = make_model(kind, sliding_window=window), torch.Generator().manual_seed(1)
    prompt = make_prompt("long", [20], [], generator)
    trees = [Tree(prompt, tuple(text_ids(length, generator) for length in (11, 0, 1, 8)))]
    expected = separate_scores(model, trees)[0]
    logp = score(model, trees, packing="shared").logp
    torch.testing.assert_close(logp, expected, atol=TOLERANCE, rtol=0)
    assert relative_error(weighted_gradients(model, logp), weighted_gradients(model, expected)) < TOLERANCE


@pytest.mark.parametrize("packing", ["shared", "none"])
@pytest.mark.parametrize("kind", MODELS)
def test_gradient_checkpointing_changes_nothing_and_recomputes_every_layer(kind: str, packing: str) -> None:
    model, trees = make_model(kind), mixed_trees(kind)
    calls: list[str] = []
    for name, module in model.named_modules():
        if name.endswith((".input_layernorm", ".norm1")):
            module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    plain = score(model, trees, packing=packing).logp
    plain_gradients = weighted_gradients(model, plain)
    plain_calls = sorted(calls)
    calls.clear()
    enable_gradient_checkpointing(model)
    checkpointed = score(model, trees, packing=packing).logp
    gradients = weighted_gradients(model, checkpointed)
    torch.testing.assert_close(checkpointed, plain, atol=0, rtol=0)
    assert relative_error(gradients, plain_gradients) < 1e-6
    assert sorted(calls) == sorted(plain_calls * 2)
    assert not any(module.training for module in model.modules())


def test_one_image_in_two_prompts_gets_the_sum_of_both_gradients() -> None:
    model = make_model("qwen3_vl")
    generator = torch.Generator().manual_seed(3)
    image = make_image("shared")
    trees = [
        Tree(make_prompt(name, [2, 3], [image], generator), (text_ids(4, generator), text_ids(3, generator)))
        for name in ("first", "second")
    ]
    both = weighted_gradients(model, score(model, trees, packing="shared").logp)
    expected = weighted_gradients(model, separate_scores(model, trees)[0])
    assert relative_error(both, expected) < TOLERANCE
    assert any("visual" in name for name in both)


def test_response_text_does_not_depend_on_what_else_is_in_the_row() -> None:
    model, trees = make_model("qwen3_vl"), mixed_trees("qwen3_vl")
    together = score(model, trees, packing="shared")
    start = 0
    for tree in trees:
        alone = score(model, [tree], packing="shared").logp
        torch.testing.assert_close(together.logp[start : start + len(alone)], alone, atol=TOLERANCE, rtol=0)
        start += len(alone)
    assert start == len(together.logp)
