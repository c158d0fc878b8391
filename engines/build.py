"""``build``: a model in, a bundle out: export once, cut, verify each engine against PyTorch, commit.

What the bundle already holds and fits is used again, and said so.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from ..errors import BundleError, CutError, EngineError
from ..exporter.cut import CONVENTIONS, Cut, find_cut, find_cuts, is_cut_name, split_all
from ..exporter.load import ModelSource, locate
from ..exporter.reference import REFERENCE_FILE, read_reference
from ..exporter.trace import GRAPH_FILE, PARAMETERS_FILE, WEIGHTS_FILE, export
from .base import EngineOptions
from .bundle import Bundle, digest_file, engine_files
from .manifest import (
    MANIFEST_FILE,
    SCHEMA_VERSION,
    CutEntry,
    EngineEntry,
    FileEntry,
    Manifest,
    Source,
    Tensor,
    Variant,
)
from .parts import copy_parts, pipeline_class, weight_files
from .precision import bounds
from .registry import choose, engine
from .store import LOCK_FILE, commit, staging
from .verify import require, verify

Progress = Callable[[str], None]
_UNET_CONFIG = "unet/config.json"


@dataclass(frozen=True)
class _Plan:
    """What the user asked for, resolved."""

    source: ModelSource
    weights_digest: str
    cuts: tuple[str, ...]
    engines: tuple[str, ...]
    precision: str
    opset: int
    fixed: Mapping[str, int]
    inference_precision: str | None

    @property
    def variant(self) -> str:
        fixed = "".join(f"-{name[0]}{size}" for name, size in sorted(self.fixed.items()))
        return f"{self.precision}-opset{self.opset}{fixed}"


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
    device: str = "cpu",
    revision: str | None = None,
    variant: str | None = None,
    subfolder: str | None = None,
    progress: Progress = lambda step: None,
) -> Bundle:
    """Build a bundle, or add to one.

    Args:
        model: a hub id, a diffusers pipeline directory, or a bare UNet's directory (which gives a UNet-only bundle).
        out: the bundle's directory.
        cuts: names of cuts; see ``find_cuts``.
        engine: a name, several, or ``"auto"``.
        precision: of the exported graphs: ``fp32``, ``fp16``, ``bf16``. The latter two can cost image quality.
        inference_precision: OpenVINO's hint, ``"bf16"``, for fp32 graphs. Can cost image quality.
        opset: of the ONNX graphs; the engine's best by default.
        dims: fixes ``batch``, ``height``, ``width`` (of the latent) or ``sequence``; the rest stays dynamic.
        device: that ``auto`` chooses for.
        revision, variant, subfolder: as in diffusers.
        progress: called with a sentence as each stage begins.

    Returns:
        The bundle, every engine of which was verified against eager PyTorch.

    Raises:
        ModelError: the model cannot be read or exported.
        CutError: the UNet has no such cut.
        EngineError: an engine is missing, or cannot run this precision.
        ParityError: an engine's result is out of its bounds; nothing is added to the bundle.
        BundleError: the directory holds another model, or the disk is full.
    """
    out = Path(out)
    plan = _plan(
        model, cuts, engine, precision, inference_precision, opset, dims, device, revision, variant, subfolder, progress
    )
    while True:
        with suppress(_OvertakenError):
            return _add(plan, out, progress)
        progress("another build made this export meanwhile: add to it")


class _OvertakenError(Exception):
    """Another build put the same variant into the bundle, or cut it again, since this one looked."""


def _add(plan: _Plan, out: Path, progress: Progress) -> Bundle:
    _check_target(out, plan)
    with staging(out) as staged:
        existing = Bundle.open(out) if (out / MANIFEST_FILE).exists() else None
        before = existing.manifest.variants.get(plan.variant) if existing else None
        graphs = _variant(plan, existing, out, staged, progress)
        entries = _engines(plan, graphs, existing, out, staged, progress)
        parts = _parts(plan, existing, staged)
        progress("commit")

        def update(current: Manifest | None, files: dict[str, FileEntry]) -> Manifest:
            if current is not None and current.variants.get(plan.variant) != before:
                raise _OvertakenError
            return _merge(current, plan, graphs, entries, parts, files)

        commit(out, staged, update)
    return Bundle.open(out)


def _plan(
    model: str | Path,
    cuts: Sequence[str],
    engines: str | Sequence[str],
    precision: str,
    inference_precision: str | None,
    opset: int | None,
    dims: Mapping[str, int] | None,
    device: str,
    revision: str | None,
    variant: str | None,
    subfolder: str | None,
    progress: Progress,
) -> _Plan:
    names = []
    for name in [engines] if isinstance(engines, str) else engines:
        if name == "auto":
            choice = choose(device)
            progress(f"engine {choice.name}: {choice.reason}")
            name = choice.name
        names.append(name)
        probe = engine(name).probe()
        bounds(name, precision, inference_precision)
        if not probe.usable:
            raise EngineError(f"the engine {name} cannot be used here: {probe.reason}")
    if not names:
        raise EngineError("no engine was named: write auto, or see offcut doctor")
    if not cuts:
        raise CutError(f"no cut was named: write {CONVENTIONS}")
    cuts = [cuts] if isinstance(cuts, str) else cuts
    for cut in cuts:
        if not is_cut_name(cut):
            raise CutError(f"{cut!r} is no name of a cut: write {CONVENTIONS}")
    source = locate(model, revision=revision, variant=variant, subfolder=subfolder)
    weights = weight_files(source.folder, variant)
    together = hashlib.sha256("".join(digest_file(file) for file in weights).encode()).hexdigest()
    return _Plan(
        source=source,
        weights_digest=together,
        cuts=tuple(dict.fromkeys(cuts)),
        engines=tuple(dict.fromkeys(names)),
        precision=precision,
        opset=opset or engine(names[0]).default_opset,
        fixed=dict(dims or {}),
        inference_precision=None if inference_precision == precision else inference_precision,
    )


def _check_target(out: Path, plan: _Plan) -> None:
    if out.is_file():
        raise BundleError(f"{out} is a file; give a directory for the bundle")
    if not (out / MANIFEST_FILE).exists():
        # With a lock in it, it is what a build left that was killed while it moved its files in.
        unfinished = (out / LOCK_FILE).exists()
        if out.is_dir() and not unfinished and any(not path.name.startswith(".") for path in out.iterdir()):
            raise BundleError(f"{out} is not empty and no bundle; give another directory")
        return
    bundle = Bundle.open(out)
    held, config = bundle.manifest.source, bundle.unet_config
    ours = json.loads(json.dumps(plan.source.config, default=str))
    other = [key for key in config.keys() & ours.keys() if key[0] != "_" and config[key] != ours[key]]
    if other or held.weights_digest != plan.weights_digest:
        raise BundleError(f"{out} holds another model ({held.model}); give another directory")


def _variant(plan: _Plan, existing: Bundle | None, out: Path, staged: Path, progress: Progress) -> Variant:
    """The export with all the cuts: the bundle's own where it has them, recut where it has others, or a new one."""
    held = existing.manifest.variants.get(plan.variant) if existing else None
    if held is None or existing is None:
        return _export(plan, existing, staged, progress)
    existing.verify_files([held.full, *held.shallow.values(), held.weights, held.parameters, held.reference])
    known = find_cuts(out / held.full)
    wanted = [find_cut(known, name).name for name in plan.cuts]
    there = [cut.name for cut in held.cuts]
    if set(wanted) <= set(there):
        progress(f"reuse the export {plan.variant} and its graphs")
        return held
    progress(f"reuse the export {plan.variant}, cut it again")
    return _cut(plan, staged, out / held.full, [*there, *wanted], held)


