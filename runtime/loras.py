"""LoRAs on an open UNet: other weights for all its graphs, without another bundle.

New weights are computed from the built ones each time, so a LoRA that was taken off leaves no trace.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..exporter.lora import TEXT_ENCODERS, Lora, check, from_tensors, merged, read
from .components import EngineComponent

if TYPE_CHECKING:
    import torch

    from ..exporter.trace.parameters import StoredWeights

logger = logging.getLogger(__name__)


class LoraMethods(ABC):
    """The methods of a ``UNet`` that add LoRAs to its weights, by offcut's names and by diffusers'.

    ``pipe.load_lora_weights`` ends here for the UNet's layers; diffusers itself takes those of the text encoders.
    """

    config: Any

    _loras: dict[str, tuple[Lora, float]]
    _stored: Callable[[], StoredWeights] | None

    @abstractmethod
    def _refit(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Give all graphs these weights, by PyTorch's parameter name; the others are as built."""

    @property
    def loras(self) -> dict[str, float]:
        """The LoRAs that are on, by name, with their scales, in the order in which they came."""
        return {name: scale for name, (_, scale) in self._loras.items()}

    def load_lora(self, path: str | Path, scale: float = 1.0, name: str | None = None) -> str:
        """Add a LoRA to the weights of all graphs, beside those that are on already.

        This opens the engines again with other weights, while the old ones are still there: it takes seconds, and the
        memory of both. Layers of a text encoder are left out, with a warning that says so: ``pipe.load_lora_weights``
        takes both kinds.

        Args:
            path: a safetensors file of kohya, diffusers or PEFT, or a directory that one of the latter two wrote.
            scale: how much of it.
            name: to call it by; the file's by default. One of this name that is on is replaced.

        Returns:
            The name.

        Raises:
            ModelError: the file cannot be read, or is for another model. The weights stay as they were.
            EngineError: the engine takes no other weights, or they are rounded. The weights stay as they were.
            BundleError: the bundle was built for deployment, without the weights that a LoRA is added to.
            UserError: a generation is under way.
        """
        lora = read(path, self.config)
        name = name or lora.name
        if left := lora.text_encoder:
            logger.warning(
                "the LoRA %s has %d layers of a text encoder too, which a UNet leaves out: pipe.load_lora_weights "
                "takes both kinds, and offcut build --lora fuses both into a bundle",
                name,
                left,
            )
        self._apply_loras({**self._loras, name: (lora, float(scale))})
        return name

    def set_loras(self, scales: Mapping[str, float]) -> None:
        """Keep just these of the LoRAs that are on, with these scales, in one exchange of the weights.

        Raises:
            UserError: one is not on.
        """
        if unknown := [name for name in scales if name not in self._loras]:
            there = ", ".join(self._loras) or "none"
            raise UserError(f"this UNet has no LoRA {unknown[0]!r}: it has {there}")
        self._apply_loras({name: (self._loras[name][0], float(scale)) for name, scale in scales.items()})

    def unload_lora(self, name: str | None = None) -> None:
        """Take a LoRA off, or all: the other weights are what they were, bit for bit.

        Raises:
            UserError: it is not on.
        """
        if name is None:
            self.set_loras({})
        elif name not in self._loras:
            self.set_loras({name: 0})
        else:
            self.set_loras({other: scale for other, scale in self.loras.items() if other != name})

    def _apply_loras(self, wanted: dict[str, tuple[Lora, float]]) -> None:
        """Exchange the weights, then remember the LoRAs that they have."""
        if not wanted and not self._loras:
            return
        if self._stored is None:
            raise UserError("this UNet was made of bare engines and knows no weights: open it with offcut.UNet.load")
        weights: dict[str, torch.Tensor] = {}
        if wanted:
            stored = self._stored()
            if not stored.shapes:
                raise UserError(
                    "this UNet came as ONNX whose weights do not say which layers they are of, so no LoRA can be "
                    "added to them: build from the model's weights for PyTorch"
                )
            for lora, _ in wanted.values():
                check(lora, stored.shapes)
            for parameter in dict.fromkeys(name for lora, _ in wanted.values() for name in lora.layers):
                terms = [(lora.layers[parameter], scale) for lora, scale in wanted.values() if parameter in lora.layers]
                weights[parameter] = merged(stored.read(parameter), terms)
        self._refit(weights)
        self._loras = wanted

    # As diffusers calls them

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        prefix: str | None = "unet",
        adapter_name: str | None = None,
        network_alphas: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
        _pipeline: Any = None,
        **_: Any,
    ) -> None:
        """What ``pipe.load_lora_weights`` calls, with the tensors of a file, before it goes to the text encoders.

        Raises:
            UserError: it is for a text encoder too, and the pipeline's is in an engine. Nothing was changed.
        """
        if not isinstance(pretrained_model_name_or_path_or_dict, Mapping):
            self.load_lora(pretrained_model_name_or_path_or_dict, name=adapter_name)
            return
        name = adapter_name or f"default_{len(self._loras)}"
        tensors = dict(pretrained_model_name_or_path_or_dict)
        for encoder in TEXT_ENCODERS:
            compiled = isinstance(getattr(_pipeline, encoder, None), EngineComponent)
            if compiled and any(key.startswith(f"{encoder}.") for key in tensors):
                raise UserError(
                    f"the LoRA {name} has layers of a text encoder, and this pipeline's {encoder} is compiled into an "
                    "engine: fuse it with offcut build --compile-all --lora FILE, or take the UNet's layers alone with "
                    "pipe.unet.load_lora"
                )
        if prefix and not any(key.startswith(f"{prefix}.") for key in tensors):
            return  # a text encoder's alone
        lora = from_tensors(name, tensors, network_alphas or {}, metadata or {})
        self._apply_loras({**self._loras, name: (lora, 1.0)})

    def set_adapters(
        self, adapter_names: str | Sequence[str], weights: float | Sequence[float | None] | None = None
    ) -> None:
        """What ``pipe.set_adapters`` calls. Those not named are scaled to zero, as PEFT switches them off."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        given = list(weights) if isinstance(weights, Sequence) else [weights] * len(names)
        if blocks := [value for value in given if isinstance(value, Mapping)]:
            raise UserError(f"a LoRA has one scale on compiled engines, not one for each block: {blocks[0]}")
        scales = {name: 1.0 if scale is None else float(scale) for name, scale in zip(names, given, strict=True)}
        self.set_loras({**dict.fromkeys(self._loras, 0.0), **scales})

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """What ``pipe.delete_adapters`` calls."""
        names = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
        self.set_loras({name: scale for name, scale in self.loras.items() if name not in names})

    @property
    def peft_config(self) -> dict[str, Lora]:
        """By name, as ``pipe.get_list_adapters`` reads them."""
        return {name: lora for name, (lora, _) in self._loras.items()}
