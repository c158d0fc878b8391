"""Claims of the DeepCache paper (arXiv 2312.00858) and of offcut, tested by a run with confidence intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from ..schema.quality import Claim
from ..stats import Estimate, figure_of, mean_of
from . import metrics, plan
from .plan import QualitySetting
from .scores import Scored

Scores = Mapping[QualitySetting, Scored]
Pairs = Sequence[tuple[QualitySetting, QualitySetting]]
Goal = Literal["matches", "beats"]

FEWEST = 200
"""Images of a row below which nothing is claimed: in 200 equal images an event of 1.5 % may still be absent."""

ACCURACY_MARGIN = 0.02
"""Share of prompts by which a row may be worse and still match."""

TUNED_MARGIN = 0.005
"""The same for a tuned schedule compared with the uncached run."""

FRECHET_MARGIN = 0.1
"""The same for the Fréchet distance, as a share of the other's."""

_RESAMPLES = 200  # of a Fréchet distance; each costs an eigenvalue problem


@dataclass(frozen=True)
class Measure:
    """How a claim compares two rows.

    Attributes:
        advantage: of the first over the second.
        margin: by which the first may be worse where the goal is to match.
    """

    advantage: Callable[[Scored, Scored], Estimate]
    unit: str
    goal: Goal = "beats"
    margin: float = 0.0


PSNR = Measure(lambda first, second: mean_of(first.psnr - second.psnr), "dB PSNR")
RIGHT = Measure(lambda first, second: mean_of(first.right - second.right), "of prompts", "matches", ACCURACY_MARGIN)


def claims(
    settings: Sequence[QualitySetting], scores: Scores, features: metrics.Values, ratios: Mapping[str, float]
) -> list[Claim]:
    """Return the claims that the settings allow: of caching and quad schedules, of forecasts, of tuned schedules.

    Args:
        features: judge features of rendered scenes, (N, D).
    """
    frechet = Measure(partial(_frechet_advantage, features), "of it", "matches", FRECHET_MARGIN)
    found: list[tuple[str, Pairs, Measure]] = []
    for sampler in dict.fromkeys(setting.sampler for setting in settings):
        own = [row for row in settings if row.sampler == sampler]
        plain = [row for row in own if row.cut == plan.CUTS[0] and _plain(row)]
        pairs = [(row, other) for row in plain if (other := plan.counterpart(row, settings, ratios))]
        uniform = f"{sampler}: at the latency of fewer steps, uniform caching"
        found += [
            (f"{uniform} stays nearer to the uncached image", pairs, PSNR),
            (f"{uniform} obeys as many prompts", pairs, RIGHT),
            (f"{uniform} has no larger Fréchet distance", pairs, frechet),
        ]
        tenth = next((row for row in plain if row.interval == 10), None)
        for quad in (row for row in own if (row.schedule or "").startswith("quad:10")):
            if tenth and quad.cut == tenth.cut:
                better = f"{sampler}: at N = 10, the non-uniform schedule beats the uniform one"
                found += [
                    (f"{better} in PSNR", [(quad, tenth)], PSNR),
                    (f"{better} in Fréchet distance", [(quad, tenth)], replace(frechet, goal="beats", margin=0.0)),
                ]
        found += _of_forecasts(sampler, own, ratios)
        found += _of_tuned(sampler, own, ratios)
    return [_claim(text, pairs, scores, measure) for text, pairs, measure in found if pairs]


def _of_forecasts(
    sampler: str, own: Sequence[QualitySetting], ratios: Mapping[str, float]
) -> list[tuple[str, Pairs, Measure]]:
    """offcut's own claims: a forecast compared with reuse of the same schedule, and with fewer steps."""
    rows = [row for row in own if row.damping]
    reused = [(row, twin) for row in rows if (twin := replace(row, damping=None)) in own]
    fewer = [(row, other) for row in rows if (other := plan.counterpart(row, own, ratios))]
    text = f"{sampler}: a forecast of the cached features stays nearer to the uncached image than"
    return [
        (f"{text} reuse with the same schedule", reused, PSNR),
        (f"{text} fewer steps at the same latency", fewer, PSNR),
    ]


