"""``build``: a model in, a bundle out: export once, cut, compile and verify each engine, commit.

What the bundle already holds and fits is used again, and said so.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ...errors import BundleError
from ...exporter.foreign.networks import left_out
from ...exporter.ip_adapter import IPAdapter
from ..base import Settings
from ..bundle.bundle import Bundle
from ..bundle.manifest import MANIFEST_FILE, FileEntry, Manifest, Variant
from ..bundle.merge import merge
from ..bundle.networks import compilable
from ..bundle.pipeline_files import copy_parts
from ..bundle.store import commit, staging
from ..profiles import Profile
from .networks import build_components
from .quantize import Calibrator
from .request import Plan, Progress, check_target, make_plan
from .sizes import Sizes
from .text_loras import fused_text_encoders
from .unet import build_engines
from .variants import make_variant

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
    cache: bool = True,
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
        cache: reuse an export of the same UNet, options and versions from the user's cache directory, and keep new ones
            there. ``OFFCUT_CACHE`` names another directory, ``OFFCUT_CACHE_SIZE`` its bound in GB (20).
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
        cache=cache,
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
        entries = build_engines(plan, variant, existing, out, staged, progress)
        components = build_components(plan, entries, existing, staged, progress)
        parts = _parts(plan, existing, staged, progress)
        if plan.deploy:
            variant = _without_graphs(variant, staged)
        shutil.rmtree(staged / _FUSED, ignore_errors=True)
        progress("commit")

        def update(current: Manifest | None, files: dict[str, FileEntry]) -> Manifest:
            if current is not None and current.variants.get(plan.variant) != before:
                raise _OvertakenError
            return merge(current, plan, variant, entries, parts, files, components)

        commit(out, staged, update)
    return Bundle.open(out)


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


def _parts(plan: Plan, existing: Bundle | None, staged: Path, progress: Progress) -> list[str]:
    if existing is not None:
        return list(existing.manifest.parts)
    if missing := left_out(plan.source):
        progress(f"{plan.source.name} does not hold its {' and '.join(missing)}: left out")
    return copy_parts(plan.source, staged, without_weights=compilable(plan.source) if plan.compile_all else ())
