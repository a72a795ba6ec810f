"""The packaged base model, its training in miniature, and what it must be able to do."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen3VLForConditionalGeneration

from specs_fast.lab.base import make_base
from specs_fast.lab.examples import Exchange, draw_scenes, grid, make_batch
from specs_fast.lab.measure import draw_examples, judge, respond
from specs_fast.lab.model import new_model
from specs_fast.lab.packed import BASE_MODEL, round_to_half, unpack_base
from specs_fast.lab.pretrain import Recipe, draw_language_batch, lab_positions, language_loss, pretrain
from specs_fast.lab.processor import build_processor
from specs_fast.lab.questions import draw_question
from specs_fast.lab.responses import STYLES, Mistakes
from specs_fast.lab.scenes import PLAIN

PROCESSOR = build_processor()
TINY = Recipe(
    vision_batch=2, vision_steps=2, skill_steps=1, style_steps=1, images_per_step=2, questions_per_image=1,
    responses_per_question=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def model(base: Path) -> Qwen3VLForConditionalGeneration:
    return AutoModelForImageTextToText.from_pretrained(base).eval()


def test_the_packaged_base_is_small_complete_and_says_where_it_comes_from() -> None:
    files = {path.name: path.stat().st_size for path in BASE_MODEL.iterdir()}
    assert sum(files.values()) <= 12 * 2**20
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    } <= set(files)
    assert {"processor_config.json", "chat_template.jinja", "provenance.json"} <= set(files)
    text = (BASE_MODEL / "provenance.json").read_text(encoding="utf-8")
    provenance = json.loads(text)
    assert provenance["command"].startswith("python -m specs_fast.lab.base")
    assert provenance["recipe"]["seed"] == 0 and provenance["measured"]["splits"]["id"]
    for path in BASE_MODEL.glob("*.json"):
        found = [place for place in ("/home/", "/root/", "/tmp/", "/Users/") if place in path.read_text("utf-8")]
        assert not found, f"{path.name} names a folder of the machine it was made on: {found}"


def test_unpacked_weights_are_the_packaged_halves_in_fp32(base: Path, model: Qwen3VLForConditionalGeneration) -> None:
    assert type(model) is Qwen3VLForConditionalGeneration
    assert 1e6 <= sum(parameter.numel() for parameter in model.parameters()) <= 3e6
    state = model.state_dict()
    with safe_open(BASE_MODEL / "model.safetensors", "pt") as packed:
        for name in packed.keys():
            half = packed.get_tensor(name)
            assert half.dtype == torch.float16 and half.isfinite().all()
            assert state[name].dtype == torch.float32 and torch.equal(state[name], half.float())
    assert json.loads((base / "config.json").read_text(encoding="utf-8"))["dtype"] == "float32"
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight


def test_the_packaged_processor_is_the_one_the_code_builds(base: Path) -> None:
    loaded = AutoProcessor.from_pretrained(base)
    assert loaded.tokenizer.get_vocab() == PROCESSOR.tokenizer.get_vocab()
    assert loaded.chat_template == PROCESSOR.chat_template
    assert loaded.image_processor.to_dict() == PROCESSOR.image_processor.to_dict()


def test_a_missing_base_names_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="python -m specs_fast.lab.base"):
        unpack_base(tmp_path / "out", source=tmp_path)


def test_the_base_sees_and_reasons_but_seldom_answers_as_asked(model: Qwen3VLForConditionalGeneration) -> None:
    examples = draw_examples("id", 60, seed=1)
    sampled = respond(model, PROCESSOR, examples, greedy=False, seed=1)
    outcomes = [judge(question, text) for (question, _), text in zip(examples, sampled, strict=True)]
    assert 0.1 < np.mean([outcome.format for outcome in outcomes]) < 0.5
    assert 0.3 < np.mean([outcome.correct for outcome in outcomes]) < 0.75
    thinking = respond(model, PROCESSOR, examples, greedy=True, opening="<{0}> i see")
    outcomes = [judge(question, text) for (question, _), text in zip(examples, thinking, strict=True)]
    assert np.mean([outcome.correct for outcome in outcomes]) > 0.7
    assert np.mean([outcome.format for outcome in outcomes]) > 0.5


def test_packed_training_loss_equals_separate_conversations() -> None:
    """Shared images and questions change the cost of a batch, not its loss."""
    model = new_model(PROCESSOR.tokenizer, 0)
    rng = np.random.default_rng(0)
    digits = [[3, 7, 1], [4, 4, 9, 2]]
    scenes = draw_scenes(digits, [PLAIN, PLAIN], rng)
    conversations = [
        [Exchange(draw_question(rng, digits=row), ("so 1 .", "so first .")) for _ in "ab"] for row in digits
    ]
    positions = lab_positions(model, PROCESSOR.tokenizer, 128)
    packed = language_loss(model, make_batch(PROCESSOR.tokenizer, conversations, scenes), positions, frozen=True)
    total, count = 0.0, 0
    for conversation, scene in zip(conversations, scenes, strict=True):
        for exchange in conversation:
            for text in exchange.responses:
                content = [{"type": "image"}, {"type": "text", "text": exchange.question.text}]
                user = {"role": "user", "content": content}
                prompt = PROCESSOR.apply_chat_template([user], add_generation_prompt=True)
                inputs = PROCESSOR(text=[prompt + text + "<|im_end|>"], images=[scene.image()], return_tensors="pt")
                tokens = len(PROCESSOR.tokenizer(text)["input_ids"]) + 1
                labels = torch.full_like(inputs["input_ids"], -100)
                labels[:, -tokens:] = inputs["input_ids"][:, -tokens:]
                with torch.no_grad():
                    total += float(model(**inputs, labels=labels).loss) * tokens
                count += tokens
    assert abs(packed.item() - total / count) < 1e-5


def test_the_tower_is_not_trained_where_it_is_frozen() -> None:
    model = new_model(PROCESSOR.tokenizer, 0)
    batch = draw_language_batch(PROCESSOR.tokenizer, TINY, STYLES, Mistakes(), np.random.default_rng(0))
    language_loss(model, batch, lab_positions(model, PROCESSOR.tokenizer, 128), frozen=True).backward()
    assert all(parameter.grad is None for parameter in model.model.visual.parameters())
    assert all(parameter.grad is not None for parameter in model.model.language_model.parameters())


def test_pretraining_is_a_function_of_its_seed() -> None:
    states = []
    for seed in (0, 0, 1):
        recipe = Recipe(**{**vars(TINY), "seed": seed})
        model = new_model(PROCESSOR.tokenizer, seed)
        pretrain(model, PROCESSOR.tokenizer, recipe, lambda *progress: None)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["lm_head.weight"], states[2]["lm_head.weight"])


def test_a_made_base_loads_as_it_was_measured(tmp_path: Path) -> None:
    provenance = make_base(TINY, tmp_path / "packed", command="python -m specs_fast.lab.base", questions=0)
    assert provenance["recipe"]["vision_steps"] == 2
    expected = new_model(PROCESSOR.tokenizer, TINY.seed)
    pretrain(expected, PROCESSOR.tokenizer, TINY, lambda *progress: None)
    round_to_half(expected)
    loaded = AutoModelForImageTextToText.from_pretrained(unpack_base(tmp_path / "fp32", source=tmp_path / "packed"))
    for name, tensor in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert grid(2).tolist() == [[1, 4, 12]] * 2
