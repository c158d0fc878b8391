"""Shape profiles: the ranges of sizes that an engine was compiled for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import ShapeError

Dims = Mapping[str, int]


@dataclass(frozen=True)
class Profile:
    """One range of sizes, inclusive, and the size within it that the engine is tuned for.

    Attributes:
        min, opt, max: each dynamic dimension's size; ``height`` and ``width`` are the latent's.
    """

    min: Dims
    opt: Dims
    max: Dims

    def covers(self, dims: Dims) -> bool:
        return all(self.min[name] <= dims[name] <= self.max[name] for name in self.min)

    def nearest(self, dims: Dims) -> dict[str, int]:
        """The covered sizes that are closest to these."""
        return {name: min(max(dims[name], self.min[name]), self.max[name]) for name in self.min}

    def span(self) -> int:
        """How many sizes it covers: a static profile, which covers one, is the fastest for it."""
        sizes = 1
        for name in self.min:
            sizes *= self.max[name] - self.min[name] + 1
        return sizes


def select(profiles: Sequence[Profile], dims: Dims) -> int:
    """The profile for these sizes: the narrowest that covers them; among equals the one tuned for the nearest size.

    Raises:
        ShapeError: none covers them; the message names the nearest sizes that one does.
    """
    fitting = [index for index, profile in enumerate(profiles) if profile.covers(dims)]
    if fitting:
        return min(fitting, key=lambda index: (profiles[index].span(), _distance(profiles[index].opt, dims), index))
    nearest = min((profile.nearest(dims) for profile in profiles), key=lambda sizes: _distance(sizes, dims))
    asked, valid = (", ".join(f"{name} {sizes[name]}" for name in nearest) for sizes in (dims, nearest))
    raise ShapeError(
        f"no profile of this engine covers {asked}; the nearest that one does: {valid} "
        "(build with other shapes for more)"
    )


def _distance(sizes: Dims, dims: Dims) -> float:
    """How far apart two sets of sizes are, each dimension as a ratio."""
    return sum(max(sizes[name], dims[name]) / min(sizes[name], dims[name]) - 1 for name in sizes)
