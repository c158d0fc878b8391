"""Reuse of cached features in eager PyTorch, written plainly: the reference of generations with several latents."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch


class EagerReuse:
    """Context manager in which the eager UNet reuses ``hidden`` at branch k from the last full call on shallow calls.

    It computes the whole UNet at every call and replaces one tensor, so it shares no code with the splitting of graphs.
    The decoder's layers are counted from the outermost inwards; ``hidden`` is the first part of their input.

    Attributes:
        calls: number of UNet calls so far.

    Args:
        unet: a diffusers UNet.
        choose: function that returns for each UNet call, counted from 0, the key of its latent and whether it is full.
        branch: number of the branch k.
    """

    def __init__(self, unet: Any, choose: Callable[[int], tuple[Hashable, bool]], branch: int = 0) -> None:
        layers = [layer for block in unet.up_blocks for layer in block.resnets]
        layer = layers[-1 - branch]
        # Each decoder layer concatenates the skip connection from the mirrored place in the encoder.
        skips = [unet.conv_in.out_channels]
        for block in unet.down_blocks:
            skips += [_spatial(each).out_channels for each in block.resnets]
            skips += [each.out_channels for each in block.downsamplers or []]
        self._unet, self._layer, self._choose = unet, layer, choose
        self._hidden_channels = _spatial(layer).in_channels - skips[branch]
        self._hidden: dict[Hashable, torch.Tensor] = {}
        self.calls = 0

    def __enter__(self) -> EagerReuse:
        self._hooks = [
            self._unet.register_forward_hook(self._count),
            self._layer.register_forward_pre_hook(self._replace, with_kwargs=True),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _count(self, *_: object) -> None:
        self.calls += 1

    def _replace(self, layer: Any, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        joined = inputs[0] if inputs else keywords["input_tensor"]
        key, full = self._choose(self.calls)
        if full:
            self._hidden[key] = joined[:, : self._hidden_channels].clone()
            return None
        joined = torch.cat([self._hidden[key], joined[:, self._hidden_channels :]], 1)
        return ((joined, *inputs[1:]), keywords) if inputs else ((), {**keywords, "input_tensor": joined})


def _spatial(layer: Any) -> Any:
    """Return the layer that knows its channels; layers of Stable Video Diffusion consist of two."""
    return getattr(layer, "spatial_res_block", layer)
