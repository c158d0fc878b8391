"""Share of prompts that a pipeline obeys, by the rule-based judge; it needs no other network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .. import judge
from . import rule_judge

Generate = Callable[[Sequence[str]], Sequence[npt.NDArray[np.uint8]]]
"""Function that generates one uint8 image (64, 64, 3) for each prompt."""


@dataclass(frozen=True)
class Score:
    """The shares in [0, 1] of images that obey each part of their caption; `right`: that obey all parts."""

    prompts: int
    background: float
    count: float
    colours: float
    shapes: float
    relation: float
    right: float


def score(generate: Generate, texts: Sequence[str], *, batch: int = 16) -> Score:
    """Generate an image for each caption and judge it.

    Args:
        generate: called with at most `batch` captions at a time.
    """
    verdicts: list[judge.SceneVerdict] = []
    for first in range(0, len(texts), batch):
        part = texts[first : first + batch]
        verdicts += [rule_judge.judge_by_rules(*pair) for pair in zip(generate(part), part, strict=True)]
    parts = ("background", "count", "colours", "shapes", "relation", "right")
    return Score(len(verdicts), **{p: float(np.mean([getattr(v, p) for v in verdicts])) for p in parts})
