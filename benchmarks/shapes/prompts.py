"""Random captions of each kind, as prompts for the model."""

from __future__ import annotations

import numpy as np

from . import scenes

KINDS = ("one object", "two objects", "held-out pair")
"""Kinds of prompts; the last has one object with a colour and shape that were never trained together."""


def prompts(kind: str, count: int, seed: int = 1000) -> list[str]:
    """Return `count` random captions; equal arguments give equal captions.

    Args:
        kind: one of `KINDS`.

    Raises:
        ValueError: the kind is unknown.
    """
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is not a kind of prompt; use one of {', '.join(KINDS)}.")
    rng = np.random.default_rng(seed)
    captions: list[str] = []
    while len(captions) < count:
        scene = scenes.sample_scene(rng, held_out=kind == "held-out pair")
        if (len(scene.items) == 2) == (kind == "two objects"):
            captions.append(scenes.caption(scene))
    return captions
