from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch
from support.models import save_unet
from support.unets import SDXL, SKIPS, eager, largest_difference, random_inputs, run

from offcut.errors import ModelError
from offcut.exporter.load import load_unet, locate
from offcut.exporter.trace.export import ExportedUNet, export
from offcut.exporter.trace.reference import read_reference

from ..conftest import Family

# Batch, height, width, sequence: one request, guidance, a batch beyond what was traced, the smallest and the longest.
SHAPES = [(1, 8, 8, 7), (2, 4, 12, 77), (5, 16, 8, 1), (2, 4, 4, 154), (70, 8, 8, 2)]

ADDED = {name: value for name, value in SDXL.items() if name.startswith(("addition_", "projection_"))}

FAMILIES = [pytest.param(name, marks=pytest.mark.slow if name == "sdxl" else ()) for name in SKIPS]


def parameters_from_weights(graph: ExportedUNet) -> dict[str, torch.Tensor]:
    """Every parameter as ``parameters.json`` says to read it from the initializers."""
    stored = {str(v.name): v.const_value for v in ir.load(graph.path).graph.initializers.values()}
    table = json.loads((graph.path.parent / "parameters.json").read_text(encoding="utf-8"))
    found = {}
    for name, where in table.items():
        constant = stored[where["initializer"]]
        assert constant is not None
        tensor = torch.from_numpy(constant.numpy().copy())
        found[name] = tensor.T if where["transposed"] else tensor
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_one_graph_serves_every_shape(name: str, family: Callable[[str], Family]) -> None:
    model, graph = family(name).model, family(name).graph
    for batch, height, width, sequence in SHAPES:
        inputs = random_inputs(model, batch=batch, height=height, width=width, sequence=sequence)
        result = run("onnxruntime", graph.path, inputs)["noise_pred"]
        assert largest_difference(result, eager(model, inputs)) <= 1e-4, (batch, height, width, sequence)


@pytest.mark.smoke
def test_the_exported_graph_computes_what_pytorch_computes(plain: Family) -> None:
    inputs = random_inputs(plain.model, batch=2, height=8, width=12)
    expected = eager(plain.model, inputs)
    assert float(expected.abs().max()) > 0.1
    for engine in ("onnxruntime", "openvino"):
        assert largest_difference(run(engine, plain.graph.path, inputs)["noise_pred"], expected) <= 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_every_input_is_read(name: str, family: Callable[[str], Family]) -> None:
    """A changed value in one row of any input changes the output of that row only."""
    model, graph = family(name).model, family(name).graph
    inputs = random_inputs(model, batch=2, height=8, width=8)
    result = run("onnxruntime", graph.path, inputs)["noise_pred"]
    assert set(inputs) == set(graph.inputs)
    for key, value in inputs.items():
        other = value.clone()
        other[1] = other[1] + 1
        changed = run("onnxruntime", graph.path, {**inputs, key: other})["noise_pred"]
        assert not torch.equal(changed[1], result[1]), key
        assert torch.allclose(changed[0], result[0], atol=1e-5), key


@pytest.mark.parametrize("name", FAMILIES)
def test_the_parameter_map_finds_every_parameter_in_the_weights(name: str, family: Callable[[str], Family]) -> None:
    model, graph = family(name).model, family(name).graph
    found = parameters_from_weights(graph)
    expected = dict(load_unet(locate(model)).named_parameters())
    assert set(found) == set(expected)
    for parameter, value in expected.items():
        assert torch.equal(found[parameter], value), parameter
    assert {key: (p.initializer, p.transposed) for key, p in graph.parameters.items()} == {
        key: (p["initializer"], p["transposed"])
        for key, p in json.loads((graph.path.parent / "parameters.json").read_text(encoding="utf-8")).items()
    }
    assert any(p.transposed for p in graph.parameters.values())


def test_the_contract_names_the_graphs_inputs_and_outputs(plain: Family) -> None:
    model = onnx.load(str(plain.graph.path), load_external_data=False)

    def shape(value: onnx.ValueInfoProto) -> tuple[int | str, ...]:
        return tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)

    assert {value.name: shape(value) for value in model.graph.input} == {
        name: spec.shape for name, spec in plain.graph.inputs.items()
    }
    assert [value.name for value in model.graph.output] == ["noise_pred"]
    assert shape(model.graph.output[0]) == plain.graph.outputs["noise_pred"].shape
    assert plain.graph.multiple == 2


