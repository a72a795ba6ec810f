"""Models that cannot be packed say which layer is in the way, and what to set."""

from __future__ import annotations

import pytest
import torch
from separate_runs import separate_scores
from tiny_models import MODELS, make_model, mixed_trees
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from specs_fast.models import score
from specs_fast.models.support import check_packable

_SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


def _mamba() -> PreTrainedModel:
    return MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4))


def _linear_attention() -> PreTrainedModel:
    return Qwen3NextForCausalLM(
        Qwen3NextConfig(
            **_SMALL,
            layer_types=["linear_attention", "full_attention"],
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
        )
    )


def _sinks() -> PreTrainedModel:
    return GptOssForCausalLM(GptOssConfig(**_SMALL, num_local_experts=2, num_experts_per_tok=1))


def _not_compared() -> PreTrainedModel:
    return Gemma2ForCausalLM(Gemma2Config(**_SMALL))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (_mamba, r"layer 'layers\.0' is a MambaBlock"),
        (_linear_attention, r"layer 'layers\.0\.linear_attn' is a Qwen3NextGatedDeltaNet"),
        (_sinks, r"layer 'layers\.0\.self_attn' has attention sinks"),
        (_not_compared, r"model type 'gemma2' has not been compared"),
    ],
)
def test_model_that_cannot_be_packed_names_the_layer_and_the_setting(build, reason: str) -> None:  # noqa: ANN001
    model, trees = build().eval(), mixed_trees("qwen3")
    with pytest.raises(ValueError, match=reason) as error:
        score(model, trees, packing="shared")
    assert "packing: none" in str(error.value)


@pytest.mark.parametrize("build", [_mamba, _linear_attention], ids=["mamba", "linear-attention"])
def test_models_with_recurrent_layers_have_the_padded_path(build) -> None:  # noqa: ANN001
    torch.manual_seed(0)
    model, trees = build().eval(), mixed_trees("qwen3")
    with torch.no_grad():
        expected, _ = separate_scores(model, trees)
        torch.testing.assert_close(score(model, trees, packing="none").logp, expected, atol=1e-5, rtol=0)


def test_other_kinds_of_attention_are_refused() -> None:
    model = make_model("qwen3")
    model.config.layer_types = ["full_attention", "chunked_attention", "full_attention"]
    with pytest.raises(ValueError, match=r"layer 1 is 'chunked_attention'.*packing: none"):
        check_packable(model)


def test_model_off_the_attention_interface_is_refused() -> None:
    model = make_model("qwen3")
    model._supports_attention_backend = False
    with pytest.raises(ValueError, match=r"'layers.0.self_attn' does not run on transformers' attention interface"):
        check_packable(model)


@pytest.mark.parametrize("kind", MODELS)
def test_compared_models_are_packable(kind: str) -> None:
    check_packable(make_model(kind))
