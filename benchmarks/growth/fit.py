"""Power laws through measured points."""

from __future__ import annotations

from collections.abc import Sequence

from ..schema.growth import Fit


def power_law(of: str, x: Sequence[float], y: Sequence[float]) -> Fit | None:
    """Return the exponent of ``y = c * x ** exponent``, by least squares; None with fewer than two different ``x``.

    Args:
        of: what grows.
        x, y: positive.
    """
    if len(set(x)) < 2:
        return None
    import numpy as np

    logarithms = np.log(x), np.log(y)
    if len(x) == 2:
        return Fit(of=of, exponent=float(np.polyfit(*logarithms, 1)[0]), error=None, points=2)
    (exponent, _), covariance = np.polyfit(*logarithms, 1, cov=True)
    return Fit(of=of, exponent=float(exponent), error=float(np.sqrt(covariance[0, 0])), points=len(x))
