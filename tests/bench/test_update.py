"""The whole-update bench: all arms take the same update, and its mixes, goals and options name what exists."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import run as runner
from bench import update
from bench.arms import measure
from bench.section import Case
from bench.update_mixes import MIXES, Mix, make_trees
from specs_kernels.dispatch import choose

CPU = torch.device("cpu")
TINY = update.cases(CPU, tiny=True)
BY_ATTENTION = update.cases(CPU, tiny=True, by_attention=("chunked", "reference"))


@pytest.mark.parametrize("case", [*TINY, BY_ATTENTION[0]], ids=lambda case: case.name)
def test_all_arms_take_the_same_update(case: Case) -> None:
    section = measure(case, CPU, rounds=1, seconds=None, tiny=True)
    assert not [row for row in section["rows"] if "not_run" in row]
    names = [row["arm"] for row in section["rows"]]
    if case.name.endswith(update.BY_ATTENTION):
        assert names == ["shared [chunked]", "shared [native]"] or names == ["shared [chunked]", "shared [reference]"]
    else:
        assert {"padded", "padded_once", "packed", "shared"} <= set(names)
        assert ("shared_torch" in names) == ("image" in case.name)
    for row in section["rows"]:
        assert row["error"]["loss"] < 1e-5 and row["error"]["gradient"] < 1e-5, row
        assert row["milliseconds"]["median"] > 0


def test_the_gradients_that_are_compared_are_not_all_zero_and_an_arm_that_differs_is_seen() -> None:
    mix = next(mix for mix in update.TINY if mix.loss == "dpo")
    problem = update.Problem(mix, CPU)
    made = {name: lambda s=scorer: update.Update(problem, s, fused=False) for name, scorer in update.SCORERS.items()}
    course = update.Course(made["padded"], 2)
    losses, gradients = course.expected
    assert losses.shape == (2,) and losses[0] != losses[1]
    assert sum(float(gradient.norm()) for gradient in gradients.values()) > 0
    same = course.of(made["shared"])({})
    problem.other_logp = problem.other_logp + 0.1 * torch.arange(len(problem.other_logp))
    other = course.of(made["shared"])({})
    exact = course.exact()["gradient"]
    assert (same["gradient"] - exact).norm() < 1e-4 * exact.norm() < (other["gradient"] - exact).norm()


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: mix.name)
def test_trees_have_the_lengths_and_images_of_their_mix(mix: Mix) -> None:
    trees = make_trees(mix)
    assert len(trees) == mix.prompts
    for tree in trees:
        assert mix.prompt_tokens[0] <= len(tree.prompt) <= mix.prompt_tokens[1]
        assert all(mix.response_tokens[0] <= len(response) <= mix.response_tokens[1] for response in tree.responses)
        assert len(tree.responses) == mix.responses
        assert int(tree.prompt.token_types.sum()) == mix.image_tokens


def test_tokens_through_the_text_layers() -> None:
    trees = make_trees(next(mix for mix in MIXES if mix.name.startswith("8x(86+8x40)")))
    counts = {name: update.text_tokens(name, trees) for name in update.SCORERS}
    assert counts == {"padded": 8064, "padded_once": 8000, "packed": 8000, "shared_torch": 3184, "shared": 3184}


def test_goals_name_sections_and_arms_that_exist() -> None:
    names = {case.name: case for case in update.cases(CPU)}
    for goal in update.goals(CPU):
        if not goal.section.endswith(update.BY_ATTENTION) or choose("packed_attention").backend == "native":
            assert goal.section in names
    assert len(update.goals(CPU)) == 7


def test_attention_backends_are_compared_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "update.json"
    short = ["--tiny", "--repeats", "1", "--out", str(out), "--mix", "many short"]
    assert update.main([*short, "--attention", "chunked", "reference"]) == 0
    result = json.loads(out.read_text())
    (section,) = result["sections"]
    assert section["name"] == "many short sequences, by attention backend"
    assert [row["arm"] for row in section["rows"]] == ["shared [chunked]", "shared [reference]"]
    assert {"commit", "hardware", "versions"} <= section["measured"].keys()
    assert update.main([*short, "--attention", "chunked"]) == 2
    assert "--attention chunked: name at least two" in capsys.readouterr().err
    update.main([*short, "--attention", "chunked", "nonsense"])
    absent = json.loads(out.read_text())["sections"][0]["rows"][1]
    assert "no backend 'nonsense'" in absent["not_run"]


def test_the_named_backend_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    real = update.packed_attention

    def spy(*tensors: torch.Tensor, backend: str, **options: object) -> torch.Tensor:
        seen.append(backend)
        return real(*tensors, backend=backend, **options)  # type: ignore[arg-type, return-value, call-overload]

    monkeypatch.setattr(update, "packed_attention", spy)
    problem = update.Problem(update.TINY[-1], CPU)
    update.Update(problem, update.SCORERS["shared"], fused=True, backend="chunked")()
    assert seen == ["chunked"] * 4  # one per layer


def test_the_runner_knows_the_bench() -> None:
    assert "update" in runner.OPS and runner.load("update") is update
