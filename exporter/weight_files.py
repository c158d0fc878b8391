"""Weight files of a component in diffusers' layout: plain or of a variant such as fp16, whole or in shards."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ..errors import ModelError

INDEX_SUFFIX = ".safetensors.index.json"
"""End of the name of an index of shards without a variant."""

_SMALL = (".json", ".txt", ".model")
_INDEX = re.compile(r"\.(?:safetensors|bin)\.index(?:\.(?P<variant>[^.]+))?\.json$")


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """Return the safetensors of the variant, or if there are none, those that ``chosen_variant`` names instead.

    Raises:
        ModelError: as ``chosen_variant``.
    """
    chosen = chosen_variant(folder, variant)
    return [file for file in _safetensors(folder) if _variant_of(file) == chosen]


def chosen_variant(folder: Path, variant: str | None) -> str | None:
    """Return the variant to load: the requested one, else the plain files, else the only other variant.

    Raises:
        ModelError: there are several variants, and none of them is the requested or the plain one.
    """
    found = list(dict.fromkeys(_variant_of(file) for file in _safetensors(folder)))
    if variant in found or not found:
        return variant
    if None in found:
        return None
    if len(found) > 1:
        names = ", ".join(map(str, found))
        raise ModelError(f"{folder} has weights of the variants {names} only: choose one with --variant")
    return found[0]


def component_files(folder: Path, variant: str | None) -> list[Path]:
    """Return a component's configs, vocabularies and chosen weights, with the index of shards.

    Raises:
        ModelError: a shard is missing; or as ``chosen_variant``.
    """
    weights = weight_files(folder, variant)
    index = _index_file(folder, variant)
    if index is not None:
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, OSError) as error:
            raise ModelError(f"{index} is not an index of shards; download or save the model again") from error
        if missing := sorted(shards - {file.name for file in weights}):
            raise ModelError(f"{folder} lacks the shard {missing[0]}; download or save the model again")
        weights = [file for file in weights if file.name in shards]
    return sorted([*small_files(folder), *weights, *([index] if index else [])])


def small_files(folder: Path) -> list[Path]:
    """Return a component's configs and vocabularies, without indexes of shards."""
    return [
        file for file in folder.iterdir() if file.suffix in _SMALL and file.is_file() and not _INDEX.search(file.name)
    ]


def _index_file(folder: Path, variant: str | None) -> Path | None:
    """Return the index of the chosen weights' shards; None if the weights are whole.

    Raises:
        ModelError: as ``chosen_variant``.
    """
    chosen = chosen_variant(folder, variant)
    for file in sorted(folder.glob("*.safetensors.index*.json")):
        match = _INDEX.search(file.name)
        if match is not None and match["variant"] == chosen:
            return file
    return None


def without_variant(name: str, variant: str | None) -> str:
    """Return the name that a file of a variant has in a directory without variants."""
    return name if variant is None else name.replace(f".{variant}", "", 1)


def index_without_variant(index: Path, variant: str | None) -> str:
    """Return the text of an index whose shards are renamed by ``without_variant``."""
    content = json.loads(index.read_text(encoding="utf-8"))
    content["weight_map"] = {key: without_variant(name, variant) for key, name in content["weight_map"].items()}
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def _safetensors(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _variant_of(file: Path) -> str | None:
    """Return ``fp16`` for ``model.fp16.safetensors`` and ``model.fp16-00001-of-00002.safetensors``."""
    middle = file.name.removesuffix(".safetensors").partition(".")[2]
    return middle.partition("-")[0] or None
