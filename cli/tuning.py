"""``offcut tune``: the schedule for a model, a sampler and a target."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE
from rich.table import Table

from .shell import BundleArgument, Device, EngineName, Json, Threads, err, out, print_json, quiet_libraries, stages

if TYPE_CHECKING:
    from ..runtime.tuning.artifact import Tuned
    from ..runtime.tuning.document import Measured

_TARGET = {"rich_help_panel": "What to reach: one of them"}
_FOR = {"rich_help_panel": "What it is for"}
_HOW = {"rich_help_panel": "How it is found"}


def tune(
    bundle: BundleArgument,
    budget: Annotated[
        str | None, typer.Option(metavar="TIMESx", help="Speed-up of the UNet over uncached, e.g. 2.5x.", **_TARGET)
    ] = None,
    latency: Annotated[
        str | None, typer.Option(metavar="TIME", help="Of a whole image here, e.g. 400ms or 2.5s.", **_TARGET)
    ] = None,
    psnr: Annotated[
        float | None, typer.Option(help="Mean dB to the uncached images; the fastest that has it.", **_TARGET)
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help="The scheduler's class in diffusers; the bundle's own.", **_FOR)
    ] = None,
    steps: Annotated[int, typer.Option(help="Of the scheduler.", min=4, **_FOR)] = 50,
    guidance: Annotated[str, typer.Option(metavar="SCALE or LOW..HIGH", help="Guidance scale.", **_FOR)] = "7.5",
    cut: Annotated[
        list[str] | None,
        typer.Option(
            help="One of the bundle's, its first by default; again for several, of which calls choose, or all.", **_FOR
        ),
    ] = None,
    skip: Annotated[
        bool,
        typer.Option("--skip/--no-skip", help="Whether some calls may run no engine, where that is better.", **_FOR),
    ] = True,
    ratio: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[CUT=]SHARE",
            help="Time of a shallow call over a full one's to tune for, e.g. 0.1, not as measured here; again for each "
            "cut.",
            **_FOR,
        ),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            metavar="BUNDLE",
            help="A bundle with the same engine in higher precision, this one too: predictions correct the mean error "
            "of this one's, and images are held against its.",
            **_FOR,
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the schedule; from sampler, steps and target.", **_FOR)] = None,
    samples: Annotated[
        int, typer.Option(help="Images: half to fit, a quarter to select, a quarter to test.", min=4, **_HOW)
    ] = 32,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Prompts like those to draw later, one a line; those of the model, or some.", **_HOW
        ),
    ] = None,
    size: Annotated[int | None, typer.Option(help="Side of the images in pixels; the model's own.", **_HOW)] = None,
    seed: Annotated[int, typer.Option(help="Of the first image.", **_HOW)] = 0,
    pareto: Annotated[
        bool, typer.Option("--pareto", help="Also measure eight schedules from fast to slow.", **_HOW)
    ] = False,
    engine: EngineName = "auto",
    precision: Annotated[
        str | None, typer.Option(help="Of the engine's build, if the bundle has several; the newest.")
    ] = None,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Find which calls should be full, how the others predict, and which need no engine; added to the bundle.

    Draws images with the bundle's own pipeline. The report is of prompts and seeds that nothing was fitted to.
    """
    from ..engines.bundle.bundle import Bundle
    from ..errors import UserError

    opened = Bundle.open(bundle)  # before what takes seconds to import
    from ..runtime.pipeline import load
    from ..runtime.prompts import prompts_for
    from ..runtime.text_to_image import scheduler_named
    from ..runtime.tuning.artifact import save
    from ..runtime.tuning.reference import load_reference
    from ..runtime.tuning.tune import tune as run
    from ..runtime.tuning.wanted import Target, Wanted

    target = Target(speed_up=_times(budget), seconds=_seconds(latency), psnr=psnr)
    quiet_libraries()
    with stages() as stage:
        stage("load the bundle")
        pipe = load(opened, engine, device=device, inference_precision=precision, threads=threads)
        if sampler is not None:
            pipe.scheduler = scheduler_named(pipe.scheduler, sampler)
        kind = type(pipe.scheduler).__name__.removesuffix("Scheduler")
        chosen = name or f"{kind}-{steps}-{budget or latency or f'{psnr:g}dB'}"
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", chosen):
            raise UserError(f"{chosen!r} cannot name a schedule: use letters, digits, dots, hyphens and underscores")
        cuts = pipe.unet.cuts if "all" in (cut or []) else tuple(cut or [])
        wanted = Wanted(
            target,
            steps=steps,
            guidance=_range(guidance),
            samples=samples,
            prompts=prompts_for(opened.path, prompts),
            cuts=cuts,
            skip=skip,
            ratios=_ratios(ratio or [], cuts or pipe.unet.cuts[:1]),
            size=size,
            seed=seed,
            pareto=8 if pareto else 0,
        )
        refers = None
        if reference is not None:
            stage("load the reference")
            refers = load_reference(Bundle.open(reference), opened, pipe.unet, device=device, threads=threads)
        tuned = run(pipe, opened, chosen, wanted, stage, refers)
        save(opened, tuned)
    if as_json:
        print_json({"name": tuned.name, **tuned.document.model_dump(mode="json")})
        return
    _print(tuned)
    err.print(
        f"use it: offcut run {bundle} ... --schedule auto, with the same sampler, steps and guidance", style="dim"
    )


