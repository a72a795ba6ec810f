"""The tables of supported and refused models in README.md, made from what the tests run over:

    PYTHONPATH=tests/models python -m support_table

rewrites everything between ``<!-- models:begin -->`` and ``<!-- models:end -->``. A model is in the first table because
test_packed_equals_separate.py or test_other_vision_models.py compares it, and in the second because test_support.py refuses it.
"""

from __future__ import annotations

import re
from pathlib import Path

from refused_models import REFUSED, refusal
from tiny_models import COMPILED, MODELS, VISION_MODELS, WINDOW_BY_OPTION, make_model
from tiny_vision_models import KINDS, make_vision_model
from transformers import PreTrainedModel

from specs_fast.models.images import images_see_both_ways
from specs_fast.models.support import check_packable

PAGE = Path(__file__).parents[2] / "README.md"
_BLOCK = re.compile(r"(<!-- models:begin -->\n)(.*?)(<!-- models:end -->)", re.DOTALL)
_INTRODUCTION = """\
Packed = padded = separate runs, in log-probs (to 1e-5 in fp32) and in the gradient of every parameter, with gradient
checkpointing on and off: tested for each model type of this table, on a small model of it with random weights.
"""
_REFUSED = """\
Everything else raises before it runs, names what is in the way, and says what to set (`packing: none`: padded rows, the
plain forward of transformers). So do, in both packings, text that attends to later text, and rotary frequencies that change
with the longest sequence of a batch (`dynamic`, `longrope`) beyond their limit.
"""


def attention_of(kind: str, model: PreTrainedModel) -> str:
    """What its attention layers ask for beyond causal attention, read from the small model that the tests run."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    features = []
    if config.num_key_value_heads < config.num_attention_heads:
        features.append("GQA")
    if kinds == {"sliding_attention", "full_attention"}:
        features.append("windows in some layers")
    elif getattr(config, "sliding_window", None) is not None or kind in WINDOW_BY_OPTION:
        features.append("window" if kind not in WINDOW_BY_OPTION else "window where configured")
    if getattr(config, "query_pre_attn_scalar", None) is not None:
        features.append("scale of its own")
    if kind == "gemma2":
        assert config.attn_logit_softcapping is not None and config.final_logit_softcapping is not None
        features.append("soft caps on scores and logits")
    if "mrope_section" in (config.rope_parameters or {}):
        features.append("M-RoPE")
    if images_see_both_ways(model):
        features.append("image tokens see each other")
    if getattr(config, "num_experts", None):
        features.append("experts")
    return ", ".join(features)


def tables() -> str:
    """Both tables as Markdown."""
    lines = [_INTRODUCTION, "| model type | attention | images | also tested |", "|---|---|---|---|"]
    models = [(kind, make_model(kind)) for kind in MODELS] + [(kind, make_vision_model(kind)) for kind in KINDS]
    for kind, model in sorted(models):
        images = "yes" if kind in VISION_MODELS or kind in KINDS else ""
        also = ["bf16 autocast"] * (kind in MODELS) + ["`torch.compile`"] * (kind in COMPILED)
        name = model.config.model_type
        lines.append(f"| `{name}` | {attention_of(kind, model)} | {images} | {', '.join(also)} |")
    lines += ["", _REFUSED, "| for example | what the error says |", "|---|---|"]
    lines += [f"| {name} | {reason(name)} |" for name in REFUSED]
    return "\n".join(lines) + "\n"


def reason(name: str) -> str:
    """The error between "cannot be packed" and the way out; the list of compared types is the table above."""
    try:
        check_packable(refusal(name))
    except ValueError as error:
        return re.sub(r" \(compared: .*?\)", "", str(error).split(" cannot be packed: ")[1].rsplit("; ", 1)[0])
    raise AssertionError(f"{name} was not refused")


def page(text: str) -> str:
    """The page with its tables as the tests have them."""
    return _BLOCK.sub(lambda match: match[1] + tables() + match[3], text)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
