"""Pictures of a comparison: images side by side, their difference, and a timeline of full and shallow calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..generation.state import Run

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

_PAPER = (252, 251, 248)
_INK = (40, 42, 46)
_MUTED = (120, 124, 130)
_FULL = (214, 92, 54)
_SHALLOW = (86, 146, 166)
_MARGIN = 16
_TILE = 256
_LINE = 20
_TIMELINE = 22


@dataclass(frozen=True)
class Tile:
    """An image with a title above it, a note below it, and the record of its UNet calls."""

    image: Image
    title: str
    note: str
    run: Run | None = None


def difference(first: Image, second: Image, gain: float = 4.0) -> Image:
    """Return the absolute difference of two images, multiplied by ``gain`` to make it visible."""
    import numpy as np
    from PIL import Image

    a = np.asarray(first.convert("RGB"), dtype=np.float32)
    b = np.asarray(second.convert("RGB"), dtype=np.float32)
    return Image.fromarray(np.clip(np.abs(a - b) * gain, 0, 255).astype(np.uint8))


def sheet(rows: Sequence[tuple[str, Sequence[Tile]]]) -> Image:
    """Return a picture of rows of tiles, each row under its heading, with a legend of the timeline's colours below."""
    from PIL import Image, ImageDraw

    columns = max(len(tiles) for _, tiles in rows)
    width = _MARGIN + columns * (_TILE + _MARGIN)
    row_height = 2 * _LINE + _TILE + _TIMELINE + _LINE + _MARGIN
    canvas = Image.new("RGB", (width, _MARGIN + len(rows) * row_height + _LINE + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(canvas)
    top = _MARGIN
    for heading, tiles in rows:
        draw.text((_MARGIN, top), heading, _INK, font=_font(16))
        for column, tile in enumerate(tiles):
            _draw_tile(canvas, draw, tile, _MARGIN + column * (_TILE + _MARGIN), top + _LINE)
        top += row_height
    _legend(draw, _MARGIN, top)
    return canvas


def _draw_tile(canvas: Image, draw: ImageDraw, tile: Tile, left: int, top: int) -> None:
    from PIL import Image

    draw.text((left, top + 3), tile.title, _INK, font=_font(13))
    top += _LINE
    # A small image is enlarged in whole pixels, without blur.
    method = Image.Resampling.NEAREST if tile.image.width < _TILE else Image.Resampling.LANCZOS
    canvas.paste(tile.image.convert("RGB").resize((_TILE, _TILE), method), (left, top))
    top += _TILE
    if tile.run is not None:
        _draw_timeline(draw, tile.run, left, top + 4)
    draw.text((left, top + _TIMELINE + 2), tile.note, _MUTED, font=_font(12))


def _draw_timeline(draw: ImageDraw, run: Run, left: int, top: int) -> None:
    """Draw a bar for each UNet call: tall for a full call, short for a shallow one."""
    height = _TIMELINE - 6
    step = _TILE / len(run.full)
    for call, full in enumerate(run.full):
        x = left + call * step
        y = top if full else top + height * 2 / 3
        draw.rectangle((x, y, x + max(step - 1, 0.5), top + height), _FULL if full else _SHALLOW)


def _legend(draw: ImageDraw, left: int, top: int) -> None:
    for colour, text in ((_FULL, "full UNet call"), (_SHALLOW, "shallow call, deep features reused")):
        draw.rectangle((left, top + 4, left + 10, top + 14), colour)
        draw.text((left + 16, top + 2), text, _MUTED, font=_font(12))
        left += 160


def _font(size: int) -> FreeTypeFont | ImageFont:
    from PIL import ImageFont

    return ImageFont.load_default(size)
