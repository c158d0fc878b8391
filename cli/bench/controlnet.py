"""``offcut bench controlnet``: cost and gain of ``attach(..., reuse_controlnet=True)``, on the shapes model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..options import EngineName, Json, Threads
from ..shell import calls_bar, quiet_libraries, stages
from .outcome import BenchRun

_PACKAGES = ("offcut", "torch", "diffusers", "transformers", "onnxruntime", "openvino", "numpy")


def controlnet(
    bundle: Annotated[
        Path,
        typer.Argument(
            metavar="[BUNDLE]", help="Bundle of the shapes model with --adapter controlnet; built if absent."
        ),
    ] = Path("shapes-controlnet.offcut"),
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="Directory to write result.json to."),
    ] = Path("bench-controlnet"),
    controlnet: Annotated[
        Path | None, typer.Option(help="Directory of a ControlNet for silhouettes; by default the shapes model's.")
    ] = None,
    images: Annotated[int, typer.Option(help="Number of scenes, each generated with every setting.", min=2)] = 240,
    steps: Annotated[int, typer.Option(help="Steps of DDIM.", min=2)] = 50,
    interval: Annotated[
        list[int] | None,
        typer.Option(help="Full UNet every N calls; 3 and 5 by default; repeatable. Costs quality.", min=2),
    ] = None,
    warmup: Annotated[int, typer.Option(help="Number of calls at the start that are full.", min=0)] = 2,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 switches it off.")] = 3.0,
    seed: Annotated[int, typer.Option(help="Seed of the scenes and of the first image's noise.", min=0)] = 0,
    batch: Annotated[int, typer.Option(help="Images of one pipeline call.", min=1)] = 8,
    rounds: Annotated[
        int, typer.Option(help="Rounds of timing after the images are generated; 0 takes no times.", min=0)
    ] = 7,
    engine: EngineName = "onnxruntime",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Generate scenes under a ControlNet that runs at every call, and under one that is skipped on shallow calls."""
    from ...benchmarks.controlnet import pipelines, settings
    from ...benchmarks.controlnet.evaluate import evaluate
    from ...benchmarks.shapes.model import control_path, model_path
    from ...engines.builder.build import build
    from ...engines.bundle.bundle import Bundle
    from ...runtime.unet import UNet

    outcome = BenchRun(_PACKAGES)
    net = controlnet or control_path()
    quiet_libraries()
    with stages() as stage:
        build(model_path(), bundle, cuts=[settings.CUT], engine=engine, adapters=["controlnet"], progress=stage)
    opened = Bundle.open(bundle)
    unet = UNet.load(opened, engine, threads=threads)
    try:
        pipes = pipelines.Pipelines(unet, model_path(), net)
        compared = settings.compared_settings(interval or [3, 5], warmup)
        task = settings.task(
            images,
            steps=steps,
            guidance=guidance,
            seed=seed,
            batch=batch,
        )
        timed = (rounds + 1 if rounds else 0) * min(batch, images)
        with calls_bar(steps * len(compared) * (images + timed)) as (on_step, stage):
            measured = evaluate(
                pipes,
                task,
                compared,
                rounds=rounds,
                model="shapes",
                controlnet=net.name,
                on_step=on_step,
                stage=stage,
            )
    finally:
        unet.close()
    title = "ControlNet skipped on shallow calls, on the shapes model"
    outcome.finish(output, title, as_json, controlnet=measured)
