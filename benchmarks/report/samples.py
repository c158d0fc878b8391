"""Sample images inside the page: read from beside ``result.json``, compared, and written as data addresses."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...runtime.images.picture import difference
from .markup import Markup, tag

if TYPE_CHECKING:
    from PIL.Image import Image

GAIN = 4.0
"""How much brighter a difference is shown than it is."""

_LARGEST = 384  # pixels; larger images are shown smaller, so that a page of many stays light


def opened(folder: Path, name: str) -> Image | None:
    """A sample; None where it is not there or no PNG. A name that leads out of the folder is not followed."""
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


def apart(first: Image | None, second: Image | None) -> Image | None:
    """Their difference; None where one is missing or their sizes differ."""
    if first is None or second is None or first.size != second.size:
        return None
    return difference(first, second, GAIN)


def shown(image: Image | None, said: str) -> Markup:
    """The image, or a word in its place."""
    if image is None:
        return tag("span", "missing", class_="missing", title=said)
    kind = "small" if image.width <= 128 else None  # in whole pixels, not blurred up
    attributes: dict[str, Any] = {"width": image.width, "height": image.height, "class_": kind}
    return tag("img", src=_address(image), alt=said, **attributes)


def _address(image: Image) -> str:
    stream = io.BytesIO()
    image.save(stream, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"
