"""Rule-based judge: finds the objects and the background of an image, and whether they obey a caption.

The judge reads images of `scenes.render` without error, so what it misreads in a generated image was generated wrong.
That gives caching a meaningful measure: the share of prompts that are still obeyed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import numpy.typing as npt

from . import scenes

Mask = npt.NDArray[np.bool_]

_OBJECT_CONTRAST = 45.0  # least distance in RGB from the background of an object's pixel
_FEWEST_PIXELS = 30  # smaller patches are not objects
_TILTS = tuple(math.radians(degrees) for degrees in (-10, -5, 0, 5, 10))


@dataclass(frozen=True)
class SeenObject:
    """One connected patch: nearest colour and shape, centre in pixels, and its overlap with the ideal shape (IoU).

    For the judge network, ``overlap`` is its certainty that an object is there.
    """

    colour: str
    shape: str
    x: float
    y: float
    overlap: float


@dataclass(frozen=True)
class SceneVerdict:
    """The parts of a caption that an image obeys."""

    background: bool
    count: bool
    colours: bool
    shapes: bool
    relation: bool

    @property
    def right(self) -> bool:
        """Whether the whole caption was obeyed."""
        return self.background and self.count and self.colours and self.shapes and self.relation


def look(picture: npt.NDArray[np.uint8]) -> tuple[str, tuple[SeenObject, ...]]:
    """Return the name of the background and the objects, largest first.

    Args:
        picture: uint8 (64, 64, 3), sRGB.

    Raises:
        ValueError: another shape or dtype.
    """
    expected = (scenes.IMAGE_SIZE, scenes.IMAGE_SIZE, 3)
    if picture.shape != expected or picture.dtype != np.uint8:
        raise ValueError(f"the picture is {picture.dtype} {picture.shape}; pass uint8 {expected}.")
    pixels = picture.astype(np.float32)
    ground = _ground(pixels)
    patches = _patches(_unlike(pixels, ground))
    return _nearest(ground, scenes.BACKGROUNDS), tuple(_recognise(pixels, patch) for patch in patches)


def object_pixels(picture: npt.NDArray[np.uint8]) -> Mask:
    """Return the pixels of `picture`, uint8 (64, 64, 3), that differ from the background: bool (64, 64)."""
    pixels = picture.astype(np.float32)
    return _unlike(pixels, _ground(pixels))


def intersection_over_union(one: Mask, other: Mask) -> float:
    """Return the pixels in both as a share of those in either; 1 if both are empty."""
    either = int((one | other).sum())
    return float((one & other).sum() / either) if either else 1.0


def judge(picture: npt.NDArray[np.uint8], text: str) -> SceneVerdict:
    """Compare the content of `picture`, uint8 (64, 64, 3), with a caption; sizes are not judged.

    Raises:
        ValueError: `text` is not a caption of `scenes`, or the picture has another shape or dtype.
    """
    return compare(text, *look(picture))


def compare(text: str, background: str, objects: tuple[SeenObject, ...]) -> SceneVerdict:
    """Compare a background and objects, from `look` or the judge network, with a caption.

    Raises:
        ValueError: `text` is not a caption of `scenes`.
    """
    asked = scenes.scene_from_caption(text, np.random.default_rng(0))

    def fits(matches: Callable[[scenes.Item, SeenObject], bool], *, related: bool = False) -> bool:
        """Return whether some assignment of the objects to the caption's items satisfies `matches` for all."""
        return any(
            all(matches(item, seen) for item, seen in zip(asked.items, order, strict=True))
            and (not related or asked.relation is None or stands(asked.relation, order[0], order[1]))
            for order in permutations(objects)
        )

    count = len(objects) == len(asked.items)
    return SceneVerdict(
        background=background == asked.background,
        count=count,
        colours=count and fits(lambda item, seen: item.colour == seen.colour),
        shapes=count and fits(lambda item, seen: (item.colour, item.shape) == (seen.colour, seen.shape)),
        relation=count and fits(lambda item, seen: item.colour == seen.colour, related=True),
    )


def stands(relation: scenes.Relation, first: SeenObject, second: SeenObject) -> bool:
    """Return whether the first object is in this relation to the second, within 45 degrees."""
    right, down = second.x - first.x, second.y - first.y
    return {
        "above": down > abs(right),
        "below": -down > abs(right),
        "left of": right > abs(down),
        "right of": -right > abs(down),
    }[relation]


def _ground(pixels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the background's colour: the median of the image's border."""
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return np.asarray(np.median(border, axis=0))


def _unlike(pixels: npt.NDArray[np.float32], ground: npt.NDArray[np.float32]) -> Mask:
    return np.asarray(np.linalg.norm(pixels - ground, axis=-1) > _OBJECT_CONTRAST)


def _nearest(colour: npt.NDArray[np.float32], names: dict[str, tuple[int, int, int]]) -> str:
    return min(names, key=lambda name: float(np.linalg.norm(colour - np.array(names[name]))))


def _patches(mask: Mask) -> list[Mask]:
    """Return connected patches (8 neighbours) of at least `_FEWEST_PIXELS`, largest first, at most four."""
    numbers = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(numbers, 1)
        rows, columns = mask.shape
        shifted = [padded[y : y + rows, x : x + columns] for y in range(3) for x in range(3)]
        grown = np.where(mask, np.max(shifted, axis=0), 0)
        if np.array_equal(grown, numbers):
            break
        numbers = grown
    found, counts = np.unique(numbers[mask], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [numbers == found[index] for index in order if counts[index] >= _FEWEST_PIXELS][:4]


def _recognise(pixels: npt.NDArray[np.float32], patch: Mask) -> SeenObject:
    rows, columns = np.nonzero(patch)
    x, y = float(columns.mean()) + 0.5, float(rows.mean()) + 0.5
    middle = (np.abs(columns + 0.5 - x) <= 3) & (np.abs(rows + 0.5 - y) <= 3)
    colour = _nearest(np.median(pixels[rows[middle], columns[middle]], axis=0), scenes.COLOURS) if middle.any() else ""
    overlaps = {shape: _overlap(patch, shape, x, y) for shape in scenes.SHAPES}
    shape = max(overlaps, key=lambda name: overlaps[name])
    return SeenObject(colour or "none", shape, x, y, overlaps[shape])


def _overlap(patch: Mask, shape: str, x: float, y: float) -> float:
    """Return the best intersection over union of a patch with a shape of equal area and centre, over a few angles."""
    area = float(patch.sum())
    return max(intersection_over_union(patch, scenes.mask(shape, x, y, area, tilt)) for tilt in _TILTS)
