"""Whole pipelines: ``load`` opens one from a bundle, and ``attach`` adds a bundle to an existing one."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch
from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from packaging.version import Version

from ..engines.base import EngineOptions, OpenOptions
from ..errors import BundleError, OffcutError, UserError
from ..exporter.families import FAMILIES
from .base_unet import BaseUNet
from .components import open_components
from .controlnet import reuse_controlnets
from .override import override_method
from .replacement import take_over
from .unet import UNet
from .unsupported import refuse_layer_guidance, refuse_pipeline

if TYPE_CHECKING:
    from ..engines.bundle.bundle import Bundle


_MOST_TIMESTEPS = 1_000_000
"""Most training timesteps of a bundle's scheduler; schedulers have 1000."""


def load(
    bundle: str | Path | Bundle,
    engine: str = "auto",
    *,
    device: str = "cpu",
    precision: str | None = None,
    inference_precision: str | None = None,
    **arguments: Any,
) -> DiffusionPipeline:
    """Open a bundle's pipeline, with the bundle's engines in place of its UNet.

    diffusers loads the pipeline's other components, in the dtype of the UNet's latents and on its device, from files
    whose digests were checked. Files that the bundle's manifest does not list are not read.

    Args:
        bundle: an opened bundle or its directory.
        engine: name of the engine, or ``"auto"``, as in ``UNet.load``.
        device: device of the engines and the pipeline, as in ``UNet.load``.
        precision: precision of the graphs, as in ``UNet.load``.
        inference_precision: precision of the computation, as in ``UNet.load``.
        arguments: options of ``UNet.load``, e.g. ``threads=``, and arguments of
            ``DiffusionPipeline.from_pretrained``, e.g. ``scheduler=`` or ``safety_checker=None``.

    Raises:
        BundleError: the bundle is damaged, or holds a bare UNet.
        EngineError: the engine is missing or cannot run here.
    """
    from ..engines.bundle.bundle import Bundle
    from ..engines.bundle.view import view

    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    if opened.manifest.pipeline is None:
        raise BundleError(
            f"{opened.path} was built from a bare UNet and holds no pipeline: use offcut.UNet.load, or offcut.attach "
            "with a pipeline of your own"
        )
    options = {name: arguments.pop(name) for name in OpenOptions.__annotations__ if name in arguments}
    unet = UNet.load(
        opened,
        engine,
        device=device,
        precision=precision,
        inference_precision=inference_precision,
        **options,
    )
    settings: dict[str, Any] = {"local_files_only": True, **dtype_argument(unet.dtype)}
    if {"dtype", "torch_dtype"} & set(arguments):
        settings = {key: value for key, value in settings.items() if key not in ("dtype", "torch_dtype")}
    networks: dict[str, Any] = {}
    try:
        with view(opened, opened.manifest.parts) as folder:
            if opened.manifest.components:
                graphs = opened.find(
                    engine, device=device, precision=precision, inference_precision=inference_precision
                )
                base_precision = opened.manifest.variants[graphs.variant].base
                engine_options = EngineOptions(device, **options)
                networks = open_components(opened, folder, unet.engine, base_precision, engine_options)
            with without_type_warnings():
                components = {"unet": unet, **networks} | arguments
                pipe = _from_files(opened, folder, settings | components)
            pipe.register_to_config(_name_or_path=str(opened.path))
        return attach(pipe.to(unet.device), unet)
    except BaseException:
        unet.close()
        raise


def _from_files(bundle: Bundle, folder: Path, arguments: dict[str, Any]) -> DiffusionPipeline:
    """Return diffusers' pipeline of a bundle's component files.

    Raises:
        BundleError: diffusers or transformers cannot load the files.
    """
    try:
        for config in folder.glob("*/scheduler_config.json"):
            timesteps = json.loads(config.read_text(encoding="utf-8")).get("num_train_timesteps", 0)
            if timesteps > _MOST_TIMESTEPS:  # the scheduler would allocate a table of so many entries
                raise BundleError(f"{bundle.path} has a scheduler of {timesteps:.0e} timesteps: build the bundle again")
        return DiffusionPipeline.from_pretrained(folder, **arguments)
    except OffcutError:
        raise
    except Exception as error:  # these libraries raise many kinds for malformed files
        reason = " ".join(str(error).split())
        raise BundleError(
            f"the components of {bundle.path} cannot be loaded ({type(error).__name__}: {reason[:150]}): build the "
            "bundle again, or check the arguments of offcut.load"
        ) from error


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
    """Replace a pipeline's UNet by a bundle's engines, and make the pipeline announce each generation.

    The pipeline is changed in place. Its class becomes a subclass of the same name, because Python looks up
    ``__call__`` in the class; its scheduler, callbacks and hooks do not change. Assigning another UNet to
    ``pipe.unet`` undoes the replacement.

    A second pipeline from the same components (``AutoPipelineForImage2Image.from_pipe``) shares the UNet; it announces
    its own generations after ``offcut.attach(img2img, pipe.unet)``.

    LoRAs that the pipeline's UNet has are taken over. What engines would not compute is refused: FreeU, other attention
    processors, hooks and replaced layers, and other weights than the bundle's, fused LoRAs among them. The weights are
    compared by the first row of each tensor, if the bundle holds its weights.

    Args:
        pipe: a diffusers pipeline with a ``unet``.
        bundle: an opened bundle, its directory, or an open ``UNet``.
        engine: name of the engine, or ``"auto"``, as in ``UNet.load``.
        device: device of the engines; None for the pipeline's own.
        precision: precision of the graphs, as in ``UNet.load``.
        inference_precision: precision of the computation, as in ``UNet.load``.
        options: settings of the engine, as in ``UNet.load``.
        reuse_controlnet: run the pipeline's ControlNets on full calls only. Costs image quality.

    Returns:
        The same pipeline.

    Raises:
        UserError: the pipeline has no UNet, or no ControlNet to reuse; or its UNet was changed as described above; or
            the pipeline does more with its UNet than call it (Attend-and-Excite, LEdits++, self-attention guidance).
        BundleError: the bundle is damaged, or was built from another UNet.
        EngineError: the engine is missing or cannot run here.
    """
    refuse_pipeline(pipe)
    old_unet = getattr(pipe, "unet", None)
    if old_unet is None:
        raise UserError(f"{type(pipe).__name__} has no unet for offcut to replace: give a pipeline with one")
    old_unet = getattr(old_unet, "_orig_mod", old_unet)  # torch.compile's wrapper
    if isinstance(bundle, BaseUNet):
        return _replace(pipe, old_unet, bundle, reuse_controlnet)
    unet = UNet.load(
        bundle,
        engine,
        device=device or _device_name(pipe.device),
        precision=precision,
        inference_precision=inference_precision,
        **options,
    )
    try:
        return _replace(pipe, old_unet, unet, reuse_controlnet)
    except BaseException:
        unet.close()
        raise


