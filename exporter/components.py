"""The networks around the UNet, as ONNX graphs: CLIP text encoders, and the autoencoder's two halves.

    text_encoder   input_ids [batch, sequence] -> last_hidden_state, hidden_states_0 ..., pooler_output or text_embeds
    vae_decoder    latent_sample [batch, channels, height, width] -> image
    vae_encoder    image [batch, 3, height, width] -> latent_parameters, mean and log-variance of the latent

Graphs of their own in directories of their own, as optimum lays them out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelError
from .convert import quiet, save, to_onnx
from .load import PRECISIONS
from .original import OPTIMUMS_NAMES
from .reference import REFERENCE_FILE
from .specs import TensorSpec

if TYPE_CHECKING:
    import torch

GRAPH_FILE = "model.onnx"
NORM_FILE = "final_layer_norm.safetensors"
TEXT_ENCODERS = {"CLIPTextModel": "pooler_output", "CLIPTextModelWithProjection": "text_embeds"}
"""Classes that can be exported, each with its answer for the whole text."""

AUTOENCODERS = ("AutoencoderKL",)


@dataclass(frozen=True)
class ExportedComponent:
    """One network as an ONNX file.

    Attributes:
        name: of its folder: ``text_encoder``, ``text_encoder_2``, ``vae_decoder`` or ``vae_encoder``.
        path: the ONNX file, its weights beside it.
        inputs, outputs: by name, in the graph's order.
        multiple: that the input's height and width are a multiple of.
        has_norm: whether a text encoder's final norm lies beside it, fp32, in ``NORM_FILE``.
    """

    name: str
    path: Path
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    multiple: int = 1
    has_norm: bool = False


def exportable(folder: Path) -> str | None:
    """The class of a pipeline's component, if it is one of those that can be exported."""
    config = folder / "config.json"
    if not config.is_file():
        return None
    said = json.loads(config.read_text(encoding="utf-8"))
    kind = said.get("_class_name")
    if kind in (None, "ORTTextEncoder"):
        kind = next(iter(said.get("architectures") or ()), None)
    kind = OPTIMUMS_NAMES.get(str(kind), kind)
    return kind if kind in TEXT_ENCODERS or kind in AUTOENCODERS else None


def export_component(
    folder: Path, out: Path, *, precision: str, opset: int, variant: str | None = None
) -> list[ExportedComponent]:
    """Export one component of a pipeline: a text encoder, or both halves of an autoencoder.

    Args:
        folder: the component's directory in the pipeline, its name that of the component.
        out: each graph becomes a directory in it, called by the graph's name.
        precision: fp32, fp16 or bf16. An autoencoder whose config says ``force_upcast`` is exported in fp32.
        opset: of the graphs.
        variant: of the weight files.

    Raises:
        ModelError: it is of no class that can be exported, or cannot be loaded.
    """
    kind = exportable(folder)
    if kind is None:
        there = ", ".join([*TEXT_ENCODERS, *AUTOENCODERS])
        raise ModelError(f"{folder.name} cannot be compiled: offcut exports {there}")
    if kind in TEXT_ENCODERS:
        return [_export_text_encoder(folder, kind, out, precision, opset, variant)]
    return _export_autoencoder(folder, kind, out, precision, opset, variant)


def _load(library: Any, folder: Path, kind: str, precision: str, variant: str | None) -> Any:
    import torch

    dtype = getattr(torch, PRECISIONS[precision])
    try:
        model = getattr(library, kind).from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, variant=variant, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{folder.name} cannot be loaded: {reason}") from error
    return model.eval().requires_grad_(False)


