"""Denoising steps: which UNet calls of a generation belong to the same step, and where a sampler starts again.

Most pipelines call the UNet once a step. Some call it several times: for each view of a panorama, or for each pass of
a guidance. The timestep of a call shows its step. Pipelines pass an element of the scheduler's ``timesteps``, a view
whose position in that tensor is known without reading the device. Equal timesteps at other positions are other steps:
samplers such as Heun repeat timesteps.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum

import torch

Step = float | tuple[int, int]
"""A denoising step: the value of its timestep; or the address of the tensor that holds it, and the place in it."""


class StepChange(Enum):
    """Relation of a call's denoising step to that of the call before."""

    SAME = "same"
    """The same step: another latent, or another pass."""
    NEXT = "next"
    """A later step; also the first step of all."""
    RESTART = "restart"
    """An earlier step: the sampler starts again."""


class StepTracker:
    """Steps of the calls so far, either of those that pass elements of a tensor or of those that pass values.

    A timestep that is no view into a longer tensor is read on the host, which on a GPU waits for the device. Its value
    shows the step, with two ambiguities:

    * Samplers such as Heun and PNDM repeat timesteps from their second one on, and never the first. So calls that
      repeat the first timestep are other calls of its step. A timestep that is repeated second is the sampler's, unless
      the conditioning shows that the call is another latent's.
    * KDPM2's midpoints may be slightly below the rounded step that follows. So a value that rises by less than 1, and
      not above the step before the last one, is a next step.

    Two loops may take turns, each in a Python generator. Then a call skips steps that the run before it made, and is no
    next step of the present run.

    Attributes:
        steps: the steps so far, each the value of a timestep, or the address of a tensor and the place in it.

    Args:
        before: ``steps`` of the run before, which a restart ended.
        keyed: whether all calls are known to belong to one trajectory, so that rows may be at different timesteps.
        announced: whether the calls are known to form one generation, so that a value that rises is no restart
            (inversions, RePaint).
    """

    def __init__(self, *, announced: bool, keyed: bool = False, before: Collection[Step] = ()) -> None:
        self.steps: list[Step] = []
        self._before = before
        self._announced, self._keyed = announced, keyed
        self._timestep: torch.Tensor | float | None = None  # of the last call; keeps the tensor's memory in use
        self._calls_of_step = 0
        self._calls_of_first_step = 0
        self._sampler_repeats = False

    def change(self, timestep: torch.Tensor | float, repeated: bool | None = None) -> StepChange:
        """Return the relation of a new call's step to that of the last recorded call.

        Args:
            timestep: timestep of the new call; an element of a tensor if those of the other calls are, else a value.
            repeated: whether the conditioning shows that the call is of a latent that was called at this timestep
                before; None where the conditioning does not show it.
        """
        if self._timestep is None:
            return StepChange.NEXT
        if not self._keyed and _differs_by_row(timestep):
            return StepChange.RESTART  # nothing shows which row was at which step before
        last, position = _position(self._timestep), _position(timestep)
        if last is not None and position is not None:
            if last[0] != position[0] or position[1] < last[1]:
                return StepChange.RESTART
            if position == last:
                return StepChange.SAME
            skipped = any(last < step < position for step in self._before if isinstance(step, tuple))
            return StepChange.RESTART if skipped else StepChange.NEXT
        return self._change_of_value(timestep_value(timestep), repeated)

    def record(self, timestep: torch.Tensor | float, change: StepChange) -> None:
        """Record a call that completed, with its ``change``."""
        if change is StepChange.SAME:
            self._calls_of_step += 1
        else:
            self._calls_of_step = 1
            position = _position(timestep)
            self.steps.append(timestep_value(timestep) if position is None else position)
            if position is None:
                self._sampler_repeats = self._sampler_repeats or self.steps[-2:-1] == self.steps[-1:]
        if len(self.steps) == 1:
            self._calls_of_first_step = self._calls_of_step
        self._timestep = timestep

    def _change_of_value(self, value: float, repeated: bool | None) -> StepChange:
        values = [step for step in self.steps[-2:] if not isinstance(step, tuple)]
        before, last = values[0], values[-1]
        if value == last:
            if repeated is None:
                repeated = self._calls_of_step >= self._calls_of_first_step
            may_repeat = len(self.steps) > 1 and (self._sampler_repeats or len(self.steps) == 2)
            return StepChange.NEXT if may_repeat and repeated else StepChange.SAME
        if not self._announced and value > last and not (value < last + 1 and value <= before):
            return StepChange.RESTART
        skipped = any(value + 1 < step < last - 1 for step in self._before if not isinstance(step, tuple))
        return StepChange.RESTART if skipped and not self._announced else StepChange.NEXT


def is_value(timestep: torch.Tensor | float) -> bool:
    """Return whether a timestep is no element of a longer tensor, so that its value alone shows its step."""
    return _position(timestep) is None


def read_once(timestep: torch.Tensor | float) -> torch.Tensor | float:
    """Return a timestep whose step is known without waiting for the device: on the host, unless its place shows it."""
    if not isinstance(timestep, torch.Tensor) or not is_value(timestep):
        return timestep
    return timestep.cpu()


def _differs_by_row(timestep: torch.Tensor | float) -> bool:
    if not isinstance(timestep, torch.Tensor) or timestep.numel() < 2 or not any(timestep.stride()):
        return False
    return bool((timestep != timestep.flatten()[0]).any())


def timestep_value(timestep: torch.Tensor | float) -> float:
    """Return the timestep as a number; on a GPU this waits for the device."""
    return float(timestep.max()) if isinstance(timestep, torch.Tensor) else float(timestep)


def _position(timestep: torch.Tensor | float) -> tuple[int, int] | None:
    """Return the address of the longer tensor that holds a timestep, and the place in it; None for other timesteps."""
    if not isinstance(timestep, torch.Tensor) or any(
        stride for size, stride in zip(timestep.shape, timestep.stride(), strict=True) if size > 1
    ):
        return None  # a number, or one timestep for each image
    storage = timestep.untyped_storage()
    is_element = storage.nbytes() > timestep.element_size()
    return (storage.data_ptr(), int(timestep.storage_offset())) if is_element else None
