"""The page: complete for a whole run, honest for a stopped one, closed to the network and to what models write."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from specs_fast.report import build
from specs_fast.report.chart import Series, line_chart, nice_range, running_mean
from specs_fast.report.images import ImageBook, encode
from specs_fast.report.pictures import pick
from specs_fast.report.run_data import read_run
from specs_fast.report.text import difference_html, words_html

VOID = {"meta", "img", "br", "link", "input", "hr"}
ATTACK = "<script>alert(1)</script><img src=x onerror=alert(2)> </p></article> & \"quoted\" 'single' <b>bold</b>"


class Page(HTMLParser):
    """Checks nesting; collects tags, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def page_of(run_dir: Path) -> tuple[str, Page]:
    html = build(run_dir).read_text(encoding="utf-8")
    return html, Page(html)


def edit_jsonl(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        change(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_a_whole_run_has_every_section_image_curve_and_pair(fake_run: Callable[..., Path]) -> None:
    html, page = page_of(fake_run())
    text = " ".join(page.text)
    for word in (
        "Before and after",
        "Questions",
        "Preference pairs",
        "Training curves",
        "Rollouts in training",
        "config.yaml",
    ):
        assert word in text
    assert page.count("img") > 20
    assert sum(tag == "figure" and attributes.get("class") == "chart" for tag, attributes in page.tags) >= 15
    assert "cold start" in text and "became right" in text and "tags displaced" in text
    assert "not there yet" not in text.lower()
    assert len(html) < 5_000_000


def test_the_page_needs_nothing_from_outside(fake_run: Callable[..., Path]) -> None:
    html, page = page_of(fake_run())
    assert not re.search(r"https?:|//\w+\.\w|@import|url\(", html)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        for name in ("src", "href", "action", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/", "#")), (tag, value)


def test_only_the_pages_own_script_may_run(fake_run: Callable[..., Path]) -> None:
    html, page = page_of(fake_run())
    policy = next(
        a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert len(scripts) == 1 and policy is not None
    assert f"'sha256-{base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()}'" in policy
    assert "default-src 'none'" in policy


@pytest.mark.parametrize(
    "place",
    [
        "sample",
        "greedy",
        "prompt",
        "pair",
        "rollout",
        "split",
        "second split",
        "summary",
        "image",
        "corruption",
        "config",
    ],
)
def test_whatever_a_model_or_a_file_says_stays_text(fake_run: Callable[..., Path], place: str) -> None:
    run_dir = fake_run(n=6)
    attacked = 0

    def change(row: dict[str, Any]) -> None:
        nonlocal attacked
        attacked += 1
        if place == "sample":
            row["samples"] = [ATTACK] * 4
        elif place == "second split":
            row["split"] = row["split"] if row["split"] == "id" else ATTACK
        elif place in ("greedy", "prompt", "split"):
            row[place] = ATTACK
        elif place == "pair":
            row["chosen"][0]["content"][0]["text"] = ATTACK
        elif place == "rollout":
            row["completion"] = ATTACK
            row["rewards"] = {ATTACK: 1.0}
        elif place == "image":
            row["images"] = [ATTACK]
        elif place == "corruption":
            row["corruption"] = ATTACK

    if place == "config":
        with (run_dir / "config.yaml").open("a", encoding="utf-8") as file:
            file.write(f"name: {json.dumps(ATTACK)}\n")
        attacked = 1
    elif place == "summary":
        for model in ("base", "zero", "coldstart", "final"):
            path = run_dir / "eval" / f"{model}.json"
            path.write_text(path.read_text().replace('"ood_tags"', json.dumps(ATTACK)))
        attacked = 1
    elif place in ("pair", "corruption"):
        edit_jsonl(run_dir / "pairs" / "pairs.jsonl", change)
    elif place == "rollout":
        edit_jsonl(run_dir / "zero" / "completions.jsonl", change)
    else:
        for model in ("base", "zero", "coldstart", "final"):
            edit_jsonl(run_dir / "eval" / f"{model}.completions.jsonl", change)
    assert attacked
    html, page = page_of(run_dir)
    assert page.count("script") == 1
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert "alert(1)" in " ".join(page.text)
    assert "<b>bold</b>" not in html


STOPS = [
    ((), ()),
    (("zero",), ()),
    (("zero", "pairs"), ()),
    (("zero", "pairs", "coldstart"), ()),
    (("zero", "pairs", "coldstart", "final"), ()),
    (("zero", "pairs", "coldstart", "final"), ("base",)),
    (("zero", "pairs", "coldstart", "final"), ("base", "zero")),
]


@pytest.mark.parametrize(("stages", "models"), STOPS)
def test_a_stopped_run_shows_what_is_missing(
    fake_run: Callable[..., Path], stages: tuple[str, ...], models: tuple[str, ...]
) -> None:
    _, page = page_of(fake_run(stages=stages, models=models, n=5))
    text = " ".join(page.text)
    assert "not there yet" in text.lower() or "is there yet" in text
    for name, title in (("zero", "zero"), ("coldstart", "coldstart"), ("final", "final")):
        assert (f"{title}: not there yet." in text) == (name not in stages)


def test_a_stage_that_is_being_written_shows_its_curves_so_far(fake_run: Callable[..., Path]) -> None:
    run_dir = fake_run(stages=("zero",), models=())
    (run_dir / "zero").rename(run_dir / "zero.partial")
    (run_dir / "zero.partial" / "DONE.json").unlink()
    with (run_dir / "zero.partial" / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 41, "rewa')
    html, page = page_of(run_dir)
    text = " ".join(page.text)
    assert "zero: not finished; what was written so far." in text and "at step 40" in text
    assert 'aria-label="Reward"' in html


def test_torn_and_foreign_files_do_not_stop_the_page(fake_run: Callable[..., Path]) -> None:
    run_dir = fake_run(n=5)
    (run_dir / "run.json").write_text('{"seconds": {"zero": ', encoding="utf-8")
    (run_dir / "config.yaml").write_text("a: [", encoding="utf-8")
    (run_dir / "eval" / "zero.json").write_text("[1]", encoding="utf-8")
    (run_dir / "pairs" / "yield.json").write_text("", encoding="utf-8")
    edit_jsonl(run_dir / "zero" / "metrics.jsonl", lambda row: row.update(reward=None, entropy="high"))
    for image in sorted((run_dir / "lab" / "images").iterdir())[:3]:
        image.write_bytes(image.read_bytes()[:40])
    (sorted((run_dir / "lab" / "images").iterdir())[3]).unlink()
    _, page = page_of(run_dir)
    text = " ".join(page.text)
    assert "image not readable" in text and "image not found" in text


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such run folder"):
        build(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="no run folder"):
        build(tmp_path)


def test_the_headline_says_what_changed(fake_run: Callable[..., Path]) -> None:
    run_dir = fake_run()
    _, page = page_of(run_dir)
    rows = read_run(run_dir).evaluations
    base, final = (rows[m].summary["splits"]["id"]["sampled"]["accuracy_any"] for m in ("base", "final"))
    text = " ".join(" ".join(page.text).split())
    assert f"{100 * final:.1f} ±" in text and f"{100 * base:.1f} ±" in text
    assert f"{100 * (final - base):+.1f} ±" in text


def test_small_images_are_exact_and_large_ones_reduced(tmp_path: Path) -> None:
    small, large = tmp_path / "small.png", tmp_path / "large.png"
    pixels = Image.effect_noise((96, 32), 60).convert("RGB")
    pixels.save(small)
    Image.effect_noise((1600, 1200), 60).convert("RGB").save(large)
    uri, width, height = encode(small)
    assert (width, height) == (96, 32)
    decoded = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
    assert decoded.convert("RGB").tobytes() == pixels.tobytes()
    uri, width, height = encode(large)
    assert (width, height) == (448, 336) and len(uri) < 150_000


def test_the_image_budget_is_kept_and_said(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.effect_noise((64, 64), 60).convert("RGB").save(path)
    size = len(encode(path)[0])
    book = ImageBook(tmp_path, budget=int(size * 2.5))
    assert [("size limit" in book.html("a.png")) for _ in range(4)] == [False, False, True, True]


def test_images_are_found_beside_their_file_in_the_run_folder_or_by_absolute_path(tmp_path: Path) -> None:
    (tmp_path / "pairs").mkdir()
    for path in (tmp_path / "a.png", tmp_path / "pairs" / "b.png"):
        Image.new("RGB", (4, 4)).save(path)
    book = ImageBook(tmp_path)
    assert "<img" in book.html("a.png") and "<img" in book.html("b.png", tmp_path / "pairs")
    assert "<img" in book.html(str(tmp_path / "a.png"))
    assert "not found" in book.html("b.png")


def test_differences_mark_what_one_side_lacks_and_nothing_else() -> None:
    left, right = difference_html("<think> a b </think> <answer> 3 </answer>", "a b Answer: 3")
    assert "Answer:" in re.sub(r"<[^>]+>", "", re.search(r'<mark class="only-rejected">(.*?)</mark>', right)[1])  # type: ignore[index]
    assert '<mark class="only-chosen"><span class="tag">&lt;think&gt;</span>' in left
    same = difference_html("a < b", "a < b")
    assert same == ("a &lt; b", "a &lt; b")


def test_words_keep_every_character_and_show_empty_and_cut_texts() -> None:
    assert Page(f"<p>{words_html(ATTACK)}</p>").text and "".join(Page(f"<p>{words_html(ATTACK)}</p>").text) == ATTACK
    assert "(empty)" in words_html(" \n")
    assert "300 more characters" in words_html("x" * 1500)


@pytest.mark.parametrize(
    "values", [[0.0], [5.0, 5.0], [-1e-9, 1e-9], [0, 1], [0.1234, 0.1235], [-300, 7e5], [1e-12, 3e-12], [0.0, 0.0]]
)
def test_axes_hold_the_values_with_few_round_ticks(values: list[float]) -> None:
    low, high, ticks = nice_range(values)
    span = high - low
    assert span > 0 and low <= min(values) + 1e-9 * span and high >= max(values) - 1e-9 * span
    assert 2 <= len(ticks) <= 7 and ticks == sorted(ticks)


def test_smoothing_keeps_the_ends_and_constants() -> None:
    points = [(float(x), 2.0) for x in range(60)]
    smooth, window = running_mean(points)
    assert smooth == points and window == 5
    noisy = [(float(x), float(x % 2)) for x in range(60)]
    smooth, _ = running_mean(noisy)
    assert smooth[0] == noisy[0] and smooth[-1] == noisy[-1]
    assert running_mean(points[:20]) == (points[:20], 1)


def test_a_chart_leaves_out_what_is_not_finite_and_vanishes_when_nothing_is_left() -> None:
    html = line_chart("T <x>", [Series("s", "zero", [(1, float("nan")), (2, 3.0), (3, float("inf"))])])
    data = json.loads(Page(html).tags[0][1]["data-chart"] or "")
    assert data["series"][0]["points"] == [[2, 3.0]]
    assert "nan" not in html and "T &lt;x&gt;" in html
    assert line_chart("T", [Series("s", "zero", [])]) == ""


def test_pick_takes_from_every_group_in_turn() -> None:
    assert pick([[1, 2, 3], [], [4], [5, 6]], 5) == [1, 4, 5, 2, 6]
    assert pick([[], []], 3) == []
