"""The cut on a PyTorch program, for engines that compile without ONNX.

The rule of ``cut`` finds the same joins in the graph that ``torch.export`` returns. So ``deepcache:k`` and the names of
the cached tensors mean the same as in an ONNX graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import CutError, InternalError
from .components import ComponentNetwork
from .cut import is_strict_subset
from .families import NOISE_PRED, example_dims, example_inputs
from .load import ModelSource, load_unet
from .specs import TensorSpec
from .trace.convert import quiet
from .trace.program import dim_symbols, export_program

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram
    from torch.fx import GraphModule, Node


@dataclass(frozen=True)
class ProgramJoin:
    """A skip connection's ``cat(hidden, skip)``."""

    node: Node
    hidden: Node
    skip: Node


@dataclass(frozen=True)
class BufferedProgram:
    """A program that writes its results into buffers that its caller passes.

    Attributes:
        exported: takes two lists of tensors, inputs and output buffers, and returns nothing.
        inputs: names of the tensors in the first list.
        outputs: names of the tensors in the second list.
    """

    exported: torch.export.ExportedProgram
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def component_program(network: ComponentNetwork) -> BufferedProgram:
    """Trace a network around the UNet to a program that writes into its caller's buffers."""
    spec_lists = ([network.input], list(network.outputs))
    example = network.example()
    examples = ([example], [value.clone() for value in network.compute(example).values()])
    symbols = network.symbols()
    dynamic = tuple([symbols(spec) for spec in specs] for specs in spec_lists)
    exported = _export_with_buffers(network.module, examples, dynamic)
    return BufferedProgram(exported, (network.input.name,), tuple(spec.name for spec in network.outputs))


class UNetProgram:
    """A UNet traced once, from which full and shallow programs are cut.

    Attributes:
        module: the whole UNet as PyTorch traced it.
        features: specs of all tensors that a cut may cache, by name.
    """

    def __init__(
        self,
        source: ModelSource,
        precision: str,
        specs: Mapping[str, TensorSpec],
        features: Mapping[str, TensorSpec],
        fixed: Mapping[str, int],
        multiple: int,
    ) -> None:
        """Load a UNet and trace it.

        Args:
            source: the model.
            precision: precision of weights and computation.
            specs: the inputs by name, ``sample`` and ``timestep`` first.
            features: specs of all tensors that a cut may cache, by name, e.g. ``deep_feature_0``.
            fixed: dimensions that stay static, with their sizes.
            multiple: number that height and width are a multiple of.
        """
        unet = load_unet(source, precision)
        even_batch = source.attention is not None
        self._specs, self.features = specs, features
        self._dims = {**example_dims(source.config, even_batch), **fixed}
        self._symbols = dim_symbols(multiple, is_video=source.family.is_video, even_batch=even_batch)
        self._noise = source.family.noise(source.config, specs["sample"].dtype).fixed(fixed)
        program = export_program(unet, source.family, tuple(specs.values()), self._dims, fixed, multiple, even_batch)
        self.module = module = program.module(check_guards=False)
        self._joins = find_program_joins(module)
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        self._inputs: dict[Node, str] = dict(zip(placeholders, specs, strict=True))
        (self._noise_pred,) = module.graph.output_node().all_input_nodes

    def full(self) -> BufferedProgram:
        """Return the program from all inputs to ``noise_pred`` and all features."""
        return self._part((), tuple(self.features))

    def shallow(self, cached: Sequence[str]) -> BufferedProgram:
        """Return the program that computes ``noise_pred`` from these features and the inputs that it still needs."""
        return self._part(tuple(cached), ())

    def _part(self, features_in: tuple[str, ...], features_out: tuple[str, ...]) -> BufferedProgram:
        """Return the part of the UNet that reads ``features_in`` and computes ``noise_pred`` and ``features_out``."""
        import torch

        results = [self._noise_pred, *(self._node(name) for name in features_out)]
        replaced = {self._node(name): name for name in features_in}
        needed = _needed(results, replaced)
        graph, values = torch.fx.Graph(), {}
        names = {node: name for node, name in self._inputs.items() if node in needed} | replaced
        for node, name in names.items():
            values[node] = graph.placeholder(name)
        for node in self.module.graph.nodes:
            if node in needed and node not in names:
                values[node] = graph.node_copy(node, values.__getitem__)
        graph.output(tuple(values[node] for node in results))
        if unread := [name for node, name in replaced.items() if not values[node].users]:
            raise InternalError(f"the shallow program does not read {', '.join(unread)}")
        # A GraphModule takes over only the weights that its graph reads.
        return self._export(
            torch.fx.GraphModule(self.module, graph), tuple(names.values()), (NOISE_PRED, *features_out)
        )

    def _node(self, feature: str) -> Node:
        kind, _, index = feature.rpartition("_")
        join = self._joins[int(index)]
        return {"deep_feature": join.hidden, "skip_feature": join.skip}[kind]

    def _export(self, module: GraphModule, read: tuple[str, ...], written: tuple[str, ...]) -> BufferedProgram:
        """Trace a part of the UNet to a program from the tensors ``read`` to the tensors ``written``."""
        known = {**self._specs, **self.features, NOISE_PRED: self._noise}
        spec_lists = [[known[name] for name in names] for names in (read, written)]
        examples = tuple(list(example_inputs(tuple(specs), self._dims).values()) for specs in spec_lists)
        dynamic = tuple([self._dynamic(spec) for spec in specs] for specs in spec_lists)
        return BufferedProgram(_export_with_buffers(module, examples, dynamic), read, written)

    def _dynamic(self, spec: TensorSpec) -> dict[int, object]:
        return {axis: self._symbols(dim) for axis, dim in enumerate(spec.shape) if isinstance(dim, str)}


