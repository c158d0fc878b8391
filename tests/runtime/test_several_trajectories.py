"""Generations of several latents or passes: each reads its own cached features only, as in eager PyTorch.

The reference is the eager UNet with the reuse written out: on shallow calls the outermost decoder layer gets the
feature of the last full call of the same latent.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPAGPipeline,
    StableDiffusionPanoramaPipeline,
    StableDiffusionPipeline,
    StableDiffusionSAGPipeline,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from support.reuse import EagerReuse

import offcut
from offcut.errors import UserError
from offcut.runtime.batching import Worker
from offcut.runtime.generation.schedule import Schedule, Steps, Uniform

Decibels = Callable[[torch.Tensor, torch.Tensor], float]

SAME = 110.0
"""PSNR in dB from which two results count as equal. Rounding in fp32 gives about 140."""

OTHER = 80.0
"""PSNR in dB below which two results count as different."""


@pytest.fixture(scope="module")
def tiny_pipeline(tiny_pipeline_dir: Path) -> Any:
    """An eager pipeline whose autoencoder divides sizes by 8, as panoramas need."""
    levels = 4
    vae = AutoencoderKL(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=4,
        norm_num_groups=4,
    )
    return StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir, vae=vae)


@pytest.fixture(scope="module")
def eager(tiny_pipeline: Any) -> Any:
    return tiny_pipeline.unet


@pytest.fixture
def unet(tiny_bundle: Path) -> Iterator[offcut.UNet]:
    unet = offcut.UNet.load(tiny_bundle, "onnxruntime", threads=1)
    unet.advise = False
    yield unet
    unet.close()


def latents_of(number: int, size: int = 8) -> torch.Tensor:
    return torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(number))


def text_of(number: int, width: int) -> torch.Tensor:
    return torch.randn(1, 7, width, generator=torch.Generator().manual_seed(100 + number))


def new_scheduler(steps: int) -> DDIMScheduler:
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(steps)
    return scheduler


def panorama(pipe: Any, unet: Any) -> Any:
    components = {**pipe.components, "unet": unet}
    components.pop("image_encoder", None)
    panorama_pipe = StableDiffusionPanoramaPipeline(**components, requires_safety_checker=False)
    panorama_pipe.set_progress_bar_config(disable=True)
    return panorama_pipe


def run_panorama(pipe: Any, **settings: Any) -> torch.Tensor:
    arguments = {"prompt": "a red square", "num_inference_steps": 7, "guidance_scale": 5.0, "output_type": "latent"}
    size = {"height": 128, "width": 640}
    latents: torch.Tensor = pipe(**{**arguments, **size, **settings}, generator=torch.Generator().manual_seed(0)).images
    return latents


VIEWS = 3


def by_view(interval: int) -> Callable[[int], tuple[int, bool]]:
    return lambda call: (call % VIEWS, call // VIEWS % interval == 0)


def test_each_view_of_a_panorama_reuses_its_own_features(
    tiny_pipeline: Any, eager: Any, unet: offcut.UNet, decibels: Decibels
) -> None:
    eager_pipe, pipe = panorama(tiny_pipeline, eager), offcut.attach(panorama(tiny_pipeline, unet), unet)
    uncached = run_panorama(eager_pipe)
    unet.set_schedule(None)
    assert decibels(run_panorama(pipe), uncached) > SAME
    for interval in (2, 3):
        with EagerReuse(eager, by_view(interval)):
            expected = run_panorama(eager_pipe)
        unet.set_schedule(Uniform(interval))
        assert decibels(run_panorama(pipe), expected) > SAME
        assert decibels(expected, uncached) < OTHER
        assert unet.last_run is not None
        assert unet.last_run.calls == 7
        assert unet.last_run.trajectories == tuple(range(VIEWS)) * 7
    bound = unet.bound
    assert bound is not None
    (name,) = unet.cut_features["deepcache:0"]
    assert unet.last_run.copied_bytes == VIEWS * bound.buffers[name].nbytes


def test_views_without_room_for_their_features_make_full_calls_and_say_so(
    tiny_pipeline: Any, eager: Any, unet: offcut.UNet, decibels: Decibels, caplog: pytest.LogCaptureFixture
) -> None:
    pipe, eager_pipe = offcut.attach(panorama(tiny_pipeline, unet), unet), panorama(tiny_pipeline, eager)
    unet.set_schedule(Uniform(3))
    run_panorama(pipe)
    assert unet.last_run is not None
    unet.cache_bytes = unet.last_run.copied_bytes // VIEWS
    actual = run_panorama(pipe)
    run = unet.last_run
    assert 0 < run.copied_bytes <= unet.cache_bytes
    assert "make full calls only: raise unet.cache_bytes" in caplog.text
    keys = list(zip(run.trajectories, run.full, strict=True))
    assert not all(run.full)
    with EagerReuse(eager, lambda call: keys[call]):
        assert decibels(actual, run_panorama(eager_pipe)) > SAME


@pytest.mark.parametrize("cache_bytes", [2**30, None])
def test_panoramas_of_a_worker_keep_their_views_apart(
    tiny_pipeline: Any, eager: Any, unet: offcut.UNet, decibels: Decibels, cache_bytes: int | None
) -> None:
    pipe, eager_pipe = offcut.attach(panorama(tiny_pipeline, unet), unet), panorama(tiny_pipeline, eager)
    unet.set_schedule(Uniform(3))
    run_panorama(pipe)
    assert unet.last_run is not None
    room = cache_bytes or unet.last_run.copied_bytes + 1  # room for one request's views, while two are in flight
    with EagerReuse(eager, by_view(3)):
        expected = run_panorama(eager_pipe)
    unet.set_schedule(None)
    arguments = {"prompt": "a red square", "num_inference_steps": 7, "guidance_scale": 5.0, "output_type": "latent"}
    with Worker(pipe, cache_bytes=room) as worker:
        tickets = [
            worker.submit(
                {**arguments, "height": 128, "width": 640, "generator": torch.Generator().manual_seed(seed)},
                schedule=Uniform(3),
            )
            for seed in (0, 0)
        ]
        images = [ticket.future.result(120).images for ticket in tickets]
        assert worker.statistics().slots == 0
    if cache_bytes is None:  # some views made full calls only
        uncached = run_panorama(eager_pipe)
        assert all(decibels(image, uncached) >= decibels(expected, uncached) - 1 for image in images)
    else:
        assert all(decibels(image, expected) > SAME for image in images)


def denoise(
    unet: Any,
    steps: int,
    order: Callable[[int], list[int]],
    block: Callable[[int], AbstractContextManager[object]] = lambda number: nullcontext(),
    *,
    by_value: bool = False,
    text: bool = True,
) -> list[torch.Tensor]:
    """Denoise several latents in one loop, in the order that a function returns for each step."""
    width = unet.config["cross_attention_dim"]
    numbers = sorted({number for step in range(steps) for number in order(step)})
    schedulers = {number: new_scheduler(steps) for number in numbers}
    latents = {number: latents_of(number) for number in numbers}
    texts = {number: text_of(number if text else 0, width) for number in numbers}
    with torch.no_grad():
        for step, timestep in enumerate(schedulers[numbers[0]].timesteps):
            for number in order(step):
                passed = float(timestep) if by_value else timestep
                with block(number):
                    noise = unet(latents[number], passed, encoder_hidden_states=texts[number]).sample
                latents[number] = schedulers[number].step(noise, timestep, latents[number]).prev_sample
    return [latents[number] for number in numbers]


def check(decibels: Decibels, actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert decibels(one, other) > SAME


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("by_value", [True, False])
def test_two_passes_a_step_reuse_their_own_features(
    eager: Any, unet: offcut.UNet, decibels: Decibels, announced: bool, by_value: bool
) -> None:
    steps, interval = 7, 3

    def both(step: int) -> list[int]:
        return [0, 1]

    uncached = denoise(eager, steps, both)
    unet.set_schedule(None)
    check(decibels, denoise(unet, steps, both), uncached)
    with EagerReuse(eager, lambda call: (call % 2, call // 2 % interval == 0)):
        expected = denoise(eager, steps, both)
    assert decibels(expected[0], uncached[0]) < OTHER
    unet.set_schedule(Uniform(interval))
    with unet.generation(steps) if announced else nullcontext():
        actual = denoise(unet, steps, both, by_value=by_value)
    check(decibels, actual, expected)
    assert unet.last_run is not None
    assert unet.last_run.timeline == "##....##....##"


@pytest.mark.parametrize("forecast", [offcut.Extrapolate(1.0), offcut.Extrapolate(0.5)], ids=str)
def test_latents_in_one_loop_equal_each_latent_alone(
    unet: offcut.UNet, decibels: Decibels, forecast: offcut.Extrapolate
) -> None:
    unet.set_schedule(Uniform(3, warmup=2), forecast=forecast)
    alone = []
    for number in (0, 1):
        with unet.generation(9):
            alone += denoise(unet, 9, lambda step, number=number: [number])  # type: ignore[misc]
    with unet.generation(9):
        together = denoise(unet, 9, lambda step: [0, 1])
    check(decibels, together, alone)
    unet.set_schedule(Uniform(3, warmup=2))
    with unet.generation(9):
        assert decibels(denoise(unet, 9, lambda step: [0, 1])[0], alone[0]) < OTHER


def test_text_embeddings_tell_the_passes_apart_where_the_first_one_ends_early(
    eager: Any, unet: offcut.UNet, decibels: Decibels
) -> None:
    keys = [0, 1] * 4 + [1] * 4

    def order(step: int) -> list[int]:
        return [0, 1] if step < 4 else [1]

    with EagerReuse(eager, lambda call: (keys[call], (call // 2 if call < 8 else call - 4) % 3 == 0)):
        expected = denoise(eager, 8, order)
    unet.set_schedule(Uniform(3))
    with unet.generation(8):
        actual = denoise(unet, 8, order)
    check(decibels, actual, expected)


def test_a_changed_order_that_nothing_shows_is_reported(unet: offcut.UNet, caplog: pytest.LogCaptureFixture) -> None:
    """Both latents have the same text embeddings, and the first one ends early. A fault, so no advice to turn off."""
    assert not unet.advise
    unet.set_schedule(Uniform(3))
    text = text_of(0, unet.config["cross_attention_dim"])
    with unet.generation(20):
        for step, timestep in enumerate(new_scheduler(20).timesteps):
            for number in [0, 1] if step < 4 else [1]:
                unet(latents_of(number), timestep, text)
    assert "called the UNet 2 times and the next step 1 times" in caplog.text
    assert "unet.trajectory(key)" in caplog.text


def test_a_callback_that_calls_the_unet_leaves_the_image_as_it_is(
    tiny_pipeline: Any, unet: offcut.UNet, decibels: Decibels
) -> None:
    components = {**tiny_pipeline.components, "unet": unet}
    pipe = offcut.attach(StableDiffusionPipeline(**components, requires_safety_checker=False), unet)
    pipe.set_progress_bar_config(disable=True)
    text = text_of(5, unet.config["cross_attention_dim"])

    def preview(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        for value in (0, float(timestep), int(timestep) - 10):
            with torch.no_grad():
                pipe.unet(latents_of(9), value, text)
        return {}

    unet.set_schedule(Uniform(3))
    arguments = {"prompt": "a red square", "num_inference_steps": 7, "height": 64, "width": 64, "output_type": "latent"}
    expected = pipe(**arguments, generator=torch.Generator().manual_seed(0)).images
    actual = pipe(**arguments, generator=torch.Generator().manual_seed(0), callback_on_step_end=preview).images
    assert decibels(actual, expected) > SAME


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 6),
    st.one_of(st.builds(Uniform, st.integers(1, 4)), st.builds(lambda call: Steps([0, call]), st.integers(1, 4))),
    st.randoms(use_true_random=False),
    st.booleans(),
)
def test_latents_in_random_order_with_keys_equal_eager_reuse(
    count: int, steps: int, schedule: Schedule, rng: random.Random, announced: bool
) -> None:
    """Latents advance in random order, each at its own step, by an explicit key."""
    eager, unet = _EAGER["unet"], _ENGINE["unet"]
    width = unet.config["cross_attention_dim"]
    order = [number for number in range(count) for _ in range(steps)]
    rng.shuffle(order)
    numbers_of_calls = [order[:index].count(number) for index, number in enumerate(order)]
    text = text_of(0, width)

    def run(model: Any, block: Callable[[int], AbstractContextManager[object]]) -> list[torch.Tensor]:
        schedulers = [new_scheduler(steps) for _ in range(count)]
        latents = [latents_of(number) for number in range(count)]
        with torch.no_grad():
            for number, step in zip(order, numbers_of_calls, strict=True):
                timestep = schedulers[number].timesteps[step]
                with block(number):
                    noise = model(latents[number], timestep, encoder_hidden_states=text).sample
                latents[number] = schedulers[number].step(noise, timestep, latents[number]).prev_sample
        return latents

    full = schedule.full_calls(steps)
    with EagerReuse(eager, lambda call: (order[call], numbers_of_calls[call] in full)):
        expected = run(eager, lambda number: nullcontext())
    unet.set_schedule(schedule)
    with unet.generation(steps) if announced else nullcontext():
        actual = run(unet, unet.trajectory)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


_EAGER: dict[str, Any] = {}
_ENGINE: dict[str, Any] = {}


@pytest.fixture(autouse=True, scope="module")
def models_of_the_random_test(tiny_pipeline: Any, tiny_bundle: Path) -> Iterator[None]:
    """Open the models once, since hypothesis runs a test many times with the same fixtures."""
    unet = offcut.UNet.load(tiny_bundle, "onnxruntime", threads=1)
    unet.advise = False
    _EAGER["unet"], _ENGINE["unet"] = tiny_pipeline.unet, unet
    yield
    unet.close()


def test_guidance_that_changes_attention_layers_is_refused(tiny_pipeline: Any, unet: offcut.UNet) -> None:
    settings = {"prompt": "a", "num_inference_steps": 2, "output_type": "latent"}
    names = ("vae", "text_encoder", "tokenizer", "scheduler", "safety_checker", "feature_extractor")
    components = {name: tiny_pipeline.components[name] for name in names} | {"unet": unet}
    sag = StableDiffusionSAGPipeline(**components, requires_safety_checker=False)
    with pytest.raises(UserError, match="reads the UNet's attention maps"):
        offcut.attach(sag, unet)
    with pytest.raises(UserError, match="uses the UNet's mid_block"):
        sag(**settings, sag_scale=0.75)
    pag = offcut.attach(StableDiffusionPAGPipeline(**components, requires_safety_checker=False), unet)
    with pytest.raises(UserError, match="pass pag_scale=0"):
        pag(**settings)
    plain = pag(**settings, pag_scale=0.0, generator=torch.Generator().manual_seed(0)).images
    expected = offcut.attach(StableDiffusionPipeline(**components, requires_safety_checker=False), unet)(
        **settings, generator=torch.Generator().manual_seed(0)
    ).images
    assert torch.equal(plain, expected)
    assert not hasattr(unet, "up_blocks")
