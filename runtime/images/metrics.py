"""Peak signal-to-noise ratio (PSNR), the measure of how close a cached image is to the uncached one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PSNR = 100.0
"""PSNR in dB that replaces the infinite PSNR of equal images in means over images.

The smallest difference of two 8-bit images of 64x64 pixels is 89 dB.
"""


def psnr(first: Any, second: Any, *, peak: float = 255.0) -> float:
    """Return the peak signal-to-noise ratio of two arrays of one shape in dB; infinity where they are equal.

    Args:
        first, second: an image or a video, e.g. uint8 [height, width, 3].
        peak: largest possible value: 255 for uint8, 1 for floats in [0, 1].
    """
    import numpy as np

    error = float(np.mean((np.asarray(first, np.float64) - np.asarray(second, np.float64)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(peak**2 / error)


def finite_psnr(first: Any, second: Any, *, peak: float = 255.0) -> float:
    """Return ``psnr``, at most ``MAX_PSNR``, so that means stay finite."""
    return min(psnr(first, second, peak=peak), MAX_PSNR)


def psnr_of_frames(first: Sequence[Image], second: Sequence[Image]) -> float:
    """Return the PSNR over all frames of two videos in dB; infinity where they are equal. An image is one frame."""
    import numpy as np

    return psnr(*(np.stack([np.asarray(frame.convert("RGB")) for frame in frames]) for frames in (first, second)))
