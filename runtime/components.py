"""Text encoders and autoencoders whose networks run in engines, in the places of transformers' and diffusers' own.

They are of the classes that pipelines look for, without any of their layers: tokenizing, scaling, tiling and slicing
stay diffusers' own code.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL

from ..engines.base import EngineOptions, EnginePair
from ..engines.bundle.networks import components_of, engine_for, open_component
from ..errors import UserError
from .bound import BoundPairs

if TYPE_CHECKING:
    from ..engines.bundle.bundle import Bundle

_BOUND = 4  # sets of shapes that buffers are kept for: an image's, and tiles at its edges


class Network(torch.nn.Module):
    """A graph in an engine as a module: tensors in, fresh tensors out, in the dtype of what goes in.

    Args:
        pair: opened without shallow graphs; closed with this.
    """

    def __init__(self, pair: EnginePair) -> None:
        super().__init__()
        self._pair: EnginePair | None = pair
        self._bound = BoundPairs(_BOUND)
        self.engine = pair.name
        self.device = pair.device
        self.dtype = next(iter(pair.outputs.values())).torch_dtype()

    def run(self, *tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        """Every output by name.

        Raises:
            ShapeError: the graph takes no such shapes.
            UserError: it was closed.
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
        (answer,) = self.run(tensor).values()
        return answer.to(tensor.dtype)

    def close(self) -> None:
        """Give back the engine and its memory."""
        self._bound.close()
        if self._pair is not None:
            self._pair.close()
        self._pair = None


class EngineComponent:
    """What a model says of itself whose layers are in engines."""

    network: Network

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """It stays where its engine is, in the precision of its graph; callers' tensors are converted."""
        return self


class _TextEncoder(EngineComponent):
    """The methods of a CLIP text encoder; mixed into transformers' class, which pipelines ask for."""

    config: Any

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **asked: Any) -> Any:
        if attention_mask is not None and not bool(attention_mask.bool().all()):
            raise UserError("this text encoder was compiled without an attention mask: leave the mask out")
        from transformers.modeling_outputs import BaseModelOutputWithPooling
        from transformers.models.clip.modeling_clip import CLIPTextModelOutput

        answers = self.network.run(input_ids)
        hidden = tuple(value for name, value in answers.items() if name.startswith("hidden_states_"))
        shared: dict[str, Any] = {"last_hidden_state": answers["last_hidden_state"]}
        if asked.get("output_hidden_states"):
            shared["hidden_states"] = hidden
        output = (
            CLIPTextModelOutput(text_embeds=answers["text_embeds"], **shared)
            if "text_embeds" in answers
            else BaseModelOutputWithPooling(pooler_output=answers["pooler_output"], **shared)
        )
        return output if asked.get("return_dict", True) is not False else output.to_tuple()


class _Autoencoder(EngineComponent, AutoencoderKL):  # type: ignore[misc]  # diffusers is untyped
    """diffusers' autoencoder around two graphs; each has its quantising convolution in it."""

    def _set(self, encoder: Network, decoder: Network) -> None:
        self.network = decoder
        self.encoder, self.decoder = encoder, decoder
        self.quant_conv, self.post_quant_conv = torch.nn.Identity(), torch.nn.Identity()


def open_components(bundle: Bundle, engine: str, precision: str, options: EngineOptions) -> dict[str, torch.nn.Module]:
    """The bundle's compiled text encoders and autoencoder by the names that the pipeline has for them.

    Args:
        engine, precision: of the UNet that they will stand beside.
    """
    entries = components_of(bundle, precision)
    opener = engine_for(bundle, engine, entries.values())
    networks: dict[str, Network] = {}
    try:
        for name, entry in entries.items():
            networks[name] = Network(open_component(bundle, entry, opener, options))
        made: dict[str, torch.nn.Module] = {
            name: _text_encoder(bundle.path / name, networks[name], bundle.path / str(entry.norm))
            for name, entry in entries.items()
            if entry.norm
        }
        if "vae_decoder" in networks:
            made["vae"] = _autoencoder(bundle.path / "vae", networks["vae_encoder"], networks["vae_decoder"])
    except BaseException:
        for network in networks.values():
            network.close()
        raise
    return made


def _text_encoder(folder: Path, network: Network, norm: Path) -> torch.nn.Module:
    import transformers
    from safetensors.torch import load_file

    config = transformers.CLIPTextConfig.from_pretrained(folder)
    base = getattr(transformers, (config.architectures or ["CLIPTextModel"])[0])
    made: Any = _without_layers(type(base.__name__, (_TextEncoder, base), {"__module__": __name__}))
    made.config = config
    made.network = network
    # Pipelines that skip CLIP's last layers apply its final norm themselves.
    weights: Mapping[str, torch.Tensor] = load_file(norm)
    layer = torch.nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, device=network.device)
    layer.load_state_dict(dict(weights))
    layer.requires_grad_(False)
    made.final_layer_norm = layer
    made.text_model = torch.nn.Module()
    made.text_model.final_layer_norm = layer
    result: torch.nn.Module = made.eval()
    return result


def _autoencoder(folder: Path, encoder: Network, decoder: Network) -> torch.nn.Module:
    config = AutoencoderKL.load_config(folder)
    with torch.device("meta"):
        made: Any = _Autoencoder.from_config(config)
    made._set(encoder, decoder)
    result: torch.nn.Module = made.eval()
    return result


def _without_layers(kind: Any) -> Any:
    made = kind.__new__(kind)
    torch.nn.Module.__init__(made)
    return made
