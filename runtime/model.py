"""``EngineModel``: what diffusers and PyTorch ask of any model, answered by one whose weights are in engines."""

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
    """A diffusers model in form: pipelines accept only subclasses of ``ModelMixin``.

    Args:
        config: as diffusers wrote it, with ``_class_name``.
        device: where the engines run.
        dtype: of the engines' latents.
        attention: the kind that they were exported with, None for the UNet's own.
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
        """Where the engines run."""
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the engines' latents."""
        return self._dtype

    def parameters(self, recurse: bool = True) -> Iterator[torch.nn.Parameter]:
        """One empty parameter on the engines' device, as model offloading looks there for where a model is."""
        yield torch.nn.Parameter(torch.empty(0, dtype=self._dtype, device=self._device), requires_grad=False)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Check that the engines already are there, as ``pipe.to`` asks.

        Moving to the CPU does nothing: offloading asks for it between calls, and engines keep their memory until
        ``close``.

        Raises:
            EngineError: another device or floating-point dtype, which takes other engines.
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
                "precision, or give the pipeline's other parts the UNet's dtype"
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
        """Write the config, as part of ``pipe.save_pretrained``; the weights stay in the bundle's engines.

        Load the pipeline again with ``from_pretrained(directory, unet=offcut.UNet.load(bundle))``. The pipeline's index
        names the module of ``UNet``, where diffusers then looks for ``ModelMixin`` too.
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
        """Always an error: engines come from bundles.

        Raises:
            BundleError: with the way to load a pipeline that was saved with this UNet.
        """
        raise BundleError(
            f"{pretrained_model_name_or_path} holds a UNet's config, while its engines are in a bundle: "
            "load a pipeline with from_pretrained(..., unet=offcut.UNet.load(bundle))"
        )

    def __reduce__(self) -> NoReturn:
        raise UserError("an open engine cannot be copied or pickled: open another UNet from the same bundle")


def output_class(family: Family) -> Any:
    """What diffusers' own UNet of this family returns."""
    unet_class = getattr(diffusers, family.unet_class)
    return getattr(importlib.import_module(unet_class.__module__), family.output_class)


def _with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with what an older diffusers had not yet written into it, which newer pipelines read."""
    model = getattr(diffusers, str(config.get("_class_name")), None)
    parameters = inspect.signature(model).parameters.values() if isinstance(model, type) else ()
    defaults = {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}
    return {**defaults, **config}
