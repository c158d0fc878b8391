"""Predicting the cached features of a shallow call from the last two full calls, where DeepCache reuses the last.

    feature = scale * latest + slope * (latest - before) + shift

``latest`` and ``before`` are what the last two full calls left. Scale 1, slope 0 and shift 0 are plain reuse. Affine
corrections (scale, shift) are those of CacheQuant (CVPR 2025); a slope that follows the distance between the calls is
an extrapolation of order 1.

The prediction is written where the shallow graph reads the feature, on the device, before the graph is run. So every
engine and every bundle can do it, and the same engines with other coefficients need no build.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ...errors import ScheduleError

if TYPE_CHECKING:
    from ...engines.base import BoundPair
    from .correction import Correction

Coefficient = float | torch.Tensor


@dataclass(frozen=True)
class Coefficients:
    """Each a number, or one for each channel: a tensor [channels] of any floating dtype."""

    scale: Coefficient = 1.0
    slope: Coefficient = 0.0
    shift: Coefficient = 0.0

    @property
    def plain(self) -> bool:
        """Whether one number says it all: an extrapolation without correction."""
        if isinstance(self.scale, torch.Tensor) or isinstance(self.shift, torch.Tensor):
            return False
        return isinstance(self.slope, float) and self.scale == 1.0 and self.shift == 0.0


class Forecast(ABC):
    """Coefficients for each shallow call."""

    correction: Correction | None = None
    """Of the UNet's answers; None leaves them as they are."""

    @abstractmethod
    def at(self, feature: str, call: int, last: int, before: int | None) -> Coefficients | None:
        """How to predict a feature; None reuses it as it is.

        Args:
            feature: its name in the graphs.
            call: the shallow call, counted from 0.
            last: the last full call.
            before: the full call before that; None where there was none, and a slope has nothing to go by.
        """


@dataclass(frozen=True)
class Extrapolate(Forecast):
    """Goes on in the direction of the last two full calls, as far as the calls lie apart, damped.

    It needs no calibration. On deterministic samplers it is much better than reuse, above all after two or more warm-up
    calls; where a sampler injects noise (Euler ancestral) it is worse.

    Attributes:
        damping: 1 extrapolates in full, 0 is reuse.

    Raises:
        ScheduleError: it lies outside 0..1.
    """

    damping: float = 0.5

    def __str__(self) -> str:
        return f"extrapolated, damping {self.damping:g}"

    def __post_init__(self) -> None:
        if not 0 <= self.damping <= 1:
            raise ScheduleError(f"a forecast's damping is {self.damping:g}: give one from 0 (reuse) to 1 (undamped)")

    def at(self, feature: str, call: int, last: int, before: int | None) -> Coefficients | None:
        if before is None or self.damping == 0:
            return None
        return Coefficients(slope=self.damping * (call - last) / (last - before))


class History:
    """What the last two full calls of a generation left in a bound pair's buffers.

    Each full call costs one copy of its features, into the older of two buffers beside the engines'.

    Args:
        forecast: says how to predict.
        features: the names of those that shallow calls read.
    """

    def __init__(self, forecast: Forecast, features: Sequence[str]) -> None:
        self._forecast, self._features = forecast, tuple(features)
        self._bound: BoundPair | None = None
        self._latest: dict[str, torch.Tensor] = {}
        self._before: dict[str, torch.Tensor] = {}
        self._calls: list[int] = []
        self._predicted: set[str] = set()

    def keep(self, bound: BoundPair, call: int) -> None:
        """A full call was enqueued: its features are in the buffers, or will be when whatever reads them runs."""
        if bound is not self._bound:  # other shapes
            self._bound, self._calls, self._latest, self._before = bound, [], {}, {}
        self._latest, self._before = self._before, self._latest
        for name in self._features:
            buffer = bound.buffers[name]
            self._latest.setdefault(name, torch.empty_like(buffer)).copy_(buffer)
        self._calls = [*self._calls[-1:], call]
        self._predicted.clear()

    def predict(self, bound: BoundPair, call: int, features: Sequence[str] | None = None) -> None:
        """Write the features of a shallow call that is about to be enqueued.

        Args:
            features: those that it reads; None for all.
        """
        last, before = self._calls[-1], self._calls[-2] if len(self._calls) > 1 else None
        for name in self._features if features is None else features:
            coefficients = self._forecast.at(name, call, last, before)
            if coefficients is not None:
                before_it = self._before[name] if before is not None else self._latest[name]
                write(bound.buffers[name], self._latest[name], before_it, coefficients)
                self._predicted.add(name)
            elif name in self._predicted:  # by an earlier shallow call, and this one reuses it
                bound.buffers[name].copy_(self._latest[name])
                self._predicted.discard(name)


def write(out: torch.Tensor, latest: torch.Tensor, before: torch.Tensor, coefficients: Coefficients) -> None:
    """The prediction, into ``out``; all three tensors [batch, channels, height, width]."""
    if coefficients.plain:
        slope = coefficients.slope
        assert isinstance(slope, float)
        torch.lerp(before, latest, 1.0 + slope, out=out)
        return
    # scale * latest + slope * (latest - before) + shift, in two passes
    scale, slope, shift = (
        _per_channel(value, out) for value in (coefficients.scale, coefficients.slope, coefficients.shift)
    )
    torch.addcmul(shift.expand_as(out), latest, scale + slope, out=out)
    out.addcmul_(before, slope, value=-1)


def _per_channel(value: Coefficient, like: torch.Tensor) -> torch.Tensor:
    tensor = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    return tensor.reshape(1, -1, *[1] * (like.dim() - 2))
