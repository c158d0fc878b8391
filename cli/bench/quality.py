"""``offcut bench quality``: the quality that caching costs, compared with fewer steps."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..options import EngineName, Json, Threads
from ..shell import calls_bar, err, quiet_libraries, stages
from .outcome import BenchRun

if TYPE_CHECKING:
    from ...benchmarks.quality.pictures import ImageTask
    from ...benchmarks.quality.plan import QualitySetting

_PACKAGES = ("offcut", "torch", "diffusers", "transformers", "onnxruntime", "openvino", "torchmetrics", "numpy")
_IMAGES = {"quick": 32, "full": 1000, "front": 512}


class PlanName(StrEnum):
    """Which settings are compared."""

    QUICK = "quick"
    FULL = "full"
    FRONT = "front"


class ScheduleKind(StrEnum):
    """Schedules of the paper."""

    UNIFORM = "uniform"
    QUAD = "quad"


def quality(
    bundle: Annotated[
        Path, typer.Argument(metavar="[BUNDLE]", help="Bundle of the shapes model; built if absent.")
    ] = Path("shapes-quality.offcut"),
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="Directory to write result.json to; an interrupted run continues there."),
    ] = Path("bench-quality"),
    plan: Annotated[
        PlanName | None,
        typer.Option(
            help="quick (the default); full: varies interval, cut, schedule, warm-up, forecast and sampler; front: "
            "compares tuned schedules with others at the same cost, at four speeds."
        ),
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(help="Images of each setting; 32 by default, 1000 in the full plan, 512 in front.", min=2),
    ] = None,
    steps: Annotated[
        int, typer.Option(help="Steps of DDIM; in the plans other samplers have half as many.", min=8)
    ] = 50,
    interval: Annotated[
        list[int] | None,
        typer.Option(help="Full UNet every N calls: every combination instead of a plan; repeatable.", min=1),
    ] = None,
    sampler: Annotated[
        list[str] | None,
        typer.Option(help="Sampler of the combinations or of a plan: ddim, dpm++ 2m, euler ancestral; repeatable."),
    ] = None,
    cut: Annotated[
        list[str] | None, typer.Option(help="Cut to include in the combinations, e.g. deepcache:1; repeatable.")
    ] = None,
    warmup: Annotated[
        list[int] | None, typer.Option(help="First full calls of the combinations; repeatable.", min=0)
    ] = None,
    schedule: Annotated[
        list[ScheduleKind] | None, typer.Option(help="Schedule of the combinations; repeatable.")
    ] = None,
    samples: Annotated[
        int, typer.Option(help="Number of images that a schedule of --plan front is tuned with.", min=4)
    ] = 64,
    forecast: Annotated[
        list[float] | None,
        typer.Option(
            metavar="DAMPING",
            help="Forecast of the combinations: 1 extrapolates the features, below 0 reuses; repeatable.",
        ),
    ] = None,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 switches it off.")] = 3.0,
    seed: Annotated[int, typer.Option(help="Seed of the prompts and of the first image's noise.", min=0)] = 0,
    batch: Annotated[int, typer.Option(help="Images of one pipeline call.", min=1)] = 16,
    engine: EngineName = "auto",
    threads: Threads = None,
    workers: Annotated[int, typer.Option(help="Processes that generate the images; they share the cores.", min=1)] = 1,
    shallow_ratio: Annotated[
        list[str] | None,
        typer.Option(metavar="CUT=RATIO", help="A shallow call's time over a full one's, for equal latency."),
    ] = None,
    lpips: Annotated[
        Path | None, typer.Option(help="Also LPIPS: torchvision's weights of AlexNet, VGG-16 or SqueezeNet 1.1.")
    ] = None,
    clip: Annotated[
        Path | None, typer.Option(help="Also CLIP score: directory of a CLIP model with its processor.")
    ] = None,
    fid: Annotated[
        Path | None, typer.Option(help="Also FID: TorchScript file, uint8 images [N, 3, H, W] to features [N, D].")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the settings and the time they take.")] = False,
    as_json: Json = False,
) -> None:
    """Compare cached runs with the uncached one, and with fewer steps at equal latency, on the shapes model."""
    from ...benchmarks.quality import pictures, pool
    from ...benchmarks.quality.evaluate import evaluate
    from ...benchmarks.quality.external import ExternalNetworks
    from ...benchmarks.quality.front import front_plan
    from ...benchmarks.quality.plan import reference_ratios, with_fewer_steps
    from ...benchmarks.stats import require
    from ...engines.bundle.bundle import Bundle
    from ...runtime.pipeline import load

    require("offcut bench quality", "torchmetrics", "scipy")
    outcome = BenchRun(_PACKAGES)
    asked = _settings(plan, steps, sampler, schedule, interval, cut, warmup, forecast)
    ratios = reference_ratios(asked, _given(shallow_ratio or []))
    networks = ExternalNetworks(lpips=lpips, clip=clip, fid=fid) if lpips or clip or fid else None
    _build(bundle, engine, list(dict.fromkeys(setting.cut for setting in asked if setting.cut)))
    opened = Bundle.open(bundle)
    choice = opened.choose_engine(engine)
    err.print(f"engine {choice.name}: {choice.reason}", highlight=False)
    quiet_libraries()
    pipe = load(opened, engine=choice.name, threads=threads)
    if plan == PlanName.FRONT and dry_run:
        err.print("one schedule is tuned for each uniform one without warm-up, and CacheQuant's is added")
    elif plan == PlanName.FRONT:
        with stages() as stage:
            asked = front_plan(pipe, opened, asked, guidance, ratios, samples, stage)
    settings = with_fewer_steps(asked, ratios)
    versions = [f"{name} {outcome.environment.packages.get(name)}" for name in ("diffusers", choice.name)]
    task = pictures.ImageTask(
        prompts=pictures.prompts(images or _IMAGES[plan or PlanName.QUICK], 1000 + seed),
        guidance=guidance,
        seed=seed,
        batch=batch,
        identity=" ".join([opened.built_digest, choice.name, *versions]),
        bundle=bundle,
    )
    _announce(pipe, task, settings, output, ratios)
    if dry_run:
        return
    total = sum(setting.steps * pictures.missing(task, setting, output / "pictures") for setting in settings)
    with calls_bar(total) as (on_call, stage):
        if workers > 1:
            stage(f"{workers} processes")
            pool.make(
                bundle,
                choice.name,
                task,
                settings,
                output / "pictures",
                workers=workers,
                threads=threads,
                on_call=on_call,
            )
        measured = evaluate(
            pipe,
            task,
            settings,
            output,
            ratios=ratios,
            model="shapes",
            external=networks,
            on_call=on_call,
            stage=stage,
        )
    outcome.finish(output, "What caching costs in quality, on the shapes model", as_json, quality=measured)


def _settings(
    plan: PlanName | None,
    steps: int,
    samplers: Sequence[str] | None,
    kinds: Sequence[ScheduleKind] | None,
    intervals: Sequence[int] | None,
    cuts: Sequence[str] | None,
    warmups: Sequence[int] | None,
    dampings: Sequence[float] | None,
) -> list[QualitySetting]:
    from ...benchmarks.quality.front import known
    from ...benchmarks.quality.plan import SAMPLERS, full_plan, of_samplers, product_plan, quick_plan
    from ...errors import UserError

    combined = any(given is not None for given in (kinds, intervals, cuts, warmups, dampings))
    if plan is not None and combined:
        raise UserError("--plan has its own intervals, schedules, cuts, warm-ups and forecasts: leave it or them out")
    if plan is None and (combined or samplers is not None):
        return product_plan(
            steps,
            samplers or ["ddim"],
            [kind.value for kind in kinds or [ScheduleKind.UNIFORM]],
            intervals or [5],
            cuts or ["deepcache:0"],
            warmups or [0],
            [None if damping < 0 else damping for damping in dampings or [-1.0]],
        )
    if plan == PlanName.FRONT:
        return known(steps, samplers or SAMPLERS)
    rows = full_plan(steps) if plan == PlanName.FULL else quick_plan(steps)
    return rows if samplers is None else of_samplers(rows, samplers)


def _given(texts: Sequence[str]) -> dict[str, float]:
    """Return the ratio of each cut from texts such as ``deepcache:0=0.1``."""
    ratios: dict[str, float] = {}
    for text in texts:
        name, _, value = text.rpartition("=")
        try:
            ratios[name or "deepcache:0"] = float(value)
        except ValueError as error:
            raise typer.BadParameter(f"{text!r} is not CUT=RATIO", param_hint="--shallow-ratio") from error
    return ratios


def _build(bundle: Path, engine: str, cuts: Sequence[str]) -> None:
    """Builds the shapes model's bundle where there is none; one that lacks a cut gets it."""
    from ...benchmarks.quality.plan import CUTS
    from ...benchmarks.shapes.model import model_path
    from ...engines.builder.build import build

    with stages() as stage:
        build(model_path(), bundle, cuts=cuts or [CUTS[0]], engine=engine, progress=stage)


def _announce(
    pipe: Any, task: ImageTask, settings: Sequence[QualitySetting], output: Path, ratios: dict[str, float]
) -> None:
    """What is to come, and how long it takes, by a batch that is timed."""
    from ...benchmarks.quality import pictures

    missing = {setting: pictures.missing(task, setting, output / "pictures") for setting in settings}
    kinds = {kind: sum(setting.kind == kind for setting in settings) for kind in ("uncached", "cached", "fewer steps")}
    counted = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    err.print(f"{len(settings)} settings ({counted}) of {len(task.prompts)} images", highlight=False)
    if not any(missing.values()):
        return
    full = pictures.time_full_call(pipe, task)
    calls = sum(setting.cost(ratios) * count for setting, count in missing.items())
    hours, minutes = divmod(round(full * calls / 60), 60)
    err.print(
        f"to make: {sum(missing.values())} images, as much as {calls:,.0f} full UNet calls of {1000 * full:.1f} ms: "
        f"about {hours} h {minutes:02d} min, more where a shallow call takes a larger share than on Stable Diffusion",
        highlight=False,
    )
