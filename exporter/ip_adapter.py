"""IP-Adapters: image prompts, as further inputs of a UNet's graph.

An IP-Adapter (arXiv 2308.06721) adds to each cross-attention layer a scaled attention over the tokens of an image. Its
weights become part of the graph; diffusers loads them. Values that differ between images are inputs:

    image_embeds_0     [batch, images, width], or [batch, images, tokens, width] where an adapter reads every token
    ip_adapter_scale   [cross-attention layers, adapters], set by ``pipe.set_ip_adapter_scale``

A UNet with IP-Adapters is another model than the same UNet without them. Its config lists its IP-Adapters.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelError
from .specs import TensorSpec

if TYPE_CHECKING:
    import torch

Config = Mapping[str, Any]

SCALE = "ip_adapter_scale"
IMAGE_EMBEDS = "image_embeds"
CONFIG_KEY = "ip_adapters"
LAYERS_KEY = "ip_adapter_layers"
PROJECTION = "ip_image_proj"

# CLIP ViT-H/14 at 224x224: 16x16 patches and one token for the whole image.
_CLIP_TOKENS = 257


@dataclass(frozen=True)
class IPAdapter:
    """An IP-Adapter to build into a UNet.

    Attributes:
        path: weights, one safetensors file as published (``ip-adapter_sd15.safetensors``).
        scale: strength of the adapter until ``pipe.set_ip_adapter_scale`` changes it.
        images: number of image prompts for one generated image.
        tokens: number of tokens of an image, for adapters that read all of them (Plus). None for the token count of the
            pipeline's image encoder, or of CLIP ViT-H if the pipeline has no image encoder.

    Raises:
        ModelError: a number is out of range.
    """

    path: Path
    scale: float = 1.0
    images: int = 1
    tokens: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))
        if self.images < 1 or (self.tokens is not None and self.tokens < 1):
            raise ModelError(f"the IP-Adapter {self.path} needs at least one image of one token")

    @classmethod
    def parse(cls, text: str) -> IPAdapter:
        """Return the IP-Adapter that a text ``FILE``, ``FILE:SCALE`` or ``FILE:SCALE:IMAGES`` describes.

        Raises:
            ModelError: a number is out of range.
        """
        path, numbers = text, list[float]()
        while len(numbers) < 2 and not Path(path).exists() and ":" in path:
            before, _, last = path.rpartition(":")
            try:
                numbers.insert(0, float(last))
            except ValueError:
                break
            path = before
        scale, images = [*numbers, *(1.0, 1.0)[len(numbers) :]]
        if images != int(images):
            raise ModelError(f"{text!r} is not FILE, FILE:SCALE or FILE:SCALE:IMAGES with a whole number of images")
        return cls(Path(path), scale, int(images))

    def weights(self) -> dict[str, dict[str, torch.Tensor]]:
        """Read the tensors of the image projection and of the attention layers, in diffusers' form.

        Raises:
            ModelError: the file is not readable, or not an IP-Adapter.
        """
        from safetensors import SafetensorError, safe_open

        groups: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
        try:
            with safe_open(self.path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    group, _, rest = name.partition(".")
                    if group in groups:
                        groups[group][rest] = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"the IP-Adapter {self.path} cannot be read: give its safetensors file, downloaded whole"
            ) from error
        if not groups["image_proj"] or not groups["ip_adapter"]:
            raise ModelError(f"{self.path} is not an IP-Adapter: its tensors are not named image_proj and ip_adapter")
        return groups

    def config_entry(self, weights: Mapping[str, Mapping[str, torch.Tensor]], tokens: int) -> dict[str, Any]:
        """Return the adapter's entry in the UNet's config.

        Args:
            weights: result of ``weights``.
            tokens: number of tokens of an image from the pipeline's image encoder.

        Raises:
            ModelError: the kind of IP-Adapter cannot be built in.
        """
        projection = weights["image_proj"]
        if any("lora" in name for name in weights["ip_adapter"]) or "perceiver_resampler.proj_in.weight" in projection:
            raise ModelError(
                f"{self.path} is a FaceID IP-Adapter, whose LoRA or face embeddings offcut cannot build in: "
                "use a plain, Plus or Full IP-Adapter"
            )
        if "proj.weight" in projection:
            shape = [projection["proj.weight"].shape[1]]
        elif "proj.3.weight" in projection:
            shape = [_CLIP_TOKENS, projection["proj.0.weight"].shape[0]]
        elif "norm.weight" in projection and "proj.0.weight" in projection:
            shape = [projection["proj.0.weight"].shape[1]]
        elif "latents" in projection and "proj_in.weight" in projection:
            shape = [self.tokens or tokens, projection["proj_in.weight"].shape[1]]
        else:
            raise ModelError(f"{self.path} is of a kind of IP-Adapter that offcut does not support")
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {
            "sha256": digest,
            "scale": self.scale,
            "pooled": "proj.weight" in projection,
            "shape": [self.images, *shape],
        }


def with_adapters(config: Config, adapters: Sequence[IPAdapter], root: Path) -> dict[str, Any]:
    """Return the config of a UNet with these IP-Adapters built in.

    Args:
        config: config of the UNet without IP-Adapters.
        root: directory of the pipeline, which may have an image encoder.

    Raises:
        ModelError: the UNet does not support IP-Adapters, or a file cannot be built in.
    """
    if not adapters:
        return dict(config)
    if config.get("_class_name") != "UNet2DConditionModel" or config.get("encoder_hid_dim_type") is not None:
        raise ModelError(
            f"this {config.get('_class_name')} takes no IP-Adapter: give a UNet2DConditionModel without encoder_hid_dim"
        )
    entries = [adapter.config_entry(adapter.weights(), _tokens(root)) for adapter in adapters]
    return {
        **config,
        CONFIG_KEY: entries,
        LAYERS_KEY: _cross_attention_layers(config),
        "encoder_hid_dim_type": PROJECTION,
    }


def specs(config: Config, dtype: str) -> list[TensorSpec]:
    """Return the inputs that the UNet's IP-Adapters add."""
    adapters = config.get(CONFIG_KEY) or []
    if not adapters:
        return []
    embeds = [
        TensorSpec(f"{IMAGE_EMBEDS}_{index}", dtype, ("batch", *adapter["shape"]))
        for index, adapter in enumerate(adapters)
    ]
    return [*embeds, TensorSpec(SCALE, dtype, (len(config[LAYERS_KEY]), len(adapters)))]


