"""Power laws through measured points."""

from __future__ import annotations

from collections.abc import Sequence

from ..stats import require
from .record import Fit


def power_law(of: str, x: Sequence[float], y: Sequence[float]) -> Fit | None:
    """Return the exponent of ``y = c * x ** exponent``, by least squares; None with fewer than two different ``x``.

    Args:
        of: what grows.
        x, y: positive.
    """
    if len(set(x)) < 2:
        return None
    require("the exponent of a power law", "scipy")
    import numpy as np
    from scipy.stats import linregress

    line = linregress(np.log(x), np.log(y))
    error = float(line.stderr) if len(x) > 2 else None
    return Fit(of=of, exponent=float(line.slope), error=error, points=len(x))
