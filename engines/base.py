"""What every engine offers to the runtime: a pair of graphs that share their cached features.

The unit is the pair, because what matters is what the two graphs share: the buffers of the cached features,
and one device and stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from ..exporter.specs import Shape, TensorSpec

if TYPE_CHECKING:
    import torch


class BoundPair(Protocol):
    """A pair bound to the buffers of one set of shapes.

    One generation at a time; not thread-safe, cheap to have several. The buffers belong to the bound pair, stay
    at their address, and live until ``close``.
    """

    buffers: Mapping[str, torch.Tensor]
    """Every input, ``noise_pred`` and every cached feature by name: memory that the engine reads and writes."""

    dims: Mapping[str, int]
    """The dimensions that this pair is bound to, e.g. ``{"batch": 2, "height": 64, "width": 64, "sequence": 77}``."""

    def full(self) -> None:
        """Enqueue the full graph: reads the input buffers, writes ``noise_pred`` and the cached features."""
        ...

    def shallow(self, cut: str) -> None:
        """Enqueue the shallow graph of this cut: reads the inputs and the features, writes ``noise_pred``."""
        ...

    def close(self) -> None: ...


class EnginePair(Protocol):
    """A full graph and its shallow graphs, opened on one device."""

    name: str
    """The engine's name, e.g. ``"onnxruntime"``."""

    inputs: Mapping[str, TensorSpec]
    """The full graph's inputs; a shallow graph takes some of them and the features of its cut."""

    outputs: Mapping[str, TensorSpec]
    """``noise_pred`` first, then the cached features."""

    cuts: Mapping[str, tuple[str, ...]]
    """Each cut's name (``"deepcache:0"``) with the names of the features that its shallow graph reads."""

    device: torch.device

    def prepare(self, shapes: Mapping[str, Shape]) -> BoundPair:
        """Allocate buffers for these input shapes and bind both graphs to them.

        May be called from several threads; each call gives a pair of its own.

        Raises:
            ShapeError: the shapes are outside what was built, with the nearest valid ones.
        """
        ...

    def close(self) -> None: ...
