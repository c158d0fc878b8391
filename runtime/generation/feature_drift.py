"""Foretelling what reuse of the cached features would miss, from what the engines' buffers hold anyway.

Two numbers are known when a full call replaces the features of the one before: how far these moved, and how far the
latents that the UNet was given moved. From then on only the latents are seen, and the features are taken to go on
moving with them:

    missed(call) = moved(features) * moved(latents since the full call) / moved(latents between the full calls)

where ``moved`` is the norm of a difference relative to the norm. It needs no output that the engines do not have. The
feature's own last movement makes it hold for any sampler: with deterministic ones latents move little at first while
the features move most, with ancestral ones noise moves both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ...exporter.trace.export import SAMPLE

if TYPE_CHECKING:
    from ...engines.base import BoundPair

PLACES = 1 << 16
"""Of a feature about so many values are compared, evenly spaced: 0.3 MB to keep, whatever its size."""


class FeatureDriftEstimator:
    """The movements in one generation. All figures stay on the device, and are read a call later: see ``missed``.

    Args:
        features: the names of those that shallow calls read.
    """

    def __init__(self, features: Sequence[str]) -> None:
        self._features = tuple(features)
        self._bound: BoundPair | None = None
        self._feature: torch.Tensor | None = None
        self._latent: torch.Tensor | None = None
        self._pace: torch.Tensor | None = None
        self._told: _AsyncScalar | None = None

    def full(self, bound: BoundPair) -> None:
        """A full call was enqueued."""
        feature = torch.cat([_some(bound.buffers[name]) for name in self._features])
        latent = bound.buffers[SAMPLE].float()
        latent = latent.clone() if latent is bound.buffers[SAMPLE] else latent
        self._pace, self._told = None, None
        if bound is self._bound and self._feature is not None and self._latent is not None:
            self._pace = _moved(feature, self._feature) / _moved(latent, self._latent)
        self._bound, self._feature, self._latent = bound, feature, latent

    def shallow(self, bound: BoundPair, call: int) -> None:
        """A shallow call is about to be enqueued."""
        if self._pace is None or self._latent is None:
            return
        self._told = _AsyncScalar(self._pace * _moved(bound.buffers[SAMPLE].float(), self._latent), call)

    def missed(self, call: int, last: int) -> float | None:
        """The error of reuse at a call, relative to the feature; None if nobody can say yet.

        It is that of the call before, drawn out by a call: that one's was computed on the device before its engine
        ran, so whoever reads it now does not wait for the engine.

        Args:
            call: the next call.
            last: the last full call.
        """
        if self._told is None or self._told.call != call - 1:
            return None
        return self._told.read() * (call - last) / (call - 1 - last)


class _AsyncScalar:
    """A number on its way to the host.

    Args:
        value: a tensor [] on any device.
        call: that it is of.
    """

    def __init__(self, value: torch.Tensor, call: int) -> None:
        self.call = call
        self._host = value
        self._arrived: torch.cuda.Event | None = None
        if value.is_cuda:
            self._host = torch.empty((), dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record(torch.cuda.current_stream(value.device))

    def read(self) -> float:
        if self._arrived is not None:
            self._arrived.synchronize()
        return float(self._host)


def _moved(now: torch.Tensor, then: torch.Tensor) -> torch.Tensor:
    """How far a tensor is from what it was, relative to its size: []."""
    moved: torch.Tensor = torch.linalg.vector_norm(now - then) / torch.linalg.vector_norm(now)
    return moved


def _some(feature: torch.Tensor) -> torch.Tensor:
    """Values of it [about PLACES], fp32, in memory of their own. The stride is odd, so that it meets all columns."""
    values = feature.flatten()
    return values[:: max(1, len(values) // PLACES) | 1].to(torch.float32, copy=True)
