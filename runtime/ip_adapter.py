"""The interface through which diffusers' pipelines use a compiled UNet's IP-Adapters: kinds, layers, scales."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection

from ..errors import UserError
from ..exporter.ip_adapter import CONFIG_KEY, IMAGE_EMBEDS, LAYERS_KEY, SCALE

Config = Mapping[str, Any]


class BuiltInIPAdapters:
    """IP-Adapters that are built into a UNet's engines, as a diffusers pipeline sees them.

    ``pipe.set_ip_adapter_scale`` writes into ``processors``, which have diffusers' classes and unused weights;
    ``inputs`` passes those scales to the engines.

    Args:
        config: the UNet's config.
        device, dtype: device and dtype of the engines' inputs.
    """

    def __init__(self, config: Config, device: torch.device, dtype: torch.dtype) -> None:
        adapters = config[CONFIG_KEY]
        self._device, self._dtype = device, dtype
        scales = [float(adapter["scale"]) for adapter in adapters]
        self.processors = {
            name: IPAdapterAttnProcessor2_0(1, 1, num_tokens=[1] * len(scales), scale=list(scales))
            for name in config[LAYERS_KEY]
        }
        # Pipelines pass an image's pooled embedding if the projection is an ImageProjection, else its token embeddings.
        kinds = [ImageProjection(1, 1, 1) if adapter["pooled"] else torch.nn.Identity() for adapter in adapters]
        self.projections = SimpleNamespace(image_projection_layers=kinds, num_ip_adapters=len(kinds))
        self._written: tuple[tuple[float, ...], ...] | None = None
        self._scale = torch.empty(0)

    def inputs(self, added_cond_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the engines' inputs for a pipeline's ``added_cond_kwargs``, and the scales.

        Raises:
            UserError: images are missing, or an IP-Adapter's scale differs from image to image.
        """
        image_embeds = added_cond_kwargs.get(IMAGE_EMBEDS)
        count = len(self.projections.image_projection_layers)
        if image_embeds is None:
            raise UserError(
                "this UNet has IP-Adapters built in, and the pipeline passes no image: give ip_adapter_image or "
                "ip_adapter_image_embeds, or use a bundle without IP-Adapters"
            )
        if not isinstance(image_embeds, (list, tuple)) or len(image_embeds) != count:
            raise UserError(f"this UNet has {count} IP-Adapters: give ip_adapter_image_embeds as a list of {count}")
        embeds = {f"{IMAGE_EMBEDS}_{index}": tensor for index, tensor in enumerate(image_embeds)}
        return {**embeds, SCALE: self._scales()}

    def copy_scales(self, processors: Mapping[str, Any]) -> None:
        """Copy the scales of the eager UNet that these engines replace."""
        for name, processor in self.processors.items():
            scale = getattr(processors.get(name), "scale", None)
            if isinstance(scale, list) and len(scale) == len(processor.scale):
                processor.scale = list(scale)

    def blocks(self, config: Config) -> dict[str, list[SimpleNamespace]]:
        """Return placeholders for the UNet's blocks; diffusers finds the blocks with attention by ``attentions``."""
        kinds = {"down_blocks": config["down_block_types"], "up_blocks": config["up_block_types"]}
        return {
            side: [SimpleNamespace(attentions=()) if "CrossAttn" in kind else SimpleNamespace() for kind in types]
            for side, types in kinds.items()
        }

    def _scales(self) -> torch.Tensor:
        scales = tuple(tuple(processor.scale) for processor in self.processors.values())
        if scales != self._written:
            if any(isinstance(scale, list) for row in scales for scale in row):
                raise UserError(
                    "an IP-Adapter's scale differs from image to image, which needs masks that compiled engines have "
                    "no input for: give one scale to each IP-Adapter"
                )
            self._scale = torch.tensor(scales, dtype=self._dtype, device=self._device)
            self._written = scales
        return self._scale
