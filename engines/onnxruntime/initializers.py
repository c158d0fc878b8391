"""Replacement of a graph's weights for ONNX Runtime: small weights in the graph, other weights from memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def with_weights(content: bytes, weights: Mapping[str, torch.Tensor]) -> tuple[bytes, dict[str, torch.Tensor]]:
    """Replace the weights that a graph stores itself; return the graph, and the new weights of those in another file.

    Args:
        content: the serialised graph.
        weights: new weights by initializer; names that the graph does not have are ignored.
    """
    import onnx

    model = onnx.load_from_string(content)
    external = {}
    for tensor in model.graph.initializer:
        value = weights.get(tensor.name)
        if value is None:
            continue
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            external[tensor.name] = value
        else:
            replacement = onnx.TensorProto(
                name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, raw_data=_raw(value)
            )
            tensor.CopyFrom(replacement)
    return model.SerializeToString(), external


def add_weights(settings: Any, weights: Mapping[str, torch.Tensor], element_types: Mapping[str, int]) -> list[Any]:
    """Add weights to the settings of a session, which then takes them from memory.

    Returns:
        The values, which must live until the session is open.
    """
    import onnxruntime
    import torch

    values = []
    for tensor in weights.values():
        flat = tensor.cpu().contiguous()
        kind = element_types[str(flat.dtype).removeprefix("torch.")]
        array = (flat.view(torch.uint16) if flat.dtype == torch.bfloat16 else flat).numpy()
        values.append(onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, kind))
    if values:
        settings.add_external_initializers(list(weights), values)
    return values


def _raw(tensor: torch.Tensor) -> bytes:
    """Return a tensor's values as ONNX stores them."""
    import torch

    return tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()