def _export_with_buffers(
    module: torch.nn.Module, examples: tuple[Any, ...], dynamic: tuple[Any, ...]
) -> ExportedProgram:
    """Trace a module to a program that copies the module's results into the caller's buffers.

    Args:
        examples: a list of example inputs and a list of example results.
        dynamic: PyTorch's symbols for the dynamic axes of these tensors, in two lists too.
    """
    import torch

    class WithBuffers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = module  # compiled packages name their weights `part.unet.…`

        def forward(self, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> tuple[()]:
            output = self.part(*inputs)
            results = output if isinstance(output, tuple | list) else (output,)
            for buffer, result in zip(outputs, results, strict=True):
                buffer.copy_(result)
            return ()

    with torch.no_grad(), quiet():
        return torch.export.export(WithBuffers(), examples, dynamic_shapes=dynamic, strict=False)


def find_program_joins(module: GraphModule) -> list[ProgramJoin]:
    """Return the concats of the skip connections, outermost first; see ``cut.find_joins`` for the rule.

    Raises:
        CutError: the program has no skip connection.
    """
    import torch

    upstream: dict[Node, int] = {}
    count = 0
    joins: list[tuple[int, ProgramJoin]] = []
    for node in module.graph.nodes:
        bits = 0
        for value in node.all_input_nodes:
            bits |= upstream[value]
        if node.target in (
            torch.ops.aten.conv2d.default,
            torch.ops.aten.conv3d.default,
            torch.ops.aten.convolution.default,
        ):
            bits |= 1 << count
            count += 1
        upstream[node] = bits
        if (
            node.target is not torch.ops.aten.cat.default
            or len(node.args[0]) != 2
            or node.args[1:] not in ((1,), (-3,))
        ):
            continue
        first, second = node.args[0]
        if is_strict_subset(upstream[second], upstream[first]):
            joins.append((bits.bit_count(), ProgramJoin(node, first, second)))
        elif is_strict_subset(upstream[first], upstream[second]):
            joins.append((bits.bit_count(), ProgramJoin(node, second, first)))
    if not joins:
        raise CutError(
            f"no skip connection found: looked for a cat of two tensors on axis 1 among {count} convolutions; "
            "is this a UNet?"
        )
    joins.sort(key=lambda entry: -entry[0])
    return [join for _, join in joins]


def _needed(results: Sequence[Node], inputs: Mapping[Node, str]) -> set[Node]:
    """Return the nodes that must run for these results when the values of some nodes are inputs."""
    needed: set[Node] = set()
    pending = list(results)
    while pending:
        node = pending.pop()
        if node not in needed and node not in inputs:
            needed.add(node)
            pending += node.all_input_nodes
    return needed
