"""Sums of products of a feature at all pairs of calls: enough for every least-squares fit between them.

A feature of Stable Diffusion 1.5 at 512x512 is 10 MB a call; its moments over 50 calls are 6 MB, however many images
they are of.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..generation.forecast import Coefficients

_PARTS = 64
"""Channels whose products are formed at once: bounds the memory of their double-precision copies."""


class Moments:
    """Of one feature over the calls of generations alike, for each channel.

    Args:
        calls: of a generation.
        channels: of the feature.
    """

    def __init__(self, calls: int, channels: int) -> None:
        self.count = 0
        """Positions (pixels of the feature, of all images) that were added."""
        self.sums = torch.zeros(channels, calls, dtype=torch.float64)
        self.products = torch.zeros(channels, calls, calls, dtype=torch.float64)
        self.distances = torch.zeros(calls, calls, dtype=torch.float64)
        """L1 norms of the differences between calls, summed over generations."""

    def add(self, values: torch.Tensor) -> None:
        """One generation's values [channels, calls, positions]; in doubles, since errors are small differences."""
        self.count += values.shape[-1]
        for start in range(0, values.shape[0], _PARTS):
            part = slice(start, start + _PARTS)
            doubles = values[part].double()
            self.sums[part] += doubles.sum(-1)
            self.products[part] += doubles @ doubles.mT
        whole = values.transpose(0, 1).flatten(1).float()
        self.distances += torch.cdist(whole, whole, p=1).double()

    def first(self, calls: int) -> Moments:
        """Those of the first calls alone."""
        made = Moments(0, 0)
        made.count, made.sums = self.count, self.sums[:, :calls]
        made.products, made.distances = self.products[:, :calls, :calls], self.distances[:calls, :calls]
        return made

    def power(self, call: int) -> torch.Tensor:
        """Mean square of each channel [channels]."""
        return self.products[:, call, call] / max(self.count, 1)

    def errors(self, calls: range, last: int, before: int, coefficients: Coefficients) -> torch.Tensor:
        """Mean square of what a prediction misses at each of these calls, summed over channels: [calls].

        Args:
            calls: those to predict.
            last, before: the full calls that they are predicted from.
            coefficients: of one call only if they are tensors [channels] and ``calls`` has one element; tensors
                [channels, calls] hold one column for each.
        """
        scale, slope, shift = (
            _columns(value, len(self.sums), len(calls))
            for value in (coefficients.scale, coefficients.slope, coefficients.shift)
        )
        of_last, of_before = scale + slope, -slope
        wanted = slice(calls.start, calls.stop)
        products, sums = self.products, self.sums
        square = products[:, wanted, wanted].diagonal(dim1=1, dim2=2)
        error = (
            square
            + of_last**2 * products[:, last, last, None]
            + of_before**2 * products[:, before, before, None]
            + self.count * shift**2
            - 2 * of_last * products[:, wanted, last]
            - 2 * of_before * products[:, wanted, before]
            - 2 * shift * sums[:, wanted]
            + 2 * of_last * of_before * products[:, last, before, None]
            + 2 * of_last * shift * sums[:, last, None]
            + 2 * of_before * shift * sums[:, before, None]
        )
        return error.sum(0).clamp(min=0) / max(self.count, 1)


@dataclass(frozen=True)
class Ridge:
    """Least squares that prefers reuse: how strongly, as a share of the regressors' own variances.

    Attributes:
        strength: 0 fits freely.
        slopes: whether the direction of the last two full calls is used; if not, this is CacheQuant's correction.
    """

    strength: float
    slopes: bool = True

    def fit(self, moments: Moments, calls: range, last: int, before: int) -> Coefficients:
        """Coefficients [channels, calls] that predict these calls best from two full ones."""
        count = max(moments.count, 1)
        mean = moments.sums / count
        wanted = slice(calls.start, calls.stop)

        def covariance(one: slice | int, other: int) -> torch.Tensor:
            if isinstance(one, int):
                return (moments.products[:, one, other] / count - mean[:, one] * mean[:, other]).unsqueeze(-1)
            return moments.products[:, one, other] / count - mean[:, one] * mean[:, other, None]

        latest = covariance(last, last)
        across = latest - covariance(before, last)  # of the latest with the difference
        apart = (latest - 2 * covariance(before, last) + covariance(before, before)).clamp(min=0)
        tiny = 1e-12 * latest + torch.finfo(torch.float64).tiny
        # What reuse leaves, x - latest, regressed on the latest and on the difference.
        with_latest = covariance(wanted, last) - latest
        with_apart = with_latest - (covariance(wanted, before) - covariance(before, last))
        first, second = latest * (1 + self.strength) + tiny, apart * (1 + self.strength) + tiny
        if self.slopes and before != last:
            determinant = (first * second - across**2).clamp(min=1e-9 * first * second)
            scale = (with_latest * second - with_apart * across) / determinant
            slope = (with_apart * first - with_latest * across) / determinant
        else:
            scale, slope = with_latest / first, torch.zeros_like(with_latest)
        scale = scale + 1
        shift = mean[:, wanted] - scale * mean[:, last, None] - slope * (mean[:, last, None] - mean[:, before, None])
        return Coefficients(scale, slope, shift)


def _columns(value: float | torch.Tensor, channels: int, calls: int) -> torch.Tensor:
    tensor = torch.as_tensor(value, dtype=torch.float64)
    if tensor.dim() == 1:
        tensor = tensor[:, None]
    return tensor.expand(channels, calls)
