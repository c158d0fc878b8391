"""``build``: a model in, a bundle out: export once, cut, compile and verify each engine, commit.

What the bundle already holds and fits is used again, and said so.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from ..errors import BundleError
from ..exporter.imported import write_original_answer
from ..exporter.imported_parts import left_out
from ..exporter.ip_adapter import IPAdapter
from ..exporter.load import load_unet
from ..exporter.lora import find
from ..exporter.reference import write_reference
from .base import Compiled, CompileJob, EngineOptions, Graphs, Setting, Settings
from .bundle import Bundle, devices_of, engine_files
from .calibrate import Calibrator
from .component_builds import compile_components
from .components import compilable, make_components, prove_component
from .manifest import (
    MANIFEST_FILE,
    SCHEMA_VERSION,
    ComponentEntry,
    EngineEntry,
    FileEntry,
    FusedLora,
    Manifest,
    ProfileEntry,
    ScheduleEntry,
    Source,
    Variant,
)
from .parts import copy_parts, pipeline_class
from .plan import Plan, Progress, check_target, make_plan
from .profiles import Profile
from .registry import compiler, engine
from .sizes import Sizes
from .store import commit, staging
from .text_loras import fused_text_encoders
from .variants import UNET_CONFIG, make_variant
from .verify import require, verify_entry

_FUSED = "text-encoders-with-loras"  # in the staging directory, until they are copied


def build(
    model: str | Path,
    out: str | Path,
    *,
    cuts: Sequence[str] = ("deepcache:0",),
    engine: str | Sequence[str] = "auto",
    precision: str = "fp32",
    inference_precision: str | None = None,
    opset: int | None = None,
    dims: Mapping[str, int] | None = None,
    profiles: Sequence[Profile] | Sizes = (),
    settings: Mapping[str, Settings] | None = None,
    deploy: bool = False,
    compile_all: bool = False,
    device: str = "cpu",
    revision: str | None = None,
    variant: str | None = None,
    subfolder: str | None = None,
    adapters: Sequence[str] | None = None,
    loras: Mapping[str | Path, float] | None = None,
    ip_adapters: Sequence[IPAdapter | str | Path] = (),
    attention: str | None = None,
    calibration: Calibrator | None = None,
    progress: Progress = lambda step: None,
) -> Bundle:
    """Build a bundle, or add to one.

    Args:
        model: a hub id, a diffusers pipeline directory, a bare UNet's directory (which gives a UNet-only bundle), or
            a directory of ONNX files that optimum wrote: its graphs are cut as they are, and all its networks compiled.
        out: the bundle's directory.
        cuts: names of cuts; see ``find_cuts``.
        engine: a name, several, or ``"auto"``.
        precision: of the exported graphs: ``fp32``, ``fp16``, ``bf16``; ``int8`` or ``fp8`` for the convolutions and
            linear layers, but for the sensitive ones. All but the first can cost image quality.
        inference_precision: OpenVINO's hint, ``"bf16"``, for fp32 graphs. Can cost image quality.
        opset: of the ONNX graphs; the engine's best by default.
        dims: fixes ``batch``, ``frames``, ``height``, ``width`` (of the latent) or ``sequence``; others stay dynamic.
        profiles: the shapes that compiled engines take, as profiles or in a user's words (``Sizes``); by default the
            engine's own choice.
        settings: how an engine compiles, by the engine's name and the names of its ``SETTINGS``.
        deploy: leave the ONNX graphs and their weights out, for a bundle whose engines are all compiled.
        compile_all: export the pipeline's text encoders and autoencoder too, for the same engines; a bundle that is
            built so from the first holds no PyTorch weights of them.
        device: that ``auto`` chooses for and engines are verified on, where they run on it.
        revision, variant, subfolder: as in diffusers.
        adapters: ``"controlnet"`` or ``"t2i-adapter"``; gives the graphs the inputs that these fill. By default those
            that the model's own pipeline has.
        loras: LoRA files to fuse into the UNet and, of a pipeline, into the text encoders that they have layers for,
            with their scales.
        ip_adapters: files of IP-Adapters' weights to build into the UNet, as ``"FILE"``, ``"FILE:SCALE"`` or
            ``"FILE:SCALE:IMAGES"``. A bundle with them is another model's than one without.
        attention: ``"cross-frame"`` for Text2Video-Zero, in place of the UNet's own. By default what the model's own
            pipeline uses.
        calibration: what ``int8`` and ``fp8`` are calibrated on: an ``offcut.Calibration``.
        progress: called with a sentence as each stage begins.

    Returns:
        The bundle, every engine of which was verified against eager PyTorch, or the ONNX that was given, unless it was
        compiled for a machine that this one is not; its entry says so.

    Raises:
        ModelError: the model cannot be read or exported.
        CutError: the UNet has no such cut.
        EngineError: an engine is missing, or cannot run this precision.
        ParityError: an engine's result is out of its bounds; nothing is added to the bundle.
        BundleError: the directory holds another model, or the disk is full.
    """
    out = Path(out)
    plan = make_plan(
        model,
        cuts=cuts,
        engines=engine,
        precision=precision,
        inference_precision=inference_precision,
        opset=opset,
        dims=dims,
        profiles=profiles,
        settings=settings,
        deploy=deploy,
        compile_all=compile_all,
        device=device,
        revision=revision,
        variant=variant,
        subfolder=subfolder,
        adapters=adapters,
        loras=loras or {},
        ip_adapters=[each if isinstance(each, IPAdapter) else IPAdapter.parse(str(each)) for each in ip_adapters],
        attention=attention,
        calibrator=calibration,
        progress=progress,
    )
    while True:
        with suppress(_OvertakenError):
            return _add(plan, out, progress)
        progress("another build made this export meanwhile: add to it")


class _OvertakenError(Exception):
    """Another build put the same variant into the bundle, or cut it again, since this one looked."""


def _add(plan: Plan, out: Path, progress: Progress) -> Bundle:
    check_target(out, plan)
    with staging(out) as staged:
        existing = Bundle.open(out) if (out / MANIFEST_FILE).exists() else None
        if plan.deploy and existing is not None:
            _check_deployable(existing, plan.variant)
        before = existing.manifest.variants.get(plan.variant) if existing else None
        if plan.source.is_pipeline and (existing is None or plan.compile_all or plan.calibrator):
            plan = replace(plan, source=fused_text_encoders(plan.source, staged / _FUSED, progress))
        variant = make_variant(plan, existing, out, staged, progress)
        entries = _engines(plan, variant, existing, out, staged, progress)
        components = _components(plan, entries, existing, staged, progress)
        parts = _parts(plan, existing, staged, progress)
        if plan.deploy:
            variant = _without_graphs(variant, staged)
        shutil.rmtree(staged / _FUSED, ignore_errors=True)
        progress("commit")

        def update(current: Manifest | None, files: dict[str, FileEntry]) -> Manifest:
            if current is not None and current.variants.get(plan.variant) != before:
                raise _OvertakenError
            return _merge(current, plan, variant, entries, parts, files, components)

        commit(out, staged, update)
    return Bundle.open(out)


def _engines(
    plan: Plan, variant: Variant, existing: Bundle | None, out: Path, staged: Path, progress: Progress
) -> list[EngineEntry]:
    entries = []
    for name in plan.engines:
        key = _key(plan, variant, name)
        held = existing.manifest.engines.get(key) if existing else None
        if held is not None:
            progress(f"reuse {key}")
            entries.append(held)
            continue
        entry = _compile(plan, variant, name, key, out, staged, progress)
        if device := _device(plan, entry):
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
        decides += [json.dumps(each, sort_keys=True) for each in (dict(probe.targets), _recorded(plan, name), profiles)]
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
        settings=_recorded(plan, name),
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


def _recorded(plan: Plan, name: str) -> dict[str, Setting]:
    """The settings that decide what is built."""
    compiles = compiler(name)
    helpers = compiles.HELPERS if compiles else frozenset()
    return {setting: value for setting, value in plan.settings[name].items() if setting not in helpers}


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


def _device(plan: Plan, entry: EngineEntry) -> str | None:
    """The device to verify an engine on: the one asked for, or another that it runs on; None if there is none here."""
    fitting = devices_of(entry)
    if plan.device.partition(":")[0] in fitting:
        return plan.device
    return fitting[0] if fitting else None


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
    manifest = _merge(None, plan, variant, [entry], [], {})
    return Bundle(staged if fresh else out, manifest, "")


def _check_deployable(existing: Bundle, variant: str) -> None:
    held = existing.manifest.engines.values()
    if needing := [entry.key for entry in held if entry.variant == variant and not entry.compiled]:
        raise BundleError(
            f"{', '.join(needing)} of this bundle opens the ONNX graphs that deploy leaves out: "
            "build into a directory of its own"
        )


def _without_graphs(variant: Variant, staged: Path) -> Variant:
    """Drop the ONNX graphs and their weights, which compiled engines do not need."""
    assert variant.graphs is not None
    for name in variant.graphs.files:
        (staged / name).unlink(missing_ok=True)
    return variant.model_copy(update={"graphs": None})


def _components(
    plan: Plan, engines: Sequence[EngineEntry], existing: Bundle | None, staged: Path, progress: Progress
) -> Sequence[ComponentEntry]:
    """The networks around the UNet, each proven on every engine of the build that was not there before.

    Args:
        engines: what the build's engines made of the UNet.
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
    against = _source(plan).reference
    for unet in engines:
        name = unet.engine
        if compiler(name) is None:
            for entry in made:
                progress(f"verify {entry.name} on {name}")
                prove_component(root, entry, name, options, against)
        elif not plan.source.onnx:  # else they run in an engine that opens the graphs
            made = compile_components(plan, unet, _recorded(plan, name), made, root, staged, progress)
    return [_without_graph(entry, staged) for entry in made] if plan.deploy and not whole else made