def _replace(pipe: Any, old_unet: Any, unet: BaseUNet, reuse_controlnet: bool) -> Any:
    """Replace a pipeline's UNet, after everything that could be lost was taken over or refused."""
    if differing := _differences(old_unet, unet):
        raise BundleError(
            f"the bundle was built from another kind of UNet than this pipeline has ({'; '.join(differing)}): "
            "build a bundle from the pipeline's own UNet"
        )
    if isinstance(unet, UNet) and isinstance(old_unet, ModelMixin) and not isinstance(old_unet, BaseUNet):
        take_over(old_unet, unet)
    if unet.ip_adapters is not None and old_unet is not unet:
        unet.ip_adapters.copy_scales(getattr(old_unet, "attn_processors", {}))
    if reuse_controlnet:
        reuse_controlnets(pipe, unet)
    pipe.unet = unet
    pipe.__class__ = override_method(type(pipe), _AnnouncingPipeline, "__call__", "announce_and_call")  # type: ignore[arg-type]
    return pipe


class _AnnouncingPipeline:
    """Method that ``attach`` adds to a pipeline's class."""

    def announce_and_call(self, *args: Any, **kwargs: Any) -> Any:
        unet = getattr(self, "unet", None)
        unet = getattr(unet, "_orig_mod", unet)  # torch.compile's wrapper
        call = super().__call__  # type: ignore[misc]
        if not isinstance(unet, BaseUNet):
            return call(*args, **kwargs)
        refuse_layer_guidance(self, args, kwargs)
        scheduler = getattr(self, "scheduler", None)
        with unet.generation(lambda: _unet_calls(self), scheduler, lambda: _is_guided(self)):
            return call(*args, **kwargs)


def _is_guided(pipe: Any) -> bool:
    """Return whether the pipeline, during a call, uses classifier-free guidance in one batch."""
    return bool(getattr(pipe, "do_classifier_free_guidance", False))


def _unet_calls(pipe: Any) -> int:
    """Return the number of UNet calls of the denoising loop that has just begun.

    Most pipelines set ``num_timesteps`` before the loop, after img2img's trimming; for the others the scheduler
    has the index where the loop begins.
    """
    if "_num_timesteps" in pipe.__dict__:
        return int(pipe.num_timesteps)
    first = getattr(pipe.scheduler, "begin_index", None)
    return len(pipe.scheduler.timesteps) - (first or 0)


_INTERFACE = ("in_channels", "out_channels", "cross_attention_dim", "addition_embed_type", "time_cond_proj_dim")


def _differences(old_unet: Any, unet: BaseUNet) -> list[str]:
    """Return the differences of two UNets in the config entries that a pipeline reads."""
    old, new = old_unet.config, unet.config
    class_name = type(old_unet).__name__
    if class_name in FAMILIES and class_name != new["_class_name"]:
        return [f"{new['_class_name']} instead of {class_name}"]
    return [
        f"{key} {new[key]} instead of {old[key]}"
        for key in _INTERFACE
        if key in old and key in new and _tuple_to_list(old[key]) != _tuple_to_list(new[key])
    ]


def _tuple_to_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _device_name(device: torch.device) -> str:
    """Return a device as text; ``cuda`` for the first GPU."""
    return device.type if not device.index else str(device)


def dtype_argument(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the keyword argument for a dtype, whose name changed in diffusers 0.40."""
    import diffusers

    return {"dtype" if Version(diffusers.__version__) >= Version("0.40") else "torch_dtype": dtype}


@contextmanager
def without_type_warnings() -> Iterator[None]:
    """Suppress diffusers' warning that a component is not of the expected class, which ``UNet`` always causes."""
    logger = logging.getLogger("diffusers.pipelines.pipeline_utils")

    def is_not_type_warning(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Expected types for ")

    logger.addFilter(is_not_type_warning)
    try:
        yield
    finally:
        logger.removeFilter(is_not_type_warning)
