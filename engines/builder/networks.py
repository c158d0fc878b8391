"""The networks around the UNet in the engines of a build: each a full graph without a shallow one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...exporter.components import component_of, trace_component, write_answers
from ...exporter.specs import symbols
from ..base import Compiled, CompileJob, EngineOptions
from ..bundle.bundle import Bundle
from ..bundle.manifest import ComponentEntry, EngineEntry, ProfileEntry
from ..bundle.merge import source_of
from ..bundle.networks import FOLDER, contract, make_components, prove_component
from ..profiles import Profile, Range
from ..registry import compiler, engine
from .request import Plan, Progress


def build_components(
    plan: Plan, engines: Sequence[EngineEntry], existing: Bundle | None, staged: Path, progress: Progress
) -> Sequence[ComponentEntry]:
    """The networks around the UNet, each proven on every engine of the build that was not there before.

    Args:
        engines: what the build's engines made of the UNet.
        existing: the bundle as it is; None if there is none yet.
        staged: the bundle in the making.

    Raises:
        EngineError: an engine refuses a network.
        ParityError: it computes something else.
    """
    if not plan.compile_all:
        return ()
    label = f"{plan.base}-opset{plan.opset}"
    held = [entry for entry in existing.manifest.components if entry.label == label] if existing else []
    whole = bool(held) and all(entry.graph is not None for entry in held)  # else only what was compiled was kept
    root = existing.path if whole and existing else staged
    if whole:
        progress(f"reuse the networks around the UNet, {label}")
        made = held
    else:
        compiled = {entry.name: entry.engines for entry in held}
        made = [
            entry.model_copy(update={"engines": compiled.get(entry.name, ())})
            for entry in make_components(plan.source, staged, precision=plan.base, opset=plan.opset, progress=progress)
        ]
    options = EngineOptions(plan.device)
    against = source_of(plan).reference
    for unet in engines:
        name = unet.engine
        if compiler(name) is None:
            for entry in made:
                progress(f"verify {entry.name} on {name}")
                prove_component(root, entry, name, options, against)
        elif not plan.source.onnx:  # else they run in an engine that opens the graphs
            made = compile_components(plan, unet, made, root, staged, progress)
    return [_without_graph(entry, staged) for entry in made] if plan.deploy and not whole else made


def _without_graph(entry: ComponentEntry, staged: Path) -> ComponentEntry:
    for name in (entry.graph, entry.weights):
        (staged / str(name)).unlink()
    return entry.model_copy(update={"graph": None, "weights": None})


def compile_components(
    plan: Plan,
    unet: EngineEntry,
    entries: list[ComponentEntry],
    root: Path,
    staged: Path,
    progress: Progress,
) -> list[ComponentEntry]:
    """Each of these networks with the engine's own build of it, proven where the engine runs on this machine.

    Args:
        unet: what the engine made of the UNet; the networks take the sizes that it takes.
        entries: the networks; those that the engine has compiled so already are left as they are.
        root: the directory that their files' names start from.
        staged: the bundle in the making.

    Raises:
        EngineError: the engine refuses a network.
        ParityError: it computes something else.
    """
    return [_with_build(plan, unet, entry, root, staged, progress) for entry in entries]


def _with_build(
    plan: Plan,
    unet: EngineEntry,
    entry: ComponentEntry,
    root: Path,
    staged: Path,
    progress: Progress,
) -> ComponentEntry:
    name, module = unet.engine, compiler(unet.engine)
    assert module is not None
    recorded = plan.recorded(name)
    profiles = _profiles(entry, unet, plan.fixed)
    probe = module.probe()
    decides: list[object] = [plan.weights_digest, entry.label, entry.name, plan.device, name, probe.version]
    decides += [dict(probe.targets), recorded, [ProfileEntry.of(each).model_dump() for each in profiles]]
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    key = f"{name}-{digest[:12]}"
    if any(each.key == key for each in entry.engines):
        progress(f"reuse {entry.name} of {key}")
        return entry
    folder = staged / FOLDER / entry.label / entry.name / key
    folder.mkdir(parents=True)
    compiled = module.compile(
        CompileJob(
            graphs=contract(entry, root / str(entry.graph)),
            source=plan.source,
            fixed={},
            profiles=profiles,
            settings=plan.settings[name],
            device=plan.device,
            folder=folder,
            progress=progress,
            component=entry.name,
        )
    )
    references = _references(plan, entry, compiled, folder)
    made = EngineEntry(
        key=key,
        engine=name,
        version=engine(name).probe().version or "",
        variant=entry.label,
        cuts=(),
        inference_precision=None,
        requires=(),
        targets=compiled.targets,
        profiles=tuple(ProfileEntry.of(each) for each in compiled.profiles),
        settings=recorded,
        references=tuple(file.relative_to(staged).as_posix() for file in references),
        later_versions=compiled.later_versions,
        verified=False,
        full=compiled.full.relative_to(staged).as_posix(),
        shallow={},
        files=tuple(sorted(file.relative_to(staged).as_posix() for file in folder.rglob("*") if file.is_file())),
    )
    if device := plan.device_for(made):
        progress(f"verify {entry.name} on {name}")
        prove_component(root, entry, name, EngineOptions(device), compiled=made, within=staged)
        made = made.model_copy(update={"verified": True})
    else:
        progress(f"{entry.name} on {name} is left unverified: it was compiled for {', '.join(made.targets)}")
    return entry.model_copy(update={"engines": (*entry.engines, made)})


def _profiles(entry: ComponentEntry, unet: EngineEntry, fixed: Mapping[str, int]) -> tuple[Profile, ...]:
    """The sizes of this network for each profile of the UNet's; none where the UNet has none.

    The UNet's batch counts an image twice where it is guided, so half of it is the best size here.
    """
    specs = [each.spec() for each in entry.inputs]
    found = []
    for each in unet.profiles:
        sizes = [{**fixed, **dims} for dims in (each.min, each.opt, each.max)]
        ranges: dict[str, Range] = {}
        for name in symbols(specs):
            # An autoencoder takes a video's frames one beside the other.
            scales = [size.get("frames", 1) if name == "batch" else entry.multiple for size in sizes]
            low, best, high = (size[name] * scale for size, scale in zip(sizes, scales, strict=True))
            ranges[name] = (1, max(1, best // 2), high) if name == "batch" else (low, best, high)
        found.append(Profile.of(ranges))
    # A text encoder has no height: several profiles of the UNet may be one of its.
    return tuple(each for index, each in enumerate(found) if each not in found[:index])


def _references(plan: Plan, entry: ComponentEntry, compiled: Compiled, folder: Path) -> list[Path]:
    """What PyTorch computes at the smallest sizes of each profile."""
    if not compiled.profiles:
        return []
    component = plan.source.component(component_of(entry.name))
    base = entry.label.partition("-")[0]
    networks = trace_component(component, precision=base, variant=plan.source.variant)
    (traced,) = (each for each in networks if each.name == entry.name)
    paths = []
    for index, profile in enumerate(compiled.profiles):
        example = traced.example(profile.min)
        paths.append(folder / f"reference-{index}.safetensors")
        write_answers(traced, example, traced.answers(example), paths[-1])
    return paths
