"""Costs of cuts, counted from the graph: parameters, FLOPs, bytes of cached features, and the predicted speed-up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .cut import Cut, find_cut, find_cuts, needed_nodes
from .graph import UNetGraph, infer_shapes, read
from .specs import Shape
from .trace.export import ExportedUNet

if TYPE_CHECKING:
    import onnx_ir as ir

INTERVALS = (2, 3, 5, 10)
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class CutCost:
    """Costs of one cut.

    Attributes:
        cut: the cut.
        nodes: number of nodes of the shallow graph.
        parameters: share of the UNet's parameters that the shallow graph reads.
        flops: FLOPs of a shallow step as a share of those of a full step; convolutions, matrix products and attention.
        cache_bytes: size of the cached features in bytes.
        speed_up: speed-up of the denoising loop that the FLOPs predict, by interval N. Measured speed-ups differ.
    """

    cut: Cut
    nodes: int
    parameters: float
    flops: float
    cache_bytes: int
    speed_up: Mapping[int, float]


def measure_cuts(
    graph: ExportedUNet | UNetGraph | str | Path, dims: Mapping[str, int], intervals: Sequence[int] = INTERVALS
) -> list[CutCost]:
    """Compute the costs of every cut of a UNet's graph.

    Args:
        graph: result of ``export``, or the path of any UNet's ONNX file.
        dims: sizes to count at: ``batch``, the latent's ``height`` and ``width``, ``sequence``, for videos ``frames``.
        intervals: intervals to predict speed-ups for.
    """
    unet = graph if isinstance(graph, UNetGraph) else read(graph.path if isinstance(graph, ExportedUNet) else graph)
    shapes = infer_shapes(unet, dims)
    all_nodes = needed_nodes(unet.model, set())
    all_flops, all_parameters = _flops(all_nodes, shapes), _parameters(all_nodes)
    costs = []
    for cut in find_cuts(unet):
        nodes = needed_nodes(unet.model, {tensor.value for tensor in cut.tensors})
        flops = _flops(nodes, shapes) / all_flops
        costs.append(
            CutCost(
                cut=cut,
                nodes=len(nodes),
                parameters=_parameters(nodes) / all_parameters,
                flops=flops,
                cache_bytes=sum(math.prod(spec.resolve(dims)) * _BYTES[spec.dtype] for spec in cut.cached),
                speed_up={interval: predicted_speed_up(flops, interval) for interval in intervals},
            )
        )
    return costs


def count_flops(graph: UNetGraph | str | Path, dims: Mapping[str, int], cut: str) -> tuple[int, int]:
    """Return the FLOPs of a full and of a shallow step, two for each multiply-add, counted as in ``CutCost.flops``.

    Args:
        graph: a UNet's graph, or the path of its ONNX file.
        dims: as in ``measure_cuts``.
        cut: name or alias of one of the graph's cuts.

    Raises:
        CutError: the graph has no such cut.
    """
    unet = graph if isinstance(graph, UNetGraph) else read(graph)
    shapes = infer_shapes(unet, dims)
    cached = {tensor.value for tensor in find_cut(find_cuts(unet), cut).tensors}
    full, shallow = (_flops(needed_nodes(unet.model, values), shapes) for values in (set(), cached))
    return full, shallow


def predicted_speed_up(shallow: float, interval: int) -> float:
    """Return the speed-up with one full step in ``interval``; ``shallow`` is the relative cost of a shallow step."""
    return interval / (1 + (interval - 1) * shallow)


def _parameters(nodes: set[ir.Node]) -> int:
    weights = {value for node in nodes for value in node.inputs if value is not None and value.is_initializer()}
    return sum(math.prod(value.shape.numpy()) for value in weights if value.shape is not None)


def _flops(nodes: set[ir.Node], shapes: Mapping[str, Shape]) -> int:
    return sum(_node_flops(node, shapes) for node in nodes)


def _node_flops(node: ir.Node, shapes: Mapping[str, Shape]) -> int:
    """Return the FLOPs of a node, two for each multiply-add."""

    def shape(index: int) -> Shape:
        value = node.inputs[index]
        return shapes.get(str(value.name), ()) if value is not None else ()

    out = math.prod(shapes.get(str(node.outputs[0].name), ()))
    match node.op_type:
        case "Conv" | "ConvInteger":  # weight: [out, in / groups, *kernel]
            return 2 * out * math.prod(shape(1)[1:])
        case "QLinearConv":
            return 2 * out * math.prod(shape(3)[1:])
        case "MatMul" | "MatMulInteger" | "QLinearMatMul":
            return 2 * out * (shape(0)[-1] if shape(0) else 0)
        case "Gemm":
            by_row = node.attributes.get_int("transA", 0)
            return 2 * out * (shape(0)[0 if by_row else 1] if shape(0) else 0)
        case "Attention" if len(shape(0)) == len(shape(1)) == 4:  # query, key: [batch, heads, tokens, width]
            return 4 * math.prod(shape(0)) * shape(1)[-2]
    return 0
