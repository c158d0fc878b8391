"""Behaviour of inductor only; the tests for every engine are in ``test_pairs``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from support.loras import save_lora
from support.unets import eager, random_inputs

import offcut
import offcut.engines.inductor as inductor
from offcut.engines.base import EngineProbe
from offcut.engines.builder.request import Sizes
from offcut.engines.builder.verify import verify_bundle
from offcut.engines.precision import bounds
from offcut.engines.profiles import Profile
from offcut.errors import BundleError, EngineError, ShapeError
from offcut.exporter.lora import ScaledLora, fuse

from .conftest import BF16_CUTS, BF16_SIZES, COMPILED_CUTS


@pytest.mark.slow
def test_a_bundle_for_deployment_holds_no_graph_and_no_weights(compiled_bundle: Path) -> None:
    bundle = offcut.Bundle.open(compiled_bundle)
    (variant,) = bundle.manifest.variants.values()
    assert variant.graphs is None
    assert not [path for path in compiled_bundle.rglob("*") if path.suffix in (".onnx", ".data")]
    (entry,) = bundle.manifest.engines.values()
    assert entry.verified
    assert entry.compiled
    assert entry.targets == (inductor.probe().targets["cpu"],)
    assert set(entry.shallow) == set(COMPILED_CUTS)
    assert {*entry.files} <= {*bundle.manifest.files}


@pytest.mark.slow
def test_a_deployed_bundle_can_be_verified_again(compiled_bundle: Path) -> None:
    (checks,) = verify_bundle(offcut.Bundle.open(compiled_bundle)).values()
    assert len(checks) == 1 + 2 * len(COMPILED_CUTS) + 1
    assert all(check.passed for check in checks)


@pytest.mark.slow
def test_bf16_outputs_are_near_the_full_precision_model_on_either_side_of_the_cut(
    compiled_bf16_bundle: Path, tiny_unet_dir: Path
) -> None:
    """Inputs differ from those of the build, and PyTorch computes in fp32; the build compared with PyTorch in bf16."""
    limits = bounds("inductor", "bf16")
    bundle = offcut.Bundle.open(compiled_bf16_bundle)
    assert bundle.entry("inductor").verified
    pair = bundle.open_pair("inductor")
    assert list(pair.cuts) == BF16_CUTS
    inputs = random_inputs(tiny_unet_dir, **BF16_SIZES, seed=5)
    bound = pair.prepare({name: tuple(value.shape) for name, value in inputs.items()})
    assert bound.buffers["sample"].dtype == bound.buffers["deep_feature_1"].dtype == torch.bfloat16

    def relative_difference(expected: torch.Tensor) -> float:
        return float((bound.buffers["noise_pred"].float() - expected).abs().max() / expected.abs().max())

    for name, value in inputs.items():
        bound.buffers[name].copy_(value)
    bound.full()
    error = relative_difference(eager(tiny_unet_dir, inputs))
    assert 1e-4 < error <= limits.parity, "computed in bf16"
    full = bound.buffers["noise_pred"].float().clone()
    for cut, features in pair.cuts.items():
        bound.buffers["noise_pred"].fill_(float("nan"))
        bound.shallow(cut)
        assert relative_difference(full) <= limits.across, cut
        for feature in features:
            saved = bound.buffers[feature].clone()
            bound.buffers[feature].mul_(-1)
            bound.shallow(cut)
            assert relative_difference(full) > limits.across, feature
            bound.buffers[feature].copy_(saved)
    pair.close()


@pytest.mark.slow
def test_a_build_for_one_shape_refuses_the_others(compiled_bf16_bundle: Path) -> None:
    pair = offcut.Bundle.open(compiled_bf16_bundle).open_pair("inductor")
    shapes = {"sample": (2, 4, 8, 8), "timestep": (2,), "encoder_hidden_states": (2, 7, 16)}
    with pytest.raises(ShapeError, match="sample has shape"):
        pair.prepare(shapes)
    pair.close()


@pytest.mark.slow
def test_a_shallow_package_is_smaller_and_names_its_inputs(compiled_bundle: Path) -> None:
    entry = offcut.Bundle.open(compiled_bundle).entry("inductor")
    full, shallow = ((compiled_bundle / file).stat().st_size for file in (entry.full, entry.shallow["deepcache:0"]))
    assert shallow < full  # most of it is code here; test_program counts the weights
    names = json.loads((compiled_bundle / entry.shallow["deepcache:0"]).with_suffix(".json").read_text("utf-8"))
    assert "deep_feature_0" in names["inputs"]
    assert names["outputs"] == ["noise_pred"]


@pytest.mark.slow
def test_a_unet_runs_on_inductor(compiled_bundle: Path) -> None:
    unet = offcut.UNet.load(compiled_bundle)
    assert unet.engine == "inductor"
    unet.set_schedule(offcut.Uniform(3))
    sample, text = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 16)
    with unet.generation(calls=4):
        for timestep in (900, 600, 300, 0):
            assert torch.isfinite(unet(sample, timestep, text).sample).all()
    assert unet.last_run is not None
    assert unet.last_run.timeline == "#..#"
    unet.close()


@pytest.mark.slow
def test_switching_loras_and_back_restores_the_outputs(
    compiled_bundle: Path, every_cut: Path, tiny_unet_dir: Path, tmp_path: Path
) -> None:
    """Refitting replaces the packages' constants. Built weights come from another bundle: this one holds none."""
    (tmp_path / "unet").symlink_to(tiny_unet_dir)
    loras = [
        save_lora("kohya", tmp_path, tmp_path / "a", seed=1),
        save_lora("diffusers", tmp_path, tmp_path / "b", seed=2, rank=4, alpha=2.0),
    ]
    bundle, graphs_bundle = offcut.Bundle.open(compiled_bundle), offcut.Bundle.open(every_cut)
    stored = graphs_bundle.weights(graphs_bundle.entry("onnxruntime"))
    unet = offcut.UNet(bundle.open_pair("inductor"), bundle.unet_config, stored=lambda: stored)
    unet.set_schedule(offcut.Uniform(2))
    inputs = random_inputs(tiny_unet_dir, batch=2, height=8, width=8)
    sample, text = inputs["sample"], inputs["encoder_hidden_states"]

    def outputs() -> list[torch.Tensor]:
        with unet.generation(calls=2):
            return [unet(sample, timestep, text).sample for timestep in (900, 850)]

    plain_outputs = outputs()
    unet.load_lora(loras[0], 0.5, name="a")
    outputs_a = outputs()
    unet.unload_lora()
    unet.load_lora(loras[1], name="b")
    outputs_b = outputs()
    unet.set_loras({})
    assert all(map(torch.equal, outputs(), plain_outputs))
    unet.load_lora(loras[0], 0.5, name="a")
    assert all(map(torch.equal, outputs(), outputs_a))
    for outputs_before, outputs_after in ((plain_outputs, outputs_a), (outputs_a, outputs_b)):
        assert not any(map(torch.equal, outputs_before, outputs_after)), "both graphs took other weights"
    unet.close()
    fused = UNet2DConditionModel.from_pretrained(tiny_unet_dir)
    fuse(fused, [ScaledLora(loras[0], 0.5)], dict(fused.config))
    with torch.no_grad():
        expected = fused(sample, 900, text).sample
    assert float((outputs_a[0] - expected).abs().max()) <= 1e-4


