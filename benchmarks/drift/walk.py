"""Latent smoothness: how evenly the image changes while the start noise goes from one sample to another."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ...errors import UserError
from ..schema.drift import Walk


def walk(
    pipe: Any, prompt: str, seeds: tuple[int, int], points: int, *, steps: int, guidance: float, size: int | None
) -> Walk:
    """Draw images along an interpolation, with the schedule that the pipeline's UNet has.

    Args:
        seeds: of the noise at both ends. Samplers that add noise of their own draw the same at every point.
        points: images, both ends included.

    Raises:
        UserError: the pipeline takes no start noise.
    """
    if "latents" not in inspect.signature(pipe.__call__).parameters:
        raise UserError(f"{type(pipe).__name__} takes no start noise: leave the walks out with --walks 0")
    side = pipe.unet.config["sample_size"] if size is None else size // pipe.vae_scale_factor
    shape = (1, pipe.unet.config["in_channels"], side, side)
    begin, end = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds)
    pictures = []
    for index in range(points):
        noise = between(begin, end, index / (points - 1)).to(pipe.unet.dtype)
        made = pipe(
            prompt,
            num_inference_steps=steps,
            guidance_scale=guidance,
            latents=noise,
            height=size,
            width=size,
            generator=torch.Generator().manual_seed(seeds[0]),
            output_type="np",
        )
        pictures.append(np.asarray(made.images[0], np.float64))
    return Walk(prompt=prompt, seeds=seeds, steps=distances(pictures))


def between(begin: torch.Tensor, end: torch.Tensor, share: float) -> torch.Tensor:
    """On the great circle from one noise sample to another, so that all between are as likely as these."""
    cosine = float(torch.nn.functional.cosine_similarity(begin.flatten(), end.flatten(), dim=0).clamp(-1, 1))
    angle = math.acos(cosine)
    if angle < 1e-2:
        return torch.lerp(begin, end, share)
    return (math.sin((1 - share) * angle) * begin + math.sin(share * angle) * end) / math.sin(angle)


def distances(pictures: Sequence[Any]) -> list[float]:
    """Of neighbours: root mean squares over their values."""
    pairs = itertools.pairwise(pictures)
    return [float(np.sqrt(np.mean((np.asarray(one) - np.asarray(other)) ** 2))) for one, other in pairs]
