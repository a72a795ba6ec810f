"""Questions, their worked solutions, and responses in every style."""

from __future__ import annotations

import re

import numpy as np
import pytest

from specs_fast.lab.dataset import EVAL_SPLITS, TRAIN
from specs_fast.lab.processor import pieces
from specs_fast.lab.questions import (
    ASKED_TAGS,
    OTHER_TAGS,
    TASK_BY_NAME,
    TASKS,
    Question,
    draw_question,
)
from specs_fast.lab.responses import FOLLOWING, STYLES, Mistakes, write_response, wrong

QUESTIONS = [draw_question(np.random.default_rng(seed), tags=(ASKED_TAGS, *OTHER_TAGS)) for seed in range(400)]


def recompute(question: Question) -> str:
    """The answer, from the digits, by other means than the task's own."""
    digits = question.digits
    if question.task == "sum":
        return str(int(np.sum(digits)))
    if question.task == "position":
        return str(int(np.argmax(digits)) + 1)
    if question.task == "above":
        return str(int((np.array(digits) > question.k).sum()))
    if question.task == "even":
        return str(int((np.array(digits) % 2 == 0).sum()))
    if question.task == "range":
        return str(int(np.ptp(digits)))
    if question.task == "second":
        return str(int(np.sort(digits)[-2]))
    if question.task == "ends":
        return str(digits[0] + digits[-1])
    assert question.task == "compare"
    return "first" if digits[0] > digits[-1] else "last"


def test_every_task_is_drawn_about_equally_often() -> None:
    drawn = [question.task for question in QUESTIONS]
    assert set(drawn) == set(TASK_BY_NAME)
    assert min(map(drawn.count, TASK_BY_NAME)) > 25


@pytest.mark.parametrize("task", TASK_BY_NAME)
def test_answers_recomputed_from_the_digits_agree_with_answer_and_reasoning(task: str) -> None:
    for question in QUESTIONS:
        if question.task != task:
            continue
        assert question.answer == recompute(question)
        reading = " ".join(map(str, question.digits))
        assert question.reasoning.startswith(f"i see {reading} . ")
        assert question.reasoning.endswith(f" so {question.answer} .")


def test_worked_steps_are_arithmetically_true() -> None:
    for question in QUESTIONS:
        for left, sign, right, result in re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", question.reasoning):
            assert int(result) == (int(left) + int(right) if sign == "+" else int(left) - int(right))
        if question.task == "sum":
            totals = re.search(r"totals ([\d ]+) \.", question.reasoning)
            assert totals and totals[1].split() == [str(total) for total in np.cumsum(question.digits)]


def test_the_prompt_states_the_tags_it_asks_for() -> None:
    for question in QUESTIONS:
        for name in question.tags:
            assert f"<{name}>" in question.text and f"</{name}>" in question.text


def test_given_digits_are_kept_and_only_well_posed_tasks_are_asked() -> None:
    rng = np.random.default_rng(0)
    drawn = {draw_question(rng, digits=[5, 5, 5]).task for _ in range(200)}
    assert drawn == {"sum", "above", "even", "range", "ends"}
    assert draw_question(rng, digits=[5, 5, 5]).digits == (5, 5, 5)


def test_unseen_wordings_differ_from_training_but_use_only_its_words() -> None:
    def words(unseen: bool) -> set[str]:
        drawn = [draw_question(np.random.default_rng(seed), unseen_wording=unseen) for seed in range(2000)]
        return {word for question in drawn for word in pieces(question.text)}

    for task in TASKS:
        assert not set(task.wordings) & set(task.unseen)
    assert words(True) <= words(False)


def test_post_training_never_asks_for_the_tags_of_the_format_split() -> None:
    assert len(set(OTHER_TAGS)) == len(OTHER_TAGS) and ASKED_TAGS not in OTHER_TAGS
    assert not {name for pair in OTHER_TAGS for name in pair} & set(ASKED_TAGS)
    assert EVAL_SPLITS["format"].tags == OTHER_TAGS
    assert TRAIN.tags == EVAL_SPLITS["id"].tags == (ASKED_TAGS,)


@pytest.mark.parametrize("style", STYLES)
def test_without_mistakes_every_style_ends_with_the_answer(style: str) -> None:
    for question in QUESTIONS[:100]:
        text = write_response(question, style, np.random.default_rng(0))
        found = re.findall(r"\d+|first|last", text)
        assert found[-1] == question.answer
        first, second = question.tags
        asked = rf"<{first}> [^<]+ </{first}> <{second}> {question.answer} </{second}>"
        assert bool(re.fullmatch(asked, text)) == (style in FOLLOWING)


def test_unknown_style_is_named() -> None:
    with pytest.raises(ValueError, match="'shouting'"):
        write_response(QUESTIONS[0], "shouting", np.random.default_rng(0))


def test_a_wrong_answer_is_never_the_right_one() -> None:
    rng = np.random.default_rng(0)
    for answer in ("0", "1", "15", "first", "last"):
        assert all(wrong(answer, rng) != answer for _ in range(50))


def test_mistakes_happen_about_as_often_as_asked() -> None:
    rng = np.random.default_rng(0)
    count = {"slip": 0, "contradict": 0}
    for question in QUESTIONS:
        slipped = write_response(question, "full", rng, Mistakes(misread=0, slip=0.5, contradict=0))
        count["slip"] += f"so {question.answer} ." not in slipped
        torn = write_response(question, "full", rng, Mistakes(misread=0, slip=0, contradict=0.5))
        count["contradict"] += f"so {question.answer} ." in torn and f"> {question.answer} <" not in torn
    assert all(150 < number < 250 for number in count.values()), count
