"""From a hub id or a local directory to a UNet in memory: safetensors only, remote code never."""

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

if TYPE_CHECKING:
    import torch

INDEX_FILE = "model_index.json"

PROMPTS_FILE = "prompts.txt"
"""Beside the index, where a model has it: prompts like those that it knows, one a line."""
PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class ModelSource:
    """Where a model was found, on disk.

    Attributes:
        name: what the user gave: a hub id or a path.
        root: the pipeline's directory, or the UNet's own for a bare UNet.
        subfolder: of the UNet under ``root``; empty for a bare UNet.
        revision: the hub's commit, or None for a local directory.
        variant: of the weight files, as in ``model.fp16.safetensors``.
        config: the UNet's config.
        loras: to be fused into the UNet when it is loaded.
        parts: components of the pipeline that lie elsewhere, by name.
        ip_adapters: to build into the UNet; its config says so.
        attention: of ``attention.ATTENTION``, in place of the UNet's own; None for that.
        onnx: whether the UNet is an ONNX file foreign, without weights for PyTorch.
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
        """The directory with the UNet's config and weights."""
        return self.root / self.subfolder

    def component(self, name: str) -> Path:
        """The directory of one of the pipeline's components."""
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
    """Find a model, fetching it from the hub if ``model`` is no local directory.

    Args:
        model: a hub id, a diffusers pipeline directory, the directory of a bare UNet, or one with ONNX files that
            optimum wrote.
        revision: a branch, tag or commit of the hub's repository.
        variant: of the weight files, e.g. ``"fp16"``.
        subfolder: of the UNet; ``"unet"`` in a pipeline.
        loras: files of LoRAs to be fused into the UNet.
        ip_adapters: to build into the UNet.
        attention: ``"cross-frame"``, or None for what the model's own pipeline uses.

    Raises:
        ModelError: nothing there that can be exported, or an unknown kind of attention.
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


def _attention(source: ModelSource, asked: str | None) -> str | None:
    if asked is None:
        return PIPELINES.get(str(read_index(source.root)["_class_name"])) if source.is_pipeline else None
    if asked not in ATTENTION or not source.family.takes_attention:
        there = ", ".join(ATTENTION) if source.family.takes_attention else "none but its own"
        raise ModelError(f"a {source.family.unet_class} takes no attention called {asked!r}; it takes {there}")
    return asked


def load_unet(source: ModelSource, precision: str = "fp32") -> torch.nn.Module:
    """The UNet in evaluation mode on the CPU, its weights in this precision, its LoRAs fused.

    Raises:
        ModelError: the weights are missing, not safetensors, truncated, or do not fit the config.
    """
    import diffusers
    import torch
    from safetensors import SafetensorError

    unet_class = getattr(diffusers, source.family.unet_class)
    if source.onnx:
        raise ModelError(
            f"{source.name} holds its UNet as ONNX, without the weights for PyTorch that this needs: "
            "give the directory that it was exported from"
        )
    if not any(source.folder.glob("*.safetensors")):
        raise ModelError(
            f"{source.name} has no safetensors weights in {source.subfolder or '.'}; "
            "offcut loads no pickled weights: convert them with diffusers' save_pretrained"
        )
    try:
        unet, found = unet_class.from_pretrained(
            source.folder,
            torch_dtype=getattr(torch, PRECISIONS[precision]),
            use_safetensors=True,
            variant=source.variant,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"the UNet of {source.name} cannot be loaded: {_first_sentence(error)}; download or save it again"
        ) from error
    if missing := found["missing_keys"]:  # diffusers fills them with random numbers
        raise ModelError(
            f"the weights of {source.name} lack {len(missing)} parameters, {sorted(missing)[0]} among them; "
            "download or save the model again"
        )
    if any(".to_k_ip." in name for name in found["unexpected_keys"]):  # which diffusers would leave out
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
    """What a pipeline's directory says of its class and components.

    Raises:
        ModelError: its ``model_index.json`` is damaged or names no pipeline.
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
    """Download a pipeline's configs and safetensors; give its directory and commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    weights = [f"*.{variant}.safetensors", f"*.{variant}-*.safetensors"] if variant else ["*.safetensors"]
    # Without a variant the other variants' files are left where they are: SD 1.5 on the hub has four of each weight.
    others = [] if variant else ["*.fp16.safetensors", "*.bf16.safetensors", "*.non_ema.safetensors"]
    # Single-file checkpoints lie at a repository's top level beside the diffusers folders.
    others += [] if "/" not in model else ["*pruned*.safetensors", "*emaonly*.safetensors"]
    try:
        root = snapshot_download(
            model, revision=revision, allow_patterns=["*.json", "*.txt", "*.model", *weights], ignore_patterns=others
        )
    except HFValidationError as error:
        raise ModelError(f"{model} is neither a directory here nor a valid hub id") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(f"{model} is no directory here and could not be fetched: {_first_sentence(error)}") from error
    # snapshot_download's path ends in snapshots/<commit>.
    return Path(root), Path(root).name


def _transformer_of(root: Path) -> str | None:
    """The class of a pipeline's transformer; None for one without, or where there is no pipeline."""
    try:
        parts = json.loads((root / INDEX_FILE).read_text(encoding="utf-8"))
        library, name = parts["transformer"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None if library is None else str(name)


def _is_unet(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and not (folder / INDEX_FILE).is_file()


def _read_config(file: Path) -> dict[str, Any]:
    """The config with diffusers' defaults for what an older file leaves out."""
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
