"""Comparison of the objects in an image with its caption, and the pixels that objects cover."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import numpy.typing as npt

from . import scenes

Mask = npt.NDArray[np.bool_]

_OBJECT_CONTRAST = 45.0  # minimum distance in RGB between an object's pixel and the background


@dataclass(frozen=True)
class SeenObject:
    """An object in an image: nearest colour and shape, centre in pixels, and the judge's certainty from 0 to 1."""

    colour: str
    shape: str
    x: float
    y: float
    certainty: float


@dataclass(frozen=True)
class SceneVerdict:
    """The verdict on an image: for each part of the caption, whether the image obeys it."""

    background: bool
    count: bool
    colours: bool
    shapes: bool
    relation: bool

    @property
    def right(self) -> bool:
        """Whether the image obeys the whole caption."""
        return self.background and self.count and self.colours and self.shapes and self.relation


def object_pixels(picture: npt.NDArray[np.uint8]) -> Mask:
    """Return the pixels of `picture`, uint8 (64, 64, 3), that differ from the background: bool (64, 64)."""
    distance = np.linalg.norm(picture.astype(np.float32) - background_colour(picture), axis=-1)
    return np.asarray(distance > _OBJECT_CONTRAST)


def background_colour(picture: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Return the median colour of the border of `picture`, uint8 (64, 64, 3), in sRGB."""
    border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]]).astype(np.float32)
    return np.asarray(np.median(border, axis=0))


def intersection_over_union(one: Mask, other: Mask) -> float:
    """Return the number of pixels in both masks divided by the number in either; 1 if both are empty."""
    either = int((one | other).sum())
    return float((one & other).sum() / either) if either else 1.0


def compare(text: str, background: str, objects: tuple[SeenObject, ...]) -> SceneVerdict:
    """Compare a background and objects that a judge found with a caption; sizes are not judged.

    Raises:
        ValueError: `text` is not a caption of `scenes`.
    """
    scene = scenes.scene_from_caption(text, np.random.default_rng(0))

    def fits(matches: Callable[[scenes.Item, SeenObject], bool], *, related: bool = False) -> bool:
        """Return whether the objects can be assigned to the caption's items so that all of them match."""
        return any(
            all(matches(item, seen) for item, seen in zip(scene.items, order, strict=True))
            and (not related or scene.relation is None or stands(scene.relation, order[0], order[1]))
            for order in permutations(objects)
        )

    count = len(objects) == len(scene.items)
    return SceneVerdict(
        background=background == scene.background,
        count=count,
        colours=count and fits(lambda item, seen: item.colour == seen.colour),
        shapes=count and fits(lambda item, seen: (item.colour, item.shape) == (seen.colour, seen.shape)),
        relation=count and fits(lambda item, seen: item.colour == seen.colour, related=True),
    )


def stands(relation: scenes.Relation, first: SeenObject, second: SeenObject) -> bool:
    """Return whether the first object is in this relation to the second, up to 45 degrees off."""
    right, down = second.x - first.x, second.y - first.y
    return {
        "above": down > abs(right),
        "below": -down > abs(right),
        "left of": right > abs(down),
        "right of": -right > abs(down),
    }[relation]
