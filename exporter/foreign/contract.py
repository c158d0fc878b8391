"""Changes to a foreign ONNX graph that give it the names, dtypes and dimensions of offcut's own exports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import ModelError
from ..specs import TensorSpec
from .find import ForeignGraph

if TYPE_CHECKING:
    import onnx_ir as ir

_ONNX_DTYPES = {"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16", "int64": "INT64"}
_VALUE_PRESERVING_OPS = ("Unsqueeze", "Cast", "Identity", "Expand")


def set_contract(model: ir.Model, inputs: list[TensorSpec], outputs: list[TensorSpec]) -> None:
    """Set the dtypes of a graph's inputs, and the names and dimensions of its inputs and outputs.

    Args:
        inputs: new specs; each has the name of one of the graph's inputs.
        outputs: new specs in the order of the graph's outputs, which are renamed.
    """
    import onnx_ir as ir

    graph = model.graph
    for node in graph:  # shapes of inner values hold the other exporter's symbols
        for value in node.outputs:
            if value.shape is not None and not value.shape.is_static():
                value.shape = None
    declared = {str(value.name): value for value in graph.inputs}
    graph.inputs.clear()
    for spec in inputs:
        value = declared[spec.name]
        value.shape = ir.Shape(spec.shape)
        dtype = ir.DataType[_ONNX_DTYPES[spec.dtype]]
        if value.dtype != dtype:
            _cast(graph, value, dtype)
        graph.inputs.append(value)
    for value, spec in zip(graph.outputs, outputs, strict=True):
        value.name = spec.name
        value.shape = ir.Shape(spec.shape)
        value.type = ir.TensorType(ir.DataType[_ONNX_DTYPES[spec.dtype]])


def _cast(graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> None:
    """Change an input's dtype, and insert a ``Cast`` back to the dtype that the graph reads."""
    import onnx_ir as ir

    assert value.dtype is not None
    node = ir.Node("", "Cast", [value], attributes={"to": ir.AttrInt64("to", value.dtype)})
    node.outputs[0].name = f"{value.name}_cast"
    node.outputs[0].type, value.type = value.type, ir.TensorType(dtype)
    for use in tuple(value.uses()):
        if use.node is not node:
            use.node.replace_input_with(use.idx, node.outputs[0])
    graph.insert_before(graph[0], node)


def separate_shared_weights(model: ir.Model) -> None:
    """Give each parameter an initializer of its own.

    PyTorch's older exporter stores equal parameters once, and adds an ``Identity`` node for each further parameter.
    """
    import onnx_ir as ir

    graph = model.graph
    for node in list(graph):
        value = node.inputs[0] if node.op_type == "Identity" else None
        if value is None or not value.is_initializer() or node.outputs[0].is_graph_output():
            continue
        name = str(node.outputs[0].name)
        own = ir.Value(name=name, shape=value.shape, type=value.type, const_value=value.const_value)
        node.outputs[0].replace_all_uses_with(own)
        graph.remove(node, safe=True)
        graph.initializers[name] = own


def one_timestep_per_image(foreign: ForeignGraph) -> None:
    """Make the graph take one float32 timestep for each image.

    A foreign graph usually takes a single timestep, because ``UNet2DConditionModel`` expands its timestep to the batch
    and embeds it in float32. The nodes that expand it are removed.

    Raises:
        ModelError: the graph has no such nodes, or computes with a timestep of another dtype.
    """
    import onnx_ir as ir

    graph = foreign.model.graph
    old = next(value for value in graph.inputs if value.name == "timestep")
    if old.dtype == ir.DataType.FLOAT and old.shape is not None and len(old.shape) == 1:
        return  # the graph already takes such timesteps: its ``Expand`` leaves them as they are
    expanded, dtype = old, old.dtype
    chain: list[ir.Node] = []
    while not chain or chain[-1].op_type != "Expand":
        uses = list(expanded.uses())
        if len(uses) != 1 or uses[0].idx or uses[0].node.op_type not in _VALUE_PRESERVING_OPS:
            raise ModelError(
                f"{foreign.path} does not expand its timestep to the batch, as UNets of diffusers do: "
                "export it with optimum-cli, or build from PyTorch's weights"
            )
        chain.append(uses[0].node)
        expanded = chain[-1].outputs[0]
        if chain[-1].op_type == "Cast":
            dtype = ir.DataType(chain[-1].attributes["to"].as_int())
    if dtype != ir.DataType.FLOAT and not _embeds_in_float32(expanded):
        raise ModelError(f"{foreign.path} computes with a timestep that is {dtype}: export it with a float32 timestep")
    timestep = ir.Value(name="timestep", shape=ir.Shape(["batch"]), type=ir.TensorType(ir.DataType.FLOAT))
    expanded.replace_all_uses_with(timestep)
    for node in reversed(chain):
        graph.remove(node, safe=True)
    graph.inputs[list(graph.inputs).index(old)] = timestep
    _drop_unused(foreign.model)


def _embeds_in_float32(value: ir.Value) -> bool:
    """Return whether every reader of a value casts it to float32 first. Types of values in between are cleared."""
    import onnx_ir as ir

    for use in value.uses():
        if use.node.op_type == "Cast" and use.node.attributes["to"].as_int() == ir.DataType.FLOAT:
            continue
        if use.node.op_type != "Unsqueeze" or not _embeds_in_float32(use.node.outputs[0]):
            return False
        use.node.outputs[0].type = None
    return True


def _drop_unused(model: ir.Model) -> None:
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(model)
