"""``offcut tune``: find the schedule for a model, a sampler and a target."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE
from rich.table import Table

from ..runtime.tuning.tuning_request import TuningRequest
from .options import BundleArgument, Device, EngineName, Json, Origin, Threads, unpack
from .shell import err, out, print_bold, print_json, quiet_libraries, stages

if TYPE_CHECKING:
    from ..runtime.tuning.artifact import Tuned
    from ..runtime.tuning.document import ReportRow

_TARGET: dict[str, Any] = {"rich_help_panel": "Target (give one)"}
_CONDITIONS: dict[str, Any] = {"rich_help_panel": "Conditions"}
_SEARCH: dict[str, Any] = {"rich_help_panel": "Search"}


def _speed_up(text: str) -> float:
    return _number(text.removesuffix("x"), text, "--budget", "2.5x")


def _seconds(text: str) -> float:
    if text.endswith("ms"):
        return _number(text.removesuffix("ms"), text, "--latency", "400ms") / 1000
    return _number(text.removesuffix("s"), text, "--latency", "2.5s")


_REQUEST_OPTIONS = {
    "speed_up": typer.Option(
        "--budget",
        metavar="TIMESx",
        parser=_speed_up,
        help="Target speed-up of the UNet over uncached, e.g. 2.5x.",
        **_TARGET,
    ),
    "seconds": typer.Option(
        "--latency",
        metavar="TIME",
        parser=_seconds,
        help="Target time of a whole image on this machine, e.g. 400ms or 2.5s.",
        **_TARGET,
    ),
    "psnr": typer.Option(
        help="Target mean PSNR to the uncached images in dB; the fastest schedule with it is chosen.",
        **_TARGET,
    ),
    "steps": typer.Option(help="Number of scheduler steps.", min=4, **_CONDITIONS),
    "cuts": typer.Option(
        "--cut",
        help="Cut of shallow calls; by default the bundle's first. Repeat the option for several cuts, or give all.",
        **_CONDITIONS,
    ),
    "skip": typer.Option(
        "--skip/--no-skip", help="Whether calls may be skipped (run no engine) where that is better.", **_CONDITIONS
    ),
    "samples": typer.Option(
        help="Number of images: half to fit, a quarter to select, a quarter to test.", min=4, **_SEARCH
    ),
    "size": typer.Option(help="Side of the images in pixels; by default the model's own.", **_SEARCH),
    "seed": typer.Option(help="Seed of the first image.", **_SEARCH),
}


@unpack
def tune(
    bundle: BundleArgument,
    origin: Annotated[Origin, "Origin of the bundle"],
    request: Annotated[TuningRequest, _REQUEST_OPTIONS],
    sampler: Annotated[
        str | None,
        typer.Option(help="Class name of a diffusers scheduler; by default the bundle's own.", **_CONDITIONS),
    ] = None,
    guidance: Annotated[
        str,
        typer.Option(
            metavar="SCALE or LOW..HIGH", help="Guidance scale, or a range of guidance scales.", **_CONDITIONS
        ),
    ] = "7.5",
    ratio: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[CUT=]SHARE",
            help="Time of a shallow call divided by a full call's, e.g. 0.1, in place of the measured ratio. Repeat "
            "the option for each cut.",
            **_CONDITIONS,
        ),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            metavar="BUNDLE",
            help="Bundle with this engine in higher precision; may be the same bundle. Predictions then correct the "
            "mean error of the lower precision, and images are compared with the reference's.",
            **_CONDITIONS,
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="Name of the schedule; by default made of sampler, steps and target.", **_CONDITIONS),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File with one prompt a line, like those you will use; by default the model's or general ones.",
            **_SEARCH,
        ),
    ] = None,
    pareto: Annotated[
        bool, typer.Option("--pareto", help="Also measure eight schedules from fast to slow.", **_SEARCH)
    ] = False,
    engine: EngineName = "auto",
    precision: Annotated[
        str | None,
        typer.Option(help="Precision of the engine if the bundle has several builds; by default the newest build's."),
    ] = None,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Find which UNet calls should be full, shallow or skipped, and fit the feature predictions of shallow calls.

    The schedule is added to the bundle. Images are generated with the bundle's own pipeline. The report uses prompts
    and seeds that the search did not use.
    """
    from ..engines.bundle.bundle import Bundle
    from ..errors import UserError

    opened = origin.open(bundle)  # a wrong path fails before the imports below, which take seconds
    from ..runtime.pipeline import load
    from ..runtime.prompts import bundle_prompts, read_prompts
    from ..runtime.text_to_image import scheduler_named
    from ..runtime.tuning.artifact import save
    from ..runtime.tuning.images import load_reference
    from ..runtime.tuning.tune import tune as run

    quiet_libraries()
    with stages() as stage:
        stage("load the bundle")
        pipe = load(opened, engine, device=device, inference_precision=precision, threads=threads)
        if sampler is not None:
            pipe.scheduler = scheduler_named(pipe.scheduler, sampler)
        name = name or _default_name(pipe.scheduler, request)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise UserError(
                f"{name!r} is not a valid schedule name: use letters, digits, dots, hyphens and underscores"
            )
        cuts = pipe.unet.cuts if "all" in request.cuts else request.cuts
        request = replace(
            request,
            guidance=_range(guidance),
            prompts=bundle_prompts(opened) if prompts is None else read_prompts(prompts),
            cuts=cuts,
            ratios=_ratios(ratio or [], cuts or pipe.unet.cuts[:1]),
            pareto=8 if pareto else 0,
        )
        reference_pipe = None
        if reference is not None:
            stage("load the reference")
            reference_pipe = load_reference(Bundle.open(reference), opened, pipe.unet, device=device, threads=threads)
        tuned = run(pipe, opened, name, request, stage, reference_pipe)
        save(opened, tuned)
    if as_json:
        print_json({"name": tuned.name, **tuned.document.model_dump(mode="json")})
        return
    _print(tuned)
    err.print(
        f"use it: offcut run {bundle} ... --schedule auto, with the same sampler, steps and guidance", style="dim"
    )


