"""Every scheduler of Stable Diffusion, from 1 to 50 steps: calls, schedule and latents equal eager diffusers."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, SchedulerMixin, StableDiffusionPipeline, UNet2DConditionModel

import offcut
from offcut.runtime.generation.schedule import Uniform

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array:DeprecationWarning", "ignore:.*:FutureWarning:diffusers"
)  # diffusers' use of NumPy, and its deprecations

SAME = 100.0
"""PSNR in dB from which two trajectories count as equal; rounding in fp32 gives 110 to 150."""

SETTINGS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
    "DDPMScheduler": {"clip_sample": False},
    "LCMScheduler": {"clip_sample": False},
    "DPMSolverSDEScheduler": {"noise_sampler_seed": 0},
}
"""Settings of Stable Diffusion's own configs, because clipped latents hide differences; and a seed of its own."""


def _compatible() -> list[type[SchedulerMixin]]:
    return sorted(
        {DDIMScheduler, diffusers.LCMScheduler, diffusers.TCDScheduler, *DDIMScheduler().compatibles},
        key=lambda scheduler: scheduler.__name__,
    )


EVERY_SCHEDULER = pytest.mark.parametrize("scheduler", _compatible(), ids=lambda scheduler: scheduler.__name__)


@pytest.fixture(scope="module")
def eager_pipe(tiny_unet_dir: Path) -> StableDiffusionPipeline:
    return _pipeline(UNet2DConditionModel.from_pretrained(tiny_unet_dir).eval())


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def cached_pipe(request: pytest.FixtureRequest, unet_bundle: Path) -> Iterator[Any]:
    unet = offcut.UNet.load(unet_bundle, request.param, threads=1)
    yield offcut.attach(_pipeline(unet), unet)
    unet.close()


def _pipeline(unet: Any) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline(None, None, None, unet, DDIMScheduler(), None, None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def new_scheduler(scheduler: type[Any], **more: Any) -> Any:
    """Return a scheduler with Stable Diffusion's noise schedule; skip the test if a package is missing."""
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    settings |= SETTINGS.get(scheduler.__name__, {}) | more
    known = inspect.signature(scheduler).parameters
    try:
        return scheduler(**{name: value for name, value in settings.items() if name in known})
    except ImportError as error:
        pytest.skip(str(error).strip().splitlines()[0])


def denoise(pipe: Any, scheduler: Any, **settings: Any) -> torch.Tensor:
    """Latents [1, 4, 16, 16], with guidance."""
    pipe.scheduler = copy.deepcopy(scheduler)
    embeds = torch.randn(2, 1, 7, 16, generator=torch.Generator().manual_seed(2))
    latents = pipe(
        prompt_embeds=embeds[0],
        negative_prompt_embeds=embeds[1],
        guidance_scale=4.0,
        height=128,
        width=128,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
        **settings,
    ).images
    assert isinstance(latents, torch.Tensor)
    return latents


def check(
    eager: Any,
    pipe: Any,
    scheduler: Any,
    cached_by_call: Callable[..., Any],
    decibels: Callable[[torch.Tensor, torch.Tensor], float],
    **settings: Any,
) -> int:
    """Compare an uncached run and a run at interval 3 with eager diffusers; return the number of calls of a run."""
    with cached_by_call(eager.unet, 0, range(1000)) as counting:
        uncached = denoise(eager, scheduler, **settings)
    calls = counting.calls
    with cached_by_call(eager.unet, 0, Uniform(3).full_calls(calls)):
        expected = denoise(eager, scheduler, **settings)
    for schedule, latents in ((None, uncached), (Uniform(3), expected)):
        pipe.unet.set_schedule(schedule)
        actual = denoise(pipe, scheduler, **settings)
        run = pipe.unet.last_run
        assert run.calls == len(run.full) == calls
        assert run.full_calls == (Uniform(3).full_calls(calls) if schedule else tuple(range(calls)))
        assert torch.isfinite(actual).all()
        assert decibels(actual, latents) > SAME, (scheduler, settings, schedule, decibels(actual, latents))
    if calls > 1:
        assert decibels(expected, uncached) < SAME
    return calls


def is_refused(eager: Any, pipe: Any, scheduler: Any, **settings: Any) -> bool:
    """Return whether the scheduler itself refuses these settings; check that it then does so with engines too."""
    try:
        denoise(eager, scheduler, **settings)
    except (ValueError, IndexError, AttributeError) as refusal:
        with pytest.raises(type(refusal)):
            denoise(pipe, scheduler, **settings)
        return True
    return False


@EVERY_SCHEDULER
def test_from_one_step_to_twenty(
    eager_pipe: Any, cached_pipe: Any, scheduler: type[Any], cached_by_call: Any, decibels: Any
) -> None:
    one = new_scheduler(scheduler)
    for steps in (1, 2, 4, 20) if cached_pipe.unet.engine == "onnxruntime" else (4,):
        if is_refused(eager_pipe, cached_pipe, one, num_inference_steps=steps):
            assert steps <= 2
            continue
        check(eager_pipe, cached_pipe, one, cached_by_call, decibels, num_inference_steps=steps)


@pytest.mark.slow
@pytest.mark.parametrize("cached_pipe", ["onnxruntime"], indirect=True)
@EVERY_SCHEDULER
def test_fifty_steps(
    eager_pipe: Any, cached_pipe: Any, scheduler: type[Any], cached_by_call: Any, decibels: Any
) -> None:
    calls = check(eager_pipe, cached_pipe, new_scheduler(scheduler), cached_by_call, decibels, num_inference_steps=50)
    assert calls >= 50


@pytest.mark.parametrize("cached_pipe", ["onnxruntime"], indirect=True)
@EVERY_SCHEDULER
def test_custom_timesteps_and_sigmas(
    eager_pipe: Any, cached_pipe: Any, scheduler: type[Any], cached_by_call: Any, decibels: Any
) -> None:
    one = new_scheduler(scheduler)
    taken = inspect.signature(one.set_timesteps).parameters
    own: dict[str, list[Any]] = {"timesteps": [999, 899, 599, 499, 299, 199, 99], "sigmas": [12.0, 8.0, 4.0, 1.5, 0.3]}
    call_counts = [
        check(eager_pipe, cached_pipe, one, cached_by_call, decibels, **{name: values})
        for name, values in own.items()
        if name in taken and not is_refused(eager_pipe, cached_pipe, one, **{name: values})
    ]
    if not call_counts:
        pytest.skip("the scheduler takes neither timesteps nor sigmas")
    assert min(call_counts) >= 4
