"""Buffers: device memory that both graphs of a pair read and write directly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ..errors import BundleError
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


def check_buffer(name: str, buffer: torch.Tensor, shape: Sequence[object], dtype: str) -> None:
    """Check that a buffer, which the manifest describes, fits the loaded graph.

    Args:
        shape: shape in the graph; sizes that are no integers are free.
        dtype: dtype in the graph, as in the manifest.

    Raises:
        BundleError: it does not.
    """
    buffer_dtype = str(buffer.dtype).removeprefix("torch.")
    fixed = [(dim, size) for dim, size in zip(shape, buffer.shape, strict=False) if isinstance(dim, int)]
    if len(shape) != buffer.dim() or any(dim != size for dim, size in fixed):
        raise BundleError(
            f"{name} has the shape {list(buffer.shape)} by the manifest, but {list(shape)} in the graph: the bundle "
            "was altered; build or copy it again"
        )
    if dtype != buffer_dtype:
        raise BundleError(
            f"{name} is {buffer_dtype} by the manifest, but {dtype} in the graph: the bundle was altered; build or "
            "copy it again"
        )
