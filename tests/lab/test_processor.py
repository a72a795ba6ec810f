"""The lab's processor: vocabulary, round trips, image expansion, saving and loading."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

from specs_fast.data.processor import ImageTextProcessor, register
from specs_fast.lab.examples import GRID, IMAGE_TOKENS, Exchange, make_batch, prompt_head, prompt_tail
from specs_fast.lab.processor import build_processor, build_tokenizer, vocabulary
from specs_fast.lab.questions import ASKED_TAGS, OTHER_TAGS, draw_question
from specs_fast.lab.responses import STYLES, write_response
from specs_fast.lab.scenes import HEIGHT, WIDTH, Scene

TAGS = (ASKED_TAGS, *OTHER_TAGS)
PROCESSOR = build_processor()
TOKENIZER = PROCESSOR.tokenizer
BLANK = Scene(np.zeros((HEIGHT, WIDTH), dtype=np.uint8), np.zeros((0, 2), dtype=np.float32))


def chat(text: str, images: int = 1) -> str:
    content = [*[{"type": "image"}] * images, {"type": "text", "text": text}]
    rendered: str = PROCESSOR.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return rendered


def test_ids_are_stable_and_unique() -> None:
    words = vocabulary()
    assert len(set(words)) == len(words) == len(TOKENIZER)
    assert TOKENIZER.convert_ids_to_tokens(list(range(len(words)))) == words


@pytest.mark.parametrize(
    "word", [*map(str, range(100)), *[f"<{s}{n}>" for pair in TAGS for n in pair for s in ("", "/")]]
)
def test_numbers_and_tags_are_one_token(word: str) -> None:
    assert len(TOKENIZER(word)["input_ids"]) == 1
    assert TOKENIZER.decode(TOKENIZER(word)["input_ids"], skip_special_tokens=True) == word


@pytest.mark.parametrize("style", STYLES)
def test_every_response_text_comes_back_the_same(style: str) -> None:
    for seed in range(100):
        rng = np.random.default_rng(seed)
        text = write_response(draw_question(rng, tags=TAGS, lengths=(3, 4, 5)), style, rng)
        ids = TOKENIZER(text)["input_ids"]
        assert TOKENIZER.unk_token_id not in ids
        assert TOKENIZER.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize(
    "text",
    [
        "<think>i see 3 7.</think><answer>10</answer>",
        "Answer: 12",
        "Answer : 12 .",
        "the answer is 12.",
        "The answer is \\boxed{12}.",
        "Final answer: 7",
        "<answer> i see 3 . </answer> <think> 3 </think>",
        "<think> so 3 . <answer> 3 </answer> </think>",
    ],
)
def test_corrupted_texts_round_trip_up_to_spaces(text: str) -> None:
    ids = TOKENIZER(text)["input_ids"]
    assert TOKENIZER.unk_token_id not in ids
    assert TOKENIZER.decode(ids).replace(" ", "") == text.replace(" ", "")


def test_every_prompt_is_made_of_known_words() -> None:
    for seed in range(500):
        rng = np.random.default_rng(seed)
        question = draw_question(rng, tags=TAGS, lengths=(3, 4, 5), unseen_wording=seed % 2 == 0)
        assert TOKENIZER.unk_token_id not in TOKENIZER(chat(question.text))["input_ids"]


def test_unknown_words_become_the_unknown_token() -> None:
    ids = TOKENIZER("i see a zebra .")["input_ids"]
    assert ids.count(TOKENIZER.unk_token_id) == 2


@pytest.mark.parametrize("size", [(96, 32), (32, 32), (64, 48)])
def test_placeholder_expands_to_one_token_per_merged_patch(size: tuple[int, int]) -> None:
    inputs = PROCESSOR(text=[chat("What is it?")], images=[Image.new("RGB", size)], return_tensors="pt")
    grid = inputs["image_grid_thw"]
    merged = int(grid.prod()) // PROCESSOR.image_processor.merge_size**2
    assert (inputs["input_ids"] == PROCESSOR.image_token_id).sum() == merged
    assert torch.equal(inputs["mm_token_type_ids"] == 1, inputs["input_ids"] == PROCESSOR.image_token_id)
    assert inputs["pixel_values"].shape == (int(grid.prod()), 3 * 8 * 8)
    assert inputs["pixel_values"].dtype == torch.float32


def test_images_of_several_prompts_and_none_in_one_batch() -> None:
    two, one = Image.new("RGB", (32, 32)), Image.new("RGB", (96, 32))
    texts = [chat("Add.", images=2), chat("Add.", images=0), chat("Add.")]
    inputs = PROCESSOR(text=texts, images=[[two, two], [], [one]], padding=True, return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 4], [1, 4, 4], [1, 4, 12]]
    assert (inputs["mm_token_type_ids"] == 1).sum(1).tolist() == [8, 0, 12]


def test_placeholders_and_images_must_agree_in_number() -> None:
    with pytest.raises(ValueError, match="2 .*and 1 images"):
        PROCESSOR(text=[chat("Add.", images=2)], images=[BLANK.image()], return_tensors="pt")
    with pytest.raises(ValueError, match="no images"):
        PROCESSOR(text=[chat("Add.")], return_tensors="pt")


def test_a_tokenizer_without_image_token_is_refused() -> None:
    class Without:
        unk_token_id = 1

        def convert_tokens_to_ids(self, token: str) -> int:
            return 1

    with pytest.raises(ValueError, match="image_pad"):
        ImageTextProcessor(image_processor=PROCESSOR.image_processor, tokenizer=Without())


def test_a_response_after_the_prompt_is_the_same_text_as_the_whole_conversation() -> None:
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Add."}]}
    for content in ("so 3 .", [{"type": "text", "text": "so 3 ."}]):
        whole = PROCESSOR.apply_chat_template([user, {"role": "assistant", "content": content}])
        assert whole == chat("Add.") + "so 3 .<|im_end|>\n"


def test_saved_folder_loads_through_the_auto_classes(tmp_path: Path) -> None:
    PROCESSOR.save_pretrained(tmp_path)
    register()
    register()
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is ImageTextProcessor
    image = Image.effect_noise((96, 32), 80).convert("RGB")
    ours = PROCESSOR(text=[chat("Add.")], images=[image], return_tensors="pt")
    theirs = loaded(
        text=[
            loaded.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Add."}]}],
                add_generation_prompt=True,
            )
        ],
        images=[image],
        return_tensors="pt",
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_tokenizer_of_a_saved_folder_loads_without_this_package(tmp_path: Path) -> None:
    PROCESSOR.save_pretrained(tmp_path)
    code = (
        "import sys; from transformers import AutoTokenizer; t = AutoTokenizer.from_pretrained(sys.argv[1]); "
        "assert 'specs_fast' not in sys.modules; print(t.decode(t('<think> so 12 . </think>')['input_ids']))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "<think> so 12 . </think>"


def test_loaded_tokenizer_agrees_with_the_built_one(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = chat("How many digits are above 3?") + "<think> i see 3 7 . so 1 . </think>"
    assert loaded(text)["input_ids"] == build_tokenizer()(text)["input_ids"]
    assert (loaded.pad_token, loaded.eos_token) == (TOKENIZER.pad_token, TOKENIZER.eos_token)


def test_training_rows_hold_the_same_tokens_as_the_processors_prompts() -> None:
    rng = np.random.default_rng(0)
    questions = [draw_question(rng, digits=[3, 7, 1]) for _ in range(2)]
    batch = make_batch(TOKENIZER, [[Exchange(q, ("so 1 .", "so 2 .")) for q in questions]], [BLANK])
    ids = batch.input_ids[0]
    visible = batch.visible[0, 0]
    prompts = [
        PROCESSOR(text=[chat(q.text)], images=[BLANK.image()], return_tensors="pt")["input_ids"][0] for q in questions
    ]
    ends = [
        i for i in range(len(ids)) if ids[i] == TOKENIZER.eos_token_id and i in set((batch.predictors + 1).tolist())
    ]
    expectations = [(prompt, words) for prompt in prompts for words in ("so 1 .", "so 2 .")]
    for end, (prompt, words) in zip(ends, expectations, strict=True):
        path = visible[end].nonzero().flatten()
        expected = [*prompt.tolist(), *TOKENIZER(words)["input_ids"], TOKENIZER.eos_token_id]
        assert ids[path].tolist() == expected
        assert batch.depths[0, path].tolist() == list(range(len(expected)))


def test_the_training_prompt_is_the_chat_template() -> None:
    text = "How many digits are even?"
    image = "<|image_pad|>" * IMAGE_TOKENS
    assert (
        TOKENIZER(prompt_head() + prompt_tail(text))["input_ids"]
        == (TOKENIZER(chat(text).replace("<|image_pad|>", image))["input_ids"])
    )
    assert GRID[1] * GRID[2] == 4 * IMAGE_TOKENS
