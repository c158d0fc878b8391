"""When requests come: processes by their mean rate, or the seconds of a file."""

from __future__ import annotations

import random
from pathlib import Path

from ...errors import UserError

PROCESSES = ("poisson", "uniform", "burst")
_BURST = 8


def arrivals(process: str, rate: float, count: int, seed: int = 0) -> list[float]:
    """Seconds at which requests come, from 0 on, in order.

    Args:
        process: ``poisson``: independent of one another; ``uniform``: one after the other at the same distance;
            ``burst``: eight at once, the bursts a Poisson process.
        rate: requests a second, on average.

    Raises:
        UserError: there is no such process, or the rate is not above 0.
    """
    if process not in PROCESSES:
        raise UserError(f"there is no arrival process {process!r}: choose {', '.join(PROCESSES)}, or give a trace")
    if not rate > 0:
        raise UserError(f"requests come at a rate above 0 a second, not {rate:g}")
    if process == "uniform":
        return [place / rate for place in range(count)]
    draw = random.Random(seed)
    size = _BURST if process == "burst" else 1
    times: list[float] = []
    moment = 0.0
    while len(times) < count:
        moment += draw.expovariate(rate / size)
        times += [moment] * size
    return times[:count]


def trace(path: Path) -> list[float]:
    """The arrivals of a file with one number of seconds a line, in any order; the first comes at 0.

    Raises:
        UserError: it cannot be read, or a line is no number.
    """
    try:
        lines = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the trace {path}: {error}; give a text file of seconds") from error
    try:
        times = sorted(float(line) for line in lines)
    except ValueError as error:
        raise UserError(f"the trace {path} holds something else than seconds, one a line: {error}") from error
    if not times or times[0] != times[0] or times[-1] - times[0] == float("inf"):
        raise UserError(f"the trace {path} holds no arrivals: give seconds, one a line")
    return [moment - times[0] for moment in times]
