"""LoRA files, and the weights that they make of a UNet's own.

A LoRA is a low-rank product for some of a model's layers, to be added to their weights. Files of kohya, of diffusers
and of PEFT are read; diffusers' own converter brings kohya's names into its form.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ..errors import ModelError

if TYPE_CHECKING:
    import torch

    Tensors = Mapping[str, torch.Tensor]

Config = Mapping[str, Any]

_IN_A_DIRECTORY = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
_PEFT_CONFIG = "adapter_config.json"
_METADATA = "lora_adapter_metadata"  # where diffusers keeps what PEFT keeps in its adapter_config.json
# By a part of their keys: products of other kinds, which are no sum of a weight and a low-rank product.
_OTHER_KINDS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "lora_mid": "a Tucker decomposition",
}
_FACTOR = re.compile(
    r"(?P<layer>.+?)(?:_lora|\.lora_linear_layer|\.lora)?[._]"
    r"(?P<factor>down|up|lora_down|lora_up|lora_A|lora_B)(?:\.default)?\.weight"
)
_DOWN = {"down", "lora_down", "lora_A"}
UNET = "unet"
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class LowRank:
    """What a LoRA adds to one weight.

    Attributes:
        down: fp32 [rank, in], or [rank, in, kernel, kernel] of a convolution.
        up: fp32 [out, rank], or [out, rank, 1, 1].
        factor: that the product is multiplied by: alpha over rank, or over its root.
    """

    down: torch.Tensor
    up: torch.Tensor
    factor: float

    @property
    def elements(self) -> int:
        """Of the weight that it is added to."""
        return int(self.up.shape[0] * self.down.numel() // self.down.shape[0])

    def product(self, shape: Sequence[int]) -> torch.Tensor:
        """fp32, in the weight's shape."""
        return (self.up.flatten(1) @ self.down.flatten(1) * self.factor).reshape(tuple(shape))


@dataclass(frozen=True)
class Lora:
    """A LoRA as it was read.

    Attributes:
        name: of the file, without folder and suffix.
        layers: by the parameter's name in the UNet, e.g. ``mid_block.attentions.0.proj_in.weight``.
        text_layers: those of the pipeline's text encoders, by the encoder's name and then by the layer's as diffusers
            has it in LoRAs, e.g. ``text_model.encoder.layers.0.self_attn.to_q``.
    """

    name: str
    layers: Mapping[str, LowRank]
    text_layers: Mapping[str, Mapping[str, LowRank]]

    @property
    def text_encoder(self) -> int:
        """How many layers of the pipeline's text encoders it has too."""
        return sum(len(layers) for layers in self.text_layers.values())


@dataclass(frozen=True)
class ScaledLora:
    """A LoRA file and how much of it is wanted."""

    path: Path
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> ScaledLora:
        """``style.safetensors``, or ``style.safetensors:0.8``.

        Raises:
            ModelError: the scale is no number.
        """
        name, colon, scale = text.rpartition(":")
        if not colon or "/" in scale or "\\" in scale or Path(text).exists():
            return cls(Path(text))
        try:
            return cls(Path(name), float(scale))
        except ValueError as error:
            raise ModelError(f"{scale!r} is no scale of a LoRA: write FILE:0.8") from error


def read(path: str | Path, config: Config) -> Lora:
    """Read a LoRA from a safetensors file, or from a directory that PEFT or diffusers wrote.

    Args:
        config: of the UNet that it is for.

    Raises:
        ModelError: it is missing, damaged, pickled, or of a kind that is no sum of low-rank products.
    """
    file = find(Path(path))
    tensors, header = _tensors(file)
    tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    for part, kind in _OTHER_KINDS.items():
        if any(part in name for name in tensors):
            raise ModelError(f"{file} is {kind}, which offcut cannot add to weights: merge it into the model itself")
    settings = _settings(file, header)
    try:
        named, alphas = _diffusers_names(tensors, config)
        return _lora(file.stem if file.name not in _IN_A_DIRECTORY else file.parent.name, named, alphas, settings)
    except ModelError as error:
        raise ModelError(f"{file} {error}") from error.__cause__


