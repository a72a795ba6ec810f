"""Images inside the page: data URIs, small ones exact and scaled up by the browser, large ones reduced, under a byte budget."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path

from PIL import Image, UnidentifiedImageError

PIXEL_ART = 160  # images no larger than this are shown enlarged, pixel by pixel
LARGEST = 448
SHOWN_WIDTH = 300
BUDGET = 3_000_000


class ImageBook:
    """Embeds images until ``budget`` bytes of data URIs are spent; says so where one is left out or cannot be read.

    Paths in a run folder are absolute, or relative to the file that names them, the run folder or the working directory.
    """

    def __init__(self, run_dir: Path, budget: int = BUDGET) -> None:
        self.run_dir = run_dir
        self.left = budget
        self.known: dict[Path, tuple[str, int, int]] = {}

    def html(self, name: str, beside: Path | None = None) -> str:
        """An ``img`` element, or a note in its place."""
        path = self.find(name, beside)
        if path is None:
            return f'<span class="no-image">image not found: {escape(name)}</span>'
        try:
            uri, width, height = self.known.get(path) or encode(path)
        except (OSError, UnidentifiedImageError, ValueError):
            return f'<span class="no-image">image not readable: {escape(name)}</span>'
        if len(uri) > self.left:
            return '<span class="no-image">image left out: the page has reached its size limit</span>'
        self.left -= len(uri)
        self.known[path] = (uri, width, height)
        small = max(width, height) <= PIXEL_ART
        shown = SHOWN_WIDTH if small else min(width, SHOWN_WIDTH)
        css = ' class="pixels"' if small else ""
        return (
            f'<img{css} src="{uri}" width="{shown}" height="{round(height * shown / width)}" alt="the prompt\'s image">'
        )

    def find(self, name: str, beside: Path | None) -> Path | None:
        """The file that ``name`` means."""
        places = [beside, self.run_dir, Path()] if beside is not None else [self.run_dir, Path()]
        return next((place / name for place in places if (place / name).is_file()), None)


def encode(path: Path) -> tuple[str, int, int]:
    """Data URI, width and height of an image: PNG where small or few-coloured, else JPEG at most ``LARGEST`` wide or high."""
    with Image.open(path) as image:
        image.load()
        picture = image.convert("RGB")
    buffer = io.BytesIO()
    if max(picture.size) <= PIXEL_ART:
        picture.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        picture.thumbnail((LARGEST, LARGEST))
        picture.save(buffer, "JPEG", quality=80)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", *picture.size
