"""Conversion of a PyTorch program to an ONNX model whose initializers are named after PyTorch's parameters.

The weight of a linear layer is stored transposed, as ``MatMul`` reads it; the parameter map records that.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import InternalError
from .decompose import decomposed
from .parameters import Parameter
from .simplify import simplify

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

WEIGHTS_FILE = "weights.data"


def to_onnx(
    program: torch.export.ExportedProgram, inputs: Sequence[str], outputs: Sequence[str], opset: int, prefix: str
) -> tuple[ir.Model, dict[str, Parameter]]:
    """Convert a program to an ONNX model, and return the model with its parameter map.

    Args:
        program: changed in place; not usable afterwards.
        inputs, outputs: names for the model's inputs and outputs.
        opset: version of the default ONNX domain.
        prefix: prefix to remove from the names of parameters.
    """
    import torch

    with quiet():
        onnx_program = torch.onnx.export(
            decomposed(program),
            (),
            dynamo=True,
            opset_version=opset,
            optimize=False,
            verbose=False,
            input_names=list(inputs),
            output_names=list(outputs),
        )
    assert onnx_program is not None
    model = onnx_program.model
    _promote_concats(model)
    parameters = _lay_out_weights(model, prefix)
    with _weights_as_inputs(model, parameters), quiet():
        simplify(model)
    used = {name: parameter for name, parameter in parameters.items() if name in model.graph.initializers}
    return model, used


def save(model: ir.Model, path: Path, name: str) -> None:
    """Write a model and its weights file, without any trace of the exporting machine."""
    import onnx_ir as ir

    model.producer_name = "offcut"
    model.graph.name = name
    # Stack traces and scopes from the tracer contain paths of the exporting machine.
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
    for value in [*model.graph.inputs, *model.graph.initializers.values(), *model.graph.outputs]:
        value.metadata_props.clear()
    # These properties hold the program as text, in an order that changes from run to run.
    for owner in (model, model.graph):
        owner.metadata_props.clear()
    (path.parent / WEIGHTS_FILE).unlink(missing_ok=True)
    ir.save(model, path, external_data=WEIGHTS_FILE)


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings and log messages about the internals of PyTorch's exporter."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _promote_concats(model: ir.Model) -> None:
    """Cast the inputs of each ``Concat`` to one dtype: PyTorch promotes them, its ONNX exporter (2.13) does not.

    SDXL concatenates the pooled text embedding, which has the UNet's precision, with embedded sizes in float32.
    """
    import onnx_ir as ir

    for node in list(model.graph):
        dtype = node.outputs[0].dtype
        if node.op_type != "Concat" or dtype is None:
            continue
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype in (None, dtype):
                continue
            cast = ir.Node("", "Cast", [value], attributes={"to": ir.AttrInt64("to", dtype)})
            cast.outputs[0].name = f"{node.outputs[0].name}_input_{index}"
            cast.outputs[0].shape, cast.outputs[0].type = value.shape, ir.TensorType(dtype)
            model.graph.insert_before(node, cast)
            node.replace_input_with(index, cast.outputs[0])


def _lay_out_weights(model: ir.Model, prefix: str) -> dict[str, Parameter]:
    """Store each weight as its consumers read it, under the parameter's name, and return the parameter map.

    A weight whose only consumers are transpositions is stored transposed. The transposed copy is made when the file is
    written, one weight at a time, so that an export needs little more memory than the weights.
    """
    import onnx_ir as ir

    graph = model.graph
    parameters = {}
    for value in list(graph.initializers.values()):
        name = str(value.name)
        if not name.startswith(prefix):
            continue  # a constant from the exporter
        bare = name.removeprefix(prefix)
        nodes = [use.node for use in value.uses()]
        transposed = bool(nodes) and all(_swaps_last_two(node) for node in nodes)
        tensor = value.const_value
        if tensor is None:
            raise InternalError(f"the exported parameter {bare} has no value")
        if transposed:
            tensor = _transposed(tensor, bare)
        graph.initializers.pop(name)
        stored = ir.Value(
            name=bare, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        graph.initializers[bare] = stored
        if transposed:
            for node in nodes:
                node.outputs[0].replace_all_uses_with(stored)
                graph.remove(node, safe=True)
        else:
            value.replace_all_uses_with(stored)
        parameters[bare] = Parameter(bare, transposed)
    return parameters


def _swaps_last_two(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and tuple(node.attributes["perm"].as_ints()) == (1, 0)


def _transposed(tensor: ir.TensorProtocol, name: str) -> ir.LazyTensor:
    import numpy as np
    import onnx_ir as ir

    rows, columns = tensor.shape.numpy()

    def evaluate() -> ir.Tensor[Any]:
        return ir.Tensor(np.ascontiguousarray(tensor.numpy().T), dtype=tensor.dtype, name=name)

    return ir.LazyTensor(evaluate, dtype=tensor.dtype, shape=ir.Shape((columns, rows)), name=name)


@contextmanager
def _weights_as_inputs(model: ir.Model, names: Iterable[str]) -> Iterator[None]:
    """Turn weights into inputs while ``simplify`` runs, because it would fold or merge initializers."""
    graph = model.graph
    weights = {name: graph.initializers[name] for name in names}
    constants = {name: value.const_value for name, value in weights.items()}
    for name, value in weights.items():
        graph.initializers.pop(name)
        value.const_value = None
        graph.inputs.append(value)
    yield
    for name, value in weights.items():
        graph.inputs.remove(value)
        value.const_value = constants[name]
        if value.uses():
            graph.initializers[name] = value
