"""The UNet that ``attach`` replaces: what it does beyond its weights is taken over, or refused by name.

LoRAs of PEFT are taken over. FreeU, attention processors, hooks, replaced layers and other weights than those of the
bundle would have no effect on compiled engines, so they are refused before anything is replaced.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..errors import BundleError, UserError
from ..exporter.lora import Lora, LowRank
from ..exporter.trace.attention import PROCESSORS
from ..exporter.trace.parameters import StoredWeights
from .loras import LoraSet

if TYPE_CHECKING:
    from .unet import UNet

_EQUIVALENT_PROCESSORS = {
    "AttnProcessor",
    "AttnProcessor2_0",
    "AttnAddedKVProcessor",
    "AttnAddedKVProcessor2_0",
    "FusedAttnProcessor2_0",
    "SlicedAttnProcessor",
    "SlicedAttnAddedKVProcessor",
    "XFormersAttnProcessor",
    "XFormersAttnAddedKVProcessor",
    "AttnProcessorNPU",
}
"""diffusers' processors that compute a UNet's own attention, each in its own way."""

_FREEU = ("s1", "s2", "b1", "b2")


def take_over(old: torch.nn.Module, unet: UNet) -> None:
    """Take over what a UNet does beyond its weights, or refuse it; the UNet itself is not changed.

    Args:
        old: a diffusers UNet.
        unet: the UNet that replaces it, which gets its LoRAs.

    Raises:
        UserError, BundleError: as ``refuse_changes``, ``loras_of`` and ``check_weights``.
        EngineError: the engines do not accept the weights with LoRAs.
    """
    refuse_changes(old, attention=unet.built_attention, ip_adapters=unet.ip_adapters is not None)
    loras = loras_of(old)
    if loras.loras and unet.loras:
        raise UserError(
            "both this pipeline's UNet and the one that replaces it have LoRAs: unload those of one, with "
            "pipe.unload_lora_weights() or unet.unload_lora()"
        )
    stored = unet.weights_to_compare()
    if stored is not None:
        check_weights(old, stored, with_loras=unet.has_fused_loras)
    if loras.loras:
        unet.apply_loras(loras)


def refuse_changes(unet: torch.nn.Module, *, attention: str | None, ip_adapters: bool) -> None:
    """Refuse a UNet whose layers were changed, because compiled engines would compute the unchanged layers.

    Args:
        unet: a diffusers UNet.
        attention: kind of attention that the engines were built with; None for the UNet's own.
        ip_adapters: whether IP-Adapters are built into the engines.

    Raises:
        UserError: the message names the change and the remedy.
    """
    if any(getattr(module, name, None) is not None for module in unet.modules() for name in _FREEU):
        raise UserError("FreeU is enabled on this pipeline's UNet, but not in the engines: call pipe.disable_freeu()")
    for name, processor in getattr(unet, "attn_processors", {}).items():
        kind = type(processor).__name__
        is_built = (ip_adapters and "IPAdapter" in kind) or (attention is not None and kind in PROCESSORS[attention])
        if kind not in _EQUIVALENT_PROCESSORS and not is_built:
            remedy = (
                "build the bundle with --ip-adapter"
                if "IPAdapter" in kind
                else "call unet.set_default_attn_processor()"
            )
            raise UserError(
                f"this pipeline's UNet has the attention processor {kind} in {name}, which the engines were built "
                f"without: {remedy}, or use the eager UNet"
            )
    for name, module in unet.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        # accelerate's hooks of CPU offloading replace forward too, and only move weights.
        replaced = _forward_of(module) is not type(module).forward and not hasattr(module, "_hf_hook")
        if hooks or replaced:
            what = "hooks" if hooks else "a forward of its own"
            raise UserError(
                f"the layer {name or type(module).__name__} of this pipeline's UNet has {what}, which engines would "
                "not run: remove it first (disable DeepCache's helper, ToMe and the like), or use the eager UNet"
            )
    _refuse_other_layers(unet)


def _forward_of(module: torch.nn.Module) -> Any:
    """Return the function that computes a layer; DeepCache's helper leaves a layer's own method in the layer."""
    forward = vars(module).get("forward")
    return type(module).forward if forward is None else getattr(forward, "__func__", forward)


def _refuse_other_layers(unet: torch.nn.Module) -> None:
    """Refuse layers of other classes than those of a new UNet of this config, except the layers of PEFT."""
    with torch.device("meta"):
        new = type(unet).from_config(unet.config)  # type: ignore[attr-defined]  # diffusers' UNets
    expected = {name: type(module) for name, module in new.named_modules()}
    for name, module in unet.named_modules():
        plain_name = name.replace(".base_layer", "")
        if (
            plain_name not in expected
            or _is_peft_layer(module)
            or any(part.startswith("lora_") for part in name.split("."))
        ):
            continue
        if type(module) is not expected[plain_name] and not isinstance(module, expected[plain_name]):
            raise UserError(
                f"the layer {plain_name} of this pipeline's UNet is a {type(module).__name__} in place of a "
                f"{expected[plain_name].__name__}, which engines would not compute: use the eager UNet"
            )


def loras_of(unet: torch.nn.Module) -> LoraSet:
    """Return the LoRAs of PEFT that a UNet has, with their scales.

    Raises:
        UserError: the LoRAs are fused into the weights; or an adapter is no plain LoRA with one scale.
    """
    layers = {name: module for name, module in unet.named_modules() if _is_peft_layer(module)}
    products: dict[str, dict[str, LowRank]] = {}
    scales: dict[str, set[float]] = {}
    active: dict[str, None] = {}
    disabled: set[bool] = set()
    for layer_name, layer in layers.items():
        if layer.merged_adapters:
            raise UserError("LoRAs are fused into this pipeline's UNet: call pipe.unfuse_lora() first")
        disabled.add(bool(layer.disable_adapters))
        active |= dict.fromkeys(layer.active_adapters)
        for adapter in layer.lora_A if hasattr(layer, "lora_A") else ():
            if not _is_plain(layer, adapter):
                raise UserError(
                    f"the adapter {adapter} of this pipeline's UNet is no plain LoRA in {layer_name}: remove it with "
                    "pipe.delete_adapters, or use the eager UNet"
                )
            rank = layer.r[adapter]
            divisor = rank**0.5 if layer.use_rslora[adapter] else rank
            factor = layer.lora_alpha[adapter] / divisor
            down, up = (part[adapter].weight.detach().float().cpu() for part in (layer.lora_A, layer.lora_B))
            products.setdefault(adapter, {})[f"{layer_name}.weight"] = LowRank(down, up, factor)
            scales.setdefault(adapter, set()).add(round(layer.scaling[adapter] / factor, 6) if factor else 1.0)
        if not hasattr(layer, "lora_A"):
            raise UserError(
                f"this pipeline's UNet has an adapter of the kind {type(layer).__name__} in {layer_name}: remove it "
                "with pipe.delete_adapters, or use the eager UNet"
            )
    if len(disabled) > 1:
        raise UserError("LoRAs are disabled in some layers of this pipeline's UNet only: call pipe.enable_lora() first")
    for adapter, layer_scales in scales.items():
        if len(layer_scales) > 1:
            raise UserError(
                f"the LoRA {adapter} has one scale for each block, and engines take one for all: set it with "
                "pipe.set_adapters"
            )
    loras = {name: Lora(name, layer_products, {}) for name, layer_products in products.items()}
    return LoraSet(
        loras,
        {name: values.pop() for name, values in scales.items()},
        tuple(name for name in active if name in loras),
        enabled=not (loras and disabled == {True}),
    )


def check_weights(unet: torch.nn.Module, stored: StoredWeights, *, with_loras: bool) -> None:
    """Compare some values of each of a UNet's weights with those that engines were built with.

    Compared is the first row of each stored tensor, as far as the coarser of both dtypes, or fp16, can tell values
    apart. Tensors that the bundle does not store, or stores quantized, are not compared.

    Args:
        stored: the weights that the engines were built with.
        with_loras: whether LoRAs were fused in the build; then only norms and biases are compared.

    Raises:
        BundleError: the weights differ.
    """
    differing = []
    for name, weight in unet.named_parameters():
        name = name.replace(".base_layer", "")
        if name not in stored.shapes or (with_loras and weight.dim() > 1) or weight.is_meta:
            continue
        expected = stored.read_row(name)
        matrix = weight.detach().T if stored.is_transposed(name) else weight.detach()
        row = matrix[0] if matrix.dim() > 1 else matrix
        if expected is not None and not _equal(row.flatten().cpu(), expected):
            differing.append(name)
    if differing:
        raise BundleError(
            f"this pipeline's UNet has other weights than the bundle ({len(differing)} tensors, {differing[0]} among "
            "them): build a bundle from the pipeline's own UNet, or unfuse its LoRAs (pipe.unfuse_lora)"
        )


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether values are equal as far as the coarser of both dtypes, or fp16, can tell."""
    precision = max(torch.finfo(dtype).eps for dtype in (one.dtype, other.dtype, torch.float16))
    smallest = max(torch.finfo(one.dtype).smallest_normal, torch.finfo(other.dtype).smallest_normal)
    return torch.allclose(one.float(), other.float(), rtol=precision, atol=smallest * precision)


def _is_peft_layer(module: torch.nn.Module) -> bool:
    return hasattr(module, "base_layer") and hasattr(module, "adapter_layer_names")


def _is_plain(layer: Any, adapter: str) -> bool:
    """Return whether an adapter adds nothing but a low-rank product to a layer's weight."""
    has_bias = any(part[adapter].bias is not None for part in (layer.lora_A, layer.lora_B))
    is_variant = adapter in getattr(layer, "lora_variant", {}) or adapter in layer.lora_magnitude_vector
    return not (has_bias or is_variant)
