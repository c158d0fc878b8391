"""The ways to draw that are compared, and what each is asked for."""

from __future__ import annotations

import hashlib
import json
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
    """One way to draw.

    Attributes:
        control: whether with the ControlNet.
        interval: every so many UNet calls are full, after `warmup` that are; None where all are.
        reused: whether the ControlNet rests on shallow calls.
    """

    control: bool = True
    interval: int | None = None
    warmup: int = 2
    reused: bool = False

    @property
    def name(self) -> str:
        cached = "uncached" if self.interval is None else f"interval {self.interval}"
        suffix = ", ControlNet reused" if self.reused else "" if self.control else " without ControlNet"
        return cached + suffix

    @property
    def schedule(self) -> Schedule | None:
        """None where every call is full."""
        return None if self.interval is None else Uniform(self.interval, warmup=self.warmup)


PLAIN = ControlNetSetting(control=False)
UNCACHED = ControlNetSetting()


def ways(intervals: Sequence[int], warmup: int) -> list[ControlNetSetting]:
    """Uncached without the ControlNet and with it, then each interval with the ControlNet at every call and reused."""
    cached = [ControlNetSetting(True, interval, warmup, reused) for interval in intervals for reused in (False, True)]
    return [PLAIN, UNCACHED, *cached]


@dataclass(frozen=True)
class SceneTask:
    """What every way is asked for.

    Attributes:
        prompts: one for each picture; picture i starts from the noise of seed `seed + i`.
        silhouettes: uint8 (N, 64, 64, 3).
        drawn: the scenes themselves, likewise.
        batch: pictures of one call of the pipeline.
        identity: of all else that pictures depend on: bundle, engine and ControlNet.
    """

    prompts: tuple[str, ...]
    silhouettes: Pictures
    drawn: Pictures
    steps: int
    guidance: float
    seed: int
    batch: int
    identity: str

    def key(self, way: ControlNetSetting) -> str:
        """A short digest of what decides a way's pictures."""
        asked = hashlib.sha256(self.silhouettes.tobytes()).hexdigest()
        settings = [self.identity, self.steps, self.guidance, self.seed, self.batch, way.name, way.warmup]
        return hashlib.sha256(json.dumps([*settings, self.prompts, asked]).encode()).hexdigest()[:16]


def task(count: int, *, steps: int, guidance: float, seed: int, batch: int, identity: str) -> SceneTask:
    """`count` random scenes: one object, two, and a pair of colour and shape that was never trained, in turn.

    The prompts leave sizes and places open; only the silhouette tells them.
    """
    random = np.random.default_rng(seed)
    asked = [scenes.scene_from_caption(text, random) for text in prompts(count, 1000 + seed)]
    return SceneTask(
        prompts=tuple(silhouettes.open_caption(scene) for scene in asked),
        silhouettes=np.stack([silhouettes.silhouette(scene) for scene in asked]),
        drawn=np.stack([scenes.render(scene) for scene in asked]),
        steps=steps,
        guidance=guidance,
        seed=seed,
        batch=batch,
        identity=identity,
    )
