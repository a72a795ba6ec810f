"""Several rewards as one, and errors that say which function, which row, which value, and what to do."""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from specs_fast.config import RewardConfig
from specs_fast.data.types import Prompt
from specs_fast.rewards.accuracy import accuracy_reward
from specs_fast.rewards.compose import RewardError, RewardSet
from specs_fast.rewards.format import format_reward

RIGHT = "<think> so 10 . </think> <answer> 10 </answer>"
WRONG = "<think> so 10 . </think> <answer> 11 </answer>"
LOOSE = "10"


def prompt(index: int) -> Prompt:
    message = {"role": "user", "content": [{"type": "text", "text": f"question {index}"}]}
    return Prompt(id=f"q{index}", messages=(message,), columns={"answer": "10"}, source=f"data.jsonl:{index + 1}")


PROMPTS = [prompt(0), prompt(1), prompt(2)]
COLUMNS: dict[str, list[Any]] = {"answer": ["10"] * 3}


def score(function: Callable[..., Any], **columns: list[Any]) -> Any:
    return RewardSet({"mine": function}).score(PROMPTS, [RIGHT, WRONG, LOOSE], columns or COLUMNS)


def test_format_and_accuracy_add_up_as_in_the_paper() -> None:
    with RewardSet.from_config([RewardConfig("format"), RewardConfig("accuracy")]) as rewards:
        result = rewards.score(PROMPTS, [RIGHT, WRONG, LOOSE], COLUMNS)
    assert result.total.tolist() == [1.5, 0.5, 0.0] and result.total.dtype is torch.float32
    assert result.per_function["format"].tolist() == [0.5, 0.5, 0.0]
    assert result.per_function["accuracy"].tolist() == [1.0, 0.0, 0.0]
    assert result.means()["rewards/format/mean"] == pytest.approx(1 / 3)
    assert result.means()["rewards/accuracy/std"] == pytest.approx(3**-0.5)
    assert rewards.timeouts == 0 and result.metrics["verify/timeouts"] == 0.0


def test_weights_scale_and_functions_that_do_not_apply_are_left_out() -> None:
    functions = {"a": lambda **_: [1.0, None, 3.0], "b": lambda **_: [None, 2.0, 4.0]}
    result = RewardSet(functions, {"a": 2.0, "b": -1.0}).score(PROMPTS, ["x"] * 3, {})
    assert result.total.tolist() == [2.0, -2.0, 2.0]
    assert math.isnan(result.per_function["a"][1]) and result.means()["rewards/a/mean"] == 2.0


def test_functions_get_messages_completions_and_columns_by_name() -> None:
    seen: dict[str, Any] = {}

    def reward(prompts: Any, completions: Any, answer: Any, level: Any, **others: Any) -> list[float]:
        seen.update(prompts=prompts, completions=completions, answer=answer, level=level, others=set(others))
        return [0.0] * 3

    score(reward, answer=["10"] * 3, level=[1, 2, None])
    assert seen["prompts"][1][0]["content"][0]["text"] == "question 1"
    assert seen["completions"] == [RIGHT, WRONG, LOOSE] and seen["level"] == [1, 2, None]
    assert seen["others"] == {"log_metric"}


def test_prompts_in_trl_form_are_taken_too() -> None:
    rewards = RewardSet({"mine": lambda prompts, **_: [float(len(text)) for text in prompts]})
    assert rewards.score(["ab", "c"], ["x", "y"], {}).total.tolist() == [2.0, 1.0]


def test_async_functions_run_together() -> None:
    started: list[str] = []

    def waiting(name: str) -> Callable[..., Any]:
        async def reward(completions: Any, **_: Any) -> list[float]:
            started.append(name)
            while len(started) < 2:  # ends only if the other one runs meanwhile
                await asyncio.sleep(0)
            return [1.0] * len(completions)

        return reward

    rewards = RewardSet({"a": waiting("a"), "b": waiting("b"), "c": lambda **_: [1.0, 2.0, 3.0]})
    assert rewards.score(PROMPTS, ["x"] * 3, {}).total.tolist() == [3.0, 4.0, 5.0]


def test_async_functions_run_inside_a_running_loop() -> None:
    async def reward(completions: Any, **_: Any) -> list[float]:
        await asyncio.sleep(0)
        return [1.0] * len(completions)

    async def notebook() -> list[float]:
        totals: list[float] = score(reward).total.tolist()
        return totals

    assert asyncio.run(notebook()) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "returned", [(1, 0, 2), np.array([1, 0, 2]), torch.tensor([1, 0, 2]), [True, np.float32(0), torch.tensor(2)]]
)
def test_numbers_of_every_kind_are_taken(returned: Any) -> None:
    assert score(lambda **_: returned).total.tolist() == [1.0, 0.0, 2.0]


def test_logged_metrics_are_averaged() -> None:
    def reward(completions: Any, log_metric: Any, **_: Any) -> list[float]:
        log_metric("mine/length", 1)
        log_metric("mine/length", 3)
        return [0.0] * 3

    assert score(reward).metrics == {"mine/length": 2.0}


def raising(**_: Any) -> list[float]:
    raise KeyError("gone")


