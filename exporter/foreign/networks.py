"""A pipeline's other networks from ONNX files that were made elsewhere, and the pipeline's index made fit for them.

optimum keeps the halves of the autoencoder in folders of their own, and leaves out what it cannot export, such as the
safety checker; its index still names that.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ModelError
from ..components import AUTOENCODERS, GRAPH_FILE, NORM_FILE, TEXT_ENCODERS, ExportedComponent, exportable
from ..load import PRECISIONS, ModelSource, read_index
from ..specs import TensorSpec
from ..trace.convert import save
from ..trace.reference import REFERENCE_FILE
from .contract import name_contract, separate_shared_weights
from .find import ORIGINAL_FILE, Original, made_elsewhere, open_original, run

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

HALVES = ("vae_decoder", "vae_encoder")
_OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")
_NETWORKS = ("text_encoder", "text_encoder_2", "vae")


def networks_of(source: ModelSource) -> list[str]:
    """The components beside an ONNX UNet that are ONNX themselves.

    Raises:
        ModelError: one is neither ONNX nor safetensors.
    """
    if not source.is_pipeline:
        return []
    index = read_index(source.root)
    named = [name for name in _NETWORKS if (index.get(name) or [None])[0] is not None]
    found = [name for name in _NETWORKS if made_elsewhere(folder_of(source, name))]
    for name in named:
        folder = folder_of(source, name)
        if name not in found and not any(folder.glob("*.safetensors")):
            raise ModelError(f"{source.name} has no {folder.name}/{ORIGINAL_FILE}: export it again")
    return found


def folder_of(source: ModelSource, component: str) -> Path:
    """Where a component's config lies: the autoencoder's with its decoder, where it has no folder of its own."""
    own = source.component(component)
    return source.root / HALVES[0] if component == "vae" and not own.is_dir() else own


def index_of(source: ModelSource) -> dict[str, Any]:
    """The pipeline's index as diffusers needs it: classes of diffusers and transformers, and no part that is missing.

    Raises:
        ModelError: there is no readable index, or its pipeline is none of diffusers'.
    """
    index = read_index(source.root)
    if not source.onnx:
        return index
    import diffusers

    kind = str(index["_class_name"]).removeprefix("ORT")
    if not hasattr(diffusers, kind):
        raise ModelError(
            f"{source.name} is of the pipeline {index['_class_name']}, which diffusers does not have: "
            "give a directory that optimum-cli export onnx wrote"
        )
    index["_class_name"] = kind
    for half in HALVES:
        index.pop(half, None)
    for name in (*_NETWORKS, "unet"):
        if made_elsewhere(folder := folder_of(source, name)) and (found := exportable(folder) or name == "unet"):
            index[name] = (
                ["diffusers", source.config["_class_name"]]
                if name == "unet"
                else ["transformers" if found in TEXT_ENCODERS else "diffusers", found]
            )
    for name in left_out(source):
        index[name] = [None, None]
        if name == "safety_checker":
            index["requires_safety_checker"] = False
    return index


def left_out(source: ModelSource) -> list[str]:
    """Optional components that the pipeline's index names, and that optimum does not export."""
    index = read_index(source.root) if source.is_pipeline and source.onnx else {}
    named = [name for name in _OPTIONAL if (index.get(name) or [None])[0] is not None]
    return [name for name in named if not (source.root / name).is_dir()]


def import_component(source: ModelSource, name: str, out: Path) -> list[ExportedComponent]:
    """As ``components.export_component``, from ONNX: a text encoder, or both halves of an autoencoder.

    Args:
        name: of ``networks_of``.
        out: each graph becomes a directory in it, called by the graph's name.

    Raises:
        ModelError: it is of no known class, damaged, or half of it is missing.
    """
    folder = folder_of(source, name)
    kind = exportable(folder)
    if kind in TEXT_ENCODERS:
        return [_import_text_encoder(folder, str(kind), name, out)]
    if kind not in AUTOENCODERS:
        there = ", ".join([*TEXT_ENCODERS, *AUTOENCODERS])
        raise ModelError(f"{source.name} has a {name} that offcut cannot take from ONNX: it takes {there}")
    for half in HALVES:
        if not made_elsewhere(source.root / half):
            raise ModelError(f"{source.name} has no {half}/model.onnx, half of its autoencoder: export it again")
    return [_import_half(source.root / half, out) for half in HALVES]


