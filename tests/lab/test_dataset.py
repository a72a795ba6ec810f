"""Question files: valid rows, no shared scan, deterministic, and read by the trainer's own loader."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import specs_fast.lab as lab
from specs_fast.data.encode import Encoder
from specs_fast.data.rows import load_prompts
from specs_fast.lab.dataset import EVAL_SPLITS, TRAIN, split_size, write_split
from specs_fast.lab.digits import load_scans
from specs_fast.lab.processor import build_processor
from specs_fast.lab.questions import OTHER_TAGS, draw_question
from specs_fast.rewards.accuracy import check_gold
from specs_fast.rewards.consistency import rule_judge

SETTINGS = SimpleNamespace(questions_train=24, questions_eval=9, seed=3)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> lab.LabPaths:
    return lab.build(SETTINGS, tmp_path_factory.mktemp("run"))


def test_every_split_has_its_size_and_they_suffice(built: lab.LabPaths) -> None:
    assert list(built.eval_splits) == list(EVAL_SPLITS) and next(iter(EVAL_SPLITS)) == "id"
    assert len(read(built.train)) == 24
    for name, path in built.eval_splits.items():
        assert len(read(path)) == split_size(name, 9) == (9 if name == "id" else 3)
    assert sum(split_size(name, 400) for name in lab.OUT_OF_DISTRIBUTION) >= 400


def test_rows_load_and_encode_with_the_trainers_own_code(built: lab.LabPaths) -> None:
    encoder = Encoder(build_processor())
    for path in (built.train, *built.eval_splits.values()):
        prompts = load_prompts(path)
        assert len({prompt.id for prompt in prompts}) == len(prompts)
        for prompt in prompts:
            check_gold(prompt.columns["answer"])
            encoded = encoder.prompt(prompt)
            assert int((encoded.token_types == 1).sum()) == 12
            for name in prompt.tags:
                assert f"<{name}>" in prompt.text and f"</{name}>" in prompt.text


def test_no_scan_is_shared_between_training_and_evaluation(built: lab.LabPaths) -> None:
    used = {scan for row in read(built.train) for scan in row["scans"]}
    held_out = {scan for path in built.eval_splits.values() for row in read(path) for scan in row["scans"]}
    assert used <= set(load_scans("train").indices.tolist())
    assert held_out <= set(load_scans("test").indices.tolist())
    assert not used & held_out


def test_rows_say_which_digits_their_scans_show(built: lab.LabPaths) -> None:
    labels = {}
    for split in ("train", "test"):
        scans = load_scans(split)  # type: ignore[arg-type]
        labels.update(zip(scans.indices.tolist(), scans.labels.tolist(), strict=True))
    for path in (built.train, *built.eval_splits.values()):
        for row in read(path):
            assert [labels[scan] for scan in row["scans"]] == row["digits"]


def test_each_split_changes_what_its_name_says(built: lab.LabPaths) -> None:
    rows = {name: read(path) for name, path in built.eval_splits.items()}
    assert all(len(row["digits"]) == 5 for row in rows["len"])
    assert all(len(row["digits"]) in (3, 4) for name in rows if name != "len" for row in rows[name])
    assert all(row["tags"] == ["think", "answer"] for name in rows if name != "format" for row in rows[name])
    assert all(tuple(row["tags"]) in OTHER_TAGS for row in rows["format"])

    def graininess(name: str) -> float:
        """Median difference of neighbouring pixels: paper, mostly."""
        images = [built.eval_splits[name].parent / row["images"][0] for row in rows[name]]
        pixels = [np.asarray(Image.open(path).convert("L"), dtype=int) for path in images]
        return float(np.median([np.median(np.abs(np.diff(image, axis=1))) for image in pixels]))

    assert graininess("noise") > 3 * graininess("id")


def test_the_worked_solution_of_every_question_convinces_the_judge() -> None:
    for seed in range(300):
        question = draw_question(np.random.default_rng(seed), lengths=(3, 4, 5))
        assert rule_judge(question.reasoning, question.answer), question


def test_the_same_settings_write_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_split(tmp_path / name, "train", TRAIN, 8, seed)
    a, b, c = (files_below(tmp_path / name) for name in "abc")
    assert a == b
    assert a.keys() == c.keys() and all(a[name] != c[name] for name in a)


def test_a_longer_file_starts_with_the_shorter_one(tmp_path: Path) -> None:
    short = write_split(tmp_path / "short", "train", TRAIN, 4, 0).read_text(encoding="utf-8")
    longer = write_split(tmp_path / "long", "train", TRAIN, 8, 0).read_text(encoding="utf-8")
    assert longer.startswith(short) and longer != short


def test_a_finished_lab_is_kept_and_an_unfinished_one_is_written_again(tmp_path: Path) -> None:
    paths = lab.build(SETTINGS, tmp_path)
    first = files_below(tmp_path)
    paths.train.write_text("touched", encoding="utf-8")
    assert lab.build(SETTINGS, tmp_path) == paths
    assert paths.train.read_text(encoding="utf-8") == "touched"
    (tmp_path / "lab" / "DONE.json").unlink()
    lab.build(SETTINGS, tmp_path)
    assert files_below(tmp_path) == first


def test_a_lab_interrupted_at_its_last_write_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*paths: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            lab.build(SETTINGS, tmp_path)
    assert not (tmp_path / "lab" / lab.DONE).exists()
    assert lab.build(SETTINGS, tmp_path).train.is_file()


def test_a_lab_with_other_settings_is_refused(tmp_path: Path) -> None:
    lab.build(SETTINGS, tmp_path)
    with pytest.raises(ValueError, match="'seed': 3.*'seed': 4"):
        lab.build(SimpleNamespace(questions_train=24, questions_eval=9, seed=4), tmp_path)


@pytest.mark.parametrize("name", ["questions_train", "questions_eval"])
def test_empty_sizes_are_refused(tmp_path: Path, name: str) -> None:
    settings = SimpleNamespace(**{**vars(SETTINGS), name: 0})
    with pytest.raises(ValueError, match=f"lab.{name} is 0"):
        lab.build(settings, tmp_path)
