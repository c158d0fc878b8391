"""Builds in int8: what they record, keep and refuse; and calibration through the shallow graphs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from support.exports import copy_export

import offcut
from offcut.engines.builder.quantize import quantize_export
from offcut.engines.onnxruntime.observer import CallSamples, ObservingPair
from offcut.engines.precision import SCHEMES
from offcut.errors import BundleError, EngineError, ModelError
from offcut.exporter.cut import split_all
from offcut.exporter.graph import read
from offcut.exporter.load import locate
from offcut.exporter.quantize.qdq import find_layers
from offcut.exporter.trace.export import ExportedUNet

from ..conftest import contents

CALIBRATION = offcut.Calibration(samples=1, steps=4)


@pytest.fixture
def pair(fp32_export: ExportedUNet, tmp_path: Path) -> ObservingPair:
    """An observing pair of the export, which records every value that a layer reads."""
    base = copy_export(fp32_export, tmp_path / "base")
    strides = {layer.input: 1 for layer in find_layers(read(base.path).model)}
    twins = split_all(base, ["deepcache:0"], tmp_path / "cut")
    return ObservingPair(twins, base.inputs, base.outputs, base.multiple, "fp32", strides)


@pytest.mark.usefixtures("quick_export")
@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_an_int8_build_is_verified_smaller_and_records_its_calibration(
    name: str, tiny_unet_dir: Path, fp32_export: ExportedUNet, tmp_path: Path
) -> None:
    for folder in ("one", "other"):
        bundle = offcut.build(
            tiny_unet_dir, tmp_path / folder, engine=name, precision="int8",
            cuts=["deepcache:0", "mlperf"], calibration=CALIBRATION,
        )  # fmt: skip
    variant = bundle.manifest.variants[f"{SCHEMES[name, 'int8'].label}-opset23"]
    assert variant.precision == "int8"
    assert all(entry.verified for entry in bundle.manifest.engines.values())
    rounding = variant.quantization
    assert rounding is not None
    assert rounding.calibration == CALIBRATION.record(locate(tiny_unet_dir))
    assert {"conv_in", "conv_out"} <= set(rounding.kept)
    assert rounding.rounded > len(rounding.kept)
    assert variant.graphs is not None
    weights = bundle.path / variant.graphs.weights
    assert weights.stat().st_size < 0.7 * fp32_export.weights.stat().st_size
    assert len(list(bundle.path.rglob("*.data"))) == 1
    assert {tensor.dtype for cut in variant.cuts for tensor in cut.cached} == {"float32"}
    one, other = (contents(tmp_path / folder / "unet") for folder in ("one", "other"))
    assert one == other, "the same input gives the same bytes"


@pytest.mark.usefixtures("quick_export")
def test_a_bundle_holds_one_calibration_and_also_full_precision(
    tiny_unet_dir: Path, fp32_export: ExportedUNet, tmp_path: Path, quick_export: list[Path]
) -> None:
    out = tmp_path / "b"
    offcut.build(tiny_unet_dir, out, engine="openvino", precision="int8", calibration=CALIBRATION)
    messages: list[str] = []
    offcut.build(
        tiny_unet_dir, out, engine="openvino", precision="int8", cuts=["deepcache:1"], calibration=CALIBRATION,
        progress=messages.append,
    )  # fmt: skip
    assert len(quick_export) == 1, "another cut needs no other calibration"
    before = contents(out)
    other = offcut.Calibration(samples=2, steps=4)
    with pytest.raises(BundleError, match="was calibrated in another way"):
        offcut.build(tiny_unet_dir, out, engine="openvino", precision="int8", calibration=other)
    assert contents(out) == before
    offcut.build(tiny_unet_dir, out, engine="openvino")
    assert set(offcut.Bundle.open(out).manifest.variants) == {"int8-opset23", "fp32-opset23"}


def test_invalid_int8_builds_are_refused(tiny_unet_dir: Path, tmp_path: Path, quick_export: list[Path]) -> None:
    out = tmp_path / "b"
    with pytest.raises(EngineError, match=r"int8 needs calibration: .*offcut\.Calibration\(\)"):
        offcut.build(tiny_unet_dir, out, engine="openvino", precision="int8")
    with pytest.raises(EngineError, match="openvino and onnxruntime take int8 graphs of different kinds"):
        offcut.build(tiny_unet_dir, out, engine=["openvino", "onnxruntime"], precision="int8", calibration=CALIBRATION)
    assert quick_export == []
    with pytest.raises(ModelError, match="no layer is called 'mid'"):
        offcut.build(
            tiny_unet_dir, out, engine="openvino", precision="int8", calibration=offcut.Calibration(keep=("mid",))
        )
    assert not out.exists()


def test_sensitive_layers_are_not_rounded(fp32_export: ExportedUNet, tiny_unet_dir: Path, tmp_path: Path) -> None:
    sampled, rounded = {}, {}
    for margin in (-1000.0, 2.0, 1000.0):
        base = copy_export(fp32_export, tmp_path / f"base-{margin}")
        calibration = offcut.Calibration(samples=1, steps=4, sensitive=margin)
        scheme = SCHEMES["openvino", "int8"]
        out = tmp_path / f"out-{margin}"
        out.mkdir()
        source = locate(tiny_unet_dir)
        _, record = quantize_export(base, out, source, scheme, ["deepcache:0"], calibration, lambda step: None)
        sampled[margin] = set(record.kept)
        assert record.rounded + len(record.kept) == len(find_layers(read(base.path).model))
        rounded[margin] = record.rounded
    assert sampled[1000.0] < sampled[2.0] < sampled[-1000.0]
    assert rounded[-1000.0] == 0


def test_stale_features_widen_the_ranges(pair: ObservingPair) -> None:
    bound = pair.prepare({"sample": (2, 4, 8, 8), "timestep": (2,), "encoder_hidden_states": (2, 7, 16)})
    bound.full()
    before = {name: (seen.low, seen.high) for name, seen in pair.histograms.items()}
    bound.shallow("deepcache:0")
    assert {name: (seen.low, seen.high) for name, seen in pair.histograms.items()} == before, "nothing new was seen"
    bound.buffers["deep_feature_0"].mul_(1000)
    bound.shallow("deepcache:0")
    wider = {name for name, seen in pair.histograms.items() if (seen.low, seen.high) != before[name]}
    assert wider, "the features are read by a layer of the shallow graph"
    assert not any("mid_block" in name for name in wider)
    pair.close()


def test_the_observing_pair_computes_the_outputs_of_pytorch(
    pair: ObservingPair, fp32_export: ExportedUNet, tiny_unet_dir: Path
) -> None:
    from support.unets import eager, largest_difference, random_inputs

    inputs = random_inputs(tiny_unet_dir, batch=2, height=8, width=8)
    bound = pair.prepare({name: tuple(tensor.shape) for name, tensor in inputs.items()})
    for name, tensor in inputs.items():
        bound.buffers[name].copy_(tensor)
    bound.full()
    assert largest_difference(bound.buffers["noise_pred"], eager(tiny_unet_dir, inputs)) < 1e-4
    latent = next(seen for name, seen in pair.histograms.items() if name == "sample")
    assert (latent.low, latent.high) == (float(inputs["sample"].min()), float(inputs["sample"].max()))
    pair.close()


@pytest.mark.parametrize("calls", [1, 2, 5, 50])
def test_call_samples_are_few_and_spread(calls: int) -> None:
    samples = CallSamples()
    for call in range(calls):
        samples.add({"timestep": torch.tensor([float(call)])})
    sampled = [int(each["timestep"]) for each in samples.chosen()]
    assert sampled[0] == 0
    assert len(sampled) == min(calls, 3)
    assert sampled[-1] >= calls // 2
    assert sampled == sorted(set(sampled))


def test_a_calibration_leaves_no_files(fp32_export: ExportedUNet, tiny_unet_dir: Path, tmp_path: Path) -> None:
    base = copy_export(fp32_export, tmp_path / "base")
    out = tmp_path / "out"
    out.mkdir()
    scheme = SCHEMES["openvino", "int8"]
    quantize_export(base, out, locate(tiny_unet_dir), scheme, ["deepcache:0"], CALIBRATION, lambda step: None)
    shutil.rmtree(base.path.parent)
    assert sorted(path.name for path in out.iterdir()) == [
        "parameters.json", "reference.safetensors", "unet.onnx", "weights.data",
    ]  # fmt: skip
