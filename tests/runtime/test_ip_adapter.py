"""IP-Adapters built into compiled, cached engines, compared with eager diffusers with the same files."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from support.ip_adapters import IMAGE_WIDTH, save_ip_adapter
from support.models import save_unet
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

import offcut
from offcut.errors import BundleError, EngineError, ModelError, UserError

pytestmark = pytest.mark.slow

Generate = Callable[..., torch.Tensor]
SCHEDULE = offcut.Uniform(3)
STEPS = 7
TOKENS = 5
"""Tokens of an image: four patches of 4x4 pixels, and one for the whole image."""


@pytest.fixture(scope="module")
def model(parts: dict[str, Any], once: Any) -> Path:
    """A pipeline with an image encoder, and in ``adapters`` two files for its UNet: a plain one and a Plus."""

    def make(path: Path) -> None:
        torch.manual_seed(5)
        unet = UNet2DConditionModel.from_pretrained(save_unet(path / "bare", cross_attention_dim=32))
        vision = CLIPVisionConfig(
            hidden_size=IMAGE_WIDTH,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
            projection_dim=IMAGE_WIDTH,
        )
        StableDiffusionPipeline(
            **parts
            | {
                "unet": unet,
                "scheduler": DDIMScheduler(clip_sample=False, steps_offset=1),
                "image_encoder": CLIPVisionModelWithProjection(vision),
                "feature_extractor": CLIPImageProcessor(size=8, crop_size=8),
            },
            requires_safety_checker=False,
        ).save_pretrained(path / "model")
        save_ip_adapter(path / "adapters" / "plain.safetensors", unet, seed=1)
        save_ip_adapter(path / "adapters" / "plus.safetensors", unet, seed=2, plus=True)

    return Path(once("tiny-ip-adapter", make))


@pytest.fixture(scope="module")
def bundle(model: Path, once: Any) -> Path:
    """Bundle with both adapters; the Plus adapter takes two images."""
    files = [f"{model / 'adapters' / 'plain.safetensors'}:0.6", f"{model / 'adapters' / 'plus.safetensors'}:0.8:2"]

    def build(path: Path) -> None:
        offcut.build(
            model / "model",
            path,
            cuts=["deepcache:0", "deepcache:2"],
            engine=["onnxruntime", "openvino"],
            ip_adapters=files,
        )

    return Path(once("tiny-ip-adapter.offcut", build))


@pytest.fixture
def eager(model: Path) -> Any:
    pipe = StableDiffusionPipeline.from_pretrained(model / "model", safety_checker=None)
    names = ["plain.safetensors", "plus.safetensors"]
    pipe.load_ip_adapter(str(model), subfolder="adapters", weight_name=names, image_encoder_folder=None)
    pipe.set_ip_adapter_scale([0.6, 0.8])
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def opened(request: pytest.FixtureRequest, bundle: Path) -> Iterator[Any]:
    pipe = offcut.load(bundle, request.param, threads=1)
    pipe.set_progress_bar_config(disable=True)
    yield pipe
    pipe.unet.close()


@pytest.fixture
def pipe(opened: Any) -> Any:
    opened.set_ip_adapter_scale([0.6, 0.8])
    opened.unet.set_schedule(None)
    return opened


@pytest.fixture
def pictures() -> list[Any]:
    """One image for the plain adapter, and two for the Plus adapter."""
    random = np.random.default_rng(0)
    one, two, three = (Image.fromarray(random.integers(0, 255, (8, 8, 3), dtype=np.uint8)) for _ in range(3))
    return [one, [two, three]]


def embeds_of(pipe: Any, pictures: Any) -> list[torch.Tensor]:
    """Return the embeddings of the images; with guidance, those of no image come first."""
    return list(pipe.prepare_ip_adapter_image_embeds(pictures, None, torch.device("cpu"), 1, True))


@pytest.mark.parametrize("cut", ["deepcache:0", "deepcache:2"])
def test_cached_engines_with_ip_adapters_equal_deepcache_in_eager_pytorch(
    eager: Any,
    pipe: Any,
    pictures: Any,
    cut: str,
    generate: Generate,
    decibels: Callable[[torch.Tensor, torch.Tensor], float],
    cached_by_call: Callable[..., Any],
) -> None:
    given = {"ip_adapter_image": pictures}
    uncached = generate(eager, steps=STEPS, **given)
    assert decibels(generate(pipe, steps=STEPS, **given), uncached) > 100
    pipe.unet.set_schedule(SCHEDULE, cut=cut)
    with cached_by_call(eager.unet, int(cut[-1]), SCHEDULE.full_calls(STEPS)):
        expected = generate(eager, steps=STEPS, **given)
    latents = generate(pipe, steps=STEPS, **given)
    assert pipe.unet.last_run.timeline == "#..#..#"
    assert decibels(latents, expected) > 100
    assert decibels(latents, uncached) < 90
    other = generate(pipe, steps=STEPS, ip_adapter_image=[pictures[1][0], pictures[1]])
    assert decibels(other, expected) < 60  # the image has an effect


def test_embeddings_instead_of_images_and_several_images_of_a_prompt(
    eager: Any, pipe: Any, pictures: Any, generate: Generate, decibels: Callable[[torch.Tensor, torch.Tensor], float]
) -> None:
    embeds = embeds_of(eager, pictures)
    assert [tuple(each.shape) for each in embeds] == [(2, 1, IMAGE_WIDTH), (2, 2, TOKENS, IMAGE_WIDTH)]
    pipe.unet.set_schedule(SCHEDULE)
    by_image = generate(pipe, steps=4, ip_adapter_image=pictures)
    assert torch.equal(generate(pipe, steps=4, ip_adapter_image_embeds=embeds), by_image)
    pipe.unet.set_schedule(None)
    for settings in ({"num_images_per_prompt": 2}, {"guidance": 1.0}):
        settings_embeds = embeds if "guidance" not in settings else [each[1:] for each in embeds]
        given = {"ip_adapter_image_embeds": settings_embeds, "steps": 3, **settings}
        assert decibels(generate(pipe, **given), generate(eager, **given)) > 100


@pytest.mark.parametrize(
    "scale",
    [[0.0, 0.0], [1.3, 0.2], [{"down": {"block_0": [0.4]}, "up": {"block_1": [0.0, 1.0]}}, 0.5]],
    ids=["off", "numbers", "by block"],
)
def test_scales_are_set_between_images_without_a_rebuild(
    eager: Any,
    pipe: Any,
    pictures: Any,
    scale: Any,
    generate: Generate,
    decibels: Callable[[torch.Tensor, torch.Tensor], float],
) -> None:
    before = generate(pipe, steps=3, ip_adapter_image=pictures)
    results = []
    for each in (pipe, eager):
        each.set_ip_adapter_scale(copy.deepcopy(scale))
        results.append(generate(each, steps=3, ip_adapter_image=pictures))
    assert decibels(*results) > 100
    assert decibels(results[0], before) < 80


def test_a_scale_set_during_a_generation_applies_from_the_next_call(
    eager: Any, pipe: Any, pictures: Any, generate: Generate, decibels: Callable[[torch.Tensor, torch.Tensor], float]
) -> None:
    def fade(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            pipeline.set_ip_adapter_scale([0.0, 0.1])
        return values

    given = {"steps": 4, "ip_adapter_image": pictures, "callback_on_step_end": fade}
    assert decibels(generate(pipe, **given), generate(eager, **given)) > 100


def test_attach_copies_the_scales_of_the_pipeline(
    eager: Any,
    bundle: Path,
    pictures: Any,
    generate: Generate,
    decibels: Callable[[torch.Tensor, torch.Tensor], float],
) -> None:
    eager.set_ip_adapter_scale([0.1, 1.1])
    expected = generate(eager, steps=3, ip_adapter_image=pictures)
    pipe = offcut.attach(eager, bundle, "onnxruntime")
    assert decibels(generate(pipe, steps=3, ip_adapter_image=pictures), expected) > 100
    assert all(processor.scale == [0.1, 1.1] for processor in pipe.unet.attn_processors.values())
    pipe.unet.close()


def test_the_built_scale_is_the_default(bundle: Path) -> None:
    unet = offcut.UNet.load(bundle, "onnxruntime", threads=1)
    assert [processor.scale for processor in unet.attn_processors.values()] == [[0.6, 0.8]] * 4
    unet.close()


@pytest.mark.parametrize("opened", ["onnxruntime"], indirect=True)
def test_unsupported_ip_adapter_settings_are_refused(
    model: Path, bundle: Path, pipe: Any, eager: Any, pictures: Any, generate: Generate, tmp_path: Path
) -> None:
    plain = model / "adapters" / "plain.safetensors"
    with pytest.raises(UserError, match="the pipeline passes no image: give ip_adapter_image"):
        generate(pipe, steps=2)
    with pytest.raises(UserError, match="offcut build --ip-adapter FILE"):
        pipe.load_ip_adapter(str(plain.parent), subfolder="", weight_name=plain.name, image_encoder_folder=None)
    with pytest.raises(UserError, match="image_embeds_1"):
        generate(pipe, steps=2, ip_adapter_image=[pictures[0], pictures[0]])
    pipe.set_ip_adapter_scale([[0.2, 0.4], 1.0])
    with pytest.raises(UserError, match="differs from image to image"):
        generate(pipe, steps=2, ip_adapter_image=pictures)
    with pytest.raises(BundleError, match="another model"):
        offcut.build(model / "model", bundle, engine="onnxruntime")
    with pytest.raises(EngineError, match="calibrated without images"):
        offcut.build(
            model / "model",
            tmp_path / "b",
            engine="onnxruntime",
            precision="int8",
            calibration=offcut.Calibration(),
            ip_adapters=[plain],
        )
    eager.save_pretrained(tmp_path / "saved")
    with pytest.raises(ModelError, match="was saved with an IP-Adapter in its UNet"):
        offcut.build(tmp_path / "saved", tmp_path / "b", engine="onnxruntime")
