"""Cached features: those of each trajectory, and what the engines' buffers hold of them.

An engine writes the features of a full call into its buffers, where the next shallow call reads them. With one
trajectory nothing is copied. With several, or with a forecast, a trajectory needs copies: another call overwrites the
buffers. ``CachedFeatures`` holds the copies of one trajectory; ``FeatureBuffers`` knows whose features lie in which
buffers, and copies only where those of another trajectory or another prediction are needed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch

from ...errors import InternalError
from .forecast import Coefficients, Forecast, write

if TYPE_CHECKING:
    from ...engines.base import BoundPair

Features = Mapping[str, torch.Tensor]
"""Cached features by name, each [batch, channels, height, width] (video: [batch * frames, ...])."""


class CachedFeatures:
    """Features of the last full call of one trajectory; with a forecast also those of the full call before.

    Attributes:
        latest: copies of the features of the last full call; empty while the features lie in the engines' buffers only.
        earlier: copies of the features of the full call before; empty without a forecast.
        in_buffers: engines in whose buffers the features lie while there is no copy.
        last_full: index of the last full call; None before the first.
        earlier_full: index of the full call before, whose features are in ``earlier``; None if they are not.
        released: whether the trajectory has ended.

    Args:
        forecast: prediction of the features; None reuses them.
    """

    _numbers = itertools.count()

    def __init__(self, forecast: Forecast | None = None) -> None:
        self.latest: Features = {}
        self.earlier: Features = {}
        self.in_buffers: BoundPair | None = None
        self.last_full: int | None = None
        self.earlier_full: int | None = None
        self.released = False
        self.number = next(self._numbers)  # identifies this object in stamps
        self.forecast = forecast

    @property
    def bytes(self) -> int:
        """Size of the copies."""
        return sum(tensor.nbytes for copies in (self.latest, self.earlier) for tensor in copies.values())

    def allocate(self, bound: BoundPair, names: Iterable[str]) -> None:
        """Allocate the copies, in the shapes of the buffers; copies of these shapes stay."""
        buffers = {name: bound.buffers[name] for name in names}
        if not self.latest or any(self.latest[name].shape != buffer.shape for name, buffer in buffers.items()):
            with torch.inference_mode(False):
                self.latest = {name: torch.empty_like(buffer) for name, buffer in buffers.items()}
                self.earlier = {} if self.forecast is None else {n: torch.empty_like(b) for n, b in buffers.items()}
            self.last_full = self.last_full if self.forecast is None else None  # no earlier features in this shape

    def drop(self) -> None:
        """Forget the features, and free the copies."""
        self.latest, self.earlier, self.in_buffers = {}, {}, None
        self.last_full = self.earlier_full = None

    def release(self) -> None:
        """Forget the features, because the trajectory has ended."""
        self.drop()
        self.released = True

    def predictions(self, names: Iterable[str], call: int) -> dict[str, Coefficients]:
        """Return the coefficients for a shallow call by feature; features that the call reuses are missing."""
        if self.forecast is None or self.last_full is None:
            return {}
        by_name = {name: self.forecast.at(name, call, self.last_full, self.earlier_full) for name in names}
        return {name: coefficients for name, coefficients in by_name.items() if coefficients is not None}


@dataclass(frozen=True)
class CallPart:
    """Part of one trajectory in an engine call.

    Attributes:
        features: the trajectory's features.
        call: index of the call in the trajectory.
        rows: number of rows of the engine call that belong to the trajectory.
        half: whether the call computes the second half of the batch only, so that it reads half of the features.
    """

    features: CachedFeatures
    call: int
    rows: int
    half: bool = False


_Stamp = tuple[int, int, int, bool]
"""Origin of one trajectory's rows in a buffer: number of its features, index of the call, number of rows, half.

