"""What is known of each picture of a setting."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..shapes import judge
from ..shapes.judge_net.reader import JudgeNet, obeyed
from . import metrics
from .pictures import ImageTask, SettingImages

RULED = 200
"""Pictures of a setting that the rules judge as well: a slow judge, to hold the network's against."""


@dataclass(frozen=True)
class Scored:
    """One value for each picture, in the prompts' order.

    Attributes:
        psnr, ssim, distance: against the reference's picture of the same prompt and seed, (N,); the distance is
            perceptual, by the judge network's features.
        right: 1 where the prompt was obeyed in full, by the judge network, (N,).
        right_by_rules: the same by the rule-based judge, of the first `RULED` pictures.
        features: the judge network's for the Fréchet distance, (N, D).
    """

    psnr: metrics.Values
    ssim: metrics.Values
    distance: metrics.Values
    right: metrics.Values
    right_by_rules: metrics.Values
    features: metrics.Values


def score(net: JudgeNet, task: ImageTask, made: SettingImages, base: SettingImages) -> Scored:
    """Judges a setting's pictures, by themselves and beside those of its reference."""
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
