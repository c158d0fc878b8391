"""One engine call for several requests: their rows in, the engines, their rows out; all of it on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from weakref import WeakKeyDictionary

import torch

from ...engines.base import BoundPair, EnginePair
from ...errors import InternalError
from ...exporter.trace.export import SAMPLE
from ..generation.forecast import Coefficients, write
from ..profiler_ranges import ProfilerRanges
from .pool import Slot, before
from .request import Call
from .ticks import TickLog

Stamp = tuple[int, int, int]
"""Whose features lie in some rows of a buffer: the request's key, the number of its full step, how many rows."""


class EngineCalls:
    """Makes the calls of a pair of engines. One thread at a time.

    Args:
        pair: the engines.
        log: is told of each call.
    """

    def __init__(self, pair: EnginePair, log: TickLog) -> None:
        self._cuts = pair.cuts
        self._noise_pred = next(iter(pair.outputs))
        self._log = log
        self._ranges = ProfilerRanges(pair.device)
        self._held: WeakKeyDictionary[BoundPair, dict[str, tuple[Stamp, ...]]] = WeakKeyDictionary()

    def make(self, cut: str | None, calls: Sequence[Call], bound: BoundPair, size: int) -> list[torch.Tensor]:
        """One engine call.

        Args:
            cut: None for a full call, after which each request's slot has its features.
            calls: of one lane, in the order of their rows.
            bound: the engines with buffers of the lane's shapes.
            size: rows of the buffers; those behind the calls' own are padding.

        Returns:
            Each call's noise prediction, in its sample's dtype and memory of its own.
        """
        rows = sum(call.rows for call in calls)
        _write_inputs(calls, bound, size)
        held = self._held.setdefault(bound, {})
        gathered = None
        if cut is not None:
            names = self._cuts[cut]
            foreseen = [_foreseen(call, names) for call in calls]
            wanted = tuple(
                # A prediction is of one call, and no full step has a negative number.
                (call.request.key, -1 - call.number if made else call.request.written, call.rows)
                for call, made in zip(calls, foreseen, strict=True)
            )
            gathered = any(held.get(name) != wanted for name in names)
            if gathered:  # else they are still where the last call of the same requests left them
                parts = {name: _parts(bound.buffers[name], calls, size) for name in names}
                _gather(parts, calls)
                _predict(parts, calls, foreseen)
                held |= dict.fromkeys(names, wanted)
        with self._ranges.call(cut is None, more=False), self._log.call(calls[0].lane, cut, size, rows, gathered):
            if cut is None:
                bound.full()
            else:
                bound.shallow(cut)
        if cut is None:
            _scatter(calls, bound, size)
            for call in calls:
                request = call.request
                request.before = request.written if request.written >= 0 else None
                request.written = call.number
            stamps = tuple((call.request.key, call.number, call.rows) for call in calls)
            held |= {name: stamps for names in self._cuts.values() for name in names}
        noise_pred = bound.buffers[self._noise_pred]
        for call in calls:
            call.shared = rows
        return [
            part.to(call.tensors[SAMPLE].dtype, copy=True)
            for call, part in zip(calls, _parts(noise_pred, calls, size), strict=True)
        ]


_Foreseen = Mapping[str, Coefficients]
"""How a shallow call predicts each feature; one that it reuses is not there."""


def _foreseen(call: Call, names: Sequence[str]) -> _Foreseen:
    request = call.request
    if request.forecast is None:
        return {}
    made = {name: request.forecast.at(name, call.number, request.written, request.before) for name in names}
    return {name: coefficients for name, coefficients in made.items() if coefficients is not None}


def _write_inputs(calls: Sequence[Call], bound: BoundPair, size: int) -> None:
    targets: list[torch.Tensor] = []
    sources: list[torch.Tensor] = []
    for name in (*calls[0].tensors, "timestep"):
        buffer = bound.buffers[name]
        given = [call.timestep if name == "timestep" else call.tensors[name] for call in calls]
        if name in calls[0].lane.per_row:
            targets += _parts(buffer, calls, size)
            sources += given
        else:  # the same for all
            targets.append(buffer)
            sources.append(given[0])
    _copy(targets, sources)


def _scatter(calls: Sequence[Call], bound: BoundPair, size: int) -> None:
    """The features of a full call, into the slots of those who will need them; what was there goes back by one."""
    kept = [
        (_slot(call).features, name, part)
        for name in dict.fromkeys(name for call in calls for name in call.layout or () if name in bound.buffers)
        for call, part in zip(calls, _parts(bound.buffers[name], calls, size), strict=True)
        if call.layout and name in call.layout
    ]
    older = [(slot[before(name)], slot[name]) for slot, name, _ in kept if before(name) in slot]
    _copy([target for target, _ in older], [source for _, source in older])
    _copy([slot[name] for slot, name, _ in kept], [fresh for _, _, fresh in kept])


def _gather(parts: Mapping[str, Sequence[torch.Tensor]], calls: Sequence[Call]) -> None:
    """The features of these requests, from their slots into the buffers of a shallow call."""
    _copy(
        [part for each in parts.values() for part in each],
        [_slot(call).features[name] for name in parts for call in calls],
    )


def _predict(parts: Mapping[str, Sequence[torch.Tensor]], calls: Sequence[Call], foreseen: Sequence[_Foreseen]) -> None:
    """Over the features as they were, those of requests with a forecast."""
    for place, (call, made) in enumerate(zip(calls, foreseen, strict=True)):
        for name, coefficients in made.items():
            slot = _slot(call).features
            earlier = slot[name] if call.request.before is None else slot[before(name)]
            write(parts[name][place], slot[name], earlier, coefficients)


def _slot(call: Call) -> Slot:
    if call.request.slot is None:
        raise InternalError(f"request {call.request.key} has no slot for its cached features")
    return call.request.slot


def _parts(buffer: torch.Tensor, calls: Sequence[Call], size: int) -> Sequence[torch.Tensor]:
    """Each call's rows of a buffer with ``size`` rows; each may be several entries, e.g. the frames of a video."""
    per = buffer.shape[0] // size
    counts = [per * call.rows for call in calls]
    return torch.split(buffer[: sum(counts)], counts)


def _copy(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """On a GPU this is one kernel, or a few, for all."""
    if targets:
        torch._foreach_copy_(list(targets), list(sources))
