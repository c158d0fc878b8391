"""``offcut run``: one image to a file, beside the uncached one if asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..runtime.schedule import Schedule
from .generate import Generated, Request, generate, psnr, warm_up
from .picture import Tile, difference, sheet

_GAIN = 4.0


def generate_to_file(
    pipe: Any,
    request: Request,
    schedule: Schedule | None,
    cut: str | None,
    output: Path,
    *,
    compare: bool = False,
    on_step: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Generate an image and write it; with ``compare`` the picture shows uncached, cached and difference.

    Returns:
        The figures of the run: calls, seconds, and beside the uncached run speed-up and PSNR in dB.

    Raises:
        UserError: the picture cannot be written; found out before anything is generated.
    """
    try:
        with output.open("ab"):
            pass
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}; give another path with -o") from error
    if compare:
        warm_up(pipe, request, cut)
    uncached = generate(pipe, request, None, cut, on_step) if compare else None
    cached = generate(pipe, request, schedule, cut, on_step)
    report: dict[str, Any] = {
        "output": str(output),
        "engine": pipe.unet.engine,
        "schedule": None if schedule is None else str(schedule),
        "cut": cached.run.cut,
        "steps": request.steps,
        "seed": request.seed,
        "calls": len(cached.run.full),
        "full_calls": len(cached.run.full_calls),
        "shallow_calls": len(cached.run.full) - len(cached.run.full_calls),
        "timeline": cached.run.timeline,
        "seconds": cached.seconds,
        "unet_seconds": sum(cached.run.seconds),
    }
    if uncached is None:
        cached.image.save(output, format="PNG")
        return report
    report |= {
        "uncached_seconds": uncached.seconds,
        "uncached_unet_seconds": sum(uncached.run.seconds),
        "speed_up": uncached.seconds / cached.seconds,
        "psnr": psnr(uncached.image, cached.image),
    }
    _picture(request.prompt, uncached, cached, report).save(output, format="PNG")
    return report


def _picture(prompt: str, uncached: Generated, cached: Generated, report: dict[str, Any]) -> Any:
    apart = difference(uncached.image, cached.image, _GAIN)
    tiles = [
        Tile(uncached.image, "every call full", f"{uncached.seconds:.2f} s", uncached.run),
        Tile(cached.image, str(report["schedule"]), f"{cached.seconds:.2f} s   {report['speed_up']:.2f}x", cached.run),
        Tile(apart, f"difference x{_GAIN:g}", f"PSNR {report['psnr']:.1f} dB"),
    ]
    return sheet([(prompt, tiles)])