def _default_name(scheduler: Any, request: TuningRequest) -> str:
    sampler = type(scheduler).__name__.removesuffix("Scheduler")
    if request.speed_up is not None:
        target = f"{request.speed_up:g}x"
    elif request.seconds is not None:
        target = f"{request.seconds:g}s" if request.seconds >= 1 else f"{1000 * request.seconds:g}ms"
    else:
        target = f"{request.psnr:g}dB"
    return f"{sampler}-{request.steps}-{target}"


def _print(tuned: Tuned) -> None:
    from ..runtime.generation.schedule import SKIP

    document = tuned.document
    cuts = [cut for cut in document.used_cuts if cut != SKIP]
    marks = dict(zip(cuts, itertools.cycle(_MARKS), strict=False)) | {SKIP: "_"}
    out.print("".join("#" if cut is None else marks[cut] for cut in document.by_call), style="dim", highlight=False)
    kinds = [kind for kind in document.predictors if kind != "full"]
    counts = ", ".join(f"{kind} ({kinds.count(kind)})" for kind in dict.fromkeys(kinds))
    out.print(f"{len(document.full)} full calls; the others: {counts or 'none'}", highlight=False)
    if len(cuts) > 1:
        shares = (f"{marks[cut]} {cut} ({document.by_call.count(cut)})" for cut in cuts)
        out.print(f"at the cuts {', '.join(shares)}", highlight=False)
    if document.corrected:
        out.print(f"noise predictions corrected at {len(document.corrected)} calls", highlight=False)
    out.print(_table(document.measured))
    if document.pareto:
        out.print(_table(document.pareto))
    ratios = document.ratios or {document.cut: document.shallow_over_full}
    times = _format_ratios(ratios)
    basis = f"on {document.engine}, where a shallow call takes {times} of a full call's time"
    if document.measured_ratios:
        measured = _format_ratios(document.measured_ratios)
        basis = (
            f"with the given ratio: a shallow call takes {times} of a full call's time. On {document.engine} here it "
            f"takes {measured}"
        )
    images = "the uncached images" if document.reference is None else f"the uncached images in {document.reference}"
    out.print(
        f"PSNR to {images}, over {document.samples['test']} images with prompts and seeds that tuning did not use. "
        f"Speed-up of the UNet {basis}."
    )
    if (better := document.better_untuned) is not None:
        out.print(
            f"{better.name} has a higher PSNR: {better.psnr:.1f} dB against {document.measured[0].psnr:.1f}. "
            f"Give --prompts like those you will use, and more --samples than {sum(document.samples.values())}; "
            "if it stays ahead, use it instead.",
            style="yellow",
            highlight=False,
        )
    print_bold(tuned.name)


def _format_ratios(ratios: Mapping[str, float]) -> str:
    return ", ".join(f"{ratio:.2f}" + (f" ({cut})" if len(ratios) > 1 else "") for cut, ratio in ratios.items())


_MARKS = ".-=+*"
"""Characters for shallow calls in a timeline, one for each cut."""


def _table(rows: tuple[ReportRow, ...]) -> Table:
    table = Table("", "full calls", "UNet", "PSNR dB", "worst", box=SIMPLE)
    for row in rows:
        calls = f"{row.full_calls} of {row.full_calls + row.shallow_calls + row.skipped_calls}"
        table.add_row(row.name, calls, f"{row.speed_up:.2f}x", f"{row.psnr:.1f}", f"{row.worst:.1f}")
    return table


def _ratios(texts: Sequence[str], cuts: Sequence[str]) -> dict[str, float]:
    """Return ratios by cut from texts: ``0.1`` for a single cut, or ``CUT=0.1`` for each cut."""
    ratios = {}
    for text in texts:
        cut, equals, share = text.rpartition("=")
        if not equals and len(cuts) > 1:
            raise typer.BadParameter(
                f"{text!r} names no cut: write CUT={text} with one of {', '.join(cuts)}", param_hint="--ratio"
            )
        ratios[cut or cuts[0]] = _number(share, text, "--ratio", "0.1 or deepcache:0=0.1")
    return ratios


def _range(text: str) -> tuple[float, float]:
    low, dots, high = text.partition("..")
    least = _number(low, text, "--guidance", "7.5 or 5..9")
    most = _number(high, text, "--guidance", "7.5 or 5..9") if dots else least
    if most < least:
        raise typer.BadParameter(f"{text!r} is not a range from low to high", param_hint="--guidance")
    return least, most


def _number(part: str, text: str, option: str, example: str) -> float:
    try:
        number: Any = float(part)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise typer.BadParameter(f"{text!r} is not a value such as {example}", param_hint=option)
    return float(number)
