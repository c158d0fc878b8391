"""What a cut costs and saves, counted from the graph: parameters, FLOPs, bytes of cache, predicted speed-up."""

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
    """A cut in figures.

    Attributes:
        cut: which.
        nodes: of the shallow graph.
        parameters: that the shallow graph reads, as a share of the UNet's.
        flops: of a shallow step, as a share of a full step's. Counted for convolutions, matrix products and attention.
        cache_bytes: of the cached features at the dimensions that were counted with.
        speed_up: interval N -> the speed-up of the denoising loop that the FLOPs predict. Engines differ.
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
    """Count every cut of a UNet's graph.

    Args:
        graph: what ``export`` gave, or the path of any UNet's ONNX file.
        dims: ``batch``, ``height``, ``width`` (of the latent), ``sequence`` and, of a video, ``frames`` to count at.
        intervals: to predict speed-ups for.
    """
    unet = graph if isinstance(graph, UNetGraph) else read(graph.path if isinstance(graph, ExportedUNet) else graph)
    shapes = infer_shapes(unet, dims)
    everything = needed_nodes(unet.model, set())
    all_flops, all_parameters = _flops(everything, shapes), _parameters(everything)
    costs = []
    for cut in find_cuts(unet):
        kept = needed_nodes(unet.model, {tensor.value for tensor in cut.tensors})
        flops = _flops(kept, shapes) / all_flops
        costs.append(
            CutCost(
                cut=cut,
                nodes=len(kept),
                parameters=_parameters(kept) / all_parameters,
                flops=flops,
                cache_bytes=sum(math.prod(spec.resolve(dims)) * _BYTES[spec.dtype] for spec in cut.cached),
                speed_up={interval: predicted_speed_up(flops, interval) for interval in intervals},
            )
        )
    return costs


def count_flops(graph: UNetGraph | str | Path, dims: Mapping[str, int], cut: str) -> tuple[int, int]:
    """What a full and a shallow step have to compute, two for each multiply-add; counted as ``CutCost.flops``.

    Args:
        graph: of a UNet, or its ONNX file.
        dims: as in ``measure_cuts``.
        cut: one of the graph's, by any of its names.

    Raises:
        CutError: the graph has no such cut.
    """
    unet = graph if isinstance(graph, UNetGraph) else read(graph)
    shapes = infer_shapes(unet, dims)
    cached = {tensor.value for tensor in find_cut(find_cuts(unet), cut).tensors}
    full, shallow = (_flops(needed_nodes(unet.model, values), shapes) for values in (set(), cached))
    return full, shallow


def predicted_speed_up(shallow: float, interval: int) -> float:
    """Of a loop with one full step in ``interval``, where a shallow step costs this share of a full one."""
    return interval / (1 + (interval - 1) * shallow)


def _parameters(nodes: set[ir.Node]) -> int:
    weights = {value for node in nodes for value in node.inputs if value is not None and value.is_initializer()}
    return sum(math.prod(value.shape.numpy()) for value in weights if value.shape is not None)


def _flops(nodes: set[ir.Node], shapes: Mapping[str, Shape]) -> int:
    return sum(_node_flops(node, shapes) for node in nodes)


def _node_flops(node: ir.Node, shapes: Mapping[str, Shape]) -> int:
    """Two for each multiply-add."""

    def shape(index: int) -> Shape:
        value = node.inputs[index]
        return shapes.get(str(value.name), ()) if value is not None else ()

    out = math.prod(shapes.get(str(node.outputs[0].name), ()))
    match node.op_type:
        case "Conv":  # weight: [out, in / groups, *kernel]
            return 2 * out * math.prod(shape(1)[1:])
        case "MatMul":
            return 2 * out * (shape(0)[-1] if shape(0) else 0)
        case "Gemm":
            by_row = node.attributes.get_int("transA", 0)
            return 2 * out * (shape(0)[0 if by_row else 1] if shape(0) else 0)
        case "Attention" if len(shape(0)) == 4:  # query, key: [batch, heads, tokens, width]
            return 4 * math.prod(shape(0)) * shape(1)[-2]
    return 0
