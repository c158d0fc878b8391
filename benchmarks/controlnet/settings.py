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
        interval: caching interval; None makes every call full.
        warmup: number of full calls at the beginning.
        reused: whether the ControlNet is skipped on shallow calls.
    """

    control: bool = True
    interval: int | None = None
    warmup: int = 2
    reused: bool = False

    @property
    def name(self) -> str:
        """Name of the setting, unique in a run."""
        cached = "uncached" if self.interval is None else f"interval {self.interval}"
        suffix = ", ControlNet reused" if self.reused else "" if self.control else " without ControlNet"
        return cached + suffix

    @property
    def schedule(self) -> Schedule | None:
        """Schedule of the UNet; None where every call is full."""
        return None if self.interval is None else Uniform(self.interval, warmup=self.warmup)


PLAIN = ControlNetSetting(control=False)
UNCACHED = ControlNetSetting()


def compared_settings(intervals: Sequence[int], warmup: int) -> list[ControlNetSetting]:
    """Return the settings: uncached without and with the ControlNet, then each interval without and with reuse."""
    cached = [ControlNetSetting(True, interval, warmup, reused) for interval in intervals for reused in (False, True)]
    return [PLAIN, UNCACHED, *cached]


@dataclass(frozen=True)
class SceneTask:
    """The scenes that every setting generates.

    Attributes:
        prompts: one prompt for each image.
        silhouettes: the ControlNet's inputs, uint8 (N, 64, 64, 3).
        drawn: the rendered scenes, uint8 (N, 64, 64, 3).
        seed: seed of the first image; image i starts from the noise of seed `seed + i`.
        batch: number of images in one pipeline call.
    """

    prompts: tuple[str, ...]
    silhouettes: Pictures
    drawn: Pictures
    steps: int
    guidance: float
    seed: int
    batch: int


def task(count: int, *, steps: int, guidance: float, seed: int, batch: int) -> SceneTask:
    """Return a task with random scenes: of one object, two, and a colour and shape never trained together, in turns.

    The prompts state no sizes and places; only the silhouettes show them.
    """
    random = np.random.default_rng(seed)
    random_scenes = [scenes.scene_from_caption(text, random) for text in prompts(count, 1000 + seed)]
    return SceneTask(
        prompts=tuple(silhouettes.open_caption(scene) for scene in random_scenes),
        silhouettes=np.stack([silhouettes.silhouette(scene) for scene in random_scenes]),
        drawn=np.stack([scenes.render(scene) for scene in random_scenes]),
        steps=steps,
        guidance=guidance,
        seed=seed,
        batch=batch,
    )
