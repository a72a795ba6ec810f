"""Evaluation: what is counted, that every model is asked alike, and what is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from specs_fast.config import EvalConfig
from specs_fast.data.types import Completion, EncodedPrompt, Prompt
from specs_fast.evals.run import evaluate, evaluate_prompts
from specs_fast.lab.dataset import EVAL_SPLITS, write_split
from specs_fast.lab.model import new_model
from specs_fast.lab.processor import build_processor

RIGHT = "<think> so 10 . </think> <answer> 10 </answer>"
WRONG = "<think> so 11 . </think> <answer> 11 </answer>"
LOOSE = "so 10 . the answer is 10 ."
CONFIG = EvalConfig(samples=4, pass_k=(1, 2, 4), batch_prompts=2)


class FakeEncoder:
    """Completions carry an index into the texts that were said."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def prompt(self, prompt: Prompt) -> EncodedPrompt:
        return EncodedPrompt(prompt.id, torch.tensor([1]), torch.tensor([0]))

    def decode(self, token_ids: torch.Tensor) -> str:
        return self.texts[int(token_ids[0])]


class FakeEngine:
    """Says what ``speak(prompt id, sample, greedy)`` says; records how it was asked."""

    def __init__(self, encoder: FakeEncoder, speak: Callable[[str, int, bool], str]) -> None:
        self.encoder, self.speak = encoder, speak
        self.calls: list[dict[str, Any]] = []

    def generate(
        self, prompts: Sequence[EncodedPrompt], *, num_samples: int, greedy: bool = False, **settings: Any
    ) -> list[list[Completion]]:
        self.calls.append({"ids": [p.id for p in prompts], "num_samples": num_samples, "greedy": greedy, **settings})
        return [[self._say(p.id, sample, greedy) for sample in range(num_samples)] for p in prompts]

    def update_weights(self, model: Any) -> None:
        raise AssertionError("evaluation changes no weights")

    def _say(self, prompt_id: str, sample: int, greedy: bool) -> Completion:
        text = self.speak(prompt_id, sample, greedy)
        self.encoder.texts.append(text)
        tokens = torch.full((len(text.split()) + 1,), len(self.encoder.texts) - 1)
        return Completion(tokens, torch.zeros(len(tokens)), finished=text != WRONG)


def prompt(name: str, answer: Any = "10", **columns: Any) -> Prompt:
    message = {"role": "user", "content": [{"type": "text", "text": "what ?"}]}
    columns = {"answer": answer, **columns} if answer is not None else columns
    return Prompt(id=name, messages=(message,), columns=columns, source=f"eval.jsonl:{name}")


def run(
    speak: Callable[[str, int, bool], str], splits: dict[str, list[Prompt]], config: EvalConfig = CONFIG, **options: Any
) -> tuple[dict[str, Any], list[dict[str, Any]], FakeEngine]:
    encoder = FakeEncoder()
    engine = FakeEngine(encoder, speak)
    result, rows = evaluate_prompts(engine, encoder, splits, config, **options)  # type: ignore[arg-type]
    return result, rows, engine


def says(prompt_id: str, sample: int, greedy: bool) -> str:
    """a: two right, one loose, one wrong; b: always wrong but for greedy."""
    if prompt_id == "a":
        return RIGHT if greedy else [RIGHT, LOOSE, WRONG, RIGHT][sample]
    return LOOSE if greedy else WRONG


def test_what_is_counted() -> None:
    result, rows, _ = run(says, {"id": [prompt("a"), prompt("b")]})
    split = result["splits"]["id"]
    sampled, greedy = split["sampled"], split["greedy"]
    assert split["n"] == 2
    assert sampled["accuracy_strict"] == (2 / 4 + 0) / 2
    assert sampled["accuracy_any"] == (3 / 4 + 0) / 2 == sampled["pass@1"]
    assert sampled["format"] == (3 / 4 + 1) / 2
    assert sampled["pass@2"] == sampled["pass@4"] == 0.5
    assert sampled["clipped"] == (1 / 4 + 1) / 2
    assert (
        sampled["mean_length"] == (len(RIGHT.split()) * 3 / 4 + len(LOOSE.split()) / 4 + 1 + len(WRONG.split()) + 1) / 2
    )
    assert sampled["unscorable"] == 0
    assert sampled["standard_errors"]["accuracy_any"] == pytest.approx(3 / 8)
    assert greedy["accuracy_strict"] == 0.5 and greedy["accuracy_any"] == 1.0 and greedy["format"] == 0.5
    assert not [key for key in greedy if key.startswith("pass@")]
    first = rows[0]
    assert (
        first["split"] == "id" and first["prompt_id"] == "a" and first["answer"] == "10" and first["prompt"] == "what ?"
    )
    assert first["samples"] == [RIGHT, LOOSE, WRONG, RIGHT] and first["greedy"] == RIGHT
    assert first["correct_strict"] == [True, False, False, True] and first["correct_any"] == [True, True, False, True]
    assert first["format"] == [True, False, True, True]
    assert rows[1]["greedy_correct_any"] is True and rows[1]["greedy_correct_strict"] is False
    assert rows[1]["greedy_format"] is False


