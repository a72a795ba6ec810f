"""Several reward functions as one: weights, None for "not applicable", errors that name function, row and value.

Letters: N completions, F reward functions.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import numbers
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from specs_fast.config import RewardConfig
from specs_fast.data.types import Prompt
from specs_fast.rewards.accuracy import accuracy_reward
from specs_fast.rewards.format import format_reward
from specs_fast.rewards.imports import import_function
from specs_fast.rewards.verify import shared_verifier

RewardFunction = Callable[..., Any]
"""TRL's: ``reward(prompts, completions, **columns) -> list[float | None]``, sync or async."""

BUILTIN: dict[str, RewardFunction] = {"format": format_reward, "accuracy": accuracy_reward}
RESERVED = frozenset({"prompts", "completions", "log_metric"})


class RewardError(ValueError):
    """A reward function failed; the message names function, row, value and what to do."""


@dataclass(frozen=True)
class RewardResult:
    """Scores of N completions.

    total: float32 ``[N]``, sum over functions of weight * reward, functions that do not apply left out.
    per_function: name -> float32 ``[N]`` before weighting, NaN where the function returned None.
    metrics: what functions logged through ``log_metric``, averaged.
    """

    total: Tensor
    per_function: dict[str, Tensor]
    metrics: dict[str, float] = field(default_factory=dict)

    def means(self) -> dict[str, float]:
        """``rewards/{name}/mean`` and ``/std`` (unbiased) over the completions a function applies to, as TRL logs them."""
        found = {}
        for name, values in self.per_function.items():
            known = values[~values.isnan()]
            found[f"rewards/{name}/mean"] = float(known.mean()) if len(known) else math.nan
            found[f"rewards/{name}/std"] = float(known.std()) if len(known) > 1 else 0.0
        return found


class RewardSet:
    """Reward functions with weights, called together. A context manager: leaving it ends the math-verify worker.

    functions: name -> function. weights: name -> factor on what it returns.
    timeouts: comparisons given up so far, for time or a broken parser (each scored 0, alone).
    """

    def __init__(self, functions: Mapping[str, RewardFunction], weights: Mapping[str, float] | None = None) -> None:
        if not functions:
            raise ValueError("no reward functions; name at least one, such as 'accuracy'")
        self.functions = dict(functions)
        self.weights = {name: 1.0 if weights is None else float(weights[name]) for name in functions}
        for name, weight in self.weights.items():
            if not math.isfinite(weight):
                raise ValueError(f"the weight of reward {name!r} is {weight}; it must be a finite number")
        self.timeouts = 0

    @classmethod
    def from_config(cls, configs: Sequence[RewardConfig]) -> RewardSet:
        """Functions by built-in name (``format``, ``accuracy``) or import path. ValueError for one that is not there, or
        named twice."""
        functions: dict[str, RewardFunction] = {}
        for config in configs:
            if config.name in functions:
                raise ValueError(f"reward {config.name!r} is listed twice; give it once, with the sum of the weights")
            functions[config.name] = BUILTIN.get(config.name) or import_function(config.name, "reward")
        return cls(functions, {config.name: config.weight for config in configs})

    def __enter__(self) -> RewardSet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the math-verify worker, if one runs; a later call starts another."""
        shared_verifier().close()

    def score(
        self, prompts: Sequence[Prompt | Any], completions: Sequence[Any], columns: Mapping[str, Sequence[Any]]
    ) -> RewardResult:
        """Score N completions.

        prompts: N ``Prompt``s (functions receive their messages, errors name their row), or prompts in TRL's form.
        completions: N strings or conversations. columns: name -> N values, passed by name; ``log_metric(name, value)``
        is passed besides, as TRL does. Async functions run together, after the others.

        RewardError: a function raises, returns something other than N numbers or None, NaN or infinity among them; all
        functions return None for a completion. ValueError: lengths that differ, a column with a reserved name.
        """
        self._check_inputs(prompts, completions, columns)
        rows = [prompt.source or prompt.id if isinstance(prompt, Prompt) else "" for prompt in prompts]
        rows = [row or f"completion {index}" for index, row in enumerate(rows)]
        logged: dict[str, list[float]] = {}
        arguments: dict[str, Any] = {
            **{name: list(values) for name, values in columns.items()},
            "prompts": [list(prompt.messages) if isinstance(prompt, Prompt) else prompt for prompt in prompts],
            "completions": list(completions),
            "log_metric": lambda name, value: logged.setdefault(name, []).append(float(value)),
        }
        returned = self._call(arguments, rows)
        values = {name: _checked(name, returned[name], rows) for name in self.functions}
        per_function_FN = torch.tensor([values[name] for name in self.functions], dtype=torch.float64)
        _check_scored(per_function_FN, list(self.functions), rows, completions)
        weights_F = torch.tensor([self.weights[name] for name in self.functions], dtype=torch.float64)
        total = (per_function_FN.nan_to_num(0.0) * weights_F[:, None]).sum(0)
        self.timeouts += int(sum(logged.get("verify/timeouts", ())) + sum(logged.get("verify/failures", ())))
        return RewardResult(
            total.float(),
            {name: per_function_FN[index].float() for index, name in enumerate(self.functions)},
            {name: sum(entries) / len(entries) for name, entries in logged.items()},
        )

    def _check_inputs(
        self, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Sequence[Any]]
    ) -> None:
        lengths = {"prompts": len(prompts), **{f"column {name!r}": len(values) for name, values in columns.items()}}
        for name, length in lengths.items():
            if length != len(completions):
                raise ValueError(f"{name} has {length} entries for {len(completions)} completions")
        for name in sorted(RESERVED):
            if name in columns:
                raise ValueError(f"a data column is called {name!r}, which reward functions receive anyway; rename it")

    def _call(self, arguments: dict[str, Any], rows: list[str]) -> dict[str, Any]:
        """What every function returned, the awaitable ones awaited together."""
        returned: dict[str, Any] = {}
        waiting: dict[str, Any] = {}
        for name, function in self.functions.items():
            try:
                value = function(**arguments)
            except Exception as error:
                _close(waiting)
                raise _raised(name, error, rows) from error
            (waiting if inspect.isawaitable(value) else returned)[name] = value
        if waiting:
            results = _run(_gather(list(waiting.values())))
            for name, value in zip(waiting, results, strict=True):
                if isinstance(value, Exception):
                    raise _raised(name, value, rows) from value
                returned[name] = value
        return returned


async def _gather(awaitables: list[Any]) -> list[Any]:
    return await asyncio.gather(*awaitables, return_exceptions=True)


def _run(coroutine: Coroutine[Any, Any, list[Any]]) -> list[Any]:
    """The coroutine's result, in a thread of its own where an event loop already runs here (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    results: list[list[Any]] = []
    thread = threading.Thread(target=lambda: results.append(asyncio.run(coroutine)))
    thread.start()
    thread.join()
    return results[0]