The call is the full call that computed the features. A predicted feature is for one call only: its stamp has -1 - call,
which never equals the index of a full call.
"""


class FeatureBuffers:
    """What the engines' buffers hold of the trajectories' features.

    Args:
        in_place: whether features stay in the buffers alone until another trajectory's call needs the buffers; see
            ``owner``. Otherwise each trajectory has copies.
    """

    def __init__(self, *, in_place: bool) -> None:
        self._in_place = in_place
        self._stamps: WeakKeyDictionary[BoundPair, dict[str, tuple[_Stamp, ...]]] = WeakKeyDictionary()
        self._owners: WeakKeyDictionary[BoundPair, CachedFeatures] = WeakKeyDictionary()

    def owner(self, bound: BoundPair) -> CachedFeatures | None:
        """Return the features that lie in these buffers and nowhere else; None if there are none."""
        owner = self._owners.get(bound)
        return owner if owner is not None and owner.in_buffers is bound else None

    def copy_out(self, bound: BoundPair, owner: CachedFeatures, names: Iterable[str]) -> None:
        """Copy features that lie in buffers only, before another call overwrites the buffers."""
        owner.allocate(bound, names)
        _copy(owner.latest.values(), [bound.buffers[name] for name in owner.latest])
        owner.in_buffers = None

    def overwrite(self, bound: BoundPair) -> None:
        """Record that a full call is about to overwrite the buffers, whether or not it will succeed."""
        self._stamps.pop(bound, None)

    def record_full(self, bound: BoundPair, parts: Sequence[CallPart], size: int, names: Iterable[str]) -> None:
        """Record that a full call, which was enqueued, wrote these trajectories' features into the buffers.

        The features are copied for each trajectory whose copies are allocated.

        Args:
            bound: engines with the buffers of the call.
            parts: parts of the trajectories, in the order of their rows.
            size: number of rows of the buffers; rows beyond those of the parts are padding.
            names: names of the cached features that the graph computes.
        """
        targets: list[torch.Tensor] = []
        sources: list[torch.Tensor] = []
        for index, part in enumerate(parts):
            features = part.features
            features.earlier_full, features.last_full = features.last_full if features.earlier else None, part.call
            if features.latest:
                if features.earlier:
                    features.latest, features.earlier = features.earlier, features.latest
                targets += features.latest.values()
                sources += [split_rows(bound.buffers[name], parts, size)[index] for name in features.latest]
            elif self._in_place and features.forecast is None:  # a prediction would overwrite the buffers
                features.in_buffers = bound
                self._owners[bound] = features
        _copy(targets, sources)
        stamps = tuple((part.features.number, part.call, part.rows, False) for part in parts)
        self._stamps[bound] = dict.fromkeys(names, stamps)

    def fill(self, bound: BoundPair, parts: Sequence[CallPart], size: int, names: Sequence[str]) -> bool:
        """Put the features for a shallow call, which is about to be enqueued, into its buffers.

        Args:
            bound, parts, size: as in ``record_full``.
            names: names of the features that the call reads.

        Returns:
            Whether anything had to be copied.
        """
        predictions = [part.features.predictions(names, part.call) for part in parts]
        stamps = self._stamps.setdefault(bound, {})
        needed = {
            name: tuple(_stamp(part, name in by_name) for part, by_name in zip(parts, predictions, strict=True))
            for name in names
        }
        names = [name for name in names if stamps.get(name) != needed[name]]
        targets: list[torch.Tensor] = []
        sources: list[torch.Tensor] = []
        for name in names:
            for part, by_name, rows in zip(
                parts, predictions, split_rows(bound.buffers[name], parts, size), strict=True
            ):
                features = part.features
                latest = _rows_of(_source(features, name), part.half)
                if name in by_name:
                    earlier = latest if features.earlier_full is None else _rows_of(features.earlier[name], part.half)
                    write(rows, latest, earlier, by_name[name])
                else:
                    targets.append(rows)
                    sources.append(latest)
        _copy(targets, sources)
        stamps |= {name: needed[name] for name in names}
        return bool(names)


def split_rows(buffer: torch.Tensor, parts: Sequence[CallPart], size: int) -> Sequence[torch.Tensor]:
    """Return each part's rows of a buffer with ``size`` rows; a row may be several entries, e.g. frames of a video."""
    if len(parts) == 1 and parts[0].rows == size:
        return [buffer]
    entries = buffer.shape[0] // size
    counts = [entries * part.rows for part in parts]
    return torch.split(buffer[: sum(counts)], counts)


def _stamp(part: CallPart, predicted: bool) -> _Stamp:
    if part.features.last_full is None:
        raise InternalError("a shallow call has no features of an earlier full call")
    call = -1 - part.call if predicted else part.features.last_full
    return (part.features.number, call, part.rows, part.half)


def _source(features: CachedFeatures, name: str) -> torch.Tensor:
    if name in features.latest:
        return features.latest[name]
    if features.in_buffers is None:
        raise InternalError(f"a shallow call needs {name}, which was not kept")
    return features.in_buffers.buffers[name]


def _rows_of(feature: torch.Tensor, half: bool) -> torch.Tensor:
    return feature.chunk(2)[1] if half else feature


def _copy(targets: Iterable[torch.Tensor], sources: Iterable[torch.Tensor]) -> None:
    """Copy each source into its target; on a GPU one kernel, or a few, make all copies."""
    targets, sources = list(targets), list(sources)
    if targets:
        torch._foreach_copy_(targets, sources)