def test_the_asked_tags_decide_what_is_strict() -> None:
    text = "<work> so 10 . </work> <final> 10 </final>"
    result, _, _ = run(lambda *_: text, {"tags": [prompt("a", tags=["work", "final"]), prompt("b")]})
    assert result["splits"]["tags"]["sampled"]["accuracy_strict"] == 0.5
    assert result["splits"]["tags"]["sampled"]["accuracy_any"] == 1.0


def test_every_model_is_asked_alike_and_whatever_else_is_evaluated() -> None:
    prompts = [prompt(name) for name in "abc"]
    _, _, first = run(says, {"id": prompts, "len": prompts})
    _, _, second = run(lambda *_: WRONG, {"len": prompts}, replace(CONFIG, greedy=False))
    asked = [call for call in first.calls if not call["greedy"]]
    assert [call["ids"] for call in asked] == [["a", "b"], ["c"], ["a", "b"], ["c"]]
    assert second.calls == asked[2:]
    assert len({call["seed"] for call in asked}) == 4
    assert all(
        call["temperature"] == 1.0 and call["num_samples"] == 4 and call["max_new_tokens"] == 64 for call in asked
    )
    assert [call["num_samples"] for call in first.calls if call["greedy"]] == [1] * 4
    _, _, other = run(says, {"len": prompts}, replace(CONFIG, seed=7))
    assert {call["seed"] for call in other.calls}.isdisjoint(call["seed"] for call in first.calls)


def test_no_greedy_leaves_it_out() -> None:
    result, rows, engine = run(says, {"id": [prompt("a")]}, replace(CONFIG, greedy=False))
    assert "greedy" not in result["splits"]["id"] and "greedy" not in rows[0]
    assert not [call for call in engine.calls if call["greedy"]]


def test_one_prompt_has_no_standard_error() -> None:
    result, _, _ = run(says, {"id": [prompt("a")]})
    assert result["splits"]["id"]["sampled"]["standard_errors"]["accuracy_any"] is None


def test_generalization_factor_is_of_strict_accuracy_against_id() -> None:
    splits = {"id": [prompt("a")], "len": [prompt("a"), prompt("b")], "noise": [prompt("b")]}
    result, _, _ = run(says, splits)
    factor = result["generalization_factor"]
    pool = (0.5 + 0 + 0) / 3
    assert factor["splits"] == {
        "len": pytest.approx(5 * 0.5 * 0.25 / (4 * 0.5 + 0.25)),
        "noise": 0.0,
        "ood": pytest.approx(5 * 0.5 * pool / (4 * 0.5 + pool)),
    }
    assert "generalization_factor" not in run(says, {"len": [prompt("a")]})[0]
    assert "generalization_factor" not in run(says, {"id": [prompt("a")]})[0]


