"""``offcut bench drift``: how cached features move, what a schedule misses of it, and what that does to pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..options import BundleArgument, Device, EngineName, Json, Threads
from ..shell import quiet_libraries, stages
from .outcome import BenchRun

_PACKAGES = ("torch", "diffusers", "transformers", "onnx", "onnxruntime", "openvino", "offcut")


def drift(
    bundle: BundleArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory of result.json, report and images.")] = Path(
        "bench-drift"
    ),
    schedule: Annotated[
        str, typer.Option(help="Schedule as in offcut run, e.g. uniform:5:warmup=2, auto or tuned:NAME. Costs quality.")
    ] = "uniform:5:warmup=2",
    forecast: Annotated[
        float | None, typer.Option(metavar="DAMPING", help="Extrapolate the cached features: 0 is reuse, 1 undamped.")
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help="Class name of a diffusers scheduler; the bundle's own by default.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of the scheduler.", min=2)] = 50,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 switches it off.")] = 7.5,
    cut: Annotated[str | None, typer.Option(help="Cut of the shallow calls; the bundle's first by default.")] = None,
    images: Annotated[int, typer.Option(help="Number of images to measure.", min=1)] = 8,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Prompts, one a line; by default the model's own or built-in ones."),
    ] = None,
    size: Annotated[int | None, typer.Option(help="Image size in pixels; the model's own by default.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first image.")] = 0,
    engine: EngineName = "auto",
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure the drift of the cached features with a schedule drawn on it, each call's error, and where images change.

    Images are generated uncached and with the schedule, from the same seeds. The page shows all figures.
    """
    from ...benchmarks.drift.run import DriftRequest
    from ...benchmarks.drift.run import drift as run
    from ...engines.bundle.bundle import Bundle
    from ...errors import UserError
    from ...runtime.generation.forecast import Extrapolate, Forecast
    from ...runtime.generation.schedule import Schedule, parse
    from ...runtime.pipeline import load
    from ...runtime.prompts import prompts_for
    from ...runtime.text_to_image import scheduler_named
    from ...runtime.tuning.artifact import choose, make_key, tuned_name

    opened = Bundle.open(bundle)
    choice = opened.choose_engine(engine, device)
    entry = opened.find(choice.name, device=device)
    precision = opened.precision_of(entry)
    outcome = BenchRun(_PACKAGES)
    quiet_libraries()
    with stages() as stage:
        stage("load the bundle")
        pipe = load(opened, choice.name, device=device, threads=threads)
        if sampler is not None:
            pipe.scheduler = scheduler_named(pipe.scheduler, sampler)
        predicted: Forecast | None = None if forecast is None else Extrapolate(forecast)
        chosen: Schedule
        name = tuned_name(schedule)
        if name is not None:
            if predicted is not None:
                raise UserError("a tuned schedule has predictions of its own: leave --forecast out")
            key = make_key(opened, pipe.scheduler, steps, (guidance, guidance), pipe.unet.precision)
            tuned = choose(opened, key, name or None, pipe.unet.cuts)
            chosen, predicted, cut = tuned.schedule, tuned.forecast, tuned.document.cut
        else:
            chosen = parse(schedule)
        wanted = DriftRequest(
            chosen,
            cut,
            predicted,
            steps,
            guidance,
            prompts_for(opened.path, prompts),
            images=images,
            size=size,
            seed=seed,
        )
        measured = run(pipe, opened, precision, wanted, output, stage)
    if name is not None:
        measured = measured.model_copy(update={"schedule": f"tuned:{tuned.name}"})
    outcome.finish(output, f"Drift of {bundle.name}", as_json, drift=measured)
