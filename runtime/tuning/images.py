"""The images that tuning draws: three disjoint sets, and the pipeline that draws them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..generation.forecast import Forecast
from ..generation.schedule import Schedule
from ..generation.state import Run
from ..images.metrics import finite_psnr
from ..text_to_image import generate_from_prompt
from .moments import Moments

Picture = Any
"""[height, width, channels] in [0, 1]."""


@dataclass(frozen=True)
class Image:
    """One of the images to draw."""

    prompt: str
    seed: int
    guidance: float


@dataclass
class ImageSet:
    """Images, what they look like uncached, and what their generations were like.

    Attributes:
        pictures: uncached.
        latents: of each image after each step of the scheduler, uncached, fp32.
        moments: of the cached features.
    """

    images: list[Image]
    pictures: list[Picture] = field(default_factory=list)
    latents: list[list[torch.Tensor]] = field(default_factory=list)
    moments: dict[str, Moments] = field(default_factory=dict)


def three_sets(
    prompts: Sequence[str], samples: int, guidance: tuple[float, float], seed: int
) -> tuple[ImageSet, ImageSet, ImageSet]:
    """Images to fit coefficients to, to make choices on, and to report: half, a quarter, and a quarter of them.

    Seeds are different throughout, and prompts where there are three or more; each set spans the range of guidance.
    """
    select = test = max(1, samples // 4)
    low, high = guidance
    sets = []
    for index, count in enumerate((samples - select - test, select, test)):
        own = prompts[index::3] if len(prompts) >= 3 else prompts
        scales = [low + (number + 0.5) / count * (high - low) for number in range(count)]
        sets.append(
            ImageSet([Image(own[number % len(own)], seed + number, scale) for number, scale in enumerate(scales)])
        )
        seed += count
    return sets[0], sets[1], sets[2]


@dataclass(frozen=True)
class Studio:
    """A pipeline of ``offcut.load`` that draws with one schedule after another.

    Attributes:
        pipe: its scheduler is the one that is tuned for.
        steps: of the scheduler.
        size: the images' height and width in pixels; None is the model's own.
        cuts: those of the shallow calls, with their features.
    """

    pipe: Any
    steps: int
    size: int | None
    cuts: Mapping[str, tuple[str, ...]]

    @property
    def cut(self) -> str:
        """The first: of shallow calls to which their schedule gives none of their own."""
        return next(iter(self.cuts))

    @property
    def features(self) -> tuple[str, ...]:
        """Those of all cuts, each once."""
        return tuple(dict.fromkeys(name for names in self.cuts.values() for name in names))

    def draw(
        self,
        image: Image,
        schedule: Schedule | None = None,
        forecast: Forecast | None = None,
        *,
        cut: str | None = None,
        steps: int | None = None,
        output: str = "np",
    ) -> Picture:
        """One picture, or with ``output="latent"`` its latent [1, channels, height, width].

        Args:
            cut: other than the first.
            steps: other than the studio's own.
        """
        self.pipe.unet.set_schedule(schedule, (cut or self.cut) if schedule else None, forecast)
        made = generate_from_prompt(
            self.pipe,
            image.prompt,
            steps=steps or self.steps,
            guidance=image.guidance,
            seed=image.seed,
            size=self.size,
            output=output,
        )
        return made.images if output == "latent" else made.images[0]

    @property
    def run(self) -> Run:
        """What the last picture's UNet calls were."""
        run: Run = self.pipe.unet.last_run
        return run

    def psnr(
        self, on: ImageSet, schedule: Schedule | None, forecast: Forecast | None = None, *, steps: int | None = None
    ) -> tuple[float, ...]:
        """PSNR of each image of a set to its uncached picture, in dB."""
        return tuple(
            finite_psnr(self.draw(image, schedule, forecast, steps=steps), whole, peak=1.0)
            for image, whole in zip(on.images, on.pictures, strict=True)
        )
