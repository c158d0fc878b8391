"""A bundle without PyTorch weights: text encoder and autoencoder in engines, compared with eager diffusers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from support.loras import save_lora
from transformers import CLIPTextModel

import offcut
from offcut.errors import BundleError, UserError

TOLERANCE = 2e-5  # of an image in [0, 1]


@pytest.fixture(scope="module")
def whole(tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "sd.offcut"
    offcut.build(tiny_pipeline_dir, path, engine=["onnxruntime", "openvino"], compile_all=True)
    return path


@pytest.fixture
def pipe(whole: Path, engine: str) -> Iterator[Any]:
    loaded = offcut.load(whole, engine, threads=1)
    yield loaded
    loaded.unet.close()


def image(pipe: Any, **arguments: Any) -> torch.Tensor:
    settings = {"num_inference_steps": 3, "output_type": "pt", **arguments}
    images: torch.Tensor = pipe("a red square", generator=torch.Generator().manual_seed(1), **settings).images
    return images


def test_the_pipeline_has_no_pytorch_weights(whole: Path) -> None:
    weights = [path.relative_to(whole).as_posix() for path in whole.rglob("*.safetensors")]
    assert [
        name for name in weights if not name.endswith(("reference.safetensors", "final_layer_norm.safetensors"))
    ] == []
    bundle = offcut.Bundle.open(whole)
    assert [entry.name for entry in bundle.manifest.components] == ["text_encoder", "vae_decoder", "vae_encoder"]
    bundle.verify_files()


def test_images_equal_those_of_eager_diffusers(pipe: Any, tiny_pipeline_dir: Path) -> None:
    eager = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir)
    for arguments in ({}, {"height": 128, "width": 64, "num_images_per_prompt": 2, "guidance_scale": 1.0}):
        difference = (image(pipe, **arguments) - image(eager, **arguments)).abs().max()
        assert difference < TOLERANCE
    for each in (eager, pipe):
        each.vae.enable_tiling()
        each.vae.tile_sample_min_size, each.vae.tile_latent_min_size = 32, 8
    tiled = image(pipe, height=128)
    assert (tiled - image(eager, height=128)).abs().max() < TOLERANCE
    for each in (eager, pipe):
        each.vae.disable_tiling()
    assert (tiled - image(pipe, height=128)).abs().max() > TOLERANCE


def test_the_compiled_encoder_takes_images(pipe: Any, tiny_pipeline_dir: Path) -> None:
    eager = StableDiffusionImg2ImgPipeline.from_pretrained(tiny_pipeline_dir)
    ours = offcut.attach(StableDiffusionImg2ImgPipeline.from_pipe(pipe, unet=pipe.unet, vae=pipe.vae), pipe.unet)
    arguments = {"image": torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2)), "strength": 0.7}
    assert type(ours.vae) is type(pipe.vae)
    assert (image(ours, **arguments) - image(eager, **arguments)).abs().max() < TOLERANCE


def test_clips_last_layers_may_be_skipped(pipe: Any, tiny_pipeline_dir: Path) -> None:
    """With ``clip_skip``, diffusers applies the final norm itself; eager diffusers misses it in transformers 5."""
    ids = torch.randint(0, 26, (2, 16), generator=torch.Generator().manual_seed(0))
    eager = CLIPTextModel.from_pretrained(tiny_pipeline_dir / "text_encoder").eval()
    norm = getattr(eager, "text_model", eager).final_layer_norm
    with torch.no_grad():
        expected = norm(eager(ids, output_hidden_states=True).hidden_states[-2])
        actual = pipe.text_encoder.text_model.final_layer_norm(
            pipe.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
        )
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert not torch.equal(image(pipe, clip_skip=1), image(pipe))


def test_outputs_are_tuples_without_return_dict(pipe: Any, tiny_pipeline_dir: Path) -> None:
    ids = torch.randint(0, 26, (1, 16), generator=torch.Generator().manual_seed(0))
    last, pooled = pipe.text_encoder(ids, return_dict=False)
    output = pipe.text_encoder(ids)
    assert torch.equal(last, output[0])
    assert torch.equal(pooled, output.pooler_output)
    with pytest.raises(UserError, match="leave the mask out"):
        pipe.text_encoder(ids, attention_mask=torch.zeros(1, 16))
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    eager = AutoencoderKL.from_pretrained(tiny_pipeline_dir / "vae")
    with torch.no_grad():
        torch.testing.assert_close(pipe.vae.decode(latent)[0], eager.decode(latent)[0], rtol=0, atol=1e-4)


def test_a_lora_for_a_compiled_text_encoder_is_refused_and_changes_nothing(
    pipe: Any, tiny_pipeline_dir: Path, tmp_path: Path
) -> None:
    both, plain = save_lora("kohya", tiny_pipeline_dir, tmp_path), image(pipe)
    with pytest.raises(UserError, match=r"text_encoder is compiled into an engine: fuse it with offcut build"):
        pipe.load_lora_weights(both.parent, weight_name=both.name, adapter_name="both")
    assert pipe.unet.loras == {}
    assert torch.equal(image(pipe), plain)
    unets = save_lora("diffusers", tiny_pipeline_dir, tmp_path)
    pipe.load_lora_weights(unets.parent, weight_name=unets.name, adapter_name="style")
    assert pipe.unet.loras == {"style": 1.0}
    assert not torch.equal(image(pipe), plain)


def test_a_damaged_network_is_refused(whole: Path, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(whole, tmp_path / "copy.offcut")
    entry = offcut.Bundle.open(copy).manifest.components[1]
    with (copy / entry.weights).open("r+b") as file:
        file.write(b"\xff" * 8)
    with pytest.raises(BundleError, match=r"vae_decoder/weights\.data was altered"):
        offcut.load(copy, "onnxruntime", threads=1)


def test_a_bare_unet_has_no_other_networks(tiny_unet_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no networks around its UNet"):
        offcut.build(tiny_unet_dir, tmp_path / "a", engine="onnxruntime", compile_all=True)
    assert not (tmp_path / "a").exists()
