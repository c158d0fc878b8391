"""Random captions of each kind, for measuring what share of prompts a model obeys."""

from __future__ import annotations

import numpy as np

from . import scenes

KINDS = ("one object", "two objects", "held-out pair")
"""Kinds of prompts; the last has one object, of a colour and shape that were never trained together."""


def prompts(kind: str, count: int, seed: int = 1000) -> list[str]:
    """Return `count` random captions; the same for the same arguments.

    Args:
        kind: one of `KINDS`.

    Raises:
        ValueError: another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is not a kind of prompt; use one of {', '.join(KINDS)}.")
    rng = np.random.default_rng(seed)
    found: list[str] = []
    while len(found) < count:
        scene = scenes.sample_scene(rng, held_out=kind == "held-out pair")
        if (len(scene.items) == 2) == (kind == "two objects"):
            found.append(scenes.caption(scene))
    return found
