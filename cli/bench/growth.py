"""``offcut bench growth``: how time and memory grow with the work and with the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ..options import BundleArgument, Device, Json, Threads, unpack
from ..shell import err, stages
from .outcome import BenchRun

_PACKAGES = ("torch", "diffusers", "transformers", "onnx", "onnxruntime", "openvino", "offcut")


@dataclass(frozen=True)
class SweepOptions:
    """The values of each sweep."""

    all_steps: Annotated[
        str | None, typer.Option("--all-steps", metavar="LIST", help="N, 2N and 4N for the interval N by default.")
    ] = None
    all_images: Annotated[str, typer.Option("--all-images", metavar="LIST", help="Numbers of images of one call.")] = (
        "1,2,4"
    )
    all_sides: Annotated[
        str | None,
        typer.Option(
            "--all-sides", metavar="LIST", help="Sides of square images; 1/2, 1 and 3/2 of the base's by default."
        ),
    ] = None
    all_intervals: Annotated[
        str, typer.Option("--all-intervals", metavar="LIST", help="Caching intervals; 1 is uncached.")
    ] = "1,2,3,5,10"


@dataclass(frozen=True)
class BaseOptions:
    """The setting that all sweeps have in common."""

    engine: Annotated[str | None, typer.Option(help="Engine of the bundle; its first by default.")] = None
    precision: Annotated[
        str | None, typer.Option(help="Precision in which the engine computes; the first build's by default.")
    ] = None
    steps: Annotated[int, typer.Option(help="Steps of the scheduler.", min=2)] = 10
    interval: Annotated[int, typer.Option(help="Full UNet every N calls. Costs quality.", min=2)] = 5
    cut: Annotated[str | None, typer.Option(help="Cut of the bundle; its first by default.")] = None
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 switches guidance off.")] = 7.5
    size: Annotated[int | None, typer.Option(help="Side of the image in pixels; the model's own by default.")] = None
    images: Annotated[int, typer.Option(help="Images of one pipeline call.", min=1)] = 1
    device: Device = "cpu"
    threads: Threads = None


@dataclass(frozen=True)
class BuildOptions:
    """Exports and builds that are measured too."""

    build: Annotated[
        tuple[str, ...],
        typer.Option(
            metavar="MODEL",
            help="Also export and build this model: a diffusers directory, shapes (the bundled one), or sd15, sdxl or "
            "svd with random weights; repeatable.",
        ),
    ] = ()
    build_engine: Annotated[str, typer.Option(help="Engine that the models are built for.")] = "onnxruntime"
    build_precision: Annotated[str, typer.Option(help="Precision of the exported graphs.")] = "fp32"


@unpack
def growth(
    bundle: BundleArgument,
    sweeps: Annotated[SweepOptions, "Sweeps: lists such as 1,2,4; none leaves one out"],
    base: Annotated[BaseOptions, "Setting that all sweeps have in common"],
    builds: Annotated[BuildOptions, "Exports and builds"],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Directory of result.json and the processes' log.")
    ] = Path("bench-growth"),
    iterations: Annotated[int, typer.Option(help="Measured loops of each setting.", min=1)] = 3,
    as_json: Json = False,
) -> None:
    """Measure how latency and memory grow with steps, images, pixels and interval, and builds with the model.

    Every setting runs in a process of its own, so that its peak memory is its own. Exponents are of power laws.
    """
    from ...benchmarks.growth.builds import build_all, laws
    from ...benchmarks.growth.sweeps import SweepValues, grow
    from ...benchmarks.latency.case import LatencyRequest
    from ...benchmarks.latency.loop import vae_scale
    from ...benchmarks.latency.rounds import RoundOptions
    from ...engines.bundle.bundle import Bundle
    from ...engines.profiles import trained_side
    from ...errors import UserError

    opened = Bundle.open(bundle)
    side = base.size or trained_side(opened.unet_config.get("sample_size"), vae_scale(opened))
    n = base.interval
    values = SweepValues(
        steps=_numbers("--all-steps", sweeps.all_steps or f"{n},{2 * n},{4 * n}"),
        images=_numbers("--all-images", sweeps.all_images),
        sides=_numbers("--all-sides", sweeps.all_sides or f"{side // 2},{side},{side * 3 // 2}"),
        intervals=_numbers("--all-intervals", sweeps.all_intervals),
    )
    same = {name: getattr(base, name) for name in ("steps", "guidance", "images", "cut", "threads", "device")}
    request = LatencyRequest(
        engines=(base.engine or opened.engines[0],), height=side, width=side, schedule=f"uniform:{n}", **same
    )
    bench = BenchRun(_PACKAGES)
    log = output / "processes.log"
    try:
        output.mkdir(parents=True, exist_ok=True)
        log.write_bytes(b"")
    except OSError as error:
        raise UserError(f"cannot write {log}: {error.strerror}; give another directory with -o") from error
    with stages() as stage:
        options = RoundOptions(log, iterations, alone=0, products=False, progress=stage)
        measured = grow(opened, request, values, options, base.precision)
        made, failed = build_all(builds.build, builds.build_engine, builds.build_precision, log, stage)
    measured = measured.model_copy(
        update={
            "made": made,
            "made_fits": laws(made),
            "made_with": f"{builds.build_engine}, {builds.build_precision}" if builds.build else "",
            "not_made": failed,
        }
    )
    bench.finish(output, f"Growth of {bundle.name}", as_json, growth=measured)
    for model, reason in failed.items():
        err.print(f"[bold red]error[/]: {model} was not built: {reason}", highlight=False)
    if failed:
        raise typer.Exit(1)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    if text == "none":
        return ()
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise typer.BadParameter(f"{text!r} is not a list such as 1,2,4, nor none", param_hint=option)
    return numbers
