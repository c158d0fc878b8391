"""IP-Adapters: images as prompts, as further inputs of a UNet's graph.

An IP-Adapter (arXiv 2308.06721) adds to each cross-attention layer an attention over an image's tokens, times a scale.
Its weights become part of the graph, loaded as diffusers loads them. What changes from image to image are inputs:

    image_embeds_0     [batch, images, width], or [batch, images, tokens, width] where an adapter reads every token
    ip_adapter_scale   [cross-attention layers, adapters], what ``pipe.set_ip_adapter_scale`` sets

A UNet with IP-Adapters is another model than the same without: its config says which it has.
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
        path: its weights, one safetensors file as published (``ip-adapter_sd15.safetensors``).
        scale: how strong it is until ``pipe.set_ip_adapter_scale`` says otherwise.
        images: how many images it takes at once.
        tokens: of an image, for an adapter that reads them all (Plus); None for those of the pipeline's own image
            encoder, or of CLIP ViT-H where it has none.

    Raises:
        ModelError: a number is out of its range.
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
        """``FILE``, ``FILE:SCALE`` or ``FILE:SCALE:IMAGES``.

        Raises:
            ModelError: a number is out of its range.
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
        """The tensors of the image projection and of the attention layers, as diffusers takes them.

        Raises:
            ModelError: the file is no IP-Adapter's, or of a kind that cannot be built in.
        """
        from safetensors import SafetensorError, safe_open

        found: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
        try:
            with safe_open(self.path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is no dict
                    group, _, rest = name.partition(".")
                    if group in found:
                        found[group][rest] = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"the IP-Adapter {self.path} cannot be read: give its safetensors file, downloaded whole"
            ) from error
        if not found["image_proj"] or not found["ip_adapter"]:
            raise ModelError(f"{self.path} is no IP-Adapter: its tensors are not named image_proj and ip_adapter")
        return found

    def record(self, weights: Mapping[str, Mapping[str, torch.Tensor]], tokens: int) -> dict[str, Any]:
        """What the UNet's config says of it; ``tokens`` are the pipeline's of an image.

        Raises:
            ModelError: a kind that cannot be built in.
        """
        projection = weights["image_proj"]
        if any("lora" in name for name in weights["ip_adapter"]) or "perceiver_resampler.proj_in.weight" in projection:
            raise ModelError(
                f"{self.path} is a FaceID IP-Adapter, whose LoRA or face embeddings offcut cannot build in: "
                "use an IP-Adapter, Plus or Full one"
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
            raise ModelError(f"{self.path} is of a kind of IP-Adapter that offcut does not know")
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {
            "sha256": digest,
            "scale": self.scale,
            "pooled": "proj.weight" in projection,
            "shape": [self.images, *shape],
        }


def with_adapters(config: Config, adapters: Sequence[IPAdapter], root: Path) -> dict[str, Any]:
    """The config of a UNet with these IP-Adapters built in.

    Args:
        config: of the UNet without.
        root: of its pipeline, which may have an image encoder.

    Raises:
        ModelError: the UNet takes none, or a file is of no kind that can be built in.
    """
    if not adapters:
        return dict(config)
    if config.get("_class_name") != "UNet2DConditionModel" or config.get("encoder_hid_dim_type") is not None:
        raise ModelError(
            f"this {config.get('_class_name')} takes no IP-Adapter: give a UNet2DConditionModel without encoder_hid_dim"
        )
    records = [adapter.record(adapter.weights(), _tokens(root)) for adapter in adapters]
    return {**config, CONFIG_KEY: records, LAYERS_KEY: _layers(config), "encoder_hid_dim_type": PROJECTION}


def specs(config: Config, dtype: str) -> list[TensorSpec]:
    """The inputs that the UNet's IP-Adapters add."""
    adapters = config.get(CONFIG_KEY) or []
    if not adapters:
        return []
    embeds = [
        TensorSpec(f"{IMAGE_EMBEDS}_{index}", dtype, ("batch", *adapter["shape"]))
        for index, adapter in enumerate(adapters)
    ]
    return [*embeds, TensorSpec(SCALE, dtype, (len(config[LAYERS_KEY]), len(adapters)))]


def load_into(unet: torch.nn.Module, adapters: Sequence[IPAdapter]) -> None:
    """Give a UNet in memory its IP-Adapters, and ``forward`` the argument ``ip_adapter_scale``.

    Raises:
        ModelError: the weights do not fit the UNet.
    """

    weights = [adapter.weights() for adapter in adapters]
    logger = logging.getLogger("diffusers.models.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of a cast to the dtype that the UNet has anyway
    try:
        unet._load_ip_adapter_weights(weights)  # type: ignore[operator]  # diffusers' own
    except (KeyError, RuntimeError, ValueError) as error:
        raise ModelError(
            f"the IP-Adapter {', '.join(str(adapter.path) for adapter in adapters)} was made for another UNet: "
            "give one of this model's kind"
        ) from error
    finally:
        logger.setLevel(level)
    scales: list[torch.Tensor] = []

    def take(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        scales[:] = [kwargs.pop(SCALE)]
        return args, kwargs

    def joined(module: torch.nn.Module, args: Any, projected: list[torch.Tensor]) -> list[torch.Tensor]:
        # [batch, images, tokens, width]: without masks, attention is over the tokens of all images. Keys and values
        # then have three dimensions like the text's, which fused attention expects.
        return [tokens.flatten(1, 2) for tokens in projected]

    def scaled(layer: int, adapter: int) -> Any:
        # Diffusers multiplies the attention's result by a Python number; scaled values give that product too.
        return lambda module, args, value: value * scales[0][layer, adapter]

    unet.encoder_hid_proj.register_forward_hook(joined)  # type: ignore[union-attr]
    processors: Mapping[str, Any] = unet.attn_processors  # type: ignore[assignment]
    for layer, name in enumerate(_image_layers(processors)):
        for adapter, to_value in enumerate(processors[name].to_v_ip):
            to_value.register_forward_hook(scaled(layer, adapter))
    unet.register_forward_pre_hook(take, with_kwargs=True)


def nest(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """``forward``'s arguments for those of these inputs that IP-Adapters read."""
    embeds = [tensor for name, tensor in tensors.items() if is_embeds(name)]
    if not embeds:
        return {}
    return {"added_cond_kwargs": {IMAGE_EMBEDS: embeds}, SCALE: tensors[SCALE]}


def is_embeds(name: str) -> bool:
    """Whether this input is an adapter's images."""
    return name.startswith(f"{IMAGE_EMBEDS}_")


def _tokens(root: Path) -> int:
    """Of an image, as the pipeline's image encoder gives them: one for each patch, and one for the whole."""
    file = root / "image_encoder" / "config.json"
    if not file.is_file():
        return _CLIP_TOKENS
    sizes = json.loads(file.read_text(encoding="utf-8"))
    return int(sizes.get("image_size", 224) // sizes.get("patch_size", 32)) ** 2 + 1  # CLIP's defaults


def _layers(config: Config) -> list[str]:
    """The names of the UNet's cross-attention processors, in diffusers' order."""
    import diffusers
    import torch

    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(dict(config))
    return _image_layers(unet.attn_processors)


def _image_layers(processors: Mapping[str, Any]) -> list[str]:
    """Those with attention over text; the resampler of a Plus adapter has processors of its own."""
    return [name for name in processors if not name.startswith("encoder_hid_proj") and "attn1" not in name]
