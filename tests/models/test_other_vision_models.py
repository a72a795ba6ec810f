"""LLaVA, Idefics3, SmolVLM and Gemma-3: packed = padded = the model's own forward, images encoded once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from separate_runs import relative_error, weighted_gradients
from tiny_models import EOS, IMAGE, PAD, VISION_END, VISION_START, make_model, mixed_trees, text_ids
from tiny_vision_models import (
    KINDS,
    PATCH,
    SIDE,
    WINDOW,
    frame_prompt,
    image_trees,
    make_frames,
    make_vision_model,
    vision_inputs,
)
from torch import Tensor
from transformers import PreTrainedModel

from specs_fast.data.types import EncodedImage, EncodedPrompt, Tree
from specs_fast.models import images, packed_hidden, score
from specs_fast.models.images import encode_images
from specs_fast.models.load import enable_gradient_checkpointing, load_model
from specs_fast.models.positions import check_prompt_images
from specs_fast.models.support import check_packable
from specs_fast.rollout import Sampler
from specs_kernels import PackedLayout

TOLERANCE = 1e-5


def own_logp(kind: str, model: PreTrainedModel, trees: list[Tree]) -> Tensor:
    """log-probs of every response token from the model's own forward on one sequence at a time, pixels and all."""
    parts = []
    for tree in trees:
        for response in tree.responses:
            if len(response) == 0:
                continue
            ids = torch.cat((tree.prompt.input_ids, response))
            logits = model(**vision_inputs(kind, tree.prompt, ids)).logits[0, len(tree.prompt) - 1 : -1]
            parts.append(logits.log_softmax(-1).gather(1, response[:, None]).squeeze(1))
    return torch.cat(parts)


def compared_gradients(model: PreTrainedModel, values: Tensor) -> dict[str, Tensor]:
    """Gradients of all parameters but the key biases of the tower: attention ignores what is added to every key, so theirs are
    rounding errors, and are held to be small."""
    gradients = weighted_gradients(model, values)
    largest = max(gradient.norm() for gradient in gradients.values())
    key_biases = [name for name in gradients if "vision" in name and name.endswith("k_proj.bias")]
    assert len(key_biases) == 2 and all(gradients[name].norm() < 1e-7 * largest for name in key_biases)
    return {name: gradient for name, gradient in gradients.items() if name not in key_biases}


@pytest.mark.parametrize("kind", KINDS)
def test_packed_and_padded_equal_the_models_own_forward(kind: str) -> None:
    """Log-probs and gradients of every parameter, with and without gradient checkpointing."""
    model, trees = make_vision_model(kind), image_trees(kind)
    check_packable(model)
    expected = own_logp(kind, model, trees)
    expected_gradients = compared_gradients(model, expected)
    assert any("vision" in name for name in expected_gradients)
    for checkpointing in (False, True):
        if checkpointing:
            enable_gradient_checkpointing(model)
        for packing in ("shared", "none"):
            scores = score(model, trees, packing=packing)
            torch.testing.assert_close(scores.logp, expected, atol=TOLERANCE, rtol=0)
            assert relative_error(compared_gradients(model, scores.logp), expected_gradients) < TOLERANCE
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("packing", ["shared", "none"])
def test_llava_of_another_tower_and_text(packing: str) -> None:
    model, trees = make_vision_model("llava of SigLIP and Qwen2"), image_trees("llava")
    expected, scores = own_logp("llava", model, trees), score(model, trees, packing=packing)
    torch.testing.assert_close(scores.logp, expected, atol=TOLERANCE, rtol=0)
    assert relative_error(compared_gradients(model, scores.logp), compared_gradients(model, expected)) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_images_at_any_depth_of_a_forest_equal_runs_of_their_paths(kind: str) -> None:
    model, generator = make_vision_model(kind), torch.Generator().manual_seed(5)
    a, b = make_frames(kind, "a"), make_frames(kind, "b", 2)
    if kind == "llava":
        b = make_frames(kind, "b")
    parts = [
        frame_prompt(kind, "root", [3, 2], [a], generator),
        frame_prompt(kind, "child", [2, 1], [b], generator),
        frame_prompt(kind, "leaf", [4], [], generator),
        frame_prompt(kind, "other child", [1, 3], [a], generator),
    ]
    parents = [-1, 0, 1, 0]
    layout = PackedLayout.from_segments([len(part) for part in parts], parents)
    ids, types = (torch.cat([getattr(part, name) for part in parts]) for name in ("input_ids", "token_types"))
    hidden = packed_hidden(model, ids, layout, [a, b, a], types)
    start = 0
    for part, path in zip(parts, ([0], [0, 1], [0, 1, 2], [0, 3]), strict=True):
        whole = EncodedPrompt(
            part.id,
            torch.cat([parts[index].input_ids for index in path]),
            torch.cat([parts[index].token_types for index in path]),
            tuple(image for index in path for image in parts[index].images),
        )
        alone = model.base_model(**vision_inputs(kind, whole, whole.input_ids)).last_hidden_state[0, -len(part) :]
        torch.testing.assert_close(hidden[start : start + len(part)], alone, atol=TOLERANCE, rtol=TOLERANCE)
        start += len(part)