def _of_tuned(
    sampler: str, own: Sequence[QualitySetting], ratios: Mapping[str, float]
) -> list[tuple[str, Pairs, Measure]]:
    """offcut's own claims: tuned schedules compared with every other way at their cost, and with the uncached run."""
    tuned = [row for row in own if row.bundle_schedule is not None]
    if not tuned:
        return []

    def matched(ways: Sequence[QualitySetting]) -> Pairs:
        """Pair each row with the cheapest way that costs at least as much, or else with the dearest way."""
        ordered = sorted(ways, key=lambda way: way.cost(ratios))
        dearer = [[way for way in ordered if way.cost(ratios) >= row.cost(ratios) - 1e-9] for row in tuned]
        return [(row, (ways or ordered[-1:])[0]) for row, ways in zip(tuned, dearer, strict=True)] if ordered else []

    others = [row for row in own if row.bundle_schedule is None]
    ways = {
        "uniform reuse": [row for row in others if _plain(row)],
        "reuse after a warm-up": [
            row for row in others if (row.schedule or "").endswith("warmup=2") and not row.damping
        ],
        "CacheQuant's schedule": [row for row in others if (row.schedule or "").startswith("steps:")],
        "uncached runs of fewer steps": [row for row in others if row.fewer],
    }
    nearer = f"{sampler}: tuned schedules stay nearer to the uncached image than"
    obey = f"{sampler}: tuned schedules obey as many prompts as the uncached run"
    return [
        *((f"{nearer} {name}", matched(rows), PSNR) for name, rows in ways.items()),
        (obey, [(row, plan.reference(row, own)) for row in tuned], replace(RIGHT, margin=TUNED_MARGIN)),
    ]


def _plain(setting: QualitySetting) -> bool:
    """Return whether this is a uniform schedule without warm-up, as the paper compares."""
    return setting.schedule == f"uniform:{setting.interval}" and setting.damping is None


def _claim(text: str, pairs: Pairs, scores: Scores, measure: Measure) -> Claim:
    """Return a claim that agrees if every pair does, and disagrees if one does; else the run cannot tell."""
    verdicts, evidence = [], []
    for first, second in pairs:
        advantage = measure.advantage(scores[first], scores[second])
        enough = len(scores[first].right) >= FEWEST
        verdicts.append(verdict(advantage, measure.goal, measure.margin) if enough else None)
        word = {True: "agrees", False: "disagrees", None: "cannot tell"}[verdicts[-1]]
        evidence.append(
            f"{first.name} over {second.name}: {advantage.mean:+.3g} {measure.unit} "
            f"[{advantage.low:+.3g}, {advantage.high:+.3g}], {word}"
        )
    agrees = False if False in verdicts else None if None in verdicts else True
    tolerated = f"; worse by up to {measure.margin:g} counts as a match" if measure.goal == "matches" else ""
    return Claim(text=text, agrees=agrees, evidence="; ".join(evidence) + tolerated)


def verdict(advantage: Estimate, goal: Goal, margin: float) -> bool | None:
    """Return whether the first row is better ("beats") or at most a margin worse ("matches"), by the 95 % interval.

    A row fails to beat if it is certainly worse. It fails to match if it is certainly worse and not certainly within
    the margin. Otherwise the images are too few to tell, and the verdict is None.
    """
    holds = advantage.low > 0 if goal == "beats" else advantage.low >= -margin
    return True if holds else False if advantage.high < 0 else None


def _frechet_advantage(rendered: metrics.Values, first: Scored, second: Scored) -> Estimate:
    """Return by how much the first's distance is smaller, as a share of the second's; prompts are resampled."""

    def advantage(rows: Any) -> float:
        theirs = metrics.frechet(second.features[rows], rendered[rows])
        return 1 - metrics.frechet(first.features[rows], rendered[rows]) / theirs

    return figure_of(advantage, len(rendered), resamples=_RESAMPLES)
