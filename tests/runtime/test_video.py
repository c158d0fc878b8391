"""Video pipelines on compiled, cached engines, compared with the same caching in eager PyTorch, implemented here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from support.models import new_unet
from support.reuse import EagerReuse
from support.videos import SKIPS, UNETS, random_inputs

import offcut
from offcut.errors import BundleError, EngineError, ModelError, ShapeError, UserError

pytestmark = pytest.mark.slow
SCHEDULE = offcut.Uniform(3)
STEPS = 7
Generate = Callable[..., torch.Tensor]


@pytest.fixture(params=list(SKIPS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def eager(name: str, video_dir: Callable[[str], Path]) -> Any:
    pipe = diffusers.DiffusionPipeline.from_pretrained(video_dir(name))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def loaded(video_bundle: Callable[[str], Path]) -> Iterator[Callable[[str, str], Any]]:
    """Return a function that returns the pipeline on a bundle's engine, each loaded once."""
    pipes: dict[tuple[str, str], Any] = {}

    def load(name: str, engine: str) -> Any:
        if (name, engine) not in pipes:
            pipes[name, engine] = offcut.load(video_bundle(name), engine, threads=1)
            pipes[name, engine].set_progress_bar_config(disable=True)
        return pipes[name, engine]

    yield load
    for pipe in pipes.values():
        pipe.unet.close()


@pytest.fixture
def cached(name: str, engine: str, loaded: Callable[[str, str], Any]) -> Iterator[Any]:
    pipe = loaded(name, engine)
    yield pipe
    pipe.unet.set_schedule(None)


def video_latents(
    pipe: Any, *, num_frames: int = 3, height: int = 32, width: int = 32, **settings: Any
) -> torch.Tensor:
    """Generate a video; return its latents."""
    conditioning: dict[str, Any] = {"prompt": "a red square"}
    if "image" in inspect.signature(pipe.__call__).parameters:
        conditioning = {"image": Image.linear_gradient("L").convert("RGB").resize((width, height))}
    latents = pipe(
        **conditioning,
        num_frames=num_frames,
        height=height,
        width=width,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
        **settings,
    ).frames
    assert torch.isfinite(latents).all()
    return torch.as_tensor(latents)


def reusing(unet: Any, full_calls: tuple[int, ...]) -> EagerReuse:
    """Reuse the feature of deepcache:1 from the last full call on shallow calls."""
    return EagerReuse(unet, lambda call: (None, call in full_calls), branch=1)


def test_a_cached_video_equals_the_same_caching_in_eager_pytorch(
    eager: Any, cached: Any, decibels: Callable[[torch.Tensor, torch.Tensor], float]
) -> None:
    uncached = video_latents(eager)
    with reusing(eager.unet, SCHEDULE.full_calls(STEPS)):
        expected = video_latents(eager)
    cached.unet.set_schedule(SCHEDULE, cut="deepcache:1")
    match = decibels(video_latents(cached), expected)
    assert match > 90
    assert cached.unet.last_run.timeline == "#..#..#"
    assert cached.unet.last_run.calls == STEPS
    assert decibels(uncached, expected) < match - 20  # caching changes the video


