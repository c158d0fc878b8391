"""Power laws through measured points."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .record import Fit


def power_law(of: str, x: Sequence[float], y: Sequence[float]) -> Fit | None:
    """The exponent of ``y = c * x ** exponent``; None with fewer than two different ``x``.

    Args:
        of: what grows.
        x, y: positive.
    """
    across, up = [math.log(value) for value in x], [math.log(value) for value in y]
    count = len(across)
    mean_x, mean_y = sum(across) / max(count, 1), sum(up) / max(count, 1)
    spread = sum((value - mean_x) ** 2 for value in across)
    if spread == 0:
        return None
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(across, up, strict=True)) / spread
    left = sum((b - mean_y - slope * (a - mean_x)) ** 2 for a, b in zip(across, up, strict=True))
    error = math.sqrt(left / (count - 2) / spread) if count > 2 else None
    return Fit(of=of, exponent=slope, error=error, points=count)
