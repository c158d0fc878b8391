"""Prediction of the cached features of a shallow call from the last two full calls; DeepCache reuses the last one.

    feature = scale * latest + slope * (latest - before) + shift

``latest`` and ``before`` are the features of the last two full calls. Scale 1, slope 0 and shift 0 are plain reuse.
Scale and shift are the affine correction of CacheQuant (CVPR 2025). A slope proportional to the distance between the
calls is a linear extrapolation.

Before a shallow call the prediction is written, on the device, into the buffer from which the shallow graph reads the
feature. So every engine and every bundle supports it, and other coefficients need no rebuild.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ...errors import ScheduleError

if TYPE_CHECKING:
    from .correction import Correction

Coefficient = float | torch.Tensor


@dataclass(frozen=True)
class Coefficients:
    """Coefficients of one prediction: each a number, or a tensor [channels] of any floating dtype."""

    scale: Coefficient = 1.0
    slope: Coefficient = 0.0
    shift: Coefficient = 0.0

    @property
    def plain(self) -> bool:
        """Whether the prediction is an extrapolation without correction, so that one number describes it."""
        if isinstance(self.scale, torch.Tensor) or isinstance(self.shift, torch.Tensor):
            return False
        return isinstance(self.slope, float) and self.scale == 1.0 and self.shift == 0.0


class Forecast(ABC):
    """Predictor of the cached features: gives the coefficients for each shallow call."""

    correction: Correction | None = None
    """Correction of the UNet's outputs; None leaves the outputs as they are."""

    @abstractmethod
    def at(self, feature: str, call: int, last: int, before: int | None) -> Coefficients | None:
        """Return the coefficients that predict a feature; None reuses the feature unchanged.

        Args:
            feature: the feature's name in the graphs.
            call: the shallow call, counted from 0.
            last: the last full call.
            before: the full call before the last; None after a single full call, where no slope is known.
        """


@dataclass(frozen=True)
class Extrapolate(Forecast):
    """Linear extrapolation from the last two full calls, damped.

    Extrapolation needs no calibration. On deterministic samplers it is much better than reuse, above all after two or
    more warm-up calls. On samplers that inject noise (Euler ancestral) it is worse than reuse.

    Attributes:
        damping: 1 extrapolates fully, 0 is reuse.

    Raises:
        ScheduleError: the damping is outside 0..1.
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


def write(out: torch.Tensor, latest: torch.Tensor, before: torch.Tensor, coefficients: Coefficients) -> None:
    """Write the prediction into ``out``; the three tensors have the same shape [batch, channels, height, width]."""
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
