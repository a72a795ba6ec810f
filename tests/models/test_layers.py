"""Norms and feed-forward layers on our kernels: which are switched, that nothing else changes, that it can be undone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tiny_models import make_model, mixed_trees
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.zamba2.modeling_zamba2 import Zamba2RMSNormGated

from specs_fast.models import score
from specs_fast.models.layers import fuse_layers, restore_layers
from specs_kernels import native

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))


def gradients(model: PreTrainedModel, kind: str, packing: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    logp = score(model, mixed_trees(kind), packing=packing).logp  # type: ignore[arg-type]
    logp.sum().backward()
    return logp.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("packing", ["shared", "none"])
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_vl", "qwen2_5_vl"])
def test_log_probs_and_gradients_are_those_of_the_plain_model(kind: str, packing: str) -> None:
    model = make_model(kind)
    plain = gradients(model, kind, packing)
    changed = fuse_layers(model)
    assert any("RMSNorm" in name for name in changed) and any("MLP" in name for name in changed)
    ours = gradients(model, kind, packing)
    torch.testing.assert_close(ours[0], plain[0], atol=1e-5, rtol=1e-5)
    assert ours[1].keys() == plain[1].keys()
    scale = max(float(grad.norm()) for grad in plain[1].values())
    for name, grad in plain[1].items():
        assert float((ours[1][name] - grad).norm()) <= 1e-5 * scale, name


def test_switching_is_counted_once_survives_a_copy_and_can_be_undone() -> None:
    model = make_model("qwen3")
    before = [type(module).forward for module in model.modules()]
    changed = fuse_layers(model)
    assert fuse_layers(model) == {}
    copied = copy.deepcopy(model)
    switched = [(a, b) for a, b in zip(model.modules(), copied.modules(), strict=True) if "forward" in vars(a)]
    assert len(switched) == sum(changed.values())
    assert all(vars(b)["forward"].args == (b,) for _, b in switched)
    restore_layers(model)
    assert not any("forward" in vars(module) for module in model.modules())
    assert [type(module).forward for module in model.modules()] == before
    assert list(model.state_dict()) == list(copied.state_dict())


def test_norms_with_an_offset_and_other_activations_stay_as_they_are() -> None:
    config = Gemma2Config(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, pad_token_id=0,
    )  # fmt: skip
    assert fuse_layers(Gemma2ForCausalLM(config)) == {}


def test_a_module_that_only_looks_like_a_norm_is_found_out() -> None:
    model = make_model("qwen3")
    norm = model.model.norm

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return norm(x) + 1.0

    model.model.norm = Shifted()
    assert "Shifted" not in fuse_layers(model)


def test_half_precision_keeps_transformers_own_rounding() -> None:
    assert fuse_layers(make_model("qwen3").bfloat16()) == {}


SMALL = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize("weights", ["tiny", "zero"])
def test_another_activation_is_found_out_whatever_the_weights(weights: str) -> None:
    """Small gates make SiLU and GELU differ by less than any absolute tolerance; a zero projection hides them altogether."""
    model = LlamaForCausalLM(LlamaConfig(**SMALL, hidden_act="gelu", initializer_range=1e-3))
    if weights == "zero":
        nn.init.zeros_(model.model.layers[0].mlp.down_proj.weight)
    assert fuse_layers(model) == {"LlamaRMSNorm": 3}


class Norm(nn.Module):
    """RMSNorm with a bias and a factor."""

    def __init__(self, factor: float, bias: bool) -> None:
        super().__init__()
        self.weight, self.variance_epsilon, self.factor = nn.Parameter(torch.ones(8)), 1e-6, factor
        self.bias = nn.Parameter(torch.zeros(8)) if bias else 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.factor * self.weight * normed + self.bias


class Gated(nn.Module):
    """The feed-forward layer of Llama with dropout and a limit."""

    def __init__(self, dropout: float, limit: float) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.act_fn, self.dropout, self.limit = nn.SiLU(), nn.Dropout(dropout), limit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.dropout(self.act_fn(self.gate_proj(x)).clamp(max=self.limit) * self.up_proj(x)))


@pytest.mark.parametrize("plain_first", [True, False])
@pytest.mark.parametrize(
    "plain, other",
    [
        (Norm(1.0, False), Norm(1.0, True)),
        (Norm(1.0, False), Norm(2.0, False)),
        (Gated(0.0, 1e9), Gated(0.5, 1e9)),
        (Gated(0.0, 1e9), Gated(0.0, 7.0)),
        (Norm(1.0, False), Zamba2RMSNormGated(8, 8)),
    ],
    ids=["bias of zeros", "factor", "dropout in evaluation", "limit", "optional gate"],
)
def test_each_module_is_judged_by_what_it_can_compute(plain: nn.Module, other: nn.Module, plain_first: bool) -> None:
    modules = nn.ModuleList([plain, other] if plain_first else [other, plain]).eval()
    assert fuse_layers(modules) == {type(plain).__name__: 1}  # type: ignore[arg-type]
    assert "forward" not in vars(other)
    restore_layers(modules)  # type: ignore[arg-type]


def test_a_switched_model_can_be_pickled() -> None:
    model, ids = make_model("qwen3"), torch.arange(1, 9)[None]
    assert fuse_layers(model)
    loaded = pickle.loads(pickle.dumps(model))
    assert fuse_layers(loaded) == {}
    with torch.no_grad():
        expected = model(ids).logits
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(loaded(ids).logits, expected)


def test_models_elsewhere_are_left_alone_and_hooks_see_no_probe() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SMALL))
    assert fuse_layers(model) == {}
    model, calls = LlamaForCausalLM(LlamaConfig(**SMALL)), []
    for module in model.modules():
        module.register_forward_hook(lambda *arguments: calls.append(arguments))
    assert fuse_layers(model) and not calls


def test_norms_keep_their_dtype_under_autocast() -> None:
    """q_norm of Qwen3 meets bf16 with a weight in fp32, and returns fp32."""
    norm = Qwen3ForCausalLM(Qwen3Config(**SMALL)).model.layers[0].self_attn.q_norm
    nn.init.normal_(norm.weight)
    x = torch.randn(3, 8).bfloat16()
    expected = norm(x)
    assert fuse_layers(norm) == {"Qwen3RMSNorm": 1}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = norm(x)
    assert ours.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(ours, expected, atol=0, rtol=2**-8)
