"""The layers of the judge network, which finds the objects and the background of an image."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from .. import scenes

CELL = 4
"""Height and width in pixels of the cells that the network classifies."""

POOLED = 160
"""Width of the features for the Fréchet distance."""

CELLS = scenes.IMAGE_SIZE // CELL


class Maps(NamedTuple):
    """Logits for each cell (object centre, colour, shape) and for the image (background)."""

    centre: torch.Tensor  # [B, 16, 16]
    colour: torch.Tensor  # [B, 8, 16, 16]
    shape: torch.Tensor  # [B, 6, 16, 16]
    background: torch.Tensor  # [B, 5]


class Features(NamedTuple):
    """Outputs of four layers, and the vector for the Fréchet distance."""

    maps: tuple[torch.Tensor, ...]  # [B, 32, 32, 32], [B, 64, 16, 16], [B, 96, 8, 8], [B, 64, 16, 16]
    pooled: torch.Tensor  # [B, 160]


def _layer(channels: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(channels, outputs, size, stride=stride, padding=size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class JudgeNetwork(nn.Module):
    """A convolutional network with cells of 2, 4 and 8 pixels; the coarse cells see whole objects."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(_layer(3, 32, size=5, stride=2), _layer(32, 32))
        self.middle = nn.Sequential(_layer(32, 64, stride=2), _layer(64, 64))
        self.coarse = nn.Sequential(_layer(64, 96, stride=2), _layer(96, 96), _layer(96, 96))
        self.back = nn.Conv2d(96, 64, 1)
        self.joined = _layer(64, 64)
        self.objects = nn.Conv2d(64, 1 + len(scenes.COLOURS) + len(scenes.SHAPES), 1)
        self.ground = nn.Linear(96, len(scenes.BACKGROUNDS))

    def features(self, pictures: torch.Tensor) -> Features:
        """Return the features of images [B, 3, 64, 64], fp32 in [-1, 1]."""
        fine = self.fine(pictures)
        middle = self.middle(fine)
        coarse = self.coarse(middle)
        joined = self.joined(middle + nn.functional.interpolate(self.back(coarse), scale_factor=2.0))
        pooled = torch.cat([coarse.mean(dim=(2, 3)), joined.mean(dim=(2, 3))], dim=1)
        return Features((fine, middle, coarse, joined), pooled)

    def forward(self, pictures: torch.Tensor) -> Maps:
        """Return the logits of images [B, 3, 64, 64], fp32 in [-1, 1]."""
        features = self.features(pictures)
        sizes = [1, len(scenes.COLOURS), len(scenes.SHAPES)]
        centre, colour, shape = self.objects(features.maps[-1]).split(sizes, dim=1)
        return Maps(centre[:, 0], colour, shape, self.ground(features.maps[2].mean(dim=(2, 3))))
