"""One engine call for several requests: copies rows into the buffers, runs the engines, and copies the output rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from weakref import WeakKeyDictionary

import torch

from ...engines.base import BoundPair, EnginePair
from ...errors import InternalError
from ...exporter.trace.export import SAMPLE
from ..generation.forecast import Coefficients, write
from ..profiler_ranges import ProfilerRanges
from .pool import Slot, earlier_name
from .request import UNetCall
from .statistics import CallLog

_Stamp = tuple[int, int, int]
"""Origin of the rows of one request in a feature buffer: the request's key, index of its full call, number of rows."""

_Predictions = Mapping[str, Coefficients]
"""Coefficients by which a shallow call predicts features, by feature; features that the call reuses are missing."""


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
        self._stamps: WeakKeyDictionary[BoundPair, dict[str, tuple[_Stamp, ...]]] = WeakKeyDictionary()

    def run(self, cut: str | None, calls: Sequence[UNetCall], bound: BoundPair, size: int) -> list[torch.Tensor]:
        """Make one engine call.

        Args:
            cut: cut of a shallow call; None for a full call, which also copies each request's features into its slot.
            calls: members of the call, all of one lane, in the order of their rows.
            bound: the engines with buffers of the lane's shapes.
            size: rows of the buffers; rows beyond those of the members are padding.

        Returns:
            The noise prediction of each member, a new tensor in the dtype of its sample.
        """
        rows = sum(call.rows for call in calls)
        _write_inputs(calls, bound, size)
        stamps = self._stamps.setdefault(bound, {})
        gathered = None
        if cut is not None:
            names = self._cuts[cut]
            predictions = [_predictions(call, names) for call in calls]
            needed_stamps = tuple(
                # A predicted feature is read by one call only. Its negative key never equals the index of a full call.
                (call.request.key, -1 - call.number if predicted else call.request.last_full, call.rows)
                for call, predicted in zip(calls, predictions, strict=True)
            )
            gathered = any(stamps.get(name) != needed_stamps for name in names)
            if gathered:  # otherwise the last call of the same requests left the features in place
                parts = {name: _split_rows(bound.buffers[name], calls, size) for name in names}
                _gather(parts, calls)
                _predict(parts, calls, predictions)
                stamps |= dict.fromkeys(names, needed_stamps)
        with self._ranges.call(cut is None, more=False), self._log.engine_call(cut, rows, gathered):
            if cut is None:
                bound.full()
            else:
                bound.shallow(cut)
        if cut is None:
            _scatter(calls, bound, size)
            for call in calls:
                request = call.request
                request.earlier_full = request.last_full if request.last_full >= 0 else None
                request.last_full = call.number
            new_stamps = tuple((call.request.key, call.number, call.rows) for call in calls)
            stamps |= {name: new_stamps for names in self._cuts.values() for name in names}
        noise_pred = bound.buffers[self._noise_pred]
        for call in calls:
            call.shared_rows = rows
        return [
            part.to(call.tensors[SAMPLE].dtype, copy=True)
            for call, part in zip(calls, _split_rows(noise_pred, calls, size), strict=True)
        ]


def _predictions(call: UNetCall, names: Sequence[str]) -> _Predictions:
    request = call.request
    if request.forecast is None:
        return {}
    by_name = {name: request.forecast.at(name, call.number, request.last_full, request.earlier_full) for name in names}
    return {name: coefficients for name, coefficients in by_name.items() if coefficients is not None}


def _write_inputs(calls: Sequence[UNetCall], bound: BoundPair, size: int) -> None:
    targets: list[torch.Tensor] = []
    sources: list[torch.Tensor] = []
    for name in (*calls[0].tensors, "timestep"):
        buffer = bound.buffers[name]
        tensors = [call.timestep if name == "timestep" else call.tensors[name] for call in calls]
        if name in calls[0].lane.per_row:
            targets += _split_rows(buffer, calls, size)
            sources += tensors
        else:  # one tensor for all rows
            targets.append(buffer)
            sources.append(tensors[0])
    _copy(targets, sources)


def _scatter(calls: Sequence[UNetCall], bound: BoundPair, size: int) -> None:
    """Copy the features of a full call into the slots. With a forecast, slots also keep those of the call before."""
    new_features = [
        (_slot(call).features, name, part)
        for name in dict.fromkeys(name for call in calls for name in call.layout or () if name in bound.buffers)
        for call, part in zip(calls, _split_rows(bound.buffers[name], calls, size), strict=True)
        if call.layout and name in call.layout
    ]
    earlier = [(slot[earlier_name(name)], slot[name]) for slot, name, _ in new_features if earlier_name(name) in slot]
    _copy([target for target, _ in earlier], [source for _, source in earlier])
    _copy([slot[name] for slot, name, _ in new_features], [part for _, _, part in new_features])


def _gather(parts: Mapping[str, Sequence[torch.Tensor]], calls: Sequence[UNetCall]) -> None:
    """Copy the features of the requests from their slots into the buffers of a shallow call."""
    _copy(
        [part for feature_parts in parts.values() for part in feature_parts],
        [_slot(call).features[name] for name in parts for call in calls],
    )


def _predict(
    parts: Mapping[str, Sequence[torch.Tensor]], calls: Sequence[UNetCall], predictions: Sequence[_Predictions]
) -> None:
    """Replace the gathered features by predictions, for the requests that have a forecast."""
    for index, (call, by_name) in enumerate(zip(calls, predictions, strict=True)):
        for name, coefficients in by_name.items():
            slot = _slot(call).features
            earlier = slot[name] if call.request.earlier_full is None else slot[earlier_name(name)]
            write(parts[name][index], slot[name], earlier, coefficients)


def _slot(call: UNetCall) -> Slot:
    if call.request.slot is None:
        raise InternalError(f"request {call.request.key} has no slot for its cached features")
    return call.request.slot


def _split_rows(buffer: torch.Tensor, calls: Sequence[UNetCall], size: int) -> Sequence[torch.Tensor]:
    """Return each call's part of a buffer with ``size`` rows; a row may be several entries, e.g. frames of a video."""
    entries = buffer.shape[0] // size
    counts = [entries * call.rows for call in calls]
    return torch.split(buffer[: sum(counts)], counts)


def _copy(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy each source into its target; on a GPU one kernel, or a few, make all copies."""
    if targets:
        torch._foreach_copy_(list(targets), list(sources))
