"""``build`` makes a bundle from a model: it exports once, cuts, compiles and verifies each engine, and commits.

A build into an existing bundle reuses exports, graphs and engines that fit, and reports each reuse.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ...errors import BundleError
from ...exporter.foreign.networks import missing_components
from ...exporter.ip_adapter import IPAdapter
from ...exporter.lora import ScaledLora
from ..base import Progress, Settings
from ..bundle.bundle import Bundle
from ..bundle.manifest import MANIFEST_FILE, FileEntry, Manifest, Variant
from ..bundle.pipeline_files import copy_pipeline_files
from ..bundle.store import commit, staging
from ..bundle.trust import is_trusted, trust
from ..profiles import Profile
from .merge import merge
from .networks import build_components
from .request import BuildRequest, Calibrator, Sizes
from .resolve import BuildPlan, check_target, compilable, resolve
from .text_loras import fused_text_encoders
from .unet import build_engines
from .variants import make_variant

_FUSED = "text-encoders-with-loras"  # folder in the staging directory, until its files are copied


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
    cache: bool = True,
    progress: Progress = lambda step: None,
) -> Bundle:
    """Build a bundle, or add engines to an existing one.

    Args:
        model: hub id, directory of a diffusers pipeline, directory of a bare UNet (which gives a UNet-only bundle), or
            directory of ONNX files that optimum wrote: its graphs are cut as they are, and all its networks compiled.
        out: directory of the bundle.
        cuts: names of cuts; see ``find_cuts``.
        engine: one name, several, or ``"auto"`` for the best engine here.
        precision: precision of the exported graphs: ``fp32``, ``fp16`` or ``bf16``; ``int8`` or ``fp8`` rounds
            convolutions and linear layers, except the sensitive ones. All but ``fp32`` can cost image quality.
        inference_precision: OpenVINO's hint, ``"bf16"``, for fp32 graphs. Can cost image quality.
        opset: opset of the ONNX graphs; by default the one that suits the engine best.
        dims: sizes to fix for ``batch``, ``frames``, ``height``, ``width`` (of the latent) or ``sequence``; the other
            dimensions stay dynamic.
        profiles: shapes to compile for, as profiles or as ``Sizes``; by default the engine's own choice.
        settings: settings of the compilation, by engine and by the names of its ``SETTINGS``.
        deploy: leave out the ONNX graphs and their weights; every engine must be a compiled one.
        compile_all: export the pipeline's text encoders and autoencoder too, for the same engines. A new bundle then
            holds no PyTorch weights of them.
        device: device that ``auto`` chooses an engine for, and that engines are verified on if they can run on it.
        revision: branch, tag or commit on the hub, as in diffusers.
        variant: variant of the weight files, as in diffusers.
        subfolder: folder of the UNet inside the model, as in diffusers.
        adapters: ``"controlnet"`` or ``"t2i-adapter"``: adds the inputs of these adapters to the graphs. By default
            the inputs that the model's own pipeline uses.
        loras: LoRA files with their scales, fused into the UNet and into a pipeline's text encoders.
        ip_adapters: weight files of IP-Adapters to build into the UNet, as ``"FILE"``, ``"FILE:SCALE"`` or
            ``"FILE:SCALE:IMAGES"``. The result counts as another model.
        attention: ``"cross-frame"`` for Text2Video-Zero, in place of the UNet's own. By default the attention of the
            model's own pipeline.
        calibration: an ``offcut.Calibration`` for ``int8`` and ``fp8``.
        cache: reuse an export of the same UNet, options and versions from the user's cache directory, and keep new ones
            there. ``OFFCUT_CACHE`` names another directory, ``OFFCUT_CACHE_SIZE`` its bound in GB (20).
        progress: called with a sentence as each stage begins.

    Returns:
        The bundle. Each engine was verified against eager PyTorch, or against the foreign ONNX, unless this machine
        cannot run it; its entry then says so.

    Raises:
        ModelError: the model cannot be read or exported.
        CutError: the UNet has no such cut.
        EngineError: an engine is missing, or cannot run this precision.
        ParityError: an engine's result is out of its bounds; nothing is added to the bundle.
        BundleError: the directory holds another model, or the disk is full.
    """
    request = BuildRequest(
        model=str(model),
        cuts=(cuts,) if isinstance(cuts, str) else tuple(cuts),
        engines=(engine,) if isinstance(engine, str) else tuple(engine),
        precision=precision,
        inference_precision=inference_precision,
        device=device,
        opset=opset,
        dims=dims or {},
        profiles=profiles if isinstance(profiles, Sizes) else tuple(profiles),
        settings=settings or {},
        deploy=deploy,
        compile_all=compile_all,
        adapters=None if adapters is None else tuple(adapters),
        loras=tuple(ScaledLora(Path(path), float(scale)) for path, scale in (loras or {}).items()),
        ip_adapters=tuple(
            adapter if isinstance(adapter, IPAdapter) else IPAdapter.parse(str(adapter)) for adapter in ip_adapters
        ),
        attention=attention,
        revision=revision,
        variant=variant,
        subfolder=subfolder,
        calibration=calibration,
        cache=cache,
    )
    return build_bundle(request, Path(out), progress)


def build_bundle(request: BuildRequest, out: Path, progress: Progress) -> Bundle:
    """Build a request into a directory; see ``build`` for the result and the errors."""
    plan = resolve(request, progress)
    while True:
        with suppress(_OvertakenError):
            return _add(plan, out, progress)
        progress("another build made this export meanwhile: add to it")


class _OvertakenError(Exception):
    """Another build has put the same variant into the bundle, or cut it again, since this build read the manifest."""


def _add(plan: BuildPlan, out: Path, progress: Progress) -> Bundle:
    check_target(out, plan)
    with staging(out) as staged:
        existing = Bundle.open(out) if (out / MANIFEST_FILE).exists() else None
        if plan.deploy and existing is not None:
            _check_deployable(existing, plan.variant)
        before = existing.manifest.variants.get(plan.variant) if existing else None
        if plan.source.is_pipeline and (existing is None or plan.compile_all or plan.calibrator):
            plan = replace(plan, source=fused_text_encoders(plan.source, staged / _FUSED, progress))
        variant = make_variant(plan, existing, out, staged, progress)
        entries = build_engines(plan, variant, existing, out, staged, progress)
        components = build_components(plan, entries, existing, staged, progress)
        pipeline_files = _pipeline_files(plan, existing, staged, progress)
        if plan.deploy:
            variant = _without_graphs(variant, staged)
        shutil.rmtree(staged / _FUSED, ignore_errors=True)
        progress("commit")

        def update(current: Manifest | None, files: dict[str, FileEntry]) -> Manifest:
            if current is not None and current.variants.get(plan.variant) != before:
                raise _OvertakenError
            return merge(current, plan, variant, entries, pipeline_files, files, components)

        commit(out, staged, update)
    bundle = Bundle.open(out)
    if existing is None or not existing.has_code or is_trusted(existing.built_digest):
        trust(bundle.built_digest)
    return bundle


def _check_deployable(existing: Bundle, variant: str) -> None:
    entries = existing.manifest.engines.values()
    if keys := [entry.key for entry in entries if entry.variant == variant and not entry.compiled]:
        raise BundleError(
            f"{', '.join(keys)} of this bundle opens the ONNX graphs that deploy leaves out: "
            "build into a directory of its own"
        )


def _without_graphs(variant: Variant, staged: Path) -> Variant:
    """Delete the ONNX graphs and their weights, which compiled engines do not need."""
    assert variant.graphs is not None
    for name in variant.graphs.files:
        (staged / name).unlink(missing_ok=True)
    return variant.model_copy(update={"graphs": None})


def _pipeline_files(plan: BuildPlan, existing: Bundle | None, staged: Path, progress: Progress) -> list[str]:
    if existing is not None:
        return list(existing.manifest.parts)
    if missing := missing_components(plan.source):
        progress(f"{plan.source.name} does not hold its {' and '.join(missing)}: left out")
    return copy_pipeline_files(plan.source, staged, without_weights=compilable(plan.source) if plan.compile_all else ())
