"""``offcut demo``: the bundled shapes model, uncached, cached, and cached with a forecast, as a table and a picture."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..generation.forecast import Extrapolate
from ..generation.schedule import Uniform
from .generate import Generated, generate, warm_up
from .image_files import check_suffix, replaced_when_done, save
from .metrics import psnr
from .picture import Tile, sheet
from .request import ImageRequest

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class DemoSetting:
    """Caching settings that the demo compares with uncached images.

    Attributes:
        interval: interval of the full calls; 1 is uncached.
        damping: damping of the features' forecast; None reuses the features.
    """

    interval: int
    damping: float | None = None

    def __str__(self) -> str:
        return f"interval {self.interval}" + ("" if self.damping is None else ", forecast")


SETTINGS = (DemoSetting(3), DemoSetting(5), DemoSetting(3, 1.0), DemoSetting(5, 1.0))


@dataclass(frozen=True)
class DemoRow:
    """One setting's row of the table, over all prompts.

    Attributes:
        interval: interval of the full calls; 1 is uncached.
        damping: damping of the features' forecast; None reuses the features.
        full_calls: number of full calls of one image.
        calls: number of all UNet calls of one image.
        seconds: median time of one image.
        unet_seconds: median time of one image in the engine.
        speed_up: ratio of the uncached time to this setting's time; median over the prompts.
        unet_speed_up: the same for the engine's time alone.
        psnr: mean PSNR to the uncached image of the same seed in dB; None for the uncached images themselves.
        psnr_worst: lowest PSNR in dB.
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
    """Result of the demo: the rows of the table, and the file of the picture."""

    rows: tuple[DemoRow, ...]
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
    settings: Sequence[DemoSetting] = SETTINGS,
    warmup: int = 2,
    guidance: float = 3.0,
    seed: int = 0,
    on_step: Callable[[], None] = lambda: None,
) -> Demo:
    """Generate every prompt uncached and with each setting, in turn, and write one picture of all images.

    Args:
        pipe: a pipeline of ``offcut.load``.
        prompts: prompts, one for each row of the picture.
        picture: PNG file to write.
        warmup: number of first calls that are always full.
    """
    check_suffix(picture, video=False)
    with replaced_when_done(picture) as file:
        rows, image = _compare_settings(pipe, prompts, steps, settings, warmup, guidance, seed, on_step)
        save([image], file, fps=1, suffix=picture.suffix)
    return Demo(rows, picture, tuple(prompts), steps, warmup, pipe.unet.engine)


def _compare_settings(
    pipe: Any,
    prompts: Sequence[str],
    steps: int,
    settings: Sequence[DemoSetting],
    warmup: int,
    guidance: float,
    seed: int,
    on_step: Callable[[], None],
) -> tuple[tuple[DemoRow, ...], Image]:
    """Return the rows of the table, and the picture of all images."""
    warm_up(pipe, ImageRequest(prompts[0], guidance=guidance))
    results: list[list[Generated]] = []
    for prompt in prompts:
        request = ImageRequest(prompt, steps=steps, guidance=guidance, seed=seed)
        images = [generate(pipe, request, None, on_step=on_step)]
        for setting in settings:
            forecast = None if setting.damping is None else Extrapolate(setting.damping)
            schedule = Uniform(setting.interval, warmup=warmup)
            images.append(generate(pipe, request, schedule, on_step=on_step, forecast=forecast))
        results.append(images)

    rows = tuple(
        _row(setting, [row[column] for row in results], [row[0] for row in results])
        for column, setting in enumerate([DemoSetting(1), *settings])
    )
    tiles = [(prompt, _tiles(images, settings)) for prompt, images in zip(prompts, results, strict=True)]
    return rows, sheet(tiles)


def _row(setting: DemoSetting, images: Sequence[Generated], uncached: Sequence[Generated]) -> DemoRow:
    pairs = list(zip(uncached, images, strict=True))
    psnrs = None if setting.interval == 1 else [psnr(base.image, other.image) for base, other in pairs]
    return DemoRow(
        interval=setting.interval,
        damping=setting.damping,
        full_calls=len(images[0].run.full_calls),
        calls=len(images[0].run.full),
        seconds=statistics.median(image.seconds for image in images),
        unet_seconds=statistics.median(sum(image.run.seconds) for image in images),
        speed_up=statistics.median(base.seconds / other.seconds for base, other in pairs),
        unet_speed_up=statistics.median(sum(base.run.seconds) / sum(other.run.seconds) for base, other in pairs),
        psnr=None if psnrs is None else statistics.fmean(psnrs),
        psnr_worst=None if psnrs is None else min(psnrs),
    )


def _tiles(images: Sequence[Generated], settings: Sequence[DemoSetting]) -> list[Tile]:
    uncached = images[0]
    tiles = [Tile(uncached.image, "every call full", f"{uncached.seconds:.2f} s", uncached.run)]
    for setting, other in zip(settings, images[1:], strict=True):
        speed_up = uncached.seconds / other.seconds
        note = f"{other.seconds:.2f} s   {speed_up:.2f}x   {psnr(uncached.image, other.image):.1f} dB"
        tiles.append(Tile(other.image, str(setting), note, other.run))
    return tiles
