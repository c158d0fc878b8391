"""Figures in words, to as many digits as they deserve."""

from __future__ import annotations

import math
from pathlib import PurePath

from ..stats import Estimate
from .markup import Markup, join, tag

NONE, TIMES = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"


def digits(value: float, significant: int = 3) -> str:
    """``1234.5`` as ``1235``, ``0.012345`` as ``0.0123``: never an exponent between a millionth and a billion."""
    if value == 0:
        return "0"
    if not 1e-6 <= abs(value) < 1e9:
        return f"{value:.{significant}g}"
    return f"{value:.{max(significant - 1 - math.floor(math.log10(abs(value))), 0)}f}"


def seconds(value: float | None) -> str:
    """With the unit that gives two or three digits before the point."""
    if value is None:
        return NONE
    if value >= 120:
        return f"{value / 60:.1f} min"
    if value >= 1:
        return f"{digits(value)} s"
    return f"{digits(value * 1000)} ms"


def times(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value:.2f}{TIMES}" if value < 10 else f"{digits(value)}{TIMES}"


def percent(share: float, places: int = 0) -> str:
    return f"{100 * share:.{places}f} %"


def size(value: int | None) -> str:
    """Bytes, as disks are sold."""
    if value is None:
        return NONE
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= limit:
            return f"{digits(value / limit)} {unit}"
    return f"{value} bytes"


def estimate(value: Estimate | None, places: int = 1, scale: float = 1, sign: bool = False) -> str:
    """``35.1 [34.2, 36.0]``."""
    if value is None:
        return NONE
    form = f"{'+' if sign else ''}z.{places}f"  # z: no minus before a zero
    mean, low, high = (scale * each for each in (value.mean, value.low, value.high))
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def stacked(value: Estimate | None, places: int = 1, scale: float = 1, sign: bool = False) -> Markup | str:
    """The mean above its interval, for a narrow column."""
    if value is None:
        return NONE
    mean, _, interval = estimate(value, places, scale, sign).partition(" ")
    return join(mean, tag("small", interval))


def model(name: str) -> str:
    """A model's name; of a local directory its last part."""
    return PurePath(name).name if PurePath(name).is_absolute() else name


def listed(words: list[str]) -> str:
    """``a, b and c``."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""
