"""Figures as text with a suitable number of digits."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import PurePath

from ..stats import Estimate
from .blocks import NONE, Pair

TIMES = "\N{MULTIPLICATION SIGN}"


def digits(value: float | None, significant: int = 3) -> str:
    """Return ``1234.5`` as ``1234`` and ``0.012345`` as ``0.0123``; there is no exponent from 1e-6 to 1e9."""
    if value is None:
        return NONE
    if value == 0:
        return "0"
    if not 1e-6 <= abs(value) < 1e9:
        return f"{value:.{significant}g}"
    return f"{value:.{max(significant - 1 - math.floor(math.log10(abs(value))), 0)}f}"


def fixed(value: float | None, places: int) -> str:
    """Return a number with a fixed number of decimal places."""
    return NONE if value is None else f"{value:.{places}f}"


def seconds(value: float | None) -> str:
    """Return a duration in the unit that gives two or three digits before the point."""
    if value is None:
        return NONE
    if value >= 120:
        return f"{value / 60:.1f} min"
    return f"{digits(value)} s" if value >= 1 else f"{digits(value * 1000)} ms"


def median_seconds(values: Sequence[float]) -> str:
    """Return the median of durations as text."""
    return seconds(statistics.median(values)) if values else NONE


def seconds_range(values: Sequence[float]) -> Pair | str:
    """Return the median and the range of durations as text."""
    if not values:
        return NONE
    return Pair(seconds(statistics.median(values)), f"{seconds(min(values))} to {seconds(max(values))}")


def times(value: float | None) -> str:
    """Return a ratio as ``1.34×``."""
    if value is None:
        return NONE
    return f"{value:.2f}{TIMES}" if value < 10 else f"{digits(value)}{TIMES}"


def percent(share: float | None, places: int = 0) -> str:
    """Return a share from 0 to 1 in percent."""
    return NONE if share is None else f"{100 * share:.{places}f} %"


def size(value: int | None) -> str:
    """Return a number of bytes in decimal units."""
    if value is None:
        return NONE
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= limit:
            return f"{digits(value / limit)} {unit}"
    return f"{value} bytes"


def interval(value: Estimate | None, places: int = 1, scale: float = 1, sign: bool = False) -> Pair | str:
    """Return a mean with its interval, ``35.1`` and ``[34.2, 36.0]``."""
    if value is None:
        return NONE
    form = f"{'+' if sign else ''}z.{places}f"  # z: no minus before a zero
    mean, low, high = (scale * bound for bound in (value.mean, value.low, value.high))
    return Pair(f"{mean:{form}}", f"[{low:{form}},\N{NO-BREAK SPACE}{high:{form}}]")


def model(name: str) -> str:
    """Return a model's name; for a local directory its last part."""
    return PurePath(name).name if PurePath(name).is_absolute() else name


def count(number: int, noun: str) -> str:
    """Return ``1 round`` or ``3 rounds``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def listed(names: Sequence[str]) -> str:
    """Return ``a, b and c``."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""
