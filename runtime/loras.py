"""LoRAs on an open UNet: new weights for all its graphs, without another bundle.

New weights are computed from the built weights each time, so a LoRA that was unloaded leaves no trace.
"""

from __future__ import annotations

import functools
import logging
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UserError
from ..exporter.lora import TEXT_ENCODERS, Lora, LowRank, check, from_tensors, merged, read
from .components import EngineComponent

if TYPE_CHECKING:
    from ..exporter.trace.parameters import StoredWeights

logger = logging.getLogger(__name__)

Terms = dict[str, list[tuple[LowRank, float]]]
"""Products with their scales, by the parameter that they are added to."""


@dataclass(frozen=True)
class LoraSet:
    """The LoRAs of a UNet, and which of them are active at which scale, as PEFT keeps them for a UNet's layers.

    Attributes:
        loras: LoRAs by name, in the order of loading.
        scales: scale of each LoRA; an inactive one keeps its scale.
        active: names of the active LoRAs, also of those that have layers in a text encoder alone. None after the last
            active LoRA was deleted: in each layer, the first remaining LoRA by name is then active.
        enabled: whether the active LoRAs have an effect.
    """

    loras: Mapping[str, Lora] = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)
    active: tuple[str, ...] | None = ()
    enabled: bool = True

    def active_in(self, parameter: str) -> list[str]:
        """Return the names of the LoRAs that are active in the layer of a parameter."""
        names = [name for name, lora in self.loras.items() if parameter in lora.layers]
        return sorted(names)[:1] if self.active is None else [name for name in self.active if name in names]

    @property
    def active_names(self) -> list[str]:
        """Names of the LoRAs that are active in any layer, whether LoRAs are enabled or not."""
        if self.active is not None:
            return [name for name in self.active if name in self.loras]
        parameters = {parameter for lora in self.loras.values() for parameter in lora.layers}
        active = {name for parameter in parameters for name in self.active_in(parameter)}
        return [name for name in self.loras if name in active]

    def terms(self) -> Terms:
        """Return the products that the active LoRAs add to the weights."""
        if not self.enabled:
            return {}
        parameters = dict.fromkeys(parameter for lora in self.loras.values() for parameter in lora.layers)
        terms = {
            parameter: [
                (self.loras[name].layers[parameter], self.scales[name])
                for name in self.active_in(parameter)
                if self.scales[name]
            ]
            for parameter in parameters
        }
        return {parameter: products for parameter, products in terms.items() if products}

    def loaded(self, lora: Lora, name: str, scale: float, active: Sequence[str]) -> LoraSet:
        """Return the set with one more LoRA, or with another in place of the one of this name.

        Raises:
            UserError: LoRAs are disabled; in PEFT the new one would then be enabled in some layers only.
        """
        if not self.enabled:
            raise UserError("LoRAs are disabled on this UNet: call enable_lora before another one is loaded")
        return LoraSet({**self.loras, name: lora}, {**self.scales, name: scale}, tuple(active))

    def activated(self, scales: Mapping[str, float]) -> LoraSet:
        """Return the set with these LoRAs active, at these scales; names of LoRAs that are not in it have no effect."""
        return replace(self, scales={**self.scales, **scales}, active=tuple(scales))

    def kept(self, names: Collection[str], active: tuple[str, ...] | None) -> LoraSet:
        """Return the set with only these LoRAs, and these active; an empty set is enabled."""
        loras = {name: lora for name, lora in self.loras.items() if name in names}
        scales = {name: scale for name, scale in self.scales.items() if name in names}
        return LoraSet(loras, scales, active, self.enabled) if loras else LoraSet()

    def deleted(self, names: Collection[str]) -> LoraSet:
        """Return the set without these LoRAs; PEFT activates others where no active LoRA remains."""
        active = self.active
        if active is not None and not set(names).isdisjoint(active):
            active = tuple(name for name in active if name not in names) or None
        return self.kept(set(self.loras).difference(names), active)


