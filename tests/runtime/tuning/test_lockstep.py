"""What corrections are fitted by: outputs that lead a scheduler to a latent, and least squares."""

from __future__ import annotations

import copy
import inspect
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

from offcut.runtime.generation.correction import Kernel
from offcut.runtime.tuning.lockstep import best_kernels
from offcut.runtime.tuning.watched import watched

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
    """A sampler's run over made-up outputs: the last latent, and the outputs that it took."""
    made, noise = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(7)
    scheduler.set_timesteps(8)
    latent = torch.randn(1, 4, 8, 8, generator=made) * scheduler.init_noise_sigma
    taken = inspect.signature(scheduler.step).parameters
    options: dict[str, Any] = {"generator": noise} if "generator" in taken else {}
    outputs = []
    for timestep in scheduler.timesteps:
        output = torch.tanh(scheduler.scale_model_input(latent, timestep)) + 0.1 * torch.randn(
            1, 4, 8, 8, generator=made
        )
        outputs.append(output)
        latent = scheduler.step(output, timestep, latent, return_dict=False, **options)[0]
    return latent, outputs


@pytest.mark.parametrize("name", LINEAR)
def test_the_output_that_leads_to_a_latent_leads_there(name: str) -> None:
    kind = getattr(diffusers, name)
    unclipped = {"clip_sample": False} if "clip_sample" in inspect.signature(kind).parameters else {}
    scheduler = kind(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, **unclipped)
    pipe = SimpleNamespace(scheduler=scheduler)
    with watched(pipe) as watch:
        plain, _ = sampled(copy.deepcopy(pipe.scheduler))
        known = 0

        def look(at: Any, output: torch.Tensor) -> torch.Tensor:
            nonlocal known
            goal = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(known))
            towards = at.towards(goal)
            if towards is not None:
                known += 1
                torch.testing.assert_close(at.after(towards), goal, rtol=1e-3, atol=1e-3 * float(towards.abs().max()))
            return output

        watch.ask = look
        looked_at, _ = sampled(pipe.scheduler)
        watch.ask = None
    assert known >= 6
    assert torch.equal(plain, looked_at)  # looking leaves scheduler and generator where they are
    assert pipe.scheduler is scheduler


def test_an_output_whose_effect_is_clipped_leads_nowhere() -> None:
    pipe = SimpleNamespace(scheduler=diffusers.DDIMScheduler(clip_sample=True))
    with watched(pipe) as watch:
        found = []

        def look(at: Any, output: torch.Tensor) -> torch.Tensor:
            found.append(at.towards(torch.zeros_like(output)))
            return output

        watch.ask = look
        sampled(pipe.scheduler)
    assert found[0] is None


def test_a_watch_keeps_the_latents_and_its_answer_is_taken() -> None:
    pipe = SimpleNamespace(scheduler=diffusers.DDIMScheduler(clip_sample=False))
    with watched(pipe) as watch:
        with watch.latents() as kept:
            last, outputs = sampled(pipe.scheduler)
        assert len(kept) == len(outputs)
        torch.testing.assert_close(kept[-1], last)
        watch.ask = lambda at, output: output + 0.5
        other, _ = sampled(pipe.scheduler)
        assert not torch.allclose(other, last)
        assert type(pipe.scheduler).__name__ == "DDIMScheduler"


def pairs(count: int, weight: torch.Tensor, bias: torch.Tensor, noise: float, seed: int) -> list[Any]:
    made = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        seen = torch.randn(1, weight.shape[1], 12, 12, generator=made) + 0.5
        said = torch.nn.functional.conv2d(seen, weight, bias, padding=1)
        found.append((seen, said + noise * torch.randn(said.shape, generator=made)))
    return found


def test_least_squares_find_the_convolution() -> None:
    made = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(4, 6, 3, 3, generator=made), torch.randn(4, generator=made)
    kernels = best_kernels(pairs(8, weight, bias, 0.1, 2))
    assert kernels is not None
    found = kernels.kernel
    torch.testing.assert_close(found.weight, weight, rtol=0, atol=0.03)
    torch.testing.assert_close(found.bias, bias, rtol=0, atol=0.2)
    seen, said = pairs(1, weight, bias, 0.0, 4)[0]
    assert (found(seen) - said).norm() < 0.02 * said.norm()


def test_an_image_goes_on_by_what_the_others_say() -> None:
    made = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(4, 6, 3, 3, generator=made), torch.randn(4, generator=made)
    most, other = pairs(8, weight, bias, 0.0, 2), pairs(8, 0.5 * weight, bias, 0.0, 2)
    found = best_kernels([other[place] if place % 4 == 0 else most[place] for place in range(8)])
    assert found is not None

    def share(kernel: Kernel) -> float:
        return float((kernel.weight * weight).sum() / weight.square().sum())

    shares = [share(found.of(place)) for place in range(8)]
    assert shares[:4] == shares[4:]  # these are of the same parts
    # The first part is the other kind: half weight in a quarter, then in a third of those that the rest go by.
    assert shares[0] - 0.05 > share(found.kernel) > max(shares[1:4]) + 0.01


def test_noise_gets_no_kernel() -> None:
    nothing = torch.zeros(4, 6, 3, 3), torch.zeros(4)
    assert best_kernels(pairs(6, *nothing, 1.0, 2)) is None


def test_one_image_shows_of_no_kernel_that_it_helps() -> None:
    something = torch.ones(4, 6, 3, 3), torch.ones(4)
    assert best_kernels(pairs(1, *something, 0.1, 2)) is None
    assert best_kernels(pairs(2, *something, 0.1, 2)) is not None
