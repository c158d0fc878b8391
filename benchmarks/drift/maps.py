"""Where a picture changed: the mean absolute difference of its colours, as a picture of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL.Image import Image

Array = npt.NDArray[np.float64]

# Dark to light, each step lighter than the last, so that it also reads without colour.
_RAMP = np.array([(13, 12, 34), (74, 25, 92), (150, 44, 80), (214, 92, 54), (244, 170, 66), (252, 250, 214)], float)


def changed(one: Any, other: Any) -> Array:
    """[height, width] of two pictures [height, width, channels] in [0, 1]."""
    return np.asarray(np.abs(np.asarray(one, np.float64) - np.asarray(other, np.float64)).mean(-1))


def painted(values: Array, most: float) -> Image:
    """A map, from nothing (dark) to ``most`` (light)."""
    from PIL import Image

    place = np.clip(values / most if most > 0 else values * 0, 0, 1) * (len(_RAMP) - 1)
    colours = [np.interp(place, range(len(_RAMP)), _RAMP[:, channel]) for channel in range(3)]
    return Image.fromarray(np.stack(colours, -1).round().astype(np.uint8))


def picture(values: Any) -> Image:
    """Of a picture [height, width, channels] in [0, 1]."""
    from PIL import Image

    return Image.fromarray((np.clip(np.asarray(values), 0, 1) * 255).round().astype(np.uint8))
