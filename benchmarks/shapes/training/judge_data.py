"""Training data of the judge network: rendered scenes, some of them softened by the shapes model's autoencoder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from .. import scenes
from ..judge_net.network import CELL, CELLS
from . import vae_stage

_HELD_OUT = 1 / 6  # share of scenes with a pair of scenes.HELD_OUT, so that these pairs are not rarer than others
_SPREAD = 0.8  # standard deviation, in cells, of the target around an object's centre
_MOST_OBJECTS = 2


@dataclass(frozen=True)
class Labels:
    """The content of scenes as tensors; the entries of absent objects are -1."""

    background: torch.Tensor  # int64 [N]
    colour: torch.Tensor  # int64 [N, 2]
    shape: torch.Tensor  # int64 [N, 2]
    place: torch.Tensor  # fp32 [N, 2, 2]: x and y in pixels

    def __getitem__(self, rows: torch.Tensor) -> Labels:
        return Labels(self.background[rows], self.colour[rows], self.shape[rows], self.place[rows])

    def mirrored(self, which: torch.Tensor) -> Labels:
        """Return the labels after the pictures in `which`, bool [N], were mirrored: left and right are exchanged."""
        x = torch.where(which[:, None] & (self.colour >= 0), scenes.IMAGE_SIZE - self.place[..., 0], self.place[..., 0])
        return Labels(self.background, self.colour, self.shape, torch.stack([x, self.place[..., 1]], dim=-1))


def judged_scenes(count: int, seed: int) -> list[scenes.Scene]:
    """Return `count` random scenes with all pairs, also those that the shapes model never saw."""
    rng = np.random.default_rng(seed)
    return [scenes.sample_scene(rng, held_out=bool(rng.random() < _HELD_OUT)) for _ in range(count)]


def labels_of(originals: list[scenes.Scene]) -> Labels:
    """Return the labels of the scenes in their order; objects have the order of the caption."""
    backgrounds, colours, shapes = list(scenes.BACKGROUNDS), list(scenes.COLOURS), list(scenes.SHAPES)
    colour, shape = np.full((2, len(originals), _MOST_OBJECTS), -1)
    place = np.full((len(originals), _MOST_OBJECTS, 2), -1.0, dtype=np.float32)
    for row, scene in enumerate(originals):
        for index, item in enumerate(scene.items):
            colour[row, index], shape[row, index] = colours.index(item.colour), shapes.index(item.shape)
            place[row, index] = item.x, item.y
    background = torch.tensor([backgrounds.index(scene.background) for scene in originals])
    return Labels(background, torch.from_numpy(colour), torch.from_numpy(shape), torch.from_numpy(place))


def targets(labels: Labels) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the target maps: heat of the centres, fp32 [N, 16, 16] in 0..1; colour and shape, int64 [N, 16, 16].

    Each cell has the colour and shape of the object with the nearest centre.
    """
    line = torch.arange(CELLS, dtype=torch.float32) + 0.5
    x, y = (labels.place / CELL).unbind(dim=-1)  # [N, 2]
    squares = (line[None, None, None, :] - x[..., None, None]) ** 2 + (
        line[None, None, :, None] - y[..., None, None]
    ) ** 2
    squares = squares.masked_fill((labels.colour < 0)[..., None, None], 1e9)  # [N, 2, 16, 16]
    distance, nearest = squares.min(dim=1)
    rows = torch.arange(len(nearest))[:, None, None]
    return torch.exp(-distance / (2 * _SPREAD**2)), labels.colour[rows, nearest], labels.shape[rows, nearest]


def softened(pictures: npt.NDArray[np.uint8], vae: Path, noise: float, seed: int) -> npt.NDArray[np.uint8]:
    """Return the pictures, uint8 (N, 3, 64, 64), after encoding and decoding by the autoencoder in `vae`.

    Args:
        noise: maximum standard deviation of the noise in the scaled latents; each picture has a random one.
    """
    from diffusers import AutoencoderKL

    autoencoder = AutoencoderKL.from_pretrained(vae).eval()
    random = torch.Generator().manual_seed(seed)
    decoded = []
    with torch.inference_mode():
        for first in range(0, len(pictures), 64):
            latents = vae_stage.encode(autoencoder, pictures[first : first + 64], "cpu")
            strength = noise * torch.rand(len(latents), 1, 1, 1, generator=random) / autoencoder.config.scaling_factor
            signal = autoencoder.decode(latents + strength * torch.randn(latents.shape, generator=random)).sample
            decoded.append(((signal.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy())
    return np.concatenate(decoded)


def disturbed(pictures: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Return pictures [B, 3, 64, 64] in [-1, 1], half of them blurred and half with noise, in another brightness."""
    count = len(pictures)
    kernel = torch.exp(-(torch.arange(-2.0, 3.0) ** 2) / (2 * (0.3 + 0.7 * torch.rand(1, generator=random)) ** 2))
    kernel = (kernel / kernel.sum())[None, None].repeat(3, 1, 1)  # [3, 1, 5]
    padded = torch.nn.functional.pad(pictures, (2, 2, 2, 2), mode="replicate")
    rows = torch.nn.functional.conv2d(padded, kernel[:, :, None], groups=3)
    blurred = torch.nn.functional.conv2d(rows, kernel[..., None], groups=3)

    def random_half() -> torch.Tensor:
        return (torch.rand(count, 1, 1, 1, generator=random) < 0.5).float()

    mixed = torch.lerp(pictures, blurred, random_half())
    noise = torch.randn(pictures.shape, generator=random) * 0.08 * torch.rand(count, 1, 1, 1, generator=random)
    shade = 1 + 0.06 * (torch.rand(count, 1, 1, 1, generator=random) - 0.5)
    tint = 0.08 * (torch.rand(count, 3, 1, 1, generator=random) - 0.5)
    return (mixed * shade + tint + noise * random_half()).clamp(-1, 1)
