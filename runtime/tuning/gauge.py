"""How near schedules bring images to uncached ones, and which of several schedules is the best."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np

from . import lockstep
from .artifact import Tuned
from .images import ImageSet, Studio
from .watched import Watch


class Gauge:
    """Draws a schedule's images once, and remembers how near they came.

    Args:
        watch: of the studio's pipeline.
        fit: images that predictions are fitted to.
        select: those that nothing is fitted to but corrections, which are fitted to all: each image is then judged
            with what was fitted without it, see ``lockstep``.
    """

    def __init__(self, studio: Studio, watch: Watch, fit: ImageSet, select: ImageSet) -> None:
        self._studio, self._watch, self._fit, self._select = studio, watch, fit, select
        # By identity, which lasts as long as they are in here; of the selecting images, or of those to fit and these.
        self._tried: dict[int, tuple[Tuned, tuple[float, ...]]] = {}

    def corrected(self, tuned: Tuned) -> Tuned:
        """With its answers corrected, where a correction is possible and helps."""
        made, near = lockstep.fit(self._studio, self._watch, tuned, self._fit, self._select)
        if near is not None:
            self._tried[id(made)] = made, near
        return made

    def surely(self, nearer: Tuned, than: Tuned) -> bool:
        """Whether images come nearer with one schedule than with another by more than chance."""
        return surely(*self._near(nearer, than))

    def best(self, tried: Sequence[Tuned]) -> Tuned:
        """That with the nearest images."""
        means = [statistics.fmean(near) for near in self._near(*tried)]
        return tried[means.index(max(means))]

    def psnr(self, tuned: Tuned) -> float:
        """Mean PSNR of the images, in dB."""
        return statistics.fmean(self._near(tuned)[0])

    def _near(self, *tried: Tuned) -> list[tuple[float, ...]]:
        """PSNR, in dB, of the images that all of these were drawn with: the selecting ones, or all."""
        for tuned in tried:
            if id(tuned) not in self._tried:
                near = self._studio.psnr(self._select, tuned.schedule, tuned.forecast)
                self._tried[id(tuned)] = tuned, near
        found = [self._tried[id(tuned)][1] for tuned in tried]
        common = min(map(len, found))
        return [near[-common:] for near in found]


def surely(nearer: Sequence[float], than: Sequence[float]) -> bool:
    """Whether images come nearer, on average by more than the standard error of their gains.

    Args:
        nearer, than: PSNR of the same images, in dB.
    """
    gains = np.subtract(nearer, than)
    error = gains.std(ddof=1) / np.sqrt(len(gains)) if len(gains) > 1 else 0.0
    return bool(gains.mean() > error)
