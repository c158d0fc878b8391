"""Small heads that predict the objects of the clean picture from the UNet's features; used only in training.

An object covers a few hundredths of a picture, so the velocity's error hardly depends on its shape. The UNet learns
late which of two shapes belongs where: for ten thousand steps after the places are right, it generates blends of both.
The heads therefore predict shape and colour directly, from the decoder's features, in every cell of the latent and at
every noise level.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .. import scenes
from . import architecture as networks

if TYPE_CHECKING:
    import torch
    from diffusers import UNet2DConditionModel

_EDGE = 2.0  # width in pixels of the border that counts as part of an object: half a cell
_NOTHING = 0.1  # weight of cells without an object, which are the majority
_BLOCKS = {1: 80, 2: 64}  # channels of the up blocks with heads, by index; they have 8x8 and 16x16 cells


def labels(scene: scenes.Scene) -> npt.NDArray[np.uint8]:
    """Return shape and colour in each cell of the latent, uint8 [2, 16, 16]: 0 for none, else the index plus 1."""
    side = networks.LATENT_SIZE
    rows, columns = (np.mgrid[:side, :side].astype(np.float32) + np.float32(0.5)) * (scenes.IMAGE_SIZE / side)
    points = np.stack([columns.ravel(), rows.ravel()], axis=1)
    labels_map = np.zeros((2, side, side), dtype=np.uint8)
    for item in scene.items:
        inside = scenes.distance(points, item).reshape(side, side) <= _EDGE
        labels_map[0, inside] = scenes.SHAPES.index(item.shape) + 1
        labels_map[1, inside] = tuple(scenes.COLOURS).index(item.colour) + 1
    return labels_map


def new_heads() -> torch.nn.ModuleList:
    """Return untrained heads, one for shape and one for colour on each block of `_BLOCKS`."""
    import torch

    classes = (len(scenes.SHAPES) + 1, len(scenes.COLOURS) + 1)
    return torch.nn.ModuleList(torch.nn.Conv2d(width, size, 1) for width in _BLOCKS.values() for size in classes)


@contextmanager
def recorded_features(unet: UNet2DConditionModel) -> Iterator[list[torch.Tensor]]:
    """Yield a list to which the UNet's calls inside the context add the features of the blocks with heads."""
    features: list[torch.Tensor] = []
    hooks = [
        unet.up_blocks[index].register_forward_hook(lambda _module, _inputs, output: features.append(output))
        for index in _BLOCKS
    ]
    try:
        yield features
    finally:
        for hook in hooks:
            hook.remove()


def loss(heads: torch.nn.ModuleList, features: Sequence[torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
    """Return the sum of the heads' mean cross-entropies over the cells.

    Args:
        features: features of the blocks with heads, [B, channels, 8 or 16, 8 or 16].
        targets: labels, int64 [B, 2, 16, 16].
    """
    import torch

    weights = torch.where(targets[:, 0] > 0, 1.0, _NOTHING)
    total = torch.zeros((), device=targets.device)
    for index, head in enumerate(heads):
        logits = head(features[index // 2].float())
        if logits.shape[-1] != targets.shape[-1]:
            logits = torch.nn.functional.interpolate(logits, size=tuple(targets.shape[-2:]), mode="nearest")
        error = torch.nn.functional.cross_entropy(logits, targets[:, index % 2], reduction="none")
        total = total + (error * weights).sum() / weights.sum()
    return total


def weights(targets: torch.Tensor, objects: float) -> torch.Tensor:
    """Return the weight of the velocity's error in each cell, with mean 1 over the batch: fp32 [B, 1, 16, 16].

    Args:
        targets: labels, int64 [B, 2, 16, 16].
        objects: weight of a cell with an object or next to one, relative to other cells.
    """
    import torch

    near = torch.nn.functional.max_pool2d((targets[:, :1] > 0).float(), 3, stride=1, padding=1)
    raw = 1 + (objects - 1) * near
    return raw / raw.mean()
