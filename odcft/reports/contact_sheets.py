"""Contact sheets: rows of thumbnails with captions, drawn by Pillow."""

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from odcft.data.images import Images
from odcft.data.thumbnails import thumbnail as small_picture
from odcft.data.view import View

SIDE = 96  # pixels of a thumbnail, unless told otherwise
GAP, TITLE, ROW, CAPTION = 6, 16, 12, 10  # pixels between thumbnails; sizes of the letters
LINE = 1.5  # height of a line of text, in letters
PAPER, INK, FAINT, MISSING = (255, 255, 255), (20, 20, 20), (95, 95, 95), (225, 225, 225)


@dataclass
class Cell:
    """A thumbnail (or None if the image cannot be read) and what stands below it."""

    picture: Image.Image | None
    caption: str = ""


@dataclass
class Row:
    """A line of text, and the thumbnails below it."""

    title: str
    cells: list[Cell] = field(default_factory=list)


def thumbnail(images: Images, index: int, view: View, side: int = SIDE) -> Image.Image | None:
    """Image `index` as a whole in side × side pixels, in the middle of white paper; None if it cannot be read."""
    try:
        picture = small_picture(images, index, view, side).convert("RGB")
    except Exception:  # of many types, raised by decoders for damaged files, or by the user's own function
        return None
    if (scale := side // max(picture.size)) > 1:  # small images are enlarged with their pixels kept apart
        picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    paper = Image.new("RGB", (side, side), PAPER)
    paper.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return paper


def thumbnails(
    images: Images, indices: Iterable[int], view: View, side: int = SIDE, *, threads: int = 1, seconds: float = 0.0
) -> dict[int, Image.Image]:
    """The thumbnails of some images, by index; without those that cannot be read.

    Args:
        images: the set.
        indices: which of them; each is read once.
        view: its `intensity` and `bands` say how pixels become colours.
        side: of a thumbnail, in pixels.
        threads: that decode at a time.
        seconds: after so long, those not yet begun are left out; 0: none are.
    """
    until = time.monotonic() + seconds

    def draw(index: int) -> tuple[int, Image.Image | None]:
        late = seconds and time.monotonic() > until
        return index, None if late else thumbnail(images, index, view, side)

    wanted = list(dict.fromkeys(indices))
    with ThreadPoolExecutor(max(1, threads)) as pool:
        drawn = pool.map(draw, wanted) if threads > 1 else map(draw, wanted)
        return {index: picture for index, picture in drawn if picture is not None}


def draw_sheet(title: str, rows: Sequence[Row], columns: int, side: int = SIDE) -> Image.Image:
    """Draw a contact sheet.

    Args:
        title: on top; text too long for the width is cut, and ends in "…".
        rows: each with at most `columns` cells.
        columns: how many cells fit side by side.
        side: of the thumbnails.
    """
    width = GAP + columns * (side + GAP)
    captions = any(cell.caption for row in rows for cell in row.cells)
    text = _height(CAPTION) if captions else 0
    heights = [(_height(ROW) if row.title else 0) + (side + text + GAP if row.cells else 0) for row in rows]
    sheet = Image.new("RGB", (width, GAP + _height(TITLE) + GAP + sum(heights)), PAPER)
    draw = ImageDraw.Draw(sheet)
    _write(draw, (GAP, GAP), title, TITLE, INK, width - 2 * GAP)
    top = GAP + _height(TITLE) + GAP
    for row, height in zip(rows, heights, strict=True):
        place = top
        if row.title:
            _write(draw, (GAP, place), row.title, ROW, FAINT, width - 2 * GAP)
            place += _height(ROW)
        for number, cell in enumerate(row.cells):
            left = GAP + number * (side + GAP)
            if cell.picture is not None:
                sheet.paste(cell.picture, (left, place))
            else:
                draw.rectangle((left, place, left + side - 1, place + side - 1), MISSING)
                _write(draw, (left + 4, place + side // 2 - CAPTION), "not readable", CAPTION, FAINT, side - 8)
            if cell.caption:
                _write(draw, (left, place + side + 1), cell.caption, CAPTION, FAINT, side)
        top += height
    return sheet


def pages(cells: Sequence[Cell], columns: int, rows: int) -> list[list[Row]]:
    """Cells in rows without titles, `rows` of them a page."""
    lines = [Row("", list(cells[start : start + columns])) for start in range(0, len(cells), columns)]
    return [lines[start : start + rows] for start in range(0, len(lines), rows)]


def _height(letters: int) -> int:
    return round(LINE * letters)


@lru_cache(maxsize=8)
def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _write(draw: Any, place: tuple[int, int], text: str, size: int, ink: tuple[int, int, int], most: int) -> None:
    """Write a line that is at most so many pixels long; a font without some letter shows an empty box for it."""
    font, measure = _font(size), _measure(draw, size)
    text = text[: most // 2]  # no letter is narrower than two pixels: the loop below stays short
    try:
        if measure(text) > most:
            while text and measure(text + "…") > most:
                text = text[:-1]
            text += "…"
        draw.text(place, text, ink, font)
    except UnicodeEncodeError:  # Pillow's font where FreeType is missing has Latin letters only
        draw.text(place, text.encode("ascii", "replace").decode(), ink, font)


def _measure(draw: Any, size: int) -> Callable[[str], float]:
    return lambda text: draw.textlength(text, _font(size))
