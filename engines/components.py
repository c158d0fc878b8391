"""The networks around the UNet in a bundle: exported at the build, opened by the same engines.

For an engine such a network is a pair without shallow graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import EngineError, ParityError
from ..exporter.components import NORM_FILE, export_component, exportable
from ..exporter.convert import WEIGHTS_FILE
from ..exporter.imported_parts import import_component, networks_of
from ..exporter.load import PRECISIONS, ModelSource
from ..exporter.reference import REFERENCE_FILE
from .base import EngineOptions, EnginePair, Graphs
from .manifest import ComponentEntry, Tensor
from .precision import bounds
from .registry import compiler, engine

if TYPE_CHECKING:
    from .bundle import Bundle

FOLDER = "components"
_PARTS = ("text_encoder", "text_encoder_2", "vae")
_PRECISION_OF = {dtype: precision for precision, dtype in PRECISIONS.items()}


def compilable(source: ModelSource) -> list[str]:
    """The components of a pipeline that can be exported; of ONNX made elsewhere those that are graphs already."""
    if source.onnx:
        return networks_of(source)
    return [name for name in _PARTS if source.is_pipeline and exportable(source.root / name)]


def require_onnx(name: str) -> None:
    """Refuse an engine for these networks.

    Raises:
        EngineError: it compiles its graphs ahead, which is done for the UNet only.
    """
    if compiler(name) is not None:
        raise EngineError(
            f"{name} compiles the UNet only: build all networks with onnxruntime or openvino, which open ONNX graphs"
        )


def make_components(
    source: ModelSource, staged: Path, *, precision: str, opset: int, progress: Callable[[str], None]
) -> list[ComponentEntry]:
    """Export every network that can be, or import it, into a bundle in the making."""
    label = f"{precision}-opset{opset}"
    folder = staged / FOLDER / label
    entries = []
    for name in compilable(source):
        if source.onnx:
            progress(f"import {name}")
            networks = import_component(source, name, folder)
        else:
            progress(f"export {name}")
            networks = export_component(
                source.root / name, folder, precision=precision, opset=opset, variant=source.variant
            )
        for made in networks:
            place = made.path.parent.relative_to(staged).as_posix()
            outputs = tuple(Tensor.of(spec) for spec in made.outputs.values())
            entries.append(
                ComponentEntry(
                    name=made.name,
                    label=label,
                    precision=_PRECISION_OF[outputs[0].dtype],
                    multiple=made.multiple,
                    inputs=tuple(Tensor.of(spec) for spec in made.inputs.values()),
                    outputs=outputs,
                    graph=f"{place}/{made.path.name}",
                    weights=f"{place}/{WEIGHTS_FILE}",
                    reference=f"{place}/{REFERENCE_FILE}",
                    norm=f"{place}/{NORM_FILE}" if made.has_norm else None,
                )
            )
    return entries


def components_of(bundle: Bundle, precision: str) -> dict[str, ComponentEntry]:
    """The networks to open beside a UNet of this precision, by name: those exported with it, else with any."""
    found: dict[str, ComponentEntry] = {}
    for entry in bundle.manifest.components:
        if entry.name not in found or entry.label.startswith(f"{precision}-"):
            found[entry.name] = entry
    return found


def engine_for(bundle: Bundle, unet_engine: str) -> str:
    """The engine to open these networks with: the UNet's, or, where that compiles UNets only, the bundle's first other.

    Raises:
        EngineError: the bundle has no other.
    """
    names = [name for name in (unet_engine, *bundle.engines) if compiler(name) is None]
    if not names:
        require_onnx(unet_engine)
    return names[0]


def open_component(bundle: Bundle, entry: ComponentEntry, name: str, options: EngineOptions) -> EnginePair:
    """A network opened by an engine, after its digests were checked; ``full`` runs it.

    Raises:
        BundleError: a file is damaged.
        EngineError: the engine refuses it.
    """
    require_onnx(name)
    bundle.verify_files([entry.graph, entry.weights, *([entry.norm] if entry.norm else [])])
    return _open(bundle.path, entry, name, options)


def prove_component(
    root: Path, entry: ComponentEntry, name: str, options: EngineOptions, against: str = "PyTorch"
) -> float:
    """Hold a network against the answers that lie beside it; gives the largest difference.

    Args:
        against: whose answers these are.

    Raises:
        ParityError: it is too large.
    """
    import torch
    from safetensors.torch import load_file

    kept = load_file(root / entry.reference)
    limits = bounds(name, entry.precision, options.inference_precision, options.device)
    pair = _open(root, entry, name, options)
    try:
        bound = pair.prepare({each: tuple(kept[each].shape) for each in pair.inputs})
        for each in pair.inputs:
            bound.buffers[each].copy_(kept[each])
        bound.full()
        worst = 0.0
        for each in pair.outputs:
            got, expected = bound.buffers[each].float().cpu(), kept[each].float()
            error = (got - expected).abs().max() / (expected.abs().max() if limits.relative else 1.0)
            worst = max(worst, float(error) if bool(torch.isfinite(got).all()) else float("inf"))
        bound.close()
    finally:
        pair.close()
    if not worst <= limits.parity:
        raise ParityError(
            f"{entry.name} on {name} differs from {against} by {worst:.3g}, but at most {limits.parity:.3g} is "
            "allowed: build for another engine or without it, and please report it"
        )
    return worst


def _open(root: Path, entry: ComponentEntry, name: str, options: EngineOptions) -> EnginePair:
    graphs = Graphs(
        full=root / entry.graph,
        shallow={},
        inputs={each.name: each.spec() for each in entry.inputs},
        outputs={each.name: each.spec() for each in entry.outputs},
        cuts={},
        multiple=entry.multiple,
        precision=entry.precision,
    )
    return engine(name).open(graphs, options)
