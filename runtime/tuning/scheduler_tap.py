"""A tap on a pipeline's scheduler: it records each step, and can replace the model output that the step uses."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

ReplaceOutput = Callable[["SchedulerStep", torch.Tensor], torch.Tensor]
"""Function that takes a scheduler step and the model output, and returns the output to use instead."""

_LINEARITY_TOLERANCE = 1e-3
"""Largest relative difference, between positions of the latent, in the effect of the output."""


@dataclass(frozen=True)
class SchedulerStep:
    """A step that a scheduler is about to make.

    Attributes:
        scheduler: the scheduler.
        step: the unbound ``step`` method of the scheduler's class in diffusers.
        timestep: timestep of the step.
        sample: the latent before the step.
        options: other keyword arguments of the step.
    """

    scheduler: Any
    step: Callable[..., Any]
    timestep: Any
    sample: torch.Tensor
    options: dict[str, Any]

    def next_latent(self, output: torch.Tensor) -> torch.Tensor:
        """Return the next latent for this model output, fp32, without a change of the scheduler's state."""
        options = dict(self.options)
        if isinstance(options.get("generator"), torch.Generator):
            options["generator"] = options["generator"].clone_state()
        scheduler = copy.deepcopy(self.scheduler)
        # fp32 in any pipeline, since `output_for` depends on small differences.
        return _latent(self.step(scheduler, output.float(), self.timestep, self.sample.float(), **options)).float()

    def output_for(self, latent: torch.Tensor) -> torch.Tensor | None:
        """Return the model output that leads to this latent; None if the effect of outputs is zero or not linear."""
        at_zero = self.next_latent(torch.zeros_like(self.sample, dtype=torch.float32))
        rates = self.next_latent(torch.ones_like(self.sample, dtype=torch.float32)) - at_zero
        rate = rates.mean()
        if rate.abs() < 1e-6 or (rates - rate).abs().max() > _LINEARITY_TOLERANCE * rate.abs():
            return None
        return (latent - at_zero) / rate


class SchedulerTap:
    """Callbacks of each step of a tapped scheduler and of its copies."""

    def __init__(self) -> None:
        self.replace_output: ReplaceOutput | None = None
        self.recorded: list[torch.Tensor] | None = None
        """List that gets the latent after each step, fp32."""

    @contextmanager
    def latents(self) -> Iterator[list[torch.Tensor]]:
        """Record the generation in this block; yields the list that gets the latent after each step, fp32."""
        self.recorded = []
        try:
            yield self.recorded
        finally:
            self.recorded = None


@contextmanager
def tapped(pipe: Any) -> Iterator[SchedulerTap]:
    """Replace the pipeline's scheduler, within this block, by one with the same class and configuration and a tap."""
    original = pipe.scheduler
    tap = SchedulerTap()
    pipe.scheduler = _tapped_class(type(original), tap).from_config(original.config)
    try:
        yield tap
    finally:
        pipe.scheduler = original


def _tapped_class(scheduler_class: Any, tap: SchedulerTap) -> Any:
    original_step = scheduler_class.step

    @functools.wraps(original_step)  # pipelines inspect its parameters
    def step(
        self: Any, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *rest: Any, **options: Any
    ) -> Any:
        if tap.replace_output is not None and not rest:
            output = tap.replace_output(SchedulerStep(self, original_step, timestep, sample, options), model_output)
            model_output = output.to(model_output.dtype)
        result = original_step(self, model_output, timestep, sample, *rest, **options)
        if tap.recorded is not None:
            tap.recorded.append(_latent(result).float())
        return result

    return type(scheduler_class.__name__, (scheduler_class,), {"step": step, "__module__": scheduler_class.__module__})


def _latent(result: Any) -> torch.Tensor:
    latent: torch.Tensor = result[0] if isinstance(result, tuple) else result.prev_sample
    return latent