@pytest.mark.parametrize("fast", [False, True], ids=["whole rounds", "fast sampling"])
def test_each_round_of_freeinit_follows_the_schedule(
    fast: bool,
    engine: str,
    loaded: Callable[[str, str], Any],
    video_dir: Callable[[str], Path],
    decibels: Callable[[torch.Tensor, torch.Tensor], float],
) -> None:
    eager, pipe = diffusers.DiffusionPipeline.from_pretrained(video_dir("animatediff")), loaded("animatediff", engine)
    for each in (eager, pipe):
        each.enable_free_init(method="butterworth", num_iters=3, use_fast_sampling=fast)
    rounds = [STEPS // 3, STEPS * 2 // 3, STEPS] if fast else [STEPS] * 3
    uncached = video_latents(eager)
    pipe.unet.set_schedule(None)
    assert decibels(video_latents(pipe), uncached) > 100
    pipe.unet.set_schedule(SCHEDULE, cut="deepcache:1")
    full = [call for calls in rounds for call in (number in SCHEDULE.full_calls(calls) for number in range(calls))]
    with reusing(eager.unet, tuple(index for index, is_full in enumerate(full) if is_full)):
        expected = video_latents(eager)
    assert decibels(video_latents(pipe), expected) > 90
    assert decibels(expected, uncached) < 80
    assert pipe.unet.last_run.full == tuple(full)
    pipe.disable_free_init()
    pipe.unet.set_schedule(None)


def test_a_video_of_another_length_and_size_equals_eager_pytorch(
    eager: Any, cached: Any, decibels: Callable[[torch.Tensor, torch.Tensor], float]
) -> None:
    # Text-to-video's pipeline in diffusers mixes up height and width, so its videos are square.
    size = {"num_frames": 5, "height": 48, "width": 48 if "ToVideo" in type(eager).__name__ else 32}
    assert decibels(video_latents(cached, **size), video_latents(eager, **size)) > 90


def test_a_bundle_attaches_to_a_video_pipeline(
    name: str, eager: Any, video_bundle: Callable[[str], Path], decibels: Callable[[torch.Tensor, torch.Tensor], float]
) -> None:
    expected = video_latents(eager)
    pipe = offcut.attach(eager, video_bundle(name), "onnxruntime")
    assert decibels(video_latents(pipe), expected) > 90
    pipe.unet.close()


def test_the_unet_has_the_signature_and_output_of_diffusers_own(name: str, cached: Any) -> None:
    unet = new_unet(UNETS[name])
    inputs = random_inputs(name, batch=2, frames=3, height=8, width=8)
    timestep = inputs.pop("timestep")
    named = {"sample": inputs.pop("sample"), "timestep": timestep, **inputs}
    order = [each for each in inspect.signature(unet.forward).parameters if each in named]
    with torch.no_grad():
        expected = unet(**named)
    actual = cached.unet(*(named[each] for each in order))
    assert type(actual) is type(expected)
    (noise,) = cached.unet(**named, return_dict=False)
    assert torch.equal(noise, actual.sample)
    torch.testing.assert_close(actual.sample, expected.sample, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("count", "message"), [(9, "supports at most 8 frames, not 9: make fewer"), (1, "a video has at least 2 frames")]
)
def test_an_unsupported_number_of_frames_is_refused(
    count: int, message: str, loaded: Callable[[str, str], Any]
) -> None:
    with pytest.raises(ShapeError, match=message):
        video_latents(loaded("animatediff", "onnxruntime"), num_frames=count)


def test_a_bundle_of_another_kind_of_unet_is_refused(
    tiny_bundle: Path, video_dir: Callable[[str], Path], video_bundle: Callable[[str], Path]
) -> None:
    pipe = diffusers.DiffusionPipeline.from_pretrained(video_dir("animatediff"))
    with pytest.raises(BundleError, match=r"\(UNet2DConditionModel instead of UNetMotionModel\)"):
        offcut.attach(pipe, tiny_bundle, "onnxruntime")
    with pytest.raises(BundleError, match=r"\(UNet3DConditionModel instead of UNetMotionModel\)"):
        offcut.attach(pipe, video_bundle("text-to-video"), "onnxruntime")


def test_a_motion_adapter_apart_from_its_unet_is_refused(
    tiny_pipeline_dir: Path, video_dir: Callable[[str], Path], copied: Callable[[Path], Path], tmp_path: Path
) -> None:
    import shutil

    model = copied(video_dir("animatediff"))
    shutil.rmtree(model / "unet")
    shutil.copytree(tiny_pipeline_dir / "unet", model / "unet")
    with pytest.raises(ModelError, match="keeps its motion adapter apart from its UNet, and diffusers joins them"):
        offcut.build(model, tmp_path / "out", engine="onnxruntime")


def test_int8_is_not_for_videos(video_dir: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="calibrated on images: build a UNet for videos in fp32, fp16 or bf16"):
        offcut.build(
            video_dir("svd"),
            tmp_path / "out",
            engine="onnxruntime",
            precision="int8",
            calibration=offcut.Calibration(),
        )


def test_forward_chunking_is_refused(loaded: Callable[[str, str], Any]) -> None:
    with pytest.raises(UserError, match=r"forward chunking .* leave it out"):
        loaded("svd", "onnxruntime").unet.enable_forward_chunking()
