"""The pairs that are bound to buffers now, by the shapes of their inputs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping

import torch

from ..engines.base import BoundPair, EnginePair
from ..exporter.specs import Shape

Shapes = tuple[tuple[str, Shape], ...]


class BoundPairs(OrderedDict[Hashable, BoundPair]):
    """Those of the shapes that were used last.

    Args:
        keep: how many; the one unused for longest is closed first.
    """

    def __init__(self, keep: int) -> None:
        super().__init__()
        self._keep = keep

    def get_or_bind(self, pair: EnginePair, shapes: Mapping[str, Shape], apart: Hashable = None) -> BoundPair:
        """The pair bound to buffers of these shapes: those of an earlier call, unless they are new.

        Args:
            apart: what else must have been the same in the earlier call.

        Raises:
            ShapeError: the shapes are outside what was built.
        """
        key: Hashable = tuple(shapes.items()) if apart is None else (apart, *shapes.items())
        if key not in self:
            while len(self) >= self._keep:
                self.popitem(last=False)[1].close()
            with torch.inference_mode(False):  # else nobody outside inference mode could write to the buffers
                self[key] = pair.prepare(shapes)
        self.move_to_end(key)
        return self[key]

    def close(self) -> None:
        """Close them all."""
        while self:
            self.popitem()[1].close()
