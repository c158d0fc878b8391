"""Claims of the DeepCache paper (arXiv 2312.00858) and of offcut, put to a run; a confidence interval decides."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from ..schema.quality import Claim
from ..stats import Estimate, figure_of, mean_of
from . import metrics, plan
from .plan import QualitySetting
from .scores import Scored

Scores = Mapping[QualitySetting, Scored]
Compare = Callable[[Scored, Scored], Estimate]
Goal = Literal["matches", "beats"]

FEWEST = 200
"""Pictures of a row below which nothing is claimed: of so many, all alike, an event of 1.5 % may still be absent."""

ACCURACY_MARGIN = 0.02
"""Share of prompts by which a row may fall behind and still match."""

TUNED_MARGIN = 0.005
"""The same for a tuned schedule against the uncached run."""

FRECHET_MARGIN = 0.1
"""The same for the Fréchet distance, as a share of the other's."""

_RESAMPLES = 200  # of a Fréchet distance; each costs an eigenvalue problem


def claims(
    settings: Sequence[QualitySetting], scores: Scores, features: metrics.Values, ratios: Mapping[str, float]
) -> list[Claim]:
    """Those that the settings allow: caching against fewer steps for each sampler, quad against uniform, and forecasts.

    Args:
        features: of the drawn scenes, (N, D).
    """
    frechet = _frechet_difference(features)
    found = []
    for sampler in dict.fromkeys(setting.sampler for setting in settings):
        plain = [row for row in settings if row.sampler == sampler and row.cut == plan.CUTS[0] and _plain(row)]
        pairs = [(row, other) for row in plain if (other := plan.counterpart(row, settings, ratios))]
        if pairs:
            how = f"{sampler}: at the latency of fewer steps, uniform caching"
            found += [
                _claim(f"{how} stays nearer to the uncached picture", pairs, scores, _psnr, "beats", 0.0, "dB PSNR"),
                _claim(f"{how} obeys as many prompts", pairs, scores, _right, "matches", ACCURACY_MARGIN, "of prompts"),
                _claim(
                    f"{how} has no larger Fréchet distance", pairs, scores, frechet, "matches", FRECHET_MARGIN, "of it"
                ),
            ]
        for quad in (row for row in settings if row.sampler == sampler and (row.schedule or "").startswith("quad:10")):
            uniform = next((row for row in plain if row.interval == 10), None)
            if uniform and quad.cut == uniform.cut:
                pair = [(quad, uniform)]
                how = f"{sampler}: at N = 10, the non-uniform schedule beats the uniform one"
                found += [
                    _claim(f"{how} in PSNR", pair, scores, _psnr, "beats", 0.0, "dB"),
                    _claim(f"{how} in Fréchet distance", pair, scores, frechet, "beats", 0.0, "of it"),
                ]
        found += _of_forecasts(sampler, settings, scores, ratios)
        found += _of_tuned(sampler, settings, scores, ratios)
    return found


def _of_forecasts(
    sampler: str, settings: Sequence[QualitySetting], scores: Scores, ratios: Mapping[str, float]
) -> list[Claim]:
    """offcut's own: a forecast against reuse with the same schedule, and against fewer steps."""
    rows = [row for row in settings if row.sampler == sampler and row.damping]
    reused = [(row, twin) for row in rows if (twin := replace(row, damping=None)) in settings]
    fewer = [(row, other) for row in rows if (other := plan.counterpart(row, settings, ratios))]
    found = []
    for pairs, than in ((reused, "reuse with the same schedule"), (fewer, "fewer steps at the same latency")):
        if pairs:
            text = f"{sampler}: a forecast of the cached features stays nearer to the uncached picture than {than}"
            found.append(_claim(text, pairs, scores, _psnr, "beats", 0.0, "dB PSNR"))
    return found


