"""Builds of the UNet for each engine: compiled if the engine compiles, and verified."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any

from ...exporter.families import example_inputs
from ...exporter.foreign.unet import write_foreign_reference
from ...exporter.load import load_unet
from ...exporter.trace.reference import write_reference
from ..base import EngineOptions, Graphs, Progress
from ..bundle.bundle import Bundle
from ..bundle.manifest import EngineEntry, Variant
from ..profiles import Profile
from ..registry import compiler, engine
from .compile import WriteReference, compile_engine, engine_entry, engine_key, verify_engine
from .merge import merge
from .resolve import BuildPlan
from .verify import require, verify_entry


def build_engines(
    plan: BuildPlan, variant: Variant, existing: Bundle | None, out: Path, staged: Path, progress: Progress
) -> list[EngineEntry]:
    """Return the entries of the plan's engines, verified where they run here; their files are in ``staged``.

    Raises:
        EngineError: an engine refuses the graphs.
        ParityError: an engine's result is out of its bounds.
    """
    assert variant.graphs is not None
    full, shallow = variant.graphs.full, variant.graphs.shallow
    inference_precision = plan.inference_precision
    entries = []
    for name in plan.engines:
        version = engine(name).probe().version
        subject = [plan.weights_digest, variant.name, full, name, version, inference_precision, *shallow]
        key = engine_key(plan, name, subject, plan.profiles)
        if existing and key in existing.manifest.engines:
            progress(f"reuse {key}")
            entries.append(existing.manifest.engines[key])
            continue
        entry = engine_entry(plan, name, key, variant.name, full, shallow, inference_precision)
        folder = staged / "engines" / key
        if compiler(name):
            graphs = _view(plan, variant, entry, out, staged).graphs(entry)
            entry = compile_engine(
                plan,
                entry,
                graphs,
                folder=folder,
                staged=staged,
                profiles=plan.profiles,
                fixed=plan.fixed,
                write_reference=_reference_writer(plan, graphs, progress),
                progress=progress,
            )
        bundle = _view(plan, variant, entry, out, staged)
        entry = verify_engine(plan, entry, name, _check(bundle, entry), progress)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.json").write_text(entry.model_dump_json(indent=1) + "\n", encoding="utf-8")
        entries.append(entry)
    return entries


def _reference_writer(plan: BuildPlan, graphs: Graphs, progress: Progress) -> WriteReference:
    """Return a function that computes a reference at a profile's sizes; the variant's reference may not fit."""

    @cache
    def unet() -> Any:
        import torch

        progress("compute PyTorch's outputs at the sizes of the profiles")
        device = plan.device if torch.device(plan.device).type == "cuda" and torch.cuda.is_available() else "cpu"
        model = load_unet(plan.source, plan.base).to(device)
        # A CPU may lack the precision. The weights are rounded to it all the same.
        return model.float() if device == "cpu" else model

    def write(profile: Profile, path: Path) -> None:
        if plan.source.onnx:
            progress("compute the foreign graph's outputs at the sizes of the profiles")
            write_foreign_reference(plan.source, profile.min, path)
        else:
            inputs = example_inputs(tuple(graphs.inputs.values()), profile.min)
            write_reference(unet(), plan.source.family, inputs, path)

    return write


def _check(bundle: Bundle, entry: EngineEntry) -> Any:
    """Return a function that opens the engine on a device and requires that it passes every check."""

    def check(device: str) -> None:
        options = EngineOptions(device, inference_precision=entry.inference_precision)
        pair = engine(entry.engine).open(bundle.graphs(entry), options)
        try:
            checks = verify_entry(bundle, entry, pair)
        finally:
            pair.close()
        require(checks, entry.key)

    return check


def _view(plan: BuildPlan, variant: Variant, entry: EngineEntry, out: Path, staged: Path) -> Bundle:
    """Return the graphs as a bundle of their own: in the staging directory if they are new, else in ``out``."""
    assert variant.graphs is not None
    is_new = entry.compiled or (staged / variant.graphs.full).exists()
    if is_new and not (staged / variant.reference).exists():
        (staged / variant.reference).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(out / variant.reference, staged / variant.reference)
    manifest = merge(None, plan, variant, [entry], [], {})
    return Bundle(staged if is_new else out, manifest, "")
