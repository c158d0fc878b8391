"""The UNet in each engine that a build asks for: compiled where the engine compiles, and held against PyTorch."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from ...exporter.foreign.unet import write_original_answer
from ...exporter.load import load_unet
from ...exporter.trace.reference import write_reference
from ..base import Compiled, CompileJob, EngineOptions, Graphs
from ..bundle.bundle import Bundle
from ..bundle.manifest import EngineEntry, ProfileEntry, Variant
from ..bundle.merge import merge
from ..registry import compiler, engine
from .request import Plan, Progress
from .verify import require, verify_entry


def build_engines(
    plan: Plan, variant: Variant, existing: Bundle | None, out: Path, staged: Path, progress: Progress
) -> list[EngineEntry]:
    """The entries of the plan's engines, each verified where it runs on this machine; their files are staged.

    Raises:
        EngineError: an engine refuses the graphs.
        ParityError: one computes something else than PyTorch.
    """
    entries = []
    for name in plan.engines:
        key = _key(plan, variant, name)
        held = existing.manifest.engines.get(key) if existing else None
        if held is not None:
            progress(f"reuse {key}")
            entries.append(held)
            continue
        entry = _compile(plan, variant, name, key, out, staged, progress)
        if device := plan.device_for(entry):
            progress(f"verify {name}")
            _prove(plan, variant, entry, device, out, staged)
            entry = entry.model_copy(update={"verified": True})
        else:
            progress(f"{name} is left unverified: it was compiled for {', '.join(entry.targets)}, which is not here")
        report = staged / "engines" / key / "build.json"
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(entry.model_dump_json(indent=1) + "\n", encoding="utf-8")
        entries.append(entry)
    return entries


def _key(plan: Plan, variant: Variant, name: str) -> str:
    """The engine's name and a digest of all that decides what it computes and where it runs."""
    assert variant.graphs is not None
    probe = engine(name).probe()
    decides = [
        plan.weights_digest,
        variant.name,
        variant.graphs.full,
        name,
        probe.version,
        plan.inference_precision,
        *variant.graphs.shallow,
    ]
    if compiler(name):
        profiles = [ProfileEntry.of(profile).model_dump() for profile in plan.profiles]
        decides += [json.dumps(each, sort_keys=True) for each in (dict(probe.targets), plan.recorded(name), profiles)]
        decides.append(plan.device)
    return f"{name}-{hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:12]}"


def _compile(
    plan: Plan, variant: Variant, name: str, key: str, out: Path, staged: Path, progress: Progress
) -> EngineEntry:
    """The engine's entry, its files in the staging directory if it has any; not yet verified."""
    assert variant.graphs is not None
    requires = (plan.inference_precision,) if plan.inference_precision not in (None, plan.precision) else ()
    entry = EngineEntry(
        key=key,
        engine=name,
        version=engine(name).probe().version or "",
        variant=variant.name,
        cuts=tuple(cut.name for cut in variant.cuts),
        inference_precision=plan.inference_precision,
        requires=tuple(need for need in requires if need),
        targets=(),
        profiles=(),
        settings=plan.recorded(name),
        references=(),
        later_versions=False,
        verified=False,
        full=variant.graphs.full,
        shallow=variant.graphs.shallow,
        files=(),
    )
    compiles = compiler(name)
    if compiles is None:
        return entry
    folder = staged / "engines" / key
    folder.mkdir(parents=True)
    graphs = _view(plan, variant, entry, out, staged).graphs(entry)
    job = CompileJob(
        graphs=graphs,
        source=plan.source,
        fixed=plan.fixed,
        profiles=plan.profiles,
        settings=plan.settings[name],
        device=plan.device,
        folder=folder,
        progress=progress,
    )
    compiled = compiles.compile(job)
    references = _references(plan, graphs, compiled, folder, progress)
    return entry.model_copy(
        update={
            "references": tuple(file.relative_to(staged).as_posix() for file in references),
            "later_versions": compiled.later_versions,
            "targets": compiled.targets,
            "profiles": tuple(ProfileEntry.of(profile) for profile in compiled.profiles),
            "full": compiled.full.relative_to(staged).as_posix(),
            "shallow": {cut: file.relative_to(staged).as_posix() for cut, file in compiled.shallow.items()},
            "files": tuple(sorted(file.relative_to(staged).as_posix() for file in folder.rglob("*") if file.is_file())),
        }
    )


def _references(plan: Plan, graphs: Graphs, compiled: Compiled, folder: Path, progress: Progress) -> list[Path]:
    """What the model computes at the smallest sizes of each profile, where the variant's own are not covered."""
    if not compiled.profiles:
        return []
    paths = [folder / f"reference-{index}.safetensors" for index in range(len(compiled.profiles))]
    if plan.source.onnx:
        progress("compute the original's answers at the sizes of the profiles")
        for profile, path in zip(compiled.profiles, paths, strict=True):
            write_original_answer(plan.source, profile.min, path)
        return paths
    import torch

    progress("compute PyTorch's answers at the sizes of the profiles")
    device = plan.device if torch.device(plan.device).type == "cuda" and torch.cuda.is_available() else "cpu"
    unet = load_unet(plan.source, plan.base).to(device)
    if device == "cpu":
        unet.float()  # a CPU may lack the precision; the weights are rounded to it all the same
    for profile, path in zip(compiled.profiles, paths, strict=True):
        write_reference(unet, plan.source.family, tuple(graphs.inputs.values()), profile.min, path)
    return paths


def _prove(plan: Plan, variant: Variant, entry: EngineEntry, device: str, out: Path, staged: Path) -> None:
    """Open the engine on the files, wherever they are now, and hold it against PyTorch."""
    bundle = _view(plan, variant, entry, out, staged)
    options = EngineOptions(device, inference_precision=entry.inference_precision)
    pair = engine(entry.engine).open(bundle.graphs(entry), options)
    try:
        checks = verify_entry(bundle, entry, pair)
    finally:
        pair.close()
    require(checks, entry.key)


def _view(plan: Plan, variant: Variant, entry: EngineEntry, out: Path, staged: Path) -> Bundle:
    """The graphs as a bundle of their own: in the staging directory if they were made now, else where they lie."""
    assert variant.graphs is not None
    fresh = entry.compiled or (staged / variant.graphs.full).exists()
    if fresh and not (staged / variant.reference).exists():
        (staged / variant.reference).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(out / variant.reference, staged / variant.reference)
    manifest = merge(None, plan, variant, [entry], [], {})
    return Bundle(staged if fresh else out, manifest, "")
