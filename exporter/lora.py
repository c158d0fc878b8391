"""LoRA files: reading them, and adding them to a UNet's weights.

A LoRA holds low-rank products that are added to the weights of some layers. Files from kohya, diffusers and PEFT are
supported; diffusers' converter translates the names in kohya's files.
"""

from __future__ import annotations

import json
import math
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

_DIRECTORY_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
_PEFT_CONFIG = "adapter_config.json"
_METADATA = "lora_adapter_metadata"  # diffusers' key for the content of PEFT's adapter_config.json
# Kinds of adapters that do not add a low-rank product to a weight, by a part of their keys.
_OTHER_KINDS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "lora_mid": "a Tucker decomposition",
}
# PEFT's settings that make a LoRA compute something else than a product that is added to a weight.
_OTHER_SETTINGS = {
    "use_dora": "DoRA",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "a block-diagonal LoRA",
    "alora_invocation_tokens": "an activated LoRA",
    "arrow_config": "an Arrow router",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
# Values of PEFT's init_lora_weights that subtract the initial product from the model's weights.
_CHANGING_INITIALIZATIONS = ("pissa", "corda", "olora", "loftq", "lora_ga")
_DEFAULT_ALPHA = 8  # of PEFT's LoraConfig
_FACTOR = re.compile(
    r"(?P<layer>.+?)(?:_lora|\.lora_linear_layer|\.lora)?[._]"
    r"(?P<factor>down|up|lora_down|lora_up|lora_A|lora_B)(?:\.default)?\.weight"
)
_DOWN = {"down", "lora_down", "lora_A"}
UNET = "unet"
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class LowRank:
    """A low-rank product that a LoRA adds to one weight.

    Attributes:
        down: fp32 [rank, in], or [rank, in, kernel, kernel] of a convolution.
        up: fp32 [out, rank], or [out, rank, 1, 1].
        factor: scale of the product: alpha divided by the rank or by its square root.
    """

    down: torch.Tensor
    up: torch.Tensor
    factor: float

    @property
    def elements(self) -> int:
        """Number of elements of the weight."""
        return int(self.up.shape[0] * self.down.numel() // self.down.shape[0])

    def product(self, shape: Sequence[int]) -> torch.Tensor:
        """Return the scaled product, fp32 in the weight's shape."""
        return (self.up.flatten(1) @ self.down.flatten(1) * self.factor).reshape(tuple(shape))


@dataclass(frozen=True)
class Lora:
    """A LoRA in memory.

    Attributes:
        name: name of the file, without folder and suffix.
        layers: products by the parameter's name in the UNet, e.g. ``mid_block.attentions.0.proj_in.weight``.
        text_layers: products for the pipeline's text encoders, by the encoder's name and then by diffusers' name of the
            layer in LoRAs, e.g. ``text_model.encoder.layers.0.self_attn.to_q``.
    """

    name: str
    layers: Mapping[str, LowRank]
    text_layers: Mapping[str, Mapping[str, LowRank]]

    @property
    def text_layer_count(self) -> int:
        """Number of products for layers of the pipeline's text encoders."""
        return sum(len(layers) for layers in self.text_layers.values())


@dataclass(frozen=True)
class ScaledLora:
    """A LoRA file and the scale to apply it with."""

    path: Path
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> ScaledLora:
        """Return the LoRA that a text such as ``style.safetensors`` or ``style.safetensors:0.8`` describes.

        Raises:
            ModelError: the scale is not a number.
        """
        name, colon, scale = text.rpartition(":")
        if not colon or "/" in scale or "\\" in scale or Path(text).exists():
            return cls(Path(text))
        try:
            return cls(Path(name), float(scale))
        except ValueError as error:
            raise ModelError(f"{scale!r} is not a scale of a LoRA: write FILE:0.8") from error


def read(path: str | Path, config: Config) -> Lora:
    """Read a LoRA from a safetensors file, or from a directory that PEFT or diffusers wrote.

    Args:
        config: config of the UNet that the LoRA is for.

    Raises:
        ModelError: the file is missing, damaged, pickled, or holds another kind of adapter.
    """
    file = find(Path(path))
    tensors, header = _tensors(file)
    tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    try:
        _refuse_other_kinds(tensors)
        settings = _settings(file, header)
        named, alphas = _diffusers_names(tensors, config)
        return _lora(file.stem if file.name not in _DIRECTORY_FILES else file.parent.name, named, alphas, settings)
    except ModelError as error:
        raise ModelError(f"{file} {error}") from error.__cause__


def from_tensors(name: str, tensors: Tensors, alphas: Mapping[str, float], metadata: Mapping[str, Any]) -> Lora:
    """Return a LoRA from the results of diffusers' ``lora_state_dict``.

    Args:
        tensors, alphas: under diffusers' names.
        metadata: PEFT's settings, each with the prefix ``unet.`` or the text encoder's name.

    Raises:
        ModelError: the tensors are not low-rank products for a UNet.
    """
    try:
        _refuse_other_kinds(tensors)
        return _lora(name, tensors, _by_layer(alphas), _settings_by_part(metadata))
    except ModelError as error:
        raise ModelError(f"the LoRA {name} {error}") from error


def _refuse_other_kinds(names: Iterable[str]) -> None:
    """Raise a ``ModelError`` for tensors of an adapter that is not a LoRA."""
    for part, kind in _OTHER_KINDS.items():
        if any(part in name for name in names):
            raise ModelError(f"is {kind}, which offcut cannot add to weights: merge it into the model itself")


def _lora(name: str, tensors: Tensors, alphas: Mapping[str, float], settings: Mapping[str, _Settings]) -> Lora:
    """Return a LoRA from tensors under diffusers' names. Messages start with a verb; callers add the file's name."""
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
    """Check that a LoRA's ``layers`` fit the weights of a model.

    Args:
        shapes: shapes of the model's parameters by name.
        model: name of the model in the message.

    Raises:
        ModelError: the LoRA was made for another model.
    """
    for name, low_rank in lora.layers.items():
        shape = shapes.get(name)
        if shape is None:
            raise ModelError(
                f"the LoRA {lora.name} is for another model: {model} has no {name.removesuffix('.weight')}"
            )
        if low_rank.elements != math.prod(shape) or low_rank.up.shape[0] != shape[0]:
            raise ModelError(
                f"the LoRA {lora.name} is for another model: its {name.removesuffix('.weight')} is "
                f"{low_rank.up.shape[0]} x {low_rank.elements // low_rank.up.shape[0]}, but {model} has {list(shape)}"
            )


def merged(weight: torch.Tensor, terms: Iterable[tuple[LowRank, float]]) -> torch.Tensor:
    """Return a weight plus scaled low-rank products, added in fp32 and rounded once to the weight's dtype."""
    total = weight.float()
    for low_rank, scale in terms:
        total = total + low_rank.product(weight.shape).to(total.device) * scale
    return total.to(weight.dtype)


def fuse(unet: torch.nn.Module, loras: Sequence[ScaledLora], config: Config) -> None:
    """Add LoRAs to the weights of a UNet in memory.

    Raises:
        ModelError: a LoRA cannot be read, or is for another model.
    """
    import torch

    parameters = dict(unet.named_parameters())
    scaled = [(read(lora.path, config), lora.scale) for lora in loras]
    for lora, _ in scaled:
        check(lora, {name: tuple(value.shape) for name, value in parameters.items()})
    with torch.no_grad():
        for name in dict.fromkeys(name for lora, _ in scaled for name in lora.layers):
            terms = [(lora.layers[name], scale) for lora, scale in scaled if name in lora.layers]
            parameters[name].copy_(merged(parameters[name], terms))


def find(path: Path) -> Path:
    """Return the safetensors file of a LoRA from its path or its directory.

    Raises:
        ModelError: the path has no such file.
    """
    path = path.expanduser()
    if path.is_dir():
        files = [path / name for name in _DIRECTORY_FILES if (path / name).is_file()]
        if not files:
            raise ModelError(f"{path} holds no LoRA: it has neither {' nor '.join(_DIRECTORY_FILES)}")
        return files[0]
    if not path.is_file():
        raise ModelError(f"{path} is not there: give the safetensors file of a LoRA")
    if path.suffix != ".safetensors":
        raise ModelError(f"{path} is not a safetensors file, and offcut loads no pickled weights: convert it")
    return path


def _tensors(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is not a readable safetensors file: download or save it again") from error


def _diffusers_names(tensors: Tensors, config: Config) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Return the tensors under diffusers' names, and the alphas by layer."""
    from diffusers.loaders import StableDiffusionXLLoraLoaderMixin

    alphas = {
        name: float(value)
        for name, value in tensors.items()
        if name.endswith(".alpha") and not name.startswith("lora_")
    }
    factors = {name: value for name, value in tensors.items() if name not in alphas}
    unet = SimpleNamespace(layers_per_block=config.get("layers_per_block", 2))
    try:
        named, kohya_alphas = StableDiffusionXLLoraLoaderMixin.lora_state_dict(factors, unet_config=unet)
    except (ValueError, KeyError) as error:
        raise ModelError(f"has names that no LoRA of Stable Diffusion has: {str(error).split(':')[0]}") from error
    return named, _by_layer({**alphas, **(kohya_alphas or {})})


def _by_layer(alphas: Mapping[str, float]) -> dict[str, float]:
    """Return alphas by layer; the keys are names of a layer or of one of its tensors."""
    layers = {name.removesuffix(".alpha"): float(alpha) for name, alpha in alphas.items()}
    return {match["layer"] if (match := _FACTOR.fullmatch(name)) else name: alpha for name, alpha in layers.items()}


def _pairs(tensors: Tensors) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield the name of each layer with its two factors, down and up."""
    halves: dict[str, dict[bool, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = _FACTOR.fullmatch(name)
        if match is None:
            raise ModelError(f"has a tensor {name}, which is not part of a LoRA")
        halves.setdefault(match["layer"], {})[match["factor"] in _DOWN] = tensor
    for layer, both in halves.items():
        if len(both) < 2:
            raise ModelError(f"has half of a product for {layer}: download or save it again")
        if both[True].shape[0] != both[False].shape[1]:
            raise ModelError(f"has two ranks for {layer}: download or save it again")
        yield layer, both[True], both[False]


def _settings(file: Path, header: Mapping[str, str]) -> dict[str, _Settings]:
    """Return PEFT's settings from the file's header or a config next to the file, by the pipeline's component."""
    config_file = file.parent / _PEFT_CONFIG
    try:
        if file.name == _DIRECTORY_FILES[0] and config_file.is_file():
            return {UNET: _Settings.from_peft(json.loads(config_file.read_text(encoding="utf-8")))}
        return _settings_by_part(json.loads(header.get(_METADATA, "{}")))
    except (ValueError, AttributeError) as error:
        raise ModelError("has settings that are not a JSON object: download or save it again") from error


def _settings_by_part(metadata: Mapping[str, Any]) -> dict[str, _Settings]:
    """Return the PEFT settings of each component, read from keys that start with the component's name."""
    parts: dict[str, dict[str, Any]] = {}
    for name, value in metadata.items():
        part, _, setting = name.partition(".")
        parts.setdefault(part, {})[setting] = value
    return {part: _Settings.from_peft(values) for part, values in parts.items()}


@dataclass(frozen=True)
class _Settings:
    """PEFT's settings of a LoRA, with PEFT's defaults.

    Attributes:
        alpha: alpha of layers that no key of ``alpha_pattern`` matches; None without settings.
        alpha_pattern: alphas by a regular expression; the first that matches the end of a layer's name counts, from the
            start of a part of the name (``peft.utils.other.get_pattern_key``).
        rank_stabilized: whether alpha is divided by the rank's square root instead of the rank (rsLoRA).
    """

    alpha: float | None
    alpha_pattern: Mapping[str, float]
    rank_stabilized: bool

    @classmethod
    def from_peft(cls, values: Mapping[str, Any]) -> _Settings:
        """Check PEFT's settings, and return those that decide the scale of the products.

        Raises:
            ModelError: the adapter is not a LoRA, or its training began from changed weights of the model.
        """
        initialization = values.get("init_lora_weights")
        kinds = [_OTHER_SETTINGS[name] for name in _OTHER_SETTINGS if values.get(name)]
        peft_type = str(values.get("peft_type") or "LORA").rpartition(".")[2]
        if peft_type != "LORA":
            kinds.append(peft_type)
        if kinds:
            raise ModelError(f"is {kinds[0]}, which offcut cannot add to weights: merge it into the model itself")
        if isinstance(initialization, str) and initialization.lower().startswith(_CHANGING_INITIALIZATIONS):
            raise ModelError(
                f"was trained with init_lora_weights={initialization!r}, which changes the model's weights: save it "
                "with path_initial_model_for_weight_conversion, which PEFT's save_pretrained takes"
            )
        patterns = values.get("alpha_pattern") or {}
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ModelError(f"has an alpha_pattern that is not a regular expression: {pattern!r}") from error
        return cls(values.get("lora_alpha", _DEFAULT_ALPHA), patterns, bool(values.get("use_rslora")))

    def factor(self, layer: str, rank: int, alpha: float | None) -> float:
        """Return the scale of a layer's product. ``alpha`` is the layer's own, if the file has it."""
        if alpha is None:
            patterns = self.alpha_pattern.items()
            matches = (value for pattern, value in patterns if re.match(rf"(.*\.)?({pattern})$", layer))
            alpha = next(matches, self.alpha)
        if alpha is None:
            return 1.0
        return float(alpha) / (rank**0.5 if self.rank_stabilized else rank)


_NO_SETTINGS = _Settings(None, {}, False)
