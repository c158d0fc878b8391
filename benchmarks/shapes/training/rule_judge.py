"""Rule-based judge: finds the objects and the background of an image by their pixels.

The judge reads images of `scenes.render` without error. It checks the judge network and the trained models.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from .. import judge, scenes

_FEWEST_PIXELS = 30  # smaller patches are not objects
_TILTS = tuple(math.radians(degrees) for degrees in (-10, -5, 0, 5, 10))


def look(picture: npt.NDArray[np.uint8]) -> tuple[str, tuple[judge.SeenObject, ...]]:
    """Return the name of the background and the objects, largest first.

    Args:
        picture: uint8 (64, 64, 3), sRGB.

    Raises:
        ValueError: another shape or dtype.
    """
    expected = (scenes.IMAGE_SIZE, scenes.IMAGE_SIZE, 3)
    if picture.shape != expected or picture.dtype != np.uint8:
        raise ValueError(f"the picture is {picture.dtype} {picture.shape}; pass uint8 {expected}.")
    patches = _patches(judge.object_pixels(picture))
    objects = tuple(_recognise(picture.astype(np.float32), patch) for patch in patches)
    return _nearest(judge.background_colour(picture), scenes.BACKGROUNDS), objects


def judge_by_rules(picture: npt.NDArray[np.uint8], text: str) -> judge.SceneVerdict:
    """Compare the content of `picture`, uint8 (64, 64, 3), with a caption; sizes are not judged.

    Raises:
        ValueError: `text` is not a caption of `scenes`, or the picture has another shape or dtype.
    """
    return judge.compare(text, *look(picture))


def _nearest(colour: npt.NDArray[np.float32], names: dict[str, tuple[int, int, int]]) -> str:
    return min(names, key=lambda name: float(np.linalg.norm(colour - np.array(names[name]))))


def _patches(mask: judge.Mask) -> list[judge.Mask]:
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
    numbered, counts = np.unique(numbers[mask], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [numbers == numbered[index] for index in order if counts[index] >= _FEWEST_PIXELS][:4]


def _recognise(pixels: npt.NDArray[np.float32], patch: judge.Mask) -> judge.SeenObject:
    rows, columns = np.nonzero(patch)
    x, y = float(columns.mean()) + 0.5, float(rows.mean()) + 0.5
    middle = (np.abs(columns + 0.5 - x) <= 3) & (np.abs(rows + 0.5 - y) <= 3)
    colour = _nearest(np.median(pixels[rows[middle], columns[middle]], axis=0), scenes.COLOURS) if middle.any() else ""
    overlaps = {shape: _overlap(patch, shape, x, y) for shape in scenes.SHAPES}
    shape = max(overlaps, key=lambda name: overlaps[name])
    return judge.SeenObject(colour or "none", shape, x, y, overlaps[shape])


def _overlap(patch: judge.Mask, shape: str, x: float, y: float) -> float:
    """Return the best intersection over union of a patch with a shape of equal area and centre, over a few angles."""
    area = float(patch.sum())
    return max(judge.intersection_over_union(patch, scenes.mask(shape, x, y, area, tilt)) for tilt in _TILTS)
