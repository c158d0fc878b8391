"""``offcut bench plan``: the number of devices that a load needs, by simulation with measured times."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE
from rich.table import Table

from ..options import Device, EngineName, Json, Threads, unpack
from ..shell import out, print_json, quiet_libraries, stages

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...benchmarks.planning.costs import DeviceCosts
    from ...benchmarks.planning.simulate import RequestKind, SimulatedLoad
    from ...runtime.generation.schedule import Schedule


@dataclass(frozen=True)
class LoadOptions:
    """The load to plan for."""

    arrival_rate: Annotated[float, typer.Option(help="Requests a second on all devices together.")] = 1.0
    p99: Annotated[float, typer.Option(help="Seconds in which 99 % of the requests must be done.")] = 30.0
    requests: Annotated[int, typer.Option(help="Requests simulated for each figure.", min=100)] = 2000
    seed: Annotated[int, typer.Option(help="Seed of the arrivals.")] = 0


@dataclass(frozen=True)
class PlannedRequest:
    """The requests of the load."""

    steps: Annotated[
        tuple[int, ...], typer.Option(help="UNet calls of a request; repeat for a mix of equal shares.", min=2)
    ] = (20,)
    interval: Annotated[int, typer.Option(help="Full UNet every N calls. Costs quality.", min=2)] = 3
    schedule: Annotated[
        str | None, typer.Option(help="Schedule in place of the interval, e.g. quad:5. Costs quality.")
    ] = None
    cut: Annotated[str | None, typer.Option(help="Cut of the bundle; the first by default.")] = None
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 switches guidance off.")] = 7.5
    height: Annotated[int | None, typer.Option(help="Image height in pixels; the model's own by default.")] = None
    width: Annotated[int | None, typer.Option(help="Image width in pixels; the model's own by default.")] = None

    def parsed_schedule(self) -> Schedule:
        from ...runtime.generation.schedule import Uniform, parse

        return parse(self.schedule) if self.schedule is not None else Uniform(self.interval)

    def kinds(self) -> list[RequestKind]:
        """Return what the simulator needs of each kind of request."""
        from ...benchmarks.planning.simulate import RequestKind

        schedule = self.parsed_schedule()
        return [RequestKind(tuple(schedule.is_full(call, calls) for call in range(calls))) for calls in self.steps]

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the pipeline call that is measured."""
        sizes = {"height": self.height, "width": self.width}
        return {
            "prompt": "a photograph of a lighthouse",
            "num_inference_steps": max(self.steps),
            "guidance_scale": self.guidance,
            **{name: size for name, size in sizes.items() if size is not None},
        }


@dataclass(frozen=True)
class WorkerOptions:
    """The worker of each device."""

    max_in_flight: Annotated[int, typer.Option(help="Most requests that run at the same time.", min=1)] = 8
    max_queue: Annotated[int, typer.Option(help="Most requests that wait.", min=0)] = 64
    max_batch: Annotated[int, typer.Option(help="Most rows of an engine call.", min=1)] = 16


@dataclass(frozen=True)
class TimesOptions:
    """The measured times."""

    times: Annotated[
        Path | None, typer.Option(help="File that --export-times wrote, here or elsewhere; nothing is measured.")
    ] = None
    export_times: Annotated[Path | None, typer.Option(help="Write the measured times to this file.")] = None
    engine: EngineName = "auto"
    device: Device = "cpu"
    threads: Threads = None


