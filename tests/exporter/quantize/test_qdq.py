"""Quantized graphs: which tensors are quantized, how weights are stored, and that the cut still finds every join."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from support.unets import largest_difference, random_inputs, run

from offcut.errors import ModelError
from offcut.exporter.cut import find_cuts, split
from offcut.exporter.quantize.histogram import Range
from offcut.exporter.quantize.qdq import Layer, Scheme, find_layers, high_precision_layers, quantize, write_error_graph
from offcut.exporter.trace.export import ExportedUNet

from ..conftest import Family

INT8 = Scheme("int8", base="fp32", activations="uint8", outputs=False)
SCHEMES = [
    INT8,
    Scheme("int8", base="fp32", activations="uint8", outputs=True),
    Scheme("int8", base="fp32", activations="int8", outputs=False),
    Scheme("fp8", base="fp32", activations="float8e4m3fn", outputs=False),
]


@pytest.fixture(scope="module")
def made(plain: Family) -> ExportedUNet:
    return plain.graph


@pytest.fixture(scope="module")
def layers(made: ExportedUNet) -> list[Layer]:
    return find_layers(ir.load(made.path))


def everywhere(layers: list[Layer], within: Range) -> dict[str, Range]:
    return {name: within for layer in layers for name in (layer.input, layer.output)}


def rounded(made: ExportedUNet, layers: list[Layer], scheme: Scheme, out: Path) -> tuple[Path, set[str]]:
    names = {layer.name for layer in layers} - high_precision_layers(layers)
    quantize(made.path, out / "unet.onnx", scheme, everywhere(layers, Range(-8.0, 8.0)), names)
    return out / "unet.onnx", names


def test_layers_are_named_as_in_pytorch(layers: list[Layer]) -> None:
    names = [layer.name for layer in layers]
    assert {"conv_in", "conv_out", "mid_block.resnets.0.conv1", "time_embedding.linear_1"} <= set(names)
    assert len(set(names)) == len(names)


def test_layers_of_high_precision_are_fixed_or_match_a_pattern(layers: list[Layer]) -> None:
    always = high_precision_layers(layers)
    assert {"conv_in", "conv_out", "time_embedding.linear_1", "mid_block.resnets.0.time_emb_proj"} <= always
    assert "mid_block.resnets.0.conv1" not in always
    more = high_precision_layers(layers, ["mid_block*"])
    assert more - always == {layer.name for layer in layers if layer.name.startswith("mid_block")} - always
    with pytest.raises(ModelError, match="no layer is called 'nothing'"):
        high_precision_layers(layers, ["nothing"])


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: f"{scheme.label}-{scheme.activations}")
def test_only_quantized_layers_read_quantized_tensors(
    scheme: Scheme, made: ExportedUNet, layers: list[Layer], tmp_path: Path
) -> None:
    path, names = rounded(made, layers, scheme, tmp_path)
    model = ir.load(path)
    weights = 0
    for node in model.graph:
        if node.op_type == "DequantizeLinear" and node.inputs[0].is_initializer():
            weights += 1
            stored = node.inputs[0].const_value
            assert stored.dtype == (ir.DataType.FLOAT8E4M3FN if scheme.floating else ir.DataType.INT8)
            assert stored.nbytes <= 256 or isinstance(stored, ir.ExternalTensor)
        elif node.op_type == "DequantizeLinear" and not scheme.outputs:
            readers = {use.node.op_type for use in node.outputs[0].uses()}
            assert readers <= {"Conv", "MatMul", "Gemm"}
    assert weights == len(names)
    seen = [node.inputs[0].name for node in model.graph if node.op_type == "QuantizeLinear"]
    assert len(seen) == len(set(seen)), "one pair for each tensor"
    assert not any(layer.weight in model.graph.initializers for layer in layers if layer.name in names)


@pytest.mark.parametrize("scheme", SCHEMES[:2], ids=lambda scheme: scheme.label)
def test_the_cut_finds_every_join_and_is_exact(
    scheme: Scheme, made: ExportedUNet, layers: list[Layer], plain: Family, tmp_path: Path
) -> None:
    path, _ = rounded(made, layers, scheme, tmp_path / "rounded")
    before, after = find_cuts(made), find_cuts(path)
    assert [cut.name for cut in after] == [cut.name for cut in before]
    for one, other in zip(before, after, strict=True):
        assert [spec.shape for spec in one.cached] == [spec.shape for spec in other.cached]
        assert all(spec.dtype == "float32" for spec in other.cached)
    inputs = random_inputs(plain.model, batch=2, height=8, width=8)
    for cut in ("deepcache:1", "mlperf"):
        pair = split(path, cut, tmp_path / cut.replace(":", ""))
        assert (pair.full.parent / "weights.data").stat().st_size < made.weights.stat().st_size
        whole = run("onnxruntime", pair.full, inputs)
        again = run("onnxruntime", pair.shallow, {**inputs, **whole})
        scale = float(whole["noise_pred"].abs().max())
        assert largest_difference(again["noise_pred"], whole["noise_pred"]) < 0.02 * scale


def test_quantized_weights_take_a_quarter_and_are_near_the_exact_ones(
    made: ExportedUNet, layers: list[Layer], tmp_path: Path
) -> None:
    path, names = rounded(made, layers, INT8, tmp_path)
    exact, model = ir.load(made.path).graph.initializers, ir.load(path).graph.initializers
    for layer in layers:
        if layer.name not in names:
            assert layer.weight in model
            continue
        weight = exact[layer.weight].const_value.numpy()
        stored = model[f"{layer.weight}_rounded"].const_value.numpy()
        scale = model[f"{layer.weight}_scale"].const_value.numpy()
        assert stored.nbytes * 4 == weight.nbytes
        axis = 0 if weight.shape[0] == len(scale) and weight.ndim == 4 else weight.ndim - 1
        shape = [-1 if each == axis else 1 for each in range(weight.ndim)]
        assert np.abs(stored * scale.reshape(shape) - weight).max() <= scale.max() / 2 * 1.001
        assert np.abs(stored.astype(int)).max() == 127


def test_the_same_input_gives_the_same_bytes(made: ExportedUNet, layers: list[Layer], tmp_path: Path) -> None:
    for name in ("one", "other"):
        rounded(made, layers, INT8, tmp_path / name)
    for file in ("unet.onnx", "weights.data"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()


def test_the_error_graph_measures_the_error_of_each_layer(
    made: ExportedUNet, layers: list[Layer], plain: Family, tmp_path: Path
) -> None:
    import shutil

    for file in (made.path, made.weights):
        shutil.copyfile(file, tmp_path / file.name)
    names = {layer.name for layer in layers} - high_precision_layers(layers)
    inputs = random_inputs(plain.model, batch=2, height=8, width=8)
    noise: dict[float, list[float]] = {}
    for width in (8.0, 64.0):
        graph = tmp_path / f"pairs-{width}.onnx"
        order = write_error_graph(
            tmp_path / made.path.name, graph, INT8, everywhere(layers, Range(-width, width)), names
        )
        assert set(order) == names
        sums = run("onnxruntime", graph, inputs)
        noise[width] = [float(sums[f"{name}/error"] / sums[f"{name}/signal"]) for name in order]
        assert all(0 < ratio < 1 for ratio in noise[width])
    assert torch.tensor(noise[64.0]).median() > 4 * torch.tensor(noise[8.0]).median(), "coarser steps, more noise"
