"""Observed graphs: ONNX graphs with further outputs that describe the distributions of inner tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

# Steps between sampled values: prime, so that samples do not always fall on the same positions of an axis.
_STRIDES = (1, 7, 31, 127, 509, 2039, 8191)
_LARGEST_SAMPLE = 1 << 16
KINDS = ("low", "high", "sample")


def stride(size: int) -> int:
    """Return the step between sampled values for a tensor of this size."""
    return next((step for step in _STRIDES if size // step <= _LARGEST_SAMPLE), _STRIDES[-1])


def write_observed_graph(graph: Path, out: Path, strides: Mapping[str, int]) -> list[str]:
    """Write a copy of the graph with outputs that describe some of its tensors.

    Each tensor gets the float32 outputs ``name/low`` and ``name/high``, its minimum and maximum, and ``name/sample``,
    every n-th of its values, where n is the stride.

    Args:
        out: ONNX file to write, in the graph's directory, because it refers to the same weights.
        strides: steps between sampled values, by the tensor's name; names that the graph does not have are ignored.

    Returns:
        The names of the tensors that are described.
    """
    import onnx_ir as ir

    model = ir.load(graph)
    values = {str(value.name): value for value in model.graph.inputs}
    values |= {str(value.name): value for node in model.graph for value in node.outputs}
    observed = [name for name in strides if name in values]
    for name in observed:
        _describe(model.graph, values[name], strides[name])
    ir.save(model, out)
    return observed


def _describe(graph: ir.Graph, value: ir.Value, step: int) -> None:
    import numpy as np
    import onnx_ir as ir

    name = str(value.name)

    def constant(label: str, number: int) -> ir.Value:
        tensor = ir.tensor(np.array([number], np.int64), name=f"{name}/{label}")
        value = ir.Value(name=tensor.name, shape=ir.Shape([1]), type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(value)
        return value

    cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT})
    values = cast.outputs[0]
    flat = ir.node("Reshape", [values, constant("flat", -1)])
    slicing = [
        constant("begin", 0),
        constant("end", np.iinfo(np.int64).max),
        constant("axis", 0),
        constant("step", step),
    ]
    described = {
        "low": ir.node("ReduceMin", [values], {"keepdims": 0}),
        "high": ir.node("ReduceMax", [values], {"keepdims": 0}),
        "sample": ir.node("Slice", [flat.outputs[0], *slicing]),
    }
    nodes = [cast, flat, *described.values()]
    for kind, node in described.items():
        output = node.outputs[0]
        output.name, output.type = f"{name}/{kind}", ir.TensorType(ir.DataType.FLOAT)
        output.shape = ir.Shape([None] if kind == "sample" else [])
        graph.outputs.append(output)
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], nodes)
    else:
        graph.insert_after(producer, nodes)