@unpack
def plan(
    load: Annotated[LoadOptions, "Load"],
    request: Annotated[PlannedRequest, "Request"],
    worker: Annotated[WorkerOptions, "Worker of each device"],
    measured: Annotated[TimesOptions, "Measured times"],
    bundle: Annotated[
        Path | None, typer.Argument(metavar="BUNDLE", help="Bundle whose engines are measured here; none with --times.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Plan capacity: devices for a rate of requests and a p99, and the p99 of one device at other rates."""
    from ...benchmarks.planning import capacity
    from ...benchmarks.planning.costs import read
    from ...benchmarks.planning.simulate import WorkerSetting
    from ...errors import UserError
    from ...runtime.batching.policy import Policy

    if (bundle is None) == (measured.times is None):
        raise UserError("give a bundle to measure, or --times FILE that was measured earlier, and not both")
    if measured.times is not None and measured.export_times is not None:
        raise UserError("--export-times writes what is measured, and --times measures nothing: give one of them")
    setting = WorkerSetting(
        Policy(), max_in_flight=worker.max_in_flight, max_queue=worker.max_queue, max_batch=worker.max_batch
    )
    simulated = capacity.RequestLoad(request.kinds(), load.requests, load.seed)
    with stages() as stage:
        if measured.times is not None:
            stage(f"read {measured.times}")
            costs = read(measured.times)
        else:
            assert bundle is not None
            costs = _measure(bundle, request, worker.max_in_flight, measured, stage)
        if measured.export_times is not None:
            costs.save(measured.export_times)
        stage("simulate one device at several rates")
        most = capacity.capacity(costs, simulated, setting)
        curve = capacity.curve(costs, simulated, setting)
        stage(f"simulate {load.arrival_rate:g} requests a second")
        devices, result = capacity.devices_for(costs, simulated, setting, load.arrival_rate, load.p99)
    if as_json:
        print_json(
            {
                "times": costs.model_dump(mode="json"),
                "arrival_rate": load.arrival_rate,
                "p99_wanted": load.p99,
                "devices": devices,
                "capacity": most,
                "at": _figures(result),
                "curve": [{"rate": rate, **_figures(each)} for rate, each in curve],
            }
        )
    else:
        _print_times(costs)
        rates = [(f"{rate:.3g} ({rate / most:.0%})", each) for rate, each in curve]
        out.print(_table(f"one device, which can do {most:.3g} requests a second", "requests/s", rates))
        figures = _figures(result)
        out.print(
            f"{devices} devices for {load.arrival_rate:g} requests a second within {load.p99:g} s: p99 "
            f"{figures['p99']:.2f} s, p50 {figures['p50']:.2f} s, {result.utilisation:.0%} busy",
            highlight=False,
        )
        out.print(f"Simulated with the times of {costs.device}; a request at {costs.height}x{costs.width}.")


def _measure(
    bundle: Path, request: PlannedRequest, max_in_flight: int, options: TimesOptions, stage: Callable[[str], None]
) -> DeviceCosts:
    from ...benchmarks import record
    from ...benchmarks.planning.measure import measure
    from ...runtime.pipeline import load

    quiet_libraries()
    stage("load the bundle")
    pipe: Any = load(bundle, options.engine, device=options.device, threads=options.threads)
    try:
        machine = record.environment(())
        gpu = machine.gpu if options.device != "cpu" else None
        return measure(
            pipe,
            request.arguments(),
            request.parsed_schedule(),
            model=bundle.name,
            device=gpu or f"{machine.cores} cores of {machine.cpu}",
            cut=request.cut,
            together=[count for count in (1, 2, 4, 8, 16) if count <= max_in_flight],
            stage=stage,
        )
    finally:
        pipe.unet.close()


def _figures(result: SimulatedLoad) -> dict[str, float]:
    from ...benchmarks.planning.capacity import WARMUP

    return {
        "throughput": result.throughput,
        **{f"p{percent}": result.percentile(percent, WARMUP) for percent in (50, 90, 99)},
        "queue_mean": sum(result.queued) / max(1, len(result.queued)),
        "utilisation": result.utilisation,
        "mean_rows": result.mean_rows,
        "rejected": result.rejected,
    }


def _print_times(costs: DeviceCosts) -> None:
    table = Table("rows", "full", "shallow", "between", box=SIMPLE, title=f"{costs.model} on {costs.engine}, ms")
    for rows in sorted(costs.full):
        row = (costs.full, costs.shallow, costs.between)
        table.add_row(str(rows), *(f"{each[rows] * 1000:.1f}" if rows in each else "" for each in row))
    out.print(table)


def _table(title: str, first: str, rows: list[tuple[str, SimulatedLoad]]) -> Table:
    table = Table(box=SIMPLE, title=title)
    table.add_column(first, justify="right", no_wrap=True)
    for heading in ("p50 s", "p90 s", "p99 s", "queue s", "busy", "rows a call", "rejected"):
        table.add_column(heading, justify="right")
    for name, result in rows:
        figures = _figures(result)
        table.add_row(
            name,
            *(f"{figures[key]:.2f}" for key in ("p50", "p90", "p99", "queue_mean")),
            f"{figures['utilisation']:.0%}",
            f"{figures['mean_rows']:.1f}",
            str(figures["rejected"]),
        )
    return table
