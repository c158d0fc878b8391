"""``offcut bench serve``: the server under load."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ...benchmarks.serving.load_plan import PARTS, LoadPlan, ServerSetting
from ..options import BundleArgument, Device, EngineName, Json, Origin, Threads, unpack
from ..shell import err, stages
from .outcome import BenchRun


class Part(StrEnum):
    """The parts of a load test."""

    LOAD = "load"
    OVERLOAD = "overload"
    SOAK = "soak"


_SERVER = {
    "steps": typer.Option(help="Scheduler steps of a request.", min=2),
    "interval": typer.Option(help="Full UNet every N calls. Costs quality.", min=2),
    "warmup": typer.Option(help="Number of calls at the start that are always full.", min=0),
    "guidance": typer.Option(help="Guidance scale; 1 switches guidance off.", min=0),
    "size": typer.Option(help="Side of the images in pixels; the model's own by default.", min=8),
    "in_flight": typer.Option(
        "--max-in-flight", help="Most requests that run at the same time, or in one batch of whole requests.", min=1
    ),
    "queue": typer.Option("--max-queue", help="Most further requests that wait.", min=0),
    "rows": typer.Option("--max-batch", help="Most rows of an engine call.", min=1),
}
_LOOPS = {
    "clients": typer.Option(help="Number of clients of a closed loop; repeatable.", min=1),
    "loads": typer.Option(
        "--load", help="Rate of an open loop as a share of the capacity; repeatable.", min=0.05, max=1.5
    ),
    "rounds": typer.Option(help="Rounds in which the ways to batch take turns.", min=1),
    "closed": typer.Option(help="Seconds of a closed loop's window.", min=0.5),
    "open": typer.Option(help="Seconds of an open loop's window.", min=0.5),
    "settle": typer.Option(help="Seconds before each window.", min=0.1),
    "times": typer.Option(help="Overload: rate as a multiple of the capacity.", min=1),
    "capacity": typer.Option(help="Overload: seconds with every place taken.", min=0.5),
    "overload": typer.Option(help="Overload: seconds.", min=0.5),
    "soak": typer.Option(help="Soak: seconds.", min=1),
    "control": typer.Option(help="Soak: seconds on a server that leaks on purpose; 0 for none.", min=0),
    "leak": typer.Option(help="Soak: bytes that this server leaks at each request.", min=1),
    "leaving": typer.Option(help="Soak: share of the requests whose client disconnects.", min=0, max=0.5),
}


@unpack
def serve(
    bundle: BundleArgument,
    origin: Annotated[Origin, "Origin of the bundle"],
    server: Annotated[ServerSetting, _SERVER, "Server and requests"],
    plan: Annotated[LoadPlan, _LOOPS, "Phases"],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory of the result.")] = Path("bench-serve"),
    part: Annotated[list[Part] | None, typer.Option(help="Part of the test; repeatable, all by default.")] = None,
    engine: EngineName = "auto",
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Put the server under load: throughput and latency of three ways to batch, overload, and a soak.

    It starts servers in processes of their own and sends requests over HTTP. offcut's batching of steps is compared
    with one request at a time and with batches of whole requests. Exit code 1 where a reply was neither an image nor a
    refusal, or the idle server still held requests.
    """
    from importlib.util import find_spec

    from ...benchmarks.serving.phases import run
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
    origin.open(bundle).choose_engine(engine, device)  # raises before anything is started
    server = replace(server, bundle=bundle, engine=engine, device=device, threads=threads)
    plan = replace(
        plan,
        parts=PARTS if part is None else tuple(dict.fromkeys(each.value for each in part)),
        clients=tuple(sorted(set(plan.clients))),
        loads=tuple(sorted(set(plan.loads))),
    )
    bench = BenchRun(("torch", "diffusers", "onnxruntime", "openvino", "fastapi", "uvicorn", "aiohttp"))
    err.print(f"about {plan.estimate / 60:.0f} minutes, and the time that servers take to start", highlight=False)
    quiet_libraries()
    with stages() as stage:
        measured = run(server, plan, stage)
    bench.finish(output, f"{bundle.name.removesuffix('.offcut')} served under load", as_json, serving=measured)
    if measured.faults:
        raise typer.Exit(1)
