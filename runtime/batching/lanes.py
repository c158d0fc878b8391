"""Which requests can share an engine call, and the buffers that they share it in."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ...engines.base import BoundPair, EnginePair
from ...errors import ShapeError
from ...exporter.ip_adapter import SCALE
from ...exporter.specs import Shape, TensorSpec, factors, solve
from ...exporter.trace.export import SAMPLE
from ..bound import BoundPairs
from ..inputs import timestep_shape
from .pool import FeatureSpec, Layout, before
from .times import StepTimes

_PADDING = 32
"""Rows that are tried, one more at a time, to pad a call that the engines take in certain sizes only."""


@dataclass(eq=False)
class Lane:
    """Requests whose inputs have the same shapes but for the number of rows.

    Attributes:
        number: by which policies know it.
        alone: a call serves one request: its rows depend on one another, or share an input such as a single timestep.
        per_row: how many entries of each input's first dimension belong to a row; an input that all rows share is not
            in it.
        rest: the shape of each input behind the first dimension, or the whole shape of one that all rows share.
        fixed: the only number of rows that the engines take; None if there are several.
        limit: the most rows of a call, as far as is known; a request with more runs alone.
        measured: seconds of calls of each kind (None is full) by their number of rows.
    """

    number: int
    alone: bool
    per_row: Mapping[str, int]
    rest: Mapping[str, Shape]
    fixed: int | None
    limit: int
    measured: dict[str | None, dict[int, float]] = field(default_factory=dict)
    refused: dict[int, ShapeError] = field(default_factory=dict)

    @property
    def times(self) -> StepTimes:
        return StepTimes(self.measured)

    def shapes(self, rows: int) -> dict[str, Shape]:
        """Of every input in a call with so many rows."""
        return {
            name: (self.per_row[name] * rows, *rest) if name in self.per_row else rest
            for name, rest in self.rest.items()
        }

    def took(self, cut: str | None, rows: int, seconds: float) -> None:
        """Remember the time of a call. The first of its kind, which may have compiled something, counts little."""
        table = self.measured.setdefault(cut, {})
        table[rows] = min(seconds, table[rows]) if rows in table else seconds


class Lanes:
    """All lanes of a pair of engines.

    Args:
        pair: the engines.
        alone: whether every request needs calls of its own, since its rows depend on one another.
        max_batch: the most rows of an engine call; what the engines take of them is found out by trying.
        batch_sizes: the numbers of rows that calls are padded to; None for any.
        keep: for how many sets of shapes buffers are kept.
    """

    def __init__(
        self,
        pair: EnginePair,
        *,
        alone: bool,
        max_batch: int,
        batch_sizes: Sequence[int] | None,
        keep: int,
    ) -> None:
        self._pair = pair
        self._alone = alone
        self._max_batch = max_batch
        self._sizes = tuple(sorted(batch_sizes)) if batch_sizes else None
        self._lanes: dict[Hashable, Lane] = {}
        self._numbers = itertools.count()
        self._bound = BoundPairs(keep)
        batch = pair.inputs[SAMPLE].shape[0]
        self._symbol = batch if isinstance(batch, str) else None
        self._fixed = batch if isinstance(batch, int) else None

    def of(self, tensors: Mapping[str, torch.Tensor]) -> Lane:
        """The lane of a request that passes these inputs, the timestep beside.

        Raises:
            ShapeError: the engines take no such shapes.
        """
        rows = tensors[SAMPLE].shape[0]
        size = self._fixed or rows
        specs = self._pair.inputs
        sample = (size, *tensors[SAMPLE].shape[1:])
        per_row, rest = {}, {}
        for name, spec in specs.items():
            if name in tensors:
                shape, in_shape = tuple(tensors[name].shape), rows
            elif name == "timestep":
                shape, in_shape = timestep_shape(specs, size), size
            else:  # residuals that nobody passed
                shape, in_shape = spec.resolve(solve({SAMPLE: specs[SAMPLE]}, {SAMPLE: sample})), size
            if self._has_rows(spec):
                per_row[name], rest[name] = shape[0] // in_shape, shape[1:]
            else:
                rest[name] = shape
        # Inputs that all rows of a call share must be the same for all its members.
        shared = tuple(tuple(tensors[name].flatten().tolist()) for name in tensors if name not in per_row)
        key = (tuple(rest.items()), tuple(per_row.items()), tuple(tensors), shared)
        if key not in self._lanes:
            outputs = self._pair.outputs.values()
            alone = self._alone or "timestep" not in per_row or not all(self._has_rows(spec) for spec in outputs)
            lane = Lane(next(self._numbers), alone, per_row, rest, self._fixed, self._fixed or self._max_batch)
            solve(specs, lane.shapes(size))
            self._lanes[key] = lane
        return self._lanes[key]

    def layout(self, lane: Lane, features: Sequence[str], rows: int, *, twice: bool = False) -> Layout:
        """What a request of so many rows keeps for its shallow steps.

        Args:
            features: the names of those that they read.
            twice: of the last two full steps, for a forecast.
        """
        size = self._fixed or rows
        dims = solve(self._pair.inputs, lane.shapes(size))
        layout = {}
        for name in features:
            spec = self._pair.outputs[name]
            first, *others = spec.resolve(dims)
            layout[name] = FeatureSpec((first // size * rows, *others), spec.torch_dtype())
        return layout | {before(name): spec for name, spec in layout.items()} if twice else layout

    def bind(self, lane: Lane, rows: int) -> tuple[BoundPair, int]:
        """Buffers for a call of at least so many rows, and how many rows they have.

        Raises:
            ShapeError: the engines take no such number, nor a larger one that could be padded to.
        """
        for size in self._candidates(lane, rows):
            if size in lane.refused:
                continue
            try:
                return self._bound.get_or_bind(self._pair, lane.shapes(size), lane.number), size
            except ShapeError as error:
                lane.refused[size] = error
        raise lane.refused.get(rows) or next(iter(lane.refused.values()))

    def close(self) -> None:
        """Give back all buffers."""
        self._bound.close()

    def _candidates(self, lane: Lane, rows: int) -> Iterator[int]:
        if lane.fixed is not None:
            if rows > lane.fixed:
                lane.refused[rows] = ShapeError(f"these engines take {lane.fixed} rows a call, and this one has {rows}")
            else:
                yield lane.fixed
            return
        sizes = [size for size in self._sizes or () if size >= rows]
        yield from sizes or [rows]
        yield from range(rows, min(self._max_batch, rows + _PADDING) + 1)

    def _has_rows(self, spec: TensorSpec) -> bool:
        """Whether each row of a batch has a part of this tensor of its own."""
        if not spec.shape or spec.name == SCALE:
            return False
        first = spec.shape[0]
        if self._symbol is not None:
            return isinstance(first, str) and self._symbol in factors(first).symbols
        assert self._fixed is not None
        return isinstance(first, int) and first % self._fixed == 0
