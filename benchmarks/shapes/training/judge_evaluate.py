"""Accuracy of the judge network on rendered scenes: shares and confusion matrices."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from .. import judge, scenes
from ..judge_net.reader import Reading

NONE = "none"
"""The prediction for an object that was not found."""

_NEAR = 6.0  # maximum distance in pixels between an object's centre and the place where it is found


@dataclass
class Confusion:
    """A confusion matrix: a row for each word of the scenes, a column for each predicted word."""

    words: tuple[str, ...]
    predictions: tuple[str, ...]
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def right(self) -> float:
        """Share of right predictions."""
        total = sum(self.counts.values())
        return sum(count for (word, predicted), count in self.counts.items() if word == predicted) / max(1, total)

    def table(self) -> str:
        """Return the matrix as a Markdown table."""
        head = "| scene | " + " | ".join(self.predictions) + " |"
        rows = (
            f"| {word} | " + " | ".join(str(self.counts[word, predicted]) for predicted in self.predictions) + " |"
            for word in self.words
        )
        return "\n".join([head, "|---" * (len(self.predictions) + 1) + "|", *rows])


@dataclass(frozen=True)
class Evaluation:
    """The accuracy on many rendered scenes.

    Attributes:
        scenes: number of scenes.
        right: share of the scenes that were read without any error: background, number of objects, colour and shape
            of each object at its place, and relation.
        by_kind: the same share by kind of scene: one object, two objects, with a pair of `scenes.HELD_OUT`.
        matrices: confusion matrices by name: colour, shape, relation, count, background.
    """

    scenes: int
    right: float
    by_kind: dict[str, float]
    matrices: dict[str, Confusion]


def evaluate(originals: Sequence[scenes.Scene], readings: Sequence[Reading]) -> Evaluation:
    """Compare scenes with readings; each object of a scene is compared with the object found nearest to its centre."""
    colours, shapes, backgrounds = tuple(scenes.COLOURS), scenes.SHAPES, tuple(scenes.BACKGROUNDS)
    matrices = {
        "colour": Confusion(colours, (*colours, NONE)),
        "shape": Confusion(shapes, (*shapes, NONE)),
        "relation": Confusion(scenes.RELATIONS, (*scenes.RELATIONS, NONE)),
        "count": Confusion(("1", "2"), ("0", "1", "2", "more")),
        "background": Confusion(backgrounds, backgrounds),
    }
    results: dict[str, list[bool]] = {"one object": [], "two objects": [], "held-out pair": []}
    for scene, reading in zip(originals, readings, strict=True):
        seen = [_nearest(item, reading.objects) for item in scene.items]
        count = len(reading.objects)
        predictions = [
            ("background", scene.background, reading.background),
            ("count", str(len(scene.items)), str(count) if count <= 2 else "more"),
            *(("colour", item.colour, s.colour if s else NONE) for item, s in zip(scene.items, seen, strict=True)),
            *(("shape", item.shape, s.shape if s else NONE) for item, s in zip(scene.items, seen, strict=True)),
        ]
        if scene.relation:
            predictions.append(("relation", scene.relation, _relation(seen)))
        for name, word, predicted in predictions:
            matrices[name].counts[word, predicted] += 1
        right = all(word == predicted for _, word, predicted in predictions)
        results["one object" if len(scene.items) == 1 else "two objects"].append(right)
        if scene.pairs & scenes.HELD_OUT:
            results["held-out pair"].append(right)
    every = results["one object"] + results["two objects"]
    shares = {kind: sum(rights) / len(rights) for kind, rights in results.items() if rights}
    return Evaluation(len(every), sum(every) / len(every), shares, matrices)


def _nearest(item: scenes.Item, objects: Sequence[judge.SeenObject]) -> judge.SeenObject | None:
    near = {math.hypot(seen.x - item.x, seen.y - item.y): seen for seen in objects}
    return near[min(near)] if near and min(near) <= _NEAR else None


def _relation(seen: Sequence[judge.SeenObject | None]) -> str:
    """Return the relation of the first object to the second; `NONE` if one is missing or no relation fits."""
    if None in seen or len(seen) != 2:
        return NONE
    first, second = (s for s in seen if s is not None)
    return next((name for name in scenes.RELATIONS if judge.stands(name, first, second)), NONE)
