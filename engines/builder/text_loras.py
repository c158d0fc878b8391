"""Fusion of a LoRA's text encoder layers into copies of the text encoders, which the bundle then holds.

diffusers does the fusion; ``exporter.lora`` fuses the UNet's layers. A copy differs from its text encoder only in the
weights that a LoRA changes.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import InternalError, ModelError
from ...exporter.components import load_component
from ...exporter.load import ModelSource, read_index
from ...exporter.lora import TEXT_ENCODERS, Lora, LowRank, check, read
from ...exporter.weight_files import component_files

if TYPE_CHECKING:
    import torch

ScaledLoras = Sequence[tuple[Lora, float]]

# Names of attention layers that diffusers uses for text encoders in kohya's LoRAs, and in LoRAs from before PEFT.
_FORMER_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_ROOT = "text_model."  # prefix of CLIP's layers in files and in transformers 4


def fused_text_encoders(source: ModelSource, out: Path, progress: Callable[[str], None]) -> ModelSource:
    """Return the same model with its LoRAs fused into its text encoders, each with its scale.

    Args:
        source: a pipeline.
        out: directory for the fused text encoders, a subdirectory each.

    Raises:
        ModelError: a LoRA cannot be read or is for another text encoder, or peft is missing, which diffusers needs.
    """
    loras = [(read(lora.path, source.config), lora.scale) for lora in source.loras]
    fused = {}
    for name in TEXT_ENCODERS:
        matching = [(lora, scale) for lora, scale in loras if name in lora.text_layers]
        if matching:
            progress(f"fuse {', '.join(lora.name for lora, _ in matching)} into {name}")
            fused[name] = _fused(source, name, matching, out / name)
    return replace(source, components={**source.components, **fused})


def _fused(source: ModelSource, name: str, loras: ScaledLoras, out: Path) -> Path:
    first = loras[0][0].name
    library, kind = read_index(source.root).get(name) or (None, None)
    if library != "transformers" or kind is None:
        raise ModelError(f"the LoRA {first} is for another model: this pipeline has no {name} of transformers")
    if find_spec("peft") is None:
        raise ModelError(
            f"the LoRA {first} has layers of a text encoder, which diffusers fuses with peft: pip install peft"
        )
    import transformers

    folder = source.component(name)
    model = load_component(transformers, folder, kind, "fp32", source.variant)
    shapes = {parameter.removeprefix(_ROOT): tuple(value.shape) for parameter, value in model.named_parameters()}
    for lora, _ in loras:
        layers = {f"{_module(layer)}.weight": low_rank for layer, low_rank in lora.text_layers[name].items()}
        check(replace(lora, layers=layers), shapes, "this text encoder")
    _fuse(model, name, loras)
    changed = {
        parameter.removeprefix(_ROOT).replace(".base_layer", ""): value
        for parameter, value in model.state_dict().items()
        if parameter.endswith(".base_layer.weight")
    }
    _write(folder, source.variant, changed, out)
    return out


def _module(layer: str) -> str:
    """Return the name in the text encoder of a LoRA's layer."""
    head, _, last = layer.removeprefix(_ROOT).rpartition(".")
    return f"{head}.{_FORMER_NAMES.get(last, last)}"


def _fuse(model: Any, name: str, loras: ScaledLoras) -> None:
    from diffusers.loaders import StableDiffusionLoraLoaderMixin
    from diffusers.loaders.lora_base import fuse_text_encoder_lora

    adapters = [f"lora_{index}" for index in range(len(loras))]
    with _quiet():
        for adapter, (lora, scale) in zip(adapters, loras, strict=True):
            tensors = _tensors(lora.text_layers[name], scale, name)
            StableDiffusionLoraLoaderMixin.load_lora_into_text_encoder(
                tensors, None, model, prefix=name, adapter_name=adapter
            )
        fuse_text_encoder_lora(model, adapter_names=adapters)


def _tensors(layers: Mapping[str, LowRank], scale: float, name: str) -> dict[str, torch.Tensor]:
    """Return the tensors that diffusers loads, padded to one rank, with alpha and scale multiplied in.

    diffusers looks up layers with an uncommon rank or alpha by their names in transformers 4, and does not find them in
    transformers 5.
    """
    import torch

    rank = max(low_rank.down.shape[0] for low_rank in layers.values())
    tensors: dict[str, torch.Tensor] = {}
    for layer, low_rank in layers.items():
        padding = rank - low_rank.down.shape[0]
        down = torch.nn.functional.pad(low_rank.down, (0, 0, 0, padding))
        up = torch.nn.functional.pad(low_rank.up, (0, padding)) * (low_rank.factor * scale)
        head, _, last = layer.rpartition(".")
        stem = f"{name}.{head}.{_FORMER_NAMES.get(last, last)}.lora_linear_layer"
        tensors |= {f"{stem}.down.weight": down, f"{stem}.up.weight": up}
    return tensors


def _write(folder: Path, variant: str | None, changed: Mapping[str, torch.Tensor], out: Path) -> None:
    """Write the text encoder's files with the changed weights."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    out.mkdir(parents=True)
    written: set[str] = set()
    for file in component_files(folder, variant):
        if file.suffix != ".safetensors":
            shutil.copyfile(file, out / file.name)
            continue
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            header = opened.metadata()
        for key, value in tensors.items():
            if (name := key.removeprefix(_ROOT)) in changed:
                tensors[key] = changed[name].to(value.dtype).contiguous()
                written.add(name)
        save_file(tensors, out / file.name, header)
    if missing := changed.keys() - written:
        raise InternalError(f"the files of {folder.name} have no {sorted(missing)[0]}, which a LoRA changed")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings of diffusers and transformers that an adapter lacks tensors of the whole model."""
    import diffusers
    import transformers

    with ExitStack() as undo, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for library in (diffusers, transformers):
            log = library.utils.logging
            undo.callback(log.set_verbosity, log.get_verbosity())
            log.set_verbosity_error()
        yield
