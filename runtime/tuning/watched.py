"""A pipeline's scheduler that tells of each step, and lets the model's output be changed before it is taken."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

Ask = Callable[["At", torch.Tensor], torch.Tensor]
"""Given where a scheduler stands and the model's output, the output to take instead."""

_LINEAR = 1e-3
"""Share by which the step's answer to an output may differ from one place of the latent to another."""


@dataclass(frozen=True)
class At:
    """A scheduler that is about to make a step.

    Attributes:
        scheduler: itself.
        step: its ``step`` as diffusers wrote it, without ``self``'s being bound.
        timestep: of the step.
        sample: the latent.
        options: more keyword arguments.
    """

    scheduler: Any
    step: Callable[..., Any]
    timestep: Any
    sample: torch.Tensor
    options: dict[str, Any]

    def after(self, output: torch.Tensor) -> torch.Tensor:
        """The next latent with this output of the model, fp32; the scheduler stays where it is."""
        options = dict(self.options)
        if isinstance(options.get("generator"), torch.Generator):
            options["generator"] = options["generator"].clone_state()
        scheduler = copy.deepcopy(self.scheduler)
        # In fp32 whatever the pipeline has: `towards` looks at small differences.
        return _latent(self.step(scheduler, output.float(), self.timestep, self.sample.float(), **options)).float()

    def towards(self, latent: torch.Tensor) -> torch.Tensor | None:
        """The output that would lead to this latent; None where the output has no say, or no linear one."""
        nothing = self.after(torch.zeros_like(self.sample, dtype=torch.float32))
        rates = self.after(torch.ones_like(self.sample, dtype=torch.float32)) - nothing
        rate = rates.mean()
        if rate.abs() < 1e-6 or (rates - rate).abs().max() > _LINEAR * rate.abs():
            return None
        return (latent - nothing) / rate


@contextmanager
def watched(pipe: Any) -> Iterator[Watch]:
    """Within the block the pipeline has a scheduler alike that can be watched."""
    whole = pipe.scheduler
    watch = Watch()
    pipe.scheduler = _watched(type(whole), watch).from_config(whole.config)
    try:
        yield watch
    finally:
        pipe.scheduler = whole


class Watch:
    """Who is asked and told at each step of the scheduler and of its copies."""

    def __init__(self) -> None:
        self.ask: Ask | None = None
        self.made: list[torch.Tensor] | None = None
        """Gets the latent after each step, fp32."""

    @contextmanager
    def latents(self) -> Iterator[list[torch.Tensor]]:
        """Of one generation within the block: the latent after each step, fp32."""
        self.made = []
        try:
            yield self.made
        finally:
            self.made = None


def _watched(kind: Any, watch: Watch) -> Any:
    plain = kind.step

    @functools.wraps(plain)  # pipelines look at its parameters
    def step(
        self: Any, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *rest: Any, **options: Any
    ) -> Any:
        if watch.ask is not None and not rest:
            output = watch.ask(At(self, plain, timestep, sample, options), model_output)
            model_output = output.to(model_output.dtype)
        made = plain(self, model_output, timestep, sample, *rest, **options)
        if watch.made is not None:
            watch.made.append(_latent(made).float())
        return made

    return type(kind.__name__, (kind,), {"step": step, "__module__": kind.__module__})


def _latent(made: Any) -> torch.Tensor:
    latent: torch.Tensor = made[0] if isinstance(made, tuple) else made.prev_sample
    return latent
