from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from offcut.errors import ModelError, UserError
from offcut.exporter.cut import find_cuts
from offcut.exporter.graph import PROBE_DIMS, infer_shapes, read

from .conftest import Family


def foreign(
    path: Path,
    sample: list[int | str | None],
    text: list[int | str | None],
    *,
    output: list[int | str | None] | None = None,
    dtype: int = TensorProto.FLOAT,
    extra: list[onnx.ValueInfoProto] | None = None,
) -> Path:
    """Write a small ONNX file with a UNet's inputs and the dimensions of a foreign exporter."""
    value, node = helper.make_tensor_value_info, helper.make_node
    weights = [
        helper.make_tensor("conv", TensorProto.FLOAT, [4, 4, 1, 1], [0.5] * 16),
        helper.make_tensor("projection", TensorProto.FLOAT, [6, 4], [0.5] * 24),
        helper.make_tensor("one", TensorProto.INT64, [1], [1]),
    ]
    nodes = [
        node("MatMul", ["encoder_hidden_states", "projection"], ["text"]),
        node("ReduceMean", ["text", "one"], ["mean"], keepdims=1),
        node("ReduceSum", ["timestep"], ["time"], keepdims=0),
        node("Conv", ["sample", "conv"], ["hidden"]),
        node("Mul", ["hidden", "time"], ["scaled"]),
        node("ReduceSum", ["mean"], ["sum"], keepdims=0),
        node("Add", ["scaled", "sum"], ["moved"]),
        node("Conv", ["moved", "conv"], ["out_sample"]),
    ]
    graph = helper.make_graph(
        nodes,
        "foreign",
        [
            value("sample", TensorProto.FLOAT, sample),
            value("timestep", dtype, ["steps"]),
            value("encoder_hidden_states", TensorProto.FLOAT, text),
            *(extra or []),
        ],
        [value("out_sample", TensorProto.FLOAT, output or ["b", "c", "h", "w"])],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), str(path))
    return path


def test_specs_read_from_an_export_are_those_of_the_export(plain: Family) -> None:
    graph = read(plain.graph.path)
    assert graph.inputs == plain.graph.inputs
    assert graph.output == plain.graph.outputs["noise_pred"]


def test_other_exporters_names_of_dimensions_are_translated(tmp_path: Path) -> None:
    graph = read(foreign(tmp_path / "model.onnx", ["b", "c", "h", "w"], ["b", "tokens", "d"]))
    assert {name: spec.shape for name, spec in graph.inputs.items()} == {
        "sample": ("batch", 4, "height", "width"),
        "timestep": ("batch",),
        "encoder_hidden_states": ("batch", "sequence", 6),
    }
    assert (graph.output.name, graph.output.shape) == ("out_sample", ("batch", 4, "height", "width"))


def test_dimensions_without_a_name_are_translated_too(tmp_path: Path) -> None:
    graph = read(foreign(tmp_path / "model.onnx", [None, 4, None, None], [None, None, 6]))
    assert graph.inputs["sample"].shape == ("batch", 4, "height", "width")
    assert graph.inputs["encoder_hidden_states"].shape == ("batch", "sequence", 6)


def test_fixed_dimensions_stay_fixed(tmp_path: Path) -> None:
    graph = read(foreign(tmp_path / "model.onnx", [1, 4, 8, 8], [1, 7, 6], output=[1, 4, 8, 8]))
    assert graph.inputs["sample"].shape == (1, 4, 8, 8)
    assert graph.output.shape == (1, 4, 8, 8)


@pytest.mark.parametrize("dims", [PROBE_DIMS, {"batch": 1, "height": 8, "width": 4, "sequence": 2}])
def test_shapes_are_inferred_at_the_given_dimensions(dims: dict[str, int], plain: Family) -> None:
    shapes = infer_shapes(read(plain.graph.path), dims)
    batch, height, width = dims["batch"], dims["height"], dims["width"]
    assert shapes["noise_pred"] == (batch, 4, height, width)
    latents = {shape for shape in shapes.values() if len(shape) == 4 and shape[2:] == (height, width)}
    halves = {shape for shape in shapes.values() if len(shape) == 4 and shape[2:] == (height // 2, width // 2)}
    assert {shape[1] for shape in latents} >= {4, 16}
    assert {shape[1] for shape in halves} >= {16, 32}


def test_no_shape_is_left_unknown_in_an_offcut_export(plain: Family) -> None:
    graph = read(plain.graph.path)
    shapes = infer_shapes(graph)
    convolutions = [node for node in graph.model.graph if node.op_type in ("Conv", "Concat", "GroupNormalization")]
    assert [node.name for node in convolutions if node.outputs[0].name not in shapes] == []


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not there; give the ONNX file of a UNet"):
        read(tmp_path / "model.onnx")
    with pytest.raises(ModelError, match="is not there"):
        read(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"not ONNX at all", b'{"json": 1}'])
def test_a_file_that_is_not_onnx_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(ModelError):
        read(tmp_path / "model.onnx")


@pytest.mark.parametrize("keep", [10, 1000, 50_000])
def test_a_truncated_onnx_file_is_refused(keep: int, plain: Family, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(plain.graph.path.read_bytes()[:keep])
    with pytest.raises(UserError):
        find_cuts(tmp_path / "model.onnx")


def test_an_onnx_file_of_another_network_is_refused_by_its_inputs(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, [1, 3, 8, 8])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [1, 3, 8, 8])
    graph = helper.make_graph([helper.make_node("Relu", ["pixels"], ["out"])], "vae", [value], [out])
    onnx.save(helper.make_model(graph), str(tmp_path / "model.onnx"))
    with pytest.raises(ModelError, match="is not a UNet: its inputs are pixels, not sample and timestep"):
        read(tmp_path / "model.onnx")


def _no_outputs(model: onnx.ModelProto) -> None:
    del model.graph.output[:]


def _boolean_time(model: onnx.ModelProto) -> None:
    model.graph.input[1].type.tensor_type.elem_type = TensorProto.BOOL


def _output_of_an_addition(model: onnx.ModelProto) -> None:
    del model.graph.node[-1]
    model.graph.node[-1].output[0] = "out_sample"


def _channels_from_nowhere(model: onnx.ModelProto) -> None:
    model.graph.node[0].op_type = "Relu"
    del model.graph.node[0].input[1]


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_no_outputs, "no output"),
        (_boolean_time, "timestep is BOOL, which no diffusers UNet takes"),
        (_output_of_an_addition, "out_sample is not made by a convolution"),
        (_channels_from_nowhere, "cannot tell how many channels encoder_hidden_states has; export it"),
    ],
)
def test_a_graph_that_is_not_a_unet_is_refused_with_the_reason(
    damage: Callable[[onnx.ModelProto], None], sentence: str, tmp_path: Path
) -> None:
    path = foreign(tmp_path / "model.onnx", ["b", "c", "h", "w"], ["b", "s", "d"])
    model = onnx.load(str(path))
    damage(model)
    onnx.save(model, str(path))
    with pytest.raises(ModelError, match=sentence):
        read(path)


def test_an_input_with_a_dimension_of_its_own_is_refused_where_its_size_matters(tmp_path: Path) -> None:
    """The file is the user's, so the error is a user error, not an internal one."""
    residual = helper.make_tensor_value_info("residual", TensorProto.FLOAT, ["b", 4, "odd_height", "odd_width"])
    path = foreign(tmp_path / "model.onnx", ["b", 4, "h", "w"], ["b", "s", 6], extra=[residual])
    with pytest.raises(ModelError, match=r"the input residual .* has the dimension b, odd_height, odd_width"):
        infer_shapes(read(path))
