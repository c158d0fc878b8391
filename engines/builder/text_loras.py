"""A LoRA's layers for text encoders, fused by diffusers into copies of the encoders, which a bundle then carries.

The UNet's layers are ``exporter.lora``'s. Only the weights that a LoRA changes are others in the copies.
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
from ..bundle.pipeline_files import small_files, weight_files

if TYPE_CHECKING:
    import torch

Wanted = Sequence[tuple[Lora, float]]

# What diffusers calls the attention layers of text encoders in LoRAs of kohya and in those from before it took PEFT.
_FORMER_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_ROOT = "text_model."  # of all of CLIP's layers in files and in transformers 4


def fused_text_encoders(source: ModelSource, out: Path, progress: Callable[[str], None]) -> ModelSource:
    """The same model with text encoders that its LoRAs are fused into, each with its scale.

    Args:
        source: a pipeline.
        out: each text encoder that a LoRA has layers for becomes a directory in it.

    Raises:
        ModelError: a LoRA cannot be read or is for another text encoder, or peft is missing, which diffusers needs.
    """
    loras = [(read(each.path, source.config), each.scale) for each in source.loras]
    parts = {}
    for name in TEXT_ENCODERS:
        wanted = [(lora, scale) for lora, scale in loras if name in lora.text_layers]
        if wanted:
            progress(f"fuse {', '.join(lora.name for lora, _ in wanted)} into {name}")
            parts[name] = _fused(source, name, wanted, out / name)
    return replace(source, components={**source.components, **parts})


def _fused(source: ModelSource, name: str, wanted: Wanted, out: Path) -> Path:
    first = wanted[0][0].name
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
    for lora, _ in wanted:
        layers = {f"{_module(layer)}.weight": low_rank for layer, low_rank in lora.text_layers[name].items()}
        check(replace(lora, layers=layers), shapes, "this text encoder")
    _fuse(model, name, wanted)
    changed = {
        parameter.removeprefix(_ROOT).replace(".base_layer", ""): value
        for parameter, value in model.state_dict().items()
        if parameter.endswith(".base_layer.weight")
    }
    _write(folder, source.variant, changed, out)
    return out


def _module(layer: str) -> str:
    """What a layer of a LoRA is called in the text encoder."""
    head, _, last = layer.removeprefix(_ROOT).rpartition(".")
    return f"{head}.{_FORMER_NAMES.get(last, last)}"


def _fuse(model: Any, name: str, wanted: Wanted) -> None:
    from diffusers.loaders import StableDiffusionLoraLoaderMixin
    from diffusers.loaders.lora_base import fuse_text_encoder_lora

    adapters = [f"lora_{index}" for index in range(len(wanted))]
    with _quiet():
        for adapter, (lora, scale) in zip(adapters, wanted, strict=True):
            tensors = _tensors(lora.text_layers[name], scale, name)
            StableDiffusionLoraLoaderMixin.load_lora_into_text_encoder(
                tensors, None, model, prefix=name, adapter_name=adapter
            )
        fuse_text_encoder_lora(model, adapter_names=adapters)


def _tensors(layers: Mapping[str, LowRank], scale: float, name: str) -> dict[str, torch.Tensor]:
    """For diffusers: all of one rank, and alpha and scale in the tensors already.

    diffusers looks for the layers whose rank or alpha differs from most others' under the names that they had in
    transformers 4, and does not find them in transformers 5.
    """
    import torch

    rank = max(low_rank.down.shape[0] for low_rank in layers.values())
    tensors: dict[str, torch.Tensor] = {}
    for layer, low_rank in layers.items():
        missing = rank - low_rank.down.shape[0]
        down = torch.nn.functional.pad(low_rank.down, (0, 0, 0, missing))
        up = torch.nn.functional.pad(low_rank.up, (0, missing)) * (low_rank.factor * scale)
        head, _, last = layer.rpartition(".")
        stem = f"{name}.{head}.{_FORMER_NAMES.get(last, last)}.lora_linear_layer"
        tensors |= {f"{stem}.down.weight": down, f"{stem}.up.weight": up}
    return tensors


def _write(folder: Path, variant: str | None, changed: Mapping[str, torch.Tensor], out: Path) -> None:
    """The text encoder's files with these weights in place of its own."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    out.mkdir(parents=True)
    for file in small_files(folder):
        shutil.copyfile(file, out / file.name)
    written: set[str] = set()
    for file in weight_files(folder, variant):
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            header = opened.metadata()
        for key, value in tensors.items():
            if (bare := key.removeprefix(_ROOT)) in changed:
                tensors[key] = changed[bare].to(value.dtype).contiguous()
                written.add(bare)
        save_file(tensors, out / file.name, header)
    if lost := changed.keys() - written:
        raise InternalError(f"the files of {folder.name} have no {sorted(lost)[0]}, which a LoRA changed")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep both libraries from telling that an adapter's tensors are not a whole model's."""
    import diffusers
    import transformers

    with ExitStack() as undo, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for library in (diffusers, transformers):
            said = library.utils.logging
            undo.callback(said.set_verbosity, said.get_verbosity())
            said.set_verbosity_error()
        yield
