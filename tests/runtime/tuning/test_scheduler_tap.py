"""Tapped schedulers: outputs that lead to a given latent, recorded latents, and replaced outputs."""

from __future__ import annotations

import copy
import inspect
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

from offcut.runtime.tuning.scheduler_tap import SchedulerStep, tapped

LINEAR = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
]


def sampled(scheduler: Any, seed: int = 0) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Run a sampler on random model outputs; return the last latent and the outputs."""
    random, noise = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(7)
    scheduler.set_timesteps(8)
    latent = torch.randn(1, 4, 8, 8, generator=random) * scheduler.init_noise_sigma
    parameters = inspect.signature(scheduler.step).parameters
    options: dict[str, Any] = {"generator": noise} if "generator" in parameters else {}
    outputs = []
    for timestep in scheduler.timesteps:
        output = torch.tanh(scheduler.scale_model_input(latent, timestep)) + 0.1 * torch.randn(
            1, 4, 8, 8, generator=random
        )
        outputs.append(output)
        latent = scheduler.step(output, timestep, latent, return_dict=False, **options)[0]
    return latent, outputs


@pytest.mark.parametrize("name", LINEAR)
def test_the_output_for_a_latent_leads_to_this_latent(name: str) -> None:
    kind = getattr(diffusers, name)
    unclipped = {"clip_sample": False} if "clip_sample" in inspect.signature(kind).parameters else {}
    scheduler = kind(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, **unclipped)
    pipe = SimpleNamespace(scheduler=scheduler)
    with tapped(pipe) as tap:
        plain, _ = sampled(copy.deepcopy(pipe.scheduler))
        known = 0

        def check_output(step: SchedulerStep, output: torch.Tensor) -> torch.Tensor:
            nonlocal known
            goal = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(known))
            output_for_goal = step.output_for(goal)
            if output_for_goal is not None:
                known += 1
                torch.testing.assert_close(
                    step.next_latent(output_for_goal), goal, rtol=1e-3, atol=1e-3 * float(output_for_goal.abs().max())
                )
            return output

        tap.replace_output = check_output
        checked, _ = sampled(pipe.scheduler)
        tap.replace_output = None
    assert known >= 6
    assert torch.equal(plain, checked)  # the checks move neither the scheduler nor the generator
    assert pipe.scheduler is scheduler


def test_no_output_leads_to_a_latent_where_the_scheduler_clips() -> None:
    pipe = SimpleNamespace(scheduler=diffusers.DDIMScheduler(clip_sample=True))
    with tapped(pipe) as tap:
        outputs = []

        def record_output(step: SchedulerStep, output: torch.Tensor) -> torch.Tensor:
            outputs.append(step.output_for(torch.zeros_like(output)))
            return output

        tap.replace_output = record_output
        sampled(pipe.scheduler)
    assert outputs[0] is None


def test_latents_are_recorded_and_outputs_replaced() -> None:
    pipe = SimpleNamespace(scheduler=diffusers.DDIMScheduler(clip_sample=False))
    with tapped(pipe) as tap:
        with tap.latents() as recorded:
            last, outputs = sampled(pipe.scheduler)
        assert len(recorded) == len(outputs)
        torch.testing.assert_close(recorded[-1], last)
        tap.replace_output = lambda step, output: output + 0.5
        other, _ = sampled(pipe.scheduler)
        assert not torch.allclose(other, last)
        assert type(pipe.scheduler).__name__ == "DDIMScheduler"
