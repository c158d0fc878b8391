"""Contestants take turns at the denoising loop, the engine's calls marked if asked."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from ..latency.clock import Clock, Marks
from .peers import Denoiser
from .trajectory import Loop


def warm_up(loop: Loop, denoisers: Sequence[Denoiser]) -> None:
    """Two loops of each: engines choose kernels in the first, and record CUDA graphs in it or in the second."""
    for _ in range(2):
        for denoiser in denoisers:
            loop.generate(denoiser)


def interleaved(clock: Clock, loop: Loop, denoisers: Sequence[Denoiser], rounds: int) -> list[float]:
    """Median seconds of one denoising loop of each contestant, in turns: A B C, A B C."""
    seconds: list[list[float]] = [[] for _ in denoisers]
    for _ in range(rounds):
        for times, denoiser in zip(seconds, denoisers, strict=True):
            with denoiser.generation(loop.timesteps):
                times.append(clock.time(partial(loop.run, denoiser)))
    return [statistics.median(times) for times in seconds]


class MarkedDenoiser:
    """A denoiser whose engine's calls are marked; see ``peers.Denoiser``."""

    def __init__(self, denoiser: Denoiser, marks: Marks) -> None:
        self.name = denoiser.name
        self.predict = denoiser.predict
        self._denoiser, self._marks = denoiser, marks

    @contextmanager
    def generation(self, timesteps: torch.Tensor) -> Iterator[None]:
        with self._denoiser.generation(timesteps):
            self._marks.on = True
            try:
                yield
            finally:
                self._marks.on = False
