"""Reading of a tuned schedule's two files. Whatever does not fit together is refused before a generation uses it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import ValidationError

from ...errors import BundleError
from ..generation.correction import Kernel
from ..generation.forecast import Coefficients
from .document import TunedDocument

CORRECTION = "correction"
NAMES = ("scale", "slope", "shift")
_KERNEL_NAMES = ("weight", "bias")

_LARGEST_KERNEL = 15
"""Largest side of a correction's kernel; ``tune`` fits kernels of 1 and 3."""


def read_document(file: Path) -> TunedDocument:
    """Read the JSON file.

    Raises:
        BundleError: it is damaged.
    """
    try:
        document = TunedDocument.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise BundleError(f"{file} is damaged: {error.errors()[0]['msg'][:150]}") from error
    if fault := document.fault():
        raise BundleError(f"{file} is damaged: {fault}")
    return document


def read_coefficients(
    file: Path, document: TunedDocument, channels: Mapping[str, int | None]
) -> tuple[dict[int, dict[str, Coefficients]], dict[int, Kernel]]:
    """Read the safetensors file; return coefficients by call and feature, and the corrections' kernels by call.

    Args:
        document: the schedule of the same name.
        channels: channels of each feature that the bundle's engines cache; None where they are unknown.

    Raises:
        BundleError: a tensor has another name, shape, dtype or call than a tuned schedule has, or is not finite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise BundleError(f"{file} is damaged: {error}") from error
    values: dict[tuple[int, str], dict[str, float | torch.Tensor]] = defaultdict(dict)
    kernels: dict[int, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        parts = key.split(".")
        call = int(parts[0]) if parts[0].isdecimal() and len(parts[0]) < 6 else document.key.calls
        if len(parts) != 3 or call >= document.key.calls or not _is_usable(tensor):
            raise _damaged(file, key)
        _, feature, name = parts
        if feature == CORRECTION and name in _KERNEL_NAMES:
            kernels[call][name] = tensor
        elif feature in channels and name in NAMES and tensor.dim() == 1 and len(tensor) in (1, channels[feature]):
            values[call, feature][name] = float(tensor[0]) if len(tensor) == 1 else tensor
        else:
            raise _damaged(file, key)
    coefficients: dict[int, dict[str, Coefficients]] = {}
    for (call, feature), named in values.items():
        coefficients.setdefault(call, {})[feature] = Coefficients(**named)
    for call, parts_of_kernel in kernels.items():
        if not _is_kernel(parts_of_kernel):
            raise _damaged(file, f"{call}.{CORRECTION}")
    if set(kernels) != set(document.corrected):
        raise BundleError(f"{file} is damaged: it corrects other calls than its schedule says")
    return coefficients, {call: Kernel(**parts_of_kernel) for call, parts_of_kernel in kernels.items()}


def _is_usable(tensor: torch.Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.numel() > 0 and bool(torch.isfinite(tensor).all())


def _is_kernel(parts: Mapping[str, torch.Tensor]) -> bool:
    """Return whether tensors are the weight [channels, inputs, size, size] and bias [channels] of a convolution."""
    if set(parts) != set(_KERNEL_NAMES) or parts["weight"].dim() != 4:
        return False
    channels, _, height, width = parts["weight"].shape
    return parts["bias"].shape == (channels,) and height == width and height % 2 == 1 and height <= _LARGEST_KERNEL


def _damaged(file: Path, key: str) -> BundleError:
    return BundleError(f"{file} is damaged: {key[:80]!r} is not a part of this schedule; tune the bundle again")
