"""``offcut run``: generate an image or a video into a file, alone or next to the uncached one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..generation.forecast import Forecast
from ..generation.schedule import Schedule
from .generate import Generated, generate, warm_up
from .image_files import check_suffix, replaced_when_done, save
from .metrics import psnr_of_frames
from .picture import Tile, difference, sheet
from .request import ImageRequest, check_request, makes_videos

_GAIN = 4.0


def generate_to_file(
    pipe: Any,
    request: ImageRequest,
    schedule: Schedule | None,
    cut: str | None,
    output: Path,
    *,
    compare: bool = False,
    fps: float = 8.0,
    on_step: Callable[[], None] = lambda: None,
    forecast: Forecast | None = None,
    reuse_guidance: bool = False,
) -> dict[str, Any]:
    """Generate an image or a video and write it to a file.

    Args:
        schedule, cut, forecast, reuse_guidance: as in ``UNet.set_schedule``.
        compare: also generate without caching, and write a picture of uncached, cached and difference.
        fps: frame rate of a video in frames per second.
        on_step: called after each step of the scheduler.

    Returns:
        The figures of the run: calls and seconds; with ``compare`` also speed-up and PSNR in dB.

    Raises:
        UserError: the request does not fit the pipeline, or the file cannot be written; raised before anything is
            generated.
    """
    check_request(pipe, request)
    check_suffix(output, video=makes_videos(pipe))
    with replaced_when_done(output) as file:
        pictures, report = _generate(
            pipe, request, schedule, cut, forecast, reuse_guidance, compare=compare, on_step=on_step
        )
        save(pictures, file, fps, output.suffix)
    return {"output": str(output), **report}


def _generate(
    pipe: Any,
    request: ImageRequest,
    schedule: Schedule | None,
    cut: str | None,
    forecast: Forecast | None,
    reuse_guidance: bool,
    *,
    compare: bool,
    on_step: Callable[[], None],
) -> tuple[Sequence[Any], dict[str, Any]]:
    """Return the pictures to write, and the figures of the run."""
    if compare:
        warm_up(pipe, request, cut)
    uncached = generate(pipe, request, None, cut, on_step) if compare else None
    cached = generate(pipe, request, schedule, cut, on_step, forecast, reuse_guidance)
    report: dict[str, Any] = {
        "engine": pipe.unet.engine,
        "schedule": None if schedule is None else str(schedule),
        "forecast": None if schedule is None or forecast is None else str(forecast),
        "reuse_guidance": reuse_guidance,
        "cut": cached.run.cut,
        "steps": request.steps,
        "seed": request.seed,
        "frames": len(cached.pictures),
        "calls": len(cached.run.full),
        "full_calls": len(cached.run.full_calls),
        "shallow_calls": cached.run.timeline.count("."),
        "skipped_calls": cached.run.timeline.count("_"),
        "timeline": cached.run.timeline,
        "seconds": cached.seconds,
        "unet_seconds": sum(cached.run.seconds),
    }
    if uncached is None:
        return cached.pictures, report
    report |= {
        "uncached_seconds": uncached.seconds,
        "uncached_unet_seconds": sum(uncached.run.seconds),
        "speed_up": uncached.seconds / cached.seconds,
        "psnr": psnr_of_frames(uncached.pictures, cached.pictures),
    }
    title = request.prompt or str(request.image)
    frames = range(len(cached.pictures))
    return [_comparison(title, uncached, cached, report, frame) for frame in frames], report


def _comparison(title: str, uncached: Generated, cached: Generated, report: dict[str, Any], frame: int) -> Any:
    before, after = uncached.pictures[frame], cached.pictures[frame]
    change = difference(before, after, _GAIN)
    tiles = [
        Tile(before, "every call full", f"{uncached.seconds:.2f} s", uncached.run),
        Tile(after, str(report["schedule"]), f"{cached.seconds:.2f} s   {report['speed_up']:.2f}x", cached.run),
        Tile(change, f"difference x{_GAIN:g}", f"PSNR {report['psnr']:.1f} dB"),
    ]
    return sheet([(title, tiles)])
