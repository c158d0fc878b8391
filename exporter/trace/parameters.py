"""The parameter map of an export: which initializer holds each PyTorch parameter, and how to read it back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import ModelError

if TYPE_CHECKING:
    import torch

_DTYPES = {"FLOAT": "float32", "FLOAT16": "float16", "BFLOAT16": "bfloat16"}


@dataclass(frozen=True)
class Parameter:
    """Where a PyTorch parameter is stored: the initializer's name, and whether its matrix is transposed."""

    initializer: str
    transposed: bool


def read_parameters(path: Path) -> dict[str, Parameter]:
    """Read the parameter map of an export from its file."""
    entries = json.loads(path.read_text(encoding="utf-8"))
    return {name: Parameter(**entry) for name, entry in entries.items()}


class StoredWeights:
    """An export's weights by the names of PyTorch's parameters, read from disk one at a time.

    Attributes:
        shapes: shapes of PyTorch's parameters by name.
    """

    def __init__(self, graph: Path, parameters: Path) -> None:
        """
        Args:
            graph: ONNX file of the full graph, with its weights in the same directory.
            parameters: file with the parameter map of its export.
        """
        import onnx_ir as ir

        self._parameters = read_parameters(parameters)
        self._initializers = ir.load(graph).graph.initializers
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: self._shape(parameter)
            for name, parameter in self._parameters.items()
            if parameter.initializer in self._initializers
        }

    def read(self, name: str) -> torch.Tensor:
        """Return a copy of a parameter in PyTorch's layout and the export's dtype.

        Raises:
            ModelError: the parameter is stored quantized.
        """
        import torch

        parameter = self._parameters[name]
        stored = self._initializers[parameter.initializer].const_value
        if stored is None or stored.dtype.name not in _DTYPES:
            raise ModelError(f"the weight {name} is stored quantized, so nothing can be added to it")
        dtype = getattr(torch, _DTYPES[stored.dtype.name])
        tensor = torch.frombuffer(bytearray(stored.tobytes()), dtype=dtype).view(tuple(stored.shape.numpy()))
        return tensor.T.contiguous() if parameter.transposed else tensor

    def is_transposed(self, name: str) -> bool:
        """Return whether a parameter's matrix is stored transposed."""
        return self._parameters[name].transposed

    def read_row(self, name: str) -> torch.Tensor | None:
        """Return the first row of a parameter as it is stored, flat; None if it is stored quantized.

        Only the row is read from disk. A transposed parameter's row is a column of PyTorch's matrix.
        """
        import torch

        stored = self._initializers[self._parameters[name].initializer].const_value
        if stored is None or stored.dtype.name not in _DTYPES:
            return None
        values = stored.numpy()
        row = values if values.ndim < 2 else values[0]
        return torch.frombuffer(bytearray(row.tobytes()), dtype=getattr(torch, _DTYPES[stored.dtype.name]))

    def _shape(self, parameter: Parameter) -> tuple[int, ...]:
        shape = self._initializers[parameter.initializer].shape
        assert shape is not None
        sizes = tuple(int(size) for size in shape.numpy())
        return sizes[::-1] if parameter.transposed else sizes