async def raising_later(**_: Any) -> list[float]:
    raise KeyError("gone")


@pytest.mark.parametrize(
    ("function", "parts"),
    [
        (raising, ["'mine' raised KeyError: 'gone'", "data.jsonl:1 to data.jsonl:3", "Fix the function"]),
        (raising_later, ["'mine' raised KeyError: 'gone'", "data.jsonl:1 to data.jsonl:3"]),
        (lambda prompts, completions, level, **_: [], ["missing 1 required", "such a column"]),
        (lambda prompts, completions: [], ["unexpected keyword", "**columns"]),
        (lambda **_: [1.0, 2.0], ["'mine' returned 2 values for 3 completions", "in order"]),
        (lambda **_: [1.0, float("nan"), 0.0], ["data.jsonl:2", "'mine' returned nan", "Return None"]),
        (lambda **_: [1.0, 2.0, float("inf")], ["data.jsonl:3", "'mine' returned inf"]),
        (lambda **_: [1.0, "2", 0.0], ["data.jsonl:2", "'mine' returned '2'", "must be a number"]),
        (lambda **_: [[1.0], 2.0, 0.0], ["data.jsonl:1", "returned [1.0]"]),
        (lambda **_: 1.0, ["'mine' returned 1.0", "must return a list"]),
        (lambda **_: "abc", ["'mine' returned 'abc'", "must return a list"]),
        (lambda **_: None, ["'mine' returned None", "must return a list"]),
        (lambda **_: [1.0, None, 0.0], ["data.jsonl:2", "every reward function (mine) returned None", "gold answer"]),
    ],
)
def test_a_reward_that_fails_is_named_with_row_value_and_way_out(function: Any, parts: list[str]) -> None:
    with pytest.raises(RewardError) as caught:
        score(function)
    assert isinstance(caught.value, ValueError)
    for part in parts:
        assert part in str(caught.value)


def test_one_row_is_named_alone_when_all_completions_are_its_own() -> None:
    with pytest.raises(RewardError, match=r"\(data.jsonl:1\)"):
        RewardSet({"mine": raising}).score([PROMPTS[0]] * 2, ["x", "y"], {})


def test_columns_and_prompts_of_another_length_are_refused() -> None:
    rewards = RewardSet({"mine": lambda **_: [0.0]})
    with pytest.raises(ValueError, match="column 'answer' has 2 entries for 1 completions"):
        rewards.score(PROMPTS[:1], ["x"], {"answer": ["1", "2"]})
    with pytest.raises(ValueError, match="prompts has 3 entries for 1 completions"):
        rewards.score(PROMPTS, ["x"], {})


def test_a_column_with_a_reserved_name_is_refused() -> None:
    with pytest.raises(ValueError, match="data column is called 'completions'"):
        score(lambda **_: [0.0] * 3, completions=["x"] * 3)


def test_rewards_by_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "def short(prompts, completions, **columns): return [-float(len(text)) for text in completions]\nlimit = 3\n"
    )
    (tmp_path / "broken_rewards.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    rewards = RewardSet.from_config([RewardConfig("my_rewards:short", weight=0.5)])
    assert rewards.score(["p"], ["abcd"], {}).per_function["my_rewards:short"].tolist() == [-4.0]
    with pytest.raises(ValueError, match="reward 'my_rewards:shrot': my_rewards has no function 'shrot'; it has short"):
        RewardSet.from_config([RewardConfig("my_rewards:shrot")])
    with pytest.raises(ValueError, match="no function 'limit'"):
        RewardSet.from_config([RewardConfig("my_rewards:limit")])
    with pytest.raises(ValueError, match="module 'no_such_rewards' was not found"):
        RewardSet.from_config([RewardConfig("no_such_rewards:x")])
    with pytest.raises(ValueError, match="importing broken_rewards raised ZeroDivisionError"):
        RewardSet.from_config([RewardConfig("broken_rewards:x")])
    sys.modules.pop("my_rewards")


def test_no_rewards_or_the_same_one_twice_or_no_finite_weight_are_refused() -> None:
    with pytest.raises(ValueError, match="no reward functions"):
        RewardSet.from_config([])
    with pytest.raises(ValueError, match="'format' is listed twice"):
        RewardSet.from_config([RewardConfig("format"), RewardConfig("format", 2.0)])
    with pytest.raises(ValueError, match="weight of reward 'format' is nan"):
        RewardSet.from_config([RewardConfig("format", math.nan)])


def test_the_builtin_rewards_take_everything_that_trl_passes() -> None:
    logged: dict[str, float] = {}
    passed: dict[str, Any] = {
        "prompts": [[{"role": "user", "content": "what ?"}]],
        "completions": [[{"role": "assistant", "content": RIGHT}]],
        "completion_ids": [[1, 2]],
        "answer": ["10"],
        "images": [[]],
        "trainer_state": None,
        "log_extra": lambda column, values: None,
        "log_metric": logged.__setitem__,
    }
    assert format_reward(**passed) == [0.5] and accuracy_reward(**passed) == [1.0]
    assert logged == {"verify/timeouts": 0.0, "verify/failures": 0.0}
