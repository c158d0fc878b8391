"""Decomposition of a traced program into the operators that PyTorch's ONNX exporter translates, without a second trace.

To decompose a program, PyTorch traces all of it again with symbolic shapes, which took longer than the rest of the
conversion to ONNX. Most UNets need five trivial decompositions, which this module makes node by node.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import isbuiltin
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def decomposed(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Return the program with its trivial operators replaced; the argument's graph is changed in place.

    ``run_decompositions`` of the returned program, which PyTorch's ONNX exporter calls, traces the program again only
    where an operator is left to decompose. A program in which an operator writes to its input is returned unchanged,
    because a copy made here would not see what is written to the original.
    """
    import torch

    class DecomposedProgram(torch.export.ExportedProgram):
        def run_decompositions(
            self,
            decomp_table: Mapping[Any, Callable[..., Any]] | None = None,
            decompose_custom_triton_ops: bool = False,
        ) -> torch.export.ExportedProgram:
            calls = [node for node in self.graph.nodes if node.op == "call_function"]
            if decomp_table is not None and not any(_needs_trace(node, decomp_table) for node in calls):
                return self
            result: torch.export.ExportedProgram = super().run_decompositions(decomp_table, decompose_custom_triton_ops)
            return result

    graph = program.graph
    if any(_writes_to_input(node) for node in graph.nodes):
        return program
    for node in list(graph.nodes):
        if node.op == "call_function":
            _replace(graph, node)
    return DecomposedProgram(
        root=program.graph_module,
        graph=graph,
        graph_signature=program.graph_signature,
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants=program.constants,
    )


def _needs_trace(node: torch.fx.Node, table: Mapping[Any, Any]) -> bool:
    """Return whether PyTorch's own decomposition would replace the node's operator.

    PyTorch replaces the operators of the table, composite operators whose result may be a view (no table lists them),
    and operators that are neither ATen's nor Python's.
    """
    from torch._C import DispatchKey

    target: Any = node.target
    if not str(target).startswith("aten."):
        return not isbuiltin(target)
    composite = target.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd)
    return target in table or (target.is_view and composite)


def _writes_to_input(node: torch.fx.Node) -> bool:
    """Return whether the node calls an ATen operator such as ``aten.add_.Tensor``."""
    namespace, _, name = str(node.target).partition(".")
    return namespace == "aten" and name.partition(".")[0].endswith("_")


def _replace(graph: torch.fx.Graph, node: torch.fx.Node) -> None:
    """Replace one operator that ONNX needs in another form, or drop an operator that changes nothing in ONNX."""
    import torch

    aten = torch.ops.aten
    arguments: Any = node.args
    match node.target, arguments:
        case aten.dropout.default, (source, _, False):
            _drop(graph, node, source)
        case aten.contiguous.default, (source,):
            node.target, node.kwargs = aten.clone.default, {"memory_format": torch.contiguous_format}
        case (aten.to.dtype, (source, dtype)) | (aten.to.device, (source, _, dtype)) if not node.kwargs:
            if source.meta["val"].dtype == dtype:
                _drop(graph, node, source)
            else:
                node.target, node.args, node.kwargs = aten._to_copy.default, (source,), {"dtype": dtype}
        case aten.reshape.default, (source, shape):
            # ``view`` needs a contiguous copy of tensors with other strides. The ONNX graph does not have the copy.
            with graph.inserting_before(node):
                copy = graph.call_function(aten.clone.default, (source,), {"memory_format": torch.contiguous_format})
            copy.meta["val"] = source.meta["val"].clone(memory_format=torch.contiguous_format)
            sizes = zip(shape, node.meta["val"].shape, strict=True)
            shape = [known if dim == -1 and isinstance(known, int) else dim for dim, known in sizes]
            node.target, node.args = aten.view.default, (copy, shape)
        case aten.chunk.default, (source, count, *options):
            axis = options[0] if options else 0
            size = source.meta["val"].shape[axis]
            if isinstance(size, int):
                node.target, node.args = aten.split.Tensor, (source, -(-size // count), axis)


def _drop(graph: torch.fx.Graph, node: torch.fx.Node, source: Any) -> None:
    node.replace_all_uses_with(source)
    graph.erase_node(node)
