"""What the packed forward does to the model it runs, and what scoring refuses."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from separate_runs import prompt_inputs, relative_error, separate_scores, weighted_gradients
from tiny_models import (
    EOS,
    IMAGE,
    MODELS,
    PAD,
    VISION_MODELS,
    image_run,
    make_image,
    make_model,
    make_prompt,
    mixed_trees,
    text_ids,
)
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from specs_fast.data.types import EncodedPrompt, Tree
from specs_fast.models import packed_hidden, score
from specs_fast.models.attention import TEXT, VISION, packed_text_attention, vision_varlen_attention
from specs_kernels import PackedLayout


def implementations(model: PreTrainedModel) -> list[str]:
    return [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]


@pytest.fixture
def attention_calls():  # noqa: ANN201
    """Counts calls of the two registered attention functions."""
    calls: Counter[str] = Counter()

    def counting(name, function):  # noqa: ANN001, ANN202
        def call(*args, **kwargs):  # noqa: ANN002, ANN003, ANN202
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    AttentionInterface.register(TEXT, counting(TEXT, packed_text_attention))
    AttentionInterface.register(VISION, counting(VISION, vision_varlen_attention))
    yield calls
    AttentionInterface.register(TEXT, packed_text_attention)
    AttentionInterface.register(VISION, vision_varlen_attention)


@pytest.mark.parametrize("packing", ["shared", "none"])
@pytest.mark.parametrize("kind", VISION_MODELS)
def test_each_distinct_image_is_encoded_once_with_one_attention_call_per_block(
    kind: str, packing: str, attention_calls: Counter[str]
) -> None:
    model, trees = make_model(kind), mixed_trees(kind)
    seen: list[int] = []
    model.model.visual.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))
    score(model, trees, packing=packing)
    distinct = {image.key: image for tree in trees for image in tree.prompt.images}
    assert sum(len(tree.prompt.images) for tree in trees) == 4 and len(distinct) == 3
    assert seen == [sum(len(image.pixel_values) for image in distinct.values())]
    assert attention_calls[VISION] == len(model.model.visual.blocks)
    assert attention_calls[TEXT] == (3 if packing == "shared" else 0)


@pytest.mark.parametrize("kind", MODELS)
def test_text_layers_and_only_text_layers_receive_the_layout(kind: str) -> None:
    model, trees = make_model(kind), mixed_trees(kind)
    receivers: set[str] = set()

    def record(name: str):  # noqa: ANN202
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if kwargs.get("layout") is not None:
                assert isinstance(kwargs["layout"], PackedLayout)
                receivers.add(name)

        return hook

    for name, module in model.named_modules():
        module.register_forward_pre_hook(record(name), with_kwargs=True)
    score(model, trees, packing="shared")
    text = "model.language_model" if kind in VISION_MODELS else "model"
    layers = [f"{text}.layers.{index}" for index in range(3)]
    assert receivers == {"model", text, *layers, *(f"{layer}.self_attn" for layer in layers)}


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "qwen3"])
def test_the_models_own_attention_is_back_after_scoring_and_it_generates_as_before(kind: str) -> None:
    model, trees = make_model(kind), mixed_trees(kind)
    model.set_attn_implementation(
        "eager" if kind not in VISION_MODELS else {"text_config": "eager", "vision_config": "sdpa"}
    )
    before = implementations(model)
    assert len(set(before)) == (2 if kind in VISION_MODELS else 1)
    inputs = prompt_inputs(trees[0].prompt)
    generate = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": PAD, "eos_token_id": EOS}
    text = model.generate(**inputs, **generate)
    score(model, trees, packing="shared").logp.sum().backward()
    assert implementations(model) == before
    assert torch.equal(model.generate(**inputs, **generate), text)


def test_the_models_own_attention_is_back_after_an_error_inside_the_forward() -> None:
    model, trees = make_model("qwen3_vl"), mixed_trees("qwen3_vl")
    before = implementations(model)
    handles = [
        model.model.language_model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0),
        model.model.visual.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0),
    ]
    for handle in reversed(handles):
        with pytest.raises(ZeroDivisionError):
            score(model, trees, packing="shared")
        assert implementations(model) == before
        handle.remove()
    score(model, trees, packing="shared")


@pytest.mark.parametrize("packing", ["shared", "none"])
def test_trees_without_response_tokens_score_nothing_and_run_no_forward(packing: str) -> None:
    model, trees = make_model("qwen3_vl"), mixed_trees("qwen3_vl")
    empty = torch.zeros(0, dtype=torch.long)
    model.model.register_forward_pre_hook(lambda *_: 1 / 0)
    scores = score(
        model, [Tree(trees[0].prompt, (empty, empty)), Tree(trees[1].prompt, ())], packing=packing, return_entropy=True
    )
    assert scores.lengths.tolist() == [0, 0]
    assert scores.logp.shape == scores.entropy.shape == scores.segment_ids.shape == (0,)
    scores.logp.sum().backward()


def test_repeated_scoring_is_bitwise_equal() -> None:
    model, trees = make_model("qwen3_vl"), mixed_trees("qwen3_vl")
    first, second = (score(model, trees, packing="shared").logp for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("packing", ["shared", "none"])
def test_image_token_in_a_response_is_refused(packing: str) -> None:
    model, trees = make_model("qwen3_vl"), mixed_trees("qwen3_vl")
    bad = Tree(trees[2].prompt, (text_ids(2, torch.Generator()), torch.tensor([5, IMAGE, 6])))
    with pytest.raises(ValueError, match=r"response 1 of prompt 'none' contains the image token 60"):
        score(model, [bad], packing=packing)


@pytest.mark.parametrize("packing", ["shared", "none"])
def test_empty_prompt_is_refused(packing: str) -> None:
    empty = torch.zeros(0, dtype=torch.long)
    with pytest.raises(ValueError, match="prompt 'void' is empty"):
        score(make_model("qwen3"), [Tree(EncodedPrompt("void", empty, empty), (torch.tensor([3]),))], packing=packing)


@pytest.mark.parametrize("packing", ["shared", "none"])
@pytest.mark.parametrize("change", ["missing", "extra", "grid"])
def test_image_tokens_that_do_not_match_the_images_are_refused(packing: str, change: str) -> None:
    model = make_model("qwen3_vl")
    generator = torch.Generator().manual_seed(0)
    prompt = make_prompt("p", [2, 2, 2], [make_image("a"), make_image("b")], generator)
    images = {
        "missing": prompt.images[:1],
        "extra": (*prompt.images, make_image("c")),
        "grid": (prompt.images[0], make_image("d", (1, 2, 2))),
    }[change]
    with pytest.raises(ValueError, match="image"):
        score(model, [Tree(replace(prompt, images=images), (text_ids(3, generator),))], packing=packing)


@pytest.mark.parametrize("packing", ["shared", "none"])
def test_a_prompt_that_lost_its_image_is_refused_and_does_not_take_another_prompts(packing: str) -> None:
    model, trees = make_model("qwen3_vl"), mixed_trees("qwen3_vl")
    lost = replace(trees[0], prompt=replace(trees[0].prompt, images=()))
    surplus = replace(trees[2], prompt=replace(trees[2].prompt, images=trees[0].prompt.images))
    for batch in ([lost], [lost, surplus]):
        with pytest.raises(ValueError, match="prompt 'one' holds 6 image tokens, but its 0 images take 0"):
            score(model, batch, packing=packing)
    unmarked = replace(lost.prompt, token_types=torch.zeros_like(lost.prompt.token_types))
    with pytest.raises(ValueError, match="prompt 'one': input_ids hold 6 image tokens, token_types mark 0"):
        score(model, [replace(lost, prompt=unmarked)], packing=packing)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3"])
def test_scoring_under_autocast_packed_as_padded(kind: str) -> None:
    model, trees = make_model(kind), mixed_trees(kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        packed, padded = (score(model, trees, packing=packing).logp for packing in ("shared", "none"))
    exact = score(model, trees, packing="shared").logp
    assert (packed - exact).norm() < 2 * (padded - exact).norm() + 1e-3
    assert (packed - exact).norm() > 0  # autocast was on


def test_images_for_a_language_model_are_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    prompt = make_prompt("p", [2, 2], [make_image("a")], generator)
    with pytest.raises(ValueError, match="no vision tower"):
        score(make_model("qwen3"), [Tree(prompt, (text_ids(3, generator),))], packing="none")


def test_image_that_spans_two_segments_is_refused() -> None:
    model = make_model("qwen3_vl")
    prompt = make_prompt("p", [2, 2], [make_image("a")], torch.Generator().manual_seed(0))
    layout = PackedLayout.from_segments([5, len(prompt) - 5], [-1, 0])
    with pytest.raises(ValueError, match="must lie in one segment"):
        packed_hidden(model, prompt.input_ids, layout, prompt.images, prompt.token_types)


def test_dropout_is_refused() -> None:
    model, trees = make_model("qwen3", attention_dropout=0.1), mixed_trees("qwen3")
    score(model, trees, packing="shared")
    model.train()
    for packing in ("shared", "none"):
        with pytest.raises(ValueError, match=r"dropout 0.1 is on in model.layers.0.self_attn; call model.eval"):
            score(model, trees, packing=packing)


def test_unknown_packing_is_refused() -> None:
    with pytest.raises(ValueError, match="'shared', 'none'"):
        score(make_model("qwen3"), [], packing="both")  # type: ignore[arg-type]


def test_image_features_are_taken_in_order_of_appearance() -> None:
    """Two prompts that show the same two images in opposite order must not be confused."""
    model = make_model("qwen3_vl")
    generator = torch.Generator().manual_seed(5)
    a, b = make_image("a"), make_image("z")
    response = text_ids(4, generator)
    prompts = [make_prompt("ab", [2, 2], [a, b], torch.Generator().manual_seed(1)), None]
    prompts[1] = replace(prompts[0], id="ba", images=(b, a))
    trees = [Tree(prompt, (response,)) for prompt in prompts]
    expected, _ = separate_scores(model, trees)
    assert (expected[:4] - expected[4:]).abs().max() > 0.01
    for packing in ("shared", "none"):
        torch.testing.assert_close(score(model, trees, packing=packing).logp, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("packing", ["shared", "none"])
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_vl"])
def test_adapters_inside_a_model_count_and_wrappers_are_refused(kind: str, packing: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed; it comes with specs-fast[dev]")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapped, trees = peft.get_peft_model(make_model(kind), config).eval(), mixed_trees(kind)
    expected, _ = separate_scores(wrapped, trees)
    assert (expected - separate_scores(make_model(kind), trees)[0]).abs().max() > 0.01
    logp = score(wrapped.get_base_model(), trees, packing=packing).logp
    torch.testing.assert_close(logp, expected, atol=1e-5, rtol=0)
    assert relative_error(weighted_gradients(wrapped, logp), weighted_gradients(wrapped, expected)) < 1e-5
    for wrapper in (wrapped, torch.nn.DataParallel(make_model(kind)), torch.compile(make_model(kind))):
        with pytest.raises(ValueError, match=f"got a {type(wrapper).__name__} instead of a transformers model; pass"):
            score(wrapper, trees, packing=packing)


@pytest.mark.parametrize("packing", ["shared", "none"])
def test_two_images_in_one_run_name_the_prompt(packing: str) -> None:
    a, b = make_image("a"), make_image("b", (1, 6, 4))
    ids = torch.cat((image_run(a)[:-1], image_run(b)[1:]))
    prompt = EncodedPrompt("joined", ids, (ids == IMAGE).long(), (a, b))
    with pytest.raises(ValueError, match=r"prompt 'joined': runs of \[12\] image tokens for 2 images"):
        score(make_model("qwen3_vl"), [Tree(prompt, (torch.tensor([5]),))], packing=packing)