def _without_graph(entry: ComponentEntry, staged: Path) -> ComponentEntry:
    for name in (entry.graph, entry.weights):
        (staged / str(name)).unlink()
    return entry.model_copy(update={"graph": None, "weights": None})


def _parts(plan: Plan, existing: Bundle | None, staged: Path, progress: Progress) -> list[str]:
    if existing is not None:
        return list(existing.manifest.parts)
    if missing := left_out(plan.source):
        progress(f"{plan.source.name} does not hold its {' and '.join(missing)}: left out")
    return copy_parts(plan.source, staged, without_weights=compilable(plan.source) if plan.compile_all else ())


def _merge(
    current: Manifest | None,
    plan: Plan,
    variant: Variant,
    entries: Sequence[EngineEntry],
    parts: Sequence[str],
    files: Mapping[str, FileEntry],
    components: Sequence[ComponentEntry] = (),
) -> Manifest:
    """The manifest that is there now, with what this build adds. Another build may have come first."""
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
        source=_source(plan),
        unet_config=UNET_CONFIG,
        parts=tuple(parts),
        variants=variants,
        engines=engines,
        components=tuple(networks.values()),
        schedules=schedules,
        files={name: known[name] for name in sorted(named & set(known))},
    )


def _source(plan: Plan) -> Source:
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