def from_tensors(name: str, tensors: Tensors, alphas: Mapping[str, float], metadata: Mapping[str, Any]) -> Lora:
    """A LoRA of what diffusers' ``lora_state_dict`` gives.

    Args:
        tensors, alphas: under diffusers' names.
        metadata: PEFT's settings, each name behind ``unet.`` or the text encoder's name.

    Raises:
        ModelError: they are no low-rank products for a UNet.
    """
    try:
        return _lora(name, tensors, _by_layer(alphas), _settings_by_part(metadata))
    except ModelError as error:
        raise ModelError(f"the LoRA {name} {error}") from error


def _lora(name: str, tensors: Tensors, alphas: Mapping[str, float], settings: Mapping[str, _Settings]) -> Lora:
    layers: dict[str, LowRank] = {}
    text: dict[str, dict[str, LowRank]] = {}
    for layer, down, up in _pairs(tensors):
        part, _, bare = layer.partition(".")
        if part not in TEXT_ENCODERS:
            part, bare = UNET, layer.removeprefix(f"{UNET}.").replace(".processor", "")
            bare += ".0" if bare.endswith(".to_out") else ""
        factor = settings.get(part, _NO_SETTINGS).factor(bare, down.shape[0], alphas.get(layer))
        low_rank = LowRank(down.float(), up.float(), factor)
        if part == UNET:
            layers[f"{bare}.weight"] = low_rank
        else:
            text.setdefault(part, {})[bare] = low_rank
    if not layers:
        raise ModelError("has no layers of a UNet: give the file of a LoRA for this kind of model")
    return Lora(name, layers, text)


def check(lora: Lora, shapes: Mapping[str, Sequence[int]], model: str = "this UNet") -> None:
    """Hold a LoRA's ``layers`` against the weights of a model.

    Args:
        shapes: of the model's parameters by name.
        model: what to call it.

    Raises:
        ModelError: it was made for another model.
    """
    for name, low_rank in lora.layers.items():
        shape = shapes.get(name)
        if shape is None:
            raise ModelError(
                f"the LoRA {lora.name} is for another model: {model} has no {name.removesuffix('.weight')}"
            )
        size = 1
        for dim in shape:
            size *= dim
        if low_rank.elements != size or low_rank.up.shape[0] != shape[0]:
            raise ModelError(
                f"the LoRA {lora.name} is for another model: its {name.removesuffix('.weight')} is "
                f"{low_rank.up.shape[0]} x {low_rank.elements // low_rank.up.shape[0]}, {model}'s {list(shape)}"
            )


def merged(weight: torch.Tensor, terms: Iterable[tuple[LowRank, float]]) -> torch.Tensor:
    """A weight with scaled low-rank products added in fp32, in its own dtype: one rounding, whatever their number."""
    total = weight.float()
    for low_rank, scale in terms:
        total = total + low_rank.product(weight.shape).to(total.device) * scale
    return total.to(weight.dtype)


def fuse(unet: torch.nn.Module, loras: Sequence[ScaledLora], config: Config) -> None:
    """Add LoRAs to a UNet's weights.

    Raises:
        ModelError: one cannot be read, or is for another model.
    """
    import torch

    parameters = dict(unet.named_parameters())
    read_ones = [(read(each.path, config), each.scale) for each in loras]
    for lora, _ in read_ones:
        check(lora, {name: tuple(value.shape) for name, value in parameters.items()})
    with torch.no_grad():
        for name in dict.fromkeys(name for lora, _ in read_ones for name in lora.layers):
            terms = [(lora.layers[name], scale) for lora, scale in read_ones if name in lora.layers]
            parameters[name].copy_(merged(parameters[name], terms))


def find(path: Path) -> Path:
    """The safetensors file of a LoRA, which a directory may hold.

    Raises:
        ModelError: there is none.
    """
    path = path.expanduser()
    if path.is_dir():
        found = [path / name for name in _IN_A_DIRECTORY if (path / name).is_file()]
        if not found:
            raise ModelError(f"{path} holds no LoRA: it has neither {' nor '.join(_IN_A_DIRECTORY)}")
        return found[0]
    if not path.is_file():
        raise ModelError(f"{path} is not there: give the safetensors file of a LoRA")
    if path.suffix != ".safetensors":
        raise ModelError(f"{path} is no safetensors file, and offcut loads no pickled weights: convert it")
    return path


