"""``offcut bench swap``: what a LoRA takes to go onto an open bundle, beside a rebuild."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..options import BundleArgument, Device, Json, Threads
from ..shell import quiet_libraries, stages
from .outcome import BenchRun

_PACKAGES = ("torch", "diffusers", "onnx", "onnxruntime", "openvino", "offcut")


def swap(
    bundle: BundleArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory of the result and its page.")] = Path(
        "bench-swap"
    ),
    model: Annotated[
        Path | None, typer.Option(help="What the bundle was built from, to time a rebuild with the LoRA fused.")
    ] = None,
    lora: Annotated[Path | None, typer.Option(help="A LoRA file; by default a random one is made.")] = None,
    rank: Annotated[int, typer.Option(help="Of the random one, for every attention layer.", min=1)] = 16,
    engine: Annotated[list[str] | None, typer.Option(help="Of the bundle; all by default. Again for several.")] = None,
    size: Annotated[
        int | None, typer.Option(help="Side of the image that the calls are for, in pixels; a tiny one by default.")
    ] = None,
    iterations: Annotated[int, typer.Option(help="Rounds of load, rescale and unload.", min=1)] = 3,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Time a LoRA's way onto open engines and off again, beside a rebuild; exit 1 if the weights did not come back."""
    from ...benchmarks.swap import measure
    from ...engines.bundle.bundle import Bundle

    outcome = BenchRun(_PACKAGES)
    quiet_libraries()
    with stages() as stage:
        measured = measure(
            Bundle.open(bundle),
            engines=engine or (),
            model=model,
            lora=lora,
            rank=rank,
            size=size,
            rounds=iterations,
            threads=threads,
            device=device,
            progress=stage,
        )
    outcome.finish(output, f"LoRAs on {bundle.name}", as_json, swap=measured)
    if not all(row.restored for row in measured.rows):
        raise typer.Exit(1)
