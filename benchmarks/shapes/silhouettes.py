"""Silhouettes of scenes, the input of the ControlNet: the outlines of objects without colours."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from . import judge, scenes


def silhouette(scene: scenes.Scene) -> npt.NDArray[np.uint8]:
    """Return the silhouette of a scene with white objects on black: uint8 (64, 64, 3)."""
    side = scenes.IMAGE_SIZE
    rows, columns = np.mgrid[:side, :side].astype(np.float32) + np.float32(0.5)
    points = np.stack([columns.ravel(), rows.ravel()], axis=1)
    nearest = np.min([scenes.distance(points, item) for item in scene.items], axis=0)
    white = np.where(nearest <= 0, 255, 0).astype(np.uint8).reshape(side, side, 1)
    return np.repeat(white, 3, axis=2)


def silhouette_pixels(picture: npt.NDArray[np.uint8]) -> judge.Mask:
    """Return the object pixels of a silhouette: bool (64, 64)."""
    return np.asarray(picture[..., 0] > 127)


def open_caption(scene: scenes.Scene) -> str:
    """Return the caption of a scene without sizes, which only the silhouette shows."""
    return scenes.caption(replace(scene, items=tuple(replace(item, says_size=False) for item in scene.items)))


def overlaps(pictures: npt.NDArray[np.uint8], masks: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Return the intersection over union of the objects' pixels in each image and in its silhouette.

    `judge.object_pixels` finds the objects' pixels. The result is 1 where neither image nor silhouette has an object.

    Args:
        pictures, masks: images and silhouettes, uint8 (N, 64, 64, 3).

    Returns:
        (N,), each in [0, 1].
    """
    return np.array(
        [
            judge.intersection_over_union(judge.object_pixels(picture), silhouette_pixels(mask))
            for picture, mask in zip(pictures, masks, strict=True)
        ]
    )
