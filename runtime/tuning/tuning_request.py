"""Target and settings of ``offcut tune``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...errors import UserError


@dataclass(frozen=True)
class TuningRequest:
    """Target and settings of a search for a schedule, with exactly one of three targets.

    Attributes:
        speed_up: target speed-up of the UNet over uncached.
        seconds: target duration of a pipeline call for one image, on this machine.
        psnr: target mean PSNR to the uncached images in dB; the fastest schedule that reaches it is chosen.
        steps: number of scheduler steps.
        guidance: lowest and highest guidance scale; the images are spread over this range.
        samples: number of images: half to fit, a quarter each to select and to test.
        prompts: prompts of the images, used in turn. With three or more, the image sets share no prompt. None for the
            bundle's prompts.
        cuts: cuts that shallow calls may have; empty for the bundle's first cut.
        skip: whether calls may be skipped (run no engine) if the corrected images are better.
        ratios: time of a shallow call divided by a full call's, for each cut, to tune for another machine or a larger
            model. Empty to measure the ratios.
        size: height and width of the images in pixels; None for the model's own.
        longest: largest number of calls from one full call to the next.
        probes: number of calls whose influence on the image is measured.
        positions: largest number of positions of a feature that are recorded at each call.
        seed: seed of the first image.
        pareto: number of schedules, from fast to slow, to measure in addition.

    Raises:
        UserError: a value is out of range, or there is not exactly one target.
    """

    speed_up: float | None = None
    seconds: float | None = None
    psnr: float | None = None
    steps: int = 50
    guidance: tuple[float, float] = (7.5, 7.5)
    samples: int = 32
    prompts: tuple[str, ...] | None = None
    cuts: tuple[str, ...] = ()
    skip: bool = True
    ratios: Mapping[str, float] = field(default_factory=dict)
    size: int | None = None
    longest: int = 20
    probes: int = 8
    positions: int = 1024
    seed: int = 0
    pareto: int = 0

    def __post_init__(self) -> None:
        targets = [target for target in (self.speed_up, self.seconds, self.psnr) if target is not None]
        if len(targets) != 1 or targets[0] <= 0:
            raise UserError("give one target above 0: a speed-up, seconds, or a PSNR")
        for name, minimum in (("steps", 4), ("samples", 4), ("longest", 2), ("probes", 1), ("positions", 16)):
            if getattr(self, name) < minimum:
                raise UserError(f"{name} is {getattr(self, name)}, but tuning needs at least {minimum}")
        if self.prompts is not None and not self.prompts:
            raise UserError("there is no prompt for the images: give at least one")
        for cut, ratio in self.ratios.items():
            if not 0 < ratio <= 1:
                raise UserError(
                    f"the ratio of {cut} is {ratio:g}: give the time of a shallow call divided by a full call's, "
                    "above 0 and at most 1, e.g. 0.1"
                )
        if self.ratios and self.seconds is not None:
            raise UserError(
                "a latency target holds for this machine only: leave the ratio out, or give a speed-up as the target"
            )
