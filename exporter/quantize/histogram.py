"""Histograms of a tensor's values over many calls, in constant memory, and the range to quantize the tensor in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

METHODS = ("minmax", "percentile", "mse")
BINS = 4096
_PERCENTILE = 99.99
# Fractions of the whole range that ``mse`` tries.
_FRACTIONS = tuple(count / 40 for count in range(40, 7, -1))


@dataclass(frozen=True)
class Range:
    """Range that a tensor is quantized in; values outside are clipped. ``low <= 0 <= high``."""

    low: float
    high: float

    @property
    def largest(self) -> float:
        return max(-self.low, self.high)


class Histogram:
    """Counts of values in equal bins over ``[-limit, limit]``. The limit doubles when a value is outside.

    Bins then merge in pairs, so the counts are the same as if the bins had had this width from the start.

    Attributes:
        low, high: smallest and largest value so far, exactly.
    """

    def __init__(self) -> None:
        import numpy as np

        self.low, self.high = 0.0, 0.0
        self._limit = 2.0**-20
        self._counts: npt.NDArray[np.int64] = np.zeros(BINS, np.int64)

    def add(self, values: npt.NDArray[np.float32], low: float, high: float) -> None:
        """Count a call's values.

        Args:
            values: values of the tensor or a sample of them, in any shape.
            low, high: minimum and maximum of the whole tensor.

        Raises:
            ValueError: a value is not finite.
        """
        import numpy as np

        if not (np.isfinite(low) and np.isfinite(high)):
            raise ValueError("a value is not finite")
        self.low, self.high = min(self.low, low), max(self.high, high)
        while max(-low, high) >= self._limit:
            self._double_limit()
        bins = np.floor((values.reshape(-1) + self._limit) * (BINS / 2 / self._limit)).astype(np.int64)
        self._counts += np.bincount(np.clip(bins, 0, BINS - 1), minlength=BINS)

    def range(self, method: str, levels: int = 256, symmetric: bool = False) -> Range:
        """Return the range to quantize in.

        Args:
            method: ``minmax``, all values; ``percentile``, the middle 99.99 %; ``mse``, the range with the least mean
                squared error of rounding and clipping together.
            levels: number of quantized levels, for ``mse``.
            symmetric: whether the quantized range is symmetric around zero, for ``mse``.
        """
        whole = Range(min(self.low, 0.0), max(self.high, 0.0))
        if method == "minmax" or not self._counts.any():
            return whole
        if method == "percentile":
            return self._percentile(whole)
        candidates = [Range(whole.low * fraction, whole.high * fraction) for fraction in _FRACTIONS]
        return min(candidates, key=lambda candidate: self.error(candidate, levels, symmetric))

    def error(self, within: Range, levels: int = 256, symmetric: bool = False) -> float:
        """Return the mean squared error of quantization to this many levels in this range."""
        import numpy as np

        low, high = (-within.largest, within.largest) if symmetric else (within.low, within.high)
        step = (high - low) / (levels - 1)
        if not step:
            return 0.0
        values = self._centres()
        rounded = np.clip(np.rint((values - low) / step), 0, levels - 1) * step + low
        return float(np.average((values - rounded) ** 2, weights=self._counts))

    def _percentile(self, whole: Range) -> Range:
        import numpy as np

        cumulative = np.cumsum(self._counts) / self._counts.sum()
        outside = (1 - _PERCENTILE / 100) / 2
        width = 2 * self._limit / BINS
        low = np.searchsorted(cumulative, outside) * width - self._limit
        high = (np.searchsorted(cumulative, 1 - outside) + 1) * width - self._limit
        return Range(max(min(float(low), 0.0), whole.low), min(max(float(high), 0.0), whole.high))

    def _double_limit(self) -> None:
        import numpy as np

        self._limit *= 2
        merged = self._counts.reshape(-1, 2).sum(axis=1)
        self._counts = np.zeros_like(self._counts)
        self._counts[BINS // 4 : 3 * BINS // 4] = merged

    def _centres(self) -> npt.NDArray[np.float64]:
        import numpy as np

        return (np.arange(BINS, dtype=np.float64) + 0.5) * (2 * self._limit / BINS) - self._limit
