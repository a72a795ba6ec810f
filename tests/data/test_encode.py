"""Encoding: one pipeline, exact counts, nothing cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image

from specs_fast.data.encode import Encoder, check_lengths
from specs_fast.data.rows import load_prompts
from specs_fast.data.types import Prompt
from specs_fast.lab import LabPaths
from specs_fast.models.load import load_processor


@pytest.fixture(scope="module")
def encoder(mini_lab: LabPaths) -> Encoder:
    return Encoder(load_processor(mini_lab.base_dir))


@pytest.fixture(scope="module")
def prompts(mini_lab: LabPaths) -> list[Prompt]:
    return load_prompts(mini_lab.train)


def text_prompt(text: str, images: int = 0) -> Prompt:
    content = [{"type": "image"}] * images + [{"type": "text", "text": text}]
    pictures = tuple(Image.new("RGB", (96, 32), (i, i, i)) for i in range(images))
    return Prompt(text, ({"role": "user", "content": content},), pictures, source="made.jsonl:7")


def test_image_tokens_equal_merged_patches_and_images_split_by_content(encoder: Encoder, prompts: list[Prompt]) -> None:
    one = encoder.prompt(prompts[0])
    t, h, w = one.images[0].grid_thw
    assert int(one.token_types.sum()) == t * h * w // 4 and one.images[0].pixel_values.shape[0] == t * h * w
    two = encoder.prompt(text_prompt("what is the sum ?", images=2))
    assert len(two.images) == 2 and two.images[0].key != two.images[1].key
    assert int(two.token_types.sum()) == 2 * 12
    assert encoder.prompt(prompts[0]) is one


def test_another_prompt_of_the_same_name_is_encoded_on_its_own(encoder: Encoder, prompts: list[Prompt]) -> None:
    """Other pictures of no file, another order of turns, other files: none is answered with what was kept for the first."""
    one, two = text_prompt("count", 1), text_prompt("count", 2)
    other = replace(one, images=two.images[1:])
    assert encoder.prompt(one).images[0].key != encoder.prompt(other).images[0].key
    turns = [{"role": role, "content": [{"type": "text", "text": role}]} for role in ("user", "assistant")]
    asked, answered = (replace(text_prompt("x"), messages=tuple(order)) for order in (turns, turns[::-1]))
    swapped = replace(
        answered, messages=tuple({**m, "content": turns[i]["content"]} for i, m in enumerate(turns[::-1]))
    )
    assert asked.text == swapped.text
    assert not torch.equal(encoder.prompt(asked).input_ids, encoder.prompt(swapped).input_ids)
    moved = replace(prompts[0], images=prompts[1].images, image_paths=prompts[1].image_paths)
    assert encoder.prompt(moved).images[0].key != encoder.prompt(prompts[0]).images[0].key
    assert encoder.prompt(replace(prompts[0])) is encoder.prompt(prompts[0])


def test_equal_pixels_have_equal_keys_whatever_the_prompt(encoder: Encoder, prompts: list[Prompt]) -> None:
    other = replace(prompts[0], id="other", messages=text_prompt("count", 1).messages)
    assert encoder.prompt(other).images[0].key == encoder.prompt(prompts[0]).images[0].key


def test_prompts_without_images_encode_as_text(encoder: Encoder) -> None:
    encoded = encoder.prompt(text_prompt("what is the sum ?"))
    assert encoded.images == () and not encoded.token_types.any() and len(encoded) > 5


def test_completions_end_and_decode_back(encoder: Encoder) -> None:
    text = "<think> i see 3 4 . 3 + 4 = 7 . </think> <answer> 7 </answer>"
    ids = encoder.completion(text)
    assert int(ids[-1]) == encoder.eos_token_id and encoder.decode(ids) == text
    assert encoder.decode(torch.tensor([encoder.eos_token_id])) == ""
    with pytest.raises(ValueError, match="empty completion"):
        encoder.completion("  ")


def test_every_token_that_ends_a_completion_is_left_out_of_its_text(encoder: Encoder) -> None:
    other_end = encoder.tokenizer.convert_tokens_to_ids("<|im_start|>")
    several = Encoder(encoder.processor, [encoder.eos_token_id, other_end])
    ids = torch.cat([encoder.completion("the answer is 7")[:-1], torch.tensor([other_end])])
    assert several.decode(ids) == "the answer is 7" and encoder.decode(ids) != "the answer is 7"


def test_a_prompt_that_the_chat_template_refuses_is_named(mini_lab: LabPaths) -> None:
    tokenizer = load_processor(mini_lab.base_dir).tokenizer
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(ValueError, match=r"made\.jsonl:7: the model's chat template refused .*no system role"):
        Encoder(tokenizer).prompt(text_prompt("sum ?"))


def test_a_literal_image_token_in_the_text_is_refused_with_its_row(encoder: Encoder) -> None:
    literal = replace(text_prompt("sum <|image_pad|> ?"), id="literal")
    with pytest.raises(ValueError, match=r"made\.jsonl:7"):
        encoder.prompt(literal)


def test_over_long_rows_raise_or_are_counted_but_never_cut(encoder: Encoder, prompts: list[Prompt]) -> None:
    lengths = [len(encoder.prompt(prompt)) for prompt in prompts]
    limit = sorted(lengths)[len(lengths) // 2]
    too_long = next(prompt for prompt, length in zip(prompts, lengths, strict=True) if length > limit)
    with pytest.raises(ValueError, match=rf"train\.jsonl:\d+: the prompt has \d+ tokens, .* is {limit}"):
        check_lengths(prompts, encoder, limit, filter_overlong=False)
    kept, filtered = check_lengths(prompts, encoder, limit, filter_overlong=True)
    assert filtered == sum(length > limit for length in lengths) and too_long not in kept
    assert len(kept) + filtered == len(prompts)
    with pytest.raises(ValueError, match="none is left"):
        check_lengths(prompts, encoder, 1, filter_overlong=True)
    assert check_lengths(prompts, encoder, None, filter_overlong=False) == (prompts, 0)


def test_a_text_only_model_refuses_images(mini_lab: LabPaths) -> None:
    encoder = Encoder(load_processor(mini_lab.base_dir).tokenizer)
    assert len(encoder.prompt(text_prompt("what is the sum ?"))) > 5
    with pytest.raises(ValueError, match=r"made\.jsonl:7: the prompt has 1 images but the model reads text only"):
        encoder.prompt(text_prompt("sum ?", images=1))
