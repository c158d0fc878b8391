"""Loading of models from the hub or a local directory. Only safetensors are read, and no remote code runs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelError
from .families import FAMILIES, Family, family_of
from .foreign.find import OPTIMUM_CLASSES, is_foreign
from .ip_adapter import IPAdapter, load_into, with_adapters
from .lora import ScaledLora, fuse
from .trace.attention import ATTENTION, PIPELINES
from .weight_files import chosen_variant

if TYPE_CHECKING:
    import torch

INDEX_FILE = "model_index.json"

PROMPTS_FILE = "prompts.txt"
"""Optional file next to the index: prompts that suit the model, one a line."""
PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class ModelSource:
    """A model on disk, and what to change in its UNet when the UNet is loaded.

    Attributes:
        name: hub id or path, as the user gave it.
        root: directory of the pipeline, or of a bare UNet.
        subfolder: folder of the UNet in ``root``; empty for a bare UNet.
        revision: commit on the hub, or None for a local directory.
        variant: variant of the weight files, such as ``fp16`` in ``model.fp16.safetensors``.
        config: config of the UNet, with its IP-Adapters.
        loras: LoRAs to fuse into the UNet.
        components: directories of components that are not in ``root``, by name.
        ip_adapters: IP-Adapters to build into the UNet.
        attention: name from ``attention.ATTENTION``, or None for the UNet's own attention.
        onnx: whether the UNet is foreign ONNX, without weights for PyTorch.
    """

    name: str
    root: Path
    subfolder: str
    revision: str | None
    variant: str | None
    config: dict[str, Any]
    loras: tuple[ScaledLora, ...] = ()
    components: Mapping[str, Path] = field(default_factory=dict)
    ip_adapters: tuple[IPAdapter, ...] = ()
    attention: str | None = None
    onnx: bool = False

    @property
    def is_pipeline(self) -> bool:
        return bool(self.subfolder) and (self.root / INDEX_FILE).is_file()

    @property
    def family(self) -> Family:
        return family_of(self.config)

    @property
    def folder(self) -> Path:
        """Directory with the UNet's config and weights."""
        return self.root / self.subfolder

    def component(self, name: str) -> Path:
        """Return the directory of one of the pipeline's components."""
        return self.components.get(name, self.root / name)


def locate(
    model: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    subfolder: str | None = None,
    loras: Sequence[ScaledLora] = (),
    ip_adapters: Sequence[IPAdapter] = (),
    attention: str | None = None,
) -> ModelSource:
    """Find a model, and download it from the hub if ``model`` is not a local directory.

    Args:
        model: hub id, or a directory with a diffusers pipeline, a bare UNet, or ONNX files from optimum.
        revision: branch, tag or commit on the hub.
        variant: variant of the weight files, e.g. ``"fp16"``.
        subfolder: folder of the UNet; by default ``"unet"`` in a pipeline.
        loras: LoRAs to fuse into the UNet.
        ip_adapters: IP-Adapters to build into the UNet.
        attention: ``"cross-frame"``, or None for the attention of the model's own pipeline.

    Raises:
        ModelError: there is no UNet that can be exported, or the kind of attention is unknown.
    """
    root = Path(model).expanduser()
    commit = None
    if root.is_file():
        raise ModelError(f"{model} is a file; give the diffusers directory that holds the UNet, or a hub id")
    if not root.exists():
        root, commit = _fetch(str(model), revision, variant)
    if subfolder is None:
        subfolder = "" if _is_unet(root) else "unet"
    config_file = root / subfolder / "config.json"
    if not config_file.is_file():
        if transformer := _transformer_of(root):
            raise ModelError(
                f"{model} denoises with a transformer ({transformer}), which has no skip connections to cut: "
                f"offcut takes pipelines with a UNet ({', '.join(FAMILIES)}), such as Stable Diffusion 1.5, 2.1 and XL"
            )
        raise ModelError(
            f"{model} has no {Path(subfolder) / 'config.json'}; "
            "give a diffusers pipeline or UNet directory (subfolder= names the UNet's folder)"
        )
    config = with_adapters(_read_config(config_file), ip_adapters, root)
    family_of(config)
    source = ModelSource(
        name=str(model),
        root=root,
        subfolder=subfolder,
        revision=commit,
        variant=variant,
        config=config,
        loras=tuple(loras),
        ip_adapters=tuple(ip_adapters),
        onnx=is_foreign(config_file.parent),
    )
    return replace(source, attention=_attention(source, attention))


def _attention(source: ModelSource, requested: str | None) -> str | None:
    if requested is None:
        return PIPELINES.get(str(read_index(source.root)["_class_name"])) if source.is_pipeline else None
    if requested not in ATTENTION or not source.family.takes_attention:
        supported = ", ".join(ATTENTION) if source.family.takes_attention else "none but its own"
        raise ModelError(f"a {source.family.unet_class} takes no attention called {requested!r}; it takes {supported}")
    return requested


