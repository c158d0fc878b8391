"""``offcut bench plan``: how many devices a load needs, by simulation with measured times."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE
from rich.table import Table

from ..shell import Device, EngineName, Json, Threads, out, print_json, quiet_libraries, stages

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...benchmarks.planning.answer import Point
    from ...benchmarks.planning.costs import Costs
    from ...benchmarks.planning.simulate import BenchRun
    from ...runtime.generation.schedule import Schedule

_LOAD = {"rich_help_panel": "The load"}
_REQUEST = {"rich_help_panel": "A request"}
_WORKER = {"rich_help_panel": "Each device's worker"}
_TIMES = {"rich_help_panel": "The measured times"}


def plan(
    bundle: Annotated[
        Path | None, typer.Argument(metavar="BUNDLE", help="Whose engines are measured here; none with --times.")
    ] = None,
    arrival_rate: Annotated[float, typer.Option(help="Requests a second, altogether.", **_LOAD)] = 1.0,
    p99: Annotated[float, typer.Option(help="Seconds in which 99 % of the requests must be done.", **_LOAD)] = 30.0,
    arrivals: Annotated[str, typer.Option(help="poisson, uniform or burst (eight at once).", **_LOAD)] = "poisson",
    trace: Annotated[
        Path | None,
        typer.Option(help="Text file with the seconds of arrivals, one a line, instead of rate and process.", **_LOAD),
    ] = None,
    requests: Annotated[int, typer.Option(help="Simulated for each figure.", min=100, **_LOAD)] = 2000,
    seed: Annotated[int, typer.Option(help="Of the arrivals.", **_LOAD)] = 0,
    steps: Annotated[
        list[int] | None, typer.Option(help="UNet calls; 20. Again for a mix of equal shares.", min=2, **_REQUEST)
    ] = None,
    interval: Annotated[int, typer.Option(help="Full UNet every N calls. Costs quality.", min=2, **_REQUEST)] = 3,
    schedule: Annotated[
        str | None, typer.Option(help="Instead of the interval, e.g. quad:5. Costs quality.", **_REQUEST)
    ] = None,
    cut: Annotated[str | None, typer.Option(help="One of the bundle's; its first by default.", **_REQUEST)] = None,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 switches it off.", **_REQUEST)] = 7.5,
    height: Annotated[int | None, typer.Option(help="Of the image, in pixels; the model's own.", **_REQUEST)] = None,
    width: Annotated[int | None, typer.Option(help="Of the image, in pixels; the model's own.", **_REQUEST)] = None,
    max_in_flight: Annotated[int, typer.Option(help="Requests that are worked on at once.", min=1, **_WORKER)] = 8,
    max_queue: Annotated[int, typer.Option(help="Requests that wait beside them.", min=0, **_WORKER)] = 64,
    max_batch: Annotated[int, typer.Option(help="Most rows of an engine call.", min=1, **_WORKER)] = 16,
    times: Annotated[
        Path | None, typer.Option(help="What --export-times wrote, here or elsewhere; nothing is measured.", **_TIMES)
    ] = None,
    export_times: Annotated[Path | None, typer.Option(help="Write the measured times to this file.", **_TIMES)] = None,
    engine: EngineName = "auto",
    device: Device = "cpu",
    threads: Threads = None,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Also fewer requests in flight, and batches of whole requests."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Plan capacity: devices for a rate of requests and a p99, and the p99 of one device at other rates."""
    from ...benchmarks.planning import answer, simulate
    from ...benchmarks.planning.arrivals import trace as read_trace
    from ...benchmarks.planning.costs import read
    from ...errors import UserError
    from ...runtime.batching.policy import Policy
    from ...runtime.generation.schedule import Uniform, parse

    if (bundle is None) == (times is None):
        raise UserError("give a bundle to measure, or --times FILE that was measured earlier, and not both")
    if times is not None and export_times is not None:
        raise UserError("--export-times writes what is measured, and --times measures nothing: give one of them")
    chosen = parse(schedule) if schedule is not None else Uniform(interval)
    mix = steps or [20]
    setting = simulate.Setting(Policy(), max_in_flight=max_in_flight, max_queue=max_queue, max_batch=max_batch)
    kinds = [simulate.Kind(tuple(chosen.is_full(call, calls) for call in range(calls))) for calls in mix]
    load = answer.Load(kinds, arrivals, requests, seed)
    recorded = None if trace is None else read_trace(trace)
    with stages() as stage:
        if times is not None:
            stage(f"read {times}")
            costs = read(times)
        else:
            assert bundle is not None
            sizes = {"height": height, "width": width}
            arguments = {
                "prompt": "a photograph of a lighthouse",
                "num_inference_steps": max(mix),
                "guidance_scale": guidance,
                **{name: size for name, size in sizes.items() if size is not None},
            }
            together = [count for count in (1, 2, 4, 8, 16) if count <= max_in_flight]
            costs = _measure(bundle, arguments, chosen, cut, together, stage, engine, device, threads)
        if export_times is not None:
            costs.save(export_times)
        stage("simulate one device at several rates")
        most = answer.capacity(costs, load, setting)
        points = answer.curve(costs, load, setting)
        if recorded is not None:
            stage(f"simulate {len(recorded)} recorded requests")
            replayed = [
                (count, simulate.simulate(costs, kinds, recorded, _with(setting, count), seed))
                for count in (1, 2, 4, 8, 16, 32)
            ]
            needed = next((pair for pair in replayed if _meets(pair[1], p99)), replayed[-1])
        else:
            stage(f"simulate {arrival_rate:g} requests a second")
            needed = answer.devices_for(costs, load, setting, arrival_rate, p99)
        others = {}
        if compare:
            stage("simulate other ways to batch")
            others = answer.ways(costs, load, _with(setting, needed[0]), arrival_rate)
    enough = _meets(needed[1], p99)
    if as_json:
        print_json(
            {
                "times": costs.model_dump(mode="json"),
                "arrival_rate": None if recorded else arrival_rate,
                "p99_wanted": p99,
                "devices": needed[0] if enough else None,
                "capacity": most,
                "at": _figures(needed[1]),
                **({"ways": {name: _figures(outcome) for name, outcome in others.items()}} if compare else {}),
                "curve": [{"rate": point.rate, **_figures(point.outcome)} for point in points],
            }
        )
    else:
        _print(costs, points, most)
        if others:
            out.print(
                _table(
                    f"{needed[0]} devices at {arrival_rate:g} requests a second",
                    "batching, in flight",
                    list(others.items()),
                )
            )
        where = f"the {len(recorded)} requests of {trace}" if recorded else f"{arrival_rate:g} requests a second"
        found = needed[1]
        verdict = f"[bold]{needed[0]}[/] devices" if enough else f"[red]not even {needed[0]} devices[/]"
        out.print(
            f"{verdict} for {where} within {p99:g} s: p99 {found.percentile(99, answer.WARMUP):.2f} s, p50 "
            f"{found.percentile(50, answer.WARMUP):.2f} s, {found.utilisation:.0%} busy, {found.rejected} rejected",
            highlight=False,
        )
        out.print(f"Simulated with the times of {costs.device}; a request at {costs.height}x{costs.width}.")
    if not enough:
        raise typer.Exit(1)


