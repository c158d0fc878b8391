"""For every call and every pair of full calls before it: the best way to predict its feature, on images held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..generation.forecast import Coefficients
from .moments import Moments, Ridge

DAMPINGS = (0.25, 0.5, 0.75, 1.0)
RIDGES = (Ridge(1e-3), Ridge(1e-2), Ridge(1e-1), Ridge(1e-2, slopes=False))


@dataclass(frozen=True)
class Predictor:
    """How a shallow call predicts.

    Attributes:
        kind: ``reuse``, ``forecast 0.5`` or ``fit ...``.
        error: mean square of what it misses on the held-out images, relative to the feature's own.
        coefficients: for each feature; None is reuse.
    """

    kind: str
    error: float
    coefficients: Mapping[str, Coefficients] | None


class Predictors:
    """Chooses among reuse, damped extrapolation and fitted coefficients.

    Args:
        fitted: moments of the images that coefficients are fitted to, by feature.
        held_out: of those that decide between them.
        kinds: what may be chosen beside reuse: ``forecast`` and ``fit``.
        reference: whether the moments have a reference's calls behind those that predictions are made from, and
            these are to be predicted.
    """

    def __init__(
        self,
        fitted: Mapping[str, Moments],
        held_out: Mapping[str, Moments],
        kinds: Sequence[str] = ("forecast", "fit"),
        *,
        reference: bool = False,
    ) -> None:
        self._fitted, self._held_out, self._kinds = fitted, held_out, kinds
        columns = next(iter(fitted.values())).sums.shape[1]
        self.calls = columns // 2 if reference else columns
        self._behind = self.calls if reference else 0
        self._power = {
            call: max(sum(float(each.power(call + self._behind).sum()) for each in held_out.values()), 1e-30)
            for call in range(self.calls)
        }
        self._errors: dict[tuple[int, int | None], torch.Tensor] = {}

    def errors(self, last: int, before: int | None, until: int) -> torch.Tensor:
        """The least error that any predictor has at each of the calls after ``last`` and before ``until``."""
        known = self._errors.get((last, before))
        if known is None or len(known) < until - last - 1:
            candidates = self._candidates(range(last + 1, until), last, before)
            known = torch.stack([errors for _, errors, _ in candidates]).amin(0)
            self._errors[last, before] = known
        return known[: until - last - 1]

    def reuse_errors(self, last: int, until: int) -> torch.Tensor:
        """The errors of plain reuse."""
        calls = range(last + 1, until)
        total = sum(
            (each.errors(self._wanted(calls), last, last, Coefficients()) for each in self._held_out.values()),
            torch.zeros(len(calls), dtype=torch.float64),
        )
        return total / torch.tensor([self._power[call] for call in calls], dtype=torch.float64)

    def best(self, call: int, last: int, before: int | None) -> Predictor:
        """The one with the least error."""
        candidates = self._candidates(range(call, call + 1), last, before)
        kind, errors, made = min(candidates, key=lambda each: float(each[1][0]))
        chosen = None if made is None else {name: _column(each, 0) for name, each in made.items()}
        return Predictor(kind, float(errors[0]), chosen)

    def _candidates(
        self, calls: range, last: int, before: int | None
    ) -> list[tuple[str, torch.Tensor, dict[str, Coefficients] | None]]:
        found: list[tuple[str, torch.Tensor, dict[str, Coefficients] | None]] = []
        other, wanted = last if before is None else before, self._wanted(calls)
        scales = torch.tensor([self._power[call] for call in calls], dtype=torch.float64)

        def judged(made: Mapping[str, Coefficients]) -> torch.Tensor:
            parts = [each.errors(wanted, last, other, made[name]) for name, each in self._held_out.items()]
            return torch.stack(parts).sum(0) / scales

        found.append(("reuse", judged(dict.fromkeys(self._held_out, Coefficients())), None))
        if "forecast" in self._kinds and before is not None:
            ahead = torch.tensor([(call - last) / (last - before) for call in calls], dtype=torch.float64)
            for damping in DAMPINGS:
                along = Coefficients(slope=(damping * ahead)[None, :])
                extrapolated = dict.fromkeys(self._held_out, along)
                found.append((f"forecast {damping:g}", judged(extrapolated), extrapolated))
        if "fit" in self._kinds:
            for ridge in RIDGES:
                if ridge.slopes and before is None:
                    continue
                made = {name: ridge.fit(each, wanted, last, other) for name, each in self._fitted.items()}
                kind = f"fit {ridge.strength:g}" + ("" if ridge.slopes else ", no slope")
                found.append((kind, judged(made), made))
        return found

    def _wanted(self, calls: range) -> range:
        """Where the moments have the truth of these calls."""
        return range(calls.start + self._behind, calls.stop + self._behind)


def by_cut(
    cuts: Mapping[str, Sequence[str]],
    fitted: Mapping[str, Moments],
    held_out: Mapping[str, Moments],
    kinds: Sequence[str] = ("forecast", "fit"),
    *,
    reference: bool = False,
) -> dict[str, Predictors]:
    """For each cut those of its features; other arguments as ``Predictors``.

    Args:
        cuts: with the names of their features.
    """
    return {
        cut: Predictors(
            {name: fitted[name] for name in names},
            {name: held_out[name] for name in names},
            kinds,
            reference=reference,
        )
        for cut, names in cuts.items()
    }


def _column(coefficients: Coefficients, index: int) -> Coefficients:
    """One call's of coefficients for several: numbers, or tensors [channels]."""

    def one(value: float | torch.Tensor) -> float | torch.Tensor:
        if not isinstance(value, torch.Tensor):
            return value
        column = value[:, index]
        return float(column[0]) if len(column) == 1 else column.clone()

    return Coefficients(one(coefficients.scale), one(coefficients.slope), one(coefficients.shift))
