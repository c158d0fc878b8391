"""``offcut bench growth``: how time and memory grow with the work and with the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..options import BundleArgument, Device, Json, Threads
from ..shell import err, stages
from .outcome import BenchRun

_PACKAGES = ("torch", "diffusers", "transformers", "onnx", "onnxruntime", "openvino", "offcut")
_SWEEPS = {"rich_help_panel": "Sweeps: lists such as 1,2,4; none leaves one out"}
_BASE = {"rich_help_panel": "The setting that all sweeps go through"}
_BUILDS = {"rich_help_panel": "Exports and builds"}


def growth(
    bundle: BundleArgument,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Directory of result.json and the processes' log.")
    ] = Path("bench-growth"),
    all_steps: Annotated[
        str | None, typer.Option("--all-steps", metavar="LIST", help="N, 2N and 4N for the interval N.", **_SWEEPS)
    ] = None,
    all_images: Annotated[
        str, typer.Option("--all-images", metavar="LIST", help="Images of one call.", **_SWEEPS)
    ] = "1,2,4",
    all_sides: Annotated[
        str | None,
        typer.Option("--all-sides", metavar="LIST", help="Of square images; half, 1, 3/2 of the base.", **_SWEEPS),
    ] = None,
    all_intervals: Annotated[
        str, typer.Option("--all-intervals", metavar="LIST", help="1 is uncached.", **_SWEEPS)
    ] = "1,2,3,5,10",
    engine: Annotated[str | None, typer.Option(help="Of the bundle; its first by default.", **_BASE)] = None,
    precision: Annotated[str | None, typer.Option(help="As the engine computes; the first build's.", **_BASE)] = None,
    steps: Annotated[int, typer.Option(help="Of the scheduler.", min=2, **_BASE)] = 10,
    interval: Annotated[int, typer.Option(help="Full UNet every N calls. Costs quality.", min=2, **_BASE)] = 5,
    cut: Annotated[str | None, typer.Option(help="One of the bundle's; its first by default.", **_BASE)] = None,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 switches it off.", **_BASE)] = 7.5,
    size: Annotated[int | None, typer.Option(help="Side of the image in pixels; the model's own.", **_BASE)] = None,
    images: Annotated[int, typer.Option(help="Of one pipeline call.", min=1, **_BASE)] = 1,
    device: Device = "cpu",
    threads: Threads = None,
    iterations: Annotated[int, typer.Option(help="Measured loops of each setting.", min=1)] = 3,
    build: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL",
            help="Also export and build this model: a diffusers directory, shapes (the bundled one), or sd15, sdxl or "
            "svd with random weights. Again for several.",
            **_BUILDS,
        ),
    ] = None,
    build_engine: Annotated[str, typer.Option(help="That the models are built for.", **_BUILDS)] = "onnxruntime",
    build_precision: Annotated[str, typer.Option(help="Of the exported graphs.", **_BUILDS)] = "fp32",
    as_json: Json = False,
) -> None:
    """Measure how latency and memory grow with steps, images, pixels and interval, and builds with the model.

    Every setting runs in a process of its own, so that its peak memory is its own. Exponents are of power laws.
    """
    from ...benchmarks.growth.builds import build_all, laws
    from ...benchmarks.growth.sweeps import Axes, grow
    from ...benchmarks.latency.case import LatencyRequest
    from ...benchmarks.latency.loop import vae_scale
    from ...benchmarks.latency.rounds import RoundOptions
    from ...engines.bundle.bundle import Bundle
    from ...engines.profiles import trained_side
    from ...errors import UserError

    opened = Bundle.open(bundle)
    side = size or trained_side(opened.unet_config.get("sample_size"), vae_scale(opened))
    axes = Axes(
        steps=_numbers("--all-steps", all_steps or f"{interval},{2 * interval},{4 * interval}"),
        images=_numbers("--all-images", all_images),
        sides=_numbers("--all-sides", all_sides or f"{side // 2},{side},{side * 3 // 2}"),
        intervals=_numbers("--all-intervals", all_intervals),
    )
    base = LatencyRequest(
        engines=(engine or opened.engines[0],),
        steps=steps,
        guidance=guidance,
        height=side,
        width=side,
        images=images,
        schedule=f"uniform:{interval}",
        cut=cut,
        threads=threads,
        device=device,
    )
    outcome = BenchRun(_PACKAGES)
    log = output / "processes.log"
    try:
        output.mkdir(parents=True, exist_ok=True)
        log.write_bytes(b"")
    except OSError as error:
        raise UserError(f"cannot write {log}: {error.strerror}; give another directory with -o") from error
    with stages() as stage:
        measured = grow(
            opened, base, axes, RoundOptions(log, iterations, alone=0, products=False, progress=stage), precision
        )
        made, failed = build_all(build or [], build_engine, build_precision, log, stage)
    measured = measured.model_copy(
        update={
            "made": made,
            "made_fits": laws(made),
            "made_with": f"{build_engine}, {build_precision}" if build else "",
            "not_made": failed,
        }
    )
    outcome.finish(output, f"Growth of {bundle.name}", as_json, growth=measured)
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
