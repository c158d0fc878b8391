"""Whole pipelines: ``load`` one from a bundle, or ``attach`` a bundle to one that exists."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch
from diffusers import DiffusionPipeline
from packaging.version import Version

from ..engines.base import EngineOptions, OpenOptions
from ..errors import BundleError, UserError
from ..exporter.families import FAMILIES
from .base_unet import BaseUNet
from .components import open_components
from .controlnet import reuse
from .override import override_method
from .unet import UNet

if TYPE_CHECKING:
    from ..engines.bundle.bundle import Bundle


def load(
    bundle: str | Path | Bundle,
    engine: str = "auto",
    *,
    device: str = "cpu",
    precision: str | None = None,
    inference_precision: str | None = None,
    **arguments: Any,
) -> DiffusionPipeline:
    """The pipeline of a bundle, its UNet replaced by the bundle's engines.

    The other parts are loaded as diffusers does, in the dtype of the UNet's latents and onto its device, after their
    digests were checked.

    Args:
        bundle: an opened bundle or its directory.
        engine, device, precision, inference_precision: as in ``UNet.load``.
        arguments: ``UNet.load``'s others, e.g. ``threads=``; the rest is for ``DiffusionPipeline.from_pretrained``,
            e.g. ``scheduler=`` or ``safety_checker=None``.

    Raises:
        BundleError: the bundle is damaged, or holds a bare UNet.
        EngineError: the engine is missing or cannot run here.
    """
    from ..engines.bundle.bundle import Bundle

    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    if opened.manifest.pipeline is None:
        raise BundleError(
            f"{opened.path} was built from a bare UNet and holds no pipeline: use offcut.UNet.load, or offcut.attach "
            "with a pipeline of your own"
        )
    opened.verify_files(opened.manifest.parts)
    options = {name: arguments.pop(name) for name in OpenOptions.__annotations__ if name in arguments}
    unet = UNet.load(
        opened,
        engine,
        device=device,
        precision=precision,
        inference_precision=inference_precision,
        **options,
    )
    settings: dict[str, Any] = {"local_files_only": True, "variant": _variant(opened), **_dtype(unet.dtype)}
    if {"dtype", "torch_dtype"} & set(arguments):
        settings = {key: value for key, value in settings.items() if key not in ("dtype", "torch_dtype")}
    networks: dict[str, Any] = {}
    try:
        if opened.manifest.components:
            graphs = opened.find(engine, device=device, precision=precision, inference_precision=inference_precision)
            made_for = opened.manifest.variants[graphs.variant].base
            networks = open_components(opened, unet.engine, made_for, EngineOptions(device, **options))
        with _expecting_stand_ins():
            given = {"unet": unet, **networks} | arguments
            pipe = DiffusionPipeline.from_pretrained(opened.path, **(settings | given))
        return attach(pipe.to(unet.device), unet)
    except BaseException:
        unet.close()
        raise


def attach(
    pipe: DiffusionPipeline,
    bundle: str | Path | Bundle | BaseUNet,
    engine: str = "auto",
    *,
    device: str | None = None,
    precision: str | None = None,
    inference_precision: str | None = None,
    reuse_controlnet: bool = False,
    **options: Unpack[OpenOptions],
) -> DiffusionPipeline:
    """Replace a pipeline's UNet by a bundle's engines, and let it announce each generation to them.

    The pipeline is changed in place. Its class becomes a subclass of the same name, since Python looks up calls of an
    object in its class; its scheduler, callbacks and hooks are left alone, and ``pipe.unet = another`` undoes it.

    A pipeline made of its components (``AutoPipelineForImage2Image.from_pipe``) shares its UNet, and announces its own
    generations after ``offcut.attach(img2img, pipe.unet)``.

    Args:
        pipe: a diffusers pipeline with a ``unet``.
        bundle: an opened bundle, its directory, or an open ``UNet``.
        engine, precision, inference_precision, options: as in ``UNet.load``.
        device: None for the pipeline's own.
        reuse_controlnet: let the pipeline's ControlNets run on full calls only. Costs image quality.

    Returns:
        The same pipeline.

    Raises:
        UserError: the pipeline has no UNet, or no ControlNet to reuse.
        BundleError: the bundle is damaged, or was built from another kind of UNet.
        EngineError: the engine is missing or cannot run here.
    """
    replaced = getattr(pipe, "unet", None)
    if replaced is None:
        raise UserError(f"{type(pipe).__name__} has no unet, which offcut would replace: give a pipeline with one")
    if isinstance(bundle, BaseUNet):
        unet = bundle
    else:
        unet = UNet.load(
            bundle,
            engine,
            device=device or _spelled(pipe.device),
            precision=precision,
            inference_precision=inference_precision,
            **options,
        )
    if differing := _differences(replaced, unet):
        raise BundleError(
            f"the bundle was built from another kind of UNet than this pipeline has ({'; '.join(differing)}): "
            "build one from the pipeline's own"
        )
    if unet.ip_adapters is not None and replaced is not unet:
        unet.ip_adapters.adopt(getattr(replaced, "attn_processors", {}))
    if reuse_controlnet:
        reuse(pipe, unet)
    pipe.unet = unet
    pipe.__class__ = override_method(type(pipe), _Announcing, "__call__", "announce_and_call")  # type: ignore[arg-type]
    return pipe


class _Announcing:
    """What ``attach`` adds to a pipeline's class."""

    def announce_and_call(self, *args: Any, **kwargs: Any) -> Any:
        unet = getattr(self, "unet", None)
        unet = getattr(unet, "_orig_mod", unet)  # torch.compile's wrapper
        call = super().__call__  # type: ignore[misc]
        if not isinstance(unet, BaseUNet):
            return call(*args, **kwargs)
        scheduler = getattr(self, "scheduler", None)
        with unet.generation(lambda: _unet_calls(self), scheduler, lambda: _guides(self)):
            return call(*args, **kwargs)


