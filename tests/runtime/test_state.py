"""No state of a generation affects the next one, and buffers keep their addresses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import AutoPipelineForImage2Image, StableDiffusionImg2ImgPipeline
from torch.utils._python_dispatch import TorchDispatchMode

import offcut
from offcut.runtime.generation.schedule import Uniform

Generate = Callable[..., torch.Tensor]


class Cancelled(Exception):
    """Raised by a callback."""


def poison(unet: offcut.UNet) -> None:
    """Put NaN into every cached feature, so that an image shows when it reads a feature of an earlier generation."""
    features = {name for cached in unet.cut_features.values() for name in cached}
    for bound in unet._bound.values():
        for name in features:
            bound.buffers[name].fill_(math.nan)


@pytest.fixture(params=["attached", "unannounced"])
def run(request: pytest.FixtureRequest, pipe: Any, generate: Generate) -> Callable[..., torch.Tensor]:
    """Return a function that generates after poisoning, with announced and with unannounced generations."""
    if request.param == "unannounced":
        pipe.__class__ = type(pipe).__mro__[2]  # diffusers' own class again
        assert not hasattr(pipe, "announce_and_call")
    pipe.unet.set_schedule(Uniform(3), cut="deepcache:1")

    def poisoned(which: Any = pipe, **settings: Any) -> torch.Tensor:
        poison(pipe.unet)
        return generate(which, **settings)

    return poisoned


def cancel(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
    if step == 4:
        pipe._interrupt = True
    return values


def fail(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
    if step == 4:
        raise Cancelled
    return values


def test_an_image_is_the_same_after_another_image(pipe: Any, run: Generate) -> None:
    first = run()
    assert pipe.unet.last_run.timeline == "#..#..#..#"
    assert not torch.equal(run(prompt="a blue circle", seed=2), first)
    assert torch.equal(run(), first)


def test_an_image_is_the_same_after_a_cancelled_one(pipe: Any, run: Generate) -> None:
    first = run()
    assert not torch.equal(run(callback_on_step_end=cancel), first)
    assert pipe.unet.last_run.timeline == "#..#."
    assert torch.equal(run(), first)


def test_an_image_is_the_same_after_an_exception(pipe: Any, run: Generate) -> None:
    first = run()
    with pytest.raises(Cancelled):
        run(callback_on_step_end=fail)
    assert pipe.unet.last_run.timeline == "#..#."
    assert torch.equal(run(), first)


def test_an_image_is_the_same_after_a_failed_engine_call(
    pipe: Any, run: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run()
    bound = pipe.unet.bound
    with monkeypatch.context() as broken:
        broken.setattr(type(bound), "shallow", lambda bound, cut: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run()
    assert torch.equal(run(), first)


def test_an_image_is_the_same_after_other_shapes(pipe: Any, run: Generate) -> None:
    first = run()
    run(height=32, width=64)
    run(guidance=1.0)
    run(num_images_per_prompt=2)
    assert torch.equal(run(), first)


def test_an_image_is_the_same_after_other_schedules_and_cuts(pipe: Any, run: Generate) -> None:
    first = run()
    pipe.unet.set_schedule(Uniform(2, warmup=2), cut="mlperf")
    assert not torch.equal(run(), first)
    pipe.unet.set_schedule(Uniform(3), cut="deepcache:1")
    assert torch.equal(run(), first)


@pytest.mark.parametrize("attach", [True, False], ids=["attached", "components"])
def test_an_image_is_the_same_after_other_img2img_strengths(pipe: Any, run: Generate, attach: bool) -> None:
    img2img = (
        AutoPipelineForImage2Image.from_pipe(pipe) if attach else StableDiffusionImg2ImgPipeline(**pipe.components)
    )
    img2img.set_progress_bar_config(disable=True)
    if attach:
        offcut.attach(img2img, pipe.unet)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(5))

    text_to_image = run()
    first = run(img2img, image=image, strength=0.5)
    assert pipe.unet.last_run.timeline == "#..#."
    assert pipe.unet.last_run.calls == (5 if attach else None)
    for strength in (0.9, 0.3):
        run(img2img, image=image, strength=strength)
        assert torch.equal(run(img2img, image=image, strength=0.5), first)
    with pytest.raises(Cancelled):
        run(img2img, image=image, strength=0.9, callback_on_step_end=fail)
    assert torch.equal(run(img2img, image=image, strength=1.0), run(img2img, image=image, strength=1.0))
    run(callback_on_step_end=cancel)  # ends above the timestep at which the next generation begins
    assert torch.equal(run(img2img, image=image, strength=0.5), first)
    assert torch.equal(run(), text_to_image)
    assert torch.equal(run(img2img, image=image, strength=0.5), first)


# Buffers


@contextmanager
def recorded_operations(unet: offcut.UNet) -> Iterator[list[list[str]]]:
    """Record the ATen operations of each call of ``UNet.forward`` in this block."""
    calls: list[list[str]] = []
    forward = unet.forward

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls[-1].append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    def recorded(*args: Any, **kwargs: Any) -> Any:
        calls.append([])
        with Recorder():
            return forward(*args, **kwargs)

    unet.forward = recorded
    try:
        yield calls
    finally:
        del unet.forward


def test_from_the_second_call_on_only_the_result_is_allocated_and_nothing_is_read_on_the_host(
    pipe: Any, generate: Generate
) -> None:
    pipe.unet.set_schedule(Uniform(3))
    pipe.unet._bound.clear()
    with recorded_operations(pipe.unet) as calls:
        generate(pipe)
    assert len(calls) == 10
    assert "zeros" in calls[0]
    for operations in calls[1:]:
        # Copies into the buffers of sample, text and timestep, and out of the buffer of noise_pred. A read on the host,
        # as in .item() and bool(), would be _local_scalar_dense.
        assert operations == ["copy_", "copy_", "view", "copy_", "_to_copy"]


def test_unannounced_calls_read_only_timesteps_that_are_no_elements_of_a_tensor(pipe: Any, generate: Generate) -> None:
    pipe.unet.set_schedule(Uniform(3))
    pipe.__class__ = type(pipe).__mro__[2]
    with recorded_operations(pipe.unet) as calls:
        generate(pipe)
        assert not any("_local_scalar_dense" in operations for operations in calls[1:])
        forward = pipe.unet.forward
        pipe.unet.forward = lambda sample, timestep, *args, **kwargs: forward(sample, timestep.clone(), *args, **kwargs)
        calls.clear()
        generate(pipe)
        assert all("_local_scalar_dense" in operations for operations in calls)
        assert pipe.unet.last_run.timeline == "#..#..#..#"


def test_buffers_keep_their_addresses(pipe: Any, generate: Generate, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = pipe.unet
    unet.set_schedule(Uniform(3))
    generate(pipe)
    generate(pipe, guidance=1.0)

    def addresses() -> dict[Any, int]:
        return {
            (key, name): buffer.data_ptr()
            for key, bound in unet._bound.items()
            for name, buffer in bound.buffers.items()
        }

    before = addresses()
    assert len(unet._bound) == 2
    monkeypatch.setattr(unet._pair, "prepare", lambda shapes: pytest.fail("bound again"))
    for _ in range(2):
        generate(pipe)
        generate(pipe, guidance=1.0)
        unet.set_schedule(Uniform(2), cut="mlperf")
    assert addresses() == before


def test_both_graphs_share_the_memory_of_the_features(pipe: Any, generate: Generate) -> None:
    """A shallow call reads the buffer that the full call wrote."""
    pipe.unet.set_schedule(Uniform(3))
    generate(pipe)
    bound = pipe.unet.bound
    bound.full()
    bound.shallow("deepcache:0")
    fresh = bound.buffers["noise_pred"].clone()
    (name,) = pipe.unet.cut_features["deepcache:0"]
    bound.buffers[name].add_(1)
    bound.shallow("deepcache:0")
    assert not torch.equal(bound.buffers["noise_pred"], fresh)
    poison(pipe.unet)
    bound.shallow("deepcache:0")
    assert bound.buffers["noise_pred"].isnan().any()
