"""A training aid: small heads that say, from the UNet's features, which object the clean picture shows where.

An object fills a few hundredths of a picture, so the velocity's error hardly tells two shapes apart, and which of two
shapes stands where is learnt late: for ten thousand steps after the places are right, pairs come out as blends of both.
So the decoder's features are also asked for it directly, at every cell of the latent and every noise level. The heads
are dropped after training.
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

_EDGE = 2.0  # pixels around an object that still count as its own: half a cell
_NOTHING = 0.1  # weight of the cells without an object, most of all
_BLOCKS = {1: 80, 2: 64}  # up blocks that are asked, with their channels: 8x8 and 16x16 cells


def labels(scene: scenes.Scene) -> npt.NDArray[np.uint8]:
    """Shape and colour to be seen in each cell of the latent, uint8 [2, 16, 16]: 0 for none, else the index plus 1."""
    side = networks.LATENT_SIZE
    rows, columns = (np.mgrid[:side, :side].astype(np.float32) + np.float32(0.5)) * (scenes.IMAGE_SIZE / side)
    points = np.stack([columns.ravel(), rows.ravel()], axis=1)
    seen = np.zeros((2, side, side), dtype=np.uint8)
    for item in scene.items:
        inside = scenes.distance(points, item).reshape(side, side) <= _EDGE
        seen[0, inside] = scenes.SHAPES.index(item.shape) + 1
        seen[1, inside] = tuple(scenes.COLOURS).index(item.colour) + 1
    return seen


def new_seer() -> torch.nn.ModuleList:
    """Untrained heads, a pair for shape and colour on each asked block."""
    import torch

    classes = (len(scenes.SHAPES) + 1, len(scenes.COLOURS) + 1)
    return torch.nn.ModuleList(torch.nn.Conv2d(width, size, 1) for width in _BLOCKS.values() for size in classes)


@contextmanager
def watched(unet: UNet2DConditionModel) -> Iterator[list[torch.Tensor]]:
    """Collects the asked blocks' features of the calls in it."""
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


def loss(seer: torch.nn.ModuleList, features: Sequence[torch.Tensor], wanted: torch.Tensor) -> torch.Tensor:
    """Sum of the heads' mean cross-entropies over the cells.

    Args:
        features: of the asked blocks, [B, channels, 8 or 16, 8 or 16].
        wanted: labels, int64 [B, 2, 16, 16].
    """
    import torch

    weights = torch.where(wanted[:, 0] > 0, 1.0, _NOTHING)
    total = torch.zeros((), device=wanted.device)
    for index, head in enumerate(seer):
        said = head(features[index // 2].float())
        if said.shape[-1] != wanted.shape[-1]:
            said = torch.nn.functional.interpolate(said, size=tuple(wanted.shape[-2:]), mode="nearest")
        error = torch.nn.functional.cross_entropy(said, wanted[:, index % 2], reduction="none")
        total = total + (error * weights).sum() / weights.sum()
    return total


def weights(wanted: torch.Tensor, objects: float) -> torch.Tensor:
    """How much the velocity's error counts in each cell, mean 1 over the batch: fp32 [B, 1, 16, 16].

    Args:
        wanted: labels, int64 [B, 2, 16, 16].
        objects: how many times a cell of an object, or beside one, counts.
    """
    import torch

    near = torch.nn.functional.max_pool2d((wanted[:, :1] > 0).float(), 3, stride=1, padding=1)
    raw = 1 + (objects - 1) * near
    return raw / raw.mean()