def _guides(pipe: Any) -> bool:
    """Whether the call under way asks the UNet about each latent without the prompt and with it."""
    return bool(getattr(pipe, "do_classifier_free_guidance", False))


def _unet_calls(pipe: Any) -> int:
    """How many UNet calls the denoising loop makes that has just begun.

    Most pipelines have just said so in ``num_timesteps``, after img2img's trimming; for the others the scheduler knows
    where they begin.
    """
    if "_num_timesteps" in pipe.__dict__:
        return int(pipe.num_timesteps)
    first = getattr(pipe.scheduler, "begin_index", None)
    return len(pipe.scheduler.timesteps) - (first or 0)


_INTERFACE = ("in_channels", "out_channels", "cross_attention_dim", "addition_embed_type", "time_cond_proj_dim")


def _differences(replaced: Any, unet: BaseUNet) -> list[str]:
    """How two UNets differ in what a pipeline passes and gets."""
    theirs, ours = replaced.config, unet.config
    kind = type(replaced).__name__
    if kind in FAMILIES and kind != ours["_class_name"]:
        return [f"{ours['_class_name']} instead of {kind}"]
    return [
        f"{key} {ours[key]} instead of {theirs[key]}"
        for key in _INTERFACE
        if key in theirs and key in ours and _plain(theirs[key]) != _plain(ours[key])
    ]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _spelled(device: torch.device) -> str:
    return device.type if not device.index else str(device)


def _variant(bundle: Bundle) -> str | None:
    """The file name variant to ask for: the source's, if a part of the bundle has files of it."""
    variant = bundle.manifest.source.variant
    has_files = any(f".{variant}." in part or f".{variant}-" in part for part in bundle.manifest.parts)
    return variant if has_files else None


def _dtype(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The argument's name changed in diffusers 0.40."""
    import diffusers

    return {"dtype" if Version(diffusers.__version__) >= Version("0.40") else "torch_dtype": dtype}


@contextmanager
def _expecting_stand_ins() -> Iterator[None]:
    """Keep diffusers from warning that these are not of its own classes: that is the point."""
    logger = logging.getLogger("diffusers.pipelines.pipeline_utils")

    def others(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Expected types for ")

    logger.addFilter(others)
    try:
        yield
    finally:
        logger.removeFilter(others)
