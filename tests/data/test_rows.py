"""Rows: what is read, and what every fault says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from specs_fast.data.rows import load_pairs, load_prompts


def write(path: Path, *rows: Any) -> Path:
    path.write_text(
        "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n", encoding="utf-8"
    )
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name, color in (("a", 10), ("b", 200)):
        Image.new("L", (8, 8), color).save(tmp_path / "images" / f"{name}.png")
    return tmp_path


def row(**changes: Any) -> dict[str, Any]:
    base = {
        "id": "q1",
        "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "sum ?"}]}],
        "images": ["images/a.png"],
        "answer": "3",
    }
    return {**base, **changes}


def test_reads_messages_images_and_columns(folder: Path) -> None:
    (prompt,) = load_prompts(write(folder / "d.jsonl", row(task="sum", tags=["plan", "reply"])))
    assert prompt.id == "q1" and prompt.text == "sum ?" and prompt.tags == ("plan", "reply")
    assert prompt.columns == {"answer": "3", "task": "sum", "tags": ["plan", "reply"]}
    assert prompt.images[0].mode == "RGB" and prompt.images[0].getpixel((0, 0)) == (10, 10, 10)
    assert prompt.source.endswith("d.jsonl:1")


def test_string_prompts_put_images_where_the_text_says_or_first(folder: Path) -> None:
    rows = [
        {"prompt": "left <image> right <image> ?", "images": ["images/a.png", "images/b.png"]},
        {"prompt": "what ?", "images": ["images/b.png"]},
        {"prompt": "no picture"},
    ]
    first, second, third = load_prompts(write(folder / "d.jsonl", *rows))
    assert [part["type"] for part in first.messages[0]["content"]] == ["text", "image", "text", "image", "text"]
    assert [part["type"] for part in second.messages[0]["content"]] == ["image", "text"]
    assert [part["type"] for part in third.messages[0]["content"]] == ["text"]
    assert first.id == "d:1" and third.id == "d:3"


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("{not json", r"d\.jsonl:2: not valid JSON"),
        ("[1]", r"d\.jsonl:2: expected a JSON object, got list"),
        ({"images": []}, r"d\.jsonl:2: column 'prompt' is missing"),
        (row(id="x", images=[]), r"d\.jsonl:2: the prompt has 1 image placeholders but 'images' lists 0"),
        (
            row(id="x", images=["images/a.png", "images/b.png"]),
            r":2: the prompt has 1 image placeholders but 'images' lists 2",
        ),
        (
            {"prompt": "<image> and <image>", "images": ["images/a.png"]},
            r":2: the prompt has 2 image placeholders .* lists 1",
        ),
        (row(id="x", images=["images/none.png"]), r":2: image .*none\.png does not exist"),
        (row(id="x", images=["images/cut.png"]), r":2: image .*cut\.png cannot be decoded"),
        (row(id="x", images=["images/text.png"]), r":2: image .*text\.png cannot be decoded"),
        (row(id="x", images=["images/header.ppm"]), r":2: image .*header\.ppm cannot be decoded"),
        ({"prompt": ""}, r":2: the prompt is empty"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image"}]}], "images": ["images/a.png"]},
            r":2: the prompt is empty",
        ),
        ({"prompt": []}, r":2: 'prompt' must be a string or a non-empty list"),
        ({"prompt": [{"content": "x"}]}, r":2: a message needs 'role' and 'content'"),
        ({"prompt": [{"role": "user", "content": [{"type": "video"}]}]}, r":2: a content part must be"),
        (row(), r":2: id 'q1' is already used by .*:1"),
        (row(id="x", tags=["think"]), r":2: 'tags' must be two different tag names"),
        (row(id="x", tags=["gedanke", "lösung"]), r":2: 'tags' must be two different tag names"),
        (row(id="x", images="images/a.png"), r":2: 'images' must be a list of paths"),
    ],
)
def test_a_bad_row_is_named_with_file_row_and_fault(folder: Path, bad: Any, says: str) -> None:
    whole = (folder / "images" / "a.png").read_bytes()
    (folder / "images" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "images" / "text.png").write_text("not an image")
    (folder / "images" / "header.ppm").write_bytes(b"P6\n4x 4\n255\n")
    with pytest.raises(ValueError, match=says):
        load_prompts(write(folder / "d.jsonl", row(), bad))


def test_a_row_that_is_not_utf_8_is_named(folder: Path) -> None:
    path = write(folder / "d.jsonl", row())
    path.write_bytes(path.read_bytes().rstrip() + '\n{"prompt": "größer?"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"d\.jsonl:2: not UTF-8"):
        load_prompts(path)


def test_a_missing_or_empty_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        load_prompts(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="no rows"):
        load_prompts(write(tmp_path / "empty.jsonl", ""))


def message(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]


def test_pairs_read_messages_and_strings(folder: Path) -> None:
    path = write(folder / "p.jsonl", row(chosen=message("good"), rejected="bad", corruption="shift"))
    (pair,) = load_pairs(path)
    assert (pair.chosen, pair.rejected) == ("good", "bad")
    assert pair.prompt.columns["corruption"] == "shift"


@pytest.mark.parametrize(
    ("chosen", "rejected", "says"),
    [
        (message(""), message("b"), r"p\.jsonl:1: 'chosen' is empty"),
        (message("a"), "  ", r"p\.jsonl:1: 'rejected' is empty"),
        (message("a"), None, r"p\.jsonl:1: 'rejected' must be a string or one assistant message"),
        (message("a"), message("a"), r"p\.jsonl:1: chosen and rejected are the same"),
        ([{"role": "user", "content": "a"}], "b", r"p\.jsonl:1: 'chosen' must be"),
    ],
)
def test_bad_pairs_are_refused(folder: Path, chosen: Any, rejected: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load_pairs(write(folder / "p.jsonl", row(chosen=chosen, rejected=rejected)))
