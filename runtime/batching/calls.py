"""One engine call for several requests: copies rows into the buffers, runs the engines, and copies the output rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...engines.base import BoundPair, EnginePair
from ...exporter.trace.export import SAMPLE
from ..generation.features import CallPart, FeatureBuffers, split_rows
from ..profiler_ranges import ProfilerRanges
from .request import UNetCall
from .statistics import CallLog


class EngineCalls:
    """Makes the calls of a pair of engines; only one thread at a time may use it.

    Args:
        pair: the engines.
        log: records each call.
    """

    def __init__(self, pair: EnginePair, log: CallLog) -> None:
        self._cuts = pair.cuts
        self._noise_pred = next(iter(pair.outputs))
        self._log = log
        self._ranges = ProfilerRanges(pair.device)
        self._features = FeatureBuffers(in_place=False)
        self._feature_names = {name for names in pair.cuts.values() for name in names}

    def run(self, cut: str | None, calls: Sequence[UNetCall], bound: BoundPair, size: int) -> list[torch.Tensor]:
        """Make one engine call.

        Args:
            cut: cut of a shallow call; None for a full call, which also copies the features into the slots.
            calls: members of the call, all of one lane, in the order of their rows.
            bound: the engines with buffers of the lane's shapes.
            size: rows of the buffers; rows beyond those of the members are padding.

        Returns:
            The noise prediction of each member, a new tensor in the dtype of its sample.
        """
        parts = [call.part for call in calls]
        rows = sum(part.rows for part in parts)
        _write_inputs(calls, parts, bound, size)
        gathered = None if cut is None else self._features.fill(bound, parts, size, self._cuts[cut])
        with self._ranges.call(cut is None, more=False), self._log.engine_call(cut, rows, gathered):
            if cut is None:
                self._features.overwrite(bound)
                bound.full()
            else:
                bound.shallow(cut)
        if cut is None:
            self._features.record_full(bound, parts, size, self._feature_names)
        for call in calls:
            call.shared_rows = rows
        return [
            output.to(call.tensors[SAMPLE].dtype, copy=True)
            for call, output in zip(calls, split_rows(bound.buffers[self._noise_pred], parts, size), strict=True)
        ]


def _write_inputs(calls: Sequence[UNetCall], parts: Sequence[CallPart], bound: BoundPair, size: int) -> None:
    targets: list[torch.Tensor] = []
    sources: list[torch.Tensor] = []
    for name in (*calls[0].tensors, "timestep"):
        buffer = bound.buffers[name]
        tensors = [call.timestep if name == "timestep" else call.tensors[name] for call in calls]
        if name in calls[0].lane.per_row:
            targets += split_rows(buffer, parts, size)
            sources += tensors
        else:  # one tensor for all rows
            targets.append(buffer)
            sources.append(tensors[0])
    torch._foreach_copy_(targets, sources)  # on a GPU one kernel, or a few
