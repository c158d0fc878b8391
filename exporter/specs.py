"""What a graph's inputs and outputs look like: names, dtypes and symbolic shapes."""

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
"""Every dimension that a UNet of diffusers leaves open; height and width are the latent's."""

DIM_PATTERN = r"^(?:[1-9][0-9]*\*)?(?:{0})(?:\*(?:{0}))*(?:/[1-9][0-9]*)?$".format("|".join(SYMBOLS))
"""How a dimension that is not fixed is written: ``height``, ``height/4``, ``batch*frames``, ``2*frames``."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph.

    Attributes:
        name: the tensor's name in the ONNX file.
        dtype: one of ``DTYPES``, named as in PyTorch.
        shape: an int for a fixed dimension, or a symbol of ``SYMBOLS``, or a spatial one divided, ``"height/4"``, or a
            product: the frames of several videos are one after the other in ``"batch*frames"``.
    """

    name: str
    dtype: str
    shape: tuple[Dim, ...]

    def resolve(self, dims: Mapping[str, int]) -> Shape:
        """The concrete shape for these dimensions, e.g. ``{"batch": 2, "height": 64, "width": 64}``."""
        return tuple(_value(dim, dims) for dim in self.shape)

    def fixed(self, dims: Mapping[str, int]) -> TensorSpec:
        """The same with these dimensions no longer free; others stay symbols."""
        return TensorSpec(self.name, self.dtype, tuple(_fixed(dim, dims) for dim in self.shape))

    def torch_dtype(self) -> torch.dtype:
        import torch

        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(str(d) for d in self.shape)}]"


def symbols(specs: Iterable[TensorSpec]) -> tuple[str, ...]:
    """The free symbols of these specs, in order of first use, divided ones left out."""
    seen: dict[str, None] = {}
    for spec in specs:
        for dim in spec.shape:
            if isinstance(dim, str):
                seen |= dict.fromkeys(factors(dim).symbols)
    return tuple(seen)


@dataclass(frozen=True)
class Factors:
    """What a symbolic dimension is made of: ``number * symbols[0] * symbols[1] ... / divisor``."""

    number: int
    symbols: tuple[str, ...]
    divisor: int

    def __str__(self) -> str:
        product = "*".join((*([str(self.number)] if self.number != 1 else []), *self.symbols))
        return product if self.divisor == 1 else f"{product}/{self.divisor}"


def factors(dim: str) -> Factors:
    """``"2*frames"``, ``"height/4"`` and the like, taken apart."""
    product, _, divisor = dim.partition("/")
    parts = product.split("*")
    numbers = [int(part) for part in parts if part.isdigit()]
    return Factors(math.prod(numbers), tuple(part for part in parts if not part.isdigit()), int(divisor or 1))


def is_dim(text: str) -> bool:
    """Whether this is how offcut itself would write a dimension."""
    return re.fullmatch(DIM_PATTERN, text) is not None


def solve(specs: Mapping[str, TensorSpec], shapes: Mapping[str, Shape], multiple: int = 1) -> dict[str, int]:
    """The dimensions that these concrete input shapes stand for.

    Args:
        specs: the graph's inputs by name.
        shapes: a concrete shape for each of them (more names are an error, fewer too).
        multiple: height and width must be multiples of this (the UNet's total downsampling).

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
        for got, want in zip(shape, spec.shape, strict=True):
            expected = want if isinstance(want, int) else _expected(want, got, dims)
            if got != expected:
                raise ShapeError(
                    f"{name} has shape {list(shape)}, but the engine takes {list(spec.shape)}"
                    + (f" with {want} = {expected}" if isinstance(want, str) else "")
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


def _expected(want: str, got: int, dims: dict[str, int]) -> int:
    """What this symbol stands for; on its first use what was given. Parts and products come after the whole ones."""
    return _value(want, dims) if "/" in want or "*" in want else dims.setdefault(want, got)


def _fixed(dim: Dim, dims: Mapping[str, int]) -> Dim:
    if isinstance(dim, int):
        return dim
    parts = factors(dim)
    open_ones = tuple(symbol for symbol in parts.symbols if symbol not in dims)
    if not open_ones:
        return _value(dim, dims)
    number = parts.number * math.prod(dims[symbol] for symbol in parts.symbols if symbol in dims)
    return str(Factors(number, open_ones, parts.divisor))


def _value(dim: Dim, dims: Mapping[str, int]) -> int:
    if isinstance(dim, int):
        return dim
    parts = factors(dim)
    if unknown := [symbol for symbol in parts.symbols if symbol not in dims]:
        raise InternalError(f"dimension {' and '.join(unknown)!r} is not among {sorted(dims)}")
    return -(-parts.number * math.prod(dims[symbol] for symbol in parts.symbols) // parts.divisor)
