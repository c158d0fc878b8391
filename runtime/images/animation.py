"""Pictures to a file: one as PNG, several as an animation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

# PNG and WebP keep every colour here; GIF has 256 of them.
_FORMATS: dict[str, dict[str, Any]] = {
    ".png": {"format": "PNG"},
    ".webp": {"format": "WEBP", "lossless": True},
    ".gif": {"format": "GIF"},
}


def check_suffix(output: Path) -> None:
    """Raise a ``UserError`` for a file name that says no format of animations."""
    if output.suffix.lower() not in _FORMATS:
        raise UserError(f"a video cannot be written to {output}: name it {', '.join(_FORMATS)}")


def save(pictures: Sequence[Image], output: Path, fps: float) -> None:
    """Write one picture as PNG whatever the file is called, several as an endless animation that its suffix names."""
    first, *others = pictures
    if not others:
        first.save(output, format="PNG")
        return
    check_suffix(output)
    how = _FORMATS[output.suffix.lower()]
    first.save(output, save_all=True, append_images=others, duration=1000 / fps, loop=0, **how)
