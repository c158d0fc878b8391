"""Scores of each image of a setting."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..shapes import judge
from ..shapes.judge_net.reader import JudgeNet, obeyed
from . import metrics
from .pictures import ImageTask, SettingImages

RULED = 200
"""Number of a setting's images that the rule-based judge judges too: it is slow, and checks the network."""


@dataclass(frozen=True)
class Scored:
    """One value for each image, in the prompts' order.

    Attributes:
        psnr, ssim, distance: to the reference's image of the same prompt and seed, (N,); the distance is perceptual, of
            the judge network's features.
        right: 1 where the prompt was obeyed in full, by the judge network, (N,).
        right_by_rules: the same by the rule-based judge, for the first `RULED` images.
        features: of the judge network, for the Fréchet distance, (N, D).
    """

    psnr: metrics.Values
    ssim: metrics.Values
    distance: metrics.Values
    right: metrics.Values
    right_by_rules: metrics.Values
    features: metrics.Values


def score(net: JudgeNet, task: ImageTask, made: SettingImages, base: SettingImages) -> Scored:
    """Return the scores of a setting's images, compared with those of its reference."""
    own, other = made.pictures, base.pictures
    ruled = [judge.judge(picture, text) for picture, text in zip(own[:RULED], task.prompts, strict=False)]
    return Scored(
        psnr=metrics.psnr(own, other),
        ssim=metrics.ssim(own, other),
        distance=net.distance(own, other),
        right=obeyed(net, own, task.prompts),
        right_by_rules=np.array([verdict.right for verdict in ruled], dtype=np.float64),
        features=net.pooled(own),
    )
