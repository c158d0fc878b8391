"""Commands that make images and videos: run, demo."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Unpack

import typer
from rich.box import SIMPLE
from rich.table import Table

from .shell import (
    BundleArgument,
    Device,
    EngineName,
    Json,
    Loras,
    Provider,
    Threads,
    bar,
    err,
    loras_of,
    out,
    print_json,
    quiet_libraries,
    stages,
)

if TYPE_CHECKING:
    from ..engines.base import OpenOptions
    from ..engines.bundle.bundle import Bundle
    from ..runtime.generation.forecast import Forecast
    from ..runtime.generation.schedule import Schedule
    from ..runtime.tuning.artifact import Tuned


def run(
    bundle: BundleArgument,
    prompt: Annotated[str | None, typer.Argument(help="What to show, for pipelines that draw from text.")] = None,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The PNG to write; of a video .png, .webp or .gif.")
    ] = Path("out.png"),
    steps: Annotated[int, typer.Option(help="Of the scheduler.", min=1)] = 50,
    interval: Annotated[int, typer.Option(help="Full UNet every N calls; 1 is uncached. Costs quality.", min=1)] = 5,
    warmup: Annotated[int, typer.Option(help="First calls that are always full.", min=0)] = 2,
    schedule: Annotated[
        str | None,
        typer.Option(
            help="Instead of interval and warmup, e.g. quad:5, steps:0,1,2,10 or adaptive:0.2; auto or tuned:NAME for "
            "what offcut tune made. Costs quality."
        ),
    ] = None,
    forecast: Annotated[
        float | None,
        typer.Option(
            metavar="DAMPING",
            help="Extrapolate the cached features: 0 is reuse, 1 undamped. Not for ancestral samplers.",
        ),
    ] = None,
    reuse_guidance: Annotated[
        bool, typer.Option("--reuse-guidance", help="Shallow calls compute half of a guided batch. Costs quality.")
    ] = False,
    sampler: Annotated[str | None, typer.Option(help="The scheduler's class in diffusers; the model's own.")] = None,
    cut: Annotated[str | None, typer.Option(help="One of the bundle's; its first by default.")] = None,
    engine: EngineName = "auto",
    device: Device = "cpu",
    provider: Provider = None,
    threads: Threads = None,
    lora: Loras = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What not to show.")] = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="Guidance scale; 1 switches it off. 7.5, or a video pipeline's own."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the initial noise.")] = 0,
    height: Annotated[int | None, typer.Option(help="Of the image, in pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Of the image, in pixels.")] = None,
    image: Annotated[Path | None, typer.Option(help="To start from, for pipelines that do.")] = None,
    frames: Annotated[int | None, typer.Option(help="Of a video; the pipeline's own number by default.", min=1)] = None,
    fps: Annotated[float, typer.Option(help="Frames a second that the video is written with.", min=0.1)] = 8,
    compare: Annotated[bool, typer.Option("--compare", help="Also run uncached; one picture of both.")] = False,
    as_json: Json = False,
) -> None:
    """Generate an image or a video, with and without caching if you like."""
    from ..engines.bundle.bundle import Bundle

    opened = Bundle.open(bundle)  # before what takes seconds to import
    from ..errors import UserError
    from ..runtime.draw import with_class
    from ..runtime.generation.forecast import Extrapolate
    from ..runtime.images.compare import generate_to_file
    from ..runtime.images.generate import Request, makes_videos
    from ..runtime.tuning.choice import tuned_name

    named = tuned_name(schedule)
    chosen = None if named is not None else _schedule(schedule, interval, warmup)
    predicted: Forecast | None = None if forecast is None else Extrapolate(forecast)
    if named is not None and predicted is not None:
        raise UserError("a tuned schedule has predictions of its own: leave --forecast out")
    pipe = _load(opened, engine, device=device, provider=provider, threads=threads)
    if sampler is not None:
        pipe.scheduler = with_class(pipe.scheduler, sampler)
    _load_loras(pipe, loras_of(lora))
    if guidance is None and not makes_videos(pipe):
        guidance = 7.5
    if named is not None:
        tuned = _tuned(opened, pipe, named, steps, guidance)
        chosen, predicted, cut = tuned.schedule, tuned.forecast, tuned.document.cut
    request = Request(prompt, negative_prompt, steps, guidance, seed, height, width, image, frames)
    with bar(steps * (2 if compare else 1)) as step:
        report = generate_to_file(
            pipe,
            request,
            chosen,
            cut,
            output,
            compare=compare,
            fps=fps,
            on_step=step,
            forecast=predicted,
            reuse_guidance=reuse_guidance,
        )
    if as_json:
        print_json(report)
        return
    out.print(report["timeline"], style="dim", highlight=False)
    out.print(
        f"{report['full_calls']} full and {report['shallow_calls']} shallow UNet calls"
        + (f", {report['skipped_calls']} without" if report["skipped_calls"] else "")
        + f", {report['seconds']:.2f} s"
    )
    if compare:
        out.print(
            f"uncached {report['uncached_seconds']:.2f} s: {report['speed_up']:.2f}x; "
            f"PSNR {report['psnr']:.1f} dB (one run each after a warm-up)"
        )
    out.print(f"[bold]{output}[/]")


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="The PNG to write.")] = Path("offcut-demo.png"),
    bundle: Annotated[Path, typer.Option(help="Where the demo's bundle is kept.")] = Path("shapes.offcut"),
    engine: EngineName = "auto",
    steps: Annotated[int, typer.Option(help="Of the scheduler.", min=4)] = 50,
    as_json: Json = False,
) -> None:
    """Build the small model that comes with offcut, and show it uncached, cached, and cached with a forecast."""
    from dataclasses import asdict

    from ..benchmarks.shapes.model import PROMPTS, model_path
    from ..engines.builder.build import build as run_build
    from ..runtime.images.demo import WAYS
    from ..runtime.images.demo import demo as run_demo

    with stages() as stage:
        opened = run_build(model_path(), bundle, engine=engine, progress=stage)
    pipe = _load(opened, engine)
    with bar(len(PROMPTS) * (1 + len(WAYS)) * steps) as step:
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
        f"{len(result.prompts)} prompts, {result.steps} steps, {result.warmup} full calls to warm up, {result.engine}; "
        "PSNR against the uncached image of the same seed. A model this small spends much of its time outside the UNet."
    )
    out.print(f"[bold]{result.picture}[/]")


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


def _tuned(opened: Bundle, pipe: Any, name: str, steps: int, guidance: float | None) -> Tuned:
    """A schedule of the bundle that fits this pipeline; which one is said."""
    from ..runtime.tuning.choice import choose, key_of

    scale = guidance or 1.0
    key = key_of(opened, pipe.scheduler, steps, (scale, scale), pipe.unet.precision)
    tuned = choose(opened, key, name or None, pipe.unet.cuts)
    err.print(f"schedule {tuned.name}: {len(tuned.document.full)} full calls", highlight=False)
    return tuned


def _schedule(text: str | None, interval: int, warmup: int) -> Schedule | None:
    from ..runtime.generation.schedule import Uniform, parse

    if text is not None:
        return parse(text)
    return Uniform(interval, warmup=warmup) if interval > 1 else None
