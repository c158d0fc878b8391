"""``offcut bench latency``: engines and peers in turn on one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..shell import BundleArgument, Device, Json, Threads, err, out, print_json, stages
from .outcome import BenchRun

_PACKAGES = ("torch", "diffusers", "transformers", "onnxruntime", "openvino", "DeepCache", "offcut")
_LOOP = {"rich_help_panel": "The denoising loop"}
_WHO = {"rich_help_panel": "Who takes part"}
_HOW = {"rich_help_panel": "How it is measured (as trtexec has it)"}


def latency(
    bundle: BundleArgument,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Directory of result.json and the processes' log.")
    ] = Path("bench-latency"),
    model: Annotated[
        Path | None, typer.Option(help="The diffusers directory that the bundle was built from, for the peers.", **_WHO)
    ] = None,
    engine: Annotated[list[str] | None, typer.Option(help="Of the bundle; all by default.", **_WHO)] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(help="all, none, or diffusers, deepcache, compile, optimum, engine (full graph only).", **_WHO),
    ] = None,
    peer_python: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="Python of another environment, e.g. optimum=PATH.", **_WHO),
    ] = None,
    optimum: Annotated[
        Path | None, typer.Option(help="optimum's ONNX pipeline; exported there if it is not. Else not kept.", **_WHO)
    ] = None,
    steps: Annotated[int, typer.Option(help="Of the scheduler.", min=2, **_LOOP)] = 20,
    interval: Annotated[
        int | None, typer.Option(help="Full UNet every N calls; 5 by default. Costs quality.", min=2, **_LOOP)
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(help="Instead of the interval, e.g. quad:5. Costs quality.", **_LOOP)
    ] = None,
    cut: Annotated[str | None, typer.Option(help="One of the bundle's; its first by default.", **_LOOP)] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="By its class in diffusers; DDIMScheduler, for videos Euler's.", **_LOOP)
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            help="Guidance scale; 1 switches it off. 7.5; for videos 3: the last frame's, rising from 1 at the first.",
            **_LOOP,
        ),
    ] = None,
    height: Annotated[int | None, typer.Option(help="Of the image, in pixels; the model's own.", **_LOOP)] = None,
    width: Annotated[int | None, typer.Option(help="Of the image, in pixels; the model's own.", **_LOOP)] = None,
    frames: Annotated[
        int | None, typer.Option(help="Of each video; the model's own by default.", min=2, **_LOOP)
    ] = None,
    images: Annotated[int, typer.Option(help="Of one pipeline call, or videos.", min=1, **_LOOP)] = 1,
    end_to_end: Annotated[
        bool, typer.Option("--end-to-end", help="Also time whole calls, from prompt or image to pictures.", **_LOOP)
    ] = False,
    device: Device = "cpu",
    threads: Threads = None,
    iterations: Annotated[int, typer.Option(help="Rounds, at least; each runs everybody once.", min=1, **_HOW)] = 5,
    duration: Annotated[float, typer.Option(help="Seconds that the rounds take, at least.", min=0, **_HOW)] = 0,
    warm_up: Annotated[
        int,
        typer.Option(
            "--warm-up", help="Loops (not ms) before the first round, cut short once all graphs ran.", min=1, **_HOW
        ),
    ] = 1,
    percentile: Annotated[str, typer.Option(help="Of the loops, separated by commas.", **_HOW)] = "50,90,99",
    export_times: Annotated[
        Path | None, typer.Option("--export-times", help="Write every single time to this CSV file.", **_HOW)
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that one loop or compilation may take.", **_HOW)] = 3600,
    as_json: Json = False,
) -> None:
    """Time the denoising loop of every engine and peer, in turns, with the ratios between them.

    Each contestant's settings are fixed beforehand and stand in the result; one that cannot run says why.
    """
    import tempfile

    from ...benchmarks.latency.resolve import LatencyRequest, model_name, resolve
    from ...benchmarks.latency.rounds import RoundOptions, measure
    from ...benchmarks.latency.terminal import export_times as write_times
    from ...engines.bundle.bundle import Bundle
    from ...errors import UserError

    if interval is not None and schedule is not None:
        raise UserError("--interval and --schedule exclude one another: give one of them")
    percents = _percents(percentile)
    request = LatencyRequest(
        model=model,
        optimum=optimum,
        engines=tuple(engine or ()),
        peers=tuple(peer or ("all",)),
        pythons=_pairs(peer_python or []),
        steps=steps,
        guidance=guidance,
        scheduler=scheduler,
        height=height,
        width=width,
        frames=frames,
        images=images,
        schedule=schedule or f"uniform:{interval or 5}",
        cut=cut,
        threads=threads,
        device=device,
        end_to_end=end_to_end,
    )
    opened = Bundle.open(bundle)
    outcome = BenchRun(_PACKAGES)
    log = output / "processes.log"
    try:
        output.mkdir(parents=True, exist_ok=True)
        log.write_bytes(b"")
    except OSError as error:
        raise UserError(f"cannot write {log}: {error.strerror}; give another directory with -o") from error
    with stages() as stage, tempfile.TemporaryDirectory(prefix="offcut-bench-") as folder:
        stage("check the bundle and the peers' model")
        case, entrants = resolve(opened, request, Path(folder))
        options = RoundOptions(log, iterations, duration, warm_up, timeout=timeout, progress=stage)
        measured = measure(case, entrants, options, model_name(opened))
    result, path = outcome.save(output, f"Latency of {bundle.name}", latency=measured)
    if export_times is not None:
        write_times(measured, export_times)
    if as_json:
        print_json(result.model_dump(mode="json"))
    else:
        _print(measured, percents, path)
    if measured.interrupted:
        err.print("[bold red]error[/]: interrupted before the last round", highlight=False)
        raise typer.Exit(130)
    if not any(row.loops for row in measured.contestants):
        err.print("[bold red]error[/]: nobody could be measured", highlight=False)
        raise typer.Exit(1)


def _print(measured: Any, percents: list[float], path: Path) -> None:
    from ...benchmarks.latency.terminal import notes, tables

    for table in tables(measured, percents):
        out.print(table)
    for note in notes(measured):
        out.print(note, highlight=False, markup=False)
    out.print(f"[bold]{path}[/]")


def _percents(text: str) -> list[float]:
    try:
        percents = [float(part) for part in text.split(",")]
    except ValueError:
        percents = []
    if not percents or not all(0 <= percent <= 100 for percent in percents):
        raise typer.BadParameter(f"{text!r} is not a list such as 50,90,99", param_hint="--percentile")
    return percents


def _pairs(texts: list[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    for name, equals, value in pairs:
        if not (name and equals and value):
            raise typer.BadParameter(f"{name + equals + value!r} is not NAME=PATH", param_hint="--peer-python")
    return {name: value for name, _, value in pairs}
