"""Text2Video-Zero: an image UNet whose frames attend to the first one, on compiled, cached engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, TextToVideoZeroPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from support.models import save_unet, text_to_latent_parts

import offcut
from offcut.errors import BundleError, EngineError, ModelError, ShapeError, UserError
from offcut.exporter.load import locate

pytestmark = pytest.mark.slow


# diffusers requires both arguments for this pipeline, even if they are None.
NO_SAFETY_CHECKER: dict[str, Any] = {"safety_checker": None, "feature_extractor": None}


@pytest.fixture(scope="module")
def model(tiny_unet_dir: Path, once: Callable[..., Path]) -> Path:
    def save(path: Path) -> None:
        unet = UNet2DConditionModel.from_pretrained(tiny_unet_dir)
        parts = text_to_latent_parts(path, width=16) | NO_SAFETY_CHECKER
        TextToVideoZeroPipeline(**parts, unet=unet, requires_safety_checker=False).save_pretrained(path)

    return once("tiny-zero", save)


@pytest.fixture(scope="module")
def bundle(model: Path, once: Callable[..., Path]) -> Path:
    engines = ["onnxruntime", "openvino"]
    return once("tiny-zero.offcut", lambda path: offcut.build(model, path, cuts=["deepcache:1"], engine=engines))


@pytest.fixture
def eager(model: Path) -> Any:
    pipe = TextToVideoZeroPipeline.from_pretrained(model, **NO_SAFETY_CHECKER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def cached(bundle: Path, engine: str) -> Iterator[Any]:
    pipe = offcut.load(bundle, engine, threads=1, **NO_SAFETY_CHECKER)
    pipe.set_progress_bar_config(disable=True)
    yield pipe
    pipe.unet.close()


def video(pipe: Any, **settings: Any) -> torch.Tensor:
    """Latents [4, 4, 8, 8]: the first frame in three steps, one more, then all frames in five."""
    arguments: dict[str, Any] = {"prompt": "a cat", "video_length": 4, "t0": 3, "t1": 4, "num_inference_steps": 8}
    generator = torch.Generator().manual_seed(1)
    latents = pipe(**arguments | settings, generator=generator, output_type="latent").images
    assert torch.isfinite(latents).all()
    return torch.as_tensor(latents)


def test_a_cached_video_equals_the_same_caching_in_eager_pytorch(
    eager: Any,
    cached: Any,
    cached_by_call: Callable[..., Any],
    decibels: Callable[[torch.Tensor, torch.Tensor], float],
) -> None:
    uncached = video(eager)
    assert decibels(video(cached), uncached) > 90
    cached.unet.set_schedule(offcut.Uniform(3), cut="deepcache:1")
    latents = video(cached)
    # The first frame has four calls. Then the sampler goes back to an earlier step with all frames, another trajectory.
    assert cached.unet.last_run.timeline == "#..#" + "#..#."
    with cached_by_call(eager.unet, 1, cached.unet.last_run.full_calls):
        expected = video(eager)
    assert decibels(latents, expected) > 90
    assert decibels(uncached, expected) < 60


def test_the_attention_comes_from_the_pipeline_and_is_in_the_manifest(bundle: Path, model: Path) -> None:
    assert offcut.Bundle.open(bundle).manifest.source.attention == "cross-frame"
    assert locate(model).attention == "cross-frame"


def test_a_pipeline_that_sets_no_attention_is_refused(bundle: Path, eager: Any) -> None:
    plain = StableDiffusionPipeline(**eager.components, image_encoder=None, requires_safety_checker=False)
    pipe = offcut.attach(plain, bundle, "onnxruntime")
    with pytest.raises(UserError, match="was built with cross-frame attention, which this pipeline does not use"):
        pipe("a cat", num_inference_steps=2)
    with pytest.raises(ShapeError, match=r"two equal halves, .* not 1 frames: use guidance"):
        pipe("a cat", num_inference_steps=2, guidance_scale=1)
    with pytest.raises(UserError, match="attention processors are part of a UNet's layers"):
        pipe.unet.set_attn_processor(AttnProcessor2_0())
    pipe.unet.close()


def test_a_bundle_without_cross_frame_attention_refuses_the_processor(unet_bundle: Path, eager: Any) -> None:
    pipe = offcut.attach(eager, unet_bundle, "onnxruntime")
    with pytest.raises(UserError, match=r"sets cross-frame attention, .* with --attention cross-frame"):
        video(pipe)
    pipe.unet.close()


def test_a_bundle_holds_one_kind_of_attention(unet_bundle: Path, tiny_unet_dir: Path) -> None:
    with pytest.raises(BundleError, match="holds this UNet with its own attention, not cross-frame"):
        offcut.build(tiny_unet_dir, unet_bundle, engine="onnxruntime", attention="cross-frame")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"attention": "sliced"}, ModelError, "takes no attention called 'sliced'; it takes cross-frame"),
        ({"attention": "cross-frame", "dims": {"batch": 3}}, ModelError, "two halves of a batch, not 3"),
        (
            {"attention": "cross-frame", "precision": "int8", "calibration": offcut.Calibration()},
            EngineError,
            "int8 is calibrated on images: build a UNet for videos in",
        ),
    ],
)
def test_unsupported_attention_settings_are_refused(
    settings: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        offcut.build(save_unet(tmp_path / "unet"), tmp_path / "out", engine="onnxruntime", **settings)
