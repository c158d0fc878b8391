"""ONNX graphs of UNets, opened without their weights: inputs, outputs, and tensor shapes at given dimensions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ModelError
from .specs import Dim, Shape, TensorSpec, is_dim, symbols

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

# Dimensions to infer concrete shapes with: all different, spatial ones divisible by the downsampling of every UNet.
PROBE_DIMS = {"batch": 3, "frames": 5, "height": 64, "width": 192, "sequence": 7}

_SAMPLE_DIMS: tuple[Dim, ...] = ("batch", "channels", "height", "width")
# Symbols of the inputs by name and axis, which replace those of a foreign exporter. Inputs with other names keep their
# own symbols.
_INPUT_DIMS: dict[str, tuple[Dim, ...]] = {
    "sample": _SAMPLE_DIMS,
    "timestep": ("batch",),
    "encoder_hidden_states": ("batch", "sequence", "channels"),
    "text_embeds": ("batch", "channels"),
    "time_ids": ("batch", "channels"),
    "class_labels": ("batch", "channels"),
    "timestep_cond": ("batch", "channels"),
}

# ONNX's shape inference expands these operators to their function bodies, and loses the shape. They keep the shape of
# their input, as Sigmoid does.
_SHAPE_PRESERVING_OPS = {"GroupNormalization", "Gelu"}


@dataclass(frozen=True)
class UNetGraph:
    """A UNet's ONNX graph. The weights stay on disk.

    Attributes:
        path: the ONNX file.
        model: the graph, with references into the weights file.
        inputs: specs by name, in the graph's order.
        output: the noise prediction, under its name in the file.
    """

    path: Path
    model: ir.Model
    inputs: Mapping[str, TensorSpec]
    output: TensorSpec


CONVOLUTIONS = ("Conv", "ConvInteger", "QLinearConv")
"""Operators of convolutions, in floating point and quantized."""

_WEIGHT_INPUTS = {
    **{"Conv": 1, "ConvInteger": 1, "QLinearConv": 3},
    **{"MatMul": 1, "MatMulInteger": 1, "QLinearMatMul": 3, "Gemm": 1},
}
_CASTS = ("Cast", "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")


def read(path: str | Path) -> UNetGraph:
    """Open the ONNX file of a UNet from any exporter.

    Raises:
        ModelError: the file is not an ONNX file, or not a UNet.
    """
    import onnx
    import onnx_ir as ir

    path = Path(path)
    if not path.is_file():
        raise ModelError(f"{path} is not there; give the ONNX file of a UNet")
    try:
        _check(path)
        model = ir.load(path)
    except onnx.checker.ValidationError as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{path} is not a valid ONNX graph ({reason}); export it again") from error
    except Exception as error:  # protobuf, onnx and onnx_ir each raise exceptions of their own
        raise ModelError(f"{path} is not a readable ONNX file") from error
    names = [str(value.name) for value in model.graph.inputs]
    if not {"sample", "timestep"} <= set(names):
        raise ModelError(f"{path} is not a UNet: its inputs are {', '.join(names) or 'none'}, not sample and timestep")
    if not model.graph.outputs:
        raise ModelError(f"{path} is not a UNet: it has no output")
    inputs = {str(value.name): _input_spec(value) for value in model.graph.inputs}
    output = model.graph.outputs[0]
    return UNetGraph(path, model, inputs, TensorSpec(str(output.name), _dtype(output), _output_shape(output, inputs)))


def _check(path: Path) -> None:
    """Check a graph with ONNX's own checker, without its weights: the checker refuses weights in hard-linked files.

    Raises:
        onnx.checker.ValidationError: the graph is not valid.
    """
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    weights = [tensor for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    others = [tensor for tensor in model.graph.initializer if tensor.data_location != onnx.TensorProto.EXTERNAL]
    del model.graph.initializer[:]
    model.graph.initializer.extend(others)
    inputs = {value.name for value in model.graph.input}
    model.graph.input.extend(
        onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        for tensor in weights
        if tensor.name not in inputs
    )
    onnx.checker.check_model(model)


def contract(path: str | Path) -> dict[str, dict[str, TensorSpec]]:
    """Return the specs of an ONNX file's inputs and outputs, as the file declares them."""
    import onnx_ir as ir

    graph = ir.load(path).graph
    return {
        "inputs": {str(value.name): _declared(value) for value in graph.inputs},
        "outputs": {str(value.name): _declared(value) for value in graph.outputs},
    }


def infer_shapes(graph: UNetGraph, dims: Mapping[str, int] = PROBE_DIMS) -> dict[str, Shape]:
    """Return the shapes of all tensors at these dimensions by name; tensors of unknown shape are left out.

    The inputs get these dimensions, and the graph's shape arithmetic is folded. No weight is read.

    Raises:
        ModelError: an input has a symbolic dimension that is not in ``dims``.
    """
    import onnx_ir as ir
    from onnxscript.optimizer import fold_constants

    for name, spec in graph.inputs.items():
        if unknown := [dim for dim in symbols([spec]) if dim not in dims]:
            raise ModelError(
                f"the input {name} of {graph.path} has the dimension {', '.join(unknown)}, which no UNet of diffusers "
                "has; export it with that dimension fixed"
            )
    model = ir.load(graph.path)
    for value in model.graph.inputs:
        if str(value.name) in graph.inputs:
            value.shape = ir.Shape(graph.inputs[str(value.name)].resolve(dims))
    for node in model.graph:
        if node.op_type in _SHAPE_PRESERVING_OPS:
            node.op_type = "Sigmoid"
            node.resize_inputs(1)
            node.attributes.clear()
    try:
        fold_constants(model, onnx_shape_inference=True)
    except (
        ValueError,
        TypeError,
        IndexError,
        KeyError,
    ) as error:  # of NumPy and onnxscript, for tensors that do not fit
        raise ModelError(f"the shapes in {graph.path} do not fit together ({error}); export it again") from error
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    values += [output for node in model.graph for output in node.outputs]
    return {
        str(value.name): tuple(value.shape.numpy())
        for value in values
        if value.shape is not None and value.shape.is_static() and all(size > 0 for size in value.shape.numpy())
    }