def test_gemma3_sees_exactly_the_tokens_of_transformers_own_mask() -> None:
    """Sliding and full layers, with image tokens that see each other both ways, and a window shorter than an image."""
    model, trees = make_vision_model("gemma3"), image_trees("gemma3")
    model.config.text_config._attn_implementation = "eager"
    layouts: list[PackedLayout] = []
    layer = model.base_model.language_model.layers[0].self_attn
    layer.register_forward_pre_hook(lambda _, args, kwargs: layouts.append(kwargs["layout"]), with_kwargs=True)
    for tree in trees:
        for response in tree.responses:
            score(model, [Tree(tree.prompt, (response,))], packing="shared")
            if len(response) < 2:
                continue
            layout = layouts.pop()
            types = torch.cat((tree.prompt.token_types, torch.zeros_like(response[:-1])))[None]
            masks = model.create_masks_for_generate(
                model.config, torch.zeros(*types.shape, 32), None, None, None, token_type_ids=types
            )
            assert torch.equal(layout.dense_mask(), masks["full_attention"][0, 0] == 0)
            assert torch.equal(layout.dense_mask(WINDOW), masks["sliding_attention"][0, 0] == 0)


def test_gemma3_tests_would_show_a_causal_image_or_a_missing_window() -> None:
    model, trees = make_vision_model("gemma3"), image_trees("gemma3")[:1]
    logp = score(model, trees, packing="shared").logp
    causal = own_logp("other", model, trees)
    assert (logp - causal).abs().max() > 0.01
    for layer in model.base_model.language_model.layers:
        layer.self_attn.sliding_window = None
    assert (logp - score(model, trees, packing="shared").logp).abs().max() > 0.01