def load_into(unet: torch.nn.Module, adapters: Sequence[IPAdapter]) -> None:
    """Load IP-Adapters into a UNet in memory, and add the argument ``ip_adapter_scale`` to its ``forward``.

    Raises:
        ModelError: the weights do not fit the UNet.
    """
    weights = [adapter.weights() for adapter in adapters]
    logger = logging.getLogger("diffusers.models.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)  # diffusers warns about a cast to the dtype that the UNet already has
    try:
        unet._load_ip_adapter_weights(weights)  # type: ignore[operator]  # diffusers' own
    except (KeyError, RuntimeError, ValueError) as error:
        raise ModelError(
            f"the IP-Adapter {', '.join(str(adapter.path) for adapter in adapters)} was made for another UNet: "
            "give an IP-Adapter for this model's architecture"
        ) from error
    finally:
        logger.setLevel(level)
    scales: list[torch.Tensor] = []

    def take_scales(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        scales[:] = [kwargs.pop(SCALE)]
        return args, kwargs

    def join_images(module: torch.nn.Module, args: Any, projected: list[torch.Tensor]) -> list[torch.Tensor]:
        # projected: [batch, images, tokens, width]. Without masks, attention is over the tokens of all images. Keys and
        # values then have three dimensions like those of the text, as fused attention expects.
        return [tokens.flatten(1, 2) for tokens in projected]

    def scale_values(layer: int, adapter: int) -> Any:
        # diffusers multiplies the result of the attention by a Python number. Scaling the values is equivalent.
        return lambda module, args, value: value * scales[0][layer, adapter]

    unet.encoder_hid_proj.register_forward_hook(join_images)  # type: ignore[union-attr]
    processors: Mapping[str, Any] = unet.attn_processors  # type: ignore[assignment]
    for layer, name in enumerate(_text_attention(processors)):
        for adapter, to_value in enumerate(processors[name].to_v_ip):
            to_value.register_forward_hook(scale_values(layer, adapter))
    unet.register_forward_pre_hook(take_scales, with_kwargs=True)


def nest(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``forward`` for the graph inputs that IP-Adapters read."""
    embeds = [tensor for name, tensor in tensors.items() if is_embeds(name)]
    if not embeds:
        return {}
    return {"added_cond_kwargs": {IMAGE_EMBEDS: embeds}, SCALE: tensors[SCALE]}


def is_embeds(name: str) -> bool:
    """Return whether an input holds the image embeddings of an adapter."""
    return name.startswith(f"{IMAGE_EMBEDS}_")


def _tokens(root: Path) -> int:
    """Return the number of tokens that the pipeline's image encoder gives: one a patch, and one for the image."""
    file = root / "image_encoder" / "config.json"
    if not file.is_file():
        return _CLIP_TOKENS
    sizes = json.loads(file.read_text(encoding="utf-8"))
    return int(sizes.get("image_size", 224) // sizes.get("patch_size", 32)) ** 2 + 1  # CLIP's defaults


def _cross_attention_layers(config: Config) -> list[str]:
    """Return the names of the UNet's cross-attention processors in diffusers' order."""
    import diffusers
    import torch

    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(dict(config))
    return _text_attention(unet.attn_processors)


def _text_attention(processors: Mapping[str, Any]) -> list[str]:
    """Return the names of the cross-attention processors, without those of a Plus adapter's resampler."""
    return [name for name in processors if not name.startswith("encoder_hid_proj") and "attn1" not in name]
