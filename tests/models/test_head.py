"""The head's scale, soft cap and bias are honoured, and what is not known is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from separate_runs import relative_error, separate_scores, weighted_gradients
from tiny_models import make_model, mixed_trees
from transformers import (
    AutoModelForImageTextToText,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    HyperCLOVAXConfig,
    HyperCLOVAXForCausalLM,
    Idefics3Config,
    LlavaConfig,
    PreTrainedModel,
)

from specs_fast.models import score
from specs_fast.models.head import head_of

_SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}


def _randomised(model: PreTrainedModel) -> PreTrainedModel:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.25)
    return model.eval()


@pytest.mark.parametrize(
    "model",
    [
        Gemma2ForCausalLM(Gemma2Config(**_SMALL, head_dim=8, final_logit_softcapping=2.0, attn_implementation="eager")),
        CohereForCausalLM(CohereConfig(**_SMALL, logit_scale=0.25)),
        GraniteForCausalLM(GraniteConfig(**_SMALL, logits_scaling=3.0)),
        HyperCLOVAXForCausalLM(HyperCLOVAXConfig(**_SMALL, logits_scaling=3.0)),
    ],
    ids=["softcap", "multiplier", "divisor", "divisor that multiplies"],
)
def test_padded_scores_honour_what_the_model_does_to_its_logits(model: PreTrainedModel) -> None:
    model, trees = _randomised(model), mixed_trees("qwen3")
    expected, entropy = separate_scores(model, trees, temperature=0.8)
    scores = score(model, trees, packing="none", temperature=0.8, return_entropy=True)
    torch.testing.assert_close(scores.logp, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(scores.entropy, entropy, atol=1e-5, rtol=0)
    got = weighted_gradients(model, scores.logp)
    assert relative_error(got, weighted_gradients(model, expected)) < 1e-5


def test_soft_cap_of_gemma3_is_applied_where_its_head_applies_it() -> None:
    """The language model caps its logits, the vision-language model with the same text configuration does not."""
    text = {**_SMALL, "head_dim": 8, "final_logit_softcapping": 2.0}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config=text, vision_config={**vision, "image_size": 8, "patch_size": 4})
    models = [Gemma3ForCausalLM(Gemma3TextConfig(**text)), Gemma3ForConditionalGeneration(config)]
    assert [head_of(model).softcap for model in models] == [2.0, None]
    for model in models:
        largest = _randomised(model)(input_ids=torch.arange(1, 20)[None]).logits.abs().max()
        assert (largest <= 2.0) == (head_of(model).softcap is not None)


@pytest.mark.parametrize("packing", ["shared", "none"])
@pytest.mark.parametrize("text", ["gemma2", "gemma3_text"])
@pytest.mark.parametrize("wrapper", [LlavaConfig, Idefics3Config], ids=["llava", "idefics3"])
def test_soft_cap_of_a_gemma_inside_another_model_is_not_applied(wrapper: Any, text: str, packing: Any) -> None:
    own = {"head_dim": 8, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 3.0, "sliding_window": 4}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = wrapper(text_config={**_SMALL, **own, "model_type": text}, vision_config={**vision, "image_size": 8})
    model = _randomised(AutoModelForImageTextToText.from_config(config, attn_implementation="eager"))
    trees = mixed_trees("qwen3")
    expected, _ = separate_scores(model, trees)
    torch.testing.assert_close(score(model, trees, packing=packing).logp, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("entry", ["final_logit_softcapping", "logit_scale", "logits_scaling"])
def test_an_entry_that_the_model_does_not_read_changes_nothing(entry: str) -> None:
    model, trees = make_model("llama", **{entry: 3.0}), mixed_trees("llama")
    expected, _ = separate_scores(model, trees)
    torch.testing.assert_close(score(model, trees, packing="shared").logp, expected, atol=1e-5, rtol=0)


def test_head_bias_is_used_and_gets_a_gradient() -> None:
    model, trees = make_model("qwen3", tie_word_embeddings=False), mixed_trees("qwen3")
    model.lm_head.bias = torch.nn.Parameter(torch.randn(64))
    expected, _ = separate_scores(model, trees)
    for packing in ("shared", "none"):
        scores = score(model, trees, packing=packing)
        torch.testing.assert_close(scores.logp, expected, atol=1e-5, rtol=0)
        gradients = weighted_gradients(model, scores.logp)
        assert relative_error(gradients, weighted_gradients(model, separate_scores(model, trees)[0])) < 1e-5
        assert gradients["lm_head.bias"].abs().sum() > 0


def test_unknown_entry_about_logits_is_refused() -> None:
    model = make_model("qwen3")
    model.config.output_logit_soft_cap = 30.0
    with pytest.raises(ValueError, match=r"output_logit_soft_cap = 30.0 changes the logits"):
        head_of(model)


def test_head_with_an_adapter_on_it_is_refused() -> None:
    class LoraLinear(torch.nn.Linear):
        pass

    model = make_model("qwen3", tie_word_embeddings=False)
    model.lm_head = LoraLinear(32, 64, bias=False)
    with pytest.raises(ValueError, match="head of type LoraLinear"):
        head_of(model)
