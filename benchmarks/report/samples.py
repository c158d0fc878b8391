"""Sample images of a result, read from files beside ``result.json`` and written into the page as data URLs."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING

from ...runtime.images.picture import difference
from .blocks import Picture

if TYPE_CHECKING:
    from PIL.Image import Image

GAIN = 4.0
"""How much brighter a difference is shown than it is."""

_LARGEST = 384  # pixels; larger images are scaled down, so that a page of many stays light


def read(folder: Path, name: str) -> Image | None:
    """Return a sample image; None where the file is missing, is not a PNG, or lies outside of the folder."""
    from PIL import Image, UnidentifiedImageError

    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
        return None
    try:
        with Image.open(path, formats=["PNG"]) as image:
            picture = image.convert("RGB")
    except (OSError, UnidentifiedImageError):
        return None
    picture.thumbnail((_LARGEST, _LARGEST))
    return picture


def differences(first: Image | None, second: Image | None) -> Image | None:
    """Return the difference of two images, brightened; None where one is missing or their sizes differ."""
    if first is None or second is None or first.size != second.size:
        return None
    return difference(first, second, GAIN)


def picture(image: Image | None, text: str) -> Picture:
    """Return an image for a table's cell; ``text`` describes it."""
    if image is None:
        return Picture(text)
    stream = io.BytesIO()
    image.save(stream, format="PNG", optimize=True)
    address = f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"
    return Picture(text, address, image.width, image.height)
