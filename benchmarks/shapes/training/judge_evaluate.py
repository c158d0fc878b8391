"""How well the judge network reads drawn scenes: shares and confusion matrices."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from .. import judge, scenes
from ..judge_net.reader import Reading

NONE = "none"
"""The answer for an object that was not seen."""

_NEAR = 6.0  # pixels between an object's centre and where it is seen


@dataclass
class Confusion:
    """How often each word was read as each: rows are what was drawn, columns what was read."""

    words: tuple[str, ...]
    answers: tuple[str, ...]
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def right(self) -> float:
        """Share of the answers that equal the word."""
        total = sum(self.counts.values())
        return sum(count for (word, answer), count in self.counts.items() if word == answer) / max(1, total)

    def table(self) -> str:
        """As a Markdown table."""
        head = "| drawn | " + " | ".join(self.answers) + " |"
        rows = (
            f"| {word} | " + " | ".join(str(self.counts[word, answer]) for answer in self.answers) + " |"
            for word in self.words
        )
        return "\n".join([head, "|---" * (len(self.answers) + 1) + "|", *rows])


@dataclass(frozen=True)
class Evaluation:
    """Over many drawn scenes.

    Attributes:
        scenes: how many.
        right: share of the scenes that were read without any fault: background, number of objects, colour and shape
            of each at its place, and the relation.
        by_kind: the same by kind of scene: one object, two objects, with a pair of `scenes.HELD_OUT`.
        matrices: by name: colour, shape, relation, count, background.
    """

    scenes: int
    right: float
    by_kind: dict[str, float]
    matrices: dict[str, Confusion]


def evaluate(drawn: Sequence[scenes.Scene], readings: Sequence[Reading]) -> Evaluation:
    """Compares what was drawn with what was read, object by object: each belongs to what is seen nearest its centre."""
    colours, shapes, backgrounds = tuple(scenes.COLOURS), scenes.SHAPES, tuple(scenes.BACKGROUNDS)
    matrices = {
        "colour": Confusion(colours, (*colours, NONE)),
        "shape": Confusion(shapes, (*shapes, NONE)),
        "relation": Confusion(scenes.RELATIONS, (*scenes.RELATIONS, NONE)),
        "count": Confusion(("1", "2"), ("0", "1", "2", "more")),
        "background": Confusion(backgrounds, backgrounds),
    }
    results: dict[str, list[bool]] = {"one object": [], "two objects": [], "held-out pair": []}
    for scene, reading in zip(drawn, readings, strict=True):
        seen = [_nearest(item, reading.objects) for item in scene.items]
        count = len(reading.objects)
        answers = [
            ("background", scene.background, reading.background),
            ("count", str(len(scene.items)), str(count) if count <= 2 else "more"),
            *(("colour", item.colour, s.colour if s else NONE) for item, s in zip(scene.items, seen, strict=True)),
            *(("shape", item.shape, s.shape if s else NONE) for item, s in zip(scene.items, seen, strict=True)),
        ]
        if scene.relation:
            answers.append(("relation", scene.relation, _relation(seen)))
        for name, word, answer in answers:
            matrices[name].counts[word, answer] += 1
        right = all(word == answer for _, word, answer in answers)
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
    """Where the first lies from the second; `NONE` if one is missing or they lie at 45 degrees."""
    if None in seen or len(seen) != 2:
        return NONE
    first, second = (s for s in seen if s is not None)
    return next((name for name in scenes.RELATIONS if judge.stands(name, first, second)), NONE)
