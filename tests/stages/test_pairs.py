"""Pairs: every filter does its work and is counted, both sides are correct, an empty result says what ate it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import specs_fast.stages.pairs as stage
from specs_fast.config import ModelConfig, PairsConfig
from specs_fast.data.rows import load_pairs, load_prompts
from specs_fast.data.types import Prompt
from specs_fast.rewards.extract import extract_any
from specs_fast.rewards.format import parse_response
from specs_fast.stages.pairs import Sample, filter_chosen, filter_correct, run_pairs

GOOD = "<think> i see 3 4 . 3 + 4 = 7 . </think> <answer> 7 </answer>"
WRONG = "<think> i see 3 5 . 3 + 5 = 8 . </think> <answer> 8 </answer>"
SPLIT = "<think> i see 3 5 . 3 + 5 = 8 . </think> <answer> 7 </answer>"
LOOSE = "i see 3 4 . 3 + 4 = 7 . the answer is 7"
CONFIG = PairsConfig()


@pytest.fixture
def prompts(tmp_path: Path) -> list[Prompt]:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = [
        {"id": f"q{i}", "prompt": "<image> what is the sum ?", "images": ["a.png"], "answer": "7", "task": "sum"}
        for i in range(6)
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return load_prompts(tmp_path / "d.jsonl")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Sample]]:
    """What each model answers to every prompt; no model is loaded."""
    answers: dict[str, list[Sample]] = {}
    monkeypatch.setattr(stage, "sample_all", lambda model, prompts, *rest: [answers[str(model)] for _ in prompts])
    monkeypatch.setattr(stage, "fingerprint", lambda model: f"print-of-{model}")
    return answers


def done(*texts: str) -> list[Sample]:
    return [Sample(text, True) for text in texts]


def run(prompts: list[Prompt], out_dir: Path, config: PairsConfig = CONFIG, seed: int = 0) -> dict[str, Any]:
    out_dir.mkdir()
    return run_pairs(
        config, ModelConfig(), base_dir="base", zero_dir="zero", prompts=prompts, out_dir=out_dir, seed=seed
    )


def test_each_filter_keeps_and_counts(prompts: list[Prompt]) -> None:
    samples = [[*done(GOOD, WRONG, SPLIT, LOOSE), Sample(GOOD, False)]]
    kept, counts = filter_chosen(prompts[:1], samples, CONFIG)
    assert kept == [[GOOD]]
    assert counts == {"sampled": 5, "finished": 4, "correct": 3, "format": 2, "consistent": 1}
    kept, counts = filter_correct(prompts[:1], samples)
    assert kept == [[GOOD, SPLIT, LOOSE]] and counts == {"sampled": 5, "finished": 4, "correct": 3}


def test_pairs_are_correct_on_both_sides_and_differ_in_form(
    prompts: list[Prompt], fake: dict[str, list[Sample]], tmp_path: Path
) -> None:
    fake |= {"zero": done(GOOD, WRONG), "base": done(GOOD, LOOSE, "8")}
    counts = run(prompts, tmp_path / "pairs")
    pairs = load_pairs(tmp_path / "pairs" / "pairs.jsonl")
    assert counts["pairs"] == len(pairs) == 6 and sum(counts["corruptions"].values()) == 6
    for pair in pairs:
        assert parse_response(pair.chosen).ok and extract_any(pair.chosen) == "7"
        assert not parse_response(pair.rejected).ok and extract_any(pair.rejected) == "7"
        assert pair.prompt.columns["base_model"] == "print-of-base"
        assert pair.prompt.columns["chosen_model"] == "print-of-zero" and pair.prompt.columns["task"] == "sum"
    assert len(list((tmp_path / "pairs" / "images").iterdir())) == 1
    row = json.loads((tmp_path / "pairs" / "pairs.jsonl").read_text().splitlines()[0])
    assert row["images"] == ["images/000000.png"] and row["chosen"][0]["role"] == "assistant"
    assert json.loads((tmp_path / "pairs" / "yield.json").read_text())["zero"]["consistent"] == 6


def test_equal_seeds_give_equal_files_and_limits_hold(
    prompts: list[Prompt], fake: dict[str, list[Sample]], tmp_path: Path
) -> None:
    fake |= {"zero": done(GOOD), "base": done(GOOD, LOOSE)}
    for name in ("a", "b"):
        run(prompts, tmp_path / name, seed=4)
    assert (tmp_path / "a" / "pairs.jsonl").read_bytes() == (tmp_path / "b" / "pairs.jsonl").read_bytes()
    counts = run(prompts, tmp_path / "c", replace(CONFIG, prompts=4, max_pairs=3))
    assert counts["prompts"] == 4 and counts["pairs"] == 3


def test_rejected_from_chosen_corrupts_the_chosen_text(
    prompts: list[Prompt], fake: dict[str, list[Sample]], tmp_path: Path
) -> None:
    fake |= {"zero": done(GOOD)}
    run(prompts, tmp_path / "pairs", replace(CONFIG, rejected_from="chosen", corruptions={"plain_answer": 1.0}))
    for pair in load_pairs(tmp_path / "pairs" / "pairs.jsonl"):
        assert pair.rejected == "<think> i see 3 4 . 3 + 4 = 7 . </think> Answer : 7"


@pytest.mark.parametrize(
    ("zero", "base", "says"),
    [
        (done(LOOSE), done(LOOSE), r"correct 6 -> format 0 -> consistent 0"),
        (done(SPLIT), done(LOOSE), r"format 6 -> consistent 0"),
        (done(GOOD), done(WRONG), r"Rejected side \(base\): sampled 6 -> finished 6 -> correct 0"),
        ([Sample(GOOD, False)], done(LOOSE), r"sampled 6 -> finished 0"),
    ],
)
def test_no_pairs_left_says_which_filter_ate_them(
    prompts: list[Prompt],
    fake: dict[str, list[Sample]],
    tmp_path: Path,
    zero: list[Sample],
    base: list[Sample],
    says: str,
) -> None:
    fake |= {"zero": zero, "base": base}
    with pytest.raises(ValueError, match=f"no preference pair is left of 6 prompts.*{says}"):
        run(prompts, tmp_path / "pairs")
    assert (tmp_path / "pairs" / "yield.json").exists()


def test_a_judge_of_ones_own_is_called_and_checked(prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    module = types.ModuleType("my_judges")
    module.no = lambda reasoning, answer: False  # type: ignore[attr-defined]
    module.odd = lambda reasoning, answer: "yes"  # type: ignore[attr-defined]
    module.dies = lambda reasoning, answer: 1 / 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_judges", module)
    kept, counts = filter_chosen(prompts[:1], [done(GOOD)], replace(CONFIG, judge="my_judges:no"))
    assert kept == [[]] and counts["consistent"] == 0
    for name, says in (("odd", "TypeError: judge 'my_judges:odd' returned 'yes'"), ("dies", "ZeroDivisionError")):
        with pytest.raises(ValueError, match=rf"d\.jsonl:1: the judge failed on answer '7' \({says}"):
            filter_chosen(prompts[:1], [done(GOOD)], replace(CONFIG, judge=f"my_judges:{name}"))
