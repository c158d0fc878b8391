"""Another engine of the same model, whose features are the truth: fp32 where the one that is tuned is in int8.

A prediction that aims at the reference's features corrects the mean error of the engine's own, too, at no cost: both
are channel by channel the same scale, slope and shift. This is CacheQuant's second correction (CVPR 2025), fitted at
once with the first, and with a slope.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...errors import UserError
from ..pipeline import load
from ..unet import UNet
from .images import Studio

if TYPE_CHECKING:
    from ...engines.bundle.bundle import Bundle

_PRECISIONS = ("fp32", "bf16", "fp16")
"""The highest first."""


def beside(studio: Studio, pipe: Any) -> Studio:
    """The reference's studio.

    Args:
        studio: of the pipeline that is tuned.
        pipe: of the reference, of ``offcut.load``; gets the same scheduler.

    Raises:
        UserError: it has other cached features at these cuts.
    """
    unet = pipe.unet
    for cut, features in studio.cuts.items():
        if unet.cut_features.get(cut) != features:
            raise UserError(f"the reference has no cut {cut} with the same features: build it with --cut {cut}")
    pipe.scheduler = type(studio.pipe.scheduler).from_config(studio.pipe.scheduler.config)
    unet.advise = False
    unet.set_schedule(None)
    return Studio(pipe, studio.steps, studio.size, studio.cuts)


def load_reference(bundle: Bundle, tuned: Bundle, unet: UNet, *, device: str, threads: int | None) -> Any:
    """The pipeline of a bundle with the same engine in the highest precision that it has.

    Args:
        bundle: that has the reference; may be the one that is tuned.
        tuned: that is tuned.
        unet: of the pipeline that is tuned.

    Raises:
        UserError: the bundle has other weights, or no such build.
    """
    if bundle.manifest.source.weights_digest != tuned.manifest.source.weights_digest:
        raise UserError(f"{bundle.path} was built from other weights than {tuned.path}: give one of the same model")
    higher = _PRECISIONS[: _PRECISIONS.index(unet.precision)] if unet.precision in _PRECISIONS else _PRECISIONS
    entries = [entry for entry in bundle.manifest.engines.values() if entry.engine == unet.engine]
    there = {bundle.precision_of(entry) for entry in entries}
    chosen = next((precision for precision in higher if precision in there), None)
    if chosen is None:
        raise UserError(
            f"{bundle.path} has no build of {unet.engine} in higher precision than {unet.precision}: add one with "
            f"offcut build --engine {unet.engine} --precision fp32"
        )
    return load(bundle, unet.engine, device=device, inference_precision=chosen, threads=threads)


def named(unet: UNet) -> str:
    """Its engine and precision."""
    return f"{unet.engine} {unet.precision or ''}".strip()
