"""Tiny models that cannot be packed, each with the words of the error that says why."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tiny_models import make_model
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MambaConfig,
    MambaForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    PreTrainedModel,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

_SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}


def mamba() -> PreTrainedModel:
    return MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4))


def linear_attention() -> PreTrainedModel:
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


def _chunked() -> PreTrainedModel:
    return Llama4ForCausalLM(
        Llama4TextConfig(
            **_SMALL,
            layer_types=["full_attention"] * 2,
            attention_chunk_size=8,
            num_local_experts=2,
            intermediate_size_mlp=48,
        )
    )


def _latent() -> PreTrainedModel:
    sizes = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 12}
    experts = {
        "n_routed_experts": 2,
        "num_experts_per_tok": 1,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
    }
    small = {name: value for name, value in _SMALL.items() if name != "head_dim"}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**small, **sizes, **experts, first_k_dense_replace=2))


def _alibi() -> PreTrainedModel:
    return FalconForCausalLM(
        FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, alibi=True)
    )


def _own_attention() -> PreTrainedModel:
    return BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4))


def _not_compared() -> PreTrainedModel:
    return OlmoForCausalLM(OlmoConfig(**{name: value for name, value in _SMALL.items() if name != "head_dim"}))


def _other_layers() -> PreTrainedModel:
    model = make_model("qwen3")
    model.config.layer_types = ["full_attention", "chunked_attention", "full_attention"]
    return model


REFUSED: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "Mamba": (mamba, "layer 'layers.0' is a MambaBlock, a recurrent layer"),
    "Qwen3-Next": (linear_attention, "layer 'layers.0.linear_attn' is a Qwen3NextGatedDeltaNet, a recurrent layer"),
    "gpt-oss": (_sinks, "layer 'layers.0.self_attn' has attention sinks"),
    "Llama-4": (_chunked, "attention_chunk_size is 8"),
    "DeepSeek-V3": (_latent, "kv_lora_rank is 8"),
    "Falcon with ALiBi": (_alibi, "alibi is True"),
    "Bloom": (_own_attention, "'h.0.self_attention' does not run on transformers' attention interface"),
    "layers of another kind": (_other_layers, "layer 1 is 'chunked_attention'"),
    "OLMo and any other type": (_not_compared, "model type 'olmo' has not been compared"),
}


def refusal(name: str) -> PreTrainedModel:
    """The model of this row, in eval mode."""
    torch.manual_seed(0)
    return REFUSED[name][0]().eval()
