"""An estimate of the error of reusing cached features, from data that the engines' buffers hold anyway.

Two numbers are known when a full call replaces the features of the one before: how far the features moved, and how far
the latents moved that the UNet was given. From then on only the latents are seen, and the features are taken to go on
moving with them:

    error(call) = moved(features) * moved(latents since the full call) / moved(latents between the full calls)

where ``moved`` is the norm of a difference relative to the norm. No further output of the engines is needed. The
features' own last movement makes the estimate hold for any sampler: with deterministic samplers the latents move little
at first while the features move most, and with ancestral samplers noise moves both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ...exporter.trace.export import SAMPLE

if TYPE_CHECKING:
    from ...engines.base import BoundPair

COMPARED_VALUES = 1 << 16
"""Number of a feature's values that are compared, evenly spaced: 0.3 MB to keep, whatever the feature's size."""


class FeatureDriftEstimator:
    """Movement of features and latents in one generation.

    All figures stay on the device, and are read one call later: see ``predicted_error``.

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
        feature = torch.cat([_sampled(bound.buffers[name]) for name in self._features])
        latent = bound.buffers[SAMPLE].float()
        latent = latent.clone() if latent is bound.buffers[SAMPLE] else latent
        self._feature_per_latent, self._error = None, None
        if bound is self._bound and self._feature is not None and self._latent is not None:
            self._feature_per_latent = _moved(feature, self._feature) / _moved(latent, self._latent)
        self._bound, self._feature, self._latent = bound, feature, latent

    def record_shallow(self, bound: BoundPair, call: int) -> None:
        """Estimate the error of a shallow call that is about to be enqueued."""
        if self._feature_per_latent is None or self._latent is None:
            return
        moved = _moved(bound.buffers[SAMPLE].float(), self._latent)
        self._error = _AsyncScalar(self._feature_per_latent * moved, call)

    def predicted_error(self, call: int, last: int) -> float | None:
        """Return the error of reuse at a call, relative to the feature's norm; None while it is unknown.

        The error is that of the call before, extrapolated by one call: the estimate was computed on the device before
        that call's engine ran, so reading it now does not wait for the engine.

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


def _moved(now: torch.Tensor, then: torch.Tensor) -> torch.Tensor:
    """Return the norm of a tensor's change, relative to the tensor's norm: []."""
    moved: torch.Tensor = torch.linalg.vector_norm(now - then) / torch.linalg.vector_norm(now)
    return moved


def _sampled(feature: torch.Tensor) -> torch.Tensor:
    """Return about ``COMPARED_VALUES`` values of a feature, fp32, in memory of their own.

    The stride is odd, so that the values come from all columns.
    """
    values = feature.flatten()
    return values[:: max(1, len(values) // COMPARED_VALUES) | 1].to(torch.float32, copy=True)
