"""A variant in the making: the export of one precision and opset, and all its cuts, laid out as in the bundle."""

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
from .quantize import quantized
from .resolve import BuildPlan

UNET_CONFIG = "unet/config.json"


def make_variant(plan: BuildPlan, existing: Bundle | None, out: Path, staged: Path, progress: Progress) -> Variant:
    """The export with all the cuts: the bundle's own where it has them, recut where it has others, or a new one."""
    held = existing.manifest.variants.get(plan.variant) if existing else None
    there = [cut.name for cut in held.cuts] if held else []
    if held is None or existing is None or held.graphs is None:
        return _export(plan, existing is None, there, staged, progress)
    _check_calibration(plan, held)
    existing.verify_files([*held.graphs.files, held.reference])
    known = find_cuts(out / held.graphs.full)
    wanted = [find_cut(known, name).name for name in plan.cuts]
    if set(wanted) <= set(there):
        progress(f"reuse the export {plan.variant} and its graphs")
        return held
    progress(f"reuse the export {plan.variant}, cut it again")
    graphs, cuts = _cut(plan, staged, out / held.graphs.full, [*there, *wanted])
    return held.model_copy(update={"graphs": graphs, "cuts": cuts})


def _export(plan: BuildPlan, first: bool, there: Sequence[str], staged: Path, progress: Progress) -> Variant:
    folder = staged / "unet" / plan.variant
    exported, quantization = _exported(plan, folder, [*there, *plan.cuts], progress)
    if first:
        config = json.dumps(plan.source.config, indent=2, default=str)
        (staged / UNET_CONFIG).write_text(config + "\n", encoding="utf-8")
    progress("cut")
    graphs, cuts = _cut(plan, staged, exported.path, [*there, *plan.cuts])
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
    """The export in the plan's precision; one in low precision is made from a full one, aside."""
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
    aside = folder.with_name(f"{folder.name}-base")
    base = export(aside, plan.scheme.base)
    folder.mkdir(parents=True)
    try:
        return quantized(base, folder, plan.source, plan.scheme, cuts, plan.calibrator, progress)
    finally:
        shutil.rmtree(aside)


def _check_calibration(plan: BuildPlan, held: Variant) -> None:
    """Refuse to add to a variant that was calibrated in another way than is asked for now."""
    if plan.calibrator is None or held.quantization is None:
        return
    was = held.quantization
    asked = (plan.calibrator.record(plan.source), plan.calibrator.method, plan.calibrator.sensitive)
    if (was.calibration, was.method, was.sensitive) != asked:
        raise BundleError(
            f"this bundle's {held.name} was calibrated in another way: give the same calibration as then, "
            "or build into another directory"
        )


def _cut(plan: BuildPlan, staged: Path, graph: Path, names: Sequence[str]) -> tuple[GraphFiles, tuple[CutEntry, ...]]:
    """Cut a graph, whose weights are linked beside the result, and describe it."""
    folder = staged / "unet" / plan.variant
    recut = graph.parent != folder
    # The bundle's files never change, so graphs of another choice of cuts have names of their own.
    suffix = "-" + hashlib.sha256(" ".join(names).encode()).hexdigest()[:8] if recut else ""
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