def _measure(
    bundle: Path,
    arguments: dict[str, Any],
    schedule: Schedule,
    cut: str | None,
    together: list[int],
    stage: Callable[[str], None],
    engine: str,
    device: str,
    threads: int | None,
) -> Costs:
    from ...benchmarks import record
    from ...benchmarks.planning.measure import measure
    from ...runtime.pipeline import load

    quiet_libraries()
    stage("load the bundle")
    pipe: Any = load(bundle, engine, device=device, threads=threads)
    try:
        machine = record.environment(())
        words = machine.gpu if device != "cpu" and machine.gpu else f"{machine.cores} cores of {machine.cpu}"
        return measure(
            pipe, arguments, schedule, model=bundle.name, device=words, cut=cut, together=together, stage=stage
        )
    finally:
        pipe.unet.close()


def _with(setting: Any, devices: int) -> Any:
    from dataclasses import replace

    return replace(setting, devices=devices)


def _meets(outcome: BenchRun, p99: float) -> bool:
    from ...benchmarks.planning.answer import WARMUP

    return outcome.rejected == 0 and outcome.percentile(99, WARMUP) <= p99


def _figures(outcome: BenchRun) -> dict[str, float]:
    from ...benchmarks.planning.answer import WARMUP

    return {
        "throughput": outcome.throughput,
        **{f"p{percent}": outcome.percentile(percent, WARMUP) for percent in (50, 90, 99)},
        "queue_mean": sum(outcome.queued) / max(1, len(outcome.queued)),
        "utilisation": outcome.utilisation,
        "mean_rows": outcome.mean_rows,
        "rejected": outcome.rejected,
    }


def _print(costs: Costs, points: list[Point], most: float) -> None:
    table = Table("rows", "full", "shallow", "between", box=SIMPLE, title=f"{costs.model} on {costs.engine}, ms")
    for rows in sorted(costs.full):
        row = (costs.full, costs.shallow, costs.between)
        table.add_row(str(rows), *(f"{each[rows] * 1000:.1f}" if rows in each else "" for each in row))
    out.print(table)
    loads = [(f"{point.rate:.3g} ({point.rate / most:.0%})", point.outcome) for point in points]
    out.print(_table(f"one device, which can do {most:.3g} requests a second", "requests/s", loads))


def _table(title: str, first: str, rows: list[tuple[str, BenchRun]]) -> Table:
    table = Table(box=SIMPLE, title=title)
    table.add_column(first, justify="right", no_wrap=True)
    for heading in ("p50 s", "p90 s", "p99 s", "queue s", "busy", "rows a call", "rejected"):
        table.add_column(heading, justify="right")
    for name, outcome in rows:
        figures = _figures(outcome)
        table.add_row(
            name,
            *(f"{figures[key]:.2f}" for key in ("p50", "p90", "p99", "queue_mean")),
            f"{figures['utilisation']:.0%}",
            f"{figures['mean_rows']:.1f}",
            str(figures["rejected"]),
        )
    return table
