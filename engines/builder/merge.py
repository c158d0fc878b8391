"""The manifest of a bundle after a build: the earlier entries and the entries of the build."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version

from ...errors import BundleError
from ...exporter.lora import find
from ..bundle.bundle import engine_files
from ..bundle.manifest import (
    SCHEMA_VERSION,
    ComponentEntry,
    EngineEntry,
    FileEntry,
    FusedLora,
    Manifest,
    ScheduleEntry,
    Source,
    Variant,
)
from ..bundle.pipeline_files import pipeline_class
from .resolve import BuildPlan
from .variants import UNET_CONFIG


def merge(
    current: Manifest | None,
    plan: BuildPlan,
    variant: Variant,
    entries: Sequence[EngineEntry],
    pipeline_files: Sequence[str],
    files: Mapping[str, FileEntry],
    components: Sequence[ComponentEntry] = (),
) -> Manifest:
    """Return the current manifest with the entries of this build. Another build may have committed meanwhile.

    Raises:
        BundleError: the other build was of another model.
    """
    if current is not None and current.source.weights_digest != plan.weights_digest:
        raise BundleError(f"another build put another model ({current.source.model}) into this bundle meanwhile")
    variants = {**(current.variants if current else {}), variant.name: variant}
    new = {entry.key: entry for entry in entries}
    # The newest build of an engine is the one that is opened, so new entries come last.
    engines = {key: entry for key, entry in (current.engines if current else {}).items() if key not in new} | new
    schedules = dict(current.schedules) if current else {}
    known = {**(current.files if current else {}), **files}
    networks = {(entry.name, entry.label): entry for entry in (current.components if current else ())}
    for component in components:
        before = networks.get((component.name, component.label))
        networks[component.name, component.label] = before.joined(component) if before else component
    names = _names(variants, engines, pipeline_files, networks.values(), schedules.values())
    return Manifest(
        schema_version=SCHEMA_VERSION,
        offcut_version=version("offcut"),
        family=plan.source.family.name,
        pipeline=pipeline_class(plan.source),
        source=source_of(plan),
        unet_config=UNET_CONFIG,
        parts=tuple(pipeline_files),
        variants=variants,
        engines=engines,
        components=tuple(networks.values()),
        schedules=schedules,
        files={name: known[name] for name in sorted(names & set(known))},
    )


def source_of(plan: BuildPlan) -> Source:
    """Return the model that a bundle is built from."""
    return Source(
        model=plan.source.name,
        revision=plan.source.revision,
        variant=plan.source.variant,
        weights_digest=plan.weights_digest,
        loras=tuple(FusedLora(name=find(lora.path).name, scale=lora.scale) for lora in plan.source.loras),
        attention=plan.source.attention,
        onnx=plan.source.onnx,
    )


def _names(
    variants: Mapping[str, Variant],
    engines: Mapping[str, EngineEntry],
    pipeline_files: Sequence[str],
    components: Iterable[ComponentEntry],
    schedules: Iterable[ScheduleEntry],
) -> set[str]:
    """Return the names of all files of the manifest; ``prune`` removes other files."""
    names = {UNET_CONFIG, *pipeline_files, *(file for component in components for file in component.files)}
    for variant in variants.values():
        names |= {variant.reference, *(variant.graphs.files if variant.graphs else ())}
    for entry in engines.values():
        names |= {*engine_files(entry, variants[entry.variant]), f"engines/{entry.key}/build.json"}
    for schedule in schedules:
        names.update(schedule.files)
    return names
