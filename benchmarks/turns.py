"""Timing of denoising loops in turns: a clock, marks around the UNet's calls, and the turns themselves."""

from __future__ import annotations

import gc
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ..engines.base import BoundPair, EnginePair
    from ..exporter.specs import Shape


class Clock:
    """A clock that reads CUDA events on a GPU and the host's monotonic clock elsewhere.

    Args:
        device: PyTorch's name of the device, e.g. ``cuda:1``.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._cuda = torch.device(device).type == "cuda"

    def mark(self) -> Any:
        """Return a mark at the present end of the current stream; the host does not wait."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def between(self, begin: Any, end: Any) -> float:
        """Return the seconds between two marks; the host waits for the later one."""
        if not self._cuda:
            return float(end - begin)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000

    def time(self, work: Callable[[], object]) -> float:
        """Return the seconds of some work, which starts when the device is idle."""
        if self._cuda:
            torch.cuda.synchronize(self._device)
        begin = self.mark()
        work()
        return self.between(begin, self.mark())

    def median(self, work: Callable[[], object], repeats: int, warmup: int = 3) -> float:
        """Return the median seconds of repeated work; the host waits only at the end."""
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
    """The begin and end of each full and each shallow call, recorded while ``on`` is true."""

    clock: Clock
    on: bool = False
    full: list[tuple[Any, Any]] = field(default_factory=list)
    shallow: list[tuple[Any, Any]] = field(default_factory=list)

    def around(self, call: Callable[[], None], kind: list[tuple[Any, Any]]) -> None:
        """Make a call; record its begin and end in ``kind``, which is ``full`` or ``shallow``."""
        if not self.on:
            call()
            return
        begin = self.clock.mark()
        call()
        kind.append((begin, self.clock.mark()))

    def seconds(self) -> tuple[list[float], list[float]]:
        """Return the seconds of the full calls and of the shallow calls, and delete the marks."""
        full, shallow = ([self.clock.between(*pair) for pair in kind] for kind in (self.full, self.shallow))
        self.full.clear()
        self.shallow.clear()
        return full, shallow


def mark_calls(pair: EnginePair, marks: Marks) -> None:
    """Make a pair record marks around the calls of every pair that it binds from now on."""
    prepare = pair.prepare

    def prepare_marked(shapes: Mapping[str, Shape]) -> BoundPair:
        bound = prepare(shapes)
        full, shallow = bound.full, bound.shallow
        bound.full = lambda: marks.around(full, marks.full)  # type: ignore[method-assign]
        bound.shallow = lambda cut: marks.around(partial(shallow, cut), marks.shallow)  # type: ignore[method-assign]
        return bound

    pair.prepare = prepare_marked  # type: ignore[method-assign]


class LoopRunner(ABC):
    """An engine or a peer that runs the denoising loop.

    Attributes:
        marks: marks around the calls of its UNet.
    """

    marks: Marks

    def turn(self) -> AbstractContextManager[object]:
        """Return a context for one turn; it sets up a model that several runners share."""
        return nullcontext()

    @abstractmethod
    def loop(self) -> torch.Tensor:
        """Run the denoising loop inside a turn and return the final latents [images, channels, height, width]."""


@dataclass(frozen=True)
class LoopTimes:
    """The times of one denoising loop.

    Attributes:
        seconds: duration of the whole loop.
        full, shallow: seconds of each full and each shallow call in the loop.
        latents: final latents.
    """

    seconds: float
    full: list[float]
    shallow: list[float]
    latents: torch.Tensor


def timed_loop(runner: LoopRunner) -> LoopTimes:
    """Measure one denoising loop; the runner's turn begins before the clock starts."""
    latents: list[torch.Tensor] = []
    gc.collect()
    with runner.turn():
        runner.marks.on = True
        try:
            seconds = runner.marks.clock.time(lambda: latents.append(runner.loop()))
        finally:
            runner.marks.on = False
    return LoopTimes(seconds, *runner.marks.seconds(), latents[0])


def in_turns(runners: Sequence[LoopRunner], rounds: int) -> list[list[LoopTimes]]:
    """Measure the loops of all runners in turns, A B C A B C, so that a slow moment of the machine affects all of them.

    Each runner first runs two loops that are not measured: engines choose kernels in the first loop and capture CUDA
    graphs in the first or the second.
    """
    for _ in range(2):
        for runner in runners:
            with runner.turn():
                runner.loop()
    loops: list[list[LoopTimes]] = [[] for _ in runners]
    for _ in range(rounds):
        for measured, runner in zip(loops, runners, strict=True):
            measured.append(timed_loop(runner))
    return loops
