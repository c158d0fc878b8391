"""``offcut bench swap``: seconds to load and unload a LoRA on open engines, compared with a rebuild."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ...benchmarks.swap import SwapRequest
from ..options import BundleArgument, Device, Json, Origin, Threads, unpack
from ..shell import quiet_libraries, stages
from .outcome import BenchRun

_PACKAGES = ("torch", "diffusers", "onnx", "onnxruntime", "openvino", "offcut")
_OPTIONS = {
    "model": typer.Option(help="The model that the bundle was built from, to time a rebuild with the LoRA fused."),
    "lora": typer.Option(help="A LoRA file; by default a random one is made."),
    "rank": typer.Option(help="Rank of the random LoRA, which has every attention layer.", min=1),
    "engines": typer.Option("--engine", help="Engine of the bundle; repeatable, all by default."),
    "size": typer.Option(help="Side in pixels of the image that the calls are for; a tiny one by default."),
    "rounds": typer.Option("--iterations", help="Rounds of load, rescale and unload.", min=1),
}


@unpack
def swap(
    bundle: BundleArgument,
    origin: Annotated[Origin, "Origin of the bundle"],
    request: Annotated[SwapRequest, _OPTIONS],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory of the result and its page.")] = Path(
        "bench-swap"
    ),
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Time loading a LoRA into open engines and unloading it, compared with a rebuild.

    Exit code 1 if the weights did not come back bit for bit.
    """
    from ...benchmarks.swap import measure

    bench = BenchRun(_PACKAGES)
    quiet_libraries()
    with stages() as stage:
        measured = measure(origin.open(bundle), replace(request, device=device, threads=threads), stage)
    bench.finish(output, f"LoRAs on {bundle.name}", as_json, swap=measured)
    if not all(row.restored for row in measured.rows):
        raise typer.Exit(1)
