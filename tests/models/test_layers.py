"""Norms and feed-forward layers on our kernels: which are switched, that nothing else changes, that it can be undone."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import make_model, mixed_trees
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

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
    assert all(vars(b)["forward"].__self__ is b for _, b in switched)
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
