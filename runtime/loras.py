"""LoRAs on an open UNet: new weights for all its graphs, without another bundle.

New weights are computed from the built weights each time, so a LoRA that was unloaded leaves no trace.
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
    """Methods of a ``UNet`` that add LoRAs to its weights, under offcut's names and under diffusers'.

    ``pipe.load_lora_weights`` calls these methods for the UNet's layers; diffusers itself changes the text encoders.
    """

    config: Any

    _loras: dict[str, tuple[Lora, float]]
    _stored: Callable[[], StoredWeights] | None

    @abstractmethod
    def _refit(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Give all graphs these weights, by PyTorch's parameter name; all other weights become those of the build."""

    @property
    def loras(self) -> dict[str, float]:
        """Scales of the loaded LoRAs by name, in the order of loading."""
        return {name: scale for name, (_, scale) in self._loras.items()}

    def load_lora(self, path: str | Path, scale: float = 1.0, name: str | None = None) -> str:
        """Add a LoRA to the weights of all graphs, besides the LoRAs that are loaded already.

        The engines are opened again with new weights while the old engines still exist: this takes seconds, and the
        memory of both. Layers of a text encoder are left out, with a warning: ``pipe.load_lora_weights`` loads both
        kinds.

        Args:
            path: a safetensors file of kohya, diffusers or PEFT, or a directory that diffusers or PEFT wrote.
            scale: factor of the LoRA's change of the weights.
            name: name of the LoRA, by default the file's. A loaded LoRA of this name is replaced.

        Returns:
            The LoRA's name.

        Raises:
            ModelError: the file cannot be read, or is for another model. The weights do not change.
            EngineError: the engine does not accept new weights, or its weights are rounded. The weights do not change.
            BundleError: the bundle was built for deployment, without the weights that a LoRA is added to.
            UserError: a generation is under way.
        """
        lora = read(path, self.config)
        name = name or lora.name
        if layers := lora.text_layer_count:
            logger.warning(
                "the LoRA %s has %d layers of a text encoder too, which were left out: pipe.load_lora_weights "
                "loads both kinds, and offcut build --lora fuses both into a bundle",
                name,
                layers,
            )
        self._apply_loras({**self._loras, name: (lora, float(scale))})
        return name

    def set_loras(self, scales: Mapping[str, float]) -> None:
        """Keep only these of the loaded LoRAs, with these scales; the weights change once.

        Raises:
            UserError: a name is not the name of a loaded LoRA.
        """
        if unknown := [name for name in scales if name not in self._loras]:
            loaded = ", ".join(self._loras) or "none"
            raise UserError(f"this UNet has no LoRA {unknown[0]!r}: it has {loaded}")
        self._apply_loras({name: (self._loras[name][0], float(scale)) for name, scale in scales.items()})

    def unload_lora(self, name: str | None = None) -> None:
        """Remove a LoRA, or all of them; without LoRAs the weights are those of the build, bit for bit.

        Raises:
            UserError: the LoRA is not loaded.
        """
        if name is None:
            self.set_loras({})
        elif name not in self._loras:
            self.set_loras({name: 0})  # raises the error
        else:
            self.set_loras({other: scale for other, scale in self.loras.items() if other != name})

    def _apply_loras(self, loras: dict[str, tuple[Lora, float]]) -> None:
        """Replace the engines' weights by the built weights plus these LoRAs, and record the LoRAs."""
        if not loras and not self._loras:
            return
        if self._stored is None:
            raise UserError("this UNet was made from engines alone, without weights: open it with offcut.UNet.load")
        weights: dict[str, torch.Tensor] = {}
        if loras:
            stored = self._stored()
            if not stored.shapes:
                raise UserError(
                    "this UNet was built from ONNX whose weights do not name their layers, so no LoRA can be added: "
                    "build from the model's weights for PyTorch"
                )
            for lora, _ in loras.values():
                check(lora, stored.shapes)
            for parameter in dict.fromkeys(name for lora, _ in loras.values() for name in lora.layers):
                terms = [(lora.layers[parameter], scale) for lora, scale in loras.values() if parameter in lora.layers]
                weights[parameter] = merged(stored.read(parameter), terms)
        self._refit(weights)
        self._loras = loras

    # Methods that diffusers calls

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
        """Load a LoRA from tensors; ``pipe.load_lora_weights`` calls this before it loads the text encoders' layers.

        Raises:
            UserError: the LoRA has layers of a text encoder that is compiled into an engine. Nothing is changed.
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
            return  # the file has layers of text encoders alone
        lora = from_tensors(name, tensors, network_alphas or {}, metadata or {})
        self._apply_loras({**self._loras, name: (lora, 1.0)})

    def set_adapters(
        self, adapter_names: str | Sequence[str], weights: float | Sequence[float | None] | None = None
    ) -> None:
        """Set scales for ``pipe.set_adapters``; LoRAs that are not named get scale 0, as PEFT switches them off."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        scales_or_none = list(weights) if isinstance(weights, Sequence) else [weights] * len(names)
        if blocks := [value for value in scales_or_none if isinstance(value, Mapping)]:
            raise UserError(f"a LoRA has one scale on compiled engines, not one for each block: {blocks[0]}")
        scales = {
            name: 1.0 if scale is None else float(scale) for name, scale in zip(names, scales_or_none, strict=True)
        }
        self.set_loras({**dict.fromkeys(self._loras, 0.0), **scales})

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Remove LoRAs for ``pipe.delete_adapters``."""
        names = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
        self.set_loras({name: scale for name, scale in self.loras.items() if name not in names})

    @property
    def peft_config(self) -> dict[str, Lora]:
        """Loaded LoRAs by name, which ``pipe.get_list_adapters`` reads."""
        return {name: lora for name, (lora, _) in self._loras.items()}
