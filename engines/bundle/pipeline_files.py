"""The pipeline files of a bundle, in diffusers' layout: scheduler, tokenizer, text encoder, VAE."""

from __future__ import annotations

import json
import shutil
from collections.abc import Container
from pathlib import Path

from ...errors import ModelError
from ...exporter.foreign.networks import config_folder, pipeline_index
from ...exporter.load import INDEX_FILE, PROMPTS_FILE, ModelSource
from ...exporter.weight_files import (
    INDEX_SUFFIX,
    chosen_variant,
    component_files,
    index_without_variant,
    small_files,
    without_variant,
)


def pipeline_class(source: ModelSource) -> str | None:
    """Return the name of the pipeline's class in diffusers; None for a bare UNet."""
    if not source.is_pipeline:
        return None
    return str(pipeline_index(source)["_class_name"])


def pipeline_files(source: ModelSource, without_weights: Container[str] = ()) -> dict[str, Path]:
    """Return the files of every component but the UNet, by the names that their copies have in a bundle.

    Copies have no variant in their names, so that a bundle is opened without one.

    Args:
        without_weights: components whose weights are left out, because their networks are exported to graphs.

    Raises:
        ModelError: a component has no safetensors, or lacks a part of them.
    """
    files: dict[str, Path] = {}
    for component, location in pipeline_index(source).items():
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
        chosen = component_files(folder, source.variant) if folder.is_dir() else []
        weights = [file for file in chosen if file.suffix == ".safetensors"]
        # Only models have a config.json; schedulers and tokenizers have configs of other names.
        needs_weights = component not in without_weights and (folder / "config.json").is_file()
        if not chosen or (needs_weights and not weights):
            raise ModelError(
                f"{source.name} has nothing to load in {component}; offcut takes safetensors only"
                + (f" of the variant {source.variant}" if source.variant else "")
            )
        if component in without_weights:
            chosen = small_files(folder)
        variant = chosen_variant(folder, source.variant)
        files |= {f"{component}/{without_variant(file.name, variant)}": file for file in sorted(chosen)}
    if (source.root / PROMPTS_FILE).is_file():
        files[PROMPTS_FILE] = source.root / PROMPTS_FILE
    return files


def copy_pipeline_files(source: ModelSource, out: Path, without_weights: Container[str] = ()) -> list[str]:
    """Copy the files that ``pipeline_files`` lists, and the pipeline's index; return the names of the copies.

    Raises:
        ModelError: as ``pipeline_files``.
    """
    if not source.is_pipeline:
        return []
    files = pipeline_files(source, without_weights)
    out.mkdir(parents=True, exist_ok=True)
    if source.onnx:
        (out / INDEX_FILE).write_text(json.dumps(pipeline_index(source), indent=2) + "\n", encoding="utf-8")
    else:
        shutil.copyfile(source.root / INDEX_FILE, out / INDEX_FILE)
    for name, file in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(INDEX_SUFFIX) and Path(name).name != file.name:  # an index of shards that are renamed too
            variant = chosen_variant(file.parent, source.variant)
            (out / name).write_text(index_without_variant(file, variant), encoding="utf-8")
        else:
            shutil.copyfile(file, out / name)
    return [INDEX_FILE, *files]