class LoraMethods(ABC):
    """Methods of a ``UNet`` that add LoRAs to its weights, under offcut's names and under diffusers'.

    ``pipe.load_lora_weights`` calls these methods for the UNet's layers; diffusers itself changes the text encoders.
    """

    config: Any

    _loras: LoraSet
    _stored: Callable[[], StoredWeights] | None

    @abstractmethod
    def _refit(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Give all graphs these weights, by PyTorch's parameter name; all other weights become those of the build."""

    @property
    def loras(self) -> dict[str, float]:
        """Scales of the loaded LoRAs by name, in the order of loading; 0 for a LoRA without effect."""
        active = self._loras.active_names if self._loras.enabled else []
        return {name: self._loras.scales[name] if name in active else 0.0 for name in self._loras.loras}

    @property
    def lora_set(self) -> LoraSet:
        """The loaded LoRAs, for another UNet's ``apply_loras``."""
        return self._loras

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
        active = [other for other in self._loras.active_names if other != name]
        self.apply_loras(self._loras.loaded(lora, name, float(scale), [*active, name]))
        return name

    def set_loras(self, scales: Mapping[str, float]) -> None:
        """Keep only these of the loaded LoRAs, with these scales; the weights change once.

        Raises:
            UserError: a name is not the name of a loaded LoRA.
        """
        if unknown := [name for name in scales if name not in self._loras.loras]:
            loaded = ", ".join(self._loras.loras) or "none"
            raise UserError(f"this UNet has no LoRA {unknown[0]!r}: it has {loaded}")
        loras = self._loras.kept(scales, ()).activated({name: float(scale) for name, scale in scales.items()})
        self.apply_loras(replace(loras, enabled=True))

    def unload_lora(self, name: str | None = None) -> None:
        """Remove a LoRA, or all of them; without LoRAs the weights are those of the build, bit for bit.

        Raises:
            UserError: the LoRA is not loaded.
        """
        if name is None:
            self.set_loras({})
        elif name not in self._loras.loras:
            self.set_loras({name: 0})  # raises the error
        else:
            others = [other for other in self._loras.loras if other != name]
            active = self._loras.active
            active = active and tuple(other for other in active if other != name)
            self.apply_loras(self._loras.kept(others, active))

    def apply_loras(self, loras: LoraSet) -> None:
        """Replace the loaded LoRAs; the weights become the built weights plus the products of the active LoRAs.

        Raises:
            ModelError: a LoRA is for another model. Nothing is changed.
            EngineError: the engine does not accept new weights, or its weights are rounded. Nothing is changed.
            BundleError: the bundle was built for deployment, without the weights that a LoRA is added to.
            UserError: a generation is under way.
        """
        terms, known = loras.terms(), {id(lora) for lora in self._loras.loras.values()}
        new = [lora for lora in loras.loras.values() if id(lora) not in known]
        changed = not _are_equal(terms, self._loras.terms())
        if new or (terms and changed):
            stored = self.stored_weights()
            for lora in new:
                check(lora, stored.shapes)
        if changed:
            self._refit({name: merged(stored.read(name), products) for name, products in terms.items()})
        self._loras = loras

    def stored_weights(self) -> StoredWeights:
        """Return the weights that the engines were built with.

        Raises:
            BundleError: the bundle was built for deployment, without weights, or a file is damaged.
            EngineError: the weights are rounded to low precision.
            UserError: the weights are unknown, or do not have the names of PyTorch's parameters.
        """
        if self._stored is None:
            raise UserError("this UNet was made from engines alone, without weights: open it with offcut.UNet.load")
        stored = self._stored()
        if not stored.shapes:
            raise UserError(
                "this UNet was built from ONNX whose weights do not name their layers, so no LoRA can be added: "
                "build from the model's weights for PyTorch"
            )
        return stored

    # Methods that diffusers calls

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        prefix: str | None = "unet",
        adapter_name: str | None = None,
        hotswap: bool = False,
        network_alphas: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
        _pipeline: Any = None,
        **_: Any,
    ) -> None:
        """Load a LoRA from tensors; ``pipe.load_lora_weights`` calls this before it loads the text encoders' layers.

        As in PEFT, the new LoRA is then the only active one, at scale 1. ``pipe.set_adapters`` activates several.

        Args:
            hotswap: whether to replace the loaded LoRA of this name, which stays active or inactive.

        Raises:
            UserError: the name is in use; or there is no LoRA to replace; or the LoRA has layers of a text encoder that
                is compiled into an engine. Nothing is changed.
        """
        if not isinstance(pretrained_model_name_or_path_or_dict, Mapping):
            self.load_lora(pretrained_model_name_or_path_or_dict, name=adapter_name)
            return
        name = adapter_name or f"default_{len(self._loras.loras)}"
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
        if hotswap != (name in self._loras.loras):
            raise UserError(
                f"there is no LoRA {name!r} to replace: name one that is loaded as adapter_name, or leave hotswap out"
                if hotswap
                else f"a LoRA {name!r} is loaded already: choose another adapter_name, or delete it first"
            )
        lora = from_tensors(name, tensors, network_alphas or {}, metadata or {})
        active = self._loras.active_names if hotswap else [name]
        self.apply_loras(self._loras.loaded(lora, name, 1.0, active))

    def set_adapters(
        self, adapter_names: str | Sequence[str], weights: float | Sequence[float | None] | None = None
    ) -> None:
        """Activate these LoRAs alone, at these scales, for ``pipe.set_adapters``; None is 1.

        Raises:
            UserError: the numbers of names and scales differ, or a LoRA has a scale for each block.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        scales = list(weights) if isinstance(weights, Sequence) else [weights] * len(names)
        if blocks := [value for value in scales if isinstance(value, Mapping)]:
            raise UserError(f"a LoRA has one scale on compiled engines, not one for each block: {blocks[0]}")
        if len(names) != len(scales):
            raise UserError(f"there are {len(names)} LoRAs and {len(scales)} scales: give one scale for each LoRA")
        pairs = zip(names, scales, strict=True)
        self._activate({name: 1.0 if scale is None else float(scale) for name, scale in pairs})

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Activate these LoRAs alone, at the scales that they have."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._activate({name: self._loras.scales.get(name, 1.0) for name in names})

    def _activate(self, scales: Mapping[str, float]) -> None:
        if unknown := [name for name in scales if name not in self._loras.loras]:
            # Not an error: pipe.set_adapters also names LoRAs that have layers in a text encoder alone.
            logger.info("the UNet has no layers of the LoRA %s", ", ".join(unknown))
        self.apply_loras(self._loras.activated(scales))

    def active_adapters(self) -> list[str]:
        """Return the names of the active LoRAs, whether LoRAs are enabled or not."""
        return self._loras.active_names

    def disable_lora(self) -> None:
        """Take the LoRAs out of the weights until ``enable_lora``; they stay loaded."""
        self.apply_loras(replace(self._loras, enabled=not self._loras.loras))

    def enable_lora(self) -> None:
        """Add the active LoRAs to the weights again."""
        self.apply_loras(replace(self._loras, enabled=True))

    disable_adapters, enable_adapters = disable_lora, enable_lora

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Remove LoRAs for ``pipe.delete_adapters``; as in PEFT, others become active if no active LoRA remains."""
        names = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
        self.apply_loras(self._loras.deleted(names))

    @property
    def peft_config(self) -> Mapping[str, Lora]:
        """Loaded LoRAs by name, which ``pipe.get_list_adapters`` reads; missing without LoRAs."""
        if not self._loras.loras:
            raise AttributeError("this UNet has no LoRAs")
        return self._loras.loras

    def modules(self) -> Iterator[torch.nn.Module]:
        """Yield the modules, and for loaded LoRAs a layer of PEFT, from which pipelines read the active LoRAs."""
        yield from super().modules()  # type: ignore[misc]
        if self._loras.loras and "peft" in sys.modules:
            layer = _adapter_layer_class()()
            layer._active_adapter = self._loras.active_names
            layer.lora_A = {}  # pipe.set_lora_device looks for weights to move
            yield layer


@functools.cache
def _adapter_layer_class() -> Any:
    """Return a class of modules that are layers of PEFT without weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return type("AdapterLayer", (torch.nn.Module, BaseTunerLayer), {"unmerge": lambda self: None})


def _are_equal(terms: Terms, others: Terms) -> bool:
    """Return whether the products are the same objects, with the same scales."""
    return terms.keys() == others.keys() and all(
        [(id(product), scale) for product, scale in products]
        == [(id(product), scale) for product, scale in others[parameter]]
        for parameter, products in terms.items()
    )
