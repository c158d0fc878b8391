"""Exports through the cache of the test run, so that builds of the same model do not export it again."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from offcut.engines.builder.resolve import weights_digest
from offcut.exporter.export_cache import ExportCache, cached_export
from offcut.exporter.load import locate
from offcut.exporter.trace.export import DEFAULT_OPSET, ExportedUNet


def export_once(model: Path, out: Path, precision: str = "fp32") -> ExportedUNet:
    """Export a UNet as ``offcut.build`` does: into the cache, or from there."""
    source = locate(model)
    return cached_export(
        source,
        out,
        weights_digest=weights_digest(source),
        precision=precision,
        opset=DEFAULT_OPSET,
        dims={},
        cache=ExportCache.of_user(),
    )


def copy_export(exported: ExportedUNet, out: Path) -> ExportedUNet:
    """Copy an export's files into a new directory, for a test that changes them."""
    out.mkdir(parents=True)
    for file in (exported.path, exported.weights, exported.reference, exported.path.parent / "parameters.json"):
        shutil.copyfile(file, out / file.name)
    return replace(
        exported,
        path=out / exported.path.name,
        weights=out / exported.weights.name,
        reference=out / exported.reference.name,
    )
