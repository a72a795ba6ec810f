"""Questions about the digits of an image that need reading and then one step of reasoning; every answer can be checked.

A question knows its own worked solution: the reasoning first reads ("i see 3 7 1 4 .") and then computes, and ends with
its conclusion ("so 15 .").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

Tags = tuple[str, str]

ASKED_TAGS: Tags = ("think", "answer")
"""The tags that every question of post-training asks for."""
OTHER_TAGS: tuple[Tags, ...] = (
    ("reason", "result"),
    ("reason", "final"),
    ("work", "final"),
    ("work", "reply"),
    ("plan", "reply"),
    ("plan", "result"),
)
"""Tag pairs that the base saw requested during pre-training; post-training never asks for them."""
INSTRUCTIONS = (
    "Reason in <{0}> </{0}>, answer in <{1}> </{1}>.",
    "Use <{0}> </{0}> and <{1}> </{1}>.",
    "Write <{0}> reasoning </{0}> <{1}> answer </{1}>.",
)
UNSEEN_INSTRUCTIONS = (
    "Use <{0}> reasoning </{0}> and <{1}> answer </{1}>.",
    "Write the reasoning in <{0}> </{0}>, the answer in <{1}> </{1}>.",
)

RESULT = "{r}"
"""Stands for the result inside a worked solution, so that a slip can be written consistently."""


@dataclass(frozen=True)
class Task:
    """One kind of question.

    wordings: used in training; unseen: only in the ``phrase`` split, made of words that training uses elsewhere. Both may
    contain ``{k}``. work: (digits, k) -> (steps with RESULT where the result appears, result). accepts: which digits make the
    question well posed.
    """

    name: str
    wordings: tuple[str, ...]
    unseen: tuple[str, ...]
    work: Callable[[Sequence[int], int], tuple[str, str]]
    accepts: Callable[[Sequence[int]], bool] = lambda digits: True


def _words(numbers: Sequence[int]) -> str:
    return " ".join(str(number) for number in numbers)


def _sum(digits: Sequence[int], k: int) -> tuple[str, str]:
    totals = [sum(digits[: i + 1]) for i in range(len(digits))]
    return f"totals {_words(totals[:-1])} {RESULT} .", str(totals[-1])


def _position(digits: Sequence[int], k: int) -> tuple[str, str]:
    return f"the largest is {max(digits)} at position {RESULT} .", str(list(digits).index(max(digits)) + 1)


def _above(digits: Sequence[int], k: int) -> tuple[str, str]:
    found = [digit for digit in digits if digit > k]
    return f"larger than {k} : {_words(found) or 'none'} .", str(len(found))


def _even(digits: Sequence[int], k: int) -> tuple[str, str]:
    found = [digit for digit in digits if digit % 2 == 0]
    return f"even : {_words(found) or 'none'} .", str(len(found))


def _range(digits: Sequence[int], k: int) -> tuple[str, str]:
    return f"{max(digits)} - {min(digits)} = {RESULT} .", str(max(digits) - min(digits))


def _second(digits: Sequence[int], k: int) -> tuple[str, str]:
    ordered = sorted(digits, reverse=True)
    return f"sorted {_words(ordered)} .", str(ordered[1])


def _ends(digits: Sequence[int], k: int) -> tuple[str, str]:
    return f"{digits[0]} + {digits[-1]} = {RESULT} .", str(digits[0] + digits[-1])


def _compare(digits: Sequence[int], k: int) -> tuple[str, str]:
    return f"first {digits[0]} last {digits[-1]} .", "first" if digits[0] > digits[-1] else "last"


TASKS: tuple[Task, ...] = (
    Task(
        "sum",
        ("What is the sum of the digits?", "Add all the digits.", "What do all the digits add up to?"),
        ("What is the sum of all the digits?", "Add up all the digits."),
        _sum,
    ),
    Task(
        "position",
        (
            "At which position is the largest digit?",
            "Where is the largest digit?",
            "Which position has the largest digit?",
        ),
        ("What is the position of the largest digit?", "Which is the position of the largest digit?"),
        _position,
        lambda digits: list(digits).count(max(digits)) == 1,
    ),
    Task(
        "above",
        (
            "How many digits are larger than {k}?",
            "Count the digits larger than {k}.",
            "How many digits are above {k}?",
        ),
        ("Count the digits above {k}.", "How many of the digits are larger than {k}?"),
        _above,
    ),
    Task(
        "even",
        ("How many digits are even?", "Count the even digits.", "How many even digits are in the image?"),
        ("How many of the digits are even?", "Count the digits in the image that are even."),
        _even,
    ),
    Task(
        "range",
        (
            "What is the largest digit minus the smallest digit?",
            "How far apart are the largest and the smallest digit?",
            "Subtract the smallest digit from the largest digit.",
        ),
        ("What is the largest minus the smallest digit?", "How far is the smallest digit from the largest digit?"),
        _range,
    ),
    Task(
        "second",
        (
            "Which digit is the second largest?",
            "What is the second largest digit?",
            "Sort the digits that are in the image. Which is the second largest?",
        ),
        ("Sort the digits. What is the second largest digit?", "Which of the digits is the second largest?"),
        _second,
        lambda digits: len(set(digits)) == len(digits),
    ),
    Task(
        "ends",
        (
            "What is the first digit plus the last digit?",
            "Add the first and the last digit.",
            "What do the first and the last digit add up to?",
        ),
        ("What is the sum of the first and the last digit?", "Add the last digit to the first digit."),
        _ends,
    ),
    Task(
        "compare",
        (
            "Which digit is larger, the first or the last?",
            "Is the first or the last digit larger?",
            "Compare the first digit and the last digit. Which is larger?",
        ),
        ("Which of the first and the last digit is larger?", "Compare the last and the first digit. Which is larger?"),
        _compare,
        lambda digits: digits[0] != digits[-1],
    ),
)
TASK_BY_NAME = {task.name: task for task in TASKS}


@dataclass(frozen=True)
class Question:
    """One question about the digits of one image.

    digits: left to right. k: the threshold of ``above`` (0 elsewhere). text: what the prompt says, required tags included.
    """

    task: str
    digits: tuple[int, ...]
    k: int
    tags: Tags
    text: str

    def solve(self) -> tuple[str, str]:
        """(steps, result): the steps after the reading, :data:`RESULT` standing for the result in them."""
        return TASK_BY_NAME[self.task].work(self.digits, self.k)

    @property
    def answer(self) -> str:
        return self.solve()[1]

    @property
    def reasoning(self) -> str:
        steps, result = self.solve()
        return write_reasoning(self.digits, steps, result)

    def seen_as(self, digits: Sequence[int]) -> Question:
        """The same question to a reader who takes the digits for these."""
        return replace(self, digits=tuple(digits))


def write_reasoning(digits: Sequence[int], steps: str, result: str) -> str:
    """``i see 3 7 1 4 . <steps> so <result> .``"""
    return f"i see {_words(digits)} . {steps.replace(RESULT, result)} so {result} ."


def draw_question(
    rng: np.random.Generator,
    *,
    digits: Sequence[int] | None = None,
    lengths: Sequence[int] = (3, 4),
    tags: Sequence[Tags] = (ASKED_TAGS,),
    unseen_wording: bool = False,
) -> Question:
    """A random question: its task, digits (unless given), wording and tags.

    The task is drawn uniformly; digits are drawn until the task is well posed for them. For given digits the task is drawn
    among those that are.
    """
    if digits is None:
        task = TASKS[int(rng.integers(len(TASKS)))]
        count = int(rng.choice(list(lengths)))
        digits = rng.integers(0, 10, count).tolist()
        while not task.accepts(digits):
            digits = rng.integers(0, 10, count).tolist()
    else:
        posed = [task for task in TASKS if task.accepts(digits)]
        task = posed[int(rng.integers(len(posed)))]
    k = int(rng.integers(2, 8)) if task.name == "above" else 0
    pair = tags[int(rng.integers(len(tags)))]
    wordings = task.unseen if unseen_wording else task.wordings
    instructions = UNSEEN_INSTRUCTIONS if unseen_wording else INSTRUCTIONS
    wording = wordings[int(rng.integers(len(wordings)))].format(k=k)
    instruction = instructions[int(rng.integers(len(instructions)))].format(*pair)
    return Question(task.name, tuple(digits), k, pair, f"{wording} {instruction}")