@pytest.fixture
def frames_seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Frames per call of `get_image_features`."""
    calls: list[int] = []
    for kind in KINDS:
        base = type(make_vision_model(kind).base_model)
        original = base.get_image_features

        def counting(self, pixel_values, *args, original=original, **kwargs):  # noqa: ANN001, ANN002, ANN003, ANN202
            calls.append(pixel_values.shape[:-3].numel())
            return original(self, pixel_values, *args, **kwargs)

        monkeypatch.setattr(base, "get_image_features", counting)
    return calls


@pytest.mark.parametrize("packing", ["shared", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_image_is_encoded_once_and_by_a_frozen_model_once_for_all(
    kind: str, packing: str, frames_seen: list[int], tmp_path
) -> None:  # noqa: ANN001
    trees = image_trees(kind)
    distinct = {image.key: len(image.pixel_values) for tree in trees for image in tree.prompt.images}
    make_vision_model(kind).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    for _ in range(2):
        score(model, trees, packing=packing)
    assert frames_seen == [sum(distinct.values())] * 2
    frozen = load_model(tmp_path, freeze_vision=True)
    frames_seen.clear()
    with torch.inference_mode():  # a rollout comes first
        before = score(frozen, trees, packing=packing).logp
    logp = score(frozen, trees, packing=packing).logp
    assert frames_seen == [sum(distinct.values())] and torch.equal(logp.detach(), before)
    logp.sum().backward()
    trained = {name for name, parameter in frozen.named_parameters() if parameter.grad is not None}
    text = ("language_model", "text_model", "lm_head")
    assert trained == {name for name, _ in frozen.named_parameters() if any(part in name for part in text)}


@pytest.mark.parametrize("kind", KINDS)
def test_many_images_and_images_of_other_sizes_are_encoded_in_several_calls(
    kind: str, frames_seen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_vision_model(kind)
    pictures = [make_frames(kind, key) for key in "abc"]
    together = encode_images(model, pictures)
    monkeypatch.setattr(images, "MAX_PATCHES", 2 * (SIDE // PATCH) ** 2)
    sliced = encode_images(model, pictures)
    assert frames_seen == [3, 2, 1] and together is not None and sliced is not None
    for one, other in zip(together.pooled, sliced.pooled, strict=True):
        torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=TOLERANCE)


def test_frames_of_two_sizes_are_encoded_in_two_calls(frames_seen: list[int]) -> None:
    """Idefics3 interpolates its positions, so the size of a frame is free; its features are as many as its patches ask for."""
    model, small = make_vision_model("idefics3"), make_frames("idefics3", "small")
    pixels = torch.randn(1, 3, 2 * SIDE, 2 * SIDE, generator=torch.Generator().manual_seed(0))
    large = EncodedImage("large", pixels, num_tokens=16, pixel_attention_mask=pixels[:, 0] == pixels[:, 0])
    features = encode_images(model, [small, large])
    assert frames_seen == [1, 1] and features is not None
    assert [len(pooled) for pooled in features.pooled] == [4, 16]


def test_an_image_has_as_many_features_as_tokens_or_is_named() -> None:
    model, generator = make_vision_model("idefics3"), torch.Generator().manual_seed(0)
    right, wrong = make_frames("idefics3", "right"), replace(make_frames("idefics3", "wrong", 2), num_tokens=4)
    prompt = frame_prompt("idefics3", "p", [1, 2, 1], [right, make_frames("idefics3", "x")], generator)
    tree = Tree(replace(prompt, images=(right, wrong)), (text_ids(2, generator),))
    with pytest.raises(ValueError, match="image 'wrong' takes 4 tokens in the text, but Idefics3.* makes 8 features"):
        score(model, [tree], packing="shared")


@pytest.mark.parametrize("packing", ["shared", "none"])
def test_images_that_do_not_belong_to_the_prompt_or_the_model_are_named(packing: str) -> None:
    model, tree = make_vision_model("llava"), image_trees("llava")[0]
    lost = Tree(replace(tree.prompt, images=()), tree.responses)
    with pytest.raises(ValueError, match="prompt 'one' holds 16 image tokens, but its 0 images take 0"):
        score(model, [lost], packing=packing)
    with pytest.raises(
        ValueError, match="image 'a' has no grid of patches .* encode it with this model's own processor"
    ):
        score(make_model("qwen3_vl"), [tree], packing=packing)
    with pytest.raises(ValueError, match="image 'a' does not say how many tokens it takes"):
        score(model, mixed_trees("qwen3_vl")[:1], packing=packing)
    model.config.model_type = "llava_next"
    with pytest.raises(ValueError, match="model type 'llava_next' .* known"):
        encode_images(model, tree.prompt.images)


@pytest.mark.parametrize(
    ("kind", "reason"), [("llava", "an image must lie in one segment"), ("gemma3", "image tokens see one another")]
)
def test_an_image_over_two_segments_is_refused(kind: str, reason: str) -> None:
    model, prompt = make_vision_model(kind), image_trees(kind)[0].prompt
    check_prompt_images(model, prompt)
    layout = PackedLayout.from_segments([5, len(prompt) - 5], [-1, 0])
    with pytest.raises(ValueError, match=reason):
        packed_hidden(model, prompt.input_ids, layout, prompt.images, prompt.token_types)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_samples_equal_generate_and_logp_is_what_scoring_computes(kind: str) -> None:
    model, trees = make_vision_model(kind), image_trees(kind)
    prompts = [tree.prompt for tree in trees]
    sampler = Sampler(model, eos_token_ids=[EOS, 7], pad_token_id=PAD)
    greedy = sampler.generate(prompts, num_samples=1, max_new_tokens=8, greedy=True, seed=0)
    banned = [IMAGE, VISION_START, VISION_END] if kind == "gemma3" else [IMAGE]
    for prompt, group in zip(prompts, greedy, strict=True):
        expected = model.generate(
            **vision_inputs(kind, prompt, prompt.input_ids),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=[EOS, 7],
            pad_token_id=PAD,
            bad_words_ids=[[token] for token in banned],
        )[0, len(prompt) :]
        assert group[0].token_ids.tolist() == expected.tolist()
    groups = sampler.generate(prompts, num_samples=3, max_new_tokens=8, seed=3)
    sampled = [Tree(p, tuple(c.token_ids for c in group)) for p, group in zip(prompts, groups, strict=True)]
    logp = torch.cat([completion.logp for group in groups for completion in group])
    torch.testing.assert_close(logp, score(model, sampled, packing="shared").logp.detach(), atol=1e-4, rtol=0)