def _export_text_encoder(
    folder: Path, kind: str, out: Path, precision: str, opset: int, variant: str | None
) -> ExportedComponent:
    import torch
    import transformers
    from safetensors.torch import save as to_bytes

    model = _load(transformers, folder, kind, precision, variant)
    dtype, length = PRECISIONS[precision], int(model.config.max_position_embeddings)
    whole = TEXT_ENCODERS[kind]

    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
            answer = self.model(input_ids, output_hidden_states=True, return_dict=True)
            return (answer.last_hidden_state, *answer.hidden_states, answer[whole])

    ids = torch.randint(0, int(model.config.vocab_size), (2, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), quiet():
        answers = Flat().eval()(ids)
        dims = ({0: torch.export.Dim("batch", max=63)},)
        program = torch.export.export(Flat().eval(), (ids,), dynamic_shapes=dims, strict=False)
    names = ["last_hidden_state", *(f"hidden_states_{index}" for index in range(len(answers) - 2)), whole]
    outputs = [
        TensorSpec(name, dtype, ("batch", *answer.shape[1:])) for name, answer in zip(names, answers, strict=True)
    ]
    inputs = [TensorSpec("input_ids", "int64", ("batch", length))]
    made = _write(folder.name, program, inputs, outputs, out, opset, (ids, *answers))
    norm = getattr(model, "text_model", model).final_layer_norm.float().state_dict()  # another place in transformers 4
    (made.path.parent / NORM_FILE).write_bytes(to_bytes(norm))
    return replace(made, has_norm=True)


def _export_autoencoder(
    folder: Path, kind: str, out: Path, precision: str, opset: int, variant: str | None
) -> list[ExportedComponent]:
    import diffusers
    import torch

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    precision = "fp32" if config.get("force_upcast", True) else precision
    vae = _load(diffusers, folder, kind, precision, variant)
    dtype, scale = PRECISIONS[precision], 2 ** (len(vae.config.block_out_channels) - 1)
    channels = vae.config.latent_channels

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = vae

        def forward(self, latent: torch.Tensor) -> torch.Tensor:
            post = self.model.post_quant_conv
            image: torch.Tensor = self.model.decoder(latent if post is None else post(latent))
            return image

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = vae

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            moments: torch.Tensor = self.model.encoder(image)
            return moments if self.model.quant_conv is None else self.model.quant_conv(moments)

    sides = ("height", "width")
    large, small = (f"{scale}*height", f"{scale}*width"), (f"height/{scale}", f"width/{scale}")
    halves = (
        (
            "vae_decoder",
            Decoder(),
            1,
            TensorSpec("latent_sample", dtype, ("batch", channels, *sides)),
            TensorSpec("image", dtype, ("batch", vae.config.out_channels, *large)),
        ),
        (
            "vae_encoder",
            Encoder(),
            scale,
            TensorSpec("image", dtype, ("batch", vae.config.in_channels, *sides)),
            TensorSpec("latent_parameters", dtype, ("batch", 2 * channels, *small)),
        ),
    )
    made = []
    for name, module, step, given, answer in halves:
        units = {side: torch.export.Dim(f"_{side}", min=2) for side in sides}
        dims = {0: torch.export.Dim("batch", max=63)}
        dims |= {axis: unit if step == 1 else step * unit for axis, unit in zip((2, 3), units.values(), strict=True)}
        generator = torch.Generator().manual_seed(0)
        example = torch.randn(2, int(given.shape[1]), 6 * step, 4 * step, generator=generator).to(given.torch_dtype())
        with torch.no_grad(), quiet():
            computed = module.eval()(example)
            program = torch.export.export(module.eval(), (example,), dynamic_shapes=(dims,), strict=False)
        made.append(_write(name, program, [given], [answer], out, opset, (example, computed), step))
    return made


def _write(
    name: str,
    program: torch.export.ExportedProgram,
    inputs: list[TensorSpec],
    outputs: list[TensorSpec],
    out: Path,
    opset: int,
    example: tuple[torch.Tensor, ...],
    multiple: int = 1,
) -> ExportedComponent:
    import onnx_ir as ir
    import torch
    from safetensors.torch import save as to_bytes

    model, _ = to_onnx(program, [spec.name for spec in inputs], [spec.name for spec in outputs], opset, "model.")
    for node in model.graph:  # inner shapes hold the tracer's own symbols
        for value in node.outputs:
            if value.shape is not None and not value.shape.is_static():
                value.shape = None
    for value, spec in zip((*model.graph.inputs, *model.graph.outputs), (*inputs, *outputs), strict=True):
        value.shape = ir.Shape(spec.shape)
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    save(model, folder / GRAPH_FILE, name)
    kept = {
        spec.name: value.clone(memory_format=torch.contiguous_format)
        for spec, value in zip((*inputs, *outputs), example, strict=True)
    }
    (folder / REFERENCE_FILE).write_bytes(to_bytes(kept))
    return ExportedComponent(
        name, folder / GRAPH_FILE, {each.name: each for each in inputs}, {each.name: each for each in outputs}, multiple
    )
