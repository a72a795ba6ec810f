"""Rows of JSONL files -> `Prompt` and `Pair`, in TRL's conversational format, every fault named by file and row.

A prompt row::

    {"id": "q17",
     "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is the sum ?"}]}],
     "images": ["images/0017.png"], "answer": "12", "tags": ["think", "answer"]}

``prompt`` may be a string (one user turn) or messages; a message's ``content`` may be a string. Images of a prompt
whose contents are all strings stand where the text says ``<image>``, or, where it never does, before the first user
text (TRL's rule). With parts, ``{"type": "image"}`` parts and ``images`` must agree in number. Image paths are relative
to the file. All other columns go to reward functions by name; ``id`` defaults to ``<file stem>:<row>``, rows counted
from 1.

A pair row adds ``chosen`` and ``rejected``: a string or one assistant message each.

Images are decoded once here, so that a broken one is found before training time is spent, and again when used: what
stays in memory is paths.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, overload

from PIL import Image

from specs_fast.data.types import DEFAULT_TAGS, Pair, Prompt

RESERVED_COLUMNS = {"id", "prompt", "images", "image", "chosen", "rejected"}
IMAGE_PLACEHOLDER = "<image>"


class ImageFiles(Sequence[Image.Image]):
    """The images of a row, decoded to RGB each time one is read."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Image.Image]: ...
    def __getitem__(self, index: int | slice) -> Image.Image | Sequence[Image.Image]:
        if isinstance(index, slice):
            return ImageFiles(self.paths[index])
        return read_image(self.paths[index])


def read_image(path: Path) -> Image.Image:
    """An image file as RGB; ValueError names the file when it is missing, truncated, too large or no image."""
    try:
        with Image.open(path) as image:
            image.load()
            return image.convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"image {path} does not exist") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError and others for broken bytes
        raise ValueError(f"image {path} cannot be decoded ({error}); replace the file or drop the row") from error


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number from 1, object) of each non-blank line; ValueError names the row that is no JSON object."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected JSON lines in TRL's conversational format")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{number}: not UTF-8 ({error}); save the file as UTF-8") from None
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not valid JSON ({error.msg} at column {error.colno})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number}: expected a JSON object, got {type(row).__name__}")
            yield number, row


def load_prompts(path: str | Path) -> list[Prompt]:
    """All prompts of a file, checked: structure, placeholder counts, images decodable, ids unique.

    ValueError with ``file:row``, the value and the way out for the first fault.
    """
    prompts = [_prompt_from_row(row, Path(path), number) for number, row in read_jsonl(path)]
    if not prompts:
        raise ValueError(f"{path}: no rows; expected at least one prompt")
    _check_unique(prompts, path)
    _check_images(prompts)
    return prompts


def load_pairs(path: str | Path) -> list[Pair]:
    """All preference pairs of a file; as `load_prompts`, and both responses must be non-empty and differ."""
    pairs = []
    for number, row in read_jsonl(path):
        prompt = _prompt_from_row(row, Path(path), number)
        chosen = _response_text(row, "chosen", prompt.source)
        rejected = _response_text(row, "rejected", prompt.source)
        if chosen == rejected:
            raise ValueError(f"{prompt.source}: chosen and rejected are the same text {chosen!r}; a pair must differ")
        pairs.append(Pair(prompt, chosen, rejected))
    if not pairs:
        raise ValueError(f"{path}: no rows; expected at least one preference pair")
    _check_unique([pair.prompt for pair in pairs], path)
    _check_images([pair.prompt for pair in pairs])
    return pairs


def _prompt_from_row(row: dict[str, Any], path: Path, number: int) -> Prompt:
    source = f"{path}:{number}"
    if "prompt" not in row:
        raise ValueError(f"{source}: column 'prompt' is missing; the row has {sorted(row)}")
    files = _image_column(row, source)
    messages = _attach_images(_messages(row["prompt"], source), len(files), source)
    if not any(part.get("text", "").strip() for message in messages for part in message["content"]):
        raise ValueError(f"{source}: the prompt is empty; every row needs a question in text")
    columns = {key: value for key, value in row.items() if key not in RESERVED_COLUMNS}
    _check_tags(columns.get("tags", list(DEFAULT_TAGS)), source)
    identity = row.get("id", f"{path.stem}:{number}")
    return Prompt(
        id=str(identity),
        messages=tuple(messages),
        images=ImageFiles([path.parent / file for file in files]),
        image_paths=tuple(str(path.parent / file) for file in files),
        columns=columns,
        source=source,
    )