def _print(tuned: Tuned) -> None:
    from ..runtime.generation.schedule import SKIP

    document = tuned.document
    cuts = [cut for cut in document.used if cut != SKIP]
    marks = dict(zip(cuts, itertools.cycle(_MARKS), strict=False)) | {SKIP: "_"}
    out.print("".join("#" if cut is None else marks[cut] for cut in document.by_call), style="dim", highlight=False)
    kinds = [kind for kind in document.predictors if kind != "full"]
    said = ", ".join(f"{kind} ({kinds.count(kind)})" for kind in dict.fromkeys(kinds))
    out.print(f"{len(document.full)} full calls; the others: {said or 'none'}", highlight=False)
    if len(cuts) > 1:
        shares = (f"{marks[cut]} {cut} ({document.by_call.count(cut)})" for cut in cuts)
        out.print(f"at the cuts {', '.join(shares)}", highlight=False)
    if document.corrected:
        out.print(f"the answers of {len(document.corrected)} calls are corrected", highlight=False)
    out.print(_table(document.measured))
    if document.pareto:
        out.print(_table(document.pareto))
    ratios = document.ratios or {document.cut: document.shallow_over_full}
    times = _shares(ratios)
    where = f"on {document.engine}, where a shallow call takes {times} of a full one"
    if document.measured_ratios:
        here = _shares(document.measured_ratios)
        where = (
            f"if a shallow call takes {times} of a full one, as was given; on {document.engine} here it takes {here}"
        )
    to = "the uncached images" if document.reference is None else f"the uncached images in {document.reference}"
    out.print(
        f"PSNR to {to} of {document.samples['test']} prompts and seeds that had no part in the tuning; "
        f"speed-up of the UNet's time {where}."
    )
    if (nearer := document.nearer) is not None:
        out.print(
            f"[yellow]{nearer.name} comes nearer there: {nearer.psnr:.1f} dB against {document.measured[0].psnr:.1f}. "
            f"Give --prompts like those that you will draw, and more --samples than {sum(document.samples.values())}; "
            "if it stays ahead, take it instead.[/]",
            highlight=False,
        )
    out.print(f"[bold]{tuned.name}[/]")


def _shares(ratios: Mapping[str, float]) -> str:
    return ", ".join(f"{ratio:.2f}" + (f" ({cut})" if len(ratios) > 1 else "") for cut, ratio in ratios.items())


_MARKS = ".-=+*"
"""Of shallow calls in a timeline, by their cut."""


def _table(rows: tuple[Measured, ...]) -> Table:
    table = Table("", "full calls", "UNet", "PSNR dB", "worst", box=SIMPLE)
    for row in rows:
        calls = f"{row.full_calls} of {row.full_calls + row.shallow_calls + row.skipped_calls}"
        table.add_row(row.name, calls, f"{row.speed_up:.2f}x", f"{row.psnr:.1f}", f"{row.worst:.1f}")
    return table


def _ratios(texts: Sequence[str], cuts: Sequence[str]) -> dict[str, float]:
    """By cut, of ``0.1`` for the only one or ``deepcache:0=0.1`` for each."""
    given = {}
    for text in texts:
        cut, equals, share = text.rpartition("=")
        if not equals and len(cuts) > 1:
            raise typer.BadParameter(f"say of which of {', '.join(cuts)} {text!r} is: CUT={text}", param_hint="--ratio")
        given[cut or cuts[0]] = _number(share, text, "--ratio", "0.1 or deepcache:0=0.1")
    return given


def _times(text: str | None) -> float | None:
    return None if text is None else _number(text.removesuffix("x"), text, "--budget", "2.5x")


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    if text.endswith("ms"):
        return _number(text.removesuffix("ms"), text, "--latency", "400ms") / 1000
    return _number(text.removesuffix("s"), text, "--latency", "2.5s")


def _range(text: str) -> tuple[float, float]:
    low, dots, high = text.partition("..")
    least = _number(low, text, "--guidance", "7.5 or 5..9")
    most = _number(high, text, "--guidance", "7.5 or 5..9") if dots else least
    if most < least:
        raise typer.BadParameter(f"{text!r} ends before it begins", param_hint="--guidance")
    return least, most


def _number(part: str, text: str, option: str, example: str) -> float:
    try:
        number: Any = float(part)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise typer.BadParameter(f"{text!r} is not a value such as {example}", param_hint=option)
    return float(number)
