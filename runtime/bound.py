"""Cache of engine pairs that are bound to buffers, by the shapes of their inputs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping

import torch

from ..engines.base import BoundPair, EnginePair
from ..exporter.specs import Shape

Shapes = tuple[tuple[str, Shape], ...]


class BoundPairs(OrderedDict[Hashable, BoundPair]):
    """Cache of bound pairs that discards the least recently used one.

    Args:
        keep: number of bound pairs to keep; the least recently used one is closed first.
    """

    def __init__(self, keep: int) -> None:
        super().__init__()
        self._keep = keep

    def get_or_bind(
        self, pair: EnginePair, shapes: Mapping[str, Shape], key: Hashable = None, also: BoundPair | None = None
    ) -> BoundPair:
        """Return the pair bound to buffers of these shapes, from the cache or newly bound.

        Args:
            key: a further value that must be equal for buffers to be used again.
            also: bound pair that the same call needs, so that it is kept.

        Raises:
            ShapeError: the engines were not built for these shapes.
        """
        entry: Hashable = tuple(shapes.items()) if key is None else (key, *shapes.items())
        if entry not in self:
            for other in list(self)[: max(0, len(self) + 1 - self._keep)]:
                if self[other] is not also:
                    self.pop(other).close()
            with torch.inference_mode(False):  # else code outside inference mode could not write to the buffers
                self[entry] = pair.prepare(shapes)
        self.move_to_end(entry)
        return self[entry]

    def close(self) -> None:
        """Close all bound pairs."""
        while self:
            self.popitem()[1].close()
