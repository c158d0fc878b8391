"""Settings that ``offcut bench controlnet`` compares, and the scenes that each of them generates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...runtime.generation.schedule import Schedule, Uniform
from ..quality.metrics import Pictures
from ..quality.pictures import prompts
from ..shapes import scenes, silhouettes

CUT = "deepcache:0"


@dataclass(frozen=True)
class ControlNetSetting:
    """One way to generate the scenes.

    Attributes:
        control: whether the pipeline has the ControlNet.
        interval: one call in so many is full, after `warmup` full ones; None where every call is full.
        reused: whether the ControlNet is skipped on shallow calls.
    """

    control: bool = True
    interval: int | None = None
    warmup: int = 2
    reused: bool = False

    @property
    def name(self) -> str:
        """Unique in a run."""
        cached = "uncached" if self.interval is None else f"interval {self.interval}"
        suffix = ", ControlNet reused" if self.reused else "" if self.control else " without ControlNet"
        return cached + suffix

    @property
    def schedule(self) -> Schedule | None:
        """None where every call is full."""
        return None if self.interval is None else Uniform(self.interval, warmup=self.warmup)


PLAIN = ControlNetSetting(control=False)
UNCACHED = ControlNetSetting()


def compared_settings(intervals: Sequence[int], warmup: int) -> list[ControlNetSetting]:
    """Return uncached without and with the ControlNet, then each interval with the ControlNet always and reused."""
    cached = [ControlNetSetting(True, interval, warmup, reused) for interval in intervals for reused in (False, True)]
    return [PLAIN, UNCACHED, *cached]


@dataclass(frozen=True)
class SceneTask:
    """The scenes that every setting generates.

    Attributes:
        prompts: one for each image; image i starts from the noise of seed `seed + i`.
        silhouettes: uint8 (N, 64, 64, 3).
        drawn: the rendered scenes, likewise.
        batch: images of one call of the pipeline.
    """

    prompts: tuple[str, ...]
    silhouettes: Pictures
    drawn: Pictures
    steps: int
    guidance: float
    seed: int
    batch: int


def task(count: int, *, steps: int, guidance: float, seed: int, batch: int) -> SceneTask:
    """Return random scenes: one object, two, and a pair of colour and shape that was never trained, in turn.

    The prompts leave sizes and places open; only the silhouette gives them.
    """
    random = np.random.default_rng(seed)
    specified = [scenes.scene_from_caption(text, random) for text in prompts(count, 1000 + seed)]
    return SceneTask(
        prompts=tuple(silhouettes.open_caption(scene) for scene in specified),
        silhouettes=np.stack([silhouettes.silhouette(scene) for scene in specified]),
        drawn=np.stack([scenes.render(scene) for scene in specified]),
        steps=steps,
        guidance=guidance,
        seed=seed,
        batch=batch,
    )
