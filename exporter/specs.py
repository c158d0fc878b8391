"""Specs of a graph's inputs and outputs: names, dtypes and symbolic shapes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import InternalError, ShapeError

if TYPE_CHECKING:
    import torch

Dim = int | str
Shape = tuple[int, ...]

DTYPES = ("float32", "float16", "bfloat16", "int64")
SYMBOLS = ("batch", "frames", "sequence", "height", "width")
"""All dimensions that diffusers' UNets leave open; height and width are those of the latent."""

DIM_PATTERN = r"^(?:[1-9][0-9]*\*)?(?:{0})(?:\*(?:{0}))*(?:/[1-9][0-9]*)?$".format("|".join(SYMBOLS))
"""Pattern of a symbolic dimension: ``height``, ``height/4``, ``batch*frames``, ``2*frames``."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph.

    Attributes:
        name: the tensor's name in the ONNX file.
        dtype: one of ``DTYPES``, named as in PyTorch.
        shape: an int for each fixed dimension. A symbolic dimension is one of ``SYMBOLS``, a fraction of height or
            width (``"height/4"``), or a product: ``"batch*frames"`` are the frames of several videos in sequence.
    """

    name: str
    dtype: str
    shape: tuple[Dim, ...]

    def resolve(self, dims: Mapping[str, int]) -> Shape:
        """Return the concrete shape at these dimensions, e.g. ``{"batch": 2, "height": 64, "width": 64}``."""
        return tuple(_value(dim, dims) for dim in self.shape)

    def fixed(self, dims: Mapping[str, int]) -> TensorSpec:
        """Return a copy with these dimensions fixed; all others stay symbolic."""
        return TensorSpec(self.name, self.dtype, tuple(_fixed(dim, dims) for dim in self.shape))

    def torch_dtype(self) -> torch.dtype:
        import torch

        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(str(d) for d in self.shape)}]"


def symbols(specs: Iterable[TensorSpec]) -> tuple[str, ...]:
    """Return the free symbols of these specs in order of first use."""
    seen: dict[str, None] = {}
    for spec in specs:
        for dim in spec.shape:
            if isinstance(dim, str):
                seen |= dict.fromkeys(factors(dim).symbols)
    return tuple(seen)


@dataclass(frozen=True)
class Factors:
    """Factors of a symbolic dimension: ``number * symbols[0] * symbols[1] ... / divisor``."""

    number: int
    symbols: tuple[str, ...]
    divisor: int

    def __str__(self) -> str:
        product = "*".join((*([str(self.number)] if self.number != 1 else []), *self.symbols))
        return product if self.divisor == 1 else f"{product}/{self.divisor}"


def factors(dim: str) -> Factors:
    """Return the factors of a symbolic dimension such as ``"2*frames"`` or ``"height/4"``."""
    product, _, divisor = dim.partition("/")
    parts = product.split("*")
    numbers = [int(part) for part in parts if part.isdigit()]
    return Factors(math.prod(numbers), tuple(part for part in parts if not part.isdigit()), int(divisor or 1))


def is_dim(text: str) -> bool:
    """Return whether a text is a symbolic dimension as offcut writes it."""
    return re.fullmatch(DIM_PATTERN, text) is not None


def solve(specs: Mapping[str, TensorSpec], shapes: Mapping[str, Shape], multiple: int = 1) -> dict[str, int]:
    """Return the sizes of the symbolic dimensions for concrete input shapes.

    Args:
        specs: the graph's inputs by name.
        shapes: a concrete shape for each input; missing and unknown names are errors.
        multiple: number that height and width must be a multiple of: the UNet's total downsampling.

    Raises:
        ShapeError: a name is missing or unknown, a fixed dimension differs, two tensors disagree on a symbol, or a
            dimension is empty.
    """
    if missing := sorted(set(specs) - set(shapes)):
        raise ShapeError(f"the UNet needs {', '.join(missing)}, which the pipeline did not pass")
    if unknown := sorted(set(shapes) - set(specs)):
        raise ShapeError(f"this engine has no input named {', '.join(unknown)}; it has {', '.join(specs)}")
    dims: dict[str, int] = {}
    for name, spec in specs.items():
        shape = shapes[name]
        if len(shape) != len(spec.shape):
            raise ShapeError(f"{name} has shape {list(shape)}, but the engine takes {list(spec.shape)}")
        for size, dim in zip(shape, spec.shape, strict=True):
            expected = dim if isinstance(dim, int) else _expected(dim, size, dims)
            if size != expected:
                raise ShapeError(
                    f"{name} has shape {list(shape)}, but the engine takes {list(spec.shape)}"
                    + (f" with {dim} = {expected}" if isinstance(dim, str) else "")
                )
    if empty := [dim for dim, size in dims.items() if size < 1]:
        raise ShapeError(f"the {' and '.join(empty)} of the inputs is empty; give at least 1")
    for side in ("height", "width"):
        if dims.get(side, 0) % multiple:
            valid = max(multiple, round(dims[side] / multiple) * multiple)
            raise ShapeError(
                f"the latent's {side} is {dims[side]}, but this UNet needs a multiple of {multiple}: "
                f"the nearest is {valid}"
            )
    return dims


def _expected(dim: str, size: int, dims: dict[str, int]) -> int:
    """Return the expected size of a dimension. A symbol gets this size in ``dims`` when it is used first.

    Fractions and products of symbols are always used after the symbols themselves.
    """
    return _value(dim, dims) if "/" in dim or "*" in dim else dims.setdefault(dim, size)


def _fixed(dim: Dim, dims: Mapping[str, int]) -> Dim:
    if isinstance(dim, int):
        return dim
    parts = factors(dim)
    free = tuple(symbol for symbol in parts.symbols if symbol not in dims)
    if not free:
        return _value(dim, dims)
    number = parts.number * math.prod(dims[symbol] for symbol in parts.symbols if symbol in dims)
    return str(Factors(number, free, parts.divisor))


def _value(dim: Dim, dims: Mapping[str, int]) -> int:
    if isinstance(dim, int):
        return dim
    parts = factors(dim)
    if unknown := [symbol for symbol in parts.symbols if symbol not in dims]:
        raise InternalError(f"dimension {' and '.join(unknown)!r} is not among {sorted(dims)}")
    return -(-parts.number * math.prod(dims[symbol] for symbol in parts.symbols) // parts.divisor)
