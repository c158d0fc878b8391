"""Guidance on shallow calls for half the price: only the second half of the batch is computed.

Classifier-free guidance asks the UNet twice about the same latents, without the prompt and with it. The difference
between the two answers changes slowly, as the deep features do. So a shallow call may compute the second half only and
take the difference of the last full call for the first.
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
    """What the last full call of a generation said about guidance.

    Args:
        specs: of the full graph's inputs.
        noise_pred: the name of the output.
    """

    def __init__(self, specs: Mapping[str, TensorSpec], noise_pred: str) -> None:
        self._inputs = tuple(specs)
        self._halved = {name for name, spec in specs.items() if spec.shape and isinstance(spec.shape[0], str)}
        self._noise_pred = noise_pred
        self._difference: torch.Tensor | None = None
        self.rows = 0
        """Of a guided call's batch; one with another number of rows is not guided any more."""

    def begin(self, sample: torch.Tensor) -> None:
        """Once a generation, on its first call: both halves must be of the same latents.

        Raises:
            ScheduleError: they are not: this is another kind of guidance, or none.
        """
        half = sample.shape[0] // 2
        if sample.shape[0] % 2 or not torch.equal(sample[:half], sample[half:]):
            raise ScheduleError(
                "guidance can be reused only where the UNet is asked twice about the same latents, and this pipeline "
                "asks otherwise: leave reuse_guidance out"
            )
        self.rows = sample.shape[0]

    def keep(self, bound: BoundPair) -> None:
        """A full call was enqueued."""
        first, second = bound.buffers[self._noise_pred].chunk(2)
        self._difference = second - first

    def shapes(self, whole: Mapping[str, Shape]) -> dict[str, Shape]:
        """Of the inputs of half the batch."""
        return {name: self._half_of(name, shape) for name, shape in whole.items()}

    def fill(self, half: BoundPair, whole: BoundPair, features: Iterable[str]) -> None:
        """Copy the second half of the inputs and features; inputs that are not one for each image, as they are."""
        for name in (*self._inputs, *features):
            halved = name in self._halved or name not in self._inputs
            half.buffers[name].copy_(whole.buffers[name].chunk(2)[1] if halved else whole.buffers[name])

    def answer(self, half: BoundPair) -> torch.Tensor:
        """The noise prediction of the whole batch, in memory of its own."""
        assert self._difference is not None
        second = half.buffers[self._noise_pred]
        return torch.cat([second - self._difference, second])

    def _half_of(self, name: str, shape: Shape) -> Shape:
        return (shape[0] // 2, *shape[1:]) if name in self._halved else shape
