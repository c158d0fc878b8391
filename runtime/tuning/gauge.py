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
        fit: images to fit corrections to.
        select: those to choose on, which nothing is fitted to.
    """

    def __init__(self, studio: Studio, watch: Watch, fit: ImageSet, select: ImageSet) -> None:
        self._studio, self._watch, self._fit, self._select = studio, watch, fit, select
        # By identity, which lasts as long as they are in here.
        self._tried: dict[int, tuple[Tuned, tuple[float, ...]]] = {}
        self._fitted: dict[int, tuple[Tuned, lockstep.Seen]] = {}

    def corrected(self, tuned: Tuned) -> Tuned:
        """With its answers corrected, where a correction is possible and helps."""
        made, seen = lockstep.fit(self._studio, self._watch, tuned, self._fit, self._select)
        if seen is not None:
            self._fitted[id(made)] = made, seen
            self._tried[id(made)] = made, seen.others
        return made

    def nearest(self, tried: Sequence[Tuned]) -> Tuned:
        """Of schedules whose corrections were fitted, that with the best images of all that it was fitted with.

        They are alike in how well they know these images, and the few to choose on tell too little.
        """

        def near(each: Tuned) -> float:
            seen = self._fitted[id(each)][1]
            return statistics.fmean([*seen.fitted, *seen.others])

        return max(tried, key=near)

    def mended(self, tuned: Tuned, corrected: Tuned) -> Tuned:
        """The corrected one if its images are surely nearer: of prompts far apart, one mends what another spoils."""
        return corrected if surely(self.near(corrected), self.near(tuned)) else tuned

    def best(self, tried: Sequence[Tuned]) -> Tuned:
        """That with the best images of those to choose on."""
        return max(tried, key=self.psnr)

    def psnr(self, tuned: Tuned) -> float:
        """Mean PSNR of the images to choose on, in dB."""
        return statistics.fmean(self.near(tuned))

    def near(self, tuned: Tuned) -> tuple[float, ...]:
        """PSNR of each image to choose on, in dB."""
        if id(tuned) not in self._tried:
            self._tried[id(tuned)] = tuned, self._studio.psnr(self._select, tuned.schedule, tuned.forecast)
        return self._tried[id(tuned)][1]


def surely(nearer: Sequence[float], than: Sequence[float]) -> bool:
    """Whether images come nearer, on average by more than the standard error of their gains.

    Args:
        nearer, than: PSNR of the same images, in dB.
    """
    gains = np.subtract(nearer, than)
    error = gains.std(ddof=1) / np.sqrt(len(gains)) if len(gains) > 1 else 0.0
    return bool(gains.mean() > error)
