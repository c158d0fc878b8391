"""``offcut bench mlperf``: MLPerf's LoadGen on the shapes model."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..options import EngineName, Json, Threads
from ..shell import stages
from .outcome import BenchRun


class ScenarioName(StrEnum):
    """MLPerf's names."""

    SINGLE_STREAM = "SingleStream"
    OFFLINE = "Offline"
    SERVER = "Server"


def mlperf(
    bundle: Annotated[Path, typer.Option(help="Where the shapes model's bundle is kept; built if absent.")] = Path(
        "shapes.offcut"
    ),
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory of the result and LoadGen's logs.")] = Path(
        "bench-mlperf"
    ),
    scenario: Annotated[list[ScenarioName] | None, typer.Option(help="Again for several; all by default.")] = None,
    interval: Annotated[
        list[int] | None, typer.Option(help="Full UNet every N calls; 1 is uncached. Again for several.", min=1)
    ] = None,
    warmup: Annotated[int, typer.Option(help="First calls that are always full.", min=0)] = 2,
    cut: Annotated[str | None, typer.Option(help="One of the bundle's; its first by default.")] = None,
    engine: EngineName = "auto",
    threads: Threads = None,
    steps: Annotated[int, typer.Option(help="Of the scheduler, an image; MLPerf has 20.", min=2)] = 20,
    batch: Annotated[int, typer.Option(help="Most images that share a UNet call.", min=1)] = 8,
    samples: Annotated[int, typer.Option(help="Prompts that LoadGen draws from; MLPerf has 5000.", min=2)] = 32,
    duration: Annotated[float, typer.Option(help="Least seconds of a test; MLPerf has 600.", min=0.1)] = 10.0,
    queries: Annotated[int, typer.Option(help="Least number of queries of a test.", min=1)] = 64,
    load: Annotated[
        float, typer.Option(help="Server: offered load, of what full batches reach.", min=0.05, max=0.99)
    ] = 0.5,
    limit: Annotated[float, typer.Option(help="Server: seconds in which 90 % must be answered.", min=0.001)] = 20.0,
    accuracy: Annotated[bool, typer.Option(help="Also draw every sample once and judge it.")] = True,
    as_json: Json = False,
) -> None:
    """Run MLPerf's LoadGen, text-to-image in shape, uncached and cached. Shortened: no submission."""
    from ...benchmarks.mlperf.loadgen import Shortened, version
    from ...benchmarks.mlperf.run import run
    from ...benchmarks.shapes.model import model_path
    from ...engines.builder.build import build
    from ...runtime.generation.schedule import Uniform
    from ...runtime.pipeline import load as load_pipeline
    from ..shell import quiet_libraries

    version()
    outcome = BenchRun(("torch", "diffusers", "onnxruntime", "openvino", "mlcommons-loadgen"))
    with stages() as stage:
        build(model_path(), bundle, engine=engine, progress=stage)
        quiet_libraries()
        stage("load the bundle")
        measured = run(
            load_pipeline(bundle, engine=engine, threads=threads),
            output,
            scenarios=[name.value for name in scenario or ScenarioName],
            schedules=[None if n == 1 else Uniform(n, warmup=warmup) for n in interval or (1, 5)],
            cut=cut,
            samples=samples,
            steps=steps,
            batch=batch,
            settings=Shortened(seconds=duration, queries=queries, latency=limit),
            load=load,
            accuracy=accuracy,
            stage=stage,
        )
    outcome.finish(output, "MLPerf's load generator on the shapes model", as_json, mlperf=measured)
    if not all(row.valid for row in measured.runs):
        raise typer.Exit(1)
