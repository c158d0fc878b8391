"""Residuals: the feature maps that ControlNets and T2I-Adapters add to a UNet's skip connections, as graph inputs.

diffusers passes the residuals to ``forward`` as a tuple and a tensor; a graph has one input for each feature map. The
inputs are optional at run time: a residual that is not passed is zero. So one bundle works with a ControlNet and
without.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from .specs import TensorSpec

Config = Mapping[str, Any]

_TUPLES = {
    "down_block_residual": "down_block_additional_residuals",
    "down_intrablock_residual": "down_intrablock_additional_residuals",
}
_SINGLE = {"mid_block_residual": "mid_block_additional_residual"}
_NUMBERED = re.compile(r"(.+)_(\d+)")


def argument_of(name: str) -> str | None:
    """Return the argument of ``forward`` that contains this input, or None if the input is not a residual."""
    numbered = _NUMBERED.fullmatch(name)
    return _TUPLES.get(numbered[1]) if numbered else _SINGLE.get(name)


def flatten(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the residual arguments of ``forward`` as graph inputs by name; arguments that are None are left out."""
    flat: dict[str, Any] = {}
    for prefix, argument in _TUPLES.items():
        if arguments.get(argument) is not None:
            flat |= {f"{prefix}_{index}": tensor for index, tensor in enumerate(arguments[argument])}
    for name, argument in _SINGLE.items():
        if arguments.get(argument) is not None:
            flat[name] = arguments[argument]
    return flat


def nest(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return the residual arguments of ``forward`` for graph inputs by name, in order; the reverse of ``flatten``."""
    arguments: dict[str, Any] = {}
    for name, tensor in tensors.items():
        argument = argument_of(name)
        if argument is None:
            continue
        if argument in _TUPLES.values():
            arguments.setdefault(argument, []).append(tensor)  # a list, because the UNet pops the maps of T2I-Adapters
        else:
            arguments[argument] = tensor
    return arguments


def controlnet(config: Config, dtype: str) -> tuple[TensorSpec, ...]:
    """Return the inputs that a ControlNet fills: a feature map for each skip connection, and one for the mid block.

    Stable Diffusion 1.5 has ``down_block_residual_0`` to ``_11``, from 320 channels at the latent's size to 1280
    channels at an eighth of it.
    """
    channels, layers = _blocks(config)
    maps = [(channels[0], 1)]
    for level, (width, count) in enumerate(zip(channels, layers, strict=True)):
        maps += [(width, 2**level)] * count
        if level < len(channels) - 1:
            maps.append((width, 2 ** (level + 1)))
    skips = [_spec(f"down_block_residual_{i}", dtype, width, by) for i, (width, by) in enumerate(maps)]
    return (*skips, _spec("mid_block_residual", dtype, channels[-1], 2 ** (len(channels) - 1)))


def t2i_adapter(config: Config, dtype: str) -> tuple[TensorSpec, ...]:
    """Return the inputs that a T2I-Adapter fills: a feature map for each level, in SDXL also one for the mid block.

    A level with attention adds its map before downsampling; a level without attention adds it after downsampling.
    """
    channels, _ = _blocks(config)
    last = len(channels) - 1
    attends = ["CrossAttn" in kind for kind in config["down_block_types"]]
    maps = [(width, 2 ** (level + (not attends[level] and level < last))) for level, width in enumerate(channels)]
    if not attends[0]:
        maps.append((channels[-1], 2**last))
    return tuple(_spec(f"down_intrablock_residual_{i}", dtype, width, by) for i, (width, by) in enumerate(maps))


ADAPTERS: Mapping[str, Callable[[Config, str], tuple[TensorSpec, ...]]] = {
    "controlnet": controlnet,
    "t2i-adapter": t2i_adapter,
}
"""Functions from the UNet's config and the latent's dtype to an adapter's inputs, by the adapter's kind."""


def _blocks(config: Config) -> tuple[tuple[int, ...], tuple[int, ...]]:
    channels = tuple(config["block_out_channels"])
    layers = config["layers_per_block"]
    return channels, (layers,) * len(channels) if isinstance(layers, int) else tuple(layers)


def _spec(name: str, dtype: str, channels: int, divisor: int) -> TensorSpec:
    sides = ("height", "width") if divisor == 1 else (f"height/{divisor}", f"width/{divisor}")
    return TensorSpec(name, dtype, ("batch", channels, *sides))
