"""Conversion of the arguments of a UNet's ``forward`` to the inputs of an engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import ShapeError, UserError
from ..exporter.ip_adapter import SCALE
from ..exporter.residuals import argument_of
from ..exporter.specs import TensorSpec, factors
from ..exporter.trace.export import SAMPLE
from .generation.steps import timestep_value

_REMEDIES = {
    "attention_mask": "leave it out",
    "encoder_attention_mask": "leave it out, and pad prompts to the full length",
    "down_block_additional_residuals": "build the bundle with --adapter controlnet",
    "mid_block_additional_residual": "build the bundle with --adapter controlnet",
    "down_intrablock_additional_residuals": "build the bundle with --adapter t2i-adapter",
    "image_embeds": "build the bundle with --ip-adapter",
}


def refuse_unsupported(
    sample: torch.Tensor, cross_attention_kwargs: Mapping[str, Any] | None, **arguments: object
) -> None:
    """Raise a ``UserError`` for an argument that engines have no input for; ignoring it would change the image."""
    for name, value in arguments.items():
        if value is not None:
            raise UserError(f"the pipeline passes {name}, which compiled engines have no input for: {_REMEDIES[name]}")
    for name, value in (cross_attention_kwargs or {}).items():
        if name == "scale" and value == 1:
            continue
        raise UserError(
            f"the pipeline passes cross_attention_kwargs={{{name!r}: ...}}, which compiled engines have no input for: "
            + ("give the scale to pipe.set_adapters or pipe.unet.load_lora" if name == "scale" else "leave it out")
        )
    if sample.requires_grad and torch.is_grad_enabled():
        raise UserError("engines compute no gradients: call the UNet under torch.no_grad(), or use the eager UNet")


def conditioning_by_name(
    positions: tuple[str, str], third: torch.Tensor | None, fourth: torch.Tensor | None
) -> dict[str, Any]:
    """Return the third and fourth positional argument of ``forward`` by their names in the UNet's own class."""
    return {name: tensor for name, tensor in zip(positions, (third, fourth), strict=True) if tensor is not None}


def engine_inputs(
    arguments: Mapping[str, Any], specs: Mapping[str, TensorSpec], device: torch.device
) -> dict[str, torch.Tensor]:
    """Return the tensors among these arguments, in the order of the engine's inputs, without the timestep.

    Residuals of a ControlNet or T2I-Adapter may be left out.

    Raises:
        UserError: an input is missing, unknown to the engine, not a tensor, or on another device.
    """
    tensors = {name: value for name, value in arguments.items() if value is not None}
    for name, value in tensors.items():
        if name not in specs:
            remedy = _REMEDIES.get(argument_of(name) or name, "it was built for another kind of model")
            raise UserError(f"this UNet has no input {name}, which the pipeline passes: {remedy}")
        if not isinstance(value, torch.Tensor):
            raise UserError(f"{name} is a {type(value).__name__}, but the engine takes a tensor")
        if not same_device(value.device, device):
            raise UserError(
                f"{name} is on {value.device}, but this UNet's engines run on {device}: call pipe.to({str(device)!r})"
            )
    optional = {name for name in specs if argument_of(name) is not None}
    if missing := [name for name in specs if name not in tensors and name not in optional | {"timestep"}]:
        raise UserError(
            f"this UNet also needs {', '.join(missing)}, which was not passed: use a pipeline for this kind of UNet"
        )
    return {name: tensors[name] for name in specs if name in tensors and name != "timestep"}


def same_device(one: torch.device, other: torch.device) -> bool:
    """Return whether two devices are the same; a device without an index counts as index 0."""
    return one.type == other.type and (one.index or 0) == (other.index or 0)


def timestep_shape(specs: Mapping[str, TensorSpec], batch: int) -> tuple[int, ...]:
    """Return the shape of the engine's timestep: [batch] in offcut's own exports, [1] or [] in some foreign ONNX."""
    symbol = specs[SAMPLE].shape[0]
    return tuple(dim if isinstance(dim, int) else batch if dim == symbol else 1 for dim in specs["timestep"].shape)


def has_rows(spec: TensorSpec, specs: Mapping[str, TensorSpec]) -> bool:
    """Return whether each row of a batch has its own part of a tensor, in the tensor's first dimension.

    Args:
        spec: the tensor, an input or an output.
        specs: inputs of the full graph.
    """
    if not spec.shape or spec.name == SCALE:
        return False
    first, batch = spec.shape[0], specs[SAMPLE].shape[0]
    if isinstance(batch, str):
        return isinstance(first, str) and batch in factors(first).symbols
    return isinstance(first, int) and first % batch == 0


def _is_fractional(timestep: torch.Tensor | float) -> bool:
    if isinstance(timestep, torch.Tensor):
        return timestep.is_floating_point() and bool((timestep != timestep.trunc()).any())
    return timestep != int(timestep)


def write_timestep(buffer: torch.Tensor, timestep: torch.Tensor | float) -> None:
    """Write a timestep into the engine's buffer, broadcast and cast to the buffer's shape and dtype.

    Args:
        buffer: [batch], [1] or [], float or integer.
        timestep: a number, or a tensor [], [1] or [batch] on any device.

    Raises:
        ShapeError: the number of timesteps does not match the buffer.
        UserError: the timestep is fractional, and the engine takes integers.
    """
    if not buffer.is_floating_point() and _is_fractional(timestep):
        raise UserError(
            f"the scheduler has fractional timesteps ({timestep_value(timestep):.3f}), but this engine takes integers: "
            "choose a scheduler without them (DDIM, PNDM), or export the UNet with offcut"
        )
    if not isinstance(timestep, torch.Tensor):
        buffer.fill_(timestep)  # copying from the host would wait for the device
        return
    if timestep.numel() == 1:
        timestep = timestep.reshape(())
    elif timestep.shape != buffer.shape:
        raise ShapeError(
            f"timesteps of shape {list(timestep.shape)} were passed, but the engine takes {list(buffer.shape)}: "
            "pass one for all images, or one for each"
        )
    buffer.copy_(timestep)
