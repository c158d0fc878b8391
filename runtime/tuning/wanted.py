"""What to tune for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...errors import UserError


@dataclass(frozen=True)
class Target:
    """What the schedule should reach; exactly one of them.

    Attributes:
        speed_up: of the UNet's calls, over uncached.
        seconds: of a whole pipeline call of one image, on this machine.
        psnr: mean, in dB, to the uncached images; the fastest schedule that reaches it.
    """

    speed_up: float | None = None
    seconds: float | None = None
    psnr: float | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.speed_up, self.seconds, self.psnr) if value is not None]
        if len(given) != 1 or given[0] <= 0:
            raise UserError("give one target above 0: a speed-up, seconds, or a PSNR")


@dataclass(frozen=True)
class Wanted:
    """What to tune for.

    Attributes:
        target: what to reach.
        steps: of the pipeline's scheduler.
        guidance: the range of scales, from which the images' are drawn.
        samples: images in all: half to fit, a quarter each to select and to test.
        prompts: drawn in turn; each set has its own where there are three or more.
        cuts: of the shallow calls, each of which gets one of them; none for the bundle's first.
        skip: whether calls may run no engine at all, where a correction of the answers makes up for it.
        ratios: a shallow call's time over a full one's, for each of the cuts, to tune for instead of this engine's
            here: another machine's, or a larger model's; empty to measure it.
        size: the images' height and width in pixels; None is the model's own.
        longest: calls from one full call to the next, at most.
        probes: calls whose influence on the image is measured.
        positions: of a feature that are kept of each call.
        seed: of the first image.
        pareto: also measure so many schedules from fast to slow; 0 for none.
    """

    target: Target
    steps: int = 50
    guidance: tuple[float, float] = (7.5, 7.5)
    samples: int = 32
    prompts: tuple[str, ...] = ()
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
        for name, least in (("steps", 4), ("samples", 4), ("longest", 2), ("probes", 1), ("positions", 16)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}, and tuning needs at least {least}")
        if not self.prompts:
            raise UserError("there is no prompt to draw: give at least one")
        for cut, ratio in self.ratios.items():
            if not 0 < ratio <= 1:
                raise UserError(
                    f"the ratio of {cut} is {ratio:g}: a shallow call takes more than none and at most all of a full "
                    "call's time, e.g. 0.1"
                )
        if self.ratios and self.target.seconds is not None:
            raise UserError("a latency is this machine's: leave the ratio out, or give a speed-up as the target")
