"""Image files: reading the image that a pipeline starts from, and writing pictures in the suffix's format."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

# PNG and WebP files are lossless; GIF is limited to 256 colours.
_FORMATS: dict[str, dict[str, Any]] = {
    ".png": {"format": "PNG"},
    ".webp": {"format": "WEBP", "lossless": True},
    ".gif": {"format": "GIF"},
    ".jpg": {"format": "JPEG", "quality": 95},
    ".jpeg": {"format": "JPEG", "quality": 95},
}
_IMAGES = (".png", ".jpg", ".jpeg", ".webp")
_VIDEOS = (".png", ".webp", ".gif")


def read_image(file: Path) -> Image:
    """Return an image in RGB, turned upright as its EXIF orientation says.

    Raises:
        UserError: the file is missing, damaged, too large, or not an image.
    """
    import numpy as np
    from diffusers.utils import load_image
    from PIL import Image, UnidentifiedImageError

    try:
        image: Image.Image = Image.open(file)
        if image.mode.startswith("I;16"):  # Pillow would clip 16 bits to 8
            image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
        upright: Image.Image = load_image(image)
        return upright
    except UnidentifiedImageError as error:
        raise UserError(f"{file} is not an image that Pillow reads: give a PNG or JPEG") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{file} has too many pixels: give a smaller image") from error
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises these for damaged files
        reason = getattr(error, "strerror", None) or "it is damaged"
        raise UserError(f"cannot read {file}: {reason}; give another image") from error


def check_suffix(output: Path, *, video: bool | None = None) -> None:
    """Refuse a file whose suffix names no format that is written.

    Args:
        video: whether several pictures are written; None where this is not known yet.

    Raises:
        UserError: the suffix is not one of the formats'.
    """
    suffixes = {True: _VIDEOS, False: _IMAGES, None: tuple(_FORMATS)}[video]
    if output.suffix.lower() not in suffixes:
        what = {True: "a video", False: "an image", None: "a picture"}[video]
        raise UserError(f"{what} cannot be written to {output}: give the file the suffix {', '.join(suffixes)}")


@contextmanager
def replaced_when_done(output: Path) -> Iterator[Path]:
    """Yield a file next to ``output`` to write to, which takes its place at the end of the block.

    An error in the block leaves ``output`` as it was.

    Raises:
        UserError: the file cannot be written; raised before the block.
    """
    if output.exists() and not output.is_file() and not output.is_dir():
        yield output  # a device, such as /dev/null
        return
    unfinished = output.with_name(f".{output.name}.{os.getpid()}.part")
    try:
        if output.is_dir():
            raise UserError(f"cannot write {output}: it is a directory; give a file with -o")
        if output.exists() and not os.access(output, os.W_OK):
            raise UserError(f"cannot write {output}: it is read-only; give another path with -o")
        unfinished.touch()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {output}: {reason}; give another path with -o") from error
    try:
        yield unfinished
        unfinished.replace(output)
    finally:
        unfinished.unlink(missing_ok=True)


def save(pictures: Sequence[Image], output: Path, fps: float, suffix: str | None = None) -> None:
    """Write one picture, or several as an endless animation.

    Args:
        suffix: suffix of the format; by default that of ``output``.

    Raises:
        UserError: the suffix names no format of pictures.
    """
    first, *others = pictures
    check_suffix(Path(f"{output.stem}{suffix or output.suffix}"), video=True if others else None)
    options = _FORMATS[(suffix or output.suffix).lower()]
    if others:
        first.save(output, save_all=True, append_images=others, duration=1000 / fps, loop=0, **options)
    else:
        first.save(output, **options)