def test_the_weights_are_written_once_in_one_file(plain: Family) -> None:
    folder = plain.graph.path.parent
    assert {file.name for file in folder.iterdir()} == {
        "unet.onnx",
        "weights.data",
        "parameters.json",
        "reference.safetensors",
    }
    model = onnx.load(str(plain.graph.path), load_external_data=False)
    regions = []
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entry = {item.key: item.value for item in tensor.external_data}
            assert entry["location"] == "weights.data"
            regions.append((int(entry["offset"]), int(entry["length"])))
    regions.sort()
    assert all(start + length <= after for (start, length), (after, _) in pairwise(regions))
    parameters = sum(p.numel() * p.element_size() for p in load_unet(locate(plain.model)).parameters())
    assert plain.graph.weights.stat().st_size <= parameters + 4096 * len(regions)
    assert plain.graph.path.stat().st_size < 250_000


def test_exporting_again_replaces_the_export(plain: Family, tmp_path: Path) -> None:
    """A hard link to the old weights, as another graph's directory may hold, keeps the old bytes."""
    out = tmp_path / "export"
    out.mkdir()
    kept = tmp_path / "kept.data"
    kept.write_bytes(b"other people's weights")
    (out / "weights.data").hardlink_to(kept)
    # In another process, where sets have another order.
    code = "import sys; from offcut.exporter.trace.export import export; export(sys.argv[1], sys.argv[2])"
    hashes = os.environ | {"PYTHONHASHSEED": "1"}
    subprocess.run([sys.executable, "-c", code, plain.model, out], check=True, env=hashes)
    assert kept.read_bytes() == b"other people's weights"
    for name in ("unet.onnx", "weights.data", "parameters.json"):
        same = (out / name).read_bytes() == (plain.graph.path.parent / name).read_bytes()
        assert same, f"{name} differs between two exports of one model"


def test_nothing_of_the_exporting_machine_is_left_in_the_files(plain: Family) -> None:
    import diffusers

    folder = plain.graph.path.parent
    traces = [str(folder), str(plain.model), str(Path.home()) + "/", str(Path(diffusers.__file__).parent)]
    traces += ["site-packages", "Traceback", 'File "', ".py"]
    for file in folder.iterdir():
        content = file.read_bytes()
        assert [trace for trace in traces if trace.encode() in content] == [], file.name


def test_the_reference_is_what_pytorch_computes(plain: Family) -> None:
    reference = read_reference(plain.graph.reference)
    assert set(reference.inputs) == set(plain.graph.inputs)
    assert largest_difference(reference.noise_pred, eager(plain.model, reference.inputs)) <= 1e-6


