"""Buffers: device memory that both graphs of a pair read and write directly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from ..exporter.specs import Shape, TensorSpec, solve

if TYPE_CHECKING:
    import torch

    from .base import Graphs


def allocate(specs: Iterable[TensorSpec], dims: Mapping[str, int], device: torch.device) -> dict[str, torch.Tensor]:
    """Return one zeroed, contiguous tensor for each spec at these dimensions, by name."""
    import torch

    return {spec.name: torch.zeros(spec.resolve(dims), dtype=spec.torch_dtype(), device=device) for spec in specs}


def allocate_pair(
    graphs: Graphs, shapes: Mapping[str, Shape], device: torch.device
) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Return the buffers of a pair for these input shapes, and the dimensions that follow from the shapes.

    Raises:
        ShapeError: the shapes do not fit the graphs.
    """
    dims = solve(graphs.inputs, shapes, graphs.multiple)
    return allocate((*graphs.inputs.values(), *graphs.outputs.values()), dims, device), dims
