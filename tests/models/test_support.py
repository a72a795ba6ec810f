"""Models that cannot be packed say which layer or setting is in the way, and what to set."""

from __future__ import annotations

import pytest
import torch
from refused_models import REFUSED, linear_attention, mamba, refusal
from separate_runs import separate_scores
from tiny_models import MODELS, make_model, mixed_trees, text_ids
from tiny_vision_models import KINDS as FRAME_KINDS
from tiny_vision_models import make_vision_model

from specs_fast.data.types import Tree
from specs_fast.models import score
from specs_fast.models.support import PACKABLE, check_packable


@pytest.mark.parametrize("name", REFUSED)
def test_model_that_cannot_be_packed_names_what_is_in_the_way_and_the_setting(name: str) -> None:
    with pytest.raises(ValueError) as error:
        score(refusal(name), mixed_trees("qwen3"), packing="shared")
    assert REFUSED[name][1] in str(error.value)
    assert "packing: none" in str(error.value)


@pytest.mark.parametrize("build", [mamba, linear_attention], ids=["mamba", "linear-attention"])
def test_models_with_recurrent_layers_have_the_padded_path(build) -> None:  # noqa: ANN001
    torch.manual_seed(0)
    model, trees = build().eval(), mixed_trees("qwen3")
    with torch.no_grad():
        expected, _ = separate_scores(model, trees)
        torch.testing.assert_close(score(model, trees, packing="none").logp, expected, atol=1e-5, rtol=0)


def test_model_off_the_attention_interface_is_refused() -> None:
    model = make_model("qwen3")
    model._supports_attention_backend = False
    with pytest.raises(ValueError, match=r"'layers.0.self_attn' does not run on transformers' attention interface"):
        check_packable(model)


@pytest.mark.parametrize("kind", MODELS)
def test_compared_models_are_packable(kind: str) -> None:
    check_packable(make_model(kind))


def test_every_packable_type_is_compared() -> None:
    compared = [*map(make_model, MODELS), *map(make_vision_model, FRAME_KINDS)]
    assert {model.config.model_type for model in compared} == set(PACKABLE)


def test_text_stack_that_was_not_compared_is_refused() -> None:
    model = make_model("qwen3_vl")
    model.config.text_config.model_type = "olmo"
    with pytest.raises(ValueError, match="model type 'olmo' has not been compared"):
        check_packable(model)


@pytest.mark.parametrize("packing", ["shared", "none"])
@pytest.mark.parametrize(
    "kind, entry, value",
    [("gemma3_text", "use_bidirectional_attention", True), ("llama", "is_causal", False)],
)
def test_text_that_attends_to_later_text_is_refused_in_both_packings(
    kind: str, entry: str, value: bool, packing: str
) -> None:
    model = make_model(kind)
    setattr(model.config, entry, value)
    with pytest.raises(ValueError, match=f"{entry} is {value}, so its tokens attend to the ones they predict"):
        score(model, mixed_trees(kind), packing=packing)


@pytest.mark.parametrize("packing", ["shared", "none"])
@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_frequencies_that_follow_the_longest_sequence_are_refused_beyond_their_limit(
    rope_type: str, packing: str
) -> None:
    rope = {"rope_type": rope_type, "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 14}
    factors = {"long_factor": [9.0] * 4, "short_factor": [1.0] * 4} if rope_type == "longrope" else {}
    model = make_model("llama", rope_parameters={**rope, **factors}, max_position_embeddings=14 if not factors else 56)
    trees = mixed_trees("llama")  # the longest path has 8 + 3 or 7 + 6 tokens, of which the last predicts nothing
    torch.testing.assert_close(
        score(model, trees, packing=packing).logp, separate_scores(model, trees)[0], atol=1e-5, rtol=0
    )
    generator = torch.Generator().manual_seed(0)
    longer = Tree(trees[0].prompt, (text_ids(9, generator), text_ids(2, generator)))
    with pytest.raises(ValueError, match=rf"rope_type '{rope_type}'.* here 15 tokens .* keep them within 14"):
        score(model, [longer], packing=packing)
