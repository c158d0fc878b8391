"""``offcut bench latency``: engines and peers in turns on one model."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from ...benchmarks.latency.case import LatencyRequest
from ..options import BundleArgument, Device, Json, Origin, Threads, unpack
from ..shell import out, print_bold, print_error, print_json, stages
from .outcome import BenchRun

_PACKAGES = ("torch", "diffusers", "transformers", "onnxruntime", "openvino", "DeepCache", "offcut")
_CONTESTANTS = {
    "model": typer.Option(help="The diffusers directory that the bundle was built from, for the peers."),
    "engines": typer.Option("--engine", help="Engine of the bundle; repeatable, all by default."),
    "peers": typer.Option(
        "--peer",
        help="all, none, or diffusers, deepcache, compile, optimum, engine (full graph only); repeatable.",
    ),
    "optimum": typer.Option(
        help="Directory of optimum's ONNX pipeline, exported there if it is missing; a temporary one by default."
    ),
}
_LOOP = {
    "steps": typer.Option(help="Steps of the scheduler.", min=2),
    "cut": typer.Option(help="Cut of the bundle; its first by default."),
    "scheduler": typer.Option(help="Scheduler class of diffusers; DDIMScheduler, for videos EulerDiscreteScheduler."),
    "guidance": typer.Option(
        help="Guidance scale; 1 switches it off. 7.5 by default; for videos 3, the last frame's, rising from 1."
    ),
    "height": typer.Option(help="Image height in pixels; the model's own by default."),
    "width": typer.Option(help="Image width in pixels; the model's own by default."),
    "frames": typer.Option(help="Frames of each video; the model's own by default.", min=2),
    "images": typer.Option(help="Images of one pipeline call, or videos.", min=1),
}
for _panel, _options in (("Contestants", _CONTESTANTS), ("Denoising loop", _LOOP)):
    for _option in _options.values():
        _option.rich_help_panel = _panel


@dataclass(frozen=True)
class MeasureOptions:
    """How the loops are measured, with trtexec's names."""

    iterations: Annotated[int, typer.Option(help="Least number of rounds; each runs every contestant.", min=1)] = 5
    duration: Annotated[float, typer.Option(help="Least seconds of all rounds together.", min=0)] = 0
    warm_up: Annotated[
        int,
        typer.Option(
            "--warm-up", help="Loops (not ms) before the first round; each ends once all graphs have run.", min=1
        ),
    ] = 1
    percentile: Annotated[
        str, typer.Option(help="Percentiles of the loops that the terminal shows, separated by commas.")
    ] = "50,90,99"
    timeout: Annotated[float, typer.Option(help="Seconds that one loop or compilation may take.")] = 3600


@unpack
def latency(
    bundle: BundleArgument,
    origin: Annotated[Origin, "Origin of the bundle"],
    request: Annotated[LatencyRequest, _CONTESTANTS | _LOOP],
    options: Annotated[MeasureOptions, "Measurement (as in trtexec)"],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Directory to write result.json to, and the processes' log.")
    ] = Path("bench-latency"),
    interval: Annotated[
        int | None, typer.Option(help="Full UNet every N calls; 5 by default. Costs quality.", min=2)
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(help="Schedule in place of the interval, e.g. quad:5. Costs quality.")
    ] = None,
    peer_python: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="Python of another environment for a peer, e.g. optimum=PATH."),
    ] = None,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Time the denoising loop of every engine and peer, in turns, with the ratios between them.

    The settings of each contestant are fixed beforehand and stand in the result. A contestant that cannot run says why.
    """
    from ...benchmarks.latency.resolve import model_name, resolve
    from ...benchmarks.latency.rounds import RoundOptions, measure
    from ...benchmarks.report.blocks import for_terminal
    from ...benchmarks.report.latency import section
    from ...errors import UserError

    if interval is not None and schedule is not None:
        raise UserError("--interval and --schedule exclude one another: give one of them")
    percents = _percents(options.percentile)
    request = replace(
        request,
        pythons=_pairs(peer_python or []),
        schedule=schedule or f"uniform:{interval or 5}",
        threads=threads,
        device=device,
    )
    opened = origin.open(bundle)
    run = BenchRun(_PACKAGES)
    log = output / "processes.log"
    try:
        output.mkdir(parents=True, exist_ok=True)
        log.write_bytes(b"")
    except OSError as error:
        raise UserError(f"cannot write {log}: {error.strerror}; give another directory with -o") from error
    with stages() as stage, tempfile.TemporaryDirectory(prefix="offcut-bench-") as folder:
        stage("check the bundle and the peers' model")
        case, entrants = resolve(opened, request, Path(folder))
        measured = measure(
            case,
            entrants,
            RoundOptions(
                log, options.iterations, options.duration, options.warm_up, timeout=options.timeout, progress=stage
            ),
            model_name(opened),
        )
    result, path = run.save(output, f"Latency of {bundle.name}", latency=measured)
    if as_json:
        print_json(result.model_dump(mode="json"))
    else:
        for block in for_terminal(section(measured, percents)):
            out.print(block, highlight=False)
        print_bold(path)
    if measured.interrupted:
        print_error("interrupted before the last round")
        raise typer.Exit(130)
    if not any(row.loops for row in measured.contestants):
        print_error("nobody could be measured")
        raise typer.Exit(1)


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