def _export(plan: _Plan, existing: Bundle | None, staged: Path, progress: Progress) -> Variant:
    folder = staged / "unet" / plan.variant
    exported = export(
        plan.source, folder, precision=plan.precision, opset=plan.opset, dims=plan.fixed, progress=progress
    )
    if existing is None:
        config = json.dumps(plan.source.config, indent=2, default=str)
        (staged / _UNET_CONFIG).write_text(config + "\n", encoding="utf-8")
    base = f"unet/{plan.variant}"
    bare = Variant(
        name=plan.variant,
        precision=plan.precision,
        opset=plan.opset,
        fixed=dict(plan.fixed),
        multiple=exported.multiple,
        inputs=tuple(Tensor.of(spec) for spec in exported.inputs.values()),
        noise_pred=Tensor.of(exported.outputs["noise_pred"]),
        cuts=(),
        full=f"{base}/{GRAPH_FILE}",
        shallow={},
        weights=f"{base}/{WEIGHTS_FILE}",
        parameters=f"{base}/{PARAMETERS_FILE}",
        reference=f"{base}/{REFERENCE_FILE}",
    )
    progress("cut")
    cut = _cut(plan, staged, exported.path, plan.cuts, bare)
    exported.path.unlink()
    return cut


def _cut(plan: _Plan, staged: Path, graph: Path, cuts: Sequence[str], variant: Variant) -> Variant:
    """Cut a graph, whose weights are linked beside the result, and describe it."""
    folder = staged / "unet" / plan.variant
    recut = graph.parent != folder
    # The bundle's files never change, so graphs of another choice of cuts have names of their own.
    suffix = "-" + hashlib.sha256(" ".join(cuts).encode()).hexdigest()[:8] if recut else ""
    twins = split_all(graph, cuts, folder, suffix, link=True)
    base = f"unet/{plan.variant}"
    return variant.model_copy(
        update={
            "full": f"{base}/{twins[0].full.name}",
            "shallow": {twin.cut.name: f"{base}/{twin.shallow.name}" for twin in twins},
            "cuts": tuple(_cut_entry(twin.cut) for twin in twins),
        }
    )


