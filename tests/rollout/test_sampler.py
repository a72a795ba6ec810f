"""The sampler: reproducible, equal to transformers where greedy, and with the log-probs that scoring computes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from separate_runs import prompt_inputs
from tiny_models import EOS, IMAGE, MODELS, PAD, VIDEO, VISION_END, VISION_START, make_model, mixed_trees
from transformers import PreTrainedModel

from specs_fast.data.types import Completion, EncodedPrompt, Tree
from specs_fast.models import score
from specs_fast.models.positions import segment_positions
from specs_fast.rollout import Engine, Sampler

SETTINGS = {"num_samples": 3, "max_new_tokens": 10, "seed": 11}


def prompts_of(kind: str) -> list[EncodedPrompt]:
    return [tree.prompt for tree in mixed_trees(kind)]


def make_sampler(model: PreTrainedModel, **settings: int) -> Sampler:
    return Sampler(model, eos_token_ids=[EOS, 7], pad_token_id=PAD, **settings)


def flat(completions: list[list[Completion]]) -> list[list[int]]:
    return [completion.token_ids.tolist() for group in completions for completion in group]


@pytest.mark.parametrize("kind", MODELS)
def test_logp_is_what_scoring_computes(kind: str) -> None:
    model, prompts = make_model(kind), prompts_of(kind)
    engine: Engine = make_sampler(model)
    groups = engine.generate(prompts, temperature=0.8, top_p=0.9, top_k=20, **SETTINGS)
    assert [len(group) for group in groups] == [3] * len(prompts)
    trees = [
        Tree(prompt, tuple(completion.token_ids for completion in group))
        for prompt, group in zip(prompts, groups, strict=True)
    ]
    logp = torch.cat([completion.logp for group in groups for completion in group])
    assert len(set(map(tuple, flat(groups)))) > len(prompts)
    for packing in ("shared", "none"):
        expected = score(model, trees, packing=packing, temperature=0.8).logp.detach()
        torch.testing.assert_close(logp, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", MODELS)
def test_greedy_equals_transformers(kind: str) -> None:
    model, prompts = make_model(kind), prompts_of(kind)
    groups = make_sampler(model).generate(prompts, greedy=True, **SETTINGS)
    banned = [[token] for token in (IMAGE, VIDEO, VISION_START, VISION_END)] if kind.endswith("vl") else None
    for prompt, group in zip(prompts, groups, strict=True):
        expected = model.generate(
            **prompt_inputs(prompt),
            max_new_tokens=10,
            do_sample=False,
            eos_token_id=[EOS, 7],
            pad_token_id=PAD,
            bad_words_ids=banned,
        )[0, len(prompt) :]
        assert [completion.token_ids.tolist() for completion in group] == [expected.tolist()] * 3


@pytest.mark.parametrize("kind", ["qwen3_vl", "qwen2_5_vl", "qwen3"])
def test_the_seed_alone_decides(kind: str) -> None:
    """Not the batching, not the other prompts, not the number of samples."""
    model, prompts = make_model(kind), prompts_of(kind)
    together = make_sampler(model).generate(prompts, **SETTINGS)
    assert flat(make_sampler(model).generate(prompts, **SETTINGS)) == flat(together)
    for budget in (1, 64, 100):
        assert flat(make_sampler(model, max_batch_tokens=budget).generate(prompts, **SETTINGS)) == flat(together)
    more = make_sampler(model).generate(prompts[:2], **{**SETTINGS, "num_samples": 5})
    assert flat([group[:3] for group in more]) == flat(together[:2])
    assert flat(make_sampler(model).generate(prompts, **{**SETTINGS, "seed": 12})) != flat(together)


def test_completions_end_at_the_first_end_token_and_say_whether_they_did() -> None:
    model, prompts = make_model("qwen3_vl"), prompts_of("qwen3_vl")
    groups = make_sampler(model).generate(prompts, num_samples=40, max_new_tokens=12, temperature=2.0, seed=0)
    lengths = set()
    for completion in (completion for group in groups for completion in group):
        tokens = completion.token_ids.tolist()
        assert len(tokens) == len(completion) == len(completion.logp)
        assert completion.finished == (tokens[-1] in (EOS, 7))
        assert not {EOS, 7} & set(tokens[:-1])
        assert completion.finished or len(tokens) == 12
        assert bool((completion.logp < 0).all())
        lengths.add(len(tokens))
    assert len(lengths) > 6


@pytest.mark.parametrize("kind", ["qwen3_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("greedy", [True, False])
def test_vision_tokens_are_never_sampled(kind: str, greedy: bool) -> None:
    model, prompts = make_model(kind, tie_word_embeddings=False), prompts_of(kind)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(64))
    model.lm_head.bias.data[[IMAGE, VIDEO, VISION_START, VISION_END]] = 50.0  # the model insists on them
    groups = make_sampler(model).generate(prompts, greedy=greedy, **SETTINGS)
    tokens = torch.cat([completion.token_ids for group in groups for completion in group])
    assert len(tokens) > 20 and int(tokens.max()) < IMAGE
    # logp is over the whole vocabulary all the same
    assert max(float(completion.logp.max()) for group in groups for completion in group) < -20.0


def test_each_prompt_is_prefilled_once_and_each_image_encoded_once() -> None:
    model, prompts = make_model("qwen3_vl"), prompts_of("qwen3_vl")
    prefills: list[int] = []
    patches: list[int] = []
    rows: list[int] = []

    def record(_: object, args: tuple, kwargs: dict) -> None:
        batch, length = kwargs["input_ids"].shape
        (prefills if length > 1 else rows).append(batch)

    model.register_forward_pre_hook(record, with_kwargs=True)
    model.model.visual.register_forward_pre_hook(lambda _, args: patches.append(args[0].shape[0]))
    make_sampler(model).generate(prompts, num_samples=16, max_new_tokens=12, temperature=2.0, seed=0)
    distinct = {image.key: image for prompt in prompts for image in prompt.images}
    assert prefills == [len(prompts)]
    assert patches == [sum(len(image.pixel_values) for image in distinct.values())]
    assert rows[0] > rows[-1] and rows == sorted(rows, reverse=True)  # ended rows leave


def test_rows_that_fit_one_budget_are_one_batch_and_more_are_several() -> None:
    model, prompts = make_model("qwen3"), prompts_of("qwen3")
    batches: list[int] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: batches.append(kwargs["input_ids"].shape[0] * (kwargs["input_ids"].shape[1] > 1)),
        with_kwargs=True,
    )
    longest = max(len(prompt) for prompt in prompts) + 10
    make_sampler(model, max_batch_tokens=12 * longest).generate(prompts, **SETTINGS)
    assert [batch for batch in batches if batch] == [4]
    batches.clear()
    make_sampler(model, max_batch_tokens=6 * longest).generate(prompts, **SETTINGS)
    assert [batch for batch in batches if batch] == [2, 2]


def test_sliding_window_models_sample_what_they_score() -> None:
    model = make_model("qwen3", use_sliding_window=True, sliding_window=4, max_window_layers=1)
    prompts = prompts_of("qwen3")
    groups = make_sampler(model).generate(prompts, **SETTINGS)
    trees = [Tree(p, tuple(c.token_ids for c in group)) for p, group in zip(prompts, groups, strict=True)]
    logp = torch.cat([completion.logp for group in groups for completion in group])
    torch.testing.assert_close(logp, score(model, trees, packing="none").logp.detach(), atol=1e-4, rtol=0)


def test_training_in_place_is_seen_and_weights_can_be_swapped() -> None:
    model, other, prompts = make_model("qwen3"), make_model("qwen3", seed=1), prompts_of("qwen3")
    sampler = make_sampler(model)
    first = flat(sampler.generate(prompts, **SETTINGS))
    expected = flat(make_sampler(other).generate(prompts, **SETTINGS))
    assert first != expected
    sampler.update_weights(other)
    assert flat(sampler.generate(prompts, **SETTINGS)) == expected
    model.load_state_dict(other.state_dict())
    sampler.update_weights(model)
    assert flat(sampler.generate(prompts, **SETTINGS)) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_samples": 0}, "num_samples"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_sampler(make_model("qwen3")).generate(prompts_of("qwen3"), **{**SETTINGS, **change})


def test_models_and_tokens_that_cannot_be_sampled_from_are_refused() -> None:
    model = make_model("qwen3_vl")
    with pytest.raises(ValueError, match="end-of-sequence token 60 is a vision token"):
        Sampler(model, eos_token_ids=[EOS, IMAGE], pad_token_id=PAD)
    with pytest.raises(ValueError, match="eos_token_ids is empty"):
        Sampler(model, eos_token_ids=[], pad_token_id=PAD)
    empty = torch.zeros(0, dtype=torch.long)
    with pytest.raises(ValueError, match="prompt 1 .'void'. is empty"):
        make_sampler(model).generate([prompts_of("qwen3")[0], EncodedPrompt("void", empty, empty)], **SETTINGS)
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        make_sampler(model).generate(prompts_of("qwen3_vl"), **SETTINGS)


@pytest.mark.parametrize("greedy", [False, True])
def test_a_model_that_has_diverged_is_named_instead_of_sampled(greedy: bool) -> None:
    model, prompts = make_model("qwen3"), prompts_of("qwen3")
    with torch.no_grad():
        model.base_model.norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="prompt 'one' are NaN: weights that are not finite"):
        make_sampler(model).generate(prompts[:1], greedy=greedy, top_p=0.9, **SETTINGS)


def test_a_prompt_that_lost_its_image_is_refused() -> None:
    prompts = prompts_of("qwen3_vl")
    lost = replace(prompts[0], images=())
    with pytest.raises(ValueError, match="prompt 'one' holds 6 image tokens, but its 0 images take 0"):
        make_sampler(make_model("qwen3_vl")).generate([lost, *prompts[1:]], **SETTINGS)


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_vl"])
def test_a_prompt_that_would_pass_the_models_positions_is_refused_before_anything_is_sampled(kind: str) -> None:
    """Exactly as many positions as the model has are fine; an image counts with its positions, not with its tokens."""
    model, prompts = make_model(kind), prompts_of(kind)
    longest = max(int(segment_positions(model, p.token_types, p.images).max()) + 1 for p in prompts)
    assert kind == "qwen3" or longest < max(map(len, prompts))
    model.config.get_text_config().max_position_embeddings = longest + 10
    make_sampler(model).generate(prompts, **SETTINGS)
    model.config.get_text_config().max_position_embeddings = longest + 9
    with pytest.raises(
        ValueError, match=f"takes {longest} positions and max_new_tokens is 10.*lower max_new_tokens to 9"
    ):
        make_sampler(model).generate(prompts, **SETTINGS)
