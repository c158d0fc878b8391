"""Bundles from foreign ONNX: what a build accepts, refuses and reports."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from support.foreign import exported_by_optimum
from support.models import save_stable_diffusion, save_stable_diffusion_xl
from typer.testing import CliRunner

import offcut
from offcut.cli import app
from offcut.engines.builder.request import Sizes
from offcut.engines.builder.verify import verify_bundle
from offcut.errors import EngineError, ModelError, UserError


def test_foreign_engines_are_verified_against_the_original_onnx(foreign_bundle: Path) -> None:
    bundle = offcut.Bundle.open(foreign_bundle)
    assert bundle.manifest.source.onnx
    assert list(bundle.manifest.variants) == ["fp32-opset18"]
    assert [entry.name for entry in bundle.manifest.components] == ["text_encoder", "vae_decoder", "vae_encoder"]
    checks = {
        key: {check.name: check for check in engine_checks} for key, engine_checks in verify_bundle(bundle).items()
    }
    for engine_checks in checks.values():
        assert all(check.passed for check in engine_checks.values())
        assert not any("PyTorch" in name for name in engine_checks)
    exact = next(engine_checks for key, engine_checks in checks.items() if key.startswith("onnxruntime"))
    assert exact["full against the original ONNX"].error == 0
    shown = CliRunner().invoke(app, ["inspect", str(foreign_bundle)])
    assert "from foreign ONNX" in shown.stdout


def test_no_pytorch_weights_are_needed_or_written(foreign_dir: Path, foreign_bundle: Path) -> None:
    assert not list(foreign_dir.rglob("*.safetensors"))
    names = {path.name for path in foreign_bundle.rglob("*.safetensors")}
    assert names == {"reference.safetensors", "final_layer_norm.safetensors"}


def test_a_cut_can_be_added_to_a_foreign_bundle(foreign_dir: Path, foreign_bundle: Path, tmp_path: Path) -> None:
    """Another cut needs no other import. A build from other files is refused as another model."""
    copy = Path(shutil.copytree(foreign_bundle, tmp_path / "copy.offcut"))
    messages: list[str] = []
    bundle = offcut.build(foreign_dir, copy, cuts=["deepcache:7"], engine="onnxruntime", progress=messages.append)
    assert "deepcache:7" in bundle.cuts
    assert "reuse the export fp32-opset18, cut it again" in messages
    assert "reuse the networks around the UNet, fp32-opset18" in messages
    other = Path(shutil.copytree(foreign_dir, tmp_path / "other"))
    with (other / "unet" / "model.onnx").open("ab") as file:
        file.write(b"\x12\x01x")  # another producer_name
    with pytest.raises(UserError, match="holds another model"):
        offcut.build(other, copy, engine="onnxruntime")


@pytest.mark.parametrize(
    ("settings", "error", "sentence"),
    [
        ({"precision": "fp16"}, ModelError, r"is fp32, which cannot be made fp16: build with --precision fp32"),
        ({"opset": 23}, ModelError, r"has opset 18, not 23: leave --opset out"),
        ({"adapters": ["controlnet"]}, ModelError, "cannot be given the inputs of controlnet: build from the model"),
        ({"attention": "cross-frame"}, ModelError, "cannot be given cross-frame attention: build from the model"),
        ({"engine": "inductor"}, ModelError, "cannot be given graphs for inductor, which PyTorch makes: build from"),
        (
            {"precision": "int8", "calibration": offcut.Calibration(samples=1)},
            ModelError,
            "cannot be given int8, which is calibrated in PyTorch: build from the model",
        ),
        ({"dims": {"depth": 2}}, ModelError, "dims: depth cannot be fixed"),
    ],
)
def test_options_that_need_pytorch_weights_are_refused(
    settings: dict[str, Any], error: type[UserError], sentence: str, foreign_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=sentence):
        offcut.build(foreign_dir, tmp_path / "b.offcut", **{"engine": "onnxruntime", **settings})
    assert not (tmp_path / "b.offcut" / "offcut.json").exists()


def test_a_lora_is_refused_at_the_build(foreign_dir: Path, tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    from support.loras import save_lora

    lora = save_lora("kohya", tiny_pipeline_dir, tmp_path / "lora")
    with pytest.raises(ModelError, match="cannot be given a LoRA in its weights: give it to offcut run --lora"):
        offcut.build(foreign_dir, tmp_path / "b.offcut", engine="onnxruntime", loras={lora: 1.0})


def test_a_bare_unet_makes_a_bundle_without_a_pipeline(foreign_dir: Path, tmp_path: Path) -> None:
    bundle = offcut.build(foreign_dir / "unet", tmp_path / "b.offcut", engine="onnxruntime")
    assert bundle.manifest.pipeline is None
    assert bundle.manifest.components == ()


@pytest.mark.slow
def test_a_compiling_engine_needs_an_engine_that_opens_onnx_graphs(foreign_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    settings: dict[str, Any] = {
        "settings": {"tensorrt-rtx": {"compute_capabilities": ("89",)}},
        "profiles": Sizes(static=("64x64",)),
    }
    with pytest.raises(EngineError, match="holds text_encoder, vae as ONNX too: name onnxruntime or"):
        offcut.build(foreign_dir, tmp_path / "a.offcut", engine="tensorrt-rtx", **settings)
    bundle = offcut.build(foreign_dir, tmp_path / "b.offcut", engine=["tensorrt-rtx", "onnxruntime"], **settings)
    entry = next(each for each in bundle.manifest.engines.values() if each.engine == "tensorrt-rtx")
    assert entry.compiled
    assert not entry.verified
    assert len(entry.references) == len(entry.profiles) > 0
    assert "deepcache:0" in entry.shallow
    for file in (entry.full, *entry.shallow.values()):
        assert (bundle.path / file).stat().st_size > 10_000
    bundle.verify_files(entry.files)


@pytest.mark.slow
@pytest.mark.smoke
@pytest.mark.parametrize("save", [save_stable_diffusion, save_stable_diffusion_xl])
def test_an_export_by_optimum_is_built_and_run(save: Any, tmp_path: Path) -> None:
    """Compare with a bundle of the same model's weights. optimum is installed on the older stack only."""
    import torch

    pytest.importorskip("optimum.exporters.onnx", reason="optimum-onnx holds transformers below 4.58")
    model = save(tmp_path / "model")
    onnx_dir = exported_by_optimum(model, tmp_path / "onnx")
    assert not list(onnx_dir.rglob("*.safetensors"))
    images = {}
    for name, source in {"weights": model, "onnx": onnx_dir}.items():
        bundle = offcut.build(source, tmp_path / f"{name}.offcut", engine="onnxruntime")
        pipe: Any = offcut.load(bundle)
        for schedule in (None, offcut.Uniform(3)):
            pipe.unet.set_schedule(schedule)
            settings = {"num_inference_steps": 6, "height": 64, "width": 64, "output_type": "pt"}
            image = pipe("a red square", generator=torch.Generator().manual_seed(0), **settings).images
            images[name, schedule is None] = image
        pipe.unet.close()
    for uncached in (True, False):
        assert (images["weights", uncached] - images["onnx", uncached]).abs().max() < 2e-5
    assert (images["onnx", True] - images["onnx", False]).abs().max() > 1e-4


def test_find_model_reports_that_there_are_no_pytorch_weights(foreign_bundle: Path) -> None:
    """``offcut bench latency`` then reports it, and does not load a directory without weights."""
    from offcut.benchmarks.latency.resolve import find_model

    engine_checks, why = find_model(offcut.Bundle.open(foreign_bundle), None)
    assert engine_checks is None
    assert "the peers need the PyTorch weights of" in why