@pytest.mark.slow
def test_building_onnxruntime_into_a_deployed_bundle_exports_the_graphs_again(
    compiled_bundle: Path, copied: Callable[[Path], Path], tiny_unet_dir: Path, quick_export: list[Path]
) -> None:
    path = copied(compiled_bundle)
    bundle = offcut.build(tiny_unet_dir, path, engine="onnxruntime", cuts=["deepcache:0"])
    assert len(quick_export) == 1
    assert bundle.engines == ["inductor", "onnxruntime"]
    (variant,) = bundle.manifest.variants.values()
    assert variant.graphs is not None
    assert {cut.name for cut in variant.cuts} == set(COMPILED_CUTS)
    for name in bundle.engines:
        bundle.open_pair(name).close()
    with pytest.raises(BundleError, match="opens the ONNX graphs that deploy leaves out"):
        offcut.build(tiny_unet_dir, path, engine="inductor", cuts=COMPILED_CUTS, deploy=True)
    bundle.verify_files()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("here", "sentence"),
    [
        (
            EngineProbe(torch.__version__, ("cpu",), "", targets={"cpu": "other"}),
            "was compiled for .*, and this machine",
        ),
        (
            EngineProbe("9.9.9", ("cpu",), "", targets=inductor.probe().targets),
            "runs with that version only, but 9.9.9",
        ),
        (EngineProbe(torch.__version__, (), "no C++ compiler found"), "cannot run on cpu here: no C"),
    ],
    ids=["another CPU", "another PyTorch", "nothing"],
)
def test_a_package_for_another_machine_or_version_is_refused(
    here: EngineProbe, sentence: str, compiled_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inductor, "probe", lambda: here)
    monkeypatch.setattr(inductor, "open", lambda *args: pytest.fail("native code was loaded"))
    with pytest.raises(EngineError, match=sentence):
        offcut.Bundle.open(compiled_bundle).open_pair("inductor")