def _tensors(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is no readable safetensors file: download or save it again") from error


def _diffusers_names(tensors: Tensors, config: Config) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The tensors under diffusers' names, and the alphas by layer."""
    from diffusers.loaders import StableDiffusionXLLoraLoaderMixin

    alphas = {
        name: float(value)
        for name, value in tensors.items()
        if name.endswith(".alpha") and not name.startswith("lora_")
    }
    plain = {name: value for name, value in tensors.items() if name not in alphas}
    unet = SimpleNamespace(layers_per_block=config.get("layers_per_block", 2))
    try:
        named, of_kohya = StableDiffusionXLLoraLoaderMixin.lora_state_dict(plain, unet_config=unet)
    except (ValueError, KeyError) as error:
        raise ModelError(f"has names that no LoRA of Stable Diffusion has: {str(error).split(':')[0]}") from error
    return named, _by_layer({**alphas, **(of_kohya or {})})


def _by_layer(alphas: Mapping[str, float]) -> dict[str, float]:
    """Each is called after its layer, or after one of the layer's tensors."""
    layers = {name.removesuffix(".alpha"): float(alpha) for name, alpha in alphas.items()}
    return {match["layer"] if (match := _FACTOR.fullmatch(name)) else name: alpha for name, alpha in layers.items()}


def _pairs(tensors: Tensors) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Each layer's name with its two factors."""
    halves: dict[str, dict[bool, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = _FACTOR.fullmatch(name)
        if match is None:
            raise ModelError(f"has a tensor {name}, which is no part of a LoRA")
        halves.setdefault(match["layer"], {})[match["factor"] in _DOWN] = tensor
    for layer, both in halves.items():
        if len(both) < 2:
            raise ModelError(f"has half of a product for {layer}: download or save it again")
        if both[True].shape[0] != both[False].shape[1]:
            raise ModelError(f"has two ranks for {layer}: download or save it again")
        yield layer, both[True], both[False]


def _settings(file: Path, header: Mapping[str, str]) -> dict[str, _Settings]:
    """What stands beside a file, or in it, by the part of the pipeline."""
    beside = file.parent / _PEFT_CONFIG
    try:
        if file.name == _IN_A_DIRECTORY[0] and beside.is_file():
            return {UNET: _Settings.of(json.loads(beside.read_text(encoding="utf-8")))}
        return _settings_by_part(json.loads(header.get(_METADATA, "{}")))
    except (ValueError, AttributeError) as error:
        raise ModelError(f"what {file} says of its LoRA is no JSON object: download or save it again") from error


def _settings_by_part(metadata: Mapping[str, Any]) -> dict[str, _Settings]:
    """From names that begin with that of the part."""
    parts: dict[str, dict[str, Any]] = {}
    for name, value in metadata.items():
        part, _, setting = name.partition(".")
        parts.setdefault(part, {})[setting] = value
    return {part: _Settings.of(said) for part, said in parts.items()}


@dataclass(frozen=True)
class _Settings:
    """What PEFT says of a LoRA beside its tensors."""

    alpha: float | None
    alpha_pattern: Mapping[str, float]
    root: bool

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> _Settings:
        return cls(said.get("lora_alpha"), said.get("alpha_pattern") or {}, bool(said.get("use_rslora")))

    def factor(self, layer: str, rank: int, alpha: float | None) -> float:
        """Of the product, for a layer whose own alpha may be in the file; without one it is the rank."""
        if alpha is None:
            ends = (value for name, value in self.alpha_pattern.items() if f".{layer}".endswith(f".{name}"))
            alpha = next(ends, self.alpha)
        if alpha is None:
            return 1.0
        return float(alpha) / (rank**0.5 if self.root else rank)


_NO_SETTINGS = _Settings(None, {}, False)
