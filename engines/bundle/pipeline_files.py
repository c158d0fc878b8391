"""The pipeline files of a bundle, in diffusers' layout: scheduler, tokenizer, text encoder, VAE."""

from __future__ import annotations

import json
import shutil
from collections.abc import Container
from pathlib import Path

from ...errors import ModelError
from ...exporter.foreign.networks import config_folder, pipeline_index
from ...exporter.load import INDEX_FILE, PROMPTS_FILE, ModelSource

_SMALL = (".json", ".txt", ".model")
_INDEX_OF_WEIGHTS = ".safetensors.index.json"


def pipeline_class(source: ModelSource) -> str | None:
    """Return the name of the pipeline's class in diffusers; None for a bare UNet."""
    if not source.is_pipeline:
        return None
    return str(pipeline_index(source)["_class_name"])


def copy_pipeline_files(source: ModelSource, out: Path, without_weights: Container[str] = ()) -> list[str]:
    """Copy every component but the UNet, and the model's prompts; return the names of the copies.

    Args:
        without_weights: components whose weights are left out, because their networks are exported to graphs.

    Raises:
        ModelError: a component has no safetensors of the chosen variant.
    """
    if not source.is_pipeline:
        return []
    index = pipeline_index(source)
    copies: dict[str, Path] = {}
    for component, location in index.items():
        if not component.isidentifier():
            raise ModelError(f"{source.name} has a component {component!r}, which is not a valid folder name")
        folder = config_folder(source, component)
        if (
            component.startswith("_")
            or folder == source.folder
            or not isinstance(location, list)
            or location[0] is None
        ):
            continue
        files = _files(folder, source.variant)
        if not files:
            raise ModelError(
                f"{source.name} has nothing to load in {component}; offcut takes safetensors only"
                + (f" of the variant {source.variant}" if source.variant else "")
            )
        if component in without_weights:
            files = [file for file in files if file.suffix in _SMALL and not file.name.endswith(_INDEX_OF_WEIGHTS)]
        copies |= {f"{component}/{file.name}": file for file in files}
    out.mkdir(parents=True, exist_ok=True)
    if source.onnx:
        (out / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    else:
        shutil.copyfile(source.root / INDEX_FILE, out / INDEX_FILE)
    if (source.root / PROMPTS_FILE).is_file():
        copies[PROMPTS_FILE] = source.root / PROMPTS_FILE
    for name, file in copies.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, out / name)
    return [INDEX_FILE, *copies]


def _files(folder: Path, variant: str | None) -> list[Path]:
    """Return a component's configs and weights; empty if all its weights are pickled."""
    if not folder.is_dir():
        return []
    chosen = weight_files(folder, variant)
    pickled = any(folder.glob("*.bin")) or any(folder.glob("*.ckpt"))
    if pickled and not chosen:
        return []
    return sorted([*small_files(folder), *chosen])


def small_files(folder: Path) -> list[Path]:
    """Return a component's configs and vocabularies."""
    return [file for file in folder.iterdir() if file.suffix in _SMALL and file.is_file()]


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """Return the safetensors of this variant, or if it has none, those without a variant."""
    weights = sorted(folder.glob("*.safetensors"))
    return [file for file in weights if _variant_of(file) == variant] or [
        file for file in weights if _variant_of(file) is None
    ]


def _variant_of(file: Path) -> str | None:
    """Return ``fp16`` for ``model.fp16.safetensors`` and ``model.fp16-00001-of-00002.safetensors``."""
    middle = file.name.removesuffix(".safetensors").partition(".")[2]
    return middle.partition("-")[0] or None
