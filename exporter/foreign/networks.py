"""Text encoders and autoencoders from foreign ONNX, and the pipeline index that diffusers needs for them.

optimum writes the encoder and the decoder of an autoencoder to separate folders. It does not export some components,
such as the safety checker, although its index still names them.
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
from .contract import separate_shared_weights, set_contract
from .find import FOREIGN_FILE, ForeignGraph, is_foreign, open_foreign, run

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

AUTOENCODER_HALVES = ("vae_decoder", "vae_encoder")
_OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")
_NETWORKS = ("text_encoder", "text_encoder_2", "vae")


def foreign_networks(source: ModelSource) -> list[str]:
    """Return the components of a pipeline with a foreign UNet that are foreign ONNX too.

    Raises:
        ModelError: a component is neither ONNX nor safetensors.
    """
    if not source.is_pipeline:
        return []
    index = read_index(source.root)
    expected = [name for name in _NETWORKS if (index.get(name) or [None])[0] is not None]
    foreign = [name for name in _NETWORKS if is_foreign(config_folder(source, name))]
    for name in expected:
        folder = config_folder(source, name)
        if name not in foreign and not any(folder.glob("*.safetensors")):
            raise ModelError(f"{source.name} has no {folder.name}/{FOREIGN_FILE}: export it again")
    return foreign


def config_folder(source: ModelSource, component: str) -> Path:
    """Return the folder of a component's config; an autoencoder without a folder has its config with its decoder."""
    folder = source.component(component)
    return source.root / AUTOENCODER_HALVES[0] if component == "vae" and not folder.is_dir() else folder


def pipeline_index(source: ModelSource) -> dict[str, Any]:
    """Return the pipeline's index as diffusers needs it.

    Its classes are those of diffusers and transformers, and components that are missing on disk are None.

    Raises:
        ModelError: the index is not readable, or its pipeline class is not one of diffusers'.
    """
    index = read_index(source.root)
    if not source.onnx:
        return index
    import diffusers

    kind = str(index["_class_name"]).removeprefix("ORT")
    if not hasattr(diffusers, kind):
        raise ModelError(
            f"{source.name} has the pipeline class {index['_class_name']}, which diffusers does not have: "
            "give a directory that optimum-cli export onnx wrote"
        )
    index["_class_name"] = kind
    for half in AUTOENCODER_HALVES:
        index.pop(half, None)
    for name in (*_NETWORKS, "unet"):
        folder = config_folder(source, name)
        if not is_foreign(folder):
            continue
        if name == "unet":
            index[name] = ["diffusers", source.config["_class_name"]]
        elif network_class := exportable(folder):
            index[name] = ["transformers" if network_class in TEXT_ENCODERS else "diffusers", network_class]
    for name in missing_components(source):
        index[name] = [None, None]
        if name == "safety_checker":
            index["requires_safety_checker"] = False
    return index


def missing_components(source: ModelSource) -> list[str]:
    """Return the optional components that a foreign pipeline's index names and that are missing on disk."""
    index = read_index(source.root) if source.is_pipeline and source.onnx else {}
    expected = [name for name in _OPTIONAL if (index.get(name) or [None])[0] is not None]
    return [name for name in expected if not (source.root / name).is_dir()]


def export_foreign_component(source: ModelSource, name: str, out: Path) -> list[ExportedComponent]:
    """Convert a foreign text encoder, or both halves of a foreign autoencoder, to what ``export_component`` writes.

    Args:
        name: component, one of ``foreign_networks``.
        out: directory; each graph gets a subdirectory with the graph's name.

    Raises:
        ModelError: the component's class is unknown, a file is damaged, or half of an autoencoder is missing.
    """
    folder = config_folder(source, name)
    kind = exportable(folder)
    if kind in TEXT_ENCODERS:
        return [_convert_text_encoder(folder, str(kind), name, out)]
    if kind not in AUTOENCODERS:
        supported = ", ".join([*TEXT_ENCODERS, *AUTOENCODERS])
        raise ModelError(f"{source.name} has a {name} that offcut cannot take from ONNX: it takes {supported}")
    for half in AUTOENCODER_HALVES:
        if not is_foreign(source.root / half):
            raise ModelError(f"{source.name} has no {half}/model.onnx, half of its autoencoder: export it again")
    return [_convert_autoencoder_half(source.root / half, out) for half in AUTOENCODER_HALVES]


