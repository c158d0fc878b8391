"""Commands that make images and videos: run, demo."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Unpack

import typer
from rich.box import SIMPLE
from rich.table import Table

from ..runtime.images.request import ImageRequest, guidance_of
from .options import BundleArgument, EngineChoice, EngineName, Json, Loras, Origin, unpack
from .shell import err, out, parse_loras, print_bold, print_json, quiet_libraries, stages, steps_bar

if TYPE_CHECKING:
    from ..engines.base import OpenOptions
    from ..engines.bundle.bundle import Bundle
    from ..runtime.generation.forecast import Forecast
    from ..runtime.generation.schedule import Schedule
    from ..runtime.tuning.artifact import Tuned

_REQUEST = {
    "prompt": typer.Argument(help="Text to generate from, for pipelines that take one."),
    "negative_prompt": typer.Option(help="Text to steer away from."),
    "steps": typer.Option(help="Number of scheduler steps.", min=1),
    "guidance": typer.Option(help="Guidance scale; 1 switches guidance off. By default 7.5; a video pipeline's own."),
    "seed": typer.Option(help="Seed of the initial noise."),
    "height": typer.Option(help="Height of the image in pixels."),
    "width": typer.Option(help="Width of the image in pixels."),
    "image": typer.Option(help="Image file to start from, for pipelines that take one."),
    "frames": typer.Option(help="Frames of a video; by default the pipeline's own number.", min=1),
}


@dataclass(frozen=True)
class CachingOptions:
    """Which UNet calls run the full graph, and what the other calls reuse."""

    interval: Annotated[
        int, typer.Option(help="Run the full UNet every N calls; 1 is uncached. Costs quality.", min=1)
    ] = 5
    warmup: Annotated[int, typer.Option(help="Number of calls at the start that are always full.", min=0)] = 2
    schedule: Annotated[
        str | None,
        typer.Option(
            help="Schedule in place of --interval and --warmup, e.g. quad:5 or steps:0,1,2,10; auto or "
            "tuned:NAME for a schedule from offcut tune. Costs quality."
        ),
    ] = None
    forecast: Annotated[
        float | None,
        typer.Option(
            metavar="DAMPING",
            help="Extrapolate the cached features: 0 reuses them, 1 is undamped. Not for ancestral samplers.",
        ),
    ] = None
    reuse_guidance: Annotated[
        bool,
        typer.Option(
            "--reuse-guidance", help="Shallow calls compute only the prompt's half of a guided batch. Costs quality."
        ),
    ] = False
    cut: Annotated[str | None, typer.Option(help="Cut of the shallow calls; by default the bundle's first.")] = None


@unpack
def run(
    bundle: BundleArgument,
    origin: Annotated[Origin, "Origin of the bundle"],
    request: Annotated[ImageRequest, _REQUEST, "Image or video"],
    caching: Annotated[CachingOptions, "Caching"],
    engine: Annotated[EngineChoice, "Engine"],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="File to write: .png, .jpg or .webp; a video .png, .webp or .gif.")
    ] = Path("out.png"),
    sampler: Annotated[
        str | None, typer.Option(help="Class name of a diffusers scheduler; by default the model's own.")
    ] = None,
    lora: Loras = None,
    fps: Annotated[float, typer.Option(help="Frame rate of the video, in frames per second.", min=0.1)] = 8,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also generate the uncached image, and write one picture of both.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Generate an image or a video; --compare adds the uncached one and the difference."""
    opened = origin.open(bundle)  # first, so that a wrong path fails before imports that take seconds
    from ..errors import UserError
    from ..runtime.generation.forecast import Extrapolate
    from ..runtime.images.compare import generate_to_file
    from ..runtime.images.image_files import check_suffix
    from ..runtime.text_to_image import scheduler_named
    from ..runtime.tuning.artifact import tuned_name

    check_suffix(output)
    cut = caching.cut
    tuned = tuned_name(caching.schedule)
    schedule = None if tuned is not None else _parse_schedule(caching)
    forecast: Forecast | None = None if caching.forecast is None else Extrapolate(caching.forecast)
    if tuned is not None and forecast is not None:
        raise UserError("a tuned schedule has a forecast of its own: leave --forecast out")
    pipe = _load(opened, **vars(engine))
    if sampler is not None:
        pipe.scheduler = scheduler_named(pipe.scheduler, sampler)
    _load_loras(pipe, parse_loras(lora))
    if tuned is not None:
        artifact = _choose_tuned(opened, pipe, tuned, request)
        schedule, forecast, cut = artifact.schedule, artifact.forecast, artifact.document.cut
    with steps_bar(request.steps * (2 if compare else 1)) as step:
        report = generate_to_file(
            pipe,
            request,
            schedule,
            cut,
            output,
            compare=compare,
            fps=fps,
            on_step=step,
            forecast=forecast,
            reuse_guidance=caching.reuse_guidance,
        )
    if as_json:
        print_json(report)
        return
    out.print(report["timeline"], style="dim", highlight=False)
    out.print(
        f"{report['full_calls']} full and {report['shallow_calls']} shallow UNet calls"
        + (f", {report['skipped_calls']} skipped" if report["skipped_calls"] else "")
        + f", {report['seconds']:.2f} s"
    )
    if compare:
        out.print(
            f"uncached {report['uncached_seconds']:.2f} s: {report['speed_up']:.2f}x; "
            f"PSNR {report['psnr']:.1f} dB (one run each after a warm-up)"
        )
    print_bold(output)


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write: .png, .jpg or .webp.")] = Path(
        "offcut-demo.png"
    ),
    bundle: Annotated[Path, typer.Option(help="Directory of the demo's bundle; built there if absent.")] = Path(
        "shapes.offcut"
    ),
    engine: EngineName = "auto",
    steps: Annotated[int, typer.Option(help="Number of scheduler steps.", min=4)] = 50,
    as_json: Json = False,
) -> None:
    """Build the small model that comes with offcut, and compare it uncached, cached, and cached with a forecast."""
    from dataclasses import asdict

    from ..benchmarks.shapes.model import PROMPTS, model_path
    from ..engines.builder.build import build as run_build
    from ..runtime.images.demo import SETTINGS
    from ..runtime.images.demo import demo as run_demo

    with stages() as stage:
        opened = run_build(model_path(), bundle, engine=engine, progress=stage)
    pipe = _load(opened, engine)
    with steps_bar(len(PROMPTS) * (1 + len(SETTINGS)) * steps) as step:
        result = run_demo(pipe, PROMPTS, output, steps=steps, on_step=step)
    if as_json:
        print_json(asdict(result))
        return
    table = Table(box=SIMPLE)
    for heading in ("interval", "full calls", "image", "", "UNet", " ", "PSNR dB", "worst"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in result.rows:
        table.add_row(
            "uncached" if row.interval == 1 else f"{row.interval}{'' if row.damping is None else ', forecast'}",
            f"{row.full_calls} of {row.calls}",
            f"{row.seconds:.2f} s",
            f"{row.speed_up:.2f}x",
            f"{row.unet_seconds:.2f} s",
            f"{row.unet_speed_up:.2f}x",
            "" if row.psnr is None else f"{row.psnr:.1f}",
            "" if row.psnr_worst is None else f"{row.psnr_worst:.1f}",
        )
    out.print(table)
    out.print(
        f"{len(result.prompts)} prompts, {result.steps} steps, {result.warmup} full warm-up calls, {result.engine}; "
        "PSNR to the uncached image of the same seed. A model this small spends much of its time outside the UNet."
    )
    print_bold(result.picture)


def _load(opened: Bundle, engine: str, device: str = "cpu", **options: Unpack[OpenOptions]) -> Any:
    from ..runtime.pipeline import load

    choice = opened.choose_engine(engine, device)
    err.print(f"engine {choice.name}: {choice.reason}", highlight=False)
    quiet_libraries()
    with stages() as stage:
        stage("load the bundle")
        return load(opened, engine=choice.name, device=device, **options)


def _load_loras(pipe: Any, loras: Mapping[str | Path, float]) -> None:
    if not loras:
        return
    with stages() as stage:
        for path, scale in loras.items():
            stage(f"load the LoRA {Path(path).name} at {scale:g}")
            pipe.unet.load_lora(path, scale)


def _choose_tuned(opened: Bundle, pipe: Any, name: str, request: ImageRequest) -> Tuned:
    """Return the bundle's tuned schedule for this pipeline and request, and print which one it is."""
    from ..runtime.tuning.artifact import choose, make_key

    scale = guidance_of(pipe, request) or 1.0
    key = make_key(opened, pipe.scheduler, request.steps, (scale, scale), pipe.unet.precision)
    tuned = choose(opened, key, name or None, pipe.unet.cuts)
    err.print(f"schedule {tuned.name}: {len(tuned.document.full)} full calls", highlight=False)
    return tuned


def _parse_schedule(caching: CachingOptions) -> Schedule | None:
    from ..runtime.generation.schedule import Uniform, parse

    if caching.schedule is not None:
        return parse(caching.schedule)
    return Uniform(caching.interval, warmup=caching.warmup) if caching.interval > 1 else None