def _messages(prompt: object, source: str) -> list[dict[str, Any]]:
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not prompt:
        raise ValueError(f"{source}: 'prompt' must be a string or a non-empty list of messages, got {prompt!r}")
    for message in prompt:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise ValueError(f"{source}: a message needs 'role' and 'content', got {message!r}")
        content = message["content"]
        if isinstance(content, str):
            continue
        if not isinstance(content, list):
            raise ValueError(f"{source}: a message's content must be a string or a list of parts, got {content!r}")
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "image" or (kind == "text" and isinstance(part.get("text"), str)):
                continue
            raise ValueError(
                f'{source}: a content part must be {{"type": "image"}} or {{"type": "text", "text": ...}}, got {part!r}'
            )
    return prompt


def _attach_images(messages: list[dict[str, Any]], num_images: int, source: str) -> list[dict[str, Any]]:
    """Messages with every content a list of parts and exactly one image part per image."""
    if all(isinstance(message["content"], str) for message in messages):
        named = sum(message["content"].count(IMAGE_PLACEHOLDER) for message in messages)
        attached = [{**message, "content": _split_placeholders(message["content"])} for message in messages]
        if named == 0 and num_images:
            first_user = next((m for m in attached if m["role"] == "user"), None)
            if first_user is None:
                raise ValueError(f"{source}: {num_images} images but no user message to show them in")
            first_user["content"] = [{"type": "image"}] * num_images + first_user["content"]
            named = num_images
    else:
        attached = [
            {
                **m,
                "content": [{"type": "text", "text": m["content"]}] if isinstance(m["content"], str) else m["content"],
            }
            for m in messages
        ]
        named = sum(part["type"] == "image" for message in attached for part in message["content"])
    if named != num_images:
        raise ValueError(
            f"{source}: the prompt has {named} image placeholders but 'images' lists {num_images}; "
            "make them equal (one {'type': 'image'} part per image)"
        )
    return attached


def _split_placeholders(text: str) -> list[dict[str, str]]:
    parts: list[dict[str, str]] = []
    for index, piece in enumerate(text.split(IMAGE_PLACEHOLDER)):
        if index:
            parts.append({"type": "image"})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _image_column(row: dict[str, Any], source: str) -> list[str]:
    if "image" in row and "images" in row:
        raise ValueError(f"{source}: both 'image' and 'images' are given; keep 'images'")
    files = [row["image"]] if "image" in row else row.get("images", [])
    files = [] if files is None else files
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise ValueError(f"{source}: 'images' must be a list of paths relative to the file, got {files!r}")
    return files


def _response_text(row: dict[str, Any], column: str, source: str) -> str:
    value = row.get(column)
    if (
        isinstance(value, list)
        and len(value) == 1
        and isinstance(value[0], dict)
        and value[0].get("role") == "assistant"
    ):
        content = value[0].get("content")
        if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
            content = "".join(str(part.get("text", "")) for part in content)
        value = content
    if not isinstance(value, str):
        raise ValueError(f"{source}: {column!r} must be a string or one assistant message of text, got {value!r}")
    if not value.strip():
        raise ValueError(f"{source}: {column!r} is empty; an empty completion teaches nothing, drop the row")
    return value


def _check_tags(tags: object, source: str) -> None:
    valid = (
        isinstance(tags, list)
        and len(tags) == 2
        and all(isinstance(t, str) and t.isascii() and t.isidentifier() for t in tags)
    )
    if not valid or (isinstance(tags, list) and tags[0] == tags[1]):
        raise ValueError(f"{source}: 'tags' must be two different tag names such as ['think', 'answer'], got {tags!r}")


def _check_unique(prompts: list[Prompt], path: str | Path) -> None:
    seen: dict[str, str] = {}
    for prompt in prompts:
        if prompt.id in seen:
            raise ValueError(
                f"{prompt.source}: id {prompt.id!r} is already used by {seen[prompt.id]}; ids must be unique"
            )
        seen[prompt.id] = prompt.source


def _check_images(prompts: list[Prompt]) -> None:
    """Decode every distinct image file once; the first broken one is reported with the row that names it."""
    first_row: dict[str, str] = {}
    for prompt in prompts:
        for file in prompt.image_paths:
            first_row.setdefault(file, prompt.source)
    with ThreadPoolExecutor() as pool:
        for source, error in pool.map(_image_error, first_row.items()):
            if error:
                raise ValueError(f"{source}: {error}")


def _image_error(item: tuple[str, str]) -> tuple[str, str]:
    file, source = item
    try:
        read_image(Path(file))
    except ValueError as error:
        return source, str(error)
    return source, ""