def _import_text_encoder(folder: Path, kind: str, name: str, out: Path) -> ExportedComponent:
    import torch
    from safetensors.torch import save as to_bytes

    original = open_original(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model, whole = original.model, TEXT_ENCODERS[kind]
    width = int(config["hidden_size"])
    _require(original, ["input_ids"], ["last_hidden_state", whole])
    separate_shared_weights(model)
    norm = _final_norm(original)
    hidden = _hidden_states(original, int(config["num_hidden_layers"]))
    dtype = PRECISIONS[original.precision]
    tokens = _dims(model.graph.inputs[0], ("batch", "sequence"))
    given = TensorSpec("input_ids", "int64", tokens)
    sizes = given.resolve({"batch": 2, "sequence": int(config["max_position_embeddings"])})
    ids = torch.randint(0, int(config["vocab_size"]), sizes, generator=torch.Generator().manual_seed(0))
    named = {str(value.name): value for value in model.graph.outputs}
    wanted = {"last_hidden_state": named["last_hidden_state"]}
    wanted |= {f"hidden_states_{index}": value for index, value in enumerate(hidden)}
    wanted[whole] = named[whole]
    pooled = width if whole == "pooler_output" else int(config["projection_dim"])
    outputs = [TensorSpec(each, dtype, (tokens[0], pooled) if each == whole else (*tokens, width)) for each in wanted]
    answers = original.answers({"input_ids": ids})
    model.graph.outputs.clear()
    model.graph.outputs.extend(wanted.values())
    made = _write(original, name, [given], outputs, out)
    (made.path.parent / NORM_FILE).write_bytes(to_bytes(norm))
    # The original may not hand out every hidden state; those are this graph's own.
    kept = run(made.path, {"input_ids": ids})
    theirs = {each.replace("hidden_states.", "hidden_states_"): answer for each, answer in answers.items()}
    kept |= {each: answer for each, answer in theirs.items() if each in kept}
    _keep({"input_ids": ids, **kept}, made)
    return replace(made, has_norm=True)


def _import_half(folder: Path, out: Path) -> ExportedComponent:
    import torch

    original = open_original(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    decodes = folder.name == HALVES[0]
    given, answer = ("latent_sample", "sample") if decodes else ("sample", "latent_parameters")
    _require(original, [given], [answer])
    dtype, scale = PRECISIONS[original.precision], 2 ** (len(config["block_out_channels"]) - 1)
    channels = config["latent_channels"]
    batch, _, *sides = _dims(original.model.graph.inputs[0], ("batch", "channels", "height", "width"))
    symbols = [f"{scale}*{side}" if decodes else f"{side}/{scale}" for side in sides]
    sizes = [(side * scale if decodes else side // scale) if isinstance(side, int) else "" for side in sides]
    sized = [size or symbol for size, symbol in zip(sizes, symbols, strict=True)]
    name_in, name_out = ("latent_sample", "image") if decodes else ("image", "latent_parameters")
    inner, outer = (channels, config["out_channels"]) if decodes else (config["in_channels"], 2 * channels)
    source_spec = TensorSpec(name_in, dtype, (batch, inner, *sides))
    target_spec = TensorSpec(name_out, dtype, (batch, outer, *sized))
    step = 1 if decodes else scale
    shape = source_spec.resolve({"batch": 2, "height": 6 * step, "width": 4 * step})
    example = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(source_spec.torch_dtype())
    computed = original.answers({given: example})[answer]
    original.model.graph.inputs[0].name = name_in
    separate_shared_weights(original.model)
    made = replace(_write(original, folder.name, [source_spec], [target_spec], out), multiple=step)
    _keep({name_in: example, name_out: computed}, made)
    return made


def _write(
    original: Original, name: str, inputs: list[TensorSpec], outputs: list[TensorSpec], out: Path
) -> ExportedComponent:
    name_contract(original.model, inputs, outputs)
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    save(original.model, folder / GRAPH_FILE, name)
    return ExportedComponent(
        name, folder / GRAPH_FILE, {each.name: each for each in inputs}, {each.name: each for each in outputs}
    )


def _keep(tensors: dict[str, torch.Tensor], made: ExportedComponent) -> None:
    from safetensors.torch import save as to_bytes

    (made.path.parent / REFERENCE_FILE).write_bytes(to_bytes({key: each.contiguous() for key, each in tensors.items()}))


def _require(original: Original, inputs: list[str], outputs: list[str]) -> None:
    given = [str(value.name) for value in original.model.graph.inputs]
    answers = {str(value.name) for value in original.model.graph.outputs}
    if given != inputs or not set(outputs) <= answers:
        raise ModelError(
            f"{original.path} takes {', '.join(given)} and gives {', '.join(sorted(answers))}, not "
            f"{', '.join(inputs)} and {', '.join(outputs)}: export it with optimum-cli"
        )


def _dims(value: ir.Value, names: tuple[str, ...]) -> tuple[Any, ...]:
    """The file's own sizes, where it fixes any, else these symbols."""
    dims = value.shape.dims if value.shape is not None else (None,) * len(names)
    return tuple(dim if isinstance(dim, int) else name for dim, name in zip(dims, names, strict=True))


def _hidden_states(original: Original, layers: int) -> list[ir.Value]:
    """What each layer of a CLIP text encoder takes, and what the final norm takes: ``layers + 1`` tensors.

    Graphs hand them out where their pipeline needs them (SDXL); elsewhere they are what the layers' norms read.
    """
    named = {str(value.name): value for value in original.model.graph.outputs}
    given = [named[name] for index in range(layers + 1) if (name := f"hidden_states.{index}") in named]
    if len(given) == layers + 1:
        return given
    scopes = [f"encoder/layers.{index}/layer_norm1/" for index in range(layers)] + ["/final_layer_norm/"]
    return [_read_by(original, scope) for scope in scopes]


def _read_by(original: Original, scope: str) -> ir.Value:
    """What the nodes of a layer read first that is none of its weights, constants and own values."""
    for node in original.model.graph:
        for value in node.inputs if scope in str(node.name) else ():
            made_by = value.producer() if value is not None else None
            if value is not None and made_by is not None and scope not in str(made_by.name) and made_by.inputs:
                return value
    raise ModelError(f"{original.path} has no node {scope}, before which a hidden state is: export it with optimum-cli")


def _final_norm(original: Original) -> dict[str, torch.Tensor]:
    """The weights of a text encoder's final norm, fp32."""
    import torch

    weights = {}
    for part in ("weight", "bias"):
        ends = f"final_layer_norm.{part}"
        initializers = original.model.graph.initializers
        tensor = next((value.const_value for name, value in initializers.items() if name.endswith(ends)), None)
        if tensor is None:
            raise ModelError(f"{original.path} has no {ends}: export it with optimum-cli")
        weights[part] = torch.from_numpy(tensor.numpy().astype("float32"))
    return weights
