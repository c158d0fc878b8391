"""Builds of the networks around the UNet for each engine: text encoders, and the halves of an autoencoder.

An engine opens such a network as the full graph of a pair without shallow graphs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ...exporter.components import (
    NORM_FILE,
    component_networks,
    component_of,
    export_component,
    write_component_reference,
)
from ...exporter.foreign.networks import export_foreign_component
from ...exporter.load import PRECISIONS
from ...exporter.specs import symbols
from ...exporter.trace.convert import WEIGHTS_FILE
from ...exporter.trace.reference import REFERENCE_FILE
from ..base import EngineOptions, Progress
from ..bundle.bundle import Bundle
from ..bundle.manifest import ComponentEntry, EngineEntry, TensorEntry
from ..bundle.networks import network_graphs
from ..profiles import Profile, Range
from ..registry import compiler, engine
from .compile import WriteReference, compile_engine, engine_entry, engine_key, verify_engine
from .merge import source_of
from .resolve import BuildPlan, compilable
from .verify import require, verify_network

FOLDER = "components"
_PRECISION_OF = {dtype: precision for precision, dtype in PRECISIONS.items()}


def build_components(
    plan: BuildPlan, engines: Sequence[EngineEntry], existing: Bundle | None, staged: Path, progress: Progress
) -> Sequence[ComponentEntry]:
    """Return the networks around the UNet, verified on every engine of the build; their new files are in ``staged``.

    Args:
        engines: the build's engines of the UNet.
        existing: the bundle before this build; None for a new bundle.

    Raises:
        EngineError: an engine refuses a network.
        ParityError: a network's outputs are out of their bounds.
    """
    if not plan.compile_all:
        return ()
    label = f"{plan.base}-opset{plan.opset}"
    earlier = [entry for entry in existing.manifest.components if entry.label == label] if existing else []
    # A bundle for deployment has kept the compiled engines and dropped the graphs.
    has_graphs = bool(earlier) and all(entry.graph is not None for entry in earlier)
    root = existing.path if has_graphs and existing else staged
    if has_graphs:
        progress(f"reuse the networks around the UNet, {label}")
        entries = earlier
    else:
        compiled = {entry.name: entry.engines for entry in earlier}
        entries = [
            entry.model_copy(update={"engines": compiled.get(entry.name, ())})
            for entry in _export_components(plan, label, staged, progress)
        ]
    for unet in engines:
        if compiler(unet.engine) is None:
            for entry in entries:
                progress(f"verify {entry.name} on {unet.engine}")
                _require_parity(plan, entry, root, plan.device, unet.engine)
        elif not plan.source.onnx:  # foreign networks run only in an engine that opens ONNX graphs
            entries = compile_components(plan, unet, entries, root, staged, progress)
    return [_without_graph(entry, staged) for entry in entries] if plan.deploy and not has_graphs else entries


def _export_components(plan: BuildPlan, label: str, staged: Path, progress: Progress) -> list[ComponentEntry]:
    """Export every network that can be exported, or import a foreign one, into the staging directory."""
    source, folder = plan.source, staged / FOLDER / label
    entries = []
    for name in compilable(source):
        if source.onnx:
            progress(f"import {name}")
            networks = export_foreign_component(source, name, folder)
        else:
            progress(f"export {name}")
            networks = export_component(
                source.component(name), folder, precision=plan.base, opset=plan.opset, variant=source.variant
            )
        for network in networks:
            place = network.path.parent.relative_to(staged).as_posix()
            outputs = tuple(TensorEntry.of(spec) for spec in network.outputs.values())
            entries.append(
                ComponentEntry(
                    name=network.name,
                    label=label,
                    precision=_PRECISION_OF[outputs[0].dtype],
                    multiple=network.multiple,
                    inputs=tuple(TensorEntry.of(spec) for spec in network.inputs.values()),
                    outputs=outputs,
                    graph=f"{place}/{network.path.name}",
                    weights=f"{place}/{WEIGHTS_FILE}",
                    reference=f"{place}/{REFERENCE_FILE}",
                    norm=f"{place}/{NORM_FILE}" if network.has_norm else None,
                )
            )
    return entries


def _without_graph(entry: ComponentEntry, staged: Path) -> ComponentEntry:
    for name in (entry.graph, entry.weights):
        (staged / str(name)).unlink()
    return entry.model_copy(update={"graph": None, "weights": None})


def compile_components(
    plan: BuildPlan,
    unet: EngineEntry,
    entries: Sequence[ComponentEntry],
    root: Path,
    staged: Path,
    progress: Progress,
) -> list[ComponentEntry]:
    """Compile networks with an engine, and verify them where the engine runs here.

    Args:
        unet: the engine's build of the UNet; the networks are compiled for the same sizes.
        entries: the networks; one that the engine has compiled already is left as it is.
        root: the directory that the names of the networks' graphs start from.
        staged: the staging directory, laid out as the bundle is.

    Raises:
        EngineError: the engine refuses a network.
        ParityError: a network's outputs are out of their bounds.
    """
    return [_compile_component(plan, unet, entry, root, staged, progress) for entry in entries]


def _compile_component(
    plan: BuildPlan, unet: EngineEntry, entry: ComponentEntry, root: Path, staged: Path, progress: Progress
) -> ComponentEntry:
    name, graph = unet.engine, str(entry.graph)
    profiles = _profiles(entry, unet, plan.fixed)
    subject = [plan.weights_digest, entry.label, entry.name, name, engine(name).probe().version]
    key = engine_key(plan, name, subject, profiles)
    if any(compiled.key == key for compiled in entry.engines):
        progress(f"reuse {entry.name} of {key}")
        return entry
    compiled = compile_engine(
        plan,
        engine_entry(plan, name, key, entry.label, graph, {}),
        network_graphs(entry, root / graph),
        folder=staged / FOLDER / entry.label / entry.name / key,
        staged=staged,
        profiles=profiles,
        fixed={},
        write_reference=_reference_writer(plan, entry),
        progress=progress,
        component=entry.name,
    )

    def check(device: str) -> None:
        _require_parity(plan, entry, root, device, name, compiled, staged)

    compiled = verify_engine(plan, compiled, f"{entry.name} on {name}", check, progress)
    return entry.model_copy(update={"engines": (*entry.engines, compiled)})


def _require_parity(
    plan: BuildPlan,
    entry: ComponentEntry,
    root: Path,
    device: str,
    name: str,
    compiled: EngineEntry | None = None,
    staged: Path | None = None,
) -> None:
    """Require that an engine's outputs of a network are within their bounds.

    Args:
        root: the directory that the names of the network's files start from.
        compiled, staged: the engine's own build, and the directory of its files; None where it opens the graph.
    """
    against = source_of(plan).reference
    check = verify_network(entry, name, EngineOptions(device), root, against, compiled, staged)
    require([check], f"{entry.name} on {name}")


def _profiles(entry: ComponentEntry, unet: EngineEntry, fixed: Mapping[str, int]) -> tuple[Profile, ...]:
    """Return the sizes of this network for each profile of the UNet; empty if the UNet has no profile.

    The UNet's batch holds a guided image twice, so half of it is the best size here.
    """
    specs = [tensor.spec() for tensor in entry.inputs]
    profiles = []
    for profile in unet.profiles:
        sizes = [{**fixed, **dims} for dims in (profile.min, profile.opt, profile.max)]
        ranges: dict[str, Range] = {}
        for name in symbols(specs):
            # An autoencoder takes the frames of a video as its batch.
            scales = [size.get("frames", 1) if name == "batch" else entry.multiple for size in sizes]
            low, best, high = (size[name] * scale for size, scale in zip(sizes, scales, strict=True))
            ranges[name] = (1, max(1, best // 2), high) if name == "batch" else (low, best, high)
        profiles.append(Profile.of(ranges))
    # A text encoder has no height, so several profiles of the UNet may give it the same one.
    return tuple(profile for index, profile in enumerate(profiles) if profile not in profiles[:index])


def _reference_writer(plan: BuildPlan, entry: ComponentEntry) -> WriteReference:
    """Return a function that writes PyTorch's outputs at the smallest sizes of a profile."""

    def write(profile: Profile, path: Path) -> None:
        component = plan.source.component(component_of(entry.name))
        precision = entry.label.partition("-")[0]
        networks = component_networks(component, precision=precision, variant=plan.source.variant)
        (network,) = (network for network in networks if network.name == entry.name)
        example = network.example(profile.min)
        write_component_reference(network, example, network.compute(example), path)

    return write
