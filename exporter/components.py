"""Export of the networks around the UNet to ONNX: CLIP text encoders, and the autoencoder's decoder and encoder.

    text_encoder   input_ids [batch, sequence] -> last_hidden_state, hidden_states_0 ..., pooler_output or text_embeds
    vae_decoder    latent_sample [batch, channels, height, width] -> image
    vae_encoder    image [batch, 3, height, width] -> latent_parameters, mean and log-variance of the latent

Each graph has a directory of its own, as in optimum's exports.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelError
from .foreign.find import OPTIMUM_CLASSES
from .load import PRECISIONS
from .specs import TensorSpec, factors
from .trace.convert import quiet, save, to_onnx
from .trace.reference import REFERENCE_FILE
from .weight_files import chosen_variant

if TYPE_CHECKING:
    import torch

GRAPH_FILE = "model.onnx"
NORM_FILE = "final_layer_norm.safetensors"
TEXT_ENCODERS = {"CLIPTextModel": "pooler_output", "CLIPTextModelWithProjection": "text_embeds"}
"""Text encoder classes that can be exported, each with the name of its output for the whole text."""

AUTOENCODERS = ("AutoencoderKL",)


@dataclass(frozen=True)
class ExportedComponent:
    """One network exported to an ONNX file.

    Attributes:
        name: ``text_encoder``, ``text_encoder_2``, ``vae_decoder`` or ``vae_encoder``; also the name of its folder.
        path: the ONNX file, with its weights in the same directory.
        inputs, outputs: specs by name, in the graph's order.
        multiple: number that the input's height and width must be a multiple of.
        has_norm: whether ``NORM_FILE`` in the same directory holds a text encoder's final norm in fp32.
    """

    name: str
    path: Path
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    multiple: int = 1
    has_norm: bool = False


def exportable(folder: Path) -> str | None:
    """Return the class of a pipeline's component if it can be exported, otherwise None."""
    config = folder / "config.json"
    if not config.is_file():
        return None
    settings = json.loads(config.read_text(encoding="utf-8"))
    kind = settings.get("_class_name")
    if kind in (None, "ORTTextEncoder"):
        kind = next(iter(settings.get("architectures") or ()), None)
    kind = OPTIMUM_CLASSES.get(str(kind), kind)
    return kind if kind in TEXT_ENCODERS or kind in AUTOENCODERS else None


