"""Fits of feature predictions: the best prediction of a feature for every call and pair of full calls before it.

``FeatureMoments`` holds sums of products of a feature at all pairs of calls, which is enough for every least-squares
fit between them. A feature of Stable Diffusion 1.5 at 512x512 is 10 MB a call; its moments over 50 calls are 6 MB,
for any number of images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..generation.forecast import Coefficients

_CHANNELS_AT_ONCE = 64
"""Number of channels whose products are computed at once; it limits the memory of their fp64 copies."""


class FeatureMoments:
    """Sums of products of one feature over the calls of a generation, for each channel.

    Args:
        calls: number of calls of a generation.
        channels: number of channels of the feature.
    """

    def __init__(self, calls: int, channels: int) -> None:
        self.count = 0
        """Number of positions that were added: pixels of the feature, over all images."""
        self.sums = torch.zeros(channels, calls, dtype=torch.float64)
        self.products = torch.zeros(channels, calls, calls, dtype=torch.float64)
        self.distances = torch.zeros(calls, calls, dtype=torch.float64)
        """L1 distances of the feature between calls, summed over channels and generations."""

    def add(self, values: torch.Tensor) -> None:
        """Add one generation's values [channels, calls, positions].

        The sums are fp64, since errors are small differences of large sums.
        """
        self.count += values.shape[-1]
        for start in range(0, values.shape[0], _CHANNELS_AT_ONCE):
            part = slice(start, start + _CHANNELS_AT_ONCE)
            doubles = values[part].double()
            self.sums[part] += doubles.sum(-1)
            self.products[part] += doubles @ doubles.mT
        flat = values.transpose(0, 1).flatten(1).float()
        self.distances += torch.cdist(flat, flat, p=1).double()

    def first_calls(self, calls: int) -> FeatureMoments:
        """Return the moments of the first calls only."""
        moments = FeatureMoments(0, 0)
        moments.count, moments.sums = self.count, self.sums[:, :calls]
        moments.products, moments.distances = self.products[:, :calls, :calls], self.distances[:calls, :calls]
        return moments

    def power(self, call: int) -> torch.Tensor:
        """Return the mean square of the feature at a call: [channels]."""
        return self.products[:, call, call] / max(self.count, 1)

    def errors(self, calls: range, last: int, before: int, coefficients: Coefficients) -> torch.Tensor:
        """Return the mean squared error of a prediction at each of these calls, summed over channels: [calls].

        Args:
            calls: calls to predict.
            last, before: the last two full calls.
            coefficients: each a number or a tensor [channels, calls]; for a single call also a tensor [channels].
        """
        scale, slope, shift = (
            _columns(value, len(self.sums), len(calls))
            for value in (coefficients.scale, coefficients.slope, coefficients.shift)
        )
        last_factor, before_factor = scale + slope, -slope
        targets = slice(calls.start, calls.stop)
        products, sums = self.products, self.sums
        square = products[:, targets, targets].diagonal(dim1=1, dim2=2)
        error = (
            square
            + last_factor**2 * products[:, last, last, None]
            + before_factor**2 * products[:, before, before, None]
            + self.count * shift**2
            - 2 * last_factor * products[:, targets, last]
            - 2 * before_factor * products[:, targets, before]
            - 2 * shift * sums[:, targets]
            + 2 * last_factor * before_factor * products[:, last, before, None]
            + 2 * last_factor * shift * sums[:, last, None]
            + 2 * before_factor * shift * sums[:, before, None]
        )
        return error.sum(0).clamp(min=0) / max(self.count, 1)


@dataclass(frozen=True)
class Ridge:
    """Ridge regression of a feature on its values at the last two full calls, with a penalty towards plain reuse.

    Attributes:
        strength: penalty as a share of each regressor's variance; 0 for plain least squares.
        slopes: whether the difference of the last two full calls is a regressor, too. CacheQuant's correction has
            none.
    """

    strength: float
    slopes: bool = True

    def fit(self, moments: FeatureMoments, calls: range, last: int, before: int) -> Coefficients:
        """Return the coefficients [channels, calls] that predict these calls best from two full calls."""
        count = max(moments.count, 1)
        mean = moments.sums / count
        targets = slice(calls.start, calls.stop)

        def covariance(one: slice | int, other: int) -> torch.Tensor:
            if isinstance(one, int):
                return (moments.products[:, one, other] / count - mean[:, one] * mean[:, other]).unsqueeze(-1)
            return moments.products[:, one, other] / count - mean[:, one] * mean[:, other, None]

        variance = covariance(last, last)
        tiny = 1e-12 * variance + torch.finfo(torch.float64).tiny
        penalized_latest = variance * (1 + self.strength) + tiny
        # The regression fits the error of reuse, x - latest, from the latest feature and the difference.
        with_latest = covariance(targets, last) - variance  # [channels, calls]
        if self.slopes and before != last:
            cross_covariance = variance - covariance(before, last)  # of the latest feature and the difference
            difference_variance = (variance - 2 * covariance(before, last) + covariance(before, before)).clamp(min=0)
            penalized_difference = difference_variance * (1 + self.strength) + tiny
            with_difference = with_latest - (covariance(targets, before) - covariance(before, last))
            gram = torch.stack(
                [
                    torch.cat([penalized_latest, cross_covariance], 1),
                    torch.cat([cross_covariance, penalized_difference], 1),
                ],
                1,
            )
            scale, slope = torch.linalg.solve(gram, torch.stack([with_latest, with_difference], 1)).unbind(1)
        else:
            scale, slope = with_latest / penalized_latest, torch.zeros_like(with_latest)
        scale = scale + 1
        shift = mean[:, targets] - scale * mean[:, last, None] - slope * (mean[:, last, None] - mean[:, before, None])
        return Coefficients(scale, slope, shift)


DAMPINGS = (0.25, 0.5, 0.75, 1.0)
RIDGES = (Ridge(1e-3), Ridge(1e-2), Ridge(1e-1), Ridge(1e-2, slopes=False))


@dataclass(frozen=True)
class Predictor:
    """Prediction of the features of one shallow call.

    Attributes:
        kind: ``reuse``, ``forecast 0.5`` or ``fit ...``.
        error: mean squared error on held-out images, relative to the mean square of the feature.
        coefficients: coefficients by feature; None for reuse.
    """

    kind: str
    error: float
    coefficients: Mapping[str, Coefficients] | None


class Predictors:
    """Predictions of a cut's features: chooses among reuse, extrapolation and fitted coefficients by their error.

    Args:
        fitted: moments by feature of the images that coefficients are fitted to.
        held_out: moments by feature of the images on which errors are compared.
        kinds: kinds to choose from in addition to reuse: ``forecast`` and ``fit``.
        reference: whether the moments hold the calls of a reference after the calls of the engine. Predictions then aim
            at the reference's features.
    """

    def __init__(
        self,
        fitted: Mapping[str, FeatureMoments],
        held_out: Mapping[str, FeatureMoments],
        kinds: Sequence[str] = ("forecast", "fit"),
        *,
        reference: bool = False,
    ) -> None:
        self._fitted, self._held_out, self._kinds = fitted, held_out, kinds
        columns = next(iter(fitted.values())).sums.shape[1]
        self.calls = columns // 2 if reference else columns
        self._target_offset = self.calls if reference else 0
        self._power = {
            call: max(
                sum(float(moments.power(call + self._target_offset).sum()) for moments in held_out.values()), 1e-30
            )
            for call in range(self.calls)
        }
        self._errors: dict[tuple[int, int | None], torch.Tensor] = {}

    def errors(self, last: int, before: int | None, until: int) -> torch.Tensor:
        """Return for each call after ``last`` and before ``until`` the smallest error of any prediction."""
        known = self._errors.get((last, before))
        if known is None or len(known) < until - last - 1:
            candidates = self._candidates(range(last + 1, until), last, before)
            known = torch.stack([errors for _, errors, _ in candidates]).amin(0)
            self._errors[last, before] = known
        return known[: until - last - 1]

    def reuse_errors(self, last: int, until: int) -> torch.Tensor:
        """Return for each call after ``last`` and before ``until`` the error of plain reuse."""
        calls = range(last + 1, until)
        targets = self._targets(calls)
        total = sum(
            (moments.errors(targets, last, last, Coefficients()) for moments in self._held_out.values()),
            torch.zeros(len(calls), dtype=torch.float64),
        )
        return total / torch.tensor([self._power[call] for call in calls], dtype=torch.float64)

    def best(self, call: int, last: int, before: int | None) -> Predictor:
        """Return the prediction of a call with the smallest error."""
        candidates = self._candidates(range(call, call + 1), last, before)
        kind, errors, by_feature = min(candidates, key=lambda candidate: float(candidate[1][0]))
        coefficients = (
            None if by_feature is None else {name: _column(by_call, 0) for name, by_call in by_feature.items()}
        )
        return Predictor(kind, float(errors[0]), coefficients)

    def _candidates(
        self, calls: range, last: int, before: int | None
    ) -> list[tuple[str, torch.Tensor, dict[str, Coefficients] | None]]:
        """Return the predictions to choose from, each with its kind, errors [calls] and coefficients by feature."""
        earlier, targets = last if before is None else before, self._targets(calls)
        scales = torch.tensor([self._power[call] for call in calls], dtype=torch.float64)

        def error_of(by_feature: Mapping[str, Coefficients]) -> torch.Tensor:
            errors = [
                moments.errors(targets, last, earlier, by_feature[name]) for name, moments in self._held_out.items()
            ]
            return torch.stack(errors).sum(0) / scales

        reuse = dict.fromkeys(self._held_out, Coefficients())
        candidates: list[tuple[str, torch.Tensor, dict[str, Coefficients] | None]] = [("reuse", error_of(reuse), None)]
        if "forecast" in self._kinds and before is not None:
            distances = torch.tensor([(call - last) / (last - before) for call in calls], dtype=torch.float64)
            for damping in DAMPINGS:
                forecast = dict.fromkeys(self._held_out, Coefficients(slope=(damping * distances)[None, :]))
                candidates.append((f"forecast {damping:g}", error_of(forecast), forecast))
        if "fit" in self._kinds:
            for ridge in RIDGES:
                if ridge.slopes and before is None:
                    continue
                fitted = {name: ridge.fit(moments, targets, last, earlier) for name, moments in self._fitted.items()}
                kind = f"fit {ridge.strength:g}" + ("" if ridge.slopes else ", no slope")
                candidates.append((kind, error_of(fitted), fitted))
        return candidates

    def _targets(self, calls: range) -> range:
        """Return the columns of the moments that hold the values to predict."""
        return range(calls.start + self._target_offset, calls.stop + self._target_offset)


def predictors_by_cut(
    cuts: Mapping[str, Sequence[str]],
    fitted: Mapping[str, FeatureMoments],
    held_out: Mapping[str, FeatureMoments],
    kinds: Sequence[str] = ("forecast", "fit"),
    *,
    reference: bool = False,
) -> dict[str, Predictors]:
    """Return the predictors of each cut's features; the other arguments are those of ``Predictors``.

    Args:
        cuts: names of the features of each cut.
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


def _columns(value: float | torch.Tensor, channels: int, calls: int) -> torch.Tensor:
    tensor = torch.as_tensor(value, dtype=torch.float64)
    if tensor.dim() == 1:
        tensor = tensor[:, None]
    return tensor.expand(channels, calls)


def _column(coefficients: Coefficients, index: int) -> Coefficients:
    """Return the coefficients of one of several calls, as numbers or tensors [channels]."""

    def at_index(value: float | torch.Tensor) -> float | torch.Tensor:
        if not isinstance(value, torch.Tensor):
            return value
        column = value[:, index]
        return float(column[0]) if len(column) == 1 else column.clone()

    return Coefficients(at_index(coefficients.scale), at_index(coefficients.slope), at_index(coefficients.shift))