def test_the_stages_are_announced_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first stage is announced before anything is read."""
    import offcut.exporter.trace.export as module

    stages: list[str] = []

    def stop(*args: object) -> None:
        raise ModelError(f"stopped after {stages}")

    monkeypatch.setattr(module, "load_unet", stop)
    with pytest.raises(ModelError, match="load"):
        export(save_unet(tmp_path / "model"), tmp_path / "out", progress=stages.append)


@pytest.mark.slow
@pytest.mark.smoke
def test_opset_20_gives_the_same_outputs(plain: Family, tmp_path: Path) -> None:
    graph = export(plain.model, tmp_path / "export", opset=20)
    assert graph.opset == 20
    model = ir.load(graph.path)
    assert model.opset_imports[""] == 20
    assert not {"Attention", "RMSNormalization"} & {node.op_type for node in model.graph}
    inputs = random_inputs(plain.model, batch=3, height=6, width=8)
    expected = eager(plain.model, inputs)
    for engine in ("onnxruntime", "openvino"):
        assert largest_difference(run(engine, graph.path, inputs)["noise_pred"], expected) <= 1e-4


def test_opset_23_keeps_attention_and_group_normalisation_whole(plain: Family) -> None:
    model = ir.load(plain.graph.path)
    assert model.opset_imports[""] == 23
    operators = [node.op_type for node in model.graph]
    # Two attention layers a transformer block, in the down, the mid and two up layers.
    assert operators.count("Attention") == 8
    norms = [name for name in graph_modules(plain.model) if name == "GroupNorm"]
    assert operators.count("GroupNormalization") == len(norms)


def graph_modules(folder: Path) -> list[str]:
    return [type(module).__name__ for module in load_unet(locate(folder)).modules()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "dtype", "stored"),
    [("fp16", "float16", ir.DataType.FLOAT16), ("bf16", "bfloat16", ir.DataType.BFLOAT16)],
)
def test_the_whole_graph_has_the_precision(precision: str, dtype: str, stored: ir.DataType, tmp_path: Path) -> None:
    """With SDXL's added conditioning, where PyTorch joins tensors of two precisions."""
    model_dir = save_unet(tmp_path / "model", **ADDED)
    graph = export(model_dir, tmp_path / "export", precision=precision)
    assert {name: spec.dtype for name, spec in graph.inputs.items()} == {
        "sample": dtype,
        "timestep": "float32",
        **dict.fromkeys(["encoder_hidden_states", "text_embeds", "time_ids"], dtype),
    }
    assert graph.outputs["noise_pred"].dtype == dtype
    model = ir.load(graph.path)
    assert {str(value.name): value.dtype for value in model.graph.inputs} == {
        "sample": stored,
        "timestep": ir.DataType.FLOAT,
        **dict.fromkeys(["encoder_hidden_states", "text_embeds", "time_ids"], stored),
    }
    assert model.graph.outputs[0].dtype == stored
    initializers = model.graph.initializers
    assert {initializers[p.initializer].dtype for p in graph.parameters.values()} == {stored}
    for convolution in (node for node in model.graph if node.op_type == "Conv"):
        assert convolution.inputs[1] is not None
        assert convolution.inputs[1].dtype == stored
    reference = read_reference(graph.reference)
    assert str(reference.noise_pred.dtype) == f"torch.{dtype}"
    engine = "onnxruntime" if precision == "fp16" else "openvino"  # ONNX Runtime's CPU provider loads no bf16
    inputs = random_inputs(model_dir, batch=2, height=8, width=8)
    if engine == "onnxruntime":
        given = {k: v if k == "timestep" else v.to(torch.float16) for k, v in inputs.items()}
        result = run(engine, graph.path, given)["noise_pred"]
        assert result.dtype == torch.float16
        exact = eager(model_dir, inputs)
        assert largest_difference(result, exact) <= 1e-2 * float(exact.abs().max())
    else:
        import openvino

        openvino.Core().compile_model(graph.path, "CPU")


@pytest.mark.slow
def test_dimensions_are_static_on_request(static: Family) -> None:
    graph = static.graph
    assert graph.inputs["sample"].shape == graph.outputs["noise_pred"].shape == (2, 4, 6, 12)
    assert graph.inputs["timestep"].shape == (2,)
    assert graph.inputs["encoder_hidden_states"].shape == (2, 7, 16)
    inputs = random_inputs(static.model, batch=2, height=6, width=12)
    result = run("onnxruntime", graph.path, inputs)["noise_pred"]
    assert largest_difference(result, eager(static.model, inputs)) <= 1e-4
    with pytest.raises(Exception, match="Got invalid dimensions"):
        run("onnxruntime", graph.path, random_inputs(static.model, batch=2, height=8, width=12))


@pytest.mark.slow
def test_a_unet_of_one_level_is_exported(tmp_path: Path) -> None:
    """No downsampling: any height and width is valid, and there is a skip connection for each layer."""
    model = save_unet(
        tmp_path / "model",
        block_out_channels=(16,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    )
    graph = export(model, tmp_path / "export")
    assert graph.multiple == 1
    inputs = random_inputs(model, batch=3, height=5, width=7)
    result = run("onnxruntime", graph.path, inputs)["noise_pred"]
    assert largest_difference(result, eager(model, inputs)) <= 1e-4


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"precision": "int4"}, "precision 'int4' is unknown; choose one of fp32, fp16, bf16"),
        ({"opset": 17}, "opset 17 is not supported; choose 20 to 24"),
        ({"opset": 99}, "opset 99 is not supported; choose 20 to 24"),
        ({"dims": {"channels": 4}}, "channels cannot be fixed; .* batch, height, width, sequence"),
        ({"dims": {"height": 9}}, "the latent's height cannot be 9: this UNet needs a multiple of 2"),
        ({"dims": {"batch": 0}}, "batch cannot be fixed; give a size of at least 1"),
    ],
)
def test_invalid_options_are_refused_before_the_trace(
    arguments: dict[str, object], sentence: str, tiny_unet_dir: Path, tmp_path: Path
) -> None:
    stages: list[str] = []
    with pytest.raises(ModelError, match=sentence):
        export(tiny_unet_dir, tmp_path / "out", progress=stages.append, **arguments)  # type: ignore[arg-type]
    assert "trace" not in stages
    assert not (tmp_path / "out").exists()
