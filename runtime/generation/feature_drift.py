"""Estimate of the error of reusing cached features, from data that the engines' buffers already hold.

Each full call gives two measurements: the change of the features and the change of the UNet's latents since the full
call before. Until the next full call only the latents are known. The estimate assumes that the features keep changing
in proportion to the latents:

    error(call) = change(features) * change(latents since the full call) / change(latents between the full calls)

``change`` is the norm of a difference relative to the norm of the tensor. The engines need no further output. The
proportion is measured in each generation, because it depends on the sampler. With deterministic samplers the latents
change little at first while the features change most; with ancestral samplers noise changes both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ...exporter.trace.export import SAMPLE

if TYPE_CHECKING:
    from ...engines.base import BoundPair

COMPARED_VALUES = 1 << 16
"""Number of evenly spaced values of a feature that are compared; their copies take 0.3 MB for a feature of any size."""


class FeatureDriftEstimator:
    """Estimator of the change of the features in one generation.

    The estimate of a call stays on the device until the next call reads it: see ``predicted_error``.

    Args:
        features: names of the features that shallow calls read.
    """

    def __init__(self, features: Sequence[str]) -> None:
        self._features = tuple(features)
        self._bound: BoundPair | None = None
        self._feature: torch.Tensor | None = None
        self._latent: torch.Tensor | None = None
        self._feature_per_latent: torch.Tensor | None = None
        self._error: _AsyncScalar | None = None

    def record_full(self, bound: BoundPair) -> None:
        """Record the features and latents of a full call that was enqueued."""
        feature = torch.cat([_sample_values(bound.buffers[name]) for name in self._features])
        latent = bound.buffers[SAMPLE].float()
        latent = latent.clone() if latent is bound.buffers[SAMPLE] else latent
        self._feature_per_latent, self._error = None, None
        if bound is self._bound and self._feature is not None and self._latent is not None:
            self._feature_per_latent = _relative_change(feature, self._feature) / _relative_change(latent, self._latent)
        self._bound, self._feature, self._latent = bound, feature, latent

    def record_shallow(self, bound: BoundPair, call: int) -> None:
        """Estimate the error of a shallow call that is about to be enqueued."""
        if self._feature_per_latent is None or self._latent is None:
            return
        latent_change = _relative_change(bound.buffers[SAMPLE].float(), self._latent)
        self._error = _AsyncScalar(self._feature_per_latent * latent_change, call)

    def predicted_error(self, call: int, last: int) -> float | None:
        """Return the estimated error of reuse at a call, relative to the feature's norm; None while it is unknown.

        The result is the estimate of the previous call, extrapolated by one call. That estimate was computed on the
        device before the previous call's engine ran, so reading it does not wait for the engine.

        Args:
            call: the next call.
            last: the last full call.
        """
        if self._error is None or self._error.call != call - 1:
            return None
        return self._error.read() * (call - last) / (call - 1 - last)


class _AsyncScalar:
    """A number that is copied to the host without waiting for the device.

    Args:
        value: a tensor [] on any device.
        call: the call that the number belongs to.
    """

    def __init__(self, value: torch.Tensor, call: int) -> None:
        self.call = call
        self._host = value
        self._copied: torch.cuda.Event | None = None
        if value.is_cuda:
            self._host = torch.empty((), dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record(torch.cuda.current_stream(value.device))

    def read(self) -> float:
        if self._copied is not None:
            self._copied.synchronize()
        return float(self._host)


def _relative_change(now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Return the norm of a tensor's change, relative to the tensor's norm: []."""
    change: torch.Tensor = torch.linalg.vector_norm(now - before) / torch.linalg.vector_norm(now)
    return change


def _sample_values(feature: torch.Tensor) -> torch.Tensor:
    """Return a copy of about ``COMPARED_VALUES`` values of a feature, fp32.

    The stride is odd, so that the values come from all columns.
    """
    values = feature.flatten()
    return values[:: max(1, len(values) // COMPARED_VALUES) | 1].to(torch.float32, copy=True)
