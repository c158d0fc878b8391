"""Guidance at half the cost of shallow calls: they compute only the second half of the batch.

Classifier-free guidance calls the UNet with the same latents twice, without the prompt and with it. The difference
between the two outputs changes slowly, as the deep features do. So a shallow call may compute the second half only,
and derive the first half from the difference at the last full call.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch

from ...errors import ScheduleError
from ...exporter.specs import Shape, TensorSpec

if TYPE_CHECKING:
    from ...engines.base import BoundPair


class GuidanceReuse:
    """Difference between the two halves of a guided batch at the last full call of a generation.

    Attributes:
        batch_size: batch size of a guided call; a call with another batch size is not guided.

    Args:
        specs: inputs of the full graph.
        noise_pred: name of the output, the noise prediction.
    """

    def __init__(self, specs: Mapping[str, TensorSpec], noise_pred: str) -> None:
        self._inputs = tuple(specs)
        self._batched = {name for name, spec in specs.items() if spec.shape and isinstance(spec.shape[0], str)}
        self._noise_pred = noise_pred
        self._difference: torch.Tensor | None = None
        self.batch_size = 0

    def check_batch(self, sample: torch.Tensor) -> None:
        """Check at the first call of a generation that both halves of the batch hold the same latents.

        Raises:
            ScheduleError: the halves differ: the pipeline uses another kind of guidance, or none.
        """
        half = sample.shape[0] // 2
        if sample.shape[0] % 2 or not torch.equal(sample[:half], sample[half:]):
            raise ScheduleError(
                "reuse_guidance needs UNet calls with the same latents twice, and this pipeline makes others: leave "
                "reuse_guidance out"
            )
        self.batch_size = sample.shape[0]

    def record(self, bound: BoundPair) -> None:
        """Record the difference between the halves at a full call that was enqueued."""
        first, second = bound.buffers[self._noise_pred].chunk(2)
        self._difference = second - first

    def half_shapes(self, whole: Mapping[str, Shape]) -> dict[str, Shape]:
        """Return the shapes of the inputs for half the batch."""
        return {name: (shape[0] // 2, *shape[1:]) if name in self._batched else shape for name, shape in whole.items()}

    def copy_half(self, half: BoundPair, whole: BoundPair, features: Iterable[str]) -> None:
        """Copy the second half of the inputs and features; inputs without a batch dimension are copied whole."""
        for name in (*self._inputs, *features):
            batched = name in self._batched or name not in self._inputs
            half.buffers[name].copy_(whole.buffers[name].chunk(2)[1] if batched else whole.buffers[name])

    def whole_output(self, half: BoundPair) -> torch.Tensor:
        """Return the noise prediction of the whole batch, as a new tensor."""
        assert self._difference is not None
        second = half.buffers[self._noise_pred]
        return torch.cat([second - self._difference, second])