def _cut_entry(cut: Cut) -> CutEntry:
    return CutEntry(name=cut.name, aliases=cut.aliases, cached=tuple(Tensor.of(spec) for spec in cut.cached))


def _engines(
    plan: _Plan, variant: Variant, existing: Bundle | None, out: Path, staged: Path, progress: Progress
) -> list[EngineEntry]:
    entries = []
    for name in plan.engines:
        entry = _entry(plan, variant, name)
        if existing and existing.manifest.engines.get(entry.key) == entry:
            progress(f"reuse {entry.key}")
        else:
            progress(f"verify {name}")
            _prove(plan, variant, entry, out, staged)
            report = staged / "engines" / entry.key / "build.json"
            report.parent.mkdir(parents=True)
            report.write_text(entry.model_dump_json(indent=1) + "\n", encoding="utf-8")
        entries.append(entry)
    return entries


def _entry(plan: _Plan, variant: Variant, name: str) -> EngineEntry:
    module = engine(name)
    installed = module.probe().version or ""
    requires = (plan.inference_precision,) if plan.inference_precision not in (None, plan.precision) else ()
    decides = [
        plan.weights_digest,
        variant.name,
        variant.full,
        name,
        installed,
        plan.inference_precision,
        *variant.shallow,
    ]
    key = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:12]
    return EngineEntry(
        key=f"{name}-{key}",
        engine=name,
        version=installed,
        variant=variant.name,
        cuts=tuple(cut.name for cut in variant.cuts),
        inference_precision=plan.inference_precision,
        requires=tuple(need for need in requires if need),
        full=variant.full,
        shallow=variant.shallow,
    )


def _prove(plan: _Plan, variant: Variant, entry: EngineEntry, out: Path, staged: Path) -> None:
    """Open the engine on the graphs, wherever they are now, and hold it against PyTorch."""
    bundle = _view(plan, variant, entry, out, staged)
    pair = engine(entry.engine).open(bundle.graphs(entry), EngineOptions(inference_precision=entry.inference_precision))
    try:
        reference = read_reference(bundle.path / variant.reference)
        checks = verify(pair, reference, bounds(entry.engine, variant.precision, entry.inference_precision))
    finally:
        pair.close()
    require(checks, entry.key)


def _view(plan: _Plan, variant: Variant, entry: EngineEntry, out: Path, staged: Path) -> Bundle:
    """The graphs as a bundle of their own: in the staging directory if they were made now, else where they lie."""
    fresh = (staged / variant.full).exists()
    if fresh and not (staged / variant.reference).exists():
        shutil.copyfile(out / variant.reference, staged / variant.reference)
    manifest = _merge(None, plan, variant, [entry], [], {})
    return Bundle(staged if fresh else out, manifest, "")


def _parts(plan: _Plan, existing: Bundle | None, staged: Path) -> list[str]:
    if existing is not None:
        return list(existing.manifest.parts)
    return copy_parts(plan.source, staged)


def _merge(
    current: Manifest | None,
    plan: _Plan,
    variant: Variant,
    entries: Sequence[EngineEntry],
    parts: Sequence[str],
    files: Mapping[str, FileEntry],
) -> Manifest:
    """The manifest that is there now, with what this build adds. Another build may have come first."""
    if current is not None and current.source.weights_digest != plan.weights_digest:
        raise BundleError(f"another build put another model ({current.source.model}) into this bundle meanwhile")
    variants = {**(current.variants if current else {}), variant.name: variant}
    engines = {
        **{key: entry for key, entry in (current.engines if current else {}).items() if entry not in entries},
        **{entry.key: entry for entry in entries},
    }
    known = {**(current.files if current else {}), **files}
    return Manifest(
        schema_version=SCHEMA_VERSION,
        offcut_version=version("offcut"),
        family=plan.source.family.name,
        pipeline=pipeline_class(plan.source),
        source=Source(
            model=plan.source.name,
            revision=plan.source.revision,
            variant=plan.source.variant,
            weights_digest=plan.weights_digest,
        ),
        unet_config=_UNET_CONFIG,
        parts=tuple(parts),
        variants=variants,
        engines=engines,
        files={name: known[name] for name in sorted(_named(variants, engines, parts) & set(known))},
    )


def _named(variants: Mapping[str, Variant], engines: Mapping[str, EngineEntry], parts: Sequence[str]) -> set[str]:
    """Every file that the manifest speaks of; what it no longer does, ``prune`` removes."""
    names = {_UNET_CONFIG, *parts}
    for variant in variants.values():
        names |= {variant.full, *variant.shallow.values(), variant.weights, variant.parameters, variant.reference}
    for entry in engines.values():
        names |= {*engine_files(entry, variants[entry.variant]), f"engines/{entry.key}/build.json"}
    return names