def _convert_text_encoder(folder: Path, kind: str, name: str, out: Path) -> ExportedComponent:
    import torch
    from safetensors.torch import save as to_bytes

    foreign = open_foreign(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model, pooled = foreign.model, TEXT_ENCODERS[kind]
    width = int(config["hidden_size"])
    _check_names(foreign, ["input_ids"], ["last_hidden_state", pooled])
    separate_shared_weights(model)
    norm = _final_norm(foreign)
    hidden = _hidden_states(foreign, int(config["num_hidden_layers"]))
    dtype = PRECISIONS[foreign.precision]
    tokens = _dims(model.graph.inputs[0], ("batch", "sequence"))
    input_spec = TensorSpec("input_ids", "int64", tokens)
    sizes = input_spec.resolve({"batch": 2, "sequence": int(config["max_position_embeddings"])})
    ids = torch.randint(0, int(config["vocab_size"]), sizes, generator=torch.Generator().manual_seed(0))
    named = {str(value.name): value for value in model.graph.outputs}
    values = {"last_hidden_state": named["last_hidden_state"]}
    values |= {f"hidden_states_{index}": value for index, value in enumerate(hidden)}
    values[pooled] = named[pooled]
    pooled_width = width if pooled == "pooler_output" else int(config["projection_dim"])
    specs = [TensorSpec(key, dtype, (tokens[0], pooled_width) if key == pooled else (*tokens, width)) for key in values]
    foreign_outputs = foreign.compute({"input_ids": ids})
    model.graph.outputs.clear()
    model.graph.outputs.extend(values.values())
    component = _write(foreign, name, [input_spec], specs, out)
    (component.path.parent / NORM_FILE).write_bytes(to_bytes(norm))
    # The foreign graph may not output every hidden state; the reference takes the others from the converted graph.
    reference = run(component.path, {"input_ids": ids})
    for key, output in foreign_outputs.items():
        key = key.replace("hidden_states.", "hidden_states_")
        if key in reference:
            reference[key] = output
    _write_reference({"input_ids": ids, **reference}, component)
    return replace(component, has_norm=True)


def _convert_autoencoder_half(folder: Path, out: Path) -> ExportedComponent:
    import torch

    foreign = open_foreign(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    is_decoder = folder.name == AUTOENCODER_HALVES[0]
    foreign_input, foreign_output = ("latent_sample", "sample") if is_decoder else ("sample", "latent_parameters")
    _check_names(foreign, [foreign_input], [foreign_output])
    dtype, scale = PRECISIONS[foreign.precision], 2 ** (len(config["block_out_channels"]) - 1)
    channels = config["latent_channels"]
    batch, _, *sides = _dims(foreign.model.graph.inputs[0], ("batch", "channels", "height", "width"))
    symbols = [f"{scale}*{side}" if is_decoder else f"{side}/{scale}" for side in sides]
    sizes = [(side * scale if is_decoder else side // scale) if isinstance(side, int) else "" for side in sides]
    output_sides = [size or symbol for size, symbol in zip(sizes, symbols, strict=True)]
    name_in, name_out = ("latent_sample", "image") if is_decoder else ("image", "latent_parameters")
    channels_in = channels if is_decoder else config["in_channels"]
    channels_out = config["out_channels"] if is_decoder else 2 * channels
    input_spec = TensorSpec(name_in, dtype, (batch, channels_in, *sides))
    output_spec = TensorSpec(name_out, dtype, (batch, channels_out, *output_sides))
    multiple = 1 if is_decoder else scale
    shape = input_spec.resolve({"batch": 2, "height": 6 * multiple, "width": 4 * multiple})
    example = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(input_spec.torch_dtype())
    output = foreign.compute({foreign_input: example})[foreign_output]
    foreign.model.graph.inputs[0].name = name_in
    separate_shared_weights(foreign.model)
    component = replace(_write(foreign, folder.name, [input_spec], [output_spec], out), multiple=multiple)
    _write_reference({name_in: example, name_out: output}, component)
    return component


def _write(
    foreign: ForeignGraph, name: str, inputs: list[TensorSpec], outputs: list[TensorSpec], out: Path
) -> ExportedComponent:
    set_contract(foreign.model, inputs, outputs)
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    save(foreign.model, folder / GRAPH_FILE, name)
    return ExportedComponent(
        name, folder / GRAPH_FILE, {spec.name: spec for spec in inputs}, {spec.name: spec for spec in outputs}
    )


def _write_reference(tensors: dict[str, torch.Tensor], component: ExportedComponent) -> None:
    from safetensors.torch import save as to_bytes

    stored = to_bytes({name: tensor.contiguous() for name, tensor in tensors.items()})
    (component.path.parent / REFERENCE_FILE).write_bytes(stored)


def _check_names(foreign: ForeignGraph, inputs: list[str], outputs: list[str]) -> None:
    """Check that a graph has exactly these inputs, and at least these outputs."""
    actual_inputs = [str(value.name) for value in foreign.model.graph.inputs]
    actual_outputs = {str(value.name) for value in foreign.model.graph.outputs}
    if actual_inputs != inputs or not set(outputs) <= actual_outputs:
        raise ModelError(
            f"{foreign.path} has the inputs {', '.join(actual_inputs)} and the outputs "
            f"{', '.join(sorted(actual_outputs))}, not {', '.join(inputs)} and {', '.join(outputs)}: "
            "export it with optimum-cli"
        )


def _dims(value: ir.Value, names: tuple[str, ...]) -> tuple[Any, ...]:
    """Return the dimensions of an input: the size where the file fixes one, otherwise the symbol from ``names``."""
    dims = value.shape.dims if value.shape is not None else (None,) * len(names)
    return tuple(dim if isinstance(dim, int) else name for dim, name in zip(dims, names, strict=True))


def _hidden_states(foreign: ForeignGraph, layers: int) -> list[ir.Value]:
    """Return the input of each layer of a CLIP text encoder, and that of its final norm: ``layers + 1`` tensors.

    SDXL's graphs have these tensors as outputs. In other graphs they are the tensors that the layers' norms read.
    """
    named = {str(value.name): value for value in foreign.model.graph.outputs}
    outputs = [named[name] for index in range(layers + 1) if (name := f"hidden_states.{index}") in named]
    if len(outputs) == layers + 1:
        return outputs
    scopes = [f"encoder/layers.{index}/layer_norm1/" for index in range(layers)] + ["/final_layer_norm/"]
    return [_input_of(foreign, scope) for scope in scopes]


def _input_of(foreign: ForeignGraph, scope: str) -> ir.Value:
    """Return the first tensor that a layer's nodes read and that another layer computes; weights do not count."""
    for node in foreign.model.graph:
        for value in node.inputs if scope in str(node.name) else ():
            producer = value.producer() if value is not None else None
            if value is not None and producer is not None and scope not in str(producer.name) and producer.inputs:
                return value
    raise ModelError(f"{foreign.path} has no node {scope}, whose input is a hidden state: export it with optimum-cli")


def _final_norm(foreign: ForeignGraph) -> dict[str, torch.Tensor]:
    """Return the weights of a text encoder's final norm in fp32."""
    import torch

    weights = {}
    for part in ("weight", "bias"):
        ends = f"final_layer_norm.{part}"
        initializers = foreign.model.graph.initializers
        tensor = next((value.const_value for name, value in initializers.items() if name.endswith(ends)), None)
        if tensor is None:
            raise ModelError(f"{foreign.path} has no {ends}: export it with optimum-cli")
        weights[part] = torch.from_numpy(tensor.numpy().astype("float32"))
    return weights
