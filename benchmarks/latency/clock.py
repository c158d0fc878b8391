"""Time: CUDA events on a GPU, the host's monotonic clock elsewhere; the marks around an engine's own calls."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ...engines.base import BoundPair, EnginePair

if TYPE_CHECKING:
    from ...exporter.specs import Shape, TensorSpec


class Clock:
    """Marks on the device's own timeline.

    Args:
        device: ``"cuda"``, or ``"cpu"``, where the host's clock is the device's.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._cuda = torch.device(device).type == "cuda"

    def mark(self) -> Any:
        """A point on the current stream's timeline; the host does not wait."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def between(self, begin: Any, end: Any) -> float:
        """Seconds from one mark to another; the host waits for the later one."""
        if not self._cuda:
            return float(end - begin)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000

    def time(self, work: Callable[[], object]) -> float:
        """Seconds of this work, begun on an idle device."""
        if self._cuda:
            torch.cuda.synchronize(self._device)
        begin = self.mark()
        work()
        return self.between(begin, self.mark())

    def median(self, work: Callable[[], object], repeats: int, warmup: int = 3) -> float:
        """Median seconds of this work back to back; the host waits only at the end."""
        for _ in range(warmup):
            work()
        marks = []
        for _ in range(repeats):
            begin = self.mark()
            work()
            marks.append((begin, self.mark()))
        return statistics.median(self.between(*pair) for pair in marks)


@dataclass
class Marks:
    """The beginning and end of each call of a pair, while it is ``on``."""

    clock: Clock
    on: bool = False
    full: list[tuple[Any, Any]] = field(default_factory=list)
    shallow: list[tuple[Any, Any]] = field(default_factory=list)

    def around(self, call: Callable[[], None], kind: list[tuple[Any, Any]]) -> None:
        """Make a call, between two marks."""
        if not self.on:
            call()
            return
        begin = self.clock.mark()
        call()
        kind.append((begin, self.clock.mark()))

    def medians(self) -> tuple[float, float]:
        """Median seconds of the full calls and of the shallow ones."""
        full, shallow = (
            statistics.median(self.clock.between(*pair) for pair in kind) for kind in (self.full, self.shallow)
        )
        return full, shallow


class TimedPair:
    """A pair whose calls can be marked; see ``base.EnginePair``."""

    def __init__(self, pair: EnginePair, marks: Marks) -> None:
        self.name = pair.name
        self.inputs: Mapping[str, TensorSpec] = pair.inputs
        self.outputs: Mapping[str, TensorSpec] = pair.outputs
        self.cuts = pair.cuts
        self.device = pair.device
        self.marks = marks
        self._pair = pair

    def prepare(self, shapes: Mapping[str, Shape]) -> BoundPair:
        return _TimedBoundPair(self._pair.prepare(shapes), self.marks)

    def refit(self, weights: Mapping[str, torch.Tensor]) -> None:
        self._pair.refit(weights)

    def close(self) -> None:
        self._pair.close()


class _TimedBoundPair:
    """See ``base.BoundPair``."""

    def __init__(self, bound: BoundPair, marks: Marks) -> None:
        self.buffers, self.dims = bound.buffers, bound.dims
        self._bound, self._marks = bound, marks

    def full(self) -> None:
        self._marks.around(self._bound.full, self._marks.full)

    def shallow(self, cut: str) -> None:
        self._marks.around(partial(self._bound.shallow, cut), self._marks.shallow)

    def close(self) -> None:
        self._bound.close()
        self.buffers = {}
