"""The peers' model: the diffusers directory that the bundle was built from, proven by its weights' digest."""

from __future__ import annotations

import json
import math
from pathlib import Path

from ...engines.builder.request import weights_digest
from ...engines.bundle.bundle import Bundle
from ...engines.bundle.pipeline_files import weight_files
from ...errors import ModelError, UserError
from ...exporter.load import ModelSource, locate


def find_model(bundle: Bundle, given: Path | None) -> tuple[Path | None, str]:
    """The directory that the peers load, and why there is none.

    Args:
        given: by the user; None looks where the bundle was built from, if that was a directory.

    Raises:
        UserError: the given directory is none, or holds other weights than the bundle was built from.
    """
    built_from = bundle.manifest.source
    folder = given or Path(built_from.model)
    if given is not None and not folder.is_dir():
        raise UserError(f"{given} is no directory: give the diffusers directory that the bundle was built from")
    missing = f"the peers need the PyTorch weights of {built_from.model}: give their directory with --model"
    try:
        source = locate(folder, variant=built_from.variant) if folder.is_dir() else None
    except ModelError:
        if given is not None:
            raise
        source = None
    if source is None or source.onnx:
        return None, missing
    if weights_digest(source) != built_from.weights_digest:
        if given is None:
            return None, missing
        raise UserError(
            f"{given} holds other weights than those that {bundle.path} was built from: give the directory of "
            f"{built_from.model}, or build the bundle again"
        )
    return folder, ""


def parameters(source: ModelSource) -> int:
    """How many parameters a UNet's safetensors hold, read from their headers."""
    total = 0
    for path in weight_files(source.folder, source.variant):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        total += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return total
