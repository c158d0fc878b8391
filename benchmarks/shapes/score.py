"""Counts how many prompts a pipeline obeys, by the judge: a quality figure that needs no other network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from . import judge, scenes

Draw = Callable[[Sequence[str]], Sequence[npt.NDArray[np.uint8]]]
"""Makes one uint8 picture (64, 64, 3) for every prompt."""


KINDS = ("one object", "two objects", "held-out pair")
"""Kinds of prompts; the last has one object, of a colour and shape that were never trained together."""


@dataclass(frozen=True)
class Score:
    """Shares in [0, 1] of the pictures that obey a part of their caption, and all of it (`right`)."""

    prompts: int
    background: float
    count: float
    colours: float
    shapes: float
    relation: float
    right: float


def prompts(kind: str, count: int, seed: int = 1000) -> list[str]:
    """`count` random captions; the same for the same arguments.

    Args:
        kind: one of `KINDS`.

    Raises:
        ValueError: another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no kind of prompt; use one of {', '.join(KINDS)}.")
    rng = np.random.default_rng(seed)
    found: list[str] = []
    while len(found) < count:
        scene = scenes.sample_scene(rng, held_out=kind == "held-out pair")
        if (len(scene.items) == 2) == (kind == "two objects"):
            found.append(scenes.caption(scene))
    return found


def score(draw: Draw, texts: Sequence[str], *, batch: int = 16) -> Score:
    """Draws a picture for every caption and judges it.

    Args:
        draw: called with at most `batch` captions at a time.
    """
    verdicts: list[judge.SceneVerdict] = []
    for first in range(0, len(texts), batch):
        part = texts[first : first + batch]
        verdicts += [judge.judge(picture, text) for picture, text in zip(draw(part), part, strict=True)]
    parts = ("background", "count", "colours", "shapes", "relation", "right")
    return Score(len(verdicts), **{p: float(np.mean([getattr(v, p) for v in verdicts])) for p in parts})
