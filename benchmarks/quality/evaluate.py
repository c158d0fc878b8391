"""Quality of each setting: distance to the uncached images, share of prompts obeyed, distance to rendered scenes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..schema.quality import Quality, QualityRow
from ..shapes.judge_net.reader import JudgeNet, obeyed
from ..stats import mean_of, require
from . import metrics, pictures, plan
from .external import ExternalNetworks
from .pictures import ImageTask, SettingImages
from .plan import QualitySetting

SAMPLES = 4
"""Number of prompts whose images are saved as PNG files."""

Stage = Callable[[str], None]


@dataclass(frozen=True)
class Scored:
    """The scores of a setting's images, in the order of the prompts.

    Attributes:
        psnr, ssim: similarity to the reference's image of the same prompt and seed, (N,).
        distance: perceptual distance to that image, by the judge network's features, (N,).
        right: 1 where the judge network finds the prompt obeyed in full, else 0, (N,).
        features: features of the judge network for the Fréchet distance, (N, D).
    """

    psnr: metrics.Values
    ssim: metrics.Values
    distance: metrics.Values
    right: metrics.Values
    features: metrics.Values


def evaluate(
    pipe: Any,
    task: ImageTask,
    settings: Sequence[QualitySetting],
    folder: Path,
    *,
    ratios: Mapping[str, float],
    model: str,
    external: ExternalNetworks | None = None,
    on_call: pictures.Progress = lambda count: None,
    stage: Stage = lambda text: None,
) -> Quality:
    """Generate and score the images of all settings.

    Args:
        pipe: from ``offcut.load``, of the shapes model.
        settings: settings to compare, with the uncached setting of each sampler.
        folder: directory of ``result.json``, for the images (``pictures/``) and the samples (``samples/``).
        ratios: time of a shallow call divided by that of a full call on Stable Diffusion 1.5, by cut.
        model: name of the model in the result.
        external: networks of the user for additional figures.
        on_call: called at every UNet call.
        stage: called with the name of each stage.

    Raises:
        UserError: `folder` cannot be written, or a file in it is damaged.
        MissingExtraError: torchmetrics or SciPy is missing.
    """
    require("the quality benchmark", "torchmetrics", "scipy")
    images = {}
    for setting in settings:
        stage(setting.name)
        images[setting] = pictures.make(pipe, task, setting, folder / "pictures", on_call)
    here = {cut: _ratio(cut, images) for cut in dict.fromkeys(setting.cut for setting in settings) if cut}

    net = JudgeNet.load()
    truth = pictures.render_scenes(task.prompts, task.seed)
    features = net.pooled(truth)
    scored = {}
    for setting in settings:
        stage(f"judge: {setting.name}")
        scored[setting] = score(net, task, images[setting], images[plan.reference(setting, settings)])
    stage("confidence intervals")
    rows = []
    for setting in settings:
        base = plan.reference(setting, settings)
        row = _row(setting, images[setting].timeline, scored[setting], scored[base], features, ratios, here)
        row.samples = _samples(folder, setting, images[setting])
        if external:
            uncached = None if setting == base else images[base].pictures
            row.external = external.figures(images[setting].pictures, task.prompts, uncached, truth)
        rows.append(row)
    first = next((setting.cut for setting in settings if setting.cut), plan.CUTS[0])
    return Quality(
        model=model,
        engine=pipe.unet.engine,
        guidance=task.guidance,
        images=len(task.prompts),
        shallow_over_full=ratios[first],
        shallow_over_full_here=here.get(first, float(ratios[first])),
        ratios={cut: ratios[cut] for cut in here},
        ratios_here=here,
        rows=rows,
        sample_prompts=list(task.prompts[:SAMPLES]),
    )


def score(net: JudgeNet, task: ImageTask, images: SettingImages, base: SettingImages) -> Scored:
    """Return the scores of a setting's images, compared with those of its reference."""
    own, other = images.pictures, base.pictures
    return Scored(
        psnr=metrics.psnr(own, other),
        ssim=metrics.ssim(own, other),
        distance=net.distance(own, other),
        right=obeyed(net, own, task.prompts),
        features=net.pooled(own),
    )


def _ratio(cut: str, images: Mapping[QualitySetting, SettingImages]) -> float:
    """Return this model's ratio of shallow to full call times: the median over all parts of settings with this cut."""
    pairs = [
        shallow / full
        for setting, setting_images in images.items()
        if setting.cut == cut
        for full, shallow in zip(setting_images.full, setting_images.shallow, strict=True)
    ]
    return float(np.nanmedian(pairs))


def _row(
    setting: QualitySetting,
    timeline: str,
    scored: Scored,
    base: Scored,
    features: metrics.Values,
    ratios: Mapping[str, float],
    here: Mapping[str, float],
) -> QualityRow:
    own = scored is base
    schedule = setting.parsed
    return QualityRow(
        name=setting.name,
        kind=setting.kind,
        sampler=setting.sampler,
        steps=setting.steps,
        schedule=setting.schedule,
        cut=setting.cut,
        interval=setting.interval,
        warmup=schedule.warmup if schedule else None,
        damping=setting.damping,
        full_calls=timeline.count("#"),
        shallow_calls=timeline.count("."),
        skipped_calls=timeline.count("_"),
        images=len(scored.right),
        cost=setting.cost(ratios),
        cost_here=setting.cost(here),
        psnr=None if own else mean_of(scored.psnr),
        psnr_worst=None if own else float(scored.psnr.min()),
        ssim=None if own else mean_of(scored.ssim),
        distance=None if own else mean_of(scored.distance),
        accuracy=mean_of(scored.right),
        accuracy_change=None if own else mean_of(scored.right - base.right),
        frechet=metrics.frechet(scored.features, features),
        timeline=timeline,
    )


def _samples(folder: Path, setting: QualitySetting, images: SettingImages) -> list[str]:
    """Save the first images as PNG files; return their names relative to the folder."""
    from PIL import Image

    slug = re.sub(r"[^a-z0-9]+", "-", setting.name.lower()).strip("-")
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    names = [f"samples/{slug}-{index}.png" for index in range(min(SAMPLES, len(images.pictures)))]
    for name, picture in zip(names, images.pictures, strict=False):
        Image.fromarray(picture).save(folder / name, optimize=True)
    return names
