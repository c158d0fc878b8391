"""Reuse of cached features in eager PyTorch, written plainly: the reference of generations with several latents."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch


class EagerReuse:
    """The eager UNet with reuse of the outermost feature, by key.

    Args:
        unet: a diffusers UNet.
        choose: function that returns for each UNet call, counted from 0, the key of its latent and whether it is full.
    """

    def __init__(self, unet: Any, choose: Callable[[int], tuple[Hashable, bool]]) -> None:
        self._unet, self._choose = unet, choose
        self._layer = [resnet for block in unet.up_blocks for resnet in block.resnets][-1]
        self._channels = self._layer.in_channels - unet.conv_in.out_channels
        self._features: dict[Hashable, torch.Tensor] = {}
        self._calls = 0

    def __enter__(self) -> EagerReuse:
        self._hooks = [
            self._unet.register_forward_hook(self._count),
            self._layer.register_forward_pre_hook(self._replace),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _count(self, *_: object) -> None:
        self._calls += 1

    def _replace(self, layer: Any, args: tuple[Any, ...]) -> Any:
        hidden, *others = args
        key, full = self._choose(self._calls)
        if full:
            self._features[key] = hidden[:, : self._channels].clone()
            return None
        return torch.cat([self._features[key], hidden[:, self._channels :]], 1), *others