@dataclass(frozen=True)
class ComponentNetwork:
    """One network in PyTorch with one input and flat outputs, ready to be exported or compiled.

    Attributes:
        name: as ``ExportedComponent.name``.
        module: the network.
        input: spec of its only input.
        outputs: specs of its outputs, in the module's order.
        multiple: number that the input's height and width must be a multiple of.
        norm: weights of a text encoder's final norm.
    """

    name: str
    module: torch.nn.Module
    input: TensorSpec
    outputs: tuple[TensorSpec, ...]
    multiple: int = 1
    norm: Mapping[str, torch.Tensor] | None = None

    def example(self, dims: Mapping[str, int] | None = None) -> torch.Tensor:
        """Return a reproducible random input of these sizes, by default of the sizes to trace with."""
        import torch

        step = self.multiple
        shape = self.input.resolve({"batch": 2, "height": 6 * step, "width": 4 * step, **(dims or {})})
        generator = torch.Generator().manual_seed(0)
        if self.input.dtype == "int64":
            return torch.randint(0, self.vocabulary, shape, generator=generator)
        return torch.randn(*shape, generator=generator).to(self.input.torch_dtype())

    @property
    def vocabulary(self) -> int:
        """Number of tokens in a text encoder's vocabulary."""
        model: Any = self.module.model
        return int(model.config.vocab_size)

    def compute(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the network in PyTorch, and return its outputs by name."""
        import torch

        with torch.no_grad(), quiet():
            result = self.module(tensor)
        values = result if isinstance(result, tuple) else (result,)
        return {spec.name: value for spec, value in zip(self.outputs, values, strict=True)}

    def symbols(self) -> Callable[[TensorSpec], dict[int, Any]]:
        """Return a function from a spec to PyTorch's symbols for its dynamic axes; equal dimensions share a symbol."""
        import torch

        units = {side: torch.export.Dim(f"_{side}", min=2) for side in ("height", "width")}
        batch = torch.export.Dim("batch", max=63)

        def symbol(dim: str) -> Any:
            parts = factors(dim)
            if parts.symbols == ("batch",):
                return batch
            factor = self.multiple * parts.number // parts.divisor
            unit = units[parts.symbols[0]]
            return unit if factor == 1 else factor * unit

        return lambda spec: {axis: symbol(dim) for axis, dim in enumerate(spec.shape) if isinstance(dim, str)}


def component_of(network: str) -> str:
    """Return the pipeline component that a network belongs to: ``vae`` for both halves of an autoencoder."""
    return "vae" if network.startswith("vae_") else network


def export_component(
    folder: Path, out: Path, *, precision: str, opset: int, variant: str | None = None
) -> list[ExportedComponent]:
    """Export one component of a pipeline: a text encoder, or both halves of an autoencoder.

    Args:
        folder: directory of the component in the pipeline, with the component's name.
        out: directory; each graph gets a subdirectory with the graph's name.
        precision: fp32, fp16 or bf16. An autoencoder with ``force_upcast`` in its config is exported in fp32.
        opset: version of the default ONNX domain.
        variant: variant of the weight files.

    Raises:
        ModelError: the component's class cannot be exported, or the component cannot be loaded.
    """
    return [_write(network, out, opset) for network in component_networks(folder, precision=precision, variant=variant)]


def component_networks(folder: Path, *, precision: str, variant: str | None = None) -> list[ComponentNetwork]:
    """Load the networks of one component in PyTorch; see ``export_component``."""
    kind = exportable(folder)
    if kind is None:
        supported = ", ".join([*TEXT_ENCODERS, *AUTOENCODERS])
        raise ModelError(f"{folder.name} cannot be compiled: offcut exports {supported}")
    if kind in TEXT_ENCODERS:
        return [_text_encoder_network(folder, kind, precision, variant)]
    return _autoencoder_networks(folder, kind, precision, variant)


def load_component(library: Any, folder: Path, kind: str, precision: str, variant: str | None) -> Any:
    """Load a component of a pipeline in PyTorch, in evaluation mode.

    Args:
        library: the module diffusers or transformers.
        kind: name of the component's class in that module.

    Raises:
        ModelError: the component cannot be loaded.
    """
    import torch

    dtype = getattr(torch, PRECISIONS[precision])
    try:
        model = getattr(library, kind).from_pretrained(
            folder,
            torch_dtype=dtype,
            use_safetensors=True,
            variant=chosen_variant(folder, variant),
            local_files_only=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{folder.name} cannot be loaded: {reason}") from error
    return model.eval().requires_grad_(False)


def _text_encoder_network(folder: Path, kind: str, precision: str, variant: str | None) -> ComponentNetwork:
    import torch
    import transformers

    model = load_component(transformers, folder, kind, precision, variant)
    dtype, config = PRECISIONS[precision], model.config
    pooled = TEXT_ENCODERS[kind]

    class FlatTextEncoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
            output = self.model(input_ids, output_hidden_states=True, return_dict=True)
            return (output.last_hidden_state, *output.hidden_states, output[pooled])

    length, width = int(config.max_position_embeddings), int(config.hidden_size)
    hidden = ["last_hidden_state", *(f"hidden_states_{index}" for index in range(config.num_hidden_layers + 1))]
    outputs = [TensorSpec(name, dtype, ("batch", length, width)) for name in hidden]
    outputs.append(TensorSpec(pooled, dtype, ("batch", config.projection_dim if pooled == "text_embeds" else width)))
    final_norm = getattr(model, "text_model", model).final_layer_norm  # transformers 4 has it in text_model
    norm = {name: value.clone() for name, value in final_norm.float().state_dict().items()}
    final_norm.to(getattr(torch, dtype))
    input_ids = TensorSpec("input_ids", "int64", ("batch", length))
    return ComponentNetwork(folder.name, FlatTextEncoder().eval(), input_ids, tuple(outputs), norm=norm)


def _autoencoder_networks(folder: Path, kind: str, precision: str, variant: str | None) -> list[ComponentNetwork]:
    import diffusers
    import torch

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    precision = "fp32" if config.get("force_upcast", True) else precision
    vae = load_component(diffusers, folder, kind, precision, variant)
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
    decoded = TensorSpec("image", dtype, ("batch", vae.config.out_channels, *large))
    encoded = TensorSpec("latent_parameters", dtype, ("batch", 2 * channels, *small))
    latent = TensorSpec("latent_sample", dtype, ("batch", channels, *sides))
    image = TensorSpec("image", dtype, ("batch", vae.config.in_channels, *sides))
    return [
        ComponentNetwork("vae_decoder", Decoder().eval(), latent, (decoded,)),
        ComponentNetwork("vae_encoder", Encoder().eval(), image, (encoded,), multiple=scale),
    ]


def _write(network: ComponentNetwork, out: Path, opset: int) -> ExportedComponent:
    import onnx_ir as ir
    import torch
    from safetensors.torch import save as to_bytes

    example, symbols = network.example(), network.symbols()
    outputs = network.compute(example)
    with torch.no_grad(), quiet():
        dynamic = (symbols(network.input),)
        program = torch.export.export(network.module, (example,), dynamic_shapes=dynamic, strict=False)
    specs = [network.input, *network.outputs]
    model, _ = to_onnx(program, [network.input.name], [spec.name for spec in network.outputs], opset, "model.")
    for node in model.graph:  # shapes of inner values hold the tracer's own symbols
        for value in node.outputs:
            if value.shape is not None and not value.shape.is_static():
                value.shape = None
    for value, spec in zip((*model.graph.inputs, *model.graph.outputs), specs, strict=True):
        value.shape = ir.Shape(spec.shape)
    folder = out / network.name
    folder.mkdir(parents=True, exist_ok=True)
    save(model, folder / GRAPH_FILE, network.name)
    write_component_reference(network, example, outputs, folder / REFERENCE_FILE)
    if network.norm is not None:
        (folder / NORM_FILE).write_bytes(to_bytes(dict(network.norm)))
    return ExportedComponent(
        network.name,
        folder / GRAPH_FILE,
        {network.input.name: network.input},
        {spec.name: spec for spec in network.outputs},
        network.multiple,
        has_norm=network.norm is not None,
    )


def write_component_reference(
    network: ComponentNetwork, example: torch.Tensor, outputs: Mapping[str, torch.Tensor], path: Path
) -> None:
    """Write an input and PyTorch's outputs for it to a file."""
    import torch
    from safetensors.torch import save as to_bytes

    tensors = {network.input.name: example, **outputs}
    path.write_bytes(
        to_bytes({name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()})
    )