@pytest.mark.slow
def test_an_altered_package_is_refused_before_it_is_loaded(
    compiled_bundle: Path, copied: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = offcut.Bundle.open(copied(compiled_bundle))
    monkeypatch.setattr(inductor, "open", lambda *args: pytest.fail("native code was loaded"))
    package = bundle.path / bundle.entry("inductor").full
    content = bytearray(package.read_bytes())
    content[len(content) // 2] ^= 1
    package.write_bytes(content)
    with pytest.raises(BundleError, match=r"full\.pt2 was altered"):
        bundle.open_pair("inductor")


def test_profiles_are_refused_with_a_remedy(tiny_unet_dir: Path, tmp_path: Path, quick_export: list[Path]) -> None:
    sizes = {"batch": 2, "height": 8, "width": 8, "sequence": 7}
    with pytest.raises(EngineError, match=r"takes no shape profiles: .*--fix"):
        offcut.build(tiny_unet_dir, tmp_path / "b", engine="inductor", profiles=[Profile(sizes, sizes, sizes)])


def test_profiles_for_an_engine_that_takes_every_shape_are_refused(tiny_unet_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="onnxruntime takes every size"):
        offcut.build(tiny_unet_dir, tmp_path / "b", engine="onnxruntime", profiles=Sizes(max_batch=2))


def test_deploy_is_refused_for_an_engine_that_opens_the_graphs(tiny_unet_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="onnxruntime opens the ONNX graphs, which --deploy leaves out"):
        offcut.build(tiny_unet_dir, tmp_path / "b", engine="onnxruntime", deploy=True)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"inductor": {"turbo": True}}, "inductor has no setting turbo; it has max_autotune"),
        ({"tensorrt": {}}, "settings were given for tensorrt, which is not built"),
        ({"inductor": {}, "onnxruntime": {"a": 1}}, "onnxruntime has no setting a; it has none: it opens"),
    ],
)
def test_unknown_settings_are_refused(
    settings: dict[str, dict[str, object]], sentence: str, tiny_unet_dir: Path, tmp_path: Path
) -> None:
    engines = ["inductor", "onnxruntime"]
    with pytest.raises(EngineError, match=sentence):
        offcut.build(tiny_unet_dir, tmp_path / "b", engine=engines, settings=settings)  # type: ignore[arg-type]