def _of_tuned(
    sampler: str, settings: Sequence[QualitySetting], scores: Scores, ratios: Mapping[str, float]
) -> list[Claim]:
    """offcut's own: tuned schedules against each other way that is as fast or less, and against the uncached run."""
    rows = [row for row in settings if row.sampler == sampler and row.bundle_schedule is not None]
    if not rows:
        return []

    def beside(row: QualitySetting, ways: Sequence[QualitySetting]) -> list[tuple[QualitySetting, QualitySetting]]:
        """The way whose cost is next to the row's from above, or else that from below."""
        ordered = sorted(ways, key=lambda way: way.cost(ratios))
        above = [way for way in ordered if way.cost(ratios) >= row.cost(ratios) - 1e-9]
        return [(row, (above or ordered[-1:])[0])] if ordered else []

    own = [row for row in settings if row.sampler == sampler and row.bundle_schedule is None]
    others = {
        "uniform reuse": [row for row in own if _plain(row)],
        "reuse after a warm-up": [row for row in own if (row.schedule or "").endswith("warmup=2") and not row.damping],
        "CacheQuant's schedule": [row for row in own if (row.schedule or "").startswith("steps:")],
        "uncached runs of fewer steps": [row for row in own if row.fewer],
    }
    found = []
    for than, ways in others.items():
        if pairs := [pair for row in rows for pair in beside(row, ways)]:
            text = f"{sampler}: tuned schedules stay nearer to the uncached picture than {than}"
            found.append(_claim(text, pairs, scores, _psnr, "beats", 0.0, "dB PSNR"))
    whole = [(row, plan.reference(row, settings)) for row in rows]
    text = f"{sampler}: tuned schedules obey as many prompts as the uncached run"
    return [*found, _claim(text, whole, scores, _right, "matches", TUNED_MARGIN, "of prompts")]


def _plain(setting: QualitySetting) -> bool:
    """Whether it is a uniform schedule without warm-up, as the paper compares."""
    return setting.schedule == f"uniform:{setting.interval}" and setting.damping is None


def _claim(
    text: str,
    pairs: Sequence[tuple[QualitySetting, QualitySetting]],
    scores: Scores,
    compare: Compare,
    goal: Goal,
    margin: float,
    unit: str,
) -> Claim:
    """Agrees where every pair does, disagrees where one does, else cannot be told; nor from fewer than `FEWEST`."""
    verdicts, evidence = [], []
    for first, second in pairs:
        advantage = compare(scores[first], scores[second])
        enough = len(scores[first].right) >= FEWEST
        verdicts.append(verdict(advantage, goal, margin) if enough else None)
        word = {True: "agrees", False: "disagrees", None: "cannot tell"}[verdicts[-1]]
        evidence.append(
            f"{first.name} over {second.name}: {advantage.mean:+.3g} {unit} "
            f"[{advantage.low:+.3g}, {advantage.high:+.3g}], {word}"
        )
    agrees = False if False in verdicts else None if None in verdicts else True
    tolerated = f"; a lag of {margin:g} counts as a match" if goal == "matches" else ""
    return Claim(text=text, agrees=agrees, evidence="; ".join(evidence) + tolerated)


def verdict(advantage: Estimate, goal: Goal, margin: float) -> bool | None:
    """Whether the first is better ("beats") or no more than a margin worse ("matches"), by the 95 % interval.

    It fails to beat where it is worse for certain, and to match where it is worse for certain and not within the margin
    for certain. Otherwise the pictures are too few to tell.
    """
    holds = advantage.low > 0 if goal == "beats" else advantage.low >= -margin
    return True if holds else False if advantage.high < 0 else None


def _psnr(first: Scored, second: Scored) -> Estimate:
    return mean_of(first.psnr - second.psnr)


def _right(first: Scored, second: Scored) -> Estimate:
    return mean_of(first.right - second.right)


def _frechet_difference(drawn: metrics.Values) -> Compare:
    def compare(first: Scored, second: Scored) -> Estimate:
        """By how much the first's distance is smaller, as a share of the second's; prompts are resampled together."""

        def advantage(rows: Any) -> float:
            theirs = metrics.frechet(second.features[rows], drawn[rows])
            return 1 - metrics.frechet(first.features[rows], drawn[rows]) / theirs

        return figure_of(advantage, len(drawn), resamples=_RESAMPLES)

    return compare
