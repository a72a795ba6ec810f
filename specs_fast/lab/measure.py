"""What a lab model does on fresh questions: format and accuracy, sampled and greedy, per split and per way of answering."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import Qwen3VLForConditionalGeneration

from specs_fast.data.processor import ImageTextProcessor
from specs_fast.lab.dataset import EVAL_SPLITS, draw_example
from specs_fast.lab.questions import Question
from specs_fast.lab.scenes import Scene
from specs_fast.rewards.accuracy import answers_equal
from specs_fast.rewards.extract import extract_any
from specs_fast.rewards.format import parse_response

MAX_NEW_TOKENS = 48
OPENINGS = {"reasoning in tags": "<{0}> i see", "reasoning": "i see", "sentence": "the answer is"}
"""First words that put a response into a style."""

Example = tuple[Question, Scene]


@dataclass(frozen=True)
class Outcome:
    """One response: which way it opens, whether it follows the asked format, whether its last answer is right."""

    opening: str
    format: bool
    correct: bool


def judge(question: Question, text: str) -> Outcome:
    """By the strict format check and the format-independent extractor."""
    answer = extract_any(text)
    right = answer is not None and answers_equal(answer, question.answer)
    words = text.split()
    opening = words[0] if words else "nothing"
    opening = "number" if opening.isdigit() or opening in ("first", "last") else opening
    return Outcome(opening, parse_response(text, question.tags).ok, right)


@torch.no_grad()
def respond(
    model: Qwen3VLForConditionalGeneration,
    processor: ImageTextProcessor,
    examples: Sequence[Example],
    *,
    greedy: bool,
    seed: int = 0,
    opening: str = "",
    batch_size: int = 100,
) -> list[str]:
    """One response to each question, at temperature 1 or greedy; ``opening`` forces its first words."""
    texts: list[str] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for start in range(0, len(examples), batch_size):
            batch = examples[start : start + batch_size]
            openings = [opening.format(*question.tags) for question, _ in batch]
            prompts = [
                _prompt(processor, question) + first for (question, _), first in zip(batch, openings, strict=True)
            ]
            inputs = processor(
                text=prompts,
                images=[[scene.image()] for _, scene in batch],
                padding=True,
                padding_side="left",
                return_tensors="pt",
            )
            choice: dict[str, Any] = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0}
            if not greedy:
                choice |= {"top_k": 0, "top_p": 1.0}
            ids = model.generate(**inputs, **choice, max_new_tokens=MAX_NEW_TOKENS)
            drawn = processor.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            texts += [f"{first} {text}".strip() for first, text in zip(openings, drawn, strict=True)]
    return texts


def _prompt(processor: ImageTextProcessor, question: Question) -> str:
    content = [{"type": "image"}, {"type": "text", "text": question.text}]
    text: str = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return text


def draw_examples(split: str, questions: int, seed: int) -> list[Example]:
    """Fresh questions of a split, other than those that `build` writes for this seed."""
    rng = np.random.default_rng([seed, 20_261, int.from_bytes(split.encode("utf-8"), "little")])
    return [draw_example(EVAL_SPLITS[split], rng)[:2] for _ in range(questions)]


def _shares(outcomes: Sequence[Outcome]) -> dict[str, float]:
    return {
        "format": round(float(np.mean([outcome.format for outcome in outcomes])), 4),
        "accuracy_any": round(float(np.mean([outcome.correct for outcome in outcomes])), 4),
    }


def measure(
    model: Qwen3VLForConditionalGeneration, processor: ImageTextProcessor, *, questions: int, seed: int
) -> dict[str, Any]:
    """Format and accuracy of ``questions`` fresh questions per split, at temperature 1 and greedy; on ``id`` also per opening,
    and greedy when the opening is forced."""
    result: dict[str, Any] = {"questions_per_split": questions, "splits": {}}
    for split in EVAL_SPLITS:
        examples = draw_examples(split, questions, seed)
        judged: dict[bool, list[Outcome]] = {}
        for greedy in (False, True):
            texts = respond(model, processor, examples, greedy=greedy, seed=seed)
            judged[greedy] = [judge(question, text) for (question, _), text in zip(examples, texts, strict=True)]
        result["splits"][split] = {"sampled": _shares(judged[False]), "greedy": _shares(judged[True])}
        if split == "id":
            result["id_sampled_by_opening"] = _by_opening(judged[False])
            result["id_greedy_after_opening"] = {
                name: _shares(
                    [
                        judge(question, text)
                        for (question, _), text in zip(
                            examples, respond(model, processor, examples, greedy=True, opening=words), strict=True
                        )
                    ]
                )
                for name, words in OPENINGS.items()
            }
    return result


def _by_opening(outcomes: Sequence[Outcome]) -> dict[str, dict[str, float]]:
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.opening, []).append(outcome)
    return {
        opening: {"share": round(len(group) / len(outcomes), 4), **_shares(group)}
        for opening, group in sorted(groups.items(), key=lambda item: -len(item[1]))
    }
