"""The networks around the UNet in a bundle, opened by the same engines as the UNet.

For an engine such a network is a pair without shallow graphs.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ...errors import EngineError
from ..base import EngineOptions, EnginePair, Graphs
from ..registry import compiler, engine
from .bundle import Bundle, check_fits
from .manifest import ComponentEntry, EngineEntry


def components_of(bundle: Bundle, precision: str) -> dict[str, ComponentEntry]:
    """Return the networks to open with a UNet, by name, each in the UNet's precision if the bundle has it."""
    components: dict[str, ComponentEntry] = {}
    for entry in bundle.manifest.components:
        if entry.name not in components or entry.label.startswith(f"{precision}-"):
            components[entry.name] = entry
    return components


def engine_for(bundle: Bundle, unet_engine: str, entries: Iterable[ComponentEntry]) -> str:
    """Return the engine to open these networks with: the UNet's, or the bundle's first other one that has all.

    Raises:
        EngineError: no engine has all of them.
    """
    entries = list(entries)
    for name in (unet_engine, *bundle.engines):
        if all(_has(entry, name) for entry in entries):
            return name
    raise EngineError(
        f"{bundle.path} does not hold its other networks for {unet_engine}: build it with --compile-all again"
    )


def _has(entry: ComponentEntry, name: str) -> bool:
    return entry.graph is not None if compiler(name) is None else entry.compiled_by(name) is not None


def open_component(bundle: Bundle, entry: ComponentEntry, name: str, options: EngineOptions) -> EnginePair:
    """Open a network with an engine, after its digests were checked; ``full`` runs it.

    Raises:
        BundleError: a file is damaged.
        EngineError: the engine refuses the network, or the bundle does not hold it for this engine.
    """
    if not _has(entry, name):
        raise EngineError(f"{bundle.path} has no {entry.name} for {name}: build it with --compile-all --engine {name}")
    compiled = entry.compiled_by(name)
    bundle.verify_files([entry.norm] if entry.norm else [])
    if compiled is not None:
        bundle.require_trust()
        check_fits(compiled, options.device)
        bundle.verify_files(compiled.files)
    else:
        bundle.verify_files([file for file in (entry.graph, entry.weights) if file])
    file = entry.graph if compiled is None else compiled.full
    return engine(name).open(network_graphs(entry, bundle.path / str(file), compiled), options)


def network_graphs(entry: ComponentEntry, file: Path, compiled: EngineEntry | None = None) -> Graphs:
    """Return a network's file with its inputs and outputs, for an engine to open.

    Args:
        compiled: the engine's own build, if the file belongs to one.
    """
    return Graphs(
        full=file,
        shallow={},
        inputs={tensor.name: tensor.spec() for tensor in entry.inputs},
        outputs={tensor.name: tensor.spec() for tensor in entry.outputs},
        cuts={},
        multiple=entry.multiple,
        precision=entry.precision,
        profiles=tuple(profile.profile() for profile in compiled.profiles) if compiled is not None else (),
        settings=compiled.settings if compiled is not None else {},
    )
