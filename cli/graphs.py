"""The commands on graphs: export, split, cuts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE
from rich.table import Table

from .options import Adapters, Attention, Fix, Json, Model, Opset, Precision, Revision, Subfolder, Variant
from .shell import contract_json, out, parse_dims, print_bold, print_contract, print_json, stages

if TYPE_CHECKING:
    from ..exporter.specs import TensorSpec


def export(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory for unet.onnx and weights.data.")],
    precision: Precision = "fp32",
    opset: Opset = None,
    fix: Fix = None,
    adapter: Adapters = None,
    attention: Attention = None,
    revision: Revision = None,
    variant: Variant = None,
    subfolder: Subfolder = None,
    as_json: Json = False,
) -> None:
    """Export a UNet to ONNX: one graph, one weights file."""
    from ..exporter.trace.export import DEFAULT_OPSET
    from ..exporter.trace.export import export as run_export

    with stages() as stage:
        exported = run_export(
            model,
            output,
            precision=precision,
            opset=opset or DEFAULT_OPSET,
            dims=parse_dims(fix),
            adapters=adapter or (),
            revision=revision,
            variant=variant,
            subfolder=subfolder,
            attention=attention,
            progress=stage,
        )
    contract = {"inputs": exported.inputs, "outputs": exported.outputs}
    if as_json:
        print_json({"path": str(exported.path), "weights": str(exported.weights), **contract_json(contract)})
        return
    print_bold(exported.path, f" with {_size(exported.weights)} of weights in {exported.weights.name}")
    print_contract(contract)


def split(
    graph: Annotated[Path, typer.Argument(help="ONNX file of a UNet from any exporter.")],
    cut: Annotated[
        list[str] | None, typer.Option(help="deepcache:K, paper:K or mlperf; repeatable. deepcache:0 by default.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Output directory; by default that of the graph.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Cut an ONNX UNet into full.onnx and shallow-*.onnx, for trtexec or an engine of your own."""
    from ..exporter.cut import split_all
    from ..exporter.graph import contract

    pairs = split_all(graph, cut or ["deepcache:0"], output)
    first = pairs[0]
    contracts = {path: contract(path) for path in (first.full, *(pair.shallow for pair in pairs))}
    if as_json:
        graphs = {path: {"path": str(path), **contract_json(described)} for path, described in contracts.items()}
        cuts = {
            pair.cut.name: {"cached": [spec.name for spec in pair.cached], "shallow": graphs[pair.shallow]}
            for pair in pairs
        }
        print_json({"cut": first.cut.name, **cuts[first.cut.name], "full": graphs[first.full], "cuts": cuts})
        return
    for path, described in contracts.items():
        print_bold(path)
        print_contract(described)
    for pair in pairs:
        names = ", ".join(spec.name for spec in pair.cached)
        out.print(f"Feed {names} from the full graph to {pair.shallow.name}.")
    out.print("All graphs read the weights file next to them.")


def cuts(
    model: Annotated[Path, typer.Argument(help="ONNX file of a UNet, output directory of offcut export, or bundle.")],
    batch: Annotated[int, typer.Option(help="Batch of the UNet: twice the number of images with guidance.")] = 2,
    height: Annotated[int, typer.Option(help="Height of the latent: image height / 8 for Stable Diffusion.")] = 64,
    width: Annotated[int, typer.Option(help="Width of the latent.")] = 64,
    sequence: Annotated[int, typer.Option(help="Number of text tokens.")] = 77,
    frames: Annotated[int, typer.Option(help="Number of frames of a video.")] = 16,
    as_json: Json = False,
) -> None:
    """List a UNet's cuts with their cached features, the cost of a shallow step, and the expected speed-up."""
    from dataclasses import asdict

    from ..engines.bundle.bundle import onnx_of
    from ..exporter.measure import measure_cuts

    dims = {"batch": batch, "frames": frames, "height": height, "width": width, "sequence": sequence}
    costs = measure_cuts(onnx_of(model), dims)
    if as_json:
        print_json([asdict(cost) for cost in costs])
        return
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("cut", no_wrap=True)
    table.add_column("cached", no_wrap=True)
    for heading in ("params", "FLOPs", "MiB", *(f"N={interval}" for interval in costs[0].speed_up)):
        table.add_column(heading, justify="right")
    for cost in costs:
        table.add_row(
            cost.cut.name,
            "\n".join(_feature(spec) for spec in cost.cut.cached),
            f"{cost.parameters:.1%}",
            f"{cost.flops:.1%}",
            f"{cost.cache_bytes / 2**20:.1f}",
            *(f"{speed_up:.1f}x" for speed_up in cost.speed_up.values()),
        )
    out.print(table)
    out.print(
        "params and FLOPs: cost of a shallow step as a share of a full step. "
        "N: speed-up at this interval if time follows FLOPs."
    )


def _feature(spec: TensorSpec) -> str:
    """Return the shape of a feature relative to the latent, e.g. ``320 x h/2 x w/2``."""
    return " x ".join(str(dim).replace("height", "h").replace("width", "w") for dim in spec.shape[1:])


def _size(path: Path) -> str:
    return f"{path.stat().st_size / 2**20:.0f} MiB"
