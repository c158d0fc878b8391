"""The networks around the UNet in a bundle: exported at the build, opened by the same engines.

For an engine such a network is a pair without shallow graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from ...errors import EngineError, ParityError
from ...exporter.components import NORM_FILE, export_component, exportable
from ...exporter.foreign.networks import import_component, networks_of
from ...exporter.load import PRECISIONS, ModelSource
from ...exporter.trace.convert import WEIGHTS_FILE
from ...exporter.trace.reference import REFERENCE_FILE
from ..base import EngineOptions, EnginePair, Graphs
from ..precision import Bounds, bounds
from ..registry import compiler, engine
from .bundle import Bundle, check_fits
from .manifest import ComponentEntry, EngineEntry, Tensor

FOLDER = "components"
_PARTS = ("text_encoder", "text_encoder_2", "vae")
_PRECISION_OF = {dtype: precision for precision, dtype in PRECISIONS.items()}


def compilable(source: ModelSource) -> list[str]:
    """The components of a pipeline that can be exported; of ONNX made elsewhere those that are graphs already."""
    if source.onnx:
        return networks_of(source)
    return [name for name in _PARTS if source.is_pipeline and exportable(source.component(name))]


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
                source.component(name), folder, precision=precision, opset=opset, variant=source.variant
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


def engine_for(bundle: Bundle, unet_engine: str, entries: Iterable[ComponentEntry]) -> str:
    """The engine to open these networks with: the UNet's, or the bundle's first other that has them all.

    Raises:
        EngineError: none has them.
    """
    entries = list(entries)
    names = [name for name in (unet_engine, *bundle.engines) if all(_has(entry, name) for entry in entries)]
    if not names:
        raise EngineError(
            f"{bundle.path} does not hold its other networks for {unet_engine}: build it with --compile-all again"
        )
    return names[0]


def _has(entry: ComponentEntry, name: str) -> bool:
    return entry.graph is not None if compiler(name) is None else entry.compiled_by(name) is not None


def open_component(bundle: Bundle, entry: ComponentEntry, name: str, options: EngineOptions) -> EnginePair:
    """A network opened by an engine, after its digests were checked; ``full`` runs it.

    Raises:
        BundleError: a file is damaged.
        EngineError: the engine refuses it, or does not have it.
    """
    if not _has(entry, name):
        raise EngineError(f"{bundle.path} has no {entry.name} for {name}: build it with --compile-all --engine {name}")
    compiled = entry.compiled_by(name)
    bundle.verify_files([entry.norm] if entry.norm else [])
    if compiled is not None:
        check_fits(compiled, options.device)
        bundle.verify_files(compiled.files)
    else:
        bundle.verify_files([file for file in (entry.graph, entry.weights) if file])
    return _open(bundle.path, entry, name, options, compiled)


def prove_component(
    root: Path,
    entry: ComponentEntry,
    name: str,
    options: EngineOptions,
    against: str = "PyTorch",
    compiled: EngineEntry | None = None,
    within: Path | None = None,
) -> float:
    """Hold a network against the answers that lie beside it; gives the largest difference.

    Args:
        root: the directory that the network's file names start from.
        against: whose answers these are.
        compiled: the engine's own build, where it compiles.
        within: the directory that its file names start from, if another.

    Raises:
        ParityError: it is too large.
    """
    worst, limits = component_error(root, entry, name, options, compiled, within)
    if not worst <= limits.parity:
        raise ParityError(
            f"{entry.name} on {name} differs from {against} by {worst:.3g}, but at most {limits.parity:.3g} is "
            "allowed: build for another engine or without it, and please report it"
        )
    return worst


def component_error(
    root: Path,
    entry: ComponentEntry,
    name: str,
    options: EngineOptions,
    compiled: EngineEntry | None = None,
    within: Path | None = None,
) -> tuple[float, Bounds]:
    """The largest difference that ``prove_component`` looks at, and what is allowed."""
    import torch
    from safetensors.torch import load_file

    own = compiled.references if compiled is not None else ()
    references = [(within or root) / file for file in own] or [root / entry.reference]
    limits = bounds(name, entry.precision, options.inference_precision, options.device)
    worst = 0.0
    pair = _open(root, entry, name, options, compiled, within)
    try:
        for kept in map(load_file, references):
            bound = pair.prepare({each: tuple(kept[each].shape) for each in pair.inputs})
            for each in pair.inputs:
                bound.buffers[each].copy_(kept[each])
            bound.full()
            for each in pair.outputs:
                got, expected = bound.buffers[each].float().cpu(), kept[each].float()
                error = (got - expected).abs().max() / (expected.abs().max() if limits.relative else 1.0)
                worst = max(worst, float(error) if bool(torch.isfinite(got).all()) else float("inf"))
            bound.close()
    finally:
        pair.close()
    return worst, limits


def _open(
    root: Path,
    entry: ComponentEntry,
    name: str,
    options: EngineOptions,
    compiled: EngineEntry | None,
    within: Path | None = None,
) -> EnginePair:
    file = (within or root) / compiled.full if compiled is not None else root / str(entry.graph)
    return engine(name).open(contract(entry, file, compiled), options)


def contract(entry: ComponentEntry, file: Path, compiled: EngineEntry | None = None) -> Graphs:
    """A network's file with what goes in and out of it."""
    return Graphs(
        full=file,
        shallow={},
        inputs={each.name: each.spec() for each in entry.inputs},
        outputs={each.name: each.spec() for each in entry.outputs},
        cuts={},
        multiple=entry.multiple,
        precision=entry.precision,
        profiles=tuple(each.profile() for each in compiled.profiles) if compiled is not None else (),
        settings=compiled.settings if compiled is not None else {},
    )
