"""Question files and images: ordinary JSONL in TRL's conversational format, which nothing else need know came from the lab."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from specs_fast.lab.digits import Split, load_scans
from specs_fast.lab.questions import ASKED_TAGS, OTHER_TAGS, Question, Tags, draw_question
from specs_fast.lab.scenes import NOISY, PLAIN, SCATTERED, Look, Scene, compose


@dataclass(frozen=True)
class Variety:
    """What the questions of a split look like; the defaults are the training distribution."""

    scans: Split = "test"
    lengths: tuple[int, ...] = (3, 4)
    tags: tuple[Tags, ...] = (ASKED_TAGS,)
    unseen_wording: bool = False
    look: Look = PLAIN


TRAIN = Variety(scans="train")
EVAL_SPLITS: dict[str, Variety] = {
    "id": Variety(),
    "len": Variety(lengths=(5,)),
    "phrase": Variety(unseen_wording=True),
    "format": Variety(tags=OTHER_TAGS),
    "layout": Variety(look=SCATTERED),
    "noise": Variety(look=NOISY),
}
"""``id`` is in-distribution but for its scans, which training never sees. Each other split changes one thing: five digits
(``len``), wording (``phrase``), the required tags (``format``: pairs that only the base's pre-training asked for), size,
place and angle of the digits (``layout``), noise, contrast and inversion (``noise``)."""
OUT_OF_DISTRIBUTION = tuple(name for name in EVAL_SPLITS if name != "id")


def split_size(name: str, questions_eval: int) -> int:
    """``questions_eval`` for ``id``; a third of it for each other split, so that together they are twice as many."""
    return questions_eval if name == "id" else max(1, -(-questions_eval // 3))


def draw_example(variety: Variety, rng: np.random.Generator) -> tuple[Question, Scene, list[int]]:
    """A question, its image, and which scans (rows of ``load_digits``) the image shows."""
    scans = load_scans(variety.scans)
    question = draw_question(rng, lengths=variety.lengths, tags=variety.tags, unseen_wording=variety.unseen_wording)
    chosen = scans.draw(list(question.digits), rng)
    return question, compose(scans, chosen, variety.look, rng), scans.indices[chosen].tolist()


def row(name: str, number: int, question: Question, image: str, scans: list[int]) -> dict[str, Any]:
    """One line of a question file."""
    content = [{"type": "image"}, {"type": "text", "text": question.text}]
    return {
        "id": f"{name}-{number:05d}",
        "prompt": [{"role": "user", "content": content}],
        "images": [image],
        "answer": question.answer,
        "tags": list(question.tags),
        "task": question.task,
        "digits": list(question.digits),
        "scans": scans,
    }


def write_split(folder: Path, name: str, variety: Variety, count: int, seed: int) -> Path:
    """Writes ``<name>.jsonl`` and ``images/<name>/*.png`` (grey) below ``folder``; a pure function of its arguments.

    Question i depends on (seed, name, i) only, so a longer file starts with the shorter one.
    """
    path = folder / f"{name}.jsonl"
    (folder / "images" / name).mkdir(parents=True, exist_ok=True)
    key = int.from_bytes(name.encode("utf-8"), "little")
    with path.open("w", encoding="utf-8", newline="\n") as lines:
        for number in range(count):
            question, scene, scans = draw_example(variety, np.random.default_rng([seed, key, number]))
            image = f"images/{name}/{number:05d}.png"
            Image.fromarray(scene.pixels).save(folder / image, compress_level=1)
            lines.write(json.dumps(row(name, number, question, image, scans), ensure_ascii=False) + "\n")
    return path
