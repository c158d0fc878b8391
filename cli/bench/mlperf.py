"""``offcut bench mlperf``: MLPerf's LoadGen on the shapes model."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..options import EngineName, Json, Threads, unpack
from ..shell import quiet_libraries, stages
from .outcome import BenchRun


class ScenarioName(StrEnum):
    """MLPerf's names."""

    SINGLE_STREAM = "SingleStream"
    OFFLINE = "Offline"
    SERVER = "Server"


@dataclass(frozen=True)
class MlPerfRequest:
    """The images and the rules of a run."""

    scenario: Annotated[
        tuple[ScenarioName, ...], typer.Option(help="LoadGen scenario; repeatable, all by default.")
    ] = tuple(ScenarioName)
    interval: Annotated[
        tuple[int, ...], typer.Option(help="Full UNet every N calls; 1 is uncached; repeatable.", min=1)
    ] = (1, 5)
    warmup: Annotated[int, typer.Option(help="Number of calls at the start that are always full.", min=0)] = 2
    cut: Annotated[str | None, typer.Option(help="Cut of the bundle; its first by default.")] = None
    steps: Annotated[int, typer.Option(help="Scheduler steps of an image; MLPerf has 20.", min=2)] = 20
    batch: Annotated[int, typer.Option(help="Most images that share a UNet call.", min=1)] = 8
    samples: Annotated[int, typer.Option(help="Prompts that LoadGen draws from; MLPerf has 5000.", min=2)] = 32
    duration: Annotated[float, typer.Option(help="Least seconds of a test; MLPerf has 600.", min=0.1)] = 10.0
    queries: Annotated[int, typer.Option(help="Minimum number of queries per test.", min=1)] = 64
    load: Annotated[
        float, typer.Option(help="Server: offered load as a share of full batches' rate.", min=0.05, max=0.99)
    ] = 0.5
    limit: Annotated[
        float, typer.Option(help="Server: seconds in which 90 % of the queries must be done.", min=0.001)
    ] = 20.0
    accuracy: Annotated[bool, typer.Option(help="Also generate every sample once and judge it.")] = True


@unpack
def mlperf(
    request: MlPerfRequest,
    bundle: Annotated[
        Path, typer.Option(help="Directory of the shapes model's bundle; built if it does not exist.")
    ] = Path("shapes.offcut"),
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory of the result and LoadGen's logs.")] = Path(
        "bench-mlperf"
    ),
    engine: EngineName = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Run MLPerf's LoadGen, text-to-image in shape, uncached and cached. Shortened: no submission."""
    from ...benchmarks.mlperf.loadgen import ShortenedRules, run, version
    from ...benchmarks.shapes.model import model_path
    from ...engines.builder.build import build
    from ...runtime.generation.schedule import Uniform
    from ...runtime.pipeline import load

    version()
    bench = BenchRun(("torch", "diffusers", "onnxruntime", "openvino", "mlcommons-loadgen"))
    with stages() as stage:
        build(model_path(), bundle, engine=engine, progress=stage)
        quiet_libraries()
        stage("load the bundle")
        measured = run(
            load(bundle, engine=engine, threads=threads),
            output,
            scenarios=[name.value for name in request.scenario],
            schedules=[None if n == 1 else Uniform(n, warmup=request.warmup) for n in request.interval],
            cut=request.cut,
            samples=request.samples,
            steps=request.steps,
            batch=request.batch,
            rules=ShortenedRules(seconds=request.duration, queries=request.queries, latency=request.limit),
            load=request.load,
            accuracy=request.accuracy,
            stage=stage,
        )
    bench.finish(output, "MLPerf's load generator on the shapes model", as_json, mlperf=measured)
    if not all(row.valid for row in measured.runs):
        raise typer.Exit(1)
