"""Lanes: groups of requests that can share an engine call, and the buffers for these calls."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ...engines.base import BoundPair, EnginePair
from ...errors import ShapeError
from ...exporter.specs import Shape, solve
from ...exporter.trace.export import SAMPLE
from ..bound import BoundPairs
from ..inputs import has_rows, timestep_shape
from .pool import FeatureSpec, Layout

_MAX_PADDING = 32
"""Largest number of padding rows of a call; engines that take certain batch sizes only need padding."""


@dataclass(eq=False)
class Lane:
    """Requests whose inputs have the same shapes except for the number of rows.

    Attributes:
        number: identifies the lane for policies.
        exclusive: whether a call serves one request only, because its rows depend on one another or share an input
            such as the timestep.
        per_row: for each input, the number of entries of its first dimension that belong to a row; inputs that all rows
            share are missing.
        rest: for each input, its shape after the first dimension; the whole shape if all rows share the input.
        fixed_batch: the only batch size that the engines take; None if they take several.
        max_rows: largest number of rows of a call, as far as is known; a request with more rows runs alone.
        refused: batch sizes that the engines do not take, with the reason.
    """

    number: int
    exclusive: bool
    per_row: Mapping[str, int]
    rest: Mapping[str, Shape]
    fixed_batch: int | None
    max_rows: int
    refused: dict[int, ShapeError] = field(default_factory=dict)

    def shapes(self, rows: int) -> dict[str, Shape]:
        """Return the shape of every input of a call with this number of rows."""
        return {
            name: (self.per_row[name] * rows, *rest) if name in self.per_row else rest
            for name, rest in self.rest.items()
        }


class Lanes:
    """All lanes of a pair of engines.

    Args:
        pair: the engines.
        exclusive: whether every request needs calls of its own, because its rows depend on one another.
        max_batch: largest batch size of an engine call; the batch sizes that the engines take are found by trying.
        batch_sizes: batch sizes to pad calls to; None for any.
        max_bound: largest number of sets of input shapes for which buffers are kept.
    """

    def __init__(
        self,
        pair: EnginePair,
        *,
        exclusive: bool,
        max_batch: int,
        batch_sizes: Sequence[int] | None,
        max_bound: int,
    ) -> None:
        self._pair = pair
        self._exclusive = exclusive
        self._max_batch = max_batch
        self._batch_sizes = tuple(sorted(batch_sizes)) if batch_sizes else None
        self._lanes: dict[Hashable, Lane] = {}
        self._numbers = itertools.count()
        self._bound = BoundPairs(max_bound)
        batch = pair.inputs[SAMPLE].shape[0]
        self._fixed_batch = batch if isinstance(batch, int) else None

    def lane_for(self, tensors: Mapping[str, torch.Tensor]) -> Lane:
        """Return the lane of a request with these inputs (without the timestep).

        Raises:
            ShapeError: the engines do not take these shapes.
        """
        rows = tensors[SAMPLE].shape[0]
        size = self._fixed_batch or rows
        specs = self._pair.inputs
        sample = (size, *tensors[SAMPLE].shape[1:])
        per_row, rest = {}, {}
        for name, spec in specs.items():
            if name in tensors:
                shape, batch = tuple(tensors[name].shape), rows
            elif name == "timestep":
                shape, batch = timestep_shape(specs, size), size
            else:  # residuals of an adapter that the pipeline did not pass
                shape, batch = spec.resolve(solve({SAMPLE: specs[SAMPLE]}, {SAMPLE: sample})), size
            if has_rows(spec, specs):
                per_row[name], rest[name] = shape[0] // batch, shape[1:]
            else:
                rest[name] = shape
        # Inputs that all rows of a call share must be the same for all its members.
        shared = tuple(tuple(tensors[name].flatten().tolist()) for name in tensors if name not in per_row)
        key = (tuple(rest.items()), tuple(per_row.items()), tuple(tensors), shared)
        if key not in self._lanes:
            outputs = self._pair.outputs.values()
            exclusive = (
                self._exclusive or "timestep" not in per_row or not all(has_rows(spec, specs) for spec in outputs)
            )
            max_rows = self._fixed_batch or self._max_batch
            lane = Lane(next(self._numbers), exclusive, per_row, rest, self._fixed_batch, max_rows)
            solve(specs, lane.shapes(size))
            self._lanes[key] = lane
        return self._lanes[key]

    def layout(self, lane: Lane, features: Sequence[str], rows: int, *, keep_earlier: bool = False) -> Layout:
        """Return the features that a trajectory keeps for its shallow calls.

        Args:
            features: names of the features that the shallow calls read.
            rows: number of rows of the request.
            keep_earlier: keep the features of the last two full calls, as a forecast needs, not only of the last one.
        """
        size = self._fixed_batch or rows
        dims = solve(self._pair.inputs, lane.shapes(size))
        specs = {}
        for name in features:
            spec = self._pair.outputs[name]
            first, *others = spec.resolve(dims)
            specs[name] = FeatureSpec((first // size * rows, *others), spec.torch_dtype())
        return Layout(specs, 2 if keep_earlier else 1)

    def bind(self, lane: Lane, rows: int) -> tuple[BoundPair, int]:
        """Return engines bound to buffers for at least this number of rows, and the number of rows of the buffers.

        Raises:
            ShapeError: the engines take neither this batch size nor a larger one to pad to.
        """
        for size in self._sizes_to_try(lane, rows):
            if size in lane.refused:
                continue
            try:
                return self._bound.get_or_bind(self._pair, lane.shapes(size), lane.number), size
            except ShapeError as error:
                lane.refused[size] = error
        raise lane.refused.get(rows) or next(iter(lane.refused.values()))

    def close(self) -> None:
        """Free all buffers."""
        self._bound.close()

    def _sizes_to_try(self, lane: Lane, rows: int) -> Iterator[int]:
        if lane.fixed_batch is not None:
            if rows > lane.fixed_batch:
                lane.refused[rows] = ShapeError(
                    f"these engines take {lane.fixed_batch} rows a call, and this call has {rows}"
                )
            else:
                yield lane.fixed_batch
            return
        sizes = [size for size in self._batch_sizes or () if size >= rows]
        yield from sizes or [rows]
        yield from range(rows, min(self._max_batch, rows + _MAX_PADDING) + 1)
