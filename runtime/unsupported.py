"""Methods of diffusers' UNets that a compiled UNet cannot support: each raises an error instead of doing nothing."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from ..errors import ShapeError, UserError
from ..exporter.trace.attention import PROCESSORS


def _refusal(what: str, remedy: str) -> Callable[..., NoReturn]:
    def method(self: object, *args: Any, **kwargs: Any) -> NoReturn:
        raise UserError(f"{what}, but this UNet's layers are compiled into engines: {remedy}")

    return method


_EAGER = "use the eager UNet for it"
_lora = _refusal(
    "PEFT wraps a UNet's layers",
    "load LoRAs with pipe.load_lora_weights or pipe.unet.load_lora, which change the weights themselves",
)
_fusing = _refusal(
    "fusing adds LoRAs to a UNet's weights",
    "leave it out, as loaded LoRAs are part of the engines' weights; pipe.set_adapters sets their scales",
)
_ip_adapter = _refusal(
    "an IP-Adapter replaces a UNet's attention layers", "build the bundle with it, offcut build --ip-adapter FILE"
)
_freeu = _refusal("FreeU rescales features inside a UNet's decoder", _EAGER)
_attention = _refusal("attention processors are part of a UNet's layers", f"set them before the build, or {_EAGER}")
_offload = _refusal(
    "group offloading and layerwise casting move or cast a UNet's layers",
    "choose the device and precision when the bundle is built and opened",
)
_chunking = _refusal("forward chunking runs a UNet's feed-forward layers piece by piece", "leave it out")
_training = _refusal("training changes a UNet's weights", "train the eager UNet and build a bundle from it")


_PIPELINES_THAT_NEED_LAYERS = {
    "LEditsPPPipelineStableDiffusion": "reads the UNet's attention maps",
    "LEditsPPPipelineStableDiffusionXL": "reads the UNet's attention maps",
    "StableDiffusionAttendAndExcitePipeline": "computes gradients through the UNet",
    "StableDiffusionModelEditingPipeline": "edits the weights of the UNet's attention",
    "StableDiffusionControlNetXSPipeline": "runs its ControlNet inside the UNet's blocks",
    "StableDiffusionXLControlNetXSPipeline": "runs its ControlNet inside the UNet's blocks",
    "StableDiffusionPix2PixZeroPipeline": "computes gradients through the UNet",
    "StableDiffusionSAGPipeline": "reads the UNet's attention maps",
}


def refuse_pipeline(pipe: Any) -> None:
    """Refuse a pipeline that does more with its UNet than call it.

    Raises:
        UserError: the pipeline is one of these.
    """
    name = type(pipe).__name__
    if name in _PIPELINES_THAT_NEED_LAYERS:
        raise UserError(
            f"{name} {_PIPELINES_THAT_NEED_LAYERS[name]}, but the UNet's layers are compiled into engines: use the "
            "eager UNet for it"
        )


def refuse_layer_guidance(pipe: Any, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
    """Refuse a pipeline call with perturbed-attention guidance, which changes attention layers.

    Raises:
        UserError: the guidance is on.
    """
    if not getattr(pipe, "pag_applied_layers", None):
        return
    call = inspect.signature(type(pipe).__call__).bind(pipe, *arguments, **keywords)
    call.apply_defaults()
    if call.arguments.get("pag_scale"):
        raise UserError(
            "perturbed-attention guidance changes the UNet's attention layers, but this UNet's layers are compiled "
            "into engines: pass pag_scale=0, or use an eager UNet"
        )


class UnsupportedMethods:
    """Methods of diffusers' UNets that change their layers; each raises a ``UserError`` that names the remedy."""

    enable_freeu = _freeu
    disable_freeu = _freeu

    enable_forward_chunking = _chunking
    disable_forward_chunking = _chunking

    fuse_qkv_projections = _attention
    unfuse_qkv_projections = _attention
    set_default_attn_processor = _attention
    set_attention_backend = _attention

    load_attn_procs = _lora
    save_lora_adapter = _lora
    add_adapter = _lora
    # ``loras.LoraMethods`` defines these for UNets with engines of their own.
    set_adapter: Any = _lora
    enable_adapters: Any = _lora
    disable_adapters: Any = _lora
    enable_lora: Any = _lora
    disable_lora: Any = _lora
    fuse_lora = _fusing
    unfuse_lora = _fusing

    _load_ip_adapter_weights = _ip_adapter
    _load_ip_adapter_loras = _ip_adapter

    enable_layerwise_casting = _offload
    enable_group_offload = _offload

    enable_gradient_checkpointing = _training

    _built_attention: str | None
    _set_attention: Any

    @property
    def attn_processors(self) -> Any:
        """Last value of ``set_attn_processor``, for a caller that restores it; {} at first."""
        return {} if self._set_attention is None else self._set_attention

    def set_attn_processor(self, processor: Any, *args: Any, **kwargs: Any) -> None:
        """Accept the value of ``attn_processors``, and processors of the attention that the engines were built with.

        Raises:
            UserError: the processor computes another kind of attention.
        """
        kind = _kind_of(processor)
        if processor not in ({}, self.attn_processors) and (kind is None or kind != self._built_attention):
            if kind is not None:
                raise UserError(
                    f"the pipeline sets {kind} attention, which this UNet was built without: "
                    f"build the bundle with --attention {kind}"
                )
            _attention(self)
        self._set_attention = None if processor == {} else processor

    def check_attention(self, batch: int) -> None:
        """Check that a call fits the attention that the engines compute.

        Raises:
            ShapeError: the batch does not consist of two halves.
            UserError: the pipeline does not use this attention.
        """
        if self._built_attention is None:
            return
        if batch % 2:
            raise ShapeError(
                f"{self._built_attention} attention needs a batch of two equal halves, without and with the "
                f"prompt, not {batch} frames: use guidance"
            )
        if self._set_attention is None:
            raise UserError(
                f"this UNet was built with {self._built_attention} attention, which this pipeline does not use: "
                "build a bundle without it"
            )


def _kind_of(processor: Any) -> str | None:
    """Return the kind of attention of a diffusers processor that expects guidance's two halves; None if unknown."""
    name = type(processor).__name__
    kinds = [kind for kind, classes in PROCESSORS.items() if name in classes]
    return kinds[0] if kinds and getattr(processor, "batch_size", None) == 2 else None