def _close(waiting: Mapping[str, Any]) -> None:
    for coroutine in waiting.values():
        if inspect.iscoroutine(coroutine):
            coroutine.close()


def _raised(name: str, error: Exception, rows: list[str]) -> RewardError:
    where = rows[0] if len(set(rows)) == 1 else f"one of {len(rows)} completions, {rows[0]} to {rows[-1]}"
    hint = ""
    if isinstance(error, TypeError) and "missing" in str(error):
        hint = " Its parameters are prompts, completions and columns of the data; does the data have such a column?"
    elif isinstance(error, TypeError) and "unexpected keyword argument" in str(error):
        hint = " It receives every column of the data by name; end its parameters with **columns."
    return RewardError(
        f"reward {name!r} raised {type(error).__name__}: {error} ({where}).{hint} "
        "Fix the function, or let it return None for a completion it cannot score"
    )


def _checked(name: str, returned: Any, rows: list[str]) -> list[float]:
    """The returned values as floats, NaN for None."""
    if isinstance(returned, Tensor) or hasattr(returned, "tolist"):
        returned = returned.tolist()
    if not isinstance(returned, Sequence) or isinstance(returned, str):
        raise RewardError(
            f"reward {name!r} returned {_short(returned)}; it must return a list with one number or None per completion"
        )
    if len(returned) != len(rows):
        raise RewardError(
            f"reward {name!r} returned {len(returned)} values for {len(rows)} completions ({rows[0]} to {rows[-1]}); "
            "it must return one number or None per completion, in order"
        )
    return [_value(name, value, row) for value, row in zip(returned, rows, strict=True)]


def _value(name: str, value: Any, row: str) -> float:
    if value is None:
        return math.nan
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if not isinstance(value, numbers.Real):
        raise RewardError(
            f"{row}: reward {name!r} returned {_short(value)}; it must be a number, or None if not applicable"
        )
    if not math.isfinite(value):
        raise RewardError(
            f"{row}: reward {name!r} returned {float(value)}; it must be finite. Return None if it is not applicable"
        )
    return float(value)


def _check_scored(per_function_FN: Tensor, names: list[str], rows: list[str], completions: Sequence[Any]) -> None:
    unscored = per_function_FN.isnan().all(0).nonzero().flatten().tolist()
    if unscored:
        index = unscored[0]
        raise RewardError(
            f"{rows[index]}: every reward function ({', '.join(names)}) returned None for the completion "
            f"{_short(completions[index])}; check the row's gold answer, or add a function that scores it"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
