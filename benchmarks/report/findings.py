"""The rows with which other rows are compared, and the Pareto front."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..schema.latency import Contestant, Latency
from ..schema.quality import QualityRow

OURS = "offcut"


def measured(rows: Iterable[Contestant]) -> list[Contestant]:
    """Return the rows with a measured loop."""
    return [row for row in rows if row.loops]


def base_of(rows: Sequence[Contestant]) -> Contestant | None:
    """Return the base row of ratios: eager diffusers in fp32, or else another diffusers row or uncached row."""
    plain = [row for row in rows if row.loops and not row.caching]
    for fits in (
        lambda row: row.name == "diffusers eager fp32",
        lambda row: row.family == "diffusers" and row.precision == "fp32",
        lambda row: row.family == "diffusers",
        lambda row: row.family != OURS,
        lambda row: True,
    ):
        if row := next(filter(fits, plain), None):
            return row
    return None


def fastest(rows: Iterable[Contestant], fits: Callable[[Contestant], bool]) -> Contestant | None:
    """Return the row with the shortest median loop among those that fit."""
    return min((row for row in rows if row.loops and fits(row)), key=lambda row: row.loop or 0.0, default=None)


@dataclass(frozen=True)
class Rivals:
    """The rows with which the other rows are compared; None where there is no such row."""

    base: Contestant | None
    peer: Contestant | None
    caching_peer: Contestant | None

    @classmethod
    def of(cls, latency: Latency, precision: str | None = None) -> Rivals:
        """Return the base row and the fastest peers without and with caching; ``precision`` restricts the peers."""
        peers = [row for row in latency.contestants if row.family != OURS and precision in (None, row.precision)]
        return cls(
            base_of(latency.contestants),
            fastest(peers, lambda row: not row.caching),
            fastest(peers, lambda row: bool(row.caching)),
        )


def uncached_twin(latency: Latency, row: Contestant) -> Contestant | None:
    """Return the fastest uncached row of the same engine and precision, preferably of the same family."""
    uncached = [other for other in measured(latency.contestants) if not other.caching]
    same = [other for other in uncached if (other.engine, other.precision) == (row.engine, row.precision)]
    return min(same, key=lambda other: (other.family != row.family, other.loop), default=None)


def gain(row: Contestant, over: Contestant) -> float | None:
    """Return how many times faster a row is than another: the median of the rounds' ratios; None if not measured."""
    ratios = [theirs / ours for ours, theirs in zip(row.loops, over.loops, strict=False)]
    return statistics.median(ratios) if ratios else None


def reference(rows: Sequence[QualityRow], row: QualityRow) -> QualityRow | None:
    """Return the uncached row of the same sampler with as many steps, or else with the most steps."""
    uncached = [other for other in rows if other.kind == "uncached" and other.sampler == row.sampler]
    return max(uncached, key=lambda other: (other.steps == row.steps and bool(row.schedule), other.steps), default=None)


def speed(rows: Sequence[QualityRow], row: QualityRow) -> float | None:
    """Return how many times cheaper a row is than its reference row, by the cost in full calls."""
    against = reference(rows, row)
    return against.cost / row.cost if against and row.cost > 0 else None


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points on the Pareto front, by falling first coordinate.

    More is better in both coordinates. Of equal points only the first is on the front.
    """
    order = sorted(range(len(points)), key=lambda index: (-points[index][0], -points[index][1], index))
    best, indices = float("-inf"), []
    for index in order:
        if points[index][1] > best:
            best = points[index][1]
            indices.append(index)
    return indices