def _output_shape(output: ir.Value, inputs: Mapping[str, TensorSpec]) -> tuple[Dim, ...]:
    sample = inputs["sample"].shape
    if len(sample) == 5:
        return _declared(output).shape
    channels = output.shape[1] if output.shape is not None and len(output.shape) == 4 else None
    if not isinstance(channels, int):
        channels = _channels_of_producer(output)
    return (sample[0], channels, *sample[2:])


def _input_spec(value: ir.Value) -> TensorSpec:
    name = str(value.name)
    known_dims = _INPUT_DIMS.get(name, ())
    shape: list[Dim] = []
    is_video = len(value.shape or ()) == 5  # only offcut exports video UNets, with these symbols
    for axis, dim in enumerate(value.shape or ()):
        if isinstance(dim, int):
            if dim < 1:
                raise ModelError(f"the input {name} has the size {dim} in its shape; export the UNet again")
            shape.append(dim)
            continue
        if is_dim(str(dim.value)) and (is_video or "*" in str(dim.value)):
            shape.append(str(dim.value))
            continue
        symbol = known_dims[axis] if axis < len(known_dims) else str(dim.value)
        shape.append(_channels_of_consumer(value) if symbol == "channels" else symbol)
    return TensorSpec(name, _dtype(value), tuple(shape))


def _declared(value: ir.Value) -> TensorSpec:
    dims = value.shape or ()
    return TensorSpec(
        str(value.name), _dtype(value), tuple(dim if isinstance(dim, int) else str(dim.value) for dim in dims)
    )


def _dtype(value: ir.Value) -> str:
    import onnx_ir as ir

    names = {
        ir.DataType.FLOAT: "float32",
        ir.DataType.FLOAT16: "float16",
        ir.DataType.BFLOAT16: "bfloat16",
        ir.DataType.INT64: "int64",
    }
    if value.dtype not in names:
        raise ModelError(f"{value.name} is {value.dtype}, which no diffusers UNet takes or returns")
    return names[value.dtype]


def weight_of(node: ir.Node) -> ir.Value | None:
    """Return the weight of a convolution or matrix product, quantized or not, in the shape that is stored."""
    index = _WEIGHT_INPUTS.get(node.op_type)
    weight = node.inputs[index] if index is not None and index < len(node.inputs) else None
    producer = None if weight is None else weight.producer()
    if producer is not None and producer.op_type == "DequantizeLinear":
        weight = producer.inputs[0]
    return weight


def _channels_of_consumer(value: ir.Value) -> int:
    """Return the size of a channel axis that a foreign exporter left symbolic, from the weight that reads the input."""
    for use in value.uses():
        weight = weight_of(use.node)
        if weight is not None and weight.shape is not None and weight.is_initializer():
            axis = 1 if use.node.op_type in CONVOLUTIONS else 0
            if use.node.op_type == "Gemm":
                axis = use.node.attributes.get_int("transB", 0)
            return int(weight.shape[axis])  # type: ignore[arg-type]
        if use.node.op_type in _CASTS:
            return _channels_of_consumer(use.node.outputs[0])
    raise ModelError(f"cannot tell how many channels {value.name} has; export it with that dimension fixed")


def _channels_of_producer(value: ir.Value) -> int:
    node = value.producer()
    operators: tuple[str, ...] = CONVOLUTIONS
    while node is not None and node.op_type in (*_CASTS, "Mul", "Add") and node.inputs[0] is not None:
        if node.op_type in ("Mul", "Add"):
            operators = ("ConvInteger",)  # which is followed by a multiplication with its scale, and its bias
        node = node.inputs[0].producer()
    weight = weight_of(node) if node is not None and node.op_type in operators else None
    if weight is None or weight.shape is None:
        raise ModelError(f"the output {value.name} is not made by a convolution: this is not a UNet's graph")
    return int(weight.shape[0])  # type: ignore[arg-type]


def external_files(path: Path) -> set[str]:
    """Return the names of the files that an ONNX graph takes tensors from, as the graph spells them.

    Raises:
        ModelError: the file is not an ONNX graph.
    """
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's own errors share no base class
        raise ModelError(f"{path} is not an ONNX graph ({type(error).__name__})") from error
    tensors = [*_tensors_of(model.graph), *(tensor for each in model.functions for tensor in _node_tensors(each.node))]
    return {
        entry.value
        for tensor in tensors
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }


def _tensors_of(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            for graph in (attribute.g, *attribute.graphs):
                yield from _tensors_of(graph)
