"""``BaseUNet``: base class of the UNet replacements.

It turns the arguments of ``forward`` into the inputs of the engines; its subclasses run the engines.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from ..errors import MissingLayerError
from ..exporter.families import family_of
from ..exporter.ip_adapter import CONFIG_KEY, IMAGE_EMBEDS
from ..exporter.residuals import flatten
from ..exporter.specs import Shape, TensorSpec, solve
from ..exporter.trace.export import SAMPLE
from .cached_model import CachedModel
from .inputs import conditioning_by_name, engine_inputs, has_rows, refuse_unsupported, timestep_shape
from .ip_adapter import BuiltInIPAdapters
from .model import output_class

_LAYERS = (
    "conv_in",
    "time_proj",
    "time_embedding",
    "class_embedding",
    "down_blocks",
    "mid_block",
    "up_blocks",
    "conv_norm_out",
    "conv_out",
)


class BaseUNet(CachedModel):
    """Replacement for a diffusers UNet of ``exporter.families.FAMILIES`` in any pipeline.

    Subclasses run the engines: ``UNet`` runs its own engines, and ``batching.shared_unet.SharedUNet`` runs engines
    that many requests share. Only one thread may use an object at a time.

    Attributes:
        ip_adapters: the IP-Adapters that are built into the engines; None without any.

    Args:
        config: the UNet's config as diffusers wrote it, with ``_class_name``.
        device: device of the engines, with an index if it is a GPU.
        inputs: inputs of the full graph by name.
        cuts: names of the cached features by cut; the first cut is the default.
        engine: the engine's name.
        attention: attention that the UNet was exported with; None for the model's own.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        device: torch.device,
        inputs: Mapping[str, TensorSpec],
        cuts: Mapping[str, tuple[str, ...]],
        engine: str,
        attention: str | None = None,
    ) -> None:
        super().__init__(config, device, inputs, cuts, attention)
        self.ip_adapters: BuiltInIPAdapters | None = None
        self.encoder_hid_proj = None
        if self.config.get(CONFIG_KEY):
            self.ip_adapters = BuiltInIPAdapters(self.config, self._device, self._dtype)
            self.encoder_hid_proj = self.ip_adapters.projections
            self.__dict__.update(self.ip_adapters.blocks(self.config))
        if not {"time_ids", "added_time_ids"}.isdisjoint(inputs):
            # The pipelines of SDXL and Stable Video Diffusion check the width of their conditioning here.
            width = self.config["projection_class_embeddings_input_dim"]
            self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=width))

        self._engine = engine
        self._family = family_of(self.config)
        self._output_class = output_class(self._family)
        self._batched = {name for name, spec in inputs.items() if has_rows(spec, inputs)}

    def __getattr__(self, name: str) -> Any:
        if name in _LAYERS:
            raise MissingLayerError(
                f"the pipeline uses the UNet's {name}, but this UNet's layers are compiled into engines: use an eager "
                "UNet for self-attention guidance, FreeNoise and others that change layers or read from them"
            )
        return super().__getattr__(name)

    @abstractmethod
    def _call(
        self, tensors: Mapping[str, torch.Tensor], timestep: torch.Tensor | float, conditioning: torch.Tensor | None
    ) -> torch.Tensor:
        """Make a call of the present generation, and return the output in the sample's dtype and memory of its own.

        An implementation calls ``_begin``, runs the engines unless the call is skipped, and calls ``_finish``.
        """

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        timestep_cond: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        added_cond_kwargs: Mapping[str, torch.Tensor] | None = None,
        down_block_additional_residuals: Sequence[torch.Tensor] | None = None,
        mid_block_additional_residual: torch.Tensor | None = None,
        down_intrablock_additional_residuals: Sequence[torch.Tensor] | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        return_dict: bool = True,
        added_time_ids: torch.Tensor | None = None,
    ) -> Any:
        """Call the UNet; the parameters are those of diffusers.

        Args:
            sample: [batch, channels, height, width], the noisy latent; for a video [batch, channels, frames, height,
                width], and for Stable Video Diffusion [batch, frames, channels, height, width].
            timestep: a number, or a tensor [], [1] or [batch].
            encoder_hidden_states: [batch, sequence, width]; for AnimateDiff [batch * frames, sequence, width].
            class_labels: [batch].
            timestep_cond: [batch, width].
            added_cond_kwargs: for SDXL ``text_embeds`` [batch, width] and ``time_ids`` [batch, 6]; for IP-Adapters
                ``image_embeds``, a list with [batch, images, width] for each, or [batch, images, tokens, width].
            down_block_additional_residuals: a ControlNet's residuals of the down blocks, for a bundle that was built
                with these inputs. None counts as zero.
            mid_block_additional_residual: a ControlNet's residual of the mid block, likewise.
            down_intrablock_additional_residuals: a T2I-Adapter's residuals, likewise.
            return_dict: whether to return diffusers' output object or a tuple.
            added_time_ids: [batch, 3], for Stable Video Diffusion.

        Returns:
            The noise prediction (or whatever the model predicts): a new tensor in the sample's layout and dtype.

        Raises:
            ShapeError: the engines were not built for these shapes.
            UserError: the engines have no input for an argument, or only an eager UNet supports it.
        """
        self.check_attention(sample.shape[0])
        refuse_unsupported(
            sample,
            cross_attention_kwargs,
            attention_mask=attention_mask,
            encoder_attention_mask=encoder_attention_mask,
        )
        residuals = {
            "down_block_additional_residuals": down_block_additional_residuals,
            "mid_block_additional_residual": mid_block_additional_residual,
            "down_intrablock_additional_residuals": down_intrablock_additional_residuals,
        }
        arguments = {
            "sample": sample,
            "timestep_cond": timestep_cond,
            "added_time_ids": added_time_ids,
            **conditioning_by_name(self._family.positions, encoder_hidden_states, class_labels),
            **(added_cond_kwargs or {}),
            **flatten(residuals),
        }
        if self.ip_adapters is not None:
            arguments |= self.ip_adapters.inputs(added_cond_kwargs or {}) | {IMAGE_EMBEDS: None}
        tensors = engine_inputs(arguments, self._specs, self._device)
        with self._exclusively(), torch.no_grad():
            noise_pred = self._call(tensors, timestep, encoder_hidden_states)
        return self._output_class(sample=noise_pred) if return_dict else (noise_pred,)

    def _shapes(self, tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, Shape], list[str]]:
        """Return the shape of every input of the engines, and the names of the residuals that were not passed."""
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        shapes["timestep"] = timestep_shape(self._specs, tensors[SAMPLE].shape[0])
        not_passed = [name for name in self._specs if name not in shapes]
        if not_passed:
            dims = solve({SAMPLE: self._specs[SAMPLE]}, {SAMPLE: shapes[SAMPLE]})
            shapes |= {name: self._specs[name].resolve(dims) for name in not_passed}
        return shapes, not_passed

    # IP-Adapters

    @property
    def attn_processors(self) -> Mapping[str, Any]:
        """Attention processors, which hold the scales of the IP-Adapters; other processors cannot be replaced."""
        return super().attn_processors if self.ip_adapters is None else self.ip_adapters.processors

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return empty tensors by the names of layers with IP-Adapters; diffusers finds their blocks by these names."""
        return {name: torch.empty(0) for name in self.attn_processors}

    @property
    def engine(self) -> str:
        """The engine's name, e.g. ``"onnxruntime"``."""
        return self._engine

    def extra_repr(self) -> str:
        schedule = "" if self.schedule is None else f", {self.schedule!r}, cut={self.cut!r}"
        return f"{self._engine} on {self._device}, {self._dtype}{schedule}"
