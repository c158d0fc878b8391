"""``EngineModel``: base class of models whose weights are in engines, with the interface of a diffusers model."""

from __future__ import annotations

import importlib
import inspect
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, Self

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin

from ..errors import BundleError, EngineError, UserError
from ..exporter.families import Family
from .inputs import same_device
from .unsupported import UnsupportedMethods

logger = logging.getLogger(__name__)


class EngineModel(UnsupportedMethods, ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers is untyped
    """Base class with diffusers' model interface; pipelines accept only subclasses of ``ModelMixin``.

    Args:
        config: the model's config as diffusers wrote it, with ``_class_name``.
        device: device of the engines.
        dtype: dtype of the engines' latents.
        attention: attention that the model was exported with; None for the model's own.
    """

    config_name = "config.json"

    def __init__(
        self, config: Mapping[str, Any], device: torch.device, dtype: torch.dtype, attention: str | None = None
    ) -> None:
        super().__init__()
        self._built_attention, self._set_attention = attention, None
        self.register_to_config(**_with_defaults(config))
        self._device = device
        self._dtype = dtype

    @property
    def device(self) -> torch.device:
        """Device of the engines."""
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the engines' latents."""
        return self._dtype

    def parameters(self, recurse: bool = True) -> Iterator[torch.nn.Parameter]:
        """Yield one empty parameter on the engines' device; model offloading reads the device from it."""
        yield torch.nn.Parameter(torch.empty(0, dtype=self._dtype, device=self._device), requires_grad=False)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Check that the engines have this device and dtype; ``pipe.to`` calls this method.

        Moving to the CPU does nothing: offloading does so between calls, and engines keep their memory until ``close``.

        Raises:
            EngineError: the engines have another device or another floating-point dtype.
        """
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type != "cpu" and not same_device(device, self._device):
            raise EngineError(
                f"this UNet's engines run on {self._device} and cannot move to {device}: open them there, with "
                f"offcut.UNet.load(bundle, device={str(device)!r})"
            )
        if dtype is not None and dtype.is_floating_point and dtype != self._dtype:
            raise EngineError(
                f"this UNet's engines take {self._dtype} and cannot be cast to {dtype}: build a bundle with that "
                "precision, or give the pipeline's other components the UNet's dtype"
            )
        return self

    def cpu(self) -> Self:
        return self.to("cpu")

    def cuda(self, device: int | torch.device | None = None) -> Self:
        return self.to(torch.device("cuda", device) if isinstance(device, int) else device or "cuda")

    def half(self) -> Self:
        return self.to(torch.float16)

    def float(self) -> Self:
        return self.to(torch.float32)

    def bfloat16(self) -> Self:
        return self.to(torch.bfloat16)

    def double(self) -> Self:
        return self.to(torch.float64)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write the config, as part of ``pipe.save_pretrained``; the weights remain in the bundle's engines.

        Load the pipeline again with ``from_pretrained(directory, unet=offcut.UNet.load(bundle))``. The pipeline's index
        names the module of ``UNet``, so diffusers looks for ``ModelMixin`` in that module.
        """
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dict(self.config), indent=2, sort_keys=True, default=str) + "\n"
        (directory / self.config_name).write_text(text, encoding="utf-8")
        logger.warning(
            "%s holds the UNet's config only, as its engines stay in the bundle: load this pipeline with "
            "from_pretrained(..., unet=offcut.UNet.load(bundle))",
            directory,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> NoReturn:
        """Raise an error, because engines are loaded from bundles.

        Raises:
            BundleError: always; the message says how to load a pipeline that was saved with this UNet.
        """
        raise BundleError(
            f"{pretrained_model_name_or_path} holds a UNet's config, while its engines are in a bundle: "
            "load a pipeline with from_pretrained(..., unet=offcut.UNet.load(bundle))"
        )

    def __reduce__(self) -> NoReturn:
        raise UserError("an open engine cannot be copied or pickled: open another UNet from the same bundle")


def output_class(family: Family) -> Any:
    """Return the output class of diffusers' own UNet of this family."""
    unet_class = getattr(diffusers, family.unet_class)
    return getattr(importlib.import_module(unet_class.__module__), family.output_class)


def _with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config with defaults for entries that older versions of diffusers did not write."""
    model = getattr(diffusers, str(config.get("_class_name")), None)
    parameters = inspect.signature(model).parameters.values() if isinstance(model, type) else ()
    defaults = {item.name: item.default for item in parameters if item.default is not inspect.Parameter.empty}
    return {**defaults, **config}
