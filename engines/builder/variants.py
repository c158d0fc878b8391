"""A variant of a build: the export in one precision and opset, and its cuts, laid out as in the bundle."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from ...errors import BundleError
from ...exporter.cut import Cut, find_cut, find_cuts, split_all
from ...exporter.export_cache import ExportCache, cached_export
from ...exporter.foreign.unet import export_foreign_unet
from ...exporter.trace.convert import WEIGHTS_FILE
from ...exporter.trace.export import PARAMETERS_FILE, ExportedUNet
from ...exporter.trace.reference import REFERENCE_FILE
from ..base import Progress
from ..bundle.bundle import Bundle
from ..bundle.manifest import CutEntry, GraphFiles, Quantization, TensorEntry, Variant
from .quantize import quantize_export
from .resolve import BuildPlan

UNET_CONFIG = "unet/config.json"


def make_variant(plan: BuildPlan, existing: Bundle | None, out: Path, staged: Path, progress: Progress) -> Variant:
    """Return the plan's variant with all its cuts.

    The bundle's variant is reused if it has all cuts; if some are missing, its export is cut again. Without such a
    variant the UNet is exported.
    """
    variant = existing.manifest.variants.get(plan.variant) if existing else None
    existing_cuts = [cut.name for cut in variant.cuts] if variant else []
    if variant is None or existing is None or variant.graphs is None:
        return _export(plan, existing is None, existing_cuts, staged, progress)
    _check_calibration(plan, variant)
    existing.verify_files([*variant.graphs.files, variant.reference])
    possible_cuts = find_cuts(out / variant.graphs.full)
    plan_cuts = [find_cut(possible_cuts, name).name for name in plan.cuts]
    if set(plan_cuts) <= set(existing_cuts):
        progress(f"reuse the export {plan.variant} and its graphs")
        return variant
    progress(f"reuse the export {plan.variant}, cut it again")
    graphs, cuts = _cut(plan, staged, out / variant.graphs.full, [*existing_cuts, *plan_cuts])
    return variant.model_copy(update={"graphs": graphs, "cuts": cuts})


def _export(
    plan: BuildPlan, is_new_bundle: bool, existing_cuts: Sequence[str], staged: Path, progress: Progress
) -> Variant:
    folder = staged / "unet" / plan.variant
    cut_names = [*existing_cuts, *plan.cuts]
    exported, quantization = _exported(plan, folder, cut_names, progress)
    if is_new_bundle:
        config = json.dumps(plan.source.config, indent=2, default=str)
        (staged / UNET_CONFIG).write_text(config + "\n", encoding="utf-8")
    progress("cut")
    graphs, cuts = _cut(plan, staged, exported.path, cut_names)
    exported.path.unlink()
    return Variant(
        name=plan.variant,
        precision=plan.precision,
        opset=plan.opset,
        fixed=dict(plan.fixed),
        multiple=exported.multiple,
        inputs=tuple(TensorEntry.of(spec) for spec in exported.inputs.values()),
        noise_pred=TensorEntry.of(exported.outputs["noise_pred"]),
        cuts=cuts,
        graphs=graphs,
        reference=f"unet/{plan.variant}/{REFERENCE_FILE}",
        quantization=quantization,
    )


def _exported(
    plan: BuildPlan, folder: Path, cuts: Sequence[str], progress: Progress
) -> tuple[ExportedUNet, Quantization | None]:
    """Export in the plan's precision. A low precision is rounded from an export in the base precision."""
    if plan.source.onnx:
        return export_foreign_unet(
            plan.source, folder, precision=plan.precision, dims=plan.fixed, progress=progress
        ), None

    def export(target: Path, precision: str) -> ExportedUNet:
        return cached_export(
            plan.source,
            target,
            weights_digest=plan.weights_digest,
            precision=precision,
            opset=plan.opset,
            dims=plan.fixed,
            adapters=plan.adapters,
            cache=ExportCache.of_user() if plan.cache else None,
            progress=progress,
        )

    if plan.scheme is None:
        return export(folder, plan.precision), None
    assert plan.calibrator is not None
    base_folder = folder.with_name(f"{folder.name}-base")
    base = export(base_folder, plan.scheme.base)
    folder.mkdir(parents=True)
    try:
        return quantize_export(base, folder, plan.source, plan.scheme, cuts, plan.calibrator, progress)
    finally:
        shutil.rmtree(base_folder)


def _check_calibration(plan: BuildPlan, variant: Variant) -> None:
    """Refuse to add to a variant that was calibrated in another way than the plan says."""
    if plan.calibrator is None or variant.quantization is None:
        return
    recorded = variant.quantization
    requested = (plan.calibrator.record(plan.source), plan.calibrator.method, plan.calibrator.sensitive)
    if (recorded.calibration, recorded.method, recorded.sensitive) != requested:
        raise BundleError(
            f"this bundle's {variant.name} was calibrated in another way: give the same calibration again, "
            "or build into another directory"
        )


def _cut(plan: BuildPlan, staged: Path, graph: Path, names: Sequence[str]) -> tuple[GraphFiles, tuple[CutEntry, ...]]:
    """Cut a graph into the staging directory, with a link to its weights, and return its files and cuts."""
    folder = staged / "unet" / plan.variant
    is_recut = graph.parent != folder
    # Files of a bundle never change, so the graphs of another set of cuts get other names.
    suffix = "-" + hashlib.sha256(" ".join(names).encode()).hexdigest()[:8] if is_recut else ""
    twins = split_all(graph, names, folder, suffix, link=True)
    base = f"unet/{plan.variant}"
    graphs = GraphFiles(
        full=f"{base}/{twins[0].full.name}",
        shallow={twin.cut.name: f"{base}/{twin.shallow.name}" for twin in twins},
        weights=f"{base}/{WEIGHTS_FILE}",
        parameters=f"{base}/{PARAMETERS_FILE}",
    )
    return graphs, tuple(_cut_entry(twin.cut) for twin in twins)


def _cut_entry(cut: Cut) -> CutEntry:
    return CutEntry(name=cut.name, aliases=cut.aliases, cached=tuple(TensorEntry.of(spec) for spec in cut.cached))
