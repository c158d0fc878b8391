"""The networks around the UNet, compiled by the engines that compile: each a full graph without a shallow one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from ..exporter.components import component_of, trace_component, write_answers
from ..exporter.specs import symbols
from .base import Compiled, CompileJob, EngineOptions, Setting
from .bundle import devices_of
from .components import FOLDER, contract, prove_component
from .manifest import ComponentEntry, EngineEntry, ProfileEntry
from .plan import Plan
from .profiles import Profile, Range
from .registry import compiler, engine


def compile_components(
    plan: Plan,
    unet: EngineEntry,
    recorded: Mapping[str, Setting],
    entries: list[ComponentEntry],
    root: Path,
    staged: Path,
    progress: Callable[[str], None],
) -> list[ComponentEntry]:
    """Each of these networks with the engine's own build of it, proven where the engine runs on this machine.

    Args:
        unet: what the engine made of the UNet; the networks take the sizes that it takes.
        recorded: the settings that decide what is built.
        entries: the networks; those that the engine has compiled so already are left as they are.
        root: the directory that their files' names start from.
        staged: the bundle in the making.

    Raises:
        EngineError: the engine refuses a network.
        ParityError: it computes something else.
    """
    return [_with_build(plan, unet, recorded, entry, root, staged, progress) for entry in entries]


def _with_build(
    plan: Plan,
    unet: EngineEntry,
    recorded: Mapping[str, Setting],
    entry: ComponentEntry,
    root: Path,
    staged: Path,
    progress: Callable[[str], None],
) -> ComponentEntry:
    name, module = unet.engine, compiler(unet.engine)
    assert module is not None
    profiles = _profiles(entry, unet, plan.fixed)
    probe = module.probe()
    decides: list[object] = [plan.weights_digest, entry.label, entry.name, plan.device, name, probe.version]
    decides += [dict(probe.targets), dict(recorded), [ProfileEntry.of(each).model_dump() for each in profiles]]
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
        settings=dict(recorded),
        references=tuple(file.relative_to(staged).as_posix() for file in references),
        later_versions=compiled.later_versions,
        verified=False,
        full=compiled.full.relative_to(staged).as_posix(),
        shallow={},
        files=tuple(sorted(file.relative_to(staged).as_posix() for file in folder.rglob("*") if file.is_file())),
    )
    if devices := devices_of(made):
        device = plan.device if plan.device.partition(":")[0] in devices else devices[0]
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
