"""Image files: one picture as PNG, several as an animation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

# These PNG and WebP files are lossless; GIF is limited to 256 colours.
_FORMATS: dict[str, dict[str, Any]] = {
    ".png": {"format": "PNG"},
    ".webp": {"format": "WEBP", "lossless": True},
    ".gif": {"format": "GIF"},
}


def check_suffix(output: Path) -> None:
    """Raise a ``UserError`` if a file's suffix is not that of an animation format."""
    if output.suffix.lower() not in _FORMATS:
        raise UserError(f"a video cannot be written to {output}: name it {', '.join(_FORMATS)}")


def save(pictures: Sequence[Image], output: Path, fps: float) -> None:
    """Write one picture as PNG, whatever the suffix, or several as an endless animation in the suffix's format."""
    first, *others = pictures
    if not others:
        first.save(output, format="PNG")
        return
    check_suffix(output)
    options = _FORMATS[output.suffix.lower()]
    first.save(output, save_all=True, append_images=others, duration=1000 / fps, loop=0, **options)
