"""Verification finds real corruptions, each with the check that is meant for it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest
import torch

import offcut
from offcut.engines.base import EngineOptions, Graphs
from offcut.engines.builder.verify import ParityCheck, require, verify, verify_bundle
from offcut.engines.precision import Bounds, bounds
from offcut.engines.registry import engine
from offcut.errors import BundleError, ParityError
from offcut.exporter.trace.reference import Reference, read_reference

from ..conftest import ONNX_ENGINES, UNET_CUTS

EXACT = bounds("onnxruntime", "fp32")


@pytest.fixture
def graphs(every_cut: Path, tmp_path: Path) -> Graphs:
    """A copy of a pair's files that tests can damage."""
    bundle = offcut.Bundle.open(every_cut)
    original = bundle.graphs(bundle.entry("onnxruntime"))
    folder = Path(shutil.copytree(original.full.parent, tmp_path / "graphs"))
    shallow = {cut: folder / path.name for cut, path in original.shallow.items()}
    return replace(original, full=folder / original.full.name, shallow=shallow)


@pytest.fixture
def reference(graphs: Graphs) -> Reference:
    return read_reference(graphs.full.parent / "reference.safetensors")


def checks_of(name: str, graphs: Graphs, reference: Reference, limits: Bounds = EXACT) -> dict[str, ParityCheck]:
    pair = engine(name).open(graphs, EngineOptions())
    try:
        checks = verify(pair, reference, limits)
    finally:
        pair.close()
    assert len({check.name for check in checks}) == len(checks)
    return {check.name: check for check in checks}


def failed(checks: dict[str, ParityCheck]) -> set[str]:
    return {name for name, check in checks.items() if not check.passed}


@pytest.mark.smoke
@pytest.mark.parametrize("name", ONNX_ENGINES)
def test_a_sound_pair_passes_every_check(name: str, graphs: Graphs, reference: Reference) -> None:
    checks = checks_of(name, graphs, reference)
    assert failed(checks) == set()
    for cut in UNET_CUTS:
        assert checks[f"shallow {cut} against full"].error == 0
    assert set(checks) == {
        "full against PyTorch",
        *(f"shallow {cut} against PyTorch" for cut in UNET_CUTS),
        *(f"shallow {cut} against full" for cut in UNET_CUTS),
        *(f"shallow deepcache:{k} without deep_feature_{k}" for k in range(4)),
        "shallow mlperf without deep_feature_1",
        "shallow mlperf without skip_feature_1",
    }
    require(list(checks.values()), "the pair")


@pytest.mark.parametrize("name", ONNX_ENGINES)
def test_an_altered_weight_is_found(name: str, graphs: Graphs, reference: Reference) -> None:
    """One number of the outermost layer is changed. Full and shallow graphs share it, so only PyTorch reveals it."""
    weight = ir.load(graphs.full).graph.initializers["conv_out.weight"].const_value
    assert isinstance(weight, ir.ExternalTensor)
    weights = graphs.full.parent / "weights.data"
    content = bytearray(weights.read_bytes())
    assert weight.offset is not None
    torch.frombuffer(content, dtype=torch.float32, count=1, offset=weight.offset).add_(0.01)
    weights.write_bytes(content)
    checks = checks_of(name, graphs, reference)
    assert failed(checks) == {"full against PyTorch", *(f"shallow {cut} against PyTorch" for cut in UNET_CUTS)}
    assert 1e-3 < checks["full against PyTorch"].error < 1e-1
    with pytest.raises(ParityError, match=r"the pair: full against PyTorch differs by 0\.\d+, but at most 0\.0001"):
        require(list(checks.values()), "the pair")


@pytest.mark.parametrize("name", ONNX_ENGINES)
def test_a_shallow_graph_with_another_output_is_found(name: str, graphs: Graphs, reference: Reference) -> None:
    """Its output is off by a millionth, and outputs must be equal across the cut bit for bit."""
    path = graphs.shallow["deepcache:1"]
    model = ir.load(path)
    output = model.graph.outputs[0]
    node = output.producer()
    assert node is not None
    factor = ir.Value(name="factor", const_value=ir.tensor([1 + 1e-6], dtype=ir.DataType.FLOAT, name="factor"))
    model.graph.initializers["factor"] = factor
    noise = ir.Value(name="noise_pred", shape=output.shape, type=output.type)
    output.name = "inner"
    model.graph.append(ir.Node("", "Mul", [output, factor], outputs=[noise]))
    model.graph.outputs[0] = noise
    ir.save(model, path)
    assert failed(checks_of(name, graphs, reference)) == {"shallow deepcache:1 against full"}