def test_progress_counts_prompts_sampled_and_greedy() -> None:
    seen: list[Any] = []

    class Bar:
        @contextmanager
        def track(self, description: str, total: int | None = None) -> Iterator[Any]:
            seen.append((description, total))
            yield self

        def advance(self, n: int = 1, **metrics: float) -> None:
            seen.append(n)

        def say(self, message: str) -> None: ...

    run(says, {"id": [prompt(name) for name in "abc"]}, progress=Bar(), name="zero")
    assert seen == [("evaluating zero", 6), 2, 1, 2, 1]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (prompt("7", None), "eval.jsonl:7: column 'answer' is missing"),
        (prompt("7", r"\frac{1}{"), r"eval.jsonl:7: the gold answer '\\\\frac\{1\}\{' cannot be parsed"),
        (prompt("7", ""), "eval.jsonl:7: the gold answer '' is empty"),
    ],
)
def test_a_gold_answer_that_cannot_be_scored_is_named_before_anything_is_sampled(bad: Prompt, message: str) -> None:
    encoder = FakeEncoder()
    engine = FakeEngine(encoder, says)
    with pytest.raises(ValueError, match=message):
        evaluate_prompts(engine, encoder, {"id": [prompt("a"), bad]}, CONFIG)  # type: ignore[arg-type]
    assert engine.calls == []


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(ValueError, match="split 'len' has no prompts"):
        run(says, {"id": [prompt("a")], "len": []})


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """A second thread gains nothing on so small a model, and waits in vain where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lab's architecture with random weights."""
    folder = tmp_path_factory.mktemp("model")
    processor = build_processor()
    new_model(processor.tokenizer, seed=0).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_a_model_folder_is_evaluated_and_written_the_same_every_time(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "lab").mkdir()
    splits = {name: write_split(tmp_path / "lab", f"eval_{name}", EVAL_SPLITS[name], 5, 0) for name in ("id", "format")}
    config = EvalConfig(samples=3, pass_k=(1, 3), max_new_tokens=8, limit=4)
    results = []
    for name in ("base", "again"):
        results.append(evaluate(model_dir, splits, config, tmp_path / "eval" / f"{name}.json", device="cpu"))
    assert results[0]["splits"] == results[1]["splits"] and results[0]["model"] == "base"
    assert json.loads((tmp_path / "eval" / "base.json").read_text()) == results[0]
    block = results[0]["splits"]["id"]
    assert block["n"] == 4 and block["sampled"]["mean_length"] > 0 and "pass@3" in block["sampled"]
    settings = results[0]["settings"]
    assert settings["seed"] == 1234 and settings["splits"]["id"] == str(splits["id"]) and settings["dtype"] == "float32"
    rows = [json.loads(line) for line in (tmp_path / "eval" / "base.completions.jsonl").read_text().splitlines()]
    assert [row["split"] for row in rows] == ["id"] * 4 + ["format"] * 4
    assert rows[0]["images"][0].startswith("lab/") and (tmp_path / rows[0]["images"][0]).is_file()
    assert rows[4]["tags"] != ["think", "answer"] and len(rows[0]["samples"]) == 3
    again = (tmp_path / "eval" / "again.completions.jsonl").read_text()
    assert again == (tmp_path / "eval" / "base.completions.jsonl").read_text()
    assert sorted(path.name for path in (tmp_path / "eval").iterdir()) == [
        "again.completions.jsonl", "again.json", "base.completions.jsonl", "base.json",
    ]  # fmt: skip


def test_images_outside_the_run_folder_keep_their_whole_path(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    split = write_split(tmp_path / "data", "eval_id", EVAL_SPLITS["id"], 1, 0)
    evaluate(
        model_dir, {"id": split}, EvalConfig(max_new_tokens=2), tmp_path / "run" / "eval" / "base.json", device="cpu"
    )
    row = json.loads((tmp_path / "run" / "eval" / "base.completions.jsonl").read_text())
    assert Path(row["images"][0]).is_absolute() and Path(row["images"][0]).is_file()


def test_bad_rows_and_incomplete_models_are_found_before_time_is_spent(model_dir: Path, tmp_path: Path) -> None:
    split = write_split(tmp_path, "eval_id", EVAL_SPLITS["id"], 2, 0)
    with pytest.raises(ValueError, match="no such model folder"):
        evaluate(tmp_path / "nothing", {"id": split}, CONFIG, tmp_path / "eval" / "x.json", device="cpu")
    rows = [json.loads(line) for line in split.read_text().splitlines()]
    rows[1]["answer"] = r"\frac{"
    split.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="eval_id.jsonl:2: the gold answer"):
        evaluate(tmp_path / "nothing", {"id": split}, CONFIG, tmp_path / "eval" / "x.json", device="cpu")
    assert not (tmp_path / "eval").exists()


def test_splits_other_than_id_are_pooled_question_by_question() -> None:
    splits = {"id": [prompt("a")], "len": [prompt("a"), prompt("c")], "noise": [prompt("b")]}
    result, rows, _ = run(says, splits)
    assert result["pooled"] == {"ood": ["len", "noise"]} and [row["split"] for row in rows] == [
        "id",
        "len",
        "len",
        "noise",
    ]
    assert result["splits"]["ood"]["n"] == 3
    assert result["splits"]["ood"]["sampled"]["accuracy_any"] == pytest.approx((3 / 4 + 0 + 0) / 3)
    assert result["splits"]["ood"]["greedy"]["accuracy_any"] == 1.0
    two, _, _ = run(says, {"id": [prompt("a")], "len": [prompt("b")]})
    assert "pooled" not in two and set(two["splits"]) == {"id", "len"}
