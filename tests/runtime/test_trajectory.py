"""Whole trajectories, compared with eager PyTorch: every call full, DeepCache's own helper, repeated timesteps."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import pytest
import torch
from DeepCache import DeepCacheSDHelper
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
)

import offcut
from offcut.runtime.generation.schedule import Quad, Schedule, Steps, Uniform

Generate = Callable[..., torch.Tensor]
Decibels = Callable[[torch.Tensor, torch.Tensor], float]

SAME = 110.0
"""PSNR in dB from which two trajectories count as equal. Rounding in fp32 gives about 140."""

OTHER = 80.0
"""PSNR in dB below which two trajectories count as different. Caching a model with random weights gives 30 to 65."""

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers' use of NumPy

WITH_AND_WITHOUT_GUIDANCE = pytest.mark.parametrize("guidance", [5.0, 1.0], ids=["guidance", "no-guidance"])


@pytest.fixture(scope="module")
def eager_once() -> Callable[[Hashable, Callable[[], torch.Tensor]], torch.Tensor]:
    """Return a function that computes an eager result once; eager results do not depend on the engine."""
    results: dict[Hashable, torch.Tensor] = {}

    def remember(key: Hashable, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        if key not in results:
            results[key] = compute()
        return results[key]

    return remember


def use(scheduler: type[Any], *pipes: Any, **settings: Any) -> None:
    for pipe in pipes:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **settings)


@WITH_AND_WITHOUT_GUIDANCE
def test_every_call_full_is_the_full_engine_bit_for_bit(
    pipe: Any, eager: Any, generate: Generate, decibels: Decibels, guidance: float
) -> None:
    unet = pipe.unet
    schedules: list[Schedule | None] = [None, Uniform(1), Steps(range(10)), Uniform(4, cooldown=10)]
    bound = None

    def engine_alone(
        sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor, **_: Any
    ) -> Any:
        """Run the full graph and nothing else, with new buffers."""
        nonlocal bound
        if bound is None:
            shapes = {
                "sample": tuple(sample.shape),
                "timestep": (len(sample),),
                "encoder_hidden_states": tuple(encoder_hidden_states.shape),
            }
            bound = unet._pair.prepare(shapes)
        bound.buffers["sample"].copy_(sample)
        bound.buffers["timestep"].copy_(timestep)
        bound.buffers["encoder_hidden_states"].copy_(encoder_hidden_states)
        bound.full()
        return (bound.buffers["noise_pred"].clone(),)

    results = []
    for schedule in schedules:
        unet.set_schedule(schedule)
        results.append(generate(pipe, guidance=guidance))
        assert unet.last_run.timeline == "#" * 10
    unet.forward = engine_alone
    try:
        alone = generate(pipe, guidance=guidance)
    finally:
        del unet.forward
    assert all(torch.equal(result, alone) for result in results)
    assert decibels(alone, generate(eager, guidance=guidance)) > SAME


@WITH_AND_WITHOUT_GUIDANCE
@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler])
@pytest.mark.parametrize("interval", [2, 3, 5])
def test_the_trajectory_equals_that_of_deepcache(
    pipe: Any,
    eager: Any,
    generate: Generate,
    decibels: Decibels,
    eager_once: Callable[..., torch.Tensor],
    scheduler: type[Any],
    interval: int,
    guidance: float,
) -> None:
    use(scheduler, pipe, eager)
    helper = DeepCacheSDHelper(pipe=eager)

    def deepcache() -> torch.Tensor:
        helper.enable()
        try:
            return generate(eager, guidance=guidance)
        finally:
            helper.disable()

    uncached = eager_once((scheduler, guidance), lambda: generate(eager, guidance=guidance))
    for branch in (0, 1, 2):
        helper.set_params(cache_interval=interval, cache_branch_id=branch)
        expected = eager_once((scheduler, guidance, interval, branch), deepcache)
        pipe.unet.set_schedule(Uniform(interval), cut=f"deepcache:{branch}")
        latents = generate(pipe, guidance=guidance)
        assert pipe.unet.last_run.full_calls == tuple(range(0, 10, interval))
        assert decibels(latents, expected) > SAME
        assert decibels(expected, uncached) < OTHER


@pytest.mark.parametrize(
    ("scheduler", "settings", "calls"),
    [
        (HeunDiscreteScheduler, {}, 11),
        (KDPM2DiscreteScheduler, {"use_karras_sigmas": True}, 11),
        (KDPM2AncestralDiscreteScheduler, {"use_karras_sigmas": True}, 11),
        (PNDMScheduler, {"skip_prk_steps": True}, 7),
        (PNDMScheduler, {}, 15),
    ],
    ids=["heun", "kdpm2", "kdpm2-ancestral", "pndm", "pndm-prk"],
)
@WITH_AND_WITHOUT_GUIDANCE
def test_schedulers_with_repeated_timesteps_follow_the_schedule_by_calls(
    pipe: Any,
    eager: Any,
    generate: Generate,
    decibels: Decibels,
    cached_by_call: Callable[..., Any],
    eager_once: Callable[..., torch.Tensor],
    scheduler: type[Any],
    settings: dict[str, Any],
    calls: int,
    guidance: float,
) -> None:
    use(scheduler, pipe, eager, **settings)
    key = (scheduler, str(settings), guidance)
    uncached = eager_once(key, lambda: generate(eager, guidance=guidance, steps=6))
    assert decibels(generate(pipe, guidance=guidance, steps=6), uncached) > SAME
    for schedule, cut in ((Uniform(2), "deepcache:0"), (Quad(3, center=4, cooldown=1), "deepcache:2")):
        pipe.unet.set_schedule(schedule, cut=cut)
        latents = generate(pipe, guidance=guidance, steps=6)
        run = pipe.unet.last_run
        assert run.calls == len(run.full) == calls
        assert run.full_calls == schedule.full_calls(calls)

        def reference(cut: str = cut, full_calls: tuple[int, ...] = run.full_calls) -> torch.Tensor:
            with cached_by_call(eager.unet, int(cut[-1]), full_calls) as caching:
                latents = generate(eager, guidance=guidance, steps=6)
            assert caching.calls == calls
            return latents

        expected = eager_once((*key, cut), reference)
        assert decibels(latents, expected) > SAME
        assert decibels(expected, uncached) < OTHER


def test_a_noisy_scheduler_and_a_schedule_with_every_modifier(
    pipe: Any, eager: Any, generate: Generate, decibels: Decibels, cached_by_call: Callable[..., Any]
) -> None:
    use(EulerAncestralDiscreteScheduler, pipe, eager)
    schedule = Uniform(6, warmup=2, cooldown=2, max_shallow=3)
    pipe.unet.set_schedule(schedule, cut="deepcache:1")
    latents = generate(pipe, steps=16)
    assert pipe.unet.last_run.timeline == "##...#.#...#.###"
    with cached_by_call(eager.unet, 1, schedule.full_calls(16)):
        assert decibels(latents, generate(eager, steps=16)) > SAME


def test_rising_timesteps_of_an_inversion_follow_an_announced_schedule(
    pipe: Any, eager: Any, decibels: Decibels, cached_by_call: Callable[..., Any]
) -> None:
    scheduler = DDIMInverseScheduler.from_config(pipe.scheduler.config)
    text, _ = eager.encode_prompt("a red square", torch.device("cpu"), 1, False)

    def invert(unet: Any) -> torch.Tensor:
        scheduler.set_timesteps(8)
        latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            for timestep in scheduler.timesteps:
                noise_pred = unet(latents, timestep, encoder_hidden_states=text).sample
                latents = scheduler.step(noise_pred, timestep, latents).prev_sample
        return latents

    pipe.unet.set_schedule(Uniform(3))
    with pipe.unet.generation(calls=8):
        announced = invert(pipe.unet)
    assert pipe.unet.last_run.timeline == "#..#..#."
    with cached_by_call(eager.unet, 0, (0, 3, 6)):
        assert decibels(announced, invert(eager.unet)) > SAME
    assert torch.equal(invert(pipe.unet), announced)  # unannounced: the places of the timesteps show the steps


def test_a_cut_with_stale_skips_runs_and_differs_from_a_cut_without(
    pipe: Any, generate: Generate, decibels: Decibels
) -> None:
    pipe.unet.set_schedule(Uniform(3), cut="deepcache:2")
    fresh = generate(pipe)
    pipe.unet.set_schedule(Uniform(3), cut="mlperf")
    assert decibels(generate(pipe), fresh) < OTHER


def test_the_helper_accepts_deepcaches_parameters(
    pipe: Any, eager: Any, generate: Generate, decibels: Decibels
) -> None:
    uncached = generate(pipe)
    results = []
    for helper in (DeepCacheSDHelper(pipe=eager), offcut.DeepCacheSDHelper(pipe=pipe)):
        helper.set_params(cache_interval=3, cache_branch_id=1)
        helper.enable()
        results.append(generate(helper.pipe))
        helper.disable()
    assert decibels(results[1], results[0]) > SAME
    assert torch.equal(generate(pipe), uncached)
