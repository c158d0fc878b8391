"""The images that tuning generates: fit, selection and test sets, and the pipelines that generate them.

A second pipeline may be the reference: another engine of the same model, e.g. in fp32 if the tuned engine is in int8.
If predictions are fitted to the reference's features, they also correct the mean error of the tuned engine. This costs
no time, as one scale, slope and shift for each channel express both. CacheQuant (CVPR 2025) fits the two corrections
one after the other and without a slope; here they are fitted together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ...errors import UserError
from ..generation.forecast import Forecast
from ..generation.schedule import Schedule
from ..generation.state import Run
from ..images.metrics import finite_psnr
from ..pipeline import load
from ..text_to_image import generate_from_prompt
from ..unet import UNet
from .prediction import FeatureMoments

if TYPE_CHECKING:
    from ...engines.bundle.bundle import Bundle

Pixels = Any
"""Array [height, width, channels] in [0, 1]."""

_PRECISIONS = ("fp32", "bf16", "fp16")
"""Precisions of a reference, the highest first."""


@dataclass(frozen=True)
class TuningImage:
    """Parameters of one image."""

    prompt: str
    seed: int
    guidance: float


@dataclass
class ImageSet:
    """Fit, selection or test set: images, with records of their uncached generations.

    Attributes:
        images: parameters of each image.
        uncached: pixels of each uncached image.
        latents: for each image the latent after each step of the scheduler, fp32.
        moments: moments of each cached feature.
    """

    images: list[TuningImage]
    uncached: list[Pixels] = field(default_factory=list)
    latents: list[list[torch.Tensor]] = field(default_factory=list)
    moments: dict[str, FeatureMoments] = field(default_factory=dict)


def split_images(
    prompts: Sequence[str], samples: int, guidance: tuple[float, float], seed: int
) -> tuple[ImageSet, ImageSet, ImageSet]:
    """Return the fit, selection and test sets: half, a quarter and a quarter of the images.

    No two images have the same seed. If there are three or more prompts, no two sets share a prompt. Each set spans the
    range of guidance.
    """
    select = test = max(1, samples // 4)
    low, high = guidance
    sets = []
    for index, count in enumerate((samples - select - test, select, test)):
        set_prompts = prompts[index::3] if len(prompts) >= 3 else prompts
        scales = [low + (number + 0.5) / count * (high - low) for number in range(count)]
        sets.append(
            ImageSet(
                [
                    TuningImage(set_prompts[number % len(set_prompts)], seed + number, scale)
                    for number, scale in enumerate(scales)
                ]
            )
        )
        seed += count
    return sets[0], sets[1], sets[2]


@dataclass(frozen=True)
class TuningPipeline:
    """A pipeline of ``offcut.load`` that generates images with different schedules.

    Attributes:
        pipe: the pipeline, with the scheduler to tune for.
        steps: number of scheduler steps.
        size: height and width of the images in pixels; None for the model's own.
        cuts: names of the features of each cut that shallow calls may have.
    """

    pipe: Any
    steps: int
    size: int | None
    cuts: Mapping[str, tuple[str, ...]]

    @property
    def cut(self) -> str:
        """The first cut, which shallow calls have unless their schedule names another."""
        return next(iter(self.cuts))

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the features of all cuts, without repetition."""
        return tuple(dict.fromkeys(name for names in self.cuts.values() for name in names))

    def generate(
        self,
        image: TuningImage,
        schedule: Schedule | None = None,
        forecast: Forecast | None = None,
        *,
        cut: str | None = None,
        steps: int | None = None,
        output: str = "np",
    ) -> Pixels:
        """Return the pixels of an image, or with ``output="latent"`` its latent [1, channels, height, width].

        Args:
            image: parameters of the image.
            schedule: schedule of the calls; None for an uncached image.
            forecast: forecast of the cached features.
            cut: cut of the shallow calls; None for the first one.
            steps: number of steps; None for ``self.steps``.
            output: ``output_type`` of the pipeline.
        """
        self.pipe.unet.set_schedule(schedule, (cut or self.cut) if schedule else None, forecast)
        result = generate_from_prompt(
            self.pipe,
            image.prompt,
            steps=steps or self.steps,
            guidance=image.guidance,
            seed=image.seed,
            size=self.size,
            output=output,
        )
        return result.images if output == "latent" else result.images[0]

    @property
    def last_run(self) -> Run:
        """UNet calls of the last image."""
        run: Run = self.pipe.unet.last_run
        return run

    def psnr(
        self, images: ImageSet, schedule: Schedule | None, forecast: Forecast | None = None, *, steps: int | None = None
    ) -> tuple[float, ...]:
        """Generate the images of a set, and return each image's PSNR to its uncached image in dB."""
        return tuple(
            finite_psnr(self.generate(image, schedule, forecast, steps=steps), uncached, peak=1.0)
            for image, uncached in zip(images.images, images.uncached, strict=True)
        )


def reference_pipeline(tuned: TuningPipeline, pipe: Any) -> TuningPipeline:
    """Return the pipeline of the reference, for the same images as the tuned one.

    Args:
        tuned: the pipeline that is tuned.
        pipe: the reference's pipeline, from ``offcut.load``; gets a scheduler of the same class and configuration.

    Raises:
        UserError: the cached features of the reference differ at one of the cuts.
    """
    unet = pipe.unet
    for cut, features in tuned.cuts.items():
        if unet.cut_features.get(cut) != features:
            raise UserError(f"the reference has no cut {cut} with the same features: build it with --cut {cut}")
    pipe.scheduler = type(tuned.pipe.scheduler).from_config(tuned.pipe.scheduler.config)
    unet.advise = False
    unet.set_schedule(None)
    return TuningPipeline(pipe, tuned.steps, tuned.size, tuned.cuts)


def load_reference(bundle: Bundle, tuned: Bundle, unet: UNet, *, device: str, threads: int | None) -> Any:
    """Load a bundle as the reference: with the tuned UNet's engine, in the highest precision that the bundle has.

    Args:
        bundle: bundle of the reference; may be the tuned bundle.
        tuned: bundle that is tuned.
        unet: UNet that is tuned.
        device: device of the engine.
        threads: number of threads of a CPU engine.

    Raises:
        UserError: the bundle has other weights, or no build in higher precision.
    """
    if bundle.manifest.source.weights_digest != tuned.manifest.source.weights_digest:
        raise UserError(f"{bundle.path} was built from other weights than {tuned.path}: give one of the same model")
    higher = _PRECISIONS[: _PRECISIONS.index(unet.precision)] if unet.precision in _PRECISIONS else _PRECISIONS
    entries = [entry for entry in bundle.manifest.engines.values() if entry.engine == unet.engine]
    available = {bundle.precision_of(entry) for entry in entries}
    highest = next((precision for precision in higher if precision in available), None)
    if highest is None:
        raise UserError(
            f"{bundle.path} has no build of {unet.engine} in higher precision than {unet.precision}: add one with "
            f"offcut build --engine {unet.engine} --precision fp32"
        )
    return load(bundle, unet.engine, device=device, inference_precision=highest, threads=threads)


def engine_label(unet: UNet) -> str:
    """Return the engine and the precision of a UNet, e.g. ``openvino fp32``."""
    return f"{unet.engine} {unet.precision or ''}".strip()
