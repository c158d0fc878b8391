"""The manifest of a bundle after a build: what it held, and what was made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version

from ...errors import BundleError
from ...exporter.lora import find
from ..builder.request import Plan
from ..builder.variants import UNET_CONFIG
from .bundle import engine_files
from .manifest import (
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
from .pipeline_files import pipeline_class


def merge(
    current: Manifest | None,
    plan: Plan,
    variant: Variant,
    entries: Sequence[EngineEntry],
    parts: Sequence[str],
    files: Mapping[str, FileEntry],
    components: Sequence[ComponentEntry] = (),
) -> Manifest:
    """The manifest that is there now, with what this build adds. Another build may have come first.

    Raises:
        BundleError: it came with another model.
    """
    if current is not None and current.source.weights_digest != plan.weights_digest:
        raise BundleError(f"another build put another model ({current.source.model}) into this bundle meanwhile")
    variants = {**(current.variants if current else {}), variant.name: variant}
    added = {entry.key: entry for entry in entries}  # last, since the newest build of an engine is the one opened
    engines = {
        **{key: entry for key, entry in (current.engines if current else {}).items() if key not in added},
        **added,
    }
    schedules = dict(current.schedules) if current else {}
    known = {**(current.files if current else {}), **files}
    networks = {(each.name, each.label): each for each in (current.components if current else ())}
    for each in components:
        before = networks.get((each.name, each.label))
        networks[each.name, each.label] = before.joined(each) if before else each
    named = _named(variants, engines, parts, networks.values(), schedules.values())
    return Manifest(
        schema_version=SCHEMA_VERSION,
        offcut_version=version("offcut"),
        family=plan.source.family.name,
        pipeline=pipeline_class(plan.source),
        source=source_of(plan),
        unet_config=UNET_CONFIG,
        parts=tuple(parts),
        variants=variants,
        engines=engines,
        components=tuple(networks.values()),
        schedules=schedules,
        files={name: known[name] for name in sorted(named & set(known))},
    )


def source_of(plan: Plan) -> Source:
    """The model that a bundle is made of."""
    return Source(
        model=plan.source.name,
        revision=plan.source.revision,
        variant=plan.source.variant,
        weights_digest=plan.weights_digest,
        loras=tuple(FusedLora(name=find(each.path).name, scale=each.scale) for each in plan.source.loras),
        attention=plan.source.attention,
        onnx=plan.source.onnx,
    )


def _named(
    variants: Mapping[str, Variant],
    engines: Mapping[str, EngineEntry],
    parts: Sequence[str],
    components: Iterable[ComponentEntry],
    schedules: Iterable[ScheduleEntry],
) -> set[str]:
    """Every file that the manifest speaks of; what it no longer does, ``prune`` removes."""
    names = {UNET_CONFIG, *parts, *(file for each in components for file in each.files)}
    for variant in variants.values():
        names |= {variant.reference, *(variant.graphs.files if variant.graphs else ())}
    for entry in engines.values():
        names |= {*engine_files(entry, variants[entry.variant]), f"engines/{entry.key}/build.json"}
    for schedule in schedules:
        names.update(schedule.files)
    return names
