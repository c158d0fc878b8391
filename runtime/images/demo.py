"""``offcut demo``: the bundled shapes model, uncached, cached, and cached with a forecast, as a table and a picture."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..generation.forecast import Extrapolate
from ..generation.schedule import Uniform
from .generate import Generated, generate, warm_up
from .metrics import psnr
from .picture import Tile, sheet
from .request import ImageRequest


@dataclass(frozen=True)
class Way:
    """How to save calls: every ``interval``-th is full; ``damping`` of the features' forecast, None to reuse them."""

    interval: int
    damping: float | None = None

    def __str__(self) -> str:
        return f"interval {self.interval}" + ("" if self.damping is None else ", forecast")


WAYS = (Way(3), Way(5), Way(3, 1.0), Way(5, 1.0))


@dataclass(frozen=True)
class Row:
    """One line of the table, over all prompts.

    Attributes:
        interval: 1 is uncached.
        damping: of the cached features' forecast; None where they are reused.
        full_calls, calls: UNet calls of one image.
        seconds: of one image, median.
        unet_seconds: of those, spent in the engine.
        speed_up: against the uncached run, median over prompts of the ratios within a prompt.
        unet_speed_up: the same for the engine's seconds alone.
        psnr: against the uncached image of the same seed, mean in dB; None for the uncached run itself.
        psnr_worst: the lowest.
    """

    interval: int
    damping: float | None
    full_calls: int
    calls: int
    seconds: float
    unet_seconds: float
    speed_up: float
    unet_speed_up: float
    psnr: float | None
    psnr_worst: float | None


@dataclass(frozen=True)
class Demo:
    """The table, and where the picture is."""

    rows: tuple[Row, ...]
    picture: Path
    prompts: tuple[str, ...]
    steps: int
    warmup: int
    engine: str


def demo(
    pipe: Any,
    prompts: Sequence[str],
    picture: Path,
    *,
    steps: int = 50,
    ways: Sequence[Way] = WAYS,
    warmup: int = 2,
    guidance: float = 3.0,
    seed: int = 0,
    on_step: Callable[[], None] = lambda: None,
) -> Demo:
    """Generate every prompt uncached and in each of the ways, in turn, and write one picture of all.

    Args:
        pipe: from ``offcut.load``.
        prompts: a row of the picture each.
        picture: the PNG to write.
        warmup: first calls that are always full.
    """
    warm_up(pipe, ImageRequest(prompts[0], guidance=guidance))
    results: list[list[Generated]] = []
    for prompt in prompts:
        request = ImageRequest(prompt, steps=steps, guidance=guidance, seed=seed)
        made = [generate(pipe, request, None, on_step=on_step)]
        for way in ways:
            forecast = None if way.damping is None else Extrapolate(way.damping)
            schedule = Uniform(way.interval, warmup=warmup)
            made.append(generate(pipe, request, schedule, on_step=on_step, forecast=forecast))
        results.append(made)

    rows = tuple(
        _row(way, [row[column] for row in results], [row[0] for row in results])
        for column, way in enumerate([Way(1), *ways])
    )
    sheet([(prompt, _tiles(images, ways)) for prompt, images in zip(prompts, results, strict=True)]).save(picture)
    return Demo(rows, picture, tuple(prompts), steps, warmup, pipe.unet.engine)


def _row(way: Way, images: Sequence[Generated], uncached: Sequence[Generated]) -> Row:
    pairs = list(zip(uncached, images, strict=True))
    noise = None if way.interval == 1 else [psnr(base.image, other.image) for base, other in pairs]
    return Row(
        interval=way.interval,
        damping=way.damping,
        full_calls=len(images[0].run.full_calls),
        calls=len(images[0].run.full),
        seconds=statistics.median(image.seconds for image in images),
        unet_seconds=statistics.median(sum(image.run.seconds) for image in images),
        speed_up=statistics.median(base.seconds / other.seconds for base, other in pairs),
        unet_speed_up=statistics.median(sum(base.run.seconds) / sum(other.run.seconds) for base, other in pairs),
        psnr=None if noise is None else statistics.fmean(noise),
        psnr_worst=None if noise is None else min(noise),
    )


def _tiles(images: Sequence[Generated], ways: Sequence[Way]) -> list[Tile]:
    uncached = images[0]
    tiles = [Tile(uncached.image, "every call full", f"{uncached.seconds:.2f} s", uncached.run)]
    for way, other in zip(ways, images[1:], strict=True):
        speed_up = uncached.seconds / other.seconds
        note = f"{other.seconds:.2f} s   {speed_up:.2f}x   {psnr(uncached.image, other.image):.1f} dB"
        tiles.append(Tile(other.image, str(way), note, other.run))
    return tiles