@pytest.mark.parametrize("name", ONNX_ENGINES)
def test_a_feature_that_is_not_read_is_found(name: str, graphs: Graphs, reference: Reference) -> None:
    """A shallow graph that computes everything itself would pass every comparison, and save nothing."""
    model = ir.load(graphs.full)
    while len(model.graph.outputs) > 1:
        model.graph.outputs.pop()
    for node in model.graph:
        for value in node.outputs:
            if value.name == "deep_feature_0":
                value.name = "own_feature"
    noise = model.graph.outputs[0]
    spec = graphs.outputs["deep_feature_0"]
    feature = ir.Value(name="deep_feature_0", shape=ir.Shape(spec.shape), type=ir.TensorType(ir.DataType.FLOAT))
    model.graph.inputs.append(feature)
    # noise_pred + 0 * min(max(feature)): the graph reads the feature, but its value has no effect.
    zero = ir.Value(name="zero", const_value=ir.tensor([0.0], dtype=ir.DataType.FLOAT, name="zero"))
    model.graph.initializers["zero"] = zero
    largest = ir.Node("", "ReduceMax", [feature], attributes={"keepdims": ir.AttrInt64("keepdims", 0)})
    nothing = ir.Node("", "Mul", [largest.outputs[0], zero])
    total = ir.Node("", "Add", [noise, nothing.outputs[0]])
    noise.name = "own_noise"
    total.outputs[0].name = "noise_pred"
    total.outputs[0].shape, total.outputs[0].type = noise.shape, noise.type
    for node in (largest, nothing, total):
        model.graph.append(node)
    largest.outputs[0].name, nothing.outputs[0].name = "largest", "nothing"
    model.graph.outputs[0] = total.outputs[0]
    ir.save(model, graphs.shallow["deepcache:0"])
    checks = checks_of(name, graphs, reference)
    assert failed(checks) == {"shallow deepcache:0 without deep_feature_0"}
    with pytest.raises(ParityError, match="differs by 0, but more than 0 is needed"):
        require(list(checks.values()), "the pair")


def test_nan_never_passes(graphs: Graphs, reference: Reference) -> None:
    broken = Reference({**reference.inputs, "sample": reference.inputs["sample"] * float("nan")}, reference.noise_pred)
    checks = checks_of("onnxruntime", graphs, broken, Bounds(parity=1e9, relative=True, across=1e9))
    assert {"full against PyTorch", "shallow mlperf against full"} <= failed(checks)
    checks = checks_of("onnxruntime", graphs, broken, Bounds(parity=1e9, relative=False, across=1e9))
    assert "full against PyTorch" in failed(checks)


@pytest.mark.parametrize(("relative", "error"), [(False, 0.5), (True, 0.25)])
def test_an_error_is_absolute_or_relative_to_the_largest_value(
    relative: bool, error: float, graphs: Graphs, reference: Reference
) -> None:
    exact = checks_of("onnxruntime", graphs, reference)
    assert exact["full against PyTorch"].error < 1e-5
    scale = 2 / float(reference.noise_pred.abs().max())
    shifted = Reference(reference.inputs, reference.noise_pred.clone())
    index = int(shifted.noise_pred.abs().argmin())
    shifted.noise_pred.view(-1)[index] = shifted.noise_pred.view(-1)[index] + 0.5 / scale
    limits = Bounds(parity=1e-4, relative=relative, across=0)
    original = checks_of("onnxruntime", graphs, shifted, limits)["full against PyTorch"]
    assert original.relative is relative
    assert original.error == pytest.approx(error if relative else error / scale, rel=1e-3)


@pytest.mark.slow
def test_a_bundle_is_verified_engine_by_engine(every_cut: Path) -> None:
    sentences: list[str] = []
    results = verify_bundle(offcut.Bundle.open(every_cut), sentences.append)
    assert {key.partition("-")[0] for key in results} == {"onnxruntime", "openvino"}
    assert all(check.passed for checks in results.values() for check in checks)
    assert sentences == ["check digests", *(f"verify {key}" for key in results)]


def test_a_damaged_bundle_is_refused_before_it_is_verified(every_cut: Path, tmp_path: Path, no_engine: None) -> None:
    bundle = Path(shutil.copytree(every_cut, tmp_path / "b"))
    (bundle / "unet" / "fp32-opset23" / "parameters.json").write_text("{}", encoding="utf-8")
    with pytest.raises(BundleError, match=r"parameters\.json"):
        verify_bundle(offcut.Bundle.open(bundle))
