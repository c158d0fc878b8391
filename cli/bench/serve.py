"""``offcut bench serve``: the server under load."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..shell import BundleArgument, Device, EngineName, Json, Threads, err, out, print_json, stages
from .outcome import BenchRun

_REQUEST = {"rich_help_panel": "A request"}
_SERVER = {"rich_help_panel": "The server"}
_LOAD = {"rich_help_panel": "Closed and open loops"}
_LONG = {"rich_help_panel": "Overload and soak"}


class Part(StrEnum):
    """What can be measured by itself."""

    LOAD = "load"
    OVERLOAD = "overload"
    SOAK = "soak"


def serve(
    bundle: BundleArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory of the result.")] = Path("bench-serve"),
    part: Annotated[list[Part] | None, typer.Option(help="Again for several; all by default.")] = None,
    steps: Annotated[int, typer.Option(help="Of the scheduler.", min=2, **_REQUEST)] = 20,
    interval: Annotated[int, typer.Option(help="Full UNet every N calls. Costs quality.", min=2, **_REQUEST)] = 3,
    warmup: Annotated[int, typer.Option(help="First calls that are always full.", min=0, **_REQUEST)] = 2,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 switches it off.", min=0, **_REQUEST)] = 3.0,
    size: Annotated[
        int | None, typer.Option(help="Side of the images in pixels; the model's own.", min=8, **_REQUEST)
    ] = None,
    max_in_flight: Annotated[
        int, typer.Option(help="Requests worked on at once, or in one batch of whole requests.", min=1, **_SERVER)
    ] = 8,
    max_queue: Annotated[int, typer.Option(help="Requests that wait beside them.", min=0, **_SERVER)] = 16,
    max_batch: Annotated[int, typer.Option(help="Most rows of an engine call.", min=1, **_SERVER)] = 16,
    engine: EngineName = "auto",
    device: Device = "cpu",
    threads: Threads = None,
    clients: Annotated[list[int] | None, typer.Option(help="1, 4 and 16. Again for several.", min=1, **_LOAD)] = None,
    load: Annotated[
        list[float] | None,
        typer.Option(help="Of the capacity: 0.7 and 0.9. Again for several.", min=0.05, max=1.5, **_LOAD),
    ] = None,
    rounds: Annotated[int, typer.Option(help="In which the ways to batch take turns.", min=1, **_LOAD)] = 3,
    closed: Annotated[float, typer.Option(help="Seconds of a closed loop's window.", min=0.5, **_LOAD)] = 20.0,
    opened: Annotated[float, typer.Option("--open", help="Seconds of an open loop's window.", min=0.5, **_LOAD)] = 60.0,
    settle: Annotated[float, typer.Option(help="Seconds before each window.", min=0.1, **_LOAD)] = 4.0,
    times: Annotated[float, typer.Option(help="The rate under overload, of the capacity.", min=1, **_LONG)] = 10.0,
    capacity: Annotated[float, typer.Option(help="Seconds with every place taken.", min=0.5, **_LONG)] = 60.0,
    overload: Annotated[float, typer.Option(help="Seconds of overload.", min=0.5, **_LONG)] = 120.0,
    soak: Annotated[float, typer.Option(help="Seconds of the soak.", min=1, **_LONG)] = 1200.0,
    control: Annotated[
        float, typer.Option(help="Seconds of a soak on a server that leaks; 0 for none.", min=0, **_LONG)
    ] = 240.0,
    leak: Annotated[int, typer.Option(help="Bytes that it keeps at each request.", min=1, **_LONG)] = 2**19,
    leaving: Annotated[
        float, typer.Option(help="Share of the soak's requests whose client goes away.", min=0, max=0.5, **_LONG)
    ] = 0.05,
    as_json: Json = False,
) -> None:
    """Put the server under load: throughput and latency beside other ways to batch, overload, and a soak.

    It starts servers in processes of their own and asks them over HTTP. Beside offcut's batching of steps run one
    request at a time, and batches of whole requests. Exit code 1 where a goal is missed; the result is kept.
    """
    from importlib.util import find_spec

    from ...benchmarks.serving.process import Serving
    from ...benchmarks.serving.run import PARTS, Plan, run
    from ...benchmarks.serving.table import tables
    from ...engines.bundle.bundle import Bundle
    from ...errors import MissingExtraError
    from ..shell import quiet_libraries

    for module, package, extra in (
        ("fastapi", "fastapi", "serve"),
        ("uvicorn", "uvicorn", "serve"),
        ("prometheus_client", "prometheus-client", "serve"),
        ("aiohttp", "aiohttp", "bench"),
    ):
        if find_spec(module) is None:
            raise MissingExtraError("offcut bench serve", package, extra)
    Bundle.open(bundle).choose_engine(engine, device)  # or an error before anything is begun
    serving = Serving(
        bundle,
        steps=steps,
        interval=interval,
        warmup=warmup,
        guidance=guidance,
        size=size,
        in_flight=max_in_flight,
        queue=max_queue,
        rows=max_batch,
        engine=engine,
        device=device,
        threads=threads,
    )
    plan = Plan(
        parts=PARTS if part is None else tuple(dict.fromkeys(each.value for each in part)),
        clients=tuple(sorted(set(clients or Plan.clients))),
        loads=tuple(sorted(set(load or Plan.loads))),
        rounds=rounds,
        closed=closed,
        open=opened,
        settle=settle,
        times=times,
        overload=overload,
        capacity=capacity,
        soak=soak,
        control=control,
        leaving=leaving,
        leak=leak,
    )
    outcome = BenchRun(("torch", "diffusers", "onnxruntime", "openvino", "fastapi", "uvicorn", "aiohttp"))
    err.print(f"about {plan.estimate / 60:.0f} minutes, and what starting the servers takes", highlight=False)
    quiet_libraries()
    with stages() as stage:
        measured = run(serving, plan, stage)
    result, path = outcome.save(output, f"{bundle.name.removesuffix('.offcut')} served under load", serving=measured)
    if as_json:
        print_json(result.model_dump(mode="json"))
    else:
        for table in tables(measured):
            out.print(table)
        out.print(f"[bold]{path}[/]")
    if not all(goal.met for goal in measured.goals):
        raise typer.Exit(1)
