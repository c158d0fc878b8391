"""Text encoders and autoencoders whose networks run in engines, in place of transformers' and diffusers' own.

Their classes are those that pipelines expect, without the layers: tokenizing, scaling, tiling and slicing remain
diffusers' own code.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from diffusers import AutoencoderKL

from ..engines.base import EngineOptions, EnginePair
from ..engines.bundle.networks import components_of, engine_for, open_component
from ..errors import UserError
from .bound import BoundPairs

if TYPE_CHECKING:
    from ..engines.bundle.bundle import Bundle

_BOUND_SHAPES = 4  # sets of shapes for which buffers are kept: a whole image, and tiles at its edges


class Network(torch.nn.Module):
    """Module that runs one graph in an engine; its outputs are new tensors in the dtype of the input.

    Args:
        pair: engine pair without shallow graphs; this module closes it.
    """

    def __init__(self, pair: EnginePair) -> None:
        super().__init__()
        self._pair: EnginePair | None = pair
        self._bound = BoundPairs(_BOUND_SHAPES)
        self.engine = pair.name
        self.device = pair.device
        self.dtype = next(iter(pair.outputs.values())).torch_dtype()

    def run(self, *tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the graph, and return every output by name.

        Raises:
            ShapeError: the graph was not built for these shapes.
            UserError: the network was closed.
        """
        if self._pair is None:
            raise UserError("this pipeline's engines were closed: load it again with offcut.load")
        shapes = {name: tuple(tensor.shape) for name, tensor in zip(self._pair.inputs, tensors, strict=True)}
        bound = self._bound.get_or_bind(self._pair, shapes)
        with torch.no_grad():
            for name, tensor in zip(self._pair.inputs, tensors, strict=True):
                bound.buffers[name].copy_(tensor)
            bound.full()
            return {name: bound.buffers[name].clone() for name in self._pair.outputs}

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        (output,) = self.run(tensor).values()
        return output.to(tensor.dtype)

    def close(self) -> None:
        """Close the engine and free its memory."""
        self._bound.close()
        if self._pair is not None:
            self._pair.close()
        self._pair = None


class EngineComponent:
    """Device, dtype and ``to`` of a model whose layers are in an engine."""

    network: Network

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Do nothing: the engine keeps its device and precision, and converts the callers' tensors."""
        return self


class _TextEncoder(EngineComponent):
    """Methods of a CLIP text encoder, mixed into transformers' class, which pipelines expect."""

    config: Any

    def get_input_embeddings(self) -> NoReturn:
        """Refuse textual inversion, which adds rows to the text encoder's table of embeddings.

        Raises:
            UserError: always.
        """
        raise UserError(
            "textual inversion adds embeddings to the text encoder, but this one is compiled into an engine: load it "
            "on a bundle that was built without --compile-all"
        )

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **options: Any) -> Any:
        if attention_mask is not None and not bool(attention_mask.bool().all()):
            raise UserError("this text encoder was compiled without an attention mask: leave the mask out")
        from transformers.modeling_outputs import BaseModelOutputWithPooling
        from transformers.models.clip.modeling_clip import CLIPTextModelOutput

        outputs = self.network.run(input_ids)
        hidden = tuple(value for name, value in outputs.items() if name.startswith("hidden_states_"))
        shared: dict[str, Any] = {"last_hidden_state": outputs["last_hidden_state"]}
        if options.get("output_hidden_states"):
            shared["hidden_states"] = hidden
        output = (
            CLIPTextModelOutput(text_embeds=outputs["text_embeds"], **shared)
            if "text_embeds" in outputs
            else BaseModelOutputWithPooling(pooler_output=outputs["pooler_output"], **shared)
        )
        return output if options.get("return_dict", True) is not False else output.to_tuple()


class _Autoencoder(EngineComponent, AutoencoderKL):  # type: ignore[misc]  # diffusers is untyped
    """diffusers' autoencoder around two graphs, each of which includes its quantising convolution."""

    def use_networks(self, encoder: Network, decoder: Network) -> None:
        self.network = decoder
        self.encoder, self.decoder = encoder, decoder
        self.quant_conv, self.post_quant_conv = torch.nn.Identity(), torch.nn.Identity()


def open_components(
    bundle: Bundle, configs: Path, engine: str, precision: str, options: EngineOptions
) -> dict[str, torch.nn.Module]:
    """Open a bundle's compiled text encoders and autoencoder; return them by their names in the pipeline.

    Args:
        configs: directory with a folder for each component, which holds its config.
        engine, precision: engine and precision of the pipeline's UNet.
    """
    entries = components_of(bundle, precision)
    opener = engine_for(bundle, engine, entries.values())
    networks: dict[str, Network] = {}
    try:
        for name, entry in entries.items():
            networks[name] = Network(open_component(bundle, entry, opener, options))
        components: dict[str, torch.nn.Module] = {
            name: _text_encoder(configs / name, networks[name], bundle.path / str(entry.norm))
            for name, entry in entries.items()
            if entry.norm
        }
        if "vae_decoder" in networks:
            components["vae"] = _autoencoder(configs / "vae", networks["vae_encoder"], networks["vae_decoder"])
    except BaseException:
        for network in networks.values():
            network.close()
        raise
    return components


def _text_encoder(folder: Path, network: Network, norm: Path) -> torch.nn.Module:
    import transformers
    from safetensors.torch import load_file

    config = transformers.CLIPTextConfig.from_pretrained(folder)
    base = getattr(transformers, (config.architectures or ["CLIPTextModel"])[0])
    model: Any = _without_layers(type(base.__name__, (_TextEncoder, base), {"__module__": __name__}))
    model.config = config
    model.network = network
    # Pipelines that skip CLIP's last layers apply its final norm themselves.
    weights: Mapping[str, torch.Tensor] = load_file(norm)
    layer = torch.nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, device=network.device)
    layer.load_state_dict(dict(weights))
    layer.requires_grad_(False)
    model.final_layer_norm = layer
    model.text_model = torch.nn.Module()
    model.text_model.final_layer_norm = layer
    result: torch.nn.Module = model.eval()
    return result


def _autoencoder(folder: Path, encoder: Network, decoder: Network) -> torch.nn.Module:
    config = AutoencoderKL.load_config(folder)
    with torch.device("meta"):
        model: Any = _Autoencoder.from_config(config)
    model.use_networks(encoder, decoder)
    result: torch.nn.Module = model.eval()
    return result


def _without_layers(model_class: Any) -> Any:
    """Return a module of this class whose own constructor has not run, so that it has no layers."""
    model = model_class.__new__(model_class)
    torch.nn.Module.__init__(model)
    return model
