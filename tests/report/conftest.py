"""A run folder with invented contents in the real formats: what the report and its tables are developed and tested on.

``python tests/report/conftest.py FOLDER`` writes one to look at.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from sklearn.datasets import load_digits

MODELS = ("base", "zero", "coldstart", "final")
STAGES = ("zero", "pairs", "coldstart", "final")
SPLITS = ("id", "ood_tags", "ood_long")
CORRUPTIONS = ("drop_all", "drop_answer", "drop_reasoning", "plain_answer", "shift")
# Chance of (any-style correct, format) per model; the second split asks for other tags, the third for longer rows.
SKILL = {
    "id": {"base": (0.52, 0.28), "zero": (0.74, 0.93), "coldstart": (0.66, 0.9), "final": (0.82, 0.99)},
    "ood_tags": {"base": (0.5, 0.02), "zero": (0.66, 0.1), "coldstart": (0.62, 0.31), "final": (0.73, 0.42)},
    "ood_long": {"base": (0.29, 0.25), "zero": (0.41, 0.9), "coldstart": (0.37, 0.88), "final": (0.47, 0.98)},
}
CONFIG = {
    "output_dir": "runs/fake",
    "name": "lab: SPECS on scanned digits",
    "lab": {"questions_train": 60},
    "zero": {"steps": 40, "optim": {"lr": 1e-4}},
    "coldstart": {"optim": {"lr": 3e-4}},
    "final": {"steps": 60, "optim": {"lr": 1e-4}},
}


def make_run(folder: Path, *, stages: tuple[str, ...] = STAGES, models: tuple[str, ...] = MODELS, n: int = 40) -> Path:
    """Write a run folder whose ``stages`` are finished and whose ``models`` are evaluated on ``n`` questions a split."""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False), encoding="utf-8")
    _json(
        folder / "run.json",
        {
            "config_hash": "0123456789abcdef",
            "command": ["specs-fast", "run", "recipes/lab-specs.yaml"],
            "versions": {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0", "specs-fast": "0.1.0"},
            "machine": {"platform": "Linux x86_64", "cpu": "Some CPU", "threads": 2, "device": "cpu", "gpu": None},
            "seconds": {"zero": 62.0, "pairs": 12.5, "coldstart": 20.0, "final": 88.1, "evaluation": 95.0},
        },
    )
    questions = {split: [_question(folder, split, index, rng) for index in range(n)] for split in SPLITS}
    if "zero" in stages:
        _grpo(folder / "zero", questions["id"], 40, (0.8, 1.2), rng)
    if "pairs" in stages:
        _pairs(folder / "pairs", questions["id"], rng)
    if "coldstart" in stages:
        _dpo(folder / "coldstart", rng)
    if "final" in stages:
        _grpo(folder / "final", questions["id"], 60, (1.1, 1.36), rng)
    for model in models:
        _evaluation(folder / "eval", model, questions, rng)
    return folder


def _json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def _jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@lru_cache
def scans() -> Any:
    return load_digits()


def _question(folder: Path, split: str, index: int, rng: random.Random) -> dict[str, Any]:
    digits = scans()
    count = 5 if split == "ood_long" else rng.choice((3, 4))
    chosen = [rng.randrange(len(digits.target)) for _ in range(count)]
    canvas = np.zeros((32, 24 * max(count, 4)), dtype=np.uint8)
    for position, scan in enumerate(chosen):
        pixels = np.kron(digits.images[scan] * 15.9, np.ones((2, 2))).astype(np.uint8)
        row, column = rng.randrange(16), 24 * position + rng.randrange(8)
        canvas[row : row + 16, column : column + 16] = pixels
    path = folder / "lab" / "images" / f"{split}-{index:04d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(canvas).convert("RGB").save(path)
    tags = ("reasoning", "result") if split == "ood_tags" else ("think", "answer")
    read = [int(digits.target[scan]) for scan in chosen]
    return {
        "prompt_id": f"{split}-{index}",
        "prompt": f"what is the sum of the digits ? use <{tags[0]}> and <{tags[1]}> .",
        "images": [str(path.relative_to(folder))],
        "answer": str(sum(read)),
        "read": read,
        "tags": tags,
    }


def _response(question: dict[str, Any], correct: bool, form: bool, rng: random.Random) -> str:
    answer = question["answer"] if correct else str(int(question["answer"]) + rng.choice((-2, -1, 1, 3)))
    read = " ".join(map(str, question["read"]))
    steps = f"i see {read} . the sum is {answer} ."
    reasoning, tag = question["tags"]
    if form:
        return f"<{reasoning}> {steps} </{reasoning}> <{tag}> {answer} </{tag}>"
    return rng.choice(
        (f"{steps} the answer is {answer}", answer, f"<{reasoning}> {steps} {answer}", f"answer: {answer}")
    )


def _grpo(
    folder: Path, questions: list[dict[str, Any]], steps: int, reward: tuple[float, float], rng: random.Random
) -> None:
    low, high = reward
    rows, completions = [], []
    for step in range(1, steps + 1):
        part = 1 - math.exp(-3 * step / steps)
        value = low + (high - low) * part + rng.gauss(0, 0.05)
        rows.append(
            {
                "step": step,
                "stage": folder.name,
                "loss": rng.gauss(0, 0.002),
                "reward": value,
                "reward_std": 0.4 * (1 - part) + 0.05,
                "rewards/format/mean": min(0.5, 0.5 * value / high),
                "rewards/accuracy/mean": min(1.0, value - 0.45),
                "frac_reward_zero_std": 0.05 + 0.5 * part,
                "completions/mean_length": 19 + 2 * part + rng.gauss(0, 0.3),
                "completions/clipped_ratio": max(0.0, 0.02 * (1 - part)),
                "entropy": 0.26 - 0.18 * part + rng.gauss(0, 0.006),
                "clip_ratio/low_mean": 0.001 + 0.001 * rng.random(),
                "clip_ratio/high_mean": 0.002 + 0.001 * rng.random(),
                "clip_ratio/region_mean": 0.003 + 0.001 * rng.random(),
                "grad_norm": 0.5 + 0.2 * rng.random(),
                "learning_rate": 1e-4,
                "step_time": 0.5,
            }
        )
        if step in (1, 10, steps):
            for question in rng.sample(questions, 2):
                good = rng.random() < part
                text = _response(question, good, rng.random() < part, rng)
                completions.append(
                    {
                        "step": step,
                        **{key: question[key] for key in ("prompt_id", "prompt", "images", "answer")},
                        "completion": text,
                        "reward": 1.5 if good else 0.0,
                        "rewards": {"format": 0.5, "accuracy": float(good)},
                        "advantage": 0.7 if good else -0.7,
                    }
                )
    _jsonl(folder / "metrics.jsonl", rows)
    _jsonl(folder / "completions.jsonl", completions)
    _json(folder / "DONE.json", {"stage": folder.name, "steps": steps, "seconds": 50.0})


def _pairs(folder: Path, questions: list[dict[str, Any]], rng: random.Random) -> None:
    rows = []
    for question in questions[:20]:
        kind = rng.choice(CORRUPTIONS)
        tags = dict(zip(("think", "answer"), question["tags"], strict=True))
        image = Path("images") / Path(question["images"][0]).name
        (folder / "images").mkdir(parents=True, exist_ok=True)
        Image.open(folder.parent / question["images"][0]).save(folder / image)
        text = _response(question, True, True, rng)
        broken = {
            "drop_all": f"i see {question['read']} . {question['answer']}",
            "drop_answer": text.replace(f"<{tags['answer']}> ", "").replace(f" </{tags['answer']}>", ""),
            "drop_reasoning": text.replace(f"<{tags['think']}> ", "").replace(f" </{tags['think']}>", ""),
            "plain_answer": text.split(f"<{tags['answer']}>")[0] + f"Answer: {question['answer']}",
            "shift": text.replace(f" </{tags['think']}>", "") + f" </{tags['think']}>",
        }[kind]
        user = [{"type": "image"}, {"type": "text", "text": question["prompt"]}]
        rows.append(
            {
                "id": question["prompt_id"],
                "prompt": [{"role": "user", "content": user}],
                "images": [str(image)],
                "chosen": [{"role": "assistant", "content": [{"type": "text", "text": text}]}],
                "rejected": [{"role": "assistant", "content": [{"type": "text", "text": broken}]}],
                "answer": question["answer"],
                "corruption": kind,
            }
        )
    _jsonl(folder / "pairs.jsonl", rows)
    counts = {
        "prompts": 800,
        "chosen_from": "zero",
        "rejected_from": "base",
        "zero": {"sampled": 3200, "finished": 3195, "correct": 2698, "format": 2688, "consistent": 2601},
        "base": {"sampled": 3200, "finished": 3181, "correct": 1837},
        "prompts_with_both": 714,
        "corruptions": {name: 140 + rng.randrange(8) for name in CORRUPTIONS},
        "pairs": 714,
        "seconds": 12.5,
    }
    _json(folder / "yield.json", counts)
    _json(folder / "DONE.json", counts)


def _dpo(folder: Path, rng: random.Random) -> None:
    rows = []
    for step in range(1, 25):
        part = 1 - math.exp(-step / 8)
        rows.append(
            {
                "step": step,
                "stage": "coldstart",
                "loss": 1.0 - 0.8 * part + rng.gauss(0, 0.02),
                "rewards/chosen": 0.2 * part + rng.gauss(0, 0.02),
                "rewards/rejected": -2.3 * part + rng.gauss(0, 0.05),
                "rewards/margins": 2.5 * part,
                "rewards/accuracies": min(1.0, 0.5 + 0.5 * part),
                "logps/chosen": -6 + 2 * part,
                "logps/rejected": -12 - 20 * part,
                "nll_loss": 0.4 - 0.2 * part,
                "entropy": 0.3 - 0.1 * part,
                "grad_norm": 1.0,
            }
        )
    _jsonl(folder / "metrics.jsonl", rows)
    _json(folder / "DONE.json", {"stage": "coldstart", "steps": 24, "seconds": 14.0})


def _evaluation(folder: Path, model: str, questions: dict[str, list[dict[str, Any]]], rng: random.Random) -> None:
    result: dict[str, Any] = {
        "model": model,
        "splits": {},
        "settings": {"samples": 4, "temperature": 1.0, "seed": 1234},
    }
    rows: list[dict[str, Any]] = []
    for split, asked in questions.items():
        accuracy, form = SKILL[split][model]
        marks: dict[str, list[list[bool]]] = {"any": [], "form": [], "greedy_any": [], "greedy_form": []}
        for question in asked:
            correct = [rng.random() < accuracy for _ in range(4)]
            forms = [rng.random() < form for _ in range(4)]
            greedy = (rng.random() < min(1.0, accuracy + 0.08), rng.random() < form)
            marks["any"].append(correct)
            marks["form"].append(forms)
            marks["greedy_any"].append([greedy[0]])
            marks["greedy_form"].append([greedy[1]])
            rows.append(
                {
                    "split": split,
                    **{key: question[key] for key in ("prompt_id", "prompt", "images", "answer")},
                    "tags": list(question["tags"]),
                    "greedy": _response(question, *greedy, rng),
                    "samples": [_response(question, c, f, rng) for c, f in zip(correct, forms, strict=True)],
                    "correct_any": correct,
                    "correct_strict": [c and f for c, f in zip(correct, forms, strict=True)],
                    "format": forms,
                    "greedy_correct_any": greedy[0],
                    "greedy_correct_strict": greedy[0] and greedy[1],
                    "greedy_format": greedy[1],
                }
            )
        result["splits"][split] = {
            "n": len(asked),
            "sampled": _block(marks["any"], marks["form"], 4),
            "greedy": _block(marks["greedy_any"], marks["greedy_form"], 1),
        }
    strict = {split: block["sampled"]["accuracy_strict"] for split, block in result["splits"].items()}
    factors = {split: 5 * strict["id"] * value / max(1e-9, 4 * strict["id"] + value) for split, value in strict.items()}
    result["generalization_factor"] = {
        "of": "accuracy_strict",
        "splits": {s: f for s, f in factors.items() if s != "id"},
    }
    _json(folder / f"{model}.json", result)
    _jsonl(folder / f"{model}.completions.jsonl", rows)


def _block(correct: list[list[bool]], form: list[list[bool]], samples: int) -> dict[str, Any]:
    correct_array, form_array = np.array(correct), np.array(form)
    shares = {"accuracy_strict": correct_array & form_array, "accuracy_any": correct_array, "format": form_array}
    if samples > 1:
        shares |= {"pass@1": correct_array, "pass@4": correct_array.any(axis=1, keepdims=True)}
    means = {name: marks.mean(axis=1) for name, marks in shares.items()}
    block: dict[str, Any] = {name: float(values.mean()) for name, values in means.items()}
    errors = {name: float(values.std(ddof=1) / len(values) ** 0.5) for name, values in means.items()}
    return block | {"mean_length": 20.5, "clipped": 0.0, "unscorable": 0, "standard_errors": errors}


@pytest.fixture
def fake_run(tmp_path: Path) -> Callable[..., Path]:
    """``fake_run(stages=..., models=...)`` writes a run folder and returns it."""

    def make(**options: Any) -> Path:
        return make_run(tmp_path / "run", **options)

    return make


if __name__ == "__main__":
    print(make_run(Path(sys.argv[1]), n=120))