def load_unet(source: ModelSource, precision: str = "fp32") -> torch.nn.Module:
    """Load a UNet on the CPU, in evaluation mode and in this precision, with the changes that ``source`` lists.

    Raises:
        ModelError: the weights are missing, not safetensors, truncated, or do not fit the config.
    """
    import diffusers
    import torch
    from safetensors import SafetensorError

    unet_class = getattr(diffusers, source.family.unet_class)
    if source.onnx:
        raise ModelError(
            f"{source.name} holds its UNet as ONNX only, and this needs PyTorch weights: "
            "give the directory that it was exported from"
        )
    if not any(source.folder.glob("*.safetensors")):
        raise ModelError(
            f"{source.name} has no safetensors weights in {source.subfolder or '.'}; "
            "offcut loads no pickled weights: convert them with diffusers' save_pretrained, or name a variant"
        )
    try:
        unet, loading_info = unet_class.from_pretrained(
            source.folder,
            torch_dtype=getattr(torch, PRECISIONS[precision]),
            use_safetensors=True,
            variant=source.variant or chosen_variant(source.folder, None),
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"the UNet of {source.name} cannot be loaded: {_first_sentence(error)}; download or save it again"
        ) from error
    if missing_keys := loading_info["missing_keys"]:  # diffusers fills them with random numbers
        raise ModelError(
            f"the weights of {source.name} lack {len(missing_keys)} parameters, {sorted(missing_keys)[0]} among them; "
            "download or save the model again"
        )
    if any(".to_k_ip." in name for name in loading_info["unexpected_keys"]):  # diffusers would ignore them
        raise ModelError(
            f"{source.name} was saved with an IP-Adapter in its UNet, which cannot be loaded: save it without "
            "(pipe.unload_ip_adapter()), and build with --ip-adapter FILE"
        )
    assert isinstance(unet, torch.nn.Module)
    fuse(unet, source.loras, source.config)
    if source.ip_adapters:
        load_into(unet, source.ip_adapters)
    if source.attention is not None:
        unet.set_attn_processor(ATTENTION[source.attention]())  # type: ignore[operator]  # of diffusers' UNets
    return unet.eval().requires_grad_(False)


def read_index(root: Path) -> dict[str, Any]:
    """Read a pipeline's ``model_index.json``: its class and its components.

    Raises:
        ModelError: the file is damaged, or names no pipeline class.
    """
    file = root / INDEX_FILE
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"{file} is not readable JSON; download or save the pipeline again") from error
    if not isinstance(index, dict) or "_class_name" not in index:
        raise ModelError(f"{file} names no pipeline class; download or save the pipeline again")
    return index


def _fetch(model: str, revision: str | None, variant: str | None) -> tuple[Path, str]:
    """Download a pipeline's configs and safetensors, and return its directory and commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    weights = [f"*.{variant}.safetensors", f"*.{variant}-*.safetensors"] if variant else ["*.safetensors"]
    # Without a variant the files of other variants are not downloaded: SD 1.5 on the hub has four of each.
    excluded = [] if variant else ["*.fp16.safetensors", "*.bf16.safetensors", "*.non_ema.safetensors"]
    # Single-file checkpoints are at the top level of a repository, next to the diffusers folders.
    excluded += [] if "/" not in model else ["*pruned*.safetensors", "*emaonly*.safetensors"]
    try:
        root = snapshot_download(
            model, revision=revision, allow_patterns=["*.json", "*.txt", "*.model", *weights], ignore_patterns=excluded
        )
    except HFValidationError as error:
        raise ModelError(f"{model} is neither a directory here nor a valid hub id") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"{model} is not a local directory and could not be downloaded: {_first_sentence(error)}"
        ) from error
    # snapshot_download's path ends in snapshots/<commit>.
    return Path(root), Path(root).name


def _transformer_of(root: Path) -> str | None:
    """Return the class of a pipeline's transformer, or None without a transformer or a pipeline."""
    try:
        index = json.loads((root / INDEX_FILE).read_text(encoding="utf-8"))
        library, name = index["transformer"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None if library is None else str(name)


def _is_unet(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and not (folder / INDEX_FILE).is_file()


def _read_config(file: Path) -> dict[str, Any]:
    """Read a UNet's config, with diffusers' defaults for keys that an older file lacks."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"{file} is not readable JSON: {_first_sentence(error)}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file} is not a model's config: it holds no JSON object")
    if (kind := config.get("_class_name")) in OPTIMUM_CLASSES:
        config["_class_name"] = OPTIMUM_CLASSES[kind]
    import inspect

    import diffusers

    unet_class = getattr(diffusers, family_of(config).unet_class)
    parameters = inspect.signature(unet_class.__init__).parameters
    defaults = {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}
    return {**defaults, **config}


def _first_sentence(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.split(r"\.(?: (?=[A-Z])|$)", line)[0]
