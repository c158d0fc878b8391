"""Pipelines of bundles from foreign ONNX, compared with pipelines of the same model's PyTorch weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionXLPipeline
from support.foreign import save_as_optimum
from support.loras import save_lora

import offcut
from offcut.engines.bundle.bundle import Bundle
from offcut.errors import UserError
from offcut.runtime.generation.schedule import Uniform

TOLERANCE = 2e-5  # of an image in [0, 1]


def image(pipe: Any, **arguments: Any) -> torch.Tensor:
    all_settings = {"num_inference_steps": 6, "output_type": "pt", "height": 64, "width": 64, **arguments}
    settings = {name: value for name, value in all_settings.items() if value is not None}
    images: torch.Tensor = pipe("a red square", generator=torch.Generator().manual_seed(1), **settings).images
    return images


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    assert torch.isfinite(one).all()
    return float((one - other).abs().max())


def test_images_equal_those_of_the_pytorch_weights(foreign_bundle: Path, tiny_bundle: Path, engine: str) -> None:
    """With the same seed, uncached and cached at two cuts."""
    pipes = [offcut.load(bundle, engine, threads=1) for bundle in (foreign_bundle, tiny_bundle)]
    uncached = [image(pipe, num_images_per_prompt=2) for pipe in pipes]
    assert difference(*uncached) < TOLERANCE
    for cut in ("deepcache:0", "mlperf"):
        for pipe in pipes:
            pipe.unet.set_schedule(Uniform(3), cut=cut)
        cached = [image(pipe, num_images_per_prompt=2) for pipe in pipes]
        assert pipes[0].unet.last_run.full == (True, False, False, True, False, False)
        assert difference(*cached) < TOLERANCE
        assert difference(cached[0], uncached[0]) > 1e-3
    for pipe in pipes:
        pipe.unet.close()


def test_clip_skip_and_img2img(foreign_bundle: Path, tiny_pipeline_dir: Path) -> None:
    from diffusers import StableDiffusionPipeline

    ours = offcut.load(foreign_bundle, "onnxruntime", threads=1)
    parts = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir).components
    img2img = offcut.attach(StableDiffusionImg2ImgPipeline(**ours.components, requires_safety_checker=False), ours.unet)
    eager = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    noise = torch.Generator().manual_seed(2)
    arguments = {"image": torch.rand(1, 3, 64, 64, generator=noise), "strength": 0.7, "height": None, "width": None}
    assert difference(image(img2img, **arguments), image(eager, **arguments)) < TOLERANCE
    assert not torch.equal(image(ours, clip_skip=1), image(ours))
    ours.unet.close()


def test_a_lora_is_loaded_and_unloaded(
    foreign_bundle: Path, tiny_bundle: Path, tiny_pipeline_dir: Path, tmp_path: Path, engine: str
) -> None:
    """The LoRA's weights are found by the names of the graph's nodes."""
    lora = save_lora("kohya", tiny_pipeline_dir, tmp_path, seed=1)
    outputs = []
    for bundle in (foreign_bundle, tiny_bundle):
        unet = offcut.UNet.load(bundle, engine, threads=1)
        unet.set_schedule(Uniform(3))
        generator = torch.Generator().manual_seed(0)
        text = torch.randn(2, 7, unet.config.cross_attention_dim, generator=generator)
        latents = torch.randn(2, 4, 16, 16, generator=generator)

        def calls(unet: Any = unet, latents: torch.Tensor = latents, text: torch.Tensor = text) -> torch.Tensor:
            with unet.generation(calls=2):
                return torch.stack([unet(latents, t, text).sample for t in (900, 850)])

        plain = calls()
        unet.load_lora(lora, 0.5)
        outputs.append(calls())
        assert difference(outputs[-1], plain) > 1e-2
        unet.unload_lora()
        assert torch.equal(calls(), plain)
        unet.close()
    assert difference(*outputs) < 1e-4


def test_a_lora_is_refused_for_weights_without_names(
    foreign_bundle: Path, tiny_pipeline_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from offcut.exporter.trace.parameters import StoredWeights

    unet = offcut.UNet.load(foreign_bundle, "onnxruntime", threads=1)
    bundle = Bundle.open(foreign_bundle)
    graphs = bundle.manifest.variants["fp32-opset18"].graphs
    assert graphs is not None
    (tmp_path / "none.json").write_text("{}")
    unet._stored = lambda: StoredWeights(foreign_bundle / graphs.full, tmp_path / "none.json")
    with pytest.raises(UserError, match="was built from ONNX whose weights do not name their layers"):
        unet.load_lora(save_lora("kohya", tiny_pipeline_dir, tmp_path / "lora"))
    assert unet.loras == {}
    unet.close()


@pytest.mark.slow
def test_stable_diffusion_xl(sdxl_pipeline_dir: Path, tmp_path: Path) -> None:
    model = save_as_optimum(sdxl_pipeline_dir, tmp_path / "onnx")
    bundle = offcut.build(model, tmp_path / "onnx.offcut", engine=["onnxruntime", "openvino"])
    assert [entry.name for entry in bundle.manifest.components] == [
        "text_encoder", "text_encoder_2", "vae_decoder", "vae_encoder",
    ]  # fmt: skip
    weights = offcut.load(offcut.build(sdxl_pipeline_dir, tmp_path / "weights.offcut", engine="onnxruntime"))
    eager = image(StableDiffusionXLPipeline.from_pretrained(sdxl_pipeline_dir))
    weights.unet.set_schedule(Uniform(3))
    expected = image(weights)
    for engine in ("onnxruntime", "openvino"):
        pipe = offcut.load(bundle, engine, threads=1)
        assert difference(image(pipe), eager) < TOLERANCE
        pipe.unet.set_schedule(Uniform(3))
        assert difference(image(pipe), expected) < TOLERANCE
        assert difference(expected, eager) > 1e-4
        pipe.unet.close()
    weights.unet.close()
